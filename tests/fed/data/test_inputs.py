"""What fed.data reads: memory that does not grow, and what is wrong with a file, by name."""

from __future__ import annotations

import json
import tarfile
import tracemalloc

import numpy as np
import pytest

from llava.errors import InputError
from tests.fed.data.small import add, make_pretrain, make_shards, picture


@pytest.fixture
def make(tmp_path):
    """Run the command into `tmp_path/out`; the report."""
    from fed.data.make_clients import main

    def run(shape: str, *flags: object) -> str:
        main([shape, *map(str, [*flags, "--output", tmp_path / "out"])])
        return (tmp_path / "out/clients.md").read_text()

    return run


def of_json(folder, name="blip_laion_cc_sbu_558k.json") -> list:
    return ["--input", folder / name, "--image_folder", folder / "images"]


def record(**changes) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a thing"}]
    return {"id": "7", "image": "a.jpg", "topic": "x", "conversations": turns} | changes


def write(folder, content: object) -> list:
    """Flags for a JSON of this content with a picture a.jpg."""
    (folder / "images").mkdir()
    (folder / "images/a.jpg").write_bytes(picture(0))
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "in.json").write_text(text)
    return of_json(folder, "in.json")


GOOD = json.dumps([record()] * 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "in.json: a JSON list of records is expected, but it is empty"),
        ("not JSON", "a JSON list of records is expected, but it starts with 'n'"),
        (record(), "it starts with '{'"),
        ("[not JSON]", "in.json: not JSON, or cut short, after 0 records"),
        (GOOD[:-1], "in.json: not JSON, or cut short, after 3 records"),
        (GOOD[: len(GOOD) * 2 // 3], "in.json: not JSON, or cut short, after [12] records"),
        (GOOD + "[]", "in.json: not JSON, or cut short, after 3 records"),
        ("[]", "no sample is left of 0"),
        ([record(), "text"], "in.json: record 1 is not an object but 'text'"),
        ([record(), record(image=None)], r"record 1 \(id '7'\) has no `image`"),
        ([record(image=[])], r"record 0 \(id '7'\) has no `image`"),
        ([{"image": "a.jpg"}], "record 0 has no `conversations`"),
        ([record(conversations=[{"value": "x"}])], "record 0 .id '7'. has no `conversations`"),
        ([record(image="b.jpg")], r"record 0 \(id '7'\): picture .*b.jpg does not exist"),
        ([record(topic=None)], r"record 0 \(id '7'\): `topic` is None, text is expected"),
        ([record(topic=["x"])], r"`topic` is \['x'\], text is expected"),
    ],
)
def test_what_is_wrong_with_a_json(make, tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        make("source", *write(tmp_path, content), "--key", "topic")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "in.json"]


