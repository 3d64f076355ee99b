"""fed.data on LLaVA's mix665k: clients of a task each, equal and apart, which Pilot takes."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml

from llava.errors import InputError
from tests.fed.data.small import BOX, LETTER, MIX, REGION, WORD, make_mix

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "docs/data.md").read_text()
SECTION = README.split("## LLaVA's mix665k, by task")[1].split("\n## ")[0]
COCO = "coco/train2017/7.jpg"


@pytest.fixture
def make(tmp_path, mix):
    """Run the command into `tmp_path/out`."""
    from fed.data.make_clients import main

    def run(*flags: object, folder: Path = mix, output: str = "out") -> Path:
        given = ["--input", folder / "llava_v1_5_mix665k.json", "--image_folder", folder]
        main(["task", *map(str, [*given, "--output", tmp_path / output, *flags])])
        return tmp_path / output

    return run


def clients(folder: Path) -> dict[str, list[dict]]:
    """Each client's records; its pictures are there."""
    found = {}
    for entry in yaml.safe_load((folder / "clients.yaml").read_text())["clients"]:
        assert entry["name"].rpartition("-")[0] == entry["task"]
        found[entry["name"]] = json.loads((folder / entry["data_path"]).read_text())
        for row in found[entry["name"]]:
            assert (folder / entry["image_folder"] / row["image"]).is_file()
    return found


def heldout(folder: Path) -> list[dict]:
    return json.loads((folder / "heldout.json").read_text())


def kind(row: dict) -> str:
    """The task that the small data made a record for."""
    return row["id"].rpartition("-")[0]


def test_nine_clients_of_three_tasks_in_equal_shares(make, mix):
    folder = make("--tasks", "coco-detail", "gqa", "ocr-vqa", "--heldout", 2, "--seed", 7)
    found = clients(folder)
    tasks = ("coco-detail", "gqa", "ocr-vqa")
    assert list(found) == [f"{task}-{i}" for task in tasks for i in (1, 2, 3)]
    assert {len(rows) for rows in found.values()} == {3}  # gqa: (12 - 2) // 3
    for name, rows in found.items():
        assert {kind(row) for row in rows} == {name.rpartition("-")[0]}
    assert Counter(row["domain"] for row in heldout(folder)) == dict.fromkeys(tasks, 2)
    assert all(kind(row) == row["domain"] for row in heldout(folder))
    pictures = [row["image"] for rows in [*found.values(), heldout(folder)] for row in rows]
    assert len(pictures) == len(set(pictures)) == 33
    before = json.loads((mix / "llava_v1_5_mix665k.json").read_text())
    assert all(row in before for rows in found.values() for row in rows)  # whole, all turns


def test_the_report_counts_what_is_in_no_client_by_task(make):
    report = (make("--tasks", "gqa", "textcaps", "--heldout", 2) / "clients.md").read_text()
    assert "| gqa-1 | 2 | 16.7% | gqa 100% |" in report
    assert "| held out | 4 | " in report
    assert "Dropped beyond equal shares: 5 samples." in report  # of 10 and 7 in 6 times 2
    assert "Left out" not in report
    assert "as rare" not in report
    for task, (count, *_) in MIX.items():
        line = f"Dropped as of another task, {task}: {count} samples."
        assert (line in report) == (task not in ("gqa", "textcaps"))


def test_shares_are_as_large_as_asked_and_another_seed_deals_others(make):
    flags = ["--tasks", "vqa", "ocr-vqa", "--clients_per_task", 2, "--samples", 4]
    found = clients(make(*flags, "--seed", 1))
    assert [len(rows) for rows in found.values()] == [4, 4, 4, 4]
    assert clients(make(*flags, "--seed", 1, output="again")) == found
    assert clients(make(*flags, "--seed", 2, output="other")) != found


def test_no_picture_that_is_held_out_is_in_a_client_whatever_its_task(make):
    flags = ["--tasks", "refcoco", "a-okvqa", "vqa", "--heldout", 2, "--clients_per_task", 2]
    for seed in range(8):
        folder = make(*flags, "--seed", seed, output=f"out{seed}")
        held = {row["image"] for row in heldout(folder)}
        found = clients(folder)
        assert not held & {row["image"] for rows in found.values() for row in rows}
        one, two = ({row["image"] for row in found[f"refcoco-{i}"]} for i in (1, 2))
        assert not one & two
        report = (folder / "clients.md").read_text()
        assert re.search(r"Dropped for a picture that is held out: \d+ samples\.", report)


