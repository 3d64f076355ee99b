"""The graft: any causal language model of transformers becomes its LLaVA.

`llava_class(LlamaForCausalLM)` is `LlavaLlamaForCausalLM`: the same class with a projector at
`model.mm_projector`, a vision tower beside it, and picture features in place of the image tokens.
Nothing else of the base changes, so its weights, its `model_type` and its generation are untouched,
and the state dict has upstream's names without a mapping.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.mm_utils import expand_image_tokens
from llava.model.attention_impl import attention_of, eager_attention
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.tiling import MERGE_TYPES, Size, Tiling, read_resolutions
from llava.tiling import unpad_image as unpad_image  # upstream has it here

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    from llava.model.multimodal_projector.connector import Connector

    class HeadlessModel(PreTrainedModel):
        """The language model without its head, as the graft has it."""

        mm_projector: Connector
        image_newline: nn.Parameter
        vision_tower: VisionTower | None

    class _CausalLM(PreTrainedModel, GenerationMixin):
        """A causal language model of transformers, whose config may have upstream's keys."""

        config: Any

        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear: ...

else:
    _CausalLM = object  # `llava_class` puts the real one there


class LlavaMixin(_CausalLM):
    """The graft's part of a class; `llava_class` adds a causal language model."""

    # One mean over the labelled tokens of each micro-batch, as upstream: the Trainer then divides
    # by the accumulation steps instead of passing a token count.
    accepts_loss_kwargs = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        model = self.get_model()
        # Not a submodule: a frozen tower has no place in state dict, optimizer or ZeRO.
        object.__setattr__(model, "vision_tower", None)
        if getattr(config, "mm_hidden_size", None):
            model.mm_projector = build_vision_projector(config)
            if merge_type(config) == "spatial_unpad":
                model.image_newline = nn.Parameter(
                    torch.randn(config.hidden_size) * config.hidden_size**-0.5
                )

    def get_model(self) -> HeadlessModel:
        """The headless language model, which carries `mm_projector` and `vision_tower`."""
        return getattr(self, self.base_model_prefix)

    def get_vision_tower(self) -> VisionTower | None:
        """The tower; one that the config names and nobody has loaded yet awaits `load_model()`."""
        model = self.get_model()
        if model.vision_tower is None and getattr(self.config, "mm_vision_tower", None):
            tower = build_vision_tower(self.config, delay_load=True)
            object.__setattr__(model, "vision_tower", tower)
        return model.vision_tower

    def _named_tower(self) -> VisionTower:
        tower = self.get_vision_tower()
        assert tower is not None, "config.mm_vision_tower names no vision tower"
        return tower

    def load_vision_tower(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> VisionTower:
        """Load the tower that the config names, frozen, and place it; returns it.

        Args:
            weights: a checkpoint's own tower weights, in place of those under the tower's name.
        """
        tower = build_vision_tower(self.config, delay_load=True)
        tower.load_model(weights=weights)
        object.__setattr__(self.get_model(), "vision_tower", tower.to(dtype=dtype, device=device))
        return tower

    def tune_vision_tower(self) -> None:
        """Train the tower too: from now on it is a submodule, and part of the state dict."""
        tower = self._named_tower()
        tower.requires_grad_(True)
        self.get_model().vision_tower = tower
        self.config.unfreeze_mm_vision_tower = True

    @property
    def tiling(self) -> Tiling | None:
        """The tiling of `anyres` pictures; None when the config says that pictures are not."""
        if getattr(self.config, "image_aspect_ratio", None) != "anyres":
            return None
        tower = self._named_tower()
        return Tiling(
            resolutions=read_resolutions(getattr(self.config, "image_grid_pinpoints", None)),
            tile=tower.image_size,
            side=tower.num_patches_per_side,
            merge=merge_type(self.config),
        )

    def picture_length(self, size: Size) -> int:
        """The number of tokens that a picture of `size` becomes."""
        if (tiling := self.tiling) is not None:
            return tiling.num_tokens(size)
        return self.get_model().mm_projector.num_tokens(self._named_tower().num_patches)

    @property
    def most_picture_length(self) -> int:
        """The largest number of tokens that a picture of any size becomes."""
        sizes = self.tiling.resolutions if self.tiling else [(1, 1)]
        return max(map(self.picture_length, sizes))

    # -- pictures to tokens ----------------------------------------------------------------------

    def encode_images(self, images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Pictures → tokens (batch, tokens, hidden_size), in the dtype of the embeddings.

        A picture is pixels (3, H, W) or the tower's features of it (patches, mm_hidden_size), as
        a feature cache gives them; a list may hold both kinds.
        """
        projector = self.get_model().mm_projector
        weight = next(projector.parameters(), self.get_input_embeddings().weight)
        if torch.is_tensor(images):
            features = self._named_tower()(images) if images.ndim == 4 else images
        else:
            pixels = [image for image in images if image.ndim == 3]
            encoded = iter(self._named_tower()(torch.stack(pixels)) if pixels else ())
            features = torch.stack(
                [next(encoded).to(weight) if i.ndim == 3 else i.to(weight) for i in images]
            )
        features = features.to(device=weight.device, dtype=weight.dtype)
        return projector(features).to(self.get_input_embeddings().weight.dtype)

    def picture_tokens(
        self, images: torch.Tensor | Sequence[torch.Tensor], image_sizes: Sequence[Size] | None
    ) -> list[torch.Tensor]:
        """The tokens (n, hidden_size) of each picture.

        Args:
            images: what `encode_images` takes, or tiles: (1 + tiles, 3, H, W) each, as
                `process_images` gives them for `anyres`.
            image_sizes: (width, height) in pixels of each picture before it was processed; tiles
                that are laid out by place need it.
        """
        tiled = images.ndim == 5 if torch.is_tensor(images) else any(i.ndim == 4 for i in images)
        if not tiled:
            return list(self.encode_images(images))
        tiles = [image if image.ndim == 4 else image.unsqueeze(0) for image in images]
        encoded = self.encode_images(torch.cat(tiles)).split([len(t) for t in tiles])
        newline = getattr(self.get_model(), "image_newline", None)
        return [self._arranged(t, i, image_sizes, newline) for i, t in enumerate(encoded)]

    def _arranged(self, tokens, index, image_sizes, newline) -> torch.Tensor:
        merge = merge_type(self.config)
        if merge == "flat":
            return tokens.flatten(0, 1)
        if len(tokens) == 1:
            return tokens[0] if newline is None else torch.cat([tokens[0], newline[None]])
        if image_sizes is None or self.tiling is None:
            missing = "image_sizes" if image_sizes is None else "image_aspect_ratio anyres"
            raise InputError(f"mm_patch_merge_type {merge!r} lays out tiles by place: no {missing}")
        width, height = image_sizes[index]
        return self.tiling.arrange(tokens, (int(width), int(height)), newline)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_sizes=None,
        padding_side: str | None = None,
        image_positions: torch.Tensor | None = None,
    ):
        """Put picture features where the image tokens are.

        Args:
            input_ids: (batch, length); each picture is one −200, or already as many as its tokens.
            attention_mask: (batch, length) or None (then no position is padding).
            labels: (batch, length) or None.
            images, image_sizes: what `picture_tokens` takes, one for each picture in the order of
                the text. A row of text alone may have one too, as upstream asks for: if there are
                as many pictures as rows, it is passed over.
            padding_side: where rows are padded if they must be expanded here; default is the
                config's `tokenizer_padding_side`, `right` if that is missing.
            image_positions: where in `input_ids.flatten()` the expanded image tokens are, in order.
                With it nothing is looked up in `input_ids`, so the device is not waited for.

        Returns:
            (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels), or all as
            given with inputs_embeds None when there is no picture.
        """
        no_pictures = images is None or len(images) == 0
        next_token = input_ids.shape[1] == 1 and past_key_values is not None
        if no_pictures or next_token or self.get_vision_tower() is None:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        pictures = self.picture_tokens(images, image_sizes)
        if image_positions is None:
            pictures = _those_in_text(input_ids, attention_mask, pictures)
            if not _is_expanded(input_ids, pictures):
                counts = [len(picture) for picture in pictures]
                side = padding_side or getattr(self.config, "tokenizer_padding_side", None)
                limit = getattr(self.config, "tokenizer_model_max_length", None)
                input_ids, attention_mask, labels = _expand_rows(
                    input_ids, attention_mask, labels, counts, side or "right", limit
                )
                if position_ids is not None:
                    position_ids = attention_mask.cumsum(-1).sub(1).clamp(0)
            image_positions = (input_ids.flatten() == IMAGE_TOKEN_INDEX).nonzero().flatten()
        tokens = torch.cat(pictures)
        if len(tokens) != len(image_positions):
            raise InputError(
                f"{len(pictures)} pictures of {len(tokens)} tokens were given, "
                f"the text has places for {len(image_positions)}"
            )
        embeds = self.get_input_embeddings()(input_ids.clamp_min(0))
        places = image_positions.to(embeds.device)
        filled = embeds.flatten(0, 1).index_copy(0, places, tokens.to(embeds.device))
        return None, position_ids, attention_mask, past_key_values, filled.view_as(embeds), labels

    def _apply(self, *args, **kwargs):
        """The tower goes along to another device, submodule or not; its type stays its own."""
        super()._apply(*args, **kwargs)
        tower = getattr(self.get_model(), "vision_tower", None)
        if tower is not None and tower.is_loaded:
            tower.to(device=self.device)
        return self

    # -- forward and generate --------------------------------------------------------------------

    def _attention(self, asked: bool | None) -> contextlib.AbstractContextManager:
        """Inside, attention has weights to show if they are `asked` for (`output_attentions`)."""
        openly = asked and attention_of(self) != "eager"
        return eager_attention(self) if openly else contextlib.nullcontext()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        images=None,
        image_sizes=None,
        image_positions=None,
        label_positions=None,
        **kwargs,
    ):
        """As the base's, with pictures; see `prepare_inputs_labels_for_multimodal`.

        Args:
            label_positions: where in `labels.flatten()` a position is whose next label counts.
                The batch is then taken to be padded on the right; the logits are those of these
                positions alone, (1, positions, vocabulary), and the loss is their mean.
        """
        shown = False
        if inputs_embeds is None:
            (input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels) = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids,
                    position_ids,
                    attention_mask,
                    past_key_values,
                    labels,
                    images,
                    image_sizes,
                    image_positions=image_positions,
                )
            )
            shown = inputs_embeds is not None
            if inputs_embeds is None and labels is not None and self.get_model().vision_tower:
                # A batch of text alone still touches what turns pictures into tokens, or ranks of
                # DDP and ZeRO that have pictures would wait for it; and before the embeddings, as
                # with pictures: ZeRO-2 sums gradients in the order in which backward makes them.
                nothing = 0 * self._no_picture()
                inputs_embeds = self.get_input_embeddings()(input_ids) + nothing
                input_ids = None
        inputs = dict(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        with self._attention(kwargs.get("output_attentions")):
            outputs = self._forward_base(inputs, attention_mask, labels, label_positions)
        if labels is not None and shown and self.training:
            aux = self.get_model().mm_projector.aux_loss()
            if aux is not None:
                outputs.loss = outputs.loss + aux.to(outputs.loss.device)
        return outputs

    def _forward_base(self, inputs: dict, attention_mask, labels, positions):
        """The outputs of the base, or of the labelled positions alone where that suffices."""
        routed = inputs.get("output_router_logits")
        if routed is None and (routed := getattr(self.config, "output_router_logits", False)):
            # Routers' logits are there for their loss. In generation, where the mask is longer than
            # the new tokens, the base cannot even compute it.
            inputs["output_router_logits"] = routed = labels is not None
        if labels is not None and positions is not None and not routed:
            return self._forward_labelled(inputs, labels, positions)
        outputs = super().forward(attention_mask=attention_mask, labels=labels, **inputs)
        if labels is not None and not (labels[:, 1:] != IGNORE_INDEX).any():
            # Nothing to learn from (all answers cut): the mean over no token would be NaN.
            outputs.loss = 0 * outputs.logits.sum()
        if labels is not None and positions is not None:
            # A router's loss is of all positions, so all were run; the logits are as promised.
            places = positions.to(outputs.logits.device)
            outputs.logits = outputs.logits.flatten(0, 1)[places].unsqueeze(0)
        return outputs

    def _forward_labelled(self, inputs: dict, labels, positions):
        """Logits and loss of the positions that the loss reads, a fraction of the sequence.

        Padding on the right is seen by nothing before it, so there is no mask either, and
        attention takes its causal kernel.
        """
        with _keeping(self.get_model(), positions) as kept:
            outputs = super().forward(attention_mask=None, **inputs)
        if not kept:  # a base that passes its own headless model by, as OPT does
            outputs.logits = outputs.logits.flatten(0, 1)[positions].unsqueeze(0)
        targets = labels.flatten()[positions + 1].to(outputs.logits.device)
        total = nn.functional.cross_entropy(outputs.logits[0].float(), targets, reduction="sum")
        outputs.loss = total / max(len(targets), 1)
        return outputs

    def _no_picture(self) -> torch.Tensor:
        """A scalar that depends on everything between pixels and tokens."""
        tower = self._named_tower()
        shape: tuple[int, ...] = (1, 1, self.config.mm_hidden_size)
        if tower.is_tuned:
            shape = (1, *tower.pixel_shape)
        tokens = self.encode_images(torch.zeros(shape, device=self.device, dtype=tower.dtype))
        newline = getattr(self.get_model(), "image_newline", None)
        return tokens.sum() if newline is None else tokens.sum() + newline.sum()

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, **kwargs):
        """transformers' `generate` with pictures; the ids that come back are the new ones only.

        Rows may be padded on either side if an `attention_mask` says where.
        """
        with self._attention(kwargs.get("output_attentions")):
            if images is None:
                return self._generate_from_text(inputs, **kwargs)
            return self._generate_with_pictures(inputs, images, image_sizes, **kwargs)

    def _generate_with_pictures(self, inputs, images, image_sizes, **kwargs):
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        _, position_ids, attention_mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs,
            kwargs.pop("position_ids", None),
            kwargs.pop("attention_mask", None),
            None,
            None,
            images,
            image_sizes,
            padding_side="left",
        )
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        return super().generate(inputs_embeds=embeds, **kwargs)

    def _generate_from_text(self, inputs, **kwargs):
        """As with pictures if `inputs` is given; `input_ids` and the rest mean what they do in
        transformers.
        """
        if inputs is None:
            return super().generate(**kwargs)
        if found := int((inputs == IMAGE_TOKEN_INDEX).sum()):
            raise InputError(f"0 pictures were given, the text has {found} image tokens")
        kwargs.pop("position_ids", None)
        mask = kwargs.pop("attention_mask", None)
        ids, mask, _ = _expand_rows(inputs, mask, None, [], "left", None)
        embeds = self.get_input_embeddings()(ids)
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def merge_type(config) -> str:
    """`mm_patch_merge_type` of a config, checked."""
    found = getattr(config, "mm_patch_merge_type", None) or "flat"
    if found not in MERGE_TYPES:
        raise InputError(f"mm_patch_merge_type is {found!r}; known are {', '.join(MERGE_TYPES)}")
    return found


@contextlib.contextmanager
def _keeping(model: nn.Module, positions: torch.Tensor) -> Iterator[list]:
    """Inside, `model`'s last hidden state is only that at `positions` of the flattened batch.

    Yields a list that is not empty any more once that has been so.

    Of its last layer those parts are run there alone that treat each position by itself: no other
    position's output is read. (A checkpointed layer is run again when the hooks are gone.)
    """

    def keep(module, args, outputs):
        hidden = outputs.last_hidden_state.flatten(0, 1)
        outputs.last_hidden_state = hidden[positions.to(hidden.device)].unsqueeze(0)
        kept.append(True)
        return outputs

    kept: list[bool] = []
    handles = [model.register_forward_hook(keep)]
    layers = getattr(model, "layers", None)
    last = None if layers is None else layers[-1]
    if last is not None and not getattr(last, "gradient_checkpointing", False):
        for name in ("self_attn.o_proj", "mlp"):
            with contextlib.suppress(AttributeError):
                handles += _only_at(positions, last.get_submodule(name))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _only_at(positions: torch.Tensor, module: nn.Module) -> list:
    """Hooks by which `module`, (B, T, …) → (B, T, …), works at `positions`; 0 elsewhere."""
    shape: list[int] = []

    def gather(module, args):
        shape[:] = args[0].shape[:2]
        rows = args[0].flatten(0, 1)
        return (rows[positions.to(rows.device)].unsqueeze(0), *args[1:])

    def scatter(module, args, out):
        full = out.new_zeros(shape[0] * shape[1], out.shape[-1])
        return full.index_copy(0, positions.to(out.device), out[0]).unflatten(0, shape)

    return [module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)]


def _those_in_text(ids, mask, pictures: list[torch.Tensor]) -> list[torch.Tensor]:
    """`pictures` without those of rows of text alone, where there is one picture a row."""
    shown = ids == IMAGE_TOKEN_INDEX
    has_picture = (shown if mask is None else shown & mask.bool()).any(1).tolist()
    as_many = int(shown.sum()) in (len(pictures), sum(map(len, pictures)))
    if len(pictures) != len(ids) or all(has_picture) or as_many:
        return pictures
    return [picture for picture, kept in zip(pictures, has_picture, strict=True) if kept]


def _is_expanded(ids, pictures: list[torch.Tensor]) -> bool:
    """Whether a text has a place for each token of the pictures, and not one for each picture.

    Raises:
        InputError: it has neither.
    """
    counts = [len(picture) for picture in pictures]
    places = int((ids == IMAGE_TOKEN_INDEX).sum())
    if places not in (len(counts), sum(counts)):
        kinds = " or ".join(map(str, sorted(set(counts))))
        raise InputError(
            f"{len(pictures)} pictures of {kinds} tokens were given, the text has {places} image "
            "tokens"
        )
    return places != len(counts)


def _expand_rows(ids, mask, labels, counts: list[int], side: str, limit: int | None):
    """Repeat each image token as often as `counts` says; rows lose their padding, and get it anew.

    Rows with labels are cut to `limit` tokens, which must not cut a picture.
    """
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    left = iter(counts)
    rows, row_labels = [], []
    for index, row in enumerate(ids):
        row = row[keep[index]]
        own = [next(left) for _ in range(int((row == IMAGE_TOKEN_INDEX).sum()))]
        label = None if labels is None else labels[index][keep[index]]
        row, label = expand_image_tokens(row, label, own)
        if label is not None and limit and len(row) > limit:
            if (row[limit:] == IMAGE_TOKEN_INDEX).any():
                raise InputError(
                    f"tokenizer_model_max_length {limit} cuts off tokens of a picture "
                    f"(row {index} has {len(row)})"
                )
            row, label = row[:limit], label[:limit]
        rows.append(row)
        row_labels.append(label)
    ones = [torch.ones_like(row) for row in rows]

    def pad(sequences, value):
        return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)

    padded = None if labels is None else pad(row_labels, IGNORE_INDEX)
    return pad(rows, 0), pad(ones, 0), padded


def llava_class(base: type[PreTrainedModel]) -> type[LlavaMixin]:
    """The LLaVA of a causal language model: `LlamaForCausalLM` → `LlavaLlamaForCausalLM`.

    The class is made once and lives in this module under its name, so that it pickles.
    """
    name = f"Llava{base.__name__}"
    if name not in globals():
        globals()[name] = type(name, (LlavaMixin, base), {"__module__": __name__})
    return globals()[name]