def test_a_byte_order_mark_and_floats(make, tmp_path):
    flags = write(tmp_path, "\ufeff" + json.dumps([record(score=0.25, big=2**60, text="é")]))
    make("source", *flags, "--key", "score")
    assert json.loads((tmp_path / "out/0.25/captions.json").read_text()) == [
        record(score=0.25, big=2**60, text="é")
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["source", "--key", "nothing"],
            "has no `nothing`; it has answer, conversations, id, imag",
        ),
        (["source", "--key", "url-host:topic"], "`topic` is 'x', an address is expected"),
        (["source", "--key", "image-folder:0"], "--key image-folder:0: a number over 0"),
        (["source", "--key", "style"], "has no `style`; it has answer, "),
        (["source", "--key", "topic", "topic"], "--key: the same key twice"),
        (["source", "--key", "cluster"], "has no `cluster`; it has"),
        (["source", "--key", "cluster", "--tower", "x"], "either --clusters or --centroids"),
        (["source", "--key", "topic", "--minimum_size", "9", "--rare", "drop"], "the largest wo"),
        (["source", "--key", "topic", "--minimum_size", "0"], "--minimum_size 0: 1 or more"),
        (["source", "--key", "topic", "--heldout", "4"], "--heldout 4: there are 4 samples"),
        (["source", "--key", "topic", "--heldout", "1.5"], "--heldout 1.5: a share below 1"),
        (["source", "--key", "topic", "--heldout", "-1"], "--heldout -1.0: a share below 1"),
        (
            ["dirichlet", "--key", "topic", "--clients", "2", "--alpha", "0"],
            "--alpha 0.0: a number over 0",
        ),
        (
            ["dirichlet", "--key", "topic", "--clients", "5", "--alpha", "1"],
            "4 samples are too few",
        ),
        (["source", "--key", "topic", "--tower", "x"], "--tower is for --key cluster"),
        (["style", "--clients", "0", "--styles", "a=answer"], "--clients 0: 1 or more"),
        (["style", "--styles", "a"], "--styles a: NAME=FIELD or NAME=FIELD:FORM is expected"),
        (["style", "--styles", "a=answer:b"], "form 'b' is unknown; known are first-sentence, key"),
        (["style", "--styles", "a=answer", "a=id"], "two styles are called 'a'"),
        (["style", "--styles", "a=b"], "style a needs `b`; it has answer, "),
        (
            ["cluster", "--clusters", "2", "--tower", "/no/where"],
            "vision tower /no/where: no such folder",
        ),
    ],
)
def test_what_is_wrong_with_the_flags(make, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        make(flags[0], *write(tmp_path, [record()] * 4), *flags[1:])
    assert not (tmp_path / "out").exists()


def test_clusters_that_cannot_be(make, tmp_path, tiny):
    flags = [*write(tmp_path, [record()] * 4), "--tower", tiny / "vision_tower"]
    with pytest.raises(InputError, match="--clusters 5: 1 to 4 are possible with 4 samples"):
        make("cluster", *flags, "--clusters", 5)
    with pytest.raises(InputError, match="--clusters 4: 1 to 3 are possible"):
        make("cluster", *flags, "--clusters", 4, "--fit_samples", 3)
    with pytest.raises(InputError, match="in.json: no centroids there"):
        make("cluster", *flags, "--centroids", tmp_path / "in.json")
    with pytest.raises(InputError, match="--device nonsense"):
        make("cluster", *flags, "--clusters", 1, "--device", "nonsense")
    from fed.data.clusters import Centroids

    Centroids(np.zeros((2, 32), dtype=np.float32), "another").save(tmp_path / "means.safetensors")
    with pytest.raises(InputError, match="they are of another tower"):
        make("cluster", *flags, "--centroids", tmp_path / "means.safetensors")


def test_a_style_of_one_question_and_answer(make, tmp_path):
    long = record(conversations=record()["conversations"] * 2)
    flags = [*write(tmp_path, [long]), "--styles", "a=answer"]
    with pytest.raises(InputError, match="record 0 .* has 4 turns; a style needs question and"):
        make("style", *flags)


def test_an_empty_caption_of_a_style_is_left_out_or_refused(make, tmp_path):
    rows = [record(), record(short=" "), record(short="x")]
    flags = [*write(tmp_path, [{**row, "short": row.get("short", "y")} for row in rows])]
    with pytest.raises(InputError, match="record 1 .*: no text for style s"):
        make("style", *flags, "--styles", "s=short")
    report = make("style", *flags, "--styles", "s=short", "--skip_bad")
    assert "| s | 2 |" in report
    assert "Left out for a fault: 1 samples." in report


def test_missing_and_broken_pictures_of_a_json(make, tmp_path, tiny):
    folder = make_pretrain(tmp_path, samples=9)
    (folder / "images/00000/000000003.jpg").unlink()
    (folder / "images/00000/000000004.jpg").write_bytes(picture(4)[:200])
    key = ["--key", "image-folder"]
    with pytest.raises(InputError, match=r"record 3 \(id '000000003'\): picture .* does not exist"):
        make("source", *of_json(folder), *key)
    assert "| 00000 | 8 |" in make("source", *of_json(folder), *key, "--skip_bad")
    (tmp_path / "out").rename(tmp_path / "first")
    report = make("source", *of_json(folder), *key, "--skip_bad", "--decode")
    assert "| 00000 | 7 |" in report
    assert "Left out for a fault: 2 samples." in report
    (tmp_path / "out").rename(tmp_path / "second")
    tower = ["--tower", tiny / "vision_tower", "--clusters", 2]
    report = make("cluster", *of_json(folder), *tower, "--skip_bad")
    assert "Left out for a fault: 2 samples." in report
    assert "000000004.jpg cannot be read" in report


def test_meta_that_lacks_a_record_or_ids(make, tmp_path):
    flags = [*write(tmp_path, [record()]), "--key", "topic", "--meta", tmp_path / "meta.json"]
    for text, message in [
        (None, "meta.json: no such file"),
        ('[{"id": "8"}]', r"record 0 \(id '7'\): --meta .* has no entry of this id"),
        ('[{"url": "x"}]', "entry 0 is no object with an `id`"),
        ('[{"id": "7"}', "meta.json: not JSON, or cut short, after 1 records"),
    ]:
        if text:
            (tmp_path / "meta.json").write_text(text)
        with pytest.raises(InputError, match=message):
            make("source", *flags)


def test_bad_members_of_shards_are_counted_and_named(make, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, parts in {
            "good": {"jpg": picture(1), "txt": "a thing", "json": "{}"},
            "alone": {"jpg": picture(1)},
            "silent": {"txt": "a thing"},
            "empty": {"png": picture(1, "PNG"), "txt": "  "},
            "broken": {"jpg": b"no picture", "txt": "a thing"},
            "garbled": {"jpg": picture(1), "txt": "a thing", "json": "{"},
            "half": {"jpg": picture(1), "txt": "a thing", "json": '{"title": "x \\ud83c"}'},
            "number": {"jpg": picture(1), "txt": "a thing", "json": "3"},
            "latin": {"jpg": picture(1), "txt": "caf\xe9".encode("latin-1")},
            "twice": {"jpg": picture(1), "png": picture(1, "PNG"), "txt": "a thing"},
            "long": {"jpg": picture(1), "txt": "a" * (1 << 20) + "b"},
            "dir/web": {"WEBP": picture(1, "WEBP"), "TXT": "a thing", "cls": "3"},
        }.items():
            for kind, data in parts.items():
                add(tar, f"./{key}.{kind}", data)
        add(tar, "notes", "of another kind")
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    report = make("source", "--input", tmp_path / "a.tar", "--key", "shard")
    assert "| a | 2 |" in report
    assert "Left out for a fault: 11 samples." in report
    for key, why in {
        "alone": "no caption: `txt` is missing or empty",
        "silent": "no picture",
        "broken": "its picture cannot be read",
        "garbled": "its text cannot be read",
        "half": "its text has half a character in 'x \\ud83c'",
        "number": "its .json is no object",
        "twice": "two pictures",
        "notes": "no picture",
    }.items():
        assert f"a.tar: {key}: {why}" in report
    rows = json.loads((tmp_path / "out/a/captions.json").read_text())
    assert [row["image"] for row in rows] == ["a/good.jpg", "a/dir/web.webp"]
    assert (tmp_path / "out/a/images/a/dir/web.webp").read_bytes() == picture(1, "WEBP")


def test_samples_of_shards_without_the_key_are_counted_unless_none_has_it(make, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, fields in (("a", {"url": "http://x/1"}), ("b", {}), ("c", {"url": "nothing"})):
            add(tar, f"{key}.jpg", picture(0))
            add(tar, f"{key}.txt", "a thing")
            add(tar, f"{key}.json", json.dumps(fields))
    flags = ["--input", tmp_path / "a.tar", "--key"]
    with pytest.raises(InputError, match="a: has no `topic`; it has answer, shard, txt, url"):
        make("source", *flags, "topic")
    report = make("source", *flags, "url-host")
    assert "| x | 1 |" in report
    assert "Left out for a fault: 2 samples." in report
    assert "a.tar: b: has no `url`; it has answer, shard, txt" in report
    assert "a.tar: c: `url` is 'nothing', an address is expected" in report


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../../x.jpg", tarfile.REGTYPE),
        ("/x.jpg", tarfile.REGTYPE),
        ("a/../x.jpg", tarfile.REGTYPE),
        ("x.jpg", tarfile.SYMTYPE),
        ("x.jpg", tarfile.LNKTYPE),
        ("x.jpg", tarfile.FIFOTYPE),
    ],
)
def test_members_that_lead_outside_are_refused(make, tmp_path, name, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "b.jpg", picture(0))
        add(tar, "b.txt", "a thing")
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(InputError, match="is no plain file inside the shard"):
        make("source", "--input", tmp_path / "a.tar", "--key", "shard")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_key_that_comes_back_does_not_overwrite(make, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("b", "c", "b"):
            add(tar, f"{key}.jpg", picture(0))
            add(tar, f"{key}.txt", "a thing")
    with pytest.raises(InputError, match="a.tar: b: another sample of the shard has this key"):
        make("source", "--input", tmp_path / "a.tar", "--key", "shard")


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1300, 0.3, 0.5, 0.71, 0.9, -10240])
def test_a_shard_cut_short_anywhere(make, tmp_path, keep):
    """From nothing at all to everything but the blocks that end a tar."""
    path = make_shards(tmp_path, shards=1, samples=5) / "00000.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    size = end if keep == -10240 else int(keep * end) if isinstance(keep, float) else keep
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="00000.tar: (is empty|not a tar|damaged|cut short)"):
        make("source", "--input", path, "--key", "shard")


