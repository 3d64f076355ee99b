"""Data that a method calibrates on: one file for all experts, or one for each."""

from __future__ import annotations

import pytest

from fed import methods
from fed.merge import merge
from fed.merging.calibration import load_calibration
from fed.state import load
from tests.fed.merging.conftest import LLM


def test_pivotmerge_weighs_experts_by_what_their_pictures_explain(expert, tiny, tmp_path, capsys):
    paths, base = [expert("projector", seed) for seed in (1, 2, 3)], str(expert("bin", 0))
    data = dict(calibration_data=[str(tiny / "a.json")], image_folder=str(tiny / "images"))
    result = merge(paths, tmp_path / "out", base=base, model_base=str(LLM), **data)
    shares = result.facts["method_facts"]["explained"]
    measured = load_calibration(
        str(paths[0]), str(LLM), data["calibration_data"], str(tiny / "images")
    )
    states = [load(path / "mm_projector.bin") for path in paths]
    assert shares == pytest.approx(
        [measured[0].explained(state).share for state in states], abs=1e-5
    )
    said = f"expert 1 {100 * shares[0]:.1f} %, expert 2 {100 * shares[1]:.1f} %"
    assert any(said in line for line in result.lines)
    assert said in (tmp_path / "out" / "README.md").read_text()
    direct = methods.get("pivotmerge")(
        states, weights=[1, 1, 1], base=load(base), calibration=measured * 3
    )
    assert all(result.state[n].allclose(t, atol=1e-5) for n, t in direct.state.items())
    plain = merge(paths, None, base=base, dry_run=False)
    assert "explained" not in plain.facts["method_facts"]


@pytest.mark.parametrize("form", ["projector", "lora", "full", "beside"])
def test_a_method_gets_the_data(form, expert, tiny, tmp_path):
    paths, base = [expert(form, seed) for seed in (1, 2)], expert("bin", 0)
    given = dict(image_folder=str(tiny / "images"), calibration_samples=4)
    given |= {} if form in ("lora", "full") else {"model_base": str(LLM)}
    files = [str(tiny / "a.json"), str(tiny / "b.json")]
    found = {
        len(data): merge(paths, tmp_path / f"out{len(data)}", method="fisher", base=str(base),
                         calibration_data=data, **given).state
        for data in (files[:1], files)
    }  # fmt: skip
    assert any(not (found[1][n] == found[2][n]).all() for n in found[1])
    if form == "projector":
        measured = load_calibration(
            str(paths[0]), str(LLM), files, given["image_folder"], samples=4
        )
        states = [load(path / "mm_projector.bin") for path in paths]
        direct = methods.get("fisher")(
            states, weights=[1, 1], base=load(base), calibration=measured
        )
        assert all(found[2][n].allclose(t) for n, t in direct.state.items())
    text = (tmp_path / "out2" / "README.md").read_text()
    assert f"--calibration_data {files[0]} {files[1]}" in text
    assert "calibration_samples 4" in text
