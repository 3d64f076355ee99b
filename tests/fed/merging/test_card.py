"""The card, the command that it gives, the YAML, the dry run, and how soon the tool answers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from fed.merge import list_methods, main, merge
from fed.merging.card import explained_lines
from fed.merging.config import MergeConfig
from fed.merging.recipe import read_config
from fed.state import fingerprint, load
from llava.errors import InputError

ROOT = Path(__file__).parents[3]


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


def front(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def license_(folder: Path, text: str | None) -> Path:
    if text is not None:
        (folder / "README.md").write_text(f"---\nlicense: {text}\ntags: [x]\n---\n# A model\n")
    return folder


@pytest.fixture
def projectors(expert):
    return [expert("projector", seed) for seed in (1, 2)]


def test_what_the_card_says(projectors, expert, tmp_path):
    base, out = expert("bin", 0), tmp_path / "out"
    merge(projectors, out, method="ties", base=str(base), weights=[1, 3], options={"density": 0.5})
    values, text = front(out), (out / "README.md").read_text()
    assert values["base_model"] == [str(path) for path in projectors]
    assert values["library_name"] == "llava"
    assert {"merge", "llava"} <= set(values["tags"])
    assert "license" not in values
    assert "2 of 2 experts state no licence" in text
    for path in projectors:
        assert f"`{path}`" in text
        assert fingerprint(load(path / "mm_projector.bin"))[:16] in text
    assert fingerprint(load(base))[:16] in text
    assert "| `density` | `0.5` |" in text
    assert "| `scale` | `1.0` |" in text
    assert "`model.mm_projector.2`" in text
    assert metadata.version("torch") in text
    facts = json.loads((out / "merge.json").read_text())
    assert facts["experts"][1]["weight"] == 3
    assert facts["layers"].keys() == {
        "model.mm_projector.0",
        "model.mm_projector.2",
    }
    states = [load(path / "mm_projector.bin") for path in projectors]
    start = load(base)
    a, b = (
        torch.cat([(s[n].double() - start[n].double()).flatten() for n in sorted(start)])
        for s in states
    )
    told = facts["all"]
    assert told["norms"] == pytest.approx([float(a.norm()), float(b.norm())])
    assert told["cosines"][0][1] == pytest.approx(float(a @ b / a.norm() / b.norm()))
    shared = (0.25 * a + 0.75 * b).square().sum()
    whole = 0.25 * a.square().sum() + 0.75 * b.square().sum()
    assert told["kappa"] == pytest.approx(float(shared / whole))


def test_an_expert_without_weight_is_left_out_where_shares_are_told():
    experts = [{"weight": weight} for weight in (0.25, 0.0, 0.5, 0.25)]
    facts = {"experts": experts, "method_facts": {"explained": [0.4, 0.0, 0.5]}}
    listed, doubted = explained_lines(facts)
    assert listed.endswith("explain: expert 1 40.0 %, expert 3 0.0 %, expert 4 50.0 %.")
    assert doubted.startswith("The pictures of expert 3 explain 0.0 %")


def test_the_command_does_it_again(projectors, expert, tmp_path):
    """From another folder's name, with a path that a shell would take apart."""
    odd = Path(shutil.move(projectors[1], tmp_path / "an expert's $HOME; `x` | y"))
    out = tmp_path / "out"
    merge([projectors[0], odd], out, method="dare_ties", base=str(expert("bin", 0)),
          weights=[1 / 3, 2], options={"seed": 7}, overwrite=True)  # fmt: skip
    before = fingerprint(load(out / "mm_projector.bin"))
    text = (out / "README.md").read_text()
    python, *words = shlex.split(re.search(r"```bash\n(.*?)\n```", text, re.DOTALL)[1])
    assert python == "python"
    assert front(out)["base_model"][1] == str(odd)
    shutil.rmtree(out)
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert fingerprint(load(out / "mm_projector.bin")) == before
    assert (out / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("licenses", "expected", "said"),
    [
        (["apache-2.0", "apache-2.0"], "apache-2.0", "All experts have the licence apache-2.0"),
        (["apache-2.0", "mit"], None, r"different licences \(apache-2.0, mit\)"),
        (["mit", None], None, "1 of 2 experts state no licence"),
        (["[broken", "mit"], None, "1 of 2 experts state no licence"),
    ],
)
def test_licences(licenses, expected, said, projectors, tmp_path):
    paths = [license_(path, one) for path, one in zip(projectors, licenses, strict=True)]
    merge(paths, tmp_path / "out", method="linear")
    assert front(tmp_path / "out").get("license") == expected
    assert re.search(said, (tmp_path / "out" / "README.md").read_text())


@pytest.mark.parametrize(("form", "library"), [("lora", "peft"), ("hf", "transformers")])
def test_libraries(form, library, expert, tmp_path):
    scope = "all" if form == "lora" else "projector"
    merge([expert(form, 1), expert(form, 2)], tmp_path / "out", method="linear", scope=scope)
    assert front(tmp_path / "out")["library_name"] == library


# -- YAML -----------------------------------------------------------------------------------------


def recipe(folder: Path, text: str) -> str:
    (folder / "merge.yaml").write_text(text)
    return str(folder / "merge.yaml")