def test_a_picture_of_gqa_is_the_one_of_visual_genome_with_its_name(make):
    for seed in range(4):
        flags = ["--tasks", "gqa", "vg", "--clients_per_task", 1, "--heldout", 4, "--seed", seed]
        folder = make(*flags, output=f"out{seed}")
        held = {Path(row["image"]).name for row in heldout(folder)}
        assert len(held) > 4
        rows = [row for found in clients(folder).values() for row in found]
        assert not held & {Path(row["image"]).name for row in rows}


def test_pictures_of_tasks_that_are_not_chosen_need_not_be_there(make, tmp_path):
    folder = make_mix(tmp_path / "part")
    for path in (folder / "coco/train2017").iterdir():
        path.unlink()
    found = clients(make("--tasks", "gqa", "ocr-vqa", folder=folder))
    assert [len(rows) for rows in found.values()] == [4] * 6


def test_a_missing_picture_is_refused_by_name_or_left_out(make, tmp_path):
    folder = make_mix(tmp_path / "part")
    (folder / "ocr_vqa/images/000000003.jpg").unlink()
    flags = ["--tasks", "ocr-vqa", "gqa"]
    with pytest.raises(InputError, match=r"\(id 'ocr-vqa-3'\): picture .*003.jpg does not exist"):
        make(*flags, folder=folder)
    out = make(*flags, "--skip_bad", folder=folder)
    assert "Left out for a fault: 1 samples." in (out / "clients.md").read_text()
    assert [len(rows) for rows in clients(out).values()] == [4] * 6


