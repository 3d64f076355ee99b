"""The parts of a run, loaded as its flags say: model, LoRA, tower, projector, tokenizer."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from llava.conversation import SeparatorStyle, get_template, template_of
from llava.errors import InputError
from llava.json_files import read_json
from llava.model.attention_float32 import train_in_float32
from llava.model.attention_impl import choose_attention
from llava.model.builder import folder_of, from_pretrained, load_tokenizer
from llava.model.checkpoint import (
    derive_projector,
    load_projector,
    read_config,
    separated_rows,
    tower_weights,
)
from llava.model.checkpoint_names import PROJECTOR_PREFIX
from llava.model.lora import (
    add_lora,
    attach_lora,
    beside_file,
    keep_beside,
    load_non_lora,
    read_beside,
)
from llava.model.multimodal_encoder.builder import build_vision_tower, check_projector
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.multimodal_projector.connector import TRAINED, connector_type
from llava.model.picture_tokens import (
    add_picture_tokens,
    grow_embeddings,
    separate_rows,
    uses_start_end,
)
from llava.model.quantize import keep_trainable, quantization
from llava.pictures import READING
from llava.state import load
from llava.tiling import default_resolutions
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.feature_cache import FeatureCache
from llava.train.sample_format import SampleFormat
from llava.transformers_private import mark_as_adapted


@dataclass(frozen=True)
class Session:
    """A model with what its data needs: everything that is loaded once."""

    model: transformers.PreTrainedModel  # or peft's PeftModel around it
    tokenizer: transformers.PreTrainedTokenizerBase
    sample_format: SampleFormat
    feature_cache: FeatureCache | None


def load_session(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> Session:
    """Load language model, tower, projector and tokenizer as the flags say; set what trains.

    The process group of a run of several processes stands before (`llava.train.distributed`).
    """
    # Seeded here and not by the Trainer, since a fresh projector is drawn now.
    transformers.set_seed(training_args.seed)
    config = training_config(model_args, data_args, training_args)
    compute = compute_dtype(training_args)
    attention = choose_attention(
        training_args.attn_implementation, training_args.device.type, compute
    )
    # What trains under --fp16 stays in float32, or its gradients could not be scaled.
    in_16_bits = training_args.bf16 or _frozen(model_args, training_args)
    model = from_pretrained(
        model_args.model_name_or_path,
        config,
        dtype=compute if in_16_bits else torch.float32,
        attn_implementation=attention,
        cache_dir=training_args.cache_dir,
        **quantization(
            training_args.bits,
            compute,
            {"": training_args.device},
            training_args.quant_type,
            training_args.double_quant,
        ),
    )
    keep_trainable(model)
    if training_args.attn_implementation in (None, "flash_attention_2"):  # no kind that must be
        train_in_float32(model)
    model.config.use_cache = False
    tokenizer, version = _training_tokenizer(model_args, training_args, model)
    sample_format = SampleFormat(
        version,
        image_aspect_ratio=data_args.image_aspect_ratio,
        mm_use_im_start_end=model_args.mm_use_im_start_end,
    )
    feature_cache = None
    if model_args.vision_tower:
        _attach_vision(model, tokenizer, model_args, training_args)
        sample_format = SampleFormat.of_model(model, version)
        # A tower that trains gives something else each time; the cache holds no tiles.
        if not (model_args.unfreeze_mm_vision_tower or sample_format.tiling):
            feature_cache = make_feature_cache(
                model.get_vision_tower(),
                sample_format,
                data_args.feature_cache,
                data_args.feature_cache_gb,
            )
    model = _set_trainable(model, model_args, training_args)
    return Session(model, tokenizer, sample_format, feature_cache)


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """The floating-point type of --bf16 and --fp16."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def _frozen(model_args: ModelArguments, args: TrainingArguments) -> bool:
    """Whether the language model's own weights stay as they are."""
    return args.lora_enable or model_args.tune_mm_mlp_adapter


