"""Scope all of LoRA folders: by factors, by products, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fed.merge import merge
from fed.numerics.lora_delta import Products, truncated
from llava.errors import InputError
from llava.state import read_tensors
from tests.fed.merging.conftest import LLM, close, model_of

ADAPTER, OTHERS = "adapter_model.safetensors", "non_lora_trainables.bin"


def mean(states: list[dict]) -> dict:
    return {n: sum(s[n].double() for s in states) / len(states) for n in states[0]}


def changed(folder: Path, file: str, **values) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_the_factors_of_loras(expert, tmp_path):
    paths = [expert("lora", seed, deep=True) for seed in (1, 2, 3)]
    out = tmp_path / "out"
    merged = merge(paths, out, method="linear", scope="all", base=str(expert("bin", 0)))
    for file in (ADAPTER, OTHERS):
        close(read_tensors(out / file), mean([read_tensors(p / file) for p in paths]), 1e-6)
    assert not (out / "recorded.safetensors").exists()
    assert merged.facts["form"] == "lora"
    model_of(out, LLM)
    model_of(out)  # the folder says what its base is


def test_zero_and_given_starts_of_loras(expert, tmp_path):
    """Half of what was learnt from no adapter is half of the factors; from a LoRA, half way."""
    paths = [expert("lora", seed, deep=True) for seed in (1, 2)]
    start, base = expert("lora", 0), str(expert("bin", 0))
    half = {"scale": 0.25}  # of a sum of two
    given = dict(method="task_arithmetic", scope="all", options=half)
    merge(paths, tmp_path / "zero", base=base, **given)
    middle = mean([read_tensors(p / ADAPTER) for p in paths])
    close(read_tensors(tmp_path / "zero" / ADAPTER), {n: t / 2 for n, t in middle.items()}, 1e-5)
    merge(paths, tmp_path / "lora", base=str(start), **given)
    origin = read_tensors(start / ADAPTER)
    expected = {n: (origin[n].double() + t) / 2 for n, t in middle.items()}
    close(read_tensors(tmp_path / "lora" / ADAPTER), expected, 1e-5)


def test_the_products_of_loras(expert, tmp_path):
    paths = [expert("lora", seed, deep=True) for seed in (1, 2)]
    out = tmp_path / "out"
    merge(paths, out, method="linear", scope="all", lora="product")
    found = read_tensors(out / ADAPTER)
    stems = [name.removesuffix(".lora_A.weight") for name in found if "lora_A" in name]
    assert len(stems) > 10

    def product(state: dict, stem: str) -> torch.Tensor:
        b, a = (state[f"{stem}.lora_{x}.weight"].double() for x in "BA")
        return b @ a

    for stem in stems:
        whole = sum(product(read_tensors(p / ADAPTER), stem) for p in paths) / 2
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        best = u[:, :4] * s[:4] @ v[:4]
        assert torch.allclose(product(found, stem), best, atol=1e-6)
        assert not torch.allclose(best, whole, atol=1e-4)  # something was cut off
    close(read_tensors(out / OTHERS), mean([read_tensors(p / OTHERS) for p in paths]), 1e-6)
    model_of(out, LLM)


def test_equal_loras_give_that_update(expert, tmp_path):
    path = expert("lora", 1, deep=True)
    twin = Path(shutil.copytree(path, tmp_path / "twin"))
    merge([path, twin], tmp_path / "out", method="linear", scope="all", lora="product")
    old, new = read_tensors(path / ADAPTER), read_tensors(tmp_path / "out" / ADAPTER)
    products = Products(old)
    for name, tensor in products.of(old).items():
        assert torch.allclose(products.of(new)[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("shape", [(7, 5), (1100, 1040)])
def test_the_best_matrix_of_a_rank(shape):
    draw = torch.Generator().manual_seed(3)
    exact = torch.randn(shape[0], 4, generator=draw) @ torch.randn(4, shape[1], generator=draw)
    left, values, right = truncated(exact, 4)
    assert torch.allclose(left * values @ right, exact, atol=1e-3)
    left, values, right = truncated(torch.ones(3, 2), 6)
    assert (left.shape, values.shape, right.shape) == ((3, 6), (6,), (6, 2))
    assert torch.allclose(left * values @ right, torch.ones(3, 2), atol=1e-6)


def test_a_method_of_the_whole_is_possible_where_all_fits(expert, tmp_path):
    paths = [expert("lora", seed, deep=True) for seed in (1, 2, 3)]
    merge(paths, tmp_path / "out", method="krum", scope="all")
    found = read_tensors(tmp_path / "out" / ADAPTER)
    assert any(
        all(torch.equal(t, read_tensors(p / ADAPTER)[n]) for n, t in found.items()) for p in paths
    )
    with pytest.raises(InputError, match="krum: needs all layers at once"):
        merge(paths, tmp_path / "x", method="krum", scope="all", lora="product")


@pytest.mark.parametrize(
    ("key", "value"), [("r", 8), ("lora_alpha", 16), ("target_modules", ["q_proj"])]
)
def test_adapters_that_do_not_fit(key, value, expert, tmp_path):
    paths = [expert("lora", 1), changed(expert("lora", 2), "adapter_config.json", **{key: value})]
    with pytest.raises(InputError, match=f"lora-2: adapter_config.json has {key}"):
        merge(paths, tmp_path / "x", method="linear", scope="all")


def test_an_adapter_as_a_pickle(expert, tmp_path):
    paths = [expert("lora", seed, deep=True) for seed in (1, 2)]
    states = [read_tensors(p / ADAPTER) for p in paths]
    for path, state in zip(paths, states, strict=True):
        (path / ADAPTER).unlink()
        torch.save(state, path / "adapter_model.bin")
    merge(paths, tmp_path / "out", method="linear", scope="all")
    found = torch.load(tmp_path / "out" / "adapter_model.bin", weights_only=True)
    close(found, mean(states), 1e-6)
    assert not (tmp_path / "out" / ADAPTER).exists()
    model_of(tmp_path / "out", LLM)
