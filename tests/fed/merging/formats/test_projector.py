"""Scope projector: what comes out for every form that goes in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fed.merge import merge
from fed.state import check, load
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.shards import Shards, read_json
from tests.fed.merging.conftest import LLM

WHOLE = ("full bin", "full", "hf", "hf memory", "hf 5")
OTHERS = ("bin", "safetensors", "beside", "projector", "lora")


def mean(states: list[dict], weights: list[float]) -> dict:
    p = [w / sum(weights) for w in weights]
    return {n: sum(s[n].double() * q for s, q in zip(states, p, strict=True)) for n in states[0]}


def close(found: dict, expected: dict, rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), expected[name].double(), rtol, rtol * 1e-2), name


@pytest.mark.parametrize("form", [*OTHERS, *WHOLE])
def test_every_form_merges_and_loads(form, expert, loaded, projector_of, tmp_path):
    paths = [expert(form, seed) for seed in (1, 2, 3)]
    base = expert(form, 0)
    weights = [1.0, 2.0, 1.0]
    out = tmp_path / "out"
    merged = merge(paths, out, method="linear", base=str(base), weights=weights)
    expected = mean([projector_of(path) for path in paths], weights)
    half = form in WHOLE
    close(projector_of(out), expected, 1e-3 if half else 1e-6)
    close(merged.state, projector_of(out), 0.0)
    assert merged.folder == out
    if form in ("bin", "safetensors"):
        assert not (out / "config.json").exists()
        assert "--pretrain_mm_mlp_adapter" in merged.lines[-1]
        shutil.copy(expert("beside", 9).parent / "config.json", out)
    close(loaded(out, None if half else LLM), {n: t.float() for n, t in merged.state.items()}, 0.0)


@pytest.mark.parametrize("form", WHOLE)
def test_a_full_model_is_the_first_one_but_for_its_projector(form, expert, tmp_path):
    first, second = expert(form, 1), expert(form, 2)
    (first / "checkpoint-5").mkdir()
    (first / "checkpoint-5" / "config.json").write_text("{}")
    (first / "trainer_state.json").write_text("{}")
    (first / "optimizer.pt").write_bytes(b"0")
    out = tmp_path / "out"
    merge([first, second], out, method="linear", base=str(expert(form, 0)))
    old, new = Shards(first), Shards(out)
    assert list(old) == list(new)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {n for n in old if "mm_projector." in n or "multi_modal_projector" in n}
    assert all(old[n].dtype == new[n].dtype for n in old)
    files = {p.relative_to(first) for p in first.rglob("*") if p.is_file()}
    left = {Path("trainer_state.json"), Path("optimizer.pt"), Path("checkpoint-5/config.json")}
    left |= {Path(n) for n in ("recorded.json", "recorded.safetensors")} & files
    ours = {p.relative_to(out) for p in out.rglob("*") if p.is_file()} - {Path("recorded.json")}
    assert ours == files - left | {Path("README.md"), Path("merge.json")}
    assert read_json(out / "config.json") == read_json(first / "config.json")


def test_mixed_forms_give_a_projector(expert, loaded, projector_of, tmp_path):
    paths = [expert("full", 1), expert("beside", 2), expert("lora", 3), expert("hf", 4)]
    out = tmp_path / "out"
    merged = merge(paths, out, method="linear", base=str(expert("bin", 0)))
    assert merged.facts["form"] == "projector"
    assert {e["kind"] for e in merged.facts["experts"]} == {"full", "file", "lora", "transformers"}
    assert any("adapter is left out" in warning for warning in merged.facts["warnings"])
    expected = mean([projector_of(path) for path in paths], [1.0] * 4)
    close(loaded(out, LLM), expected, 1e-3)
    assert all(t.dtype == torch.float16 for t in merged.state.values())  # the first expert's


def test_a_config_of_transformers_becomes_upstreams(expert, loaded, tmp_path):
    paths = [expert("hf", 1), expert("bin", 2)]
    merge(paths, tmp_path / "out", method="linear")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["mm_hidden_size"] == 16
    assert "text_config" not in config
    loaded(tmp_path / "out", LLM)


def test_a_config_can_be_given(expert, loaded, tmp_path):
    paths, config = [expert("bin", 1), expert("bin", 2)], expert("beside", 3).parent / "config.json"
    merge(paths, tmp_path / "out", method="linear", config=str(config))
    loaded(tmp_path / "out", LLM)
    with pytest.raises(InputError, match="--config .*no mm_hidden_size"):
        merge(paths, tmp_path / "x", method="linear", config=str(LLM / "config.json"))


def test_a_missing_base_is_the_experts_mean(expert, tmp_path, capsys):
    paths = [expert("bin", seed) for seed in (1, 2, 3)]
    weights = [1.0, 2.0, 3.0]
    pivot = merge(paths, method="linear", weights=weights).state
    from fed.state import save

    save(pivot, tmp_path / "pivot.bin")
    options = {"scale": 0.5}
    alone = merge(paths, method="task_arithmetic", weights=weights, options=options)
    given = merge(paths, method="task_arithmetic", weights=weights, options=options,
                  base=str(tmp_path / "pivot.bin"))  # fmt: skip
    close(alone.state, given.state, 1e-5)
    assert alone.facts["base"] is None
    assert "weighted mean of the experts stands in" in capsys.readouterr().err


def test_results_have_the_first_experts_type_and_bases_are_not_rounded(expert, tmp_path):
    from fed.state import save

    state = load(expert("bin", 0))
    base = {n: t + 1e-4 * torch.ones_like(t) for n, t in state.items()}
    save({n: t.half() for n, t in state.items()}, tmp_path / "a.bin")
    save({n: t.bfloat16() for n, t in state.items()}, tmp_path / "b.bin")
    save(base, tmp_path / "base.bin")
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    merged = merge(paths, tmp_path / "out", method="linear", base=str(tmp_path / "base.bin"))
    assert {t.dtype for t in load(tmp_path / "out" / "mm_projector.bin").values()} == {
        torch.float16
    }
    assert [e["dtype"] for e in merged.facts["experts"]] == ["float16", "bfloat16"]
    half = load(tmp_path / "a.bin")
    own = {n: half[n].double() - base[n].double() for n in half}
    expected = sum(float(t.square().sum()) for t in own.values()) ** 0.5
    assert merged.facts["all"]["norms"][0] == pytest.approx(expected, rel=1e-6)


def test_what_lies_beside_a_projector_in_its_file_is_passed_over(expert, tmp_path):
    paths = [expert("bin", 1), expert("bin", 2)]
    state = torch.load(paths[1], weights_only=True)
    state |= {"model.embed_tokens.weight": torch.ones(3, 2), "model.image_newline": torch.ones(2)}
    torch.save(state, paths[1])
    merged = merge(paths, method="linear")
    assert len(merged.state) == 4


def test_a_newline_token_that_all_have_is_merged(expert, loaded, tmp_path):
    paths = [expert("v1.6", 1), expert("v1.6", 2)]
    names = merge(paths, tmp_path / "out", method="linear").state
    assert "model.image_newline" in names
    old, new = Shards(paths[0]), Shards(tmp_path / "out")
    other = Shards(paths[1])["model.image_newline"]
    assert torch.equal(old["model.image_newline"], other)
    assert torch.equal(new["model.image_newline"], other)
    model = load_pretrained_model(str(tmp_path / "out"), None, "x", device="cpu")[1]
    assert torch.equal(model.get_model().image_newline, other.float())


@pytest.mark.parametrize("method", ["fedavg", "fedcmp", "median", "pivotmerge", "ties"])
def test_any_method_of_the_registry(method, expert, tmp_path):
    from fed import methods

    paths = [expert("bin", seed) for seed in (1, 2, 3)]
    base = expert("bin", 0)
    merged = merge(paths, tmp_path / "out", method=method, base=str(base))
    direct = methods.get(method)([load(p) for p in paths], weights=[1, 1, 1], base=load(base))
    close(merged.state, direct.state, 0.0)
    on_disk = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert on_disk["method_facts"].keys() == direct.facts.keys() - {"clients"}
    check(load(tmp_path / "out" / "mm_projector.bin"), load(base), who="OUT")