def training_config(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
):
    """The config of what will train: mm_* keys decide how it is built and end in config.json."""
    config = read_config(model_args.model_name_or_path)
    config.tokenizer_padding_side = "right"
    config.tokenizer_model_max_length = training_args.model_max_length
    if not model_args.vision_tower:
        if hasattr(config, "tune_mm_mlp_adapter"):  # of the run that made the folder
            config.tune_mm_mlp_adapter = False
        return config
    _check_projector_type(config, model_args)
    config.mm_vision_tower = model_args.vision_tower
    tower = _tower(config, model_args)
    config.mm_hidden_size = tower.hidden_size
    if tower.kind:  # upstream's have no such key
        config.mm_vision_tower_type = tower.kind
    config.use_mm_proj = True
    config.image_aspect_ratio = data_args.image_aspect_ratio
    if data_args.image_aspect_ratio == "anyres":
        config.image_grid_pinpoints = (
            data_args.image_grid_pinpoints
            or getattr(config, "image_grid_pinpoints", None)
            or default_resolutions(tower.image_size)
        )
        _ = tower.image_size, tower.num_patches_per_side  # squares, or an error
    config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = training_args.freeze_mm_mlp_adapter
    config.mm_projector_lr = training_args.mm_projector_lr
    for key in (
        "mm_projector_type",
        "mm_vision_select_layer",
        "mm_vision_select_feature",
        "mm_patch_merge_type",
        "mm_use_im_start_end",
        "mm_use_im_patch_token",
    ):
        setattr(config, key, getattr(model_args, key))
    kind, _ = connector_type(model_args.mm_projector_type)
    kind.configure(config, model_args)
    return config


def _tower(config, model_args: ModelArguments) -> VisionTower:
    """The tower, not loaded yet, if it is the one that the projector was trained on."""
    file = model_args.pretrain_mm_mlp_adapter
    if not file:
        return build_vision_tower(config, delay_load=True)
    # The projector of the config, if it has one, is replaced by another.
    config.mm_hidden_size = config.mm_vision_tower_type = None
    tower = build_vision_tower(config, delay_load=True)
    beside = Path(file).with_name("config.json")
    if beside.is_file():
        check_projector(tower, SimpleNamespace(**read_json(beside)), f"the projector {file}")
    del config.mm_vision_tower_type
    return tower


def _check_projector_type(config, model_args: ModelArguments) -> None:
    """Refuse a type under which a LLaVA's own projector would be thrown away in silence."""
    present, asked = getattr(config, "mm_projector_type", None), model_args.mm_projector_type
    # From its base a connector derives the rest.
    allowed = (None, asked, connector_type(asked)[0].base)
    if present not in allowed and not model_args.pretrain_mm_mlp_adapter:
        raise InputError(
            f"--mm_projector_type is {asked!r}, "
            f"{model_args.model_name_or_path} is a LLaVA with {present!r}"
        )


def _training_tokenizer(model_args, training_args, model) -> tuple[Any, str]:
    """The tokenizer, and the conversation template that is trained."""
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
    )
    own = template_of(tokenizer)
    version = model_args.version or own or "v0"
    if own:  # the one to ask in; captions alone teach no talk
        plain = get_template(version).sep_style is SeparatorStyle.PLAIN
        model.config.conversation_template = own if plain else version
    if version == "v0" and tokenizer.pad_token is None:
        smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    elif tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, version


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict, tokenizer, model) -> None:
    """Add tokens to tokenizer and model; their rows start as the mean of all others."""
    if tokenizer.add_special_tokens(special_tokens_dict):
        grow_embeddings(model, len(tokenizer))


