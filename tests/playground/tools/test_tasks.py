"""The playground's tasks: shared out as promised, and every answer is true of its picture."""

import importlib
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[3]
SCENARIOS = {"a": ("caption", "vqa", "grounding"), "b": ("category", "text", "caption")}
PARTS = {"dev": 100, "test": 100}


def script(name: str):
    """A file of playground/tools as a module."""
    return importlib.import_module(f"playground.tools.{name}")


@pytest.fixture(scope="session")  # as its folder: a worker may come back to this file
def unpacked(emoji) -> tuple[Path, Path]:
    """The folders of the emoji and of the tasks."""
    folder, unpack = emoji.parent, script("unpack_data")
    tasks = folder / "tasks"
    assert unpack.unpack_tasks(target=tasks, emoji=emoji)
    assert not unpack.unpack_tasks(target=tasks, emoji=emoji)
    assert sorted(p.name for p in folder.iterdir()) == ["emoji", "tasks"]
    return emoji, tasks


@pytest.fixture(scope="module")
def data(unpacked) -> Path:
    return unpacked[1]


@pytest.fixture(scope="module")
def known(unpacked):
    """Who may know what."""
    script("unpack_data")
    return script("cut_tasks").divide(unpacked[0])


def read(data: Path, pattern: str) -> list[dict]:
    return [r for path in sorted(data.glob(pattern)) for r in json.loads(path.read_text())]


def everything(data: Path) -> list[dict]:
    return read(data, "clients/*/*.json") + read(data, "heldout_*.json")


def answer(record: dict) -> str:
    return record["conversations"][1]["value"]


def question(record: dict) -> str:
    return record["conversations"][0]["value"].removeprefix("<image>\n")


def code(image: str) -> str:
    return Path(image).stem


@pytest.mark.parametrize("scenario", "ab")
def test_yaml_names_nine_clients_of_equal_disjoint_shares(data, scenario):
    clients = yaml.safe_load((ROOT / f"playground/fed/pilot-{scenario}.yaml").read_text())
    names, seen = [], Counter()
    for client in clients["clients"]:
        assert client["image_folder"] == "../data/tasks/images"
        inside = client["data_path"].removeprefix("../data/tasks/")
        assert inside == f"clients/{scenario}/{client['name']}.json"
        rows = read(data, inside)
        assert len(rows) == 160
        assert {r["task"] for r in rows} == {client["task"]}
        seen.update(r["image"] for r in rows)
        names.append(client["name"])
    assert names == [f"{task}-{i}" for task in SCENARIOS[scenario] for i in (1, 2, 3)]
    assert len(seen) == 9 * 160, "two clients hold the same picture"


@pytest.mark.parametrize("scenario", "ab")
def test_held_out_pictures_are_in_no_clients_data(data, scenario):
    held = {part: read(data, f"heldout_{part}_{scenario}.json") for part in PARTS}
    for part, count in PARTS.items():
        tasks = dict.fromkeys(SCENARIOS[scenario], count)
        assert Counter(r["task"] for r in held[part]) == tasks
        assert len({(r["task"], r["image"]) for r in held[part]}) == 3 * count
    dev, test = ({r["image"] for r in held[part]} for part in PARTS)
    assert not dev & test
    for record in held["dev"] + held["test"]:
        half = question(record).startswith(("What is the color", "What color"))
        if record["task"] == "vqa":
            assert record["domain"] == ("vqa colour" if half else "vqa shape")
        else:
            assert record["domain"] == record["task"]
    domains = Counter(r["domain"] for r in held["test"])
    assert scenario == "b" or domains["vqa colour"] == domains["vqa shape"] == 50
    clients = {r["image"] for r in read(data, f"clients/{scenario}/*.json")}
    assert not clients & (dev | test)


def test_records_are_llava_records_and_their_pictures_open(data):
    for record in everything(data) + read(data, "public.json"):
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert gpt["value"]
        assert human["value"].startswith("<image>\n")
        assert human["value"].count("<image>") == 1
        with Image.open(data / "images" / record["image"]) as picture:
            picture.load()
            assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_public_and_private_share_no_concept_word_or_shape(data, known):
    public, private = (
        {r["id"].split("-", 1)[1] for rows in half for r in rows}
        for half in (known.public, known.private)
    )
    assert len(public) == len(private) == 727
    assert not public & private
    assert not set(known.public_words) & set(known.private_words)
    plain = read(data, "public.json")
    assert len(plain) == 1500
    assert {code(r["image"]) for r in plain} <= public
    for record in everything(data):
        if record["task"] in ("caption", "category"):
            assert code(record["image"]) in private
        elif record["task"] == "grounding":
            assert code(record["shows"]) in private
        elif record["task"] == "text":
            assert answer(record) in known.private_words
        else:
            assert record["image"].startswith("shapes/private/")


