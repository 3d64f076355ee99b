"""Scope all of LoRA folders: the adapters, and what was trained beside them (the projector).

`--lora factors` gives the method the matrices A and B of each module as they are, which is what is
commonly done; the mean of the factors is not the mean of the updates B A. `product` gives it B A,
and cuts the result back to the adapter's rank (see `fed.numerics.lora_delta`).
"""

from __future__ import annotations

import contextlib
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fed import methods
from fed.merging.compatibility import sample, sampled_fingerprint
from fed.merging.config import MergeConfig
from fed.merging.formats.format import Format, Put, by_layer, bytes_of, check_names, stand_in
from fed.merging.formats.rewrite import Streamed, copy_beside
from fed.merging.sources import Source, Weights, adapter_weights
from fed.numerics.lora_delta import Products
from fed.state import State, read_tensors, save
from llava.errors import InputError
from llava.json_files import read_json
from llava.model.checkpoint_names import on_disk
from llava.model.lora import (
    ADAPTER_CONFIG,
    NON_LORA_FILE,
    PEFT_PREFIX,
    TAKES_FROM_BASE,
    read_adapter_config,
    read_non_lora,
)

# Keys in which adapters must agree for their matrices to mean the same.
_ALIKE = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora",
          "use_dora", "fan_in_fan_out", "bias", "modules_to_save", "target_parameters",
          "trainable_token_indices")  # fmt: skip


_MAGNITUDE = ".lora_magnitude_vector"


class LoraFormat(Format):
    """Adapters and what trained beside them, in one mapping of names that do not meet."""

    name = "lora"
    fingerprints = (
        "A fingerprint is a SHA-256 over names, types, shapes and the first 4 KB of every tensor."
    )

    def __init__(self, config: MergeConfig, experts: Sequence[Source], base: Source | None):
        _check_alike(experts)
        self.sources = experts
        self.adapters = [adapter_weights(source.path) for source in experts]
        check_names(experts, self.adapters)
        self.others = [_others(source) for source in experts]
        check_names(experts, self.others)
        self._plain = [_join(a, o) for a, o in zip(self.adapters, self.others, strict=True)]
        start = _start(self.adapters[0], base)
        self._printed_base: Mapping[str, Tensor] | None = None
        if base is not None:
            self._printed_base = start if base.kind == "lora" else base.projector
        notes: list[str] = []
        if base and (lost := [name for name in self._plain[0] if name not in start]):
            notes.append(stand_in(base, lost))
        self.experts, self.base, self.notes = self._plain, start, notes
        self.products: Products | None = None
        if config.lora == "product":
            _check_products(experts[0], self.adapters[0])
            self.products = Products(self.adapters[0])
            self.experts = [self.products.of(tensors) for tensors in self._plain]
            self.base = self.products.of(start)
        names = list(self.experts[0])
        whole = methods.get(config.method).cross_layer and self.products is None
        self.groups = [names] if whole else by_layer(names)
        self.size = sum(map(bytes_of, (self.adapters[0], self.others[0])))
        self.written = (
            "This folder is a LoRA with the projector that belongs to it, to be loaded on its "
            f"language model; merged were the {config.lora} of the adapters."
        )

    def prints(self) -> tuple[list[str], str | None]:
        prints = [sampled_fingerprint(sample(tensors.items())) for tensors in self._plain]
        base = self._printed_base
        base_print = None if base is None else sampled_fingerprint(sample(base.items()))
        for adapter in self.adapters:
            adapter.shards.release()
        return prints, base_print

    @contextlib.contextmanager
    def writer(self, folder: Path) -> Iterator[Put]:
        first = self.sources[0]
        copy_beside(first.path, folder)
        streamed = Streamed(self.adapters[0], folder)
        others: State = {}

        def put(state: State) -> None:
            state = self.products.factors(state) if self.products else state
            others.update({n: t for n, t in state.items() if n in self.others[0]})
            streamed.put({n: t for n, t in state.items() if n not in self.others[0]})

        yield put
        streamed.close()
        if others:
            names = read_tensors(first.path / NON_LORA_FILE, mapped=True)
            own = dict(zip(self.others[0], names, strict=True))
            save({own[name]: tensor for name, tensor in others.items()}, folder / NON_LORA_FILE)

    def release(self) -> None:
        for adapter in self.adapters:
            adapter.release()


class _Zeros(Mapping[str, Tensor]):
    """The adapter before training: B is 0, and so is what an adapter adds.

    Not known are biases, whole modules, and DoRA's magnitudes, which are the base's norms.
    """

    def __init__(self, like: Weights):
        self.like = like
        own = (name for name in like if ".lora_" in name and not name.endswith(_MAGNITUDE))
        self.names = dict.fromkeys(own)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return torch.zeros_like(self.like[name])

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _start(adapter: Weights, base: Source | None) -> Mapping[str, Tensor]:
    """The start that experts are measured from: a LoRA folder's tensors, or no adapter at all."""
    if base is not None and base.kind == "lora":
        return _join(adapter_weights(base.path), _others(base))
    known = {} if base is None else dict(base.projector)
    # peft has the projector in the adapter's file, by the names of its own.
    return _join(_Zeros(adapter), known | {PEFT_PREFIX + name: t for name, t in known.items()})


def _others(source: Source) -> State:
    """The tensors that trained beside the adapter, by upstream's names."""
    if not (source.path / NON_LORA_FILE).is_file():
        return {}
    return {on_disk(n): t for n, t in read_non_lora(source.path, mapped=True).items()}


def _join(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    # A ChainMap writes into its first mapping only, and nothing is written into this one.
    return ChainMap(cast("dict[str, Tensor]", first), cast("dict[str, Tensor]", second))


def _check_products(first: Source, adapter: Mapping[str, Tensor]) -> None:
    """Refuse matrices whose product is not what the adapter adds to one linear layer."""
    shared = read_json(first.path / ADAPTER_CONFIG).get("target_parameters")
    if shared or any(".lora_embedding_A" in name for name in adapter):
        what = "target_parameters" if shared else "LoRA of an embedding"
        raise InputError(
            f"--lora product: {first.label} has {what}, and linear layers only are expected; "
            "--lora factors is possible"
        )


def _check_alike(experts: Sequence[Source]) -> None:
    """Refuse what is no LoRA, and adapters whose matrices cannot be put side by side."""
    for expert in experts:
        start = read_adapter_config(expert.path).init_lora_weights
        if str(start).lower().startswith(TAKES_FROM_BASE):
            raise InputError(
                f"{expert.label}: init_lora_weights is {start!r}, whose matrices are not the "
                "change to the base's weights; let peft save it as a plain LoRA "
                "(path_initial_model_for_weight_conversion)"
            )
    configs = [read_json(expert.path / ADAPTER_CONFIG) for expert in experts]
    for expert, config in zip(experts, configs, strict=True):
        for key in _ALIKE:
            found, expected = _value(config, key), _value(configs[0], key)
            if found != expected:
                raise InputError(
                    f"{expert.label}: {ADAPTER_CONFIG} has {key} {found!r}, {experts[0].label} has "
                    f"{expected!r}; adapters that are merged have the same"
                )


def _value(config: dict[str, Any], key: str) -> Any:
    value = config.get(key)
    return sorted(value) if isinstance(value, list) else value or None
