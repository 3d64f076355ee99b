"""Whether models are on one language model and one vision tower, by their configs and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fed.merging.sources import WHOLE, Source
from llava.model.checkpoint import NEWLINE, PROJECTOR_PREFIX
from llava.model.hf_layout import KEPT, Config, language_model_type

SAMPLE = 4096  # bytes of each tensor that a sampled fingerprint looks at
_PLACES = ("_name_or_path", "mm_vision_tower")  # paths, of which the last part counts


def describe(source: Source) -> dict[str, Any]:
    """What a config says of language model, tower and projector; only keys that it has."""
    if source.config is None:
        return {}
    hf = "text_config" in source.config
    values = _of_transformers(source.config) if hf else _of_upstream(source.config)
    for key in _PLACES:
        if values.get(key):
            values[key] = str(values[key]).rstrip("/").rpartition("/")[2]
    if source.kind in WHOLE:
        # It names where training began, and the weights themselves can be compared.
        values.pop("_name_or_path", None)
    return {key: value for key, value in values.items() if value not in (None, "")}


def _of_upstream(config: Config) -> dict[str, Any]:
    keys = ("hidden_size", "num_hidden_layers", "vocab_size", "_name_or_path", "mm_vision_tower")
    keys += ("mm_vision_select_layer", "mm_hidden_size")
    return {key: config.get(key) for key in keys} | {
        "model_type": language_model_type(config),
        "mm_projector_type": config.get("mm_projector_type") or "linear",
        # Adapters have their places by the order of the tasks, which is another for each task.
        "mm_pilot tasks": (config.get("mm_pilot") or {}).get("tasks"),
        "mm_vision_select_feature": config.get("mm_vision_select_feature") or "patch",
    }


def _of_transformers(config: Config) -> dict[str, Any]:
    """Its vocabulary has rows for tokens of its own, and its tower no name: neither is compared."""
    text, vision = config["text_config"], config.get("vision_config") or {}
    strategy = config.get("vision_feature_select_strategy", "default")
    clip = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    return {key: text.get(key) for key in ("hidden_size", "num_hidden_layers", "_name_or_path")} | {
        "model_type": text.get("model_type"),
        "mm_vision_tower": config.get(KEPT, {}).get("mm_vision_tower"),
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_hidden_size": vision.get("hidden_size"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "cls_patch" if strategy == "full" and clip else "patch",
    }


def differences(sources: Sequence[Source]) -> list[str]:
    """One clause for each key in which a source differs from an earlier one."""
    seen: dict[str, tuple[Any, Source]] = {}
    found = []
    for source in sources:
        for key, value in describe(source).items():
            first, of = seen.setdefault(key, (value, source))
            if value != first:
                found.append(f"{source.who} has {key} {value!r}, {of.who} has {first!r}")
    return found


def sample(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A digest of each tensor's type, shape and first 4 KB."""
    found = {}
    for name, tensor in tensors:
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        head = tensor.reshape(-1)[: SAMPLE // tensor.element_size()].contiguous()
        digest.update(head.view(torch.uint8).numpy())
        found[name] = digest.hexdigest()
    return found


def sampled_fingerprint(samples: dict[str, str]) -> str:
    """One digest of what `sample` gave, in 64 hex digits; the order is nothing."""
    return hashlib.sha256("".join(f"{n}{samples[n]}" for n in sorted(samples)).encode()).hexdigest()


def backbone_differences(sources: Sequence[Source]) -> list[str]:
    """One clause for each full folder whose language model or tower is not the first one's.

    Folders of both layouts have the layers of the language model alone in common: embeddings have
    other rows, and upstream's need not hold a tower.
    """
    mixed = len({source.kind for source in sources}) > 1
    samples = []
    for source in sources:
        weights = source.weights
        names = [n for n in weights if not n.startswith(PROJECTOR_PREFIX) and n != NEWLINE]
        names = [n for n in names if n.startswith("model.layers.")] if mixed else names
        samples.append(sample((name, weights[name]) for name in names))
        weights.release()
    found = []
    for source, own in zip(sources[1:], samples[1:], strict=True):
        names = samples[0].keys() | own.keys()
        other = sorted(name for name in names if samples[0].get(name) != own.get(name))
        if other:
            found.append(
                f"{source.who} differs from {sources[0].who} in {len(other)} of {len(names)} "
                f"tensors beside the projector, as {other[0]}"
            )
    return found
