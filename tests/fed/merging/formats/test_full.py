"""Scope all of full models: every tensor, layer by layer."""

from __future__ import annotations

import pytest
import torch

from fed import methods
from fed.merge import merge
from fed.merging.sources import model_weights
from llava.errors import InputError
from llava.model.shards import Shards
from tests.fed.merging.conftest import LLM, close, model_of


@pytest.mark.parametrize("form", ["full", "full bin", "hf", "hf 5"])
@pytest.mark.parametrize("method", ["linear", "ties", "fedcmp"])
def test_layer_by_layer_is_the_whole_state_at_once(form, method, expert, tmp_path):
    paths = [expert(form, seed, deep=True) for seed in (1, 2, 3)]
    base = expert(form, 0)
    out = tmp_path / "out"
    merge(paths, out, method=method, base=str(base), scope="all", weights=[1, 2, 3])
    kind = "transformers" if form.startswith("hf") else "full"
    states, start, found = [], {}, {}
    states = [dict(model_weights(path, kind)) for path in paths]
    start, found = dict(model_weights(base, kind)), dict(model_weights(out, kind))
    expected = methods.get(method)(states, weights=[1, 2, 3], base=start).state
    close(found, expected, 2e-3, 1e-5)
    if method == "linear":
        assert all(torch.equal(found[n], expected[n]) for n in found)
    assert list(Shards(out)) == list(Shards(paths[0]))
    assert {p.name for p in out.iterdir()} >= {p.name for p in paths[0].glob("*model*")}
    for name, tensor in Shards(paths[0]).items():  # buffers
        if name.endswith(("inv_freq", "position_ids")):
            assert torch.equal(Shards(out)[name], tensor)
    model_of(out)


def test_a_tuned_language_model_needs_the_scope(expert, tmp_path):
    paths = [expert("full", seed, deep=True) for seed in (1, 2)]
    with pytest.raises(InputError, match="differs from .* --scope all .*--force"):
        merge(paths, tmp_path / "out", method="linear")
    forced = merge(paths, tmp_path / "out", method="linear", force=True)
    assert "differs from" in forced.facts["forced"][0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "> [!WARNING]\n> Merged by force: expert" in card


def test_what_streams_has_no_place_for_a_method_of_the_whole(expert, tmp_path):
    paths = [expert("full", seed, deep=True) for seed in (1, 2, 3)]
    with pytest.raises(InputError, match="krum: needs all layers at once.*--scope projector"):
        merge(paths, tmp_path / "out", method="krum", scope="all")
    assert not (tmp_path / "out").exists()


def test_files_are_let_go_of_as_they_are_read(expert, tmp_path, monkeypatch):
    """At most one file an expert is open, and none for longer than so many bytes were read."""
    monkeypatch.setattr("fed.merging.sources.RELEASE_AFTER_BYTES", 4000)
    released = []
    release = Shards.release
    monkeypatch.setattr(Shards, "release", lambda self: (released.append(self), release(self)))
    paths = [expert("full", seed, deep=True) for seed in (1, 2)]
    merge(paths, tmp_path / "out", method="linear", scope="all")
    size = sum(t.numel() * t.element_size() for t in Shards(paths[0]).values())
    assert len(released) > 2 * size / 60_000


def test_a_base_without_some_tensors(expert, tmp_path):
    paths = [expert("full", seed, deep=True) for seed in (1, 2)]
    merged = merge(paths, tmp_path / "out", method="task_arithmetic", scope="all", base=str(LLM),
                   options={"scale": 1e-6}, force=True)  # fmt: skip
    assert any("mean stands in" in warning for warning in merged.facts["warnings"])
    start, found = Shards(LLM), Shards(tmp_path / "out")
    head = start["lm_head.weight"].float()
    assert torch.allclose(found["lm_head.weight"].float(), head, atol=1e-3)
    with pytest.raises(InputError, match="--base .*needs a full model, this has the form file"):
        merge(paths, tmp_path / "x", method="linear", scope="all", base=str(expert("bin", 0)))


def test_forms_that_do_not_go_together(expert, tmp_path):
    with pytest.raises(InputError, match="LoRA folders only or full models only"):
        merge([expert("full", 1), expert("lora", 2)], tmp_path / "x", method="linear", scope="all")
    with pytest.raises(InputError, match="has the form file"):
        merge([expert("bin", 1), expert("bin", 2)], tmp_path / "x", method="linear", scope="all")


def test_a_name_is_looked_up_without_reading(expert):
    weights = model_weights(expert("full", 0), "full")
    assert "lm_head.weight" in weights
    assert "lm_head.bias" not in weights
    assert weights._read == 0
