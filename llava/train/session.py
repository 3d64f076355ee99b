"""What a run is made of, as its flags say: model, LoRA, tower, projector, tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass

import torch
import transformers

from llava.errors import InputError
from llava.model.attention_impl import choose_attention
from llava.model.builder import folder_of, from_pretrained, load_tokenizer
from llava.model.checkpoint import (
    PROJECTOR_PREFIX,
    derive_projector,
    load_projector,
    read_config,
    separated_rows,
    tower_weights,
)
from llava.model.lora import (
    add_lora,
    attach_lora,
    beside_file,
    keep_beside,
    load_non_lora,
    read_beside,
)
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.connector import TRAINED
from llava.model.multimodal_projector.pilot import EXTRA, PilotSettings
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
from llava.train.data import picture_pixels
from llava.train.feature_cache import FeatureCache


@dataclass
class Session:
    """A model with what its data needs: everything that is loaded once."""

    model: transformers.PreTrainedModel  # or peft's PeftModel around it
    tokenizer: transformers.PreTrainedTokenizerBase
    feature_cache: FeatureCache | None


def load_session(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> Session:
    """Load language model, tower, projector and tokenizer as the flags say; set what trains.

    Fills `data_args.image_processor`, `.image_tokens`, `.image_grid_pinpoints`, `.tiling`,
    `.is_multimodal`, `.version` and `.mm_use_im_start_end`, which the data sets read.
    """
    # Seeded here and not by the Trainer, since a fresh projector is drawn now.
    transformers.set_seed(training_args.seed)
    training_args.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter

    config = training_config(model_args, data_args, training_args)
    attention = choose_attention(training_args.attn_implementation, training_args.device.type)
    compute = compute_dtype(training_args)
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
    model.config.use_cache = False
    tokenizer = _training_tokenizer(model_args, training_args, model)
    data_args.version = model_args.version
    data_args.image_tokens = 1
    data_args.mm_use_im_start_end = model_args.mm_use_im_start_end

    feature_cache = None
    if model_args.vision_tower:
        feature_cache = _attach_vision(model, tokenizer, model_args, data_args, training_args)
    model = _set_trainable(model, model_args, training_args)
    return Session(model, tokenizer, feature_cache)


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """What --bf16 and --fp16 say."""
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
        return config
    _check_projector_type(config, model_args)
    config.mm_vision_tower = model_args.vision_tower
    tower = build_vision_tower(config, delay_load=True)
    config.mm_hidden_size = tower.hidden_size
    config.use_mm_proj = True
    config.image_aspect_ratio = data_args.image_aspect_ratio
    if data_args.image_aspect_ratio == "anyres":
        config.image_grid_pinpoints = (
            data_args.image_grid_pinpoints
            or getattr(config, "image_grid_pinpoints", None)
            or default_resolutions(tower.config.image_size)
        )
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
    if model_args.mm_projector_type == "pilot":
        config.mm_pilot = _pilot_settings(model_args)
    return config


def _pilot_settings(model_args: ModelArguments) -> dict:
    """The --pilot_* flags as `config.mm_pilot`, checked."""
    flags = {name: v for name, v in vars(model_args).items() if name.startswith("pilot_")}
    given = {name.removeprefix("pilot_"): value for name, value in flags.items()}
    given["tasks"] = given["tasks"] or PilotSettings().tasks
    return dataclasses.asdict(PilotSettings(**given))


def _check_projector_type(config, model_args: ModelArguments) -> None:
    """Refuse a type under which a LLaVA's own projector would be thrown away in silence."""
    own = getattr(config, "mm_projector_type", None)
    if (own, model_args.mm_projector_type) == ("mlp2x_gelu", "pilot"):
        return  # its base; the other adapters are derived
    if own not in (None, model_args.mm_projector_type) and not model_args.pretrain_mm_mlp_adapter:
        raise InputError(
            f"--mm_projector_type is {model_args.mm_projector_type!r}, "
            f"{model_args.model_name_or_path} is a LLaVA with {own!r}"
        )


def _training_tokenizer(model_args, training_args, model):
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
    )
    if model_args.version == "v0" and tokenizer.pad_token is None:
        smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    elif tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict, tokenizer, model) -> None:
    """Add tokens to tokenizer and model; their rows start as the mean of all others."""
    if tokenizer.add_special_tokens(special_tokens_dict):
        grow_embeddings(model, len(tokenizer))


def _attach_vision(model, tokenizer, model_args, data_args, training_args) -> FeatureCache | None:
    tunes = model_args.unfreeze_mm_vision_tower
    source = model_args.model_name_or_path
    own_tower = getattr(model.config, "unfreeze_mm_vision_tower", False)
    # AdamW in pure bfloat16 loses small updates; DeepSpeed keeps its own float32 copy.
    in_float = not training_args.deepspeed
    tower = model.load_vision_tower(
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
    data_args.image_processor = tower.image_processor
    data_args.image_tokens = projector.num_tokens(tower.num_patches)
    data_args.image_grid_pinpoints = getattr(model.config, "image_grid_pinpoints", None)
    data_args.tiling = model.tiling
    data_args.is_multimodal = True
    # A tower that trains gives something else each time; the cache holds no tiles.
    return None if tunes or data_args.tiling else make_feature_cache(tower, data_args)


def make_feature_cache(tower, data_args: DataArguments) -> FeatureCache | None:
    """The cache that `--feature_cache` asks for; keyed by the tower and by the processing."""
    if data_args.feature_cache == "off":
        return None
    if os.path.exists(data_args.feature_cache) and not os.path.isdir(data_args.feature_cache):
        raise InputError(f"--feature_cache {data_args.feature_cache}: this is not a folder")
    in_memory = data_args.feature_cache == "memory"
    key = ""  # a cache that no other process reads needs no name, which costs a look at all weights
    if not in_memory:
        processing = f"{data_args.image_aspect_ratio} {tower.image_processor.to_json_string()}"
        processing += f" {READING}"
        key = hashlib.sha256((tower.fingerprint() + processing).encode()).hexdigest()
    return FeatureCache(
        encode=lambda pixels: tower(pixels.to(tower.dtype)).cpu(),
        preprocess=lambda path: picture_pixels(path, data_args),
        key=key,
        limit_bytes=int(data_args.feature_cache_gb * 1e9),
        directory=None if in_memory else data_args.feature_cache,
    )


def _set_trainable(
    model: transformers.PreTrainedModel, model_args: ModelArguments, args: TrainingArguments
) -> torch.nn.Module:
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
        model._hf_peft_config_loaded = True
    return model


def _with_lora(model: transformers.PreTrainedModel, args: TrainingArguments):
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
    if not any(name.startswith(PROJECTOR_PREFIX + EXTRA) for name in others):
        derive_projector(wrapped)  # of a LoRA that trained with a plain projector
    return wrapped