def test_a_held_out_drawing_is_by_a_vendor_whose_drawing_no_client_has(data, known):
    held = {r["image"] for r in known.held.values()}
    for pattern, inside in (("clients/*/*.json", False), ("heldout_*.json", True)):
        for record in read(data, pattern):
            if record["task"] in ("caption", "category"):
                assert (record["image"].removeprefix("emoji/") in held) == inside
            elif record["task"] == "grounding":
                assert (record["shows"] in held) == inside


def test_the_concepts_of_development_and_test_differ(data):
    for scenario in "ab":
        dev, test = (
            {
                code(r.get("shows", r["image"]))
                for r in read(data, f"heldout_{part}_{scenario}.json")
                if r["task"] in ("caption", "category", "grounding")
            }
            for part in PARTS
        )
        assert dev
        assert test
        assert not dev & test


def test_a_box_holds_the_drawing_that_was_asked_for(unpacked):
    emoji, data = unpacked
    records = [r for r in everything(data) if r["task"] == "grounding"]
    boxes = Counter(map(answer, records))
    assert len(boxes) == 9
    assert min(boxes.values()) > 0.7 * len(records) / 9
    plain = read(emoji, "clients/topic/*.json") + read(emoji, "heldout_dev.json")
    names = {r["image"]: answer(r) for r in plain + read(emoji, "heldout_test.json")}
    for record in records:
        box = tuple(round(64 * float(v)) for v in answer(record)[1:-1].split(", "))
        found = Image.open(data / "images" / record["image"]).crop(box)
        drawing = Image.open(emoji / "images" / record["shows"]).convert("RGB")
        drawing = drawing.resize((32, 32), Image.Resampling.LANCZOS)
        assert ImageChops.difference(found, drawing).getbbox() is None, record["id"]
        assert question(record) == f"Where is the {names[record['shows']]}?"


def test_answers_about_shapes_are_easy_vqas_and_need_the_picture(data):
    asked = json.loads((data / "questions/private.json").read_text())
    said = {}
    for record in everything(data):
        if record["task"] == "vqa":
            pairs = [[q.lower(), a] for q, a in asked[code(record["image"])]]
            assert [question(record).lower(), answer(record)] in pairs
            said.setdefault(question(record), set()).add(answer(record))
    assert all(len(answers) > 1 for answers in said.values()), "the text alone gives an answer"
    assert set().union(*said.values()).isdisjoint({"yes", "no"})


def test_kinds_are_those_of_the_topics(unpacked):
    emoji, data = unpacked
    kinds = script("cut_clients").KINDS
    topic = {r["image"]: r["topic"] for r in read(emoji, "clients/topic/*.json")}
    for record in read(data, "clients/b/category-*.json"):
        assert answer(record) == kinds[topic[record["image"].removeprefix("emoji/")]]


def test_a_word_is_dark_on_pale_and_inside_the_picture():
    tasks, white = script("tasks"), Image.new("RGB", (64, 64), "white")
    for word in ("ice", "bird", "tool"):
        for seed in range(5):
            picture = np.asarray(tasks.written(word, white, random.Random(seed)).convert("L"))
            ink = picture < 150
            columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
            assert columns[0] > 0
            assert columns[-1] < 63
            assert rows[0] > 0
            assert rows[-1] < 63
            assert columns[-1] - columns[0] > 32, "large letters"
    pale = np.asarray(tasks.written("ice", Image.new("RGB", (64, 64)), random.Random(0)))
    assert np.median(pale) > 180, "the emoji behind, however dark, is pale"


def test_the_same_archives_give_the_same_tasks(unpacked, tmp_path):
    emoji, data = unpacked
    script("unpack_data").unpack_tasks(target=tmp_path / "tasks", emoji=emoji)
    files = {p.relative_to(data): p for p in data.rglob("*") if p.is_file()}
    again = [p for p in (tmp_path / "tasks").rglob("*") if p.is_file()]
    assert {p.relative_to(tmp_path / "tasks") for p in again} == set(files)
    for path in again:
        assert path.read_bytes() == files[path.relative_to(tmp_path / "tasks")].read_bytes()


def test_the_archive_brings_its_licence(data):
    licence = (ROOT / "playground/data/licenses/MIT-easy-VQA.txt").read_bytes()
    with tarfile.open(ROOT / "playground/data/easy_vqa.tar.xz") as tar:
        assert tar.extractfile("LICENSE").read() == licence
    assert b"Victor Zhou" in licence
    assert b"Permission is hereby granted" in licence
    said = (ROOT / "playground/data/licenses/ATTRIBUTION.md").read_text()
    assert "easy_vqa.tar.xz" in said
    assert "MIT-easy-VQA.txt" in said
    assert (ROOT / "playground/data/easy_vqa.tar.xz").stat().st_size < 6e5


def test_what_the_demos_page_offers_is_held_out(unpacked):
    from llava.serve.ui.examples import PLAYGROUND

    held = {
        path.parent.name + "/images/" + record["image"]
        for folder in unpacked
        for path in folder.glob("heldout_test*.json")
        for record in json.loads(path.read_text())
    }
    offered = json.loads(PLAYGROUND.read_text())
    assert 3 <= len(offered) <= 6
    assert {x["image"].removeprefix("data/") for x in offered} <= held
