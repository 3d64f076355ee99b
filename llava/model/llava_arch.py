"""The graft: any causal language model of transformers becomes its LLaVA.

`llava_class(LlamaForCausalLM)` is `LlavaLlamaForCausalLM`: the same class with a projector at
`model.mm_projector`, a frozen vision tower beside it, and picture features in place of the image
tokens. Nothing else of the base changes, so its weights, its `model_type` and its generation are
untouched, and the state dict has upstream's names without a mapping.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.mm_utils import expand_image_tokens
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector


class LlavaMixin:
    """What the graft adds to a causal language model class; see `llava_class`."""

    # One mean over the labelled tokens of each micro-batch, as upstream: the Trainer then divides
    # by the accumulation steps instead of passing a token count.
    accepts_loss_kwargs = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # Not a submodule: a frozen tower has no place in state dict, optimizer or ZeRO.
        object.__setattr__(self.get_model(), "vision_tower", None)
        if getattr(config, "mm_hidden_size", None):
            self.get_model().mm_projector = build_vision_projector(config)

    def get_model(self) -> nn.Module:
        """The headless language model, which carries `mm_projector` and `vision_tower`."""
        return getattr(self, self.base_model_prefix)

    def get_vision_tower(self) -> CLIPVisionTower | None:
        return self.get_model().vision_tower

    def load_vision_tower(self, dtype: torch.dtype, device: torch.device | str) -> CLIPVisionTower:
        """Load the tower that the config names, frozen, and place it; returns it."""
        tower = build_vision_tower(self.config)
        if tower.hidden_size != self.config.mm_hidden_size:
            raise InputError(
                f"vision tower {tower.vision_tower_name} gives {tower.hidden_size} features, "
                f"the projector expects mm_hidden_size {self.config.mm_hidden_size}"
            )
        object.__setattr__(self.get_model(), "vision_tower", tower.to(dtype=dtype, device=device))
        return tower

    def encode_images(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """Pictures → tokens (batch, tokens, hidden_size), in the dtype of the embeddings.

        A picture is pixels (3, H, W) or the tower's features of it (patches, mm_hidden_size), as
        a feature cache gives them; a list may hold both kinds.
        """
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        weight = next(projector.parameters(), self.get_input_embeddings().weight)
        if isinstance(images, list):
            pixels = [image for image in images if image.ndim == 3]
            encoded = iter(tower(torch.stack(pixels)) if pixels else ())
            features = torch.stack(
                [next(encoded).to(weight) if i.ndim == 3 else i.to(weight) for i in images]
            )
        else:
            features = tower(images) if images.ndim == 4 else images
        features = features.to(device=weight.device, dtype=weight.dtype)
        return projector(features).to(self.get_input_embeddings().weight.dtype)

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
    ):
        """Put picture features where the image tokens are.

        Args:
            input_ids: (batch, length); each picture is one −200, or already as many as its tokens.
            attention_mask: (batch, length) or None (then no position is padding).
            labels: (batch, length) or None.
            images: what `encode_images` takes, in the order of their tokens, one per picture.
            padding_side: where rows are padded if they must be expanded here; default is the
                config's `tokenizer_padding_side`, `right` if that is missing.

        Returns:
            (None, position_ids, attention_mask, past_key_values, inputs_embeds, labels), or all as
            given with inputs_embeds None when there is no picture.
        """
        no_pictures = images is None or len(images) == 0
        if self.get_vision_tower() is None or no_pictures or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        tokens = self.encode_images(images)
        found, per_picture = int((input_ids == IMAGE_TOKEN_INDEX).sum()), tokens.shape[1]
        if found == len(tokens) and per_picture > 1:
            side = padding_side or getattr(self.config, "tokenizer_padding_side", None) or "right"
            input_ids, attention_mask, labels = _expand_rows(
                input_ids, attention_mask, labels, per_picture, side
            )
            position_ids = (
                None if position_ids is None else attention_mask.cumsum(-1).sub(1).clamp(0)
            )
        elif found != len(tokens) * per_picture:
            raise InputError(
                f"{len(tokens)} pictures of {per_picture} tokens were given, "
                f"the text has {found} image tokens"
            )
        embeds = self.get_input_embeddings()(input_ids.clamp_min(0))
        holes = (input_ids == IMAGE_TOKEN_INDEX).unsqueeze(-1)
        embeds = embeds.masked_scatter(holes, tokens.to(embeds.device))
        return None, position_ids, attention_mask, past_key_values, embeds, labels

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
        **kwargs,
    ):
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids,
                    position_ids,
                    attention_mask,
                    past_key_values,
                    labels,
                    images,
                    image_sizes,
                )
            )
            projector = getattr(self.get_model(), "mm_projector", None)
            if inputs_embeds is None and labels is not None and projector is not None:
                # A batch of text alone still touches the projector, or ranks of DDP and ZeRO that
                # have pictures would wait for it.
                inputs_embeds = self.get_input_embeddings()(input_ids)
                inputs_embeds = inputs_embeds + sum(0 * p.sum() for p in projector.parameters())
                input_ids = None
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )
        if labels is not None and not (labels[:, 1:] != IGNORE_INDEX).any():
            # Nothing to learn from (all answers cut): the mean over no token would be NaN.
            outputs.loss = 0 * outputs.logits.sum()
        return outputs

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, **kwargs):
        """transformers' `generate` with pictures; the ids that come back are the new ones only."""
        if images is None:
            return super().generate(inputs, **kwargs)
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


def _expand_rows(ids, mask, labels, num_tokens: int, side: str):
    """Repeat each image token `num_tokens` times; rows lose their padding and are padded anew."""
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    rows, row_labels = [], []
    for index, row in enumerate(ids):
        label = None if labels is None else labels[index][keep[index]]
        row, label = expand_image_tokens(row[keep[index]], label, num_tokens)
        rows.append(row)
        row_labels.append(label)
    ones = [torch.ones_like(row) for row in rows]

    def pad(sequences, value):
        return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)

    padded = None if labels is None else pad(row_labels, IGNORE_INDEX)
    return pad(rows, 0), pad(ones, 0), padded


def llava_class(base: type) -> type:
    """The LLaVA of a causal language model: `LlamaForCausalLM` → `LlavaLlamaForCausalLM`.

    The class is made once and lives in this module under its name, so that it pickles.
    """
    name = f"Llava{base.__name__}"
    if name not in globals():
        globals()[name] = type(name, (LlavaMixin, base), {"__module__": __name__})
    return globals()[name]