def test_other_tars_that_are_refused(make, tmp_path):
    (tmp_path / "sub").mkdir()
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a.txt", "a thing")
    damaged = make_shards(tmp_path, shards=1) / "00000.tar"
    data = bytearray(damaged.read_bytes())
    with tarfile.open(damaged) as tar:
        checksum = tar.getmembers()[4].offset + 148
    data[checksum : checksum + 8] = b"garbage!"
    (tmp_path / "sub/00000.tar").write_bytes(data)
    for paths, message in [
        (["empty.tar"], "empty.tar: holds no files"),
        (["packed.tar"], "packed.tar: not a tar file, or a compressed one"),
        (["sub/00000.tar"], "sub/00000.tar: damaged or cut short"),
        (["00000.tar", "sub/00000.tar"], "two shards are called 00000.tar"),
        (["{00000..00001}.tar"], "00001.tar: no such file"),
        (["x*.tar"], r"x\*.tar: no such file"),
        (["00000.tar", "packed.tar.gz"], "packed.tar.gz: no such file"),
    ]:
        with pytest.raises(InputError, match=message):
            make("source", "--input", *(tmp_path / path for path in paths), "--key", "shard")
    for flag in ("--image_folder", "--meta"):
        with pytest.raises(InputError, match=f"{flag} is for a JSON"):
            make("source", "--input", damaged, "--key", "shard", flag, tmp_path)