@pytest.mark.parametrize(
    ("image", "question", "turns", "task"),
    [
        ("gqa/images/7.jpg", "anything", 2, "gqa"),
        ("ocr_vqa/images/7.jpg", "anything", 8, "ocr-vqa"),
        ("textvqa/train_images/7.jpg", MIX["textcaps"][2], 2, "textcaps"),
        ("textvqa/train_images/7.jpg", f"What does it say?{WORD}", 2, "other"),
        ("vg/VG_100K/7.jpg", REGION, 20, "vg"),
        ("vg/VG_100K_2/7.jpg", BOX, 20, "vg"),
        ("vg/VG_100K/7.jpg", "Why?", 2, "other"),
        (COCO, REGION, 6, "refcoco"),
        (COCO, BOX, 2, "refcoco"),
        (COCO, f"Which?{LETTER}", 2, "a-okvqa"),
        (COCO, f"What?{WORD}", 10, "vqa"),
        (COCO, "Describe the following image.", 2, "coco-detail"),
        (COCO, "What's happening in the scene?", 2, "coco-detail"),
        (COCO, "What's happening in the scene?", 4, "llava-instruct"),  # a talk that begins so
        (COCO, "Why is it red?", 2, "llava-instruct"),
        ([COCO, "gqa/images/7.jpg"], "Why?", 2, "llava-instruct"),
        ("sam/images/7.jpg", "Describe the following image.", 2, "other"),
        (None, "Describe the following image.", 2, "text"),
    ],
)
@pytest.mark.parametrize("form", ["<image>\n{}", "{}\n<image>"])
def test_a_task_is_told_by_folder_and_first_question(image, question, turns, task, form):
    from fed.data.mix665k import task_of

    later = [{"from": "gpt", "value": f"x{WORD}"}, {"from": "human", "value": REGION}] * turns
    record = {"conversations": [{"from": "human", "value": form.format(question)}, *later][:turns]}
    assert task_of(record if image is None else {**record, "image": image}) == task


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["textvqa"],
            r"--tasks textvqa: unknown \(did you mean textcaps.*\); known are gqa, ocr-vqa, textc",
        ),
        (["OCR-VQA", "gqa"], "--tasks OCR-VQA: unknown; "),
        (["text"], "--tasks text: unknown"),
        (["gqa", "vg", "gqa"], "--tasks: gqa comes twice"),
        (["gqa", "--clients_per_task", 0], "--clients_per_task 0: 1 or more is expected"),
        (["gqa", "--samples", 0], "--samples 0: 1 or more is expected"),
        (["gqa", "--heldout", 12], "task gqa: --heldout 12: there are 12 samples"),
        (
            ["gqa", "ocr-vqa", "--samples", 4, "--heldout", 1],
            "task gqa: 3 clients with 4 samples each need 12; it has 12, without those held out "
            "and those of their pictures 11, and a client's share is 3",
        ),
        (
            ["vqa", "textcaps", "--clients_per_task", 10],
            "task textcaps: 10 clients with 1 samples each need 10; it has 9",
        ),
        (
            ["refcoco", "--clients_per_task", 2, "--samples", 9],  # nine pictures of two records
            "task refcoco: 2 clients with 9 samples each need 18; it has 18, .* share is 8",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        make("--tasks", *flags)
    assert not (tmp_path / "out").exists()


def test_a_file_without_the_task_says_what_it_has(make, tmp_path):
    folder = tmp_path / "part"
    make_mix(folder)
    path = folder / "llava_v1_5_mix665k.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row for row in rows if kind(row) in ("vqa", "text")]))
    with pytest.raises(InputError, match="json: no record is of gqa, vg; of: vqa 16, text 5"):
        make("--tasks", "gqa", "vg", folder=folder)
    with pytest.raises(InputError, match="task gqa: 3 clients .* need 3; it has 0, "):
        make("--tasks", "vqa", "gqa", folder=folder)
    path.write_text(json.dumps([{"id": "7", "image": 3, "conversations": []}]))
    with pytest.raises(InputError, match=r"record 0 \(id '7'\) has no `image`: a path"):
        make("--tasks", "gqa", folder=folder)


def test_tars_are_refused(tmp_path, cc12m):
    from fed.data.make_clients import main

    flags = ["--tasks", "gqa", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--input: one JSON is expected"):
        main(["task", "--input", str(cc12m / "*.tar"), *flags])


def test_pilot_takes_what_was_made(make, mix):
    from fed.arguments import Arguments, FedArguments
    from fed.clients.clients_yaml import load_clients
    from fed.methods.pilot.run import prepare
    from llava.train.arguments import DataArguments, model_arguments

    tasks = ["ocr-vqa", "gqa", "refcoco"]
    folder = make("--tasks", *tasks, "--heldout", 1)
    specs = load_clients(folder / "clients.yaml", [])
    model_args = model_arguments()(mm_projector_type="pilot")
    given = Arguments(model_args, DataArguments(), None, FedArguments(fed_method="pilot"))
    assert prepare(specs, given).model.pilot_tasks == tasks
    assert {Path(spec.image_folder).resolve() for spec in specs} == {mix.resolve()}
    from playground.studies.pilot import task_of

    domains = [row["domain"] for row in heldout(folder)]
    assert sorted(task_of(domain, set(tasks)) for domain in domains) == sorted(tasks)


def test_the_commands_of_the_readme_run_and_end_in_flags_for_pilot(
    tmp_path, mix, monkeypatch, capsys
):
    from fed.data.make_clients import main

    (tmp_path / "playground").mkdir()
    (tmp_path / "playground/data").symlink_to(mix)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.strip()]
    printed: list[str] = []
    for first, script, *argv in commands:
        if first == "python":
            assert (script, argv.pop(0)) == ("-m", "fed.data")
            main([{"200": "1", "5000": "2"}.get(word, word) for word in argv])
            printed.append(" ".join(capsys.readouterr().out.splitlines()[-3:]))
        else:
            assert (first, script) == ("bash", "scripts/fed/finetune_pilot.sh")
            assert (ROOT / script).is_file()
            assert printed[0] in " ".join(argv)
    assert len(printed) == 2
    assert len(commands) == 3
    for output in ("data/mix-pilot", "data/mix-grounding"):
        assert len(clients(tmp_path / output)) == 9
        assert len(heldout(tmp_path / output)) == 3


def test_the_readme_names_every_task(mix):
    from fed.data.mix665k import TASKS

    named = re.findall(r"^\| `([a-z-]+)` \|", SECTION, re.MULTILINE)
    assert named == list(TASKS)