def _attach_vision(model, tokenizer, model_args, training_args) -> None:
    """Put tower, projector and picture tokens into a model, as the flags say."""
    tunes = model_args.unfreeze_mm_vision_tower
    source = model_args.model_name_or_path
    own_tower = getattr(model.config, "unfreeze_mm_vision_tower", False)
    # AdamW in pure bfloat16 loses small updates; DeepSpeed keeps its own float32 copy.
    in_float = not training_args.deepspeed
    model.load_vision_tower(
        dtype=torch.float32 if tunes and in_float else compute_dtype(training_args),
        device=training_args.device,
        weights=tower_weights(folder_of(source)) if own_tower else None,
    )
    if tunes or (own_tower and not _frozen(model_args, training_args)):
        model.tune_vision_tower()  # a submodule: what its name does not give must be saved
    projector = model.get_model().mm_projector
    if in_float:
        projector.float()
    file = model_args.pretrain_mm_mlp_adapter
    pretrained = load(file) if file else {}
    if file:
        load_projector(model, pretrained, file)
    add_picture_tokens(model, tokenizer, pretrained, file)
    if uses_start_end(model.config) and _frozen(model_args, training_args):
        separate_rows(model, tokenizer)


def make_feature_cache(
    tower: Any, sample_format: SampleFormat, where: str = "memory", limit_gb: float = 4.0
) -> FeatureCache | None:
    """A cache of the tower's features, keyed by the tower and by the processing.

    Args:
        where: as --feature_cache: `memory`, `off`, or a folder.
        limit_gb: as --feature_cache_gb.
    """
    if where == "off":
        return None
    if os.path.exists(where) and not os.path.isdir(where):
        raise InputError(f"--feature_cache {where}: this is not a folder")
    in_memory = where == "memory"
    key = ""  # a cache that no other process reads needs no name, which costs a look at all weights
    if not in_memory:
        processor = tower.image_processor.to_json_string()
        processing = f"{sample_format.image_aspect_ratio} {processor} {READING}"
        key = hashlib.sha256((tower.fingerprint() + processing).encode()).hexdigest()
    return FeatureCache(
        encode=lambda pixels: tower(pixels.to(tower.dtype)).cpu(),
        preprocess=sample_format.pixels,
        key=key,
        limit_bytes=int(limit_gb * 1e9),
        directory=None if in_memory else where,
    )


def _set_trainable(model: Any, model_args: ModelArguments, args: TrainingArguments) -> Any:
    """Freeze and unfreeze as the flags say; returns the model, wrapped by peft if it gets LoRA."""
    parts = model.get_model() if model_args.vision_tower else None
    if model_args.freeze_backbone:
        model.base_model.requires_grad_(False)
    if _frozen(model_args, args):
        model.requires_grad_(False)
    if args.lora_enable:
        model = _with_lora(model, args)
    if parts is not None:
        parts.mm_projector.train_groups(*(() if args.freeze_mm_mlp_adapter else TRAINED))
        if hasattr(parts, "image_newline"):
            parts.image_newline.requires_grad_(not args.freeze_mm_mlp_adapter)
        if (rows := separated_rows(model)) is not None:  # upstream's LoRA leaves them as they are
            rows.requires_grad_(model_args.tune_mm_mlp_adapter and not args.freeze_mm_mlp_adapter)
        parts.vision_tower.requires_grad_(model_args.unfreeze_mm_vision_tower)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"nothing would train: mm_projector_type {model_args.mm_projector_type}, "
            f"--tune_mm_mlp_adapter {model_args.tune_mm_mlp_adapter}, "
            f"--freeze_mm_mlp_adapter {args.freeze_mm_mlp_adapter}"
        )
    if args.bits < 16 and not args.lora_enable:
        # The Trainer refuses a quantised model that has no adapter; here the projector is it.
        mark_as_adapted(model)
    return model


def _with_lora(model: Any, args: TrainingArguments) -> Any:
    """The model in peft's wrapper, with a new LoRA or that of --lora_weight_path."""
    cast = not args.deepspeed
    folder = args.lora_weight_path
    if not folder:
        return add_lora(
            model,
            r=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            bias=args.lora_bias,
            cast=cast,
        )
    wrapped = attach_lora(model, folder, trainable=True, cast=cast)
    others = read_beside(folder)
    load_non_lora(wrapped, others, beside_file(folder))
    keep_beside(wrapped, others)
    beyond_base = model.get_model().mm_projector.beyond_base()
    if not any(PROJECTOR_PREFIX + name in others for name in beyond_base):
        derive_projector(wrapped)  # of a LoRA that trained with a plain projector
    return wrapped
