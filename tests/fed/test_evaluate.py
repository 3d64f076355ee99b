"""`fed.evaluate`: on checkpoints of every kind, the numbers that their run recorded."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fed import evaluate
from fed.report import RunRecords, rows_of
from fed.train import train

MERGE_LORA = Path(__file__).parents[2] / "scripts/merge_lora_weights.py"


def measured(tiny, tmp_path, *models, flags=()) -> dict[str, dict]:
    """What the command writes: model → its measures on heldout.json."""
    out = tmp_path / "new" / "measures.json"
    evaluate.main(["--models", *models, "--model-base", str(tiny / "llm"), "--batch-size", "4",
                   "--data", str(tiny / "heldout.json"), "--image-folder", str(tiny / "images"),
                   "--output", str(out), *flags])  # fmt: skip
    return {row["model"]: row["measures"]["heldout"] for row in json.loads(out.read_text())["rows"]}


def assert_alike(found: dict, expected: dict) -> None:
    assert found["samples"] == expected["samples"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["exact"] == pytest.approx(expected["exact"])


def name_template(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"conversation_template": "v1"}))


@pytest.fixture
def run(flags, tiny, tmp_path):
    """`run(NAME, flag=value, …)`: the folder of a federated run of one round."""

    def make(name, **changes):
        train(flags(fed_clients=tiny / "clients.yaml", output_dir=tmp_path / name,
                    fed_eval_data_path=[tiny / "heldout.json"], **changes))  # fmt: skip
        return tmp_path / name

    return make


def test_the_numbers_are_those_of_the_runs(run, tiny, tmp_path, capsys):
    shared, apart = run("shared"), run("apart", fed_method="local")
    name_template(shared)  # of the language model's chats: a projector alone is aligned with plain
    capsys.readouterr()
    found = measured(tiny, tmp_path, f"FedAvg={shared}", str(apart))
    rows = rows_of([RunRecords.load("FedAvg", shared), RunRecords.load(str(apart), apart)])
    assert list(found) == [row["model"] for row in rows] == ["FedAvg", f"a, {apart}", f"b, {apart}"]
    for row in rows:
        assert_alike(found[row["model"]], row["measures"]["heldout"])
        assert found[row["model"]]["domains"].keys() == {"red", "green", "blue"}
        for domain, expected in row["measures"]["heldout"]["domains"].items():
            assert_alike(found[row["model"]]["domains"][domain], expected)
    printed, progress = capsys.readouterr()
    assert printed.startswith("| model")
    assert f"| {found['FedAvg']['loss']:.3f} |" in printed.replace("  ", "")
    assert "Caption loss per domain, heldout:" in printed
    assert "template plain" in progress


def test_a_lora_and_the_full_model_that_it_becomes(run, tiny, tmp_path, capsys):
    lora = run("lora", tune_mm_mlp_adapter=None, lora_enable=True, lora_r=2, version="v1")
    full = tmp_path / "full"
    merge_lora = runpy.run_path(str(MERGE_LORA))["main"]
    merge_lora(["--model-path", str(lora), "--model-base", str(tiny / "llm"),
                "--save-model-path", str(full)])  # fmt: skip
    name_template(full)
    with pytest.raises(SystemExit):
        measured(tiny, tmp_path, str(lora))
    assert f"error: {lora}: --version is missing" in capsys.readouterr().err
    expected = RunRecords.load("lora", lora).final["global"]["heldout"]
    (alone,) = measured(tiny, tmp_path, str(lora), flags=["--version", "v1"]).values()
    (whole,) = measured(tiny, tmp_path, str(full)).values()
    assert_alike(alone, expected)
    assert_alike(whole, expected)


def test_several_files_and_a_key_of_the_domain(run, tiny, tmp_path):
    records = json.loads((tiny / "heldout.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps([{**r, "who": "me"} for r in records[:2]]))
    out = tmp_path / "measures.json"
    data = [str(tmp_path / "model.json"), str(tiny / "heldout.json")]
    evaluate.main(["--models", str(run("x")), "--model_base", str(tiny / "llm"), "--data", *data,
                   "--image_folder", str(tiny / "images"), "--domain", "who", "--rank",
                   "--output", str(out)])  # fmt: skip
    (row,) = json.loads(out.read_text())["rows"]
    assert row["model"] == str(tmp_path / "x")
    two, heldout = row["measures"]["model"], row["measures"]["heldout"]
    assert (two["samples"], heldout["samples"]) == (2, 6)
    assert (two["candidates"], heldout["candidates"]) == (2, 3)
    assert two["among_five"] == 1  # of two
    shared = two.keys() - {"domains", "candidates"}
    assert shared == {
        "samples", "loss", "exact", "explained", "other_loss", "first", "among_five",
    }  # fmt: skip
    assert two["domains"] == {"me": {k: two[k] for k in shared}}
    assert heldout["domains"] == {}


def test_names_of_a_file_are_ranked(run, tiny, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("a red picture\n\na blue picture\na green picture \na grey picture\n")
    model = str(run("x"))
    (found,) = measured(tiny, tmp_path, model, flags=["--candidates", str(names)]).values()
    assert found["candidates"] == 4
    assert 0 <= found["first"] <= found["among_five"] == 1
    assert "heldout: first five" in capsys.readouterr().out
    names.write_text("a red picture\n")
    with pytest.raises(SystemExit):
        measured(tiny, tmp_path, model, flags=["--candidates", str(names)])
    assert "'a green picture' is not among the candidate names" in capsys.readouterr().err


@pytest.fixture(scope="module")
def projector(tiny, tmp_path_factory):
    """A folder that looks like a projector's; bad input is found before it is read."""
    folder = tmp_path_factory.mktemp("projector")
    shutil.copy(tiny / "llm/config.json", folder)
    (folder / "mm_projector.bin").touch()
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "a={projector}", "a={projector}"], "--models: a is given twice"),
        (["--models", "{projector}", "./none"], "./none: no such folder"),
        (["--data", "{tiny}/none.json"], "none.json cannot be read"),
        (["--data", "{tiny}/heldout.json", "x/heldout.json"], "two files are called heldout"),
        (["--batch_size", "0"], "--batch_size 0: at least 1 is expected"),
        (["--candidates", "{tiny}/none.txt"], "none.txt is no text file that can be read"),
        (["--candidates", "{tiny}/images"], "images is no text file that can be read"),
        (["--candidates", "{projector}/mm_projector.bin"], "expected a name a line, found none"),
        (["--version", "plane"], "plane"),
        (["--device", "gpu"], "--device gpu: cuda, cuda:0, cpu or the like is expected"),
        (["--output", "{tiny}"], "this is a folder, a JSON file is expected"),
        ([], "mm_projector.bin"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, projector, tmp_path, capsys, flags, message):
    output = tmp_path / "measures.json"
    argv = ["--models", str(projector), "--data", f"{tiny}/heldout.json", "--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        evaluate.main(argv + [word.format(tiny=tiny, projector=projector) for word in flags])
    said = capsys.readouterr()
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert ended.value.code == 2
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_help_comes_without_torch():
    code = "import sys; from fed.evaluate import parser; parser().format_help()\n"
    code += "print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
