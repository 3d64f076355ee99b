"""The playground's archive: it unpacks, its split keeps its promises, its pictures open."""

import importlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
HELD_OUT = ("heldout_dev.json", "heldout_test.json")
STYLES = ("google", "twitter", "openmoji", "fluent")


def script(name: str):
    """A file of playground/tools as a module."""
    return importlib.import_module(f"playground.tools.{name}")


@pytest.fixture(scope="module")
def data(emoji) -> Path:
    return emoji


def records(data: Path, *patterns: str) -> list[dict]:
    paths = [path for pattern in patterns for path in sorted(data.glob(pattern))]
    return [r for path in paths for r in json.loads(path.read_text())]


def images(rows: list[dict]) -> set[str]:
    found = {r["image"] for r in rows}
    assert len(found) == len(rows), "a picture is listed twice"
    return found


def test_every_picture_is_private_or_held_out_or_unseen(data):
    private = images(records(data, "clients/topic/*.json"))
    held = images(records(data, *HELD_OUT))
    unseen = images(records(data, "unseen.json"))
    on_disk = {p.relative_to(data / "images").as_posix() for p in data.glob("images/*/*.webp")}
    assert (len(private), len(held), len(unseen)) == (4362, 1454, 304)
    assert not (private & held)
    assert not (private & unseen)
    assert not (held & unseen)
    assert private | held | unseen == on_disk
    assert images(records(data, "clients/style/*.json")) == private


def test_split_goes_by_concept_and_style(data):
    def concept(record):
        return Path(record["image"]).stem

    private = Counter(concept(r) for r in records(data, "clients/topic/*.json"))
    held = Counter(concept(r) for r in records(data, *HELD_OUT))
    unseen = Counter(concept(r) for r in records(data, "unseen.json"))
    assert set(private) == set(held)
    assert set(private.values()) == {3}
    assert set(held.values()) == {1}
    assert not set(unseen) & set(private)
    assert set(unseen.values()) == {4}
    dev, test = (records(data, f"heldout_{part}.json") for part in ("dev", "test"))
    assert abs(len(dev) - len(test)) <= 8 * 4
    assert {r["style"] for r in dev} == {r["style"] for r in test} == set(STYLES)


def test_records_are_llava_records(data):
    names = {}
    plain = ("topic/*.json", "style/*.json", "skew*/*.json", "caption/name.json")
    for row in records(data, *(f"clients/{p}" for p in plain), *HELD_OUT, "unseen.json"):
        human, gpt = row["conversations"]
        assert human == {"from": "human", "value": "<image>\nWhat is this?"}
        assert gpt["from"] == "gpt"
        assert 1 <= len(gpt["value"].split()) <= 6
        assert gpt["value"] == gpt["value"].lower().strip()
        assert gpt["value"].isascii()
        assert row["image"].split("/")[0] == row["style"]
        code = Path(row["image"]).stem
        assert names.setdefault(gpt["value"], code) == code, "two concepts share a name"
    assert len(names) == 1530


@pytest.mark.parametrize("cut", ["noisy", "noisy-dev", "crawl", "crawl-dev"])
def test_wrong_captions_are_those_of_other_pictures(data, cut):
    shares, sound = [], {r["id"]: r for r in records(data, "clients/topic/*.json")}
    for path in sorted((data / f"clients/{cut}").glob("*.json")):
        rows = json.loads(path.read_text())
        wrong = [r for r in rows if r.get("wrong")]
        shares.append(len(wrong) / len(rows))
        own = [sound[r["id"]]["conversations"][1]["value"] for r in rows]
        told = [r["conversations"][1]["value"] for r in rows]
        assert [r["id"] for r in rows] == [
            r["id"] for r in records(data, f"clients/topic/{path.name}")
        ]
        assert sorted(own) == sorted(told)
        assert [a != b for a, b in zip(own, told, strict=True)] == ["wrong" in r for r in rows]
    if cut.startswith("noisy"):
        assert sorted(shares) == [0] * 5 + [1] * 3
    else:
        even = [0.6 * i / 7 for i in range(8)]
        assert sorted(shares) == pytest.approx(even, abs=0.01)


def test_development_and_report_have_other_wrong_captions(data):
    for cut in ("noisy", "crawl"):
        a, b = (
            {r["id"] for r in records(data, f"clients/{c}/*.json") if "wrong" in r}
            for c in (cut, f"{cut}-dev")
        )
        assert len(a & b) < 0.6 * len(a)


def test_sentences_say_the_name_and_the_kind(data):
    sound = {r["id"]: r for r in records(data, "clients/topic/*.json", *HELD_OUT)}
    rows = records(data, "clients/sentences/*.json", "heldout_*_sentences.json")
    asked = images(records(data, "clients/brief/*.json", *HELD_OUT))
    assert images(rows) == asked
    kinds = script("cut_clients").KINDS
    for row in rows:
        asked, said, again, kind = (turn["value"] for turn in row["conversations"])
        assert asked.startswith("<image>\n")
        assert "<image>" not in again
        assert sound[row["id"]]["conversations"][1]["value"] in said
        assert said.endswith(".")
        assert kind == f"It is {kinds[row['topic']]}."


def test_every_picture_opens(data):
    for path in data.glob("images/*/*.webp"):
        with Image.open(path) as picture:
            picture.load()
            assert (picture.size, picture.mode) == ((64, 64), "RGB"), path


@pytest.mark.parametrize(("scenario", "count"), [("topic", 8), ("style", 4)])
def test_scenario_names_every_client_file(data, scenario, count):
    clients = yaml.safe_load((ROOT / f"playground/fed/{scenario}.yaml").read_text())["clients"]
    assert len({c["name"] for c in clients}) == len(clients) == count
    for client in clients:
        assert client["image_folder"] == "../data/emoji/images"
        inside = client["data_path"].removeprefix("../data/emoji/")
        rows = records(data, inside)
        assert rows
        assert {r[scenario] for r in rows} == {client["name"]}


