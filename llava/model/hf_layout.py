"""Two layouts of one model: upstream's names and config, and those of transformers' own LLaVA.

Pure functions from names to names and from config to config; no file is touched here. On disk
transformers' layout has had three dialects, all of which are read:

    language_model.model.*        vision_tower.vision_model.*          4.x, and the hub (written)
    model.language_model.*        model.vision_tower.vision_model.*    as 4.52+ names them in memory
    model.language_model.*        model.vision_tower.*                 as 5.x does
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from llava.errors import InputError

if TYPE_CHECKING:
    from transformers import LlavaConfig, PreTrainedConfig

Config = dict[str, Any]

KEPT = "llava"
"""The key of transformers' config under which `hf_config` keeps what it cannot say itself."""

_DROPPED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$|^(model\.)?image_newline$")
# What upstream adds to a language model's config.
_OURS = re.compile(
    r"((un)?freeze_|tune_|pretrain_)?mm_\w+|use_mm_proj|s2(_scales)?"
    r"|image_(aspect_ratio|grid_pinpoints|crop_resolution|split_resolution)|tokenizer_\w+"
    r"|conversation_template"
)


# What `rename_to_llava` says of language model and projector, for `from_pretrained(key_mapping=)`.
FROM_HF = {
    r"^(model\.)?multi_modal_projector\.linear_1\.": "model.mm_projector.0.",
    r"^(model\.)?multi_modal_projector\.linear_2\.": "model.mm_projector.2.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(model\.language_model\.|language_model\.model\.)": "model.",
}


def rename_to_llava(name: str) -> str | None:
    """The upstream name of a tensor of transformers' layout (any dialect); None to drop it.

    Buffers that newer versions compute themselves are dropped. `InputError` for a name that is
    no part of a LLaVA-1.5.
    """
    if _DROPPED.search(name):
        return None
    bare = name.removeprefix("model.")
    if match := re.fullmatch(r"multi_modal_projector\.linear_([12])\.(weight|bias)", bare):
        return f"model.mm_projector.{0 if match[1] == '1' else 2}.{match[2]}"
    if match := re.fullmatch(r"vision_tower\.(?:vision_model\.)?(.+)", bare):
        return f"model.vision_tower.vision_tower.vision_model.{match[1]}"
    if match := re.fullmatch(r"(?:language_model\.)?(lm_head\..+)", name):
        return match[1]
    if match := re.fullmatch(r"language_model\.(?:model\.)?(.+)", bare):
        return f"model.{match[1]}"
    raise InputError(f"tensor {name} is no part of transformers' llava-1.5 layout")