def test_shards_by_braces_and_stars(tmp_path):
    from fed.data.shards import expand

    names = ["a-008.tar", "a-009.tar", "a-010.tar", "b-010.tar"]
    for name in names:
        (tmp_path / name).touch()

    def found(*patterns):
        return [
            path.removeprefix(f"{tmp_path}/")
            for path in expand([f"{tmp_path}/{p}" for p in patterns])
        ]

    assert found("a-{008..010}.tar") == names[:3]
    assert found("{b,a}-010.tar") == ["b-010.tar", "a-010.tar"]
    assert found("a-*.tar", "*.tar") == names


def warm_up(tmp_path) -> None:
    """What is imported is not what is measured."""
    from fed.data.make_clients import main

    folder = make_pretrain(tmp_path / "warm", samples=2)
    flags = ["--key", "image-folder", "--clients", "1", "--alpha", "1"]
    main(["dirichlet", *map(str, of_json(folder)), *flags, "--output", str(folder / "out")])


def test_memory_does_not_grow_with_captions(tmp_path):
    """20,000 records of a kilobyte: as objects they would take over 40 MB."""
    from fed.data.make_clients import main

    rows, caption = 20000, "word " * 200
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(picture(0))
    with open(tmp_path / "in.json", "w") as file, open(tmp_path / "meta.json", "w") as meta:
        for i in range(rows):
            turns = [{"value": "<image>"}, {"value": f"{caption}{i}"}]
            row = record(id=str(i), conversations=turns)
            file.write(("[" if i == 0 else ",") + json.dumps(row))
            meta.write(("[" if i == 0 else ",") + json.dumps({"id": str(i), "more": caption}))
        file.write("]")
        meta.write("]")
    flags = ["--key", "topic", "--clients", "4", "--alpha", "1", "--heldout", "100"]
    flags += ["--meta", str(tmp_path / "meta.json"), "--output", str(tmp_path / "out")]
    warm_up(tmp_path)
    tracemalloc.start()
    main(["dirichlet", *map(str, of_json(tmp_path, "in.json")), *flags])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    assert len(json.loads((tmp_path / "out/heldout.json").read_text())) == 100


def test_memory_does_not_grow_with_shards(tmp_path):
    """3,000 samples: their 9,000 headers alone would be over 5 MB."""
    from fed.data.make_clients import main

    shard = make_shards(tmp_path / "shards", shards=1, samples=3000) / "00000.tar"
    warm_up(tmp_path)
    tracemalloc.start()
    main(["source", "--input", str(shard), "--key", "shard", "--output", str(tmp_path / "out")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