def test_unpack_is_idempotent_and_replaces_another_version(data, tmp_path):
    unpack = script("unpack_data").unpack
    archive, target = tmp_path / "a.tar.xz", tmp_path / "out"
    build = script("build_data")
    build.pack({"one.json": b"[]"}, archive)
    assert unpack(archive, target, None)
    assert not unpack(archive, target, None)
    build.pack({"two.json": b"[]"}, archive)
    assert unpack(archive, target, None)
    assert {p.name for p in target.iterdir()} == {"two.json", ".sha256"}
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar.xz", "out"}


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "link"])
def test_unpack_refuses_links_and_paths_that_lead_outside(tmp_path, name):
    archive = tmp_path / "bad.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 1
        if name == "link":
            member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match="no plain file or folder inside"):
        script("unpack_data").unpack(archive, tmp_path / "out", None)
    assert not (tmp_path / "outside.txt").exists()
    assert not (tmp_path / "out").exists()


def test_building_is_deterministic(tmp_path):
    build = script("build_data")
    concepts = [
        {"code": f"{n:x}", "name": f"thing {n}", "topic": topic}
        for n, topic in enumerate(list(build.TOPICS.values()) * 20)
    ]
    assert build.split(concepts) == build.split(concepts)
    files = {"b.json": b"[1]", "a.json": b"[2]"}
    build.pack(files, tmp_path / "x")
    build.pack(dict(reversed(files.items())), tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize(
    ("cldr", "plain"),
    [
        ("woman: red hair", "woman with red hair"),
        ("man: bald", "bald man"),
        ("keycap: 10", "keycap 10"),
        ("japanese “bargain” button", "japanese bargain button"),
        ("woman’s hat", "woman's hat"),
        ("piñata", "pinata"),
    ],
)
def test_names_become_plain_words(cldr, plain):
    assert script("build_data").plain_name(cldr) == plain


def test_the_further_cuts_share_out_the_same_pictures(data):
    private = images(records(data, "clients/topic/*.json"))
    for cut, clients in (("caption", 4), ("skew", 12), ("skew-dev", 12)):
        assert images(records(data, f"clients/{cut}/*.json")) == private
        sizes = [len(json.loads(p.read_text())) for p in data.glob(f"clients/{cut}/*.json")]
        assert len(sizes) == clients
        if cut == "caption":
            assert max(sizes) - min(sizes) <= 1
        else:
            assert min(sizes) >= 16
            assert max(sizes) > 10 * min(sizes)
    one, other = (records(data, f"clients/{cut}/01.json") for cut in ("skew", "skew-dev"))
    assert images(one) != images(other)


def test_mixed_clients_share_out_all_pictures_and_know_whose_a_picture_is(data):
    private = images(records(data, "clients/topic/*.json"))
    assert images(records(data, "clients/mixed/*.json")) == private
    of = script("cut_clients").mixed_client
    for path in data.glob("clients/mixed/*.json"):
        assert {of(record) for record in json.loads(path.read_text())} == {path.stem}
    for part in ("dev", "test"):
        plain, mixed = (records(data, f"heldout_{part}{end}.json") for end in ("", "_mixed"))
        assert images(plain) == images(mixed)
        assert all(record["mixed"] == of(record) for record in mixed)


def test_the_common_part_is_a_tenth_of_all(data):
    private = images(records(data, "clients/topic/*.json"))
    common = images(records(data, "clients/common/*.json"))
    assert len(common) == len(private) // 10
    assert set(common) < set(private)


def test_a_skewed_client_has_few_of_the_kinds(data):
    def largest(rows):  # the share of the most frequent eighth of the 32 kinds
        kinds = Counter((r["topic"], r["style"]) for r in rows).most_common(4)
        return sum(n for _, n in kinds) / len(rows)

    shares = [largest(json.loads(p.read_text())) for p in data.glob("clients/skew/*.json")]
    assert sum(shares) / len(shares) > 1.5 * largest(records(data, "clients/skew/*.json"))


def test_each_source_describes_in_its_own_way(data):
    plain = records(data, "clients/topic/*.json", *HELD_OUT)
    names = {r["image"]: r["conversations"][1]["value"] for r in plain}
    said = json.loads((ROOT / "playground/data/captions.json").read_text())
    words = {word for name in names.values() for word in name.split()}
    kinds = set()
    for row in records(data, "clients/caption/*.json"):
        name, text = names[row["image"]], row["conversations"][1]["value"]
        keywords = said[row["id"].split("-", 1)[1]]
        if row["source"] == "name":
            assert text == name
        elif row["source"] == "short":
            assert name.endswith(text)
            assert " " not in text
        elif row["source"] == "keyword":
            assert text in keywords or text == name
            assert set(text.split()) <= words
        else:
            kinds.add((row["topic"], text))
    assert len(kinds) == 8
    for part in ("dev", "test"):
        held = {r["image"] for r in records(data, f"heldout_{part}.json")}
        rows = records(data, f"heldout_{part}_caption.json")
        assert images(rows) == held
        sources = Counter(r["source"] for r in rows)
        assert abs(2 * sources.pop("name") - len(rows)) <= 1
        assert len(sources) == 3
        assert max(sources.values()) - min(sources.values()) <= 1


def test_captions_are_plain_words_that_the_tokenizer_holds(data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "playground/backbones/llm")
    for row in records(data, "clients/caption/*.json"):
        ids = tokenizer(row["conversations"][1]["value"]).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) < 64