def rename_to_hf(name: str) -> str | None:
    """The name of an upstream tensor in transformers' 4.x layout; None to drop it."""
    if _DROPPED.search(name):
        return None
    if match := re.fullmatch(r"model\.mm_projector\.([02])\.(weight|bias)", name):
        return f"multi_modal_projector.linear_{1 if match[1] == '0' else 2}.{match[2]}"
    if match := re.fullmatch(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", name):
        return f"vision_tower.vision_model.{match[1]}"
    if name.startswith(("model.mm_projector.", "model.vision_tower.")):
        raise InputError(f"tensor {name} has no place in transformers' llava-1.5 layout")
    if name.startswith(("model.", "lm_head.")):
        return f"language_model.{name}"
    raise InputError(f"tensor {name} is no part of a LLaVA in upstream's layout")


def llava_config(hf: Config, vision_tower: str, image_aspect_ratio: str = "square") -> Config:
    """Upstream's flat config of transformers' config, both as their config.json has them.

    Args:
        hf: transformers' `LlavaConfig` as a dict; what it leaves out has that class's defaults.
        vision_tower: what `mm_vision_tower` becomes.
        image_aspect_ratio: `pad` if the folder's picture processor pads, else `square`.

    The vocabulary is the one of `hf`. `model_type` is the language model's own; files say
    `llava_<model_type>`, see `llava.model.checkpoint.write_config`.

    Raises:
        InputError: another model type, or a setting that upstream's layout cannot express.
    """
    full = _read_hf_config(hf)
    # Its class has made configs of the dicts, and of what was missing.
    text_part = cast("PreTrainedConfig", full.text_config)
    vision: Any = full.vision_config
    has_class_token = vision.model_type == "clip_vision_model"
    strategy = full.vision_feature_select_strategy
    if strategy == "default" and not has_class_token:
        _refuse("vision_feature_select_strategy", strategy, "full (the tower has no class token)")
    text = text_part.to_dict()
    text["torch_dtype"] = hf.get("dtype") or hf.get("torch_dtype") or text.get("dtype")
    text["dtype"] = text["torch_dtype"]
    text["tie_word_embeddings"] = bool(full.tie_word_embeddings)
    kept = {k: v for k, v in hf.get(KEPT, {}).items() if _OURS.fullmatch(k)}
    defaults = {
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "tokenizer_padding_side": "right",
    }
    return {
        **text,
        **defaults,
        **kept,
        "use_mm_proj": True,
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": full.vision_feature_layer,
        "mm_vision_select_feature": (
            "cls_patch" if strategy == "full" and has_class_token else "patch"
        ),
        "image_aspect_ratio": image_aspect_ratio,
    }


def _read_hf_config(hf: Config) -> LlavaConfig:
    """Transformers' config of a dict; `InputError` if upstream's layout cannot express it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlavaConfig

    if hf.get("model_type") != "llava" or "text_config" not in hf:
        raise InputError(
            f"model_type is {hf.get('model_type')!r}; transformers' llava-1.5 ('llava' with a "
            "text_config) is expected"
        )
    try:
        full = LlavaConfig.from_dict({key: value for key, value in hf.items() if key != KEPT})
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise InputError(f"transformers does not take this LLaVA config: {error}") from None
    if not isinstance(full.vision_feature_layer, int):
        _refuse("vision_feature_layer", full.vision_feature_layer, "one layer")
    if full.projector_hidden_act != "gelu":
        _refuse("projector_hidden_act", full.projector_hidden_act, "gelu")
    if not full.multimodal_projector_bias:
        _refuse("multimodal_projector_bias", False, "true")
    return full


def hf_config(
    llava: Config,
    vision: Config,
    *,
    image_token_index: int,
    vocab_size: int,
    pad_token_id: int | None = None,
) -> Config:
    """Transformers' `LlavaConfig`, as a dict for config.json, of upstream's flat config.

    Args:
        llava: upstream's config.json.
        vision: the tower's own config (`CLIPVisionConfig.to_dict()`, or SigLIP's).
        image_token_index: id of `<image>`, below `vocab_size`, the rows of the embedding.

    Upstream's own keys and its vocabulary size are kept under `"llava"`, which transformers does
    not read: `llava_config` finds them there.

    Raises:
        InputError: a setting that transformers' llava-1.5 cannot express.
    """
    _check_expressible(llava)
    text = {
        key: value
        for key, value in llava.items()
        if not _OURS.fullmatch(key) and key not in ("transformers_version", "_name_or_path")
    }
    text["model_type"] = language_model_type(llava)
    text["vocab_size"] = vocab_size
    text["architectures"] = [a.removeprefix("Llava") for a in llava.get("architectures") or []]
    text["pad_token_id"] = llava.get("pad_token_id") if pad_token_id is None else pad_token_id
    has_class_token = vision["model_type"] == "clip_vision_model"
    whole = llava.get("mm_vision_select_feature") == "cls_patch" or not has_class_token
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    dtype = llava.get("dtype") or llava.get("torch_dtype")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype,
        "dtype": dtype,
        "text_config": text,
        "vision_config": vision,
        "image_token_index": image_token_index,
        "image_seq_length": patches + (whole and has_class_token),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": llava.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if whole else "default",
        "tie_word_embeddings": bool(llava.get("tie_word_embeddings", False)),
        "pad_token_id": text["pad_token_id"],
        KEPT: {
            **{key: value for key, value in llava.items() if _OURS.fullmatch(key)},
            **{key: llava.get(key) for key in ("vocab_size", "pad_token_id")},
        },
    }


def _check_expressible(llava: Config) -> None:
    """Refuse an upstream config that transformers' llava-1.5 cannot express."""
    projector = llava.get("mm_projector_type") or "linear"
    if projector != "mlp2x_gelu":
        _refuse("mm_projector_type", projector, "mlp2x_gelu")
    merge = llava.get("mm_patch_merge_type") or "flat"
    if merge != "flat":
        _refuse("mm_patch_merge_type", merge, "flat")
    aspect = llava.get("image_aspect_ratio") or "square"
    if aspect.startswith("anyres"):
        _refuse("image_aspect_ratio", aspect, "pad or square")
    if llava.get("s2"):
        _refuse("s2", True, "one scale")


def language_model_type(llava: Config) -> str:
    """`llava_mistral` → `mistral`; the bare `llava` of old files is Llama."""
    name = str(llava.get("model_type", "")).removeprefix("llava_")
    return "llama" if name in ("", "llava") else name


def _refuse(key: str, found: Any, expected: str) -> None:
    raise InputError(
        f"{key} is {found!r}, which the other layout cannot express; {expected} is expected"
    )
