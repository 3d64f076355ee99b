"""Whether models can be merged: on one language model and one vision tower, and not all equal.

Configs are compared, and of full models samples of the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fed.merging.config import MergeConfig
from fed.merging.sources import WHOLE, Source
from llava.errors import InputError
from llava.model.checkpoint_names import NEWLINE, PROJECTOR_PREFIX
from llava.model.hf_layout import KEPT, Config, language_model_type

_KEYS = (
    *("hidden_size", "num_hidden_layers", "vocab_size", "_name_or_path", "mm_vision_tower"),
    *("mm_vision_tower_type", "mm_vision_select_layer", "mm_hidden_size"),
)
SAMPLE = 4096  # bytes of each tensor that a sampled fingerprint looks at
_PLACES = ("_name_or_path", "mm_vision_tower")  # paths, of which the last part counts


def describe(source: Source) -> dict[str, Any]:
    """A config's keys on language model, tower and projector; only those that it has."""
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
    connector = config.get("mm_projector_type") or "linear"
    return {key: config.get(key) for key in _KEYS} | {
        "model_type": language_model_type(config),
        "mm_projector_type": connector,
        # A connector with adapters has their order in its own entry, and it differs by task.
        f"mm_{connector} tasks": (config.get(f"mm_{connector}") or {}).get("tasks"),
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
    clauses = []
    for source in sources:
        for key, value in describe(source).items():
            first, owner = seen.setdefault(key, (value, source))
            if value != first:
                clauses.append(f"{source.label} has {key} {value!r}, {owner.label} has {first!r}")
    return clauses


def sample(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A digest of each tensor's type, shape and first 4 KB."""
    digests = {}
    for name, tensor in tensors:
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        head = tensor.reshape(-1)[: SAMPLE // tensor.element_size()].contiguous()
        digest.update(head.view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return digests


def sampled_fingerprint(samples: dict[str, str]) -> str:
    """One digest of the result of `sample`, in 64 hex digits; the order is nothing."""
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
    clauses = []
    for source, digests in zip(sources[1:], samples[1:], strict=True):
        all_names = samples[0].keys() | digests.keys()
        other = sorted(name for name in all_names if samples[0].get(name) != digests.get(name))
        if other:
            clauses.append(
                f"{source.label} differs from {sources[0].label} in {len(other)} of "
                f"{len(all_names)} tensors beside the projector, as {other[0]}"
            )
    return clauses


def check_identity(
    experts: Sequence[Source], base: Source | None, config: MergeConfig
) -> list[str]:
    """Refuse models on different backbones; with --force, list the differences.

    Returns:
        One sentence for each difference that was forced; empty where there is none.
    """
    found = differences([*experts, *([base] if base else [])])
    hint = ""
    if config.scope == "projector" and all(e.kind in WHOLE for e in experts):
        tuned = backbone_differences(experts)
        hint = "; --scope all merges language models that were tuned, too" if tuned else ""
        found += tuned
    if found and not config.force:
        raise InputError(
            f"the models are not on one backbone: {found[0]}{hint}; --force merges all the same"
        )
    return [f"Merged by force: {clause}." for clause in found]


def check_known(experts: Sequence[Source]) -> list[str]:
    """Warn of experts whose language model nothing tells."""
    silent = [expert.given for expert in experts if not expert.config]
    if not silent:
        return []
    return [
        f"no config.json tells the language model and tower of {', '.join(silent)}: that all "
        "experts have the same ones is taken on trust."
    ]


def check_same(
    experts: Sequence[Source], prints: Sequence[str], base: Source | None, base_print: str | None
) -> list[str]:
    """Refuse where nobody learnt anything; warn of experts that are equal, or equal to the base."""
    warnings = []
    first: dict[str, Source] = {}
    for expert, fingerprint in zip(experts, prints, strict=True):
        other = first.setdefault(fingerprint, expert)
        if other is not expert:
            warnings.append(f"{expert.label} is the same as {other.label}: it counts twice.")
    if base is not None and all(fingerprint == base_print for fingerprint in prints):
        raise InputError(f"every expert is equal to {base.label}: there is nothing to merge")
    for expert, fingerprint in zip(experts, prints, strict=True):
        if base is not None and fingerprint == base_print:
            warnings.append(f"{expert.label} is equal to {base.label}: it has learnt nothing.")
    return warnings