def test_a_yaml_and_flags_over_it(expert, tmp_path, capsys):
    expert("bin", 1), expert("bin", 2), expert("bin", 0)
    path = recipe(tmp_path, """
        method: ties
        experts: [bin-1/mm_projector.bin, {path: bin-2/mm_projector.bin, weight: 2}]
        base: bin-0/mm_projector.bin
        options: {density: 0.5, scale: 2}
        output: results/out
    """)  # fmt: skip
    main([path, "--options", "density=0.25"])
    out = tmp_path / "results" / "out"
    facts = json.loads((out / "merge.json").read_text())
    assert [e["weight"] for e in facts["experts"]] == [1, 2]
    assert facts["options"] == {"density": "0.25", "scale": "2.0"}
    assert facts["base"]["path"] == str(tmp_path / "bin-0" / "mm_projector.bin")
    assert f"-> {out}" in capsys.readouterr().out
    with pytest.raises(InputError, match="--overwrite"):
        main([path])
    found = read_config(path, {"experts": ["x", "y", "z"], "method": "linear"})
    assert found.weights is None
    assert found.experts == ("x", "y", "z")
    assert read_config(path, {"weights": [5.0, 6.0]}).weights == (5.0, 6.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("experts: [a, b]\nmethd: ties", "unknown key 'methd' .did you mean method"),
        ("experts: a", "experts: a list expected"),
        ("experts: [a, {weight: 2}]", "expert 2: a path, or {path, weight}"),
        ("experts: [a, {path: b, wieght: 2}]", "expert 2: unknown key 'wieght'"),
        ("experts: [a, {path: b, weight: much}]", "expert 2: weight is 'much'"),
        ("experts: [a, {path: b, weight: 2}]\nweights: [1, 2]", "weights are given both"),
        ("experts: [a, b]\nweights: [1, x]", "weights: a list of numbers expected"),
        ("experts: [a, b]\nforce: 1", "force: true or false expected, found 1"),
        ("experts: [a, b]\ncalibration_samples: 1.5", "a whole number expected, found 1.5"),
        ("experts: [a, b]\nbase: 3", "base: text expected, found 3"),
        ("experts: [a, b]\noptions: x", "options: names and values expected"),
        ("- a", "keys and values are expected"),
        ("{", "not YAML"),
        ("method: ties", "--experts is missing"),
    ],
)
def test_a_bad_yaml(text, said, tmp_path):
    with pytest.raises(InputError, match=said):
        read_config(recipe(tmp_path, text), {})
    with pytest.raises(InputError, match="none.yaml: No such file"):
        read_config(str(tmp_path / "none.yaml"), {})


def test_keys_with_dashes_and_values_that_are_left_empty(tmp_path):
    text = "experts: [a, b]\nmodel-base: llm\ncalibration_data: one.json\nbase:\nmethod:\n"
    expected = MergeConfig(("a", "b"), model_base="llm", calibration_data=("one.json",))
    assert read_config(recipe(tmp_path, text), {}) == expected


def test_settings_survive_a_command_line():
    given = MergeConfig(
        ("a b", "c"), "o u t", base="b'", method="ties", weights=(0.1, 3.0), scope="all",
        lora="product", config="c.json", force=True, overwrite=True, calibration_data=("x", "y"),
        image_folder="i", model_base="m", calibration_samples=3, version="v1", device="cuda",
    )  # fmt: skip
    from fed.merge import parser

    words = shlex.split(given.command({"density": 0.1}))
    assert words[:3] == ["python", "-m", "fed.merge"]
    flags = vars(parser().parse_args(words[3:]))
    assert flags.pop("options") == ["density=0.1"]
    assert read_config(None, flags) == given


# -- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bin", "full", "lora"])
def test_a_dry_run_writes_nothing(form, expert, tmp_path, capsys):
    scope = "projector" if form == "bin" else "all"
    paths = [str(expert(form, seed, deep=form != "bin")) for seed in (1, 2, 3)]
    before = sorted(tmp_path.rglob("*"))
    main(["--method", "ties", "--experts", *paths, "--base", str(expert(form, 0)), "--dry-run",
          "--output", str(tmp_path / "out"), "--scope", scope])  # fmt: skip
    added = set(tmp_path.rglob("*")) - set(before)
    assert all(f"{form}-0" in str(path) for path in added)
    text = capsys.readouterr().out
    for word in ("|T|", "% of |A_0|", "cosines", "shared: ", "would merge", "with ties density=0.2",
                 f"would write to {tmp_path / 'out'}", *paths):  # fmt: skip
        assert word in text
    assert ("joint directions" in text) == (form == "bin")


def test_the_joint_directions_of_a_dry_run(expert):
    """Of the whole basis, the mean by energy is the layer's own kappa."""
    paths = [expert("bin", seed) for seed in (1, 2, 3)]
    facts = merge(paths, method="linear", base=str(expert("bin", 0)), dry_run=True).facts
    for name, of in facts["directions"].items():
        assert of["kappa"] == pytest.approx(facts["layers"][name]["kappa"])
        assert of["count"] == 16


def test_all_methods_are_listed(capsys):
    main(["--methods"])
    text = capsys.readouterr().out
    assert text.strip() == list_methods()
    assert re.search(r"^ties +density=0.2 scale=1.0$", text, re.MULTILINE)
    assert re.search(r"^regmean .*needs --calibration_data", text, re.MULTILINE)
    assert "fedprox" not in text
    assert "local" not in text


def test_help_needs_no_torch_and_a_merge_no_transformers(projectors, tmp_path):
    code = (
        "import sys; from fed.merge import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    assert run("-c", code, "--help").stdout.endswith("[]\n")
    words = ["--method", "pivotmerge", "--experts", *map(str, projectors), "--output"]
    done = run("-c", code, *words, str(tmp_path / "out"))
    assert done.stdout.endswith("['torch']\n"), done.stdout + done.stderr


def test_the_command_line_ends_with_2_and_one_line(tmp_path):
    done = run("-m", "fed.merge", "--method", "linear", "--experts", "/no/a.bin", "/no/b.bin",
               "--output", str(tmp_path / "x"))  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: expert /no/a.bin: no such file\n"
