"""fed.data: each sample in one client or held out, in all shapes but task; what is refused."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml

from llava.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "docs/data.md").read_text()


@pytest.fixture
def make(tmp_path, pretrain, cc12m):
    """Run the command on the small LLaVA-Pretrain, or on shards, into `tmp_path/out`."""
    from fed.data.make_clients import main

    def run(shape: str, *flags: object, data: str = "json", output: str = "out") -> Path:
        json_input = [
            *("--input", pretrain / "blip_laion_cc_sbu_558k.json"),
            *("--image_folder", pretrain / "images"),
            *("--meta", pretrain / "blip_laion_cc_sbu_558k_meta.json"),
        ]
        given = json_input if data == "json" else ["--input", cc12m / "{00000..00001}.tar"]
        main([shape, *map(str, [*given, "--output", tmp_path / output, *flags])])
        return tmp_path / output

    return run


def clients(folder: Path) -> dict[str, list[dict]]:
    """Each client's records; its pictures are there."""
    found = {}
    for entry in yaml.safe_load((folder / "clients.yaml").read_text())["clients"]:
        rows = json.loads((folder / entry["data_path"]).read_text())
        for row in rows:
            assert (folder / entry["image_folder"] / row["image"]).is_file()
        found[entry["name"]] = rows
    return found


def heldout(folder: Path) -> list[dict]:
    return json.loads((folder / "heldout.json").read_text())


@pytest.mark.parametrize("data", ["json", "tar"])
def test_sources_rare_ones_pooled(make, data):
    folder = make("source", "--key", "url-host", "--heldout", 0.1, "--minimum_size", 8, data=data)
    found = clients(folder)
    assert list(found)[0] == "shop.example"
    assert list(found)[-1] == "other"
    images = [row["image"] for rows in [*found.values(), heldout(folder)] for row in rows]
    assert len(images) == len(set(images)) == 60
    assert len(heldout(folder)) == 6
    assert {row["domain"] for row in heldout(folder)} <= set(found)
    report = (folder / "clients.md").read_text()
    assert f"| shop.example | {len(found['shop.example'])} |" in report
    assert "| held out | 6 |" in report


def test_rare_sources_dropped_and_sources_limited(make):
    folder = make("source", "--key", "url-host", "--clients", 2, "--rare", "drop")
    found = clients(folder)
    assert len(found) == 2
    assert sum(map(len, found.values())) < 60
    assert not (folder / "heldout.json").exists()
    assert "Dropped as rare: " in (folder / "clients.md").read_text()


@pytest.mark.parametrize(
    ("key", "data", "names"),
    [
        ("image-folder", "json", {"00000", "00001", "00002"}),
        ("shard", "tar", {"00000", "00001"}),
        ("width", "tar", {"20"}),
    ],
)
def test_keys(make, key, data, names):
    assert set(clients(make("source", "--key", key, data=data))) == names


def test_records_of_a_json_stay_as_they_are(make, pretrain):
    before = json.loads((pretrain / "blip_laion_cc_sbu_558k.json").read_text())
    found = clients(make("source", "--key", "image-folder"))
    assert [row for name in sorted(found) for row in found[name]] == before


def test_records_of_shards(make, cc12m):
    (rows,) = clients(make("source", "--key", "width", "--question", "What?", data="tar")).values()
    assert rows[0] == {
        "id": "000000000",
        "image": "00000/000000000.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "Thing 0 in the sun. For sale!"},
        ],
    }


def test_styles(make):
    styles = ["own=answer", "blip=blip_caption", "short=answer:first-sentence"]
    styles.append("words=blip_caption:keywords")
    folder = make("style", "--styles", *styles, "--heldout", 8)
    found = clients(folder)
    assert {name: len(rows) for name, rows in found.items()}.keys() == {
        *("own", "blip", "short", "words")
    }
    assert sum(map(len, found.values())) == 52
    assert max(map(len, found.values())) <= 15
    patterns = {
        "own": r"picture \d+\. On the wall, for sale",
        "blip": r"a photo of the thing \d+",
        "short": r"picture \d+\.",
        "words": r"photo, thing, \d+",
    }
    for row in heldout(folder):
        assert re.fullmatch(patterns[row["domain"]], row["conversations"][1]["value"])
    for name, rows in found.items():
        for row in rows:
            caption = row["conversations"][1]["value"]
            assert re.fullmatch(patterns[name], caption)
            assert int(re.search(r"\d+", caption)[0]) == int(row["id"])


def test_style_and_cluster_may_be_the_records_own(tmp_path, pretrain):
    from fed.data.make_clients import main

    rows = json.loads((pretrain / "blip_laion_cc_sbu_558k.json").read_text())
    rows = [{**row, "style": "ab"[i % 2], "cluster": i % 3} for i, row in enumerate(rows)]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    flags = ["--input", tmp_path / "in.json", "--image_folder", pretrain / "images"]
    flags += ["--key", "style", "cluster", "--output", tmp_path / "out"]
    main(["source", *map(str, flags)])
    assert {f"{a}-x-{b}" for a in "ab" for b in range(3)} == set(clients(tmp_path / "out"))


def test_dirichlet_of_a_product(make):
    flags = ["--styles", "a=answer", "b=blip_caption", "--key", "url-host", "style"]
    flags += ["--clients", 5, "--alpha", 0.3, "--size_alpha", 1, "--heldout", 0.1, "--seed", 4]
    folder = make("dirichlet", *flags)
    found = clients(folder)
    assert list(found) == [f"client-{i}" for i in range(5)]
    assert sum(map(len, found.values())) == 54
    assert min(map(len, found.values())) >= 1
    assert all(re.fullmatch(r"[a-z.]+ x [ab]", row["domain"]) for row in heldout(folder))
    again = make("dirichlet", *flags, output="again")
    assert clients(again) == found
    assert heldout(again) == heldout(folder)
    assert clients(make("dirichlet", *flags, "--seed", 5, output="other")) != found


def test_dirichlet_is_the_function_of_fed_partition(make):
    from fed.data.dirichlet import dirichlet

    found = clients(
        make("dirichlet", "--key", "image-folder", "--clients", 3, "--alpha", 1, "--seed", 2)
    )
    cut = dirichlet([i // 20 for i in range(60)], 3, alpha=1.0, seed=2)
    assert [[int(row["id"]) for row in rows] for rows in found.values()] == cut


@pytest.mark.parametrize("data", ["json", "tar"])
def test_clusters_are_of_like_pictures_and_repeat(make, tiny, data):
    tower = ["--tower", tiny / "vision_tower", "--batch_size", 7]
    folder = make("cluster", *tower, "--clusters", 3, "--heldout", 6, "--seed", 1, data=data)
    found = clients(folder)
    assert set(found) == {"cluster-0", "cluster-1", "cluster-2"}
    for name, rows in found.items():
        rows = rows + [row for row in heldout(folder) if row["domain"] == name]
        assert len({colour(row) for row in rows}) == 1
        assert len(rows) == 20
    means = ["--centroids", folder / "centroids.safetensors"]
    again = make("cluster", *tower, *means, "--heldout", 6, "--seed", 1, data=data, output="2")
    assert clients(again) == found
    bounded = ["--clusters", 2, "--fit_samples", 20]
    mixed = ["--key", "cluster", "--clients", 4, "--alpha", 1]
    assert len(clients(make("dirichlet", *tower, *bounded, *mixed, data=data, output="3"))) == 4


def colour(row: dict) -> int:
    """Red, green or blue."""
    return int(row["id"][-4:]) % 3  # a shard has 30


def test_pictures_are_found_from_a_linked_folder(make, tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far/away")
    clients(make("source", "--key", "image-folder", output="near/out"))


def test_the_same_command_finds_its_result_and_another_is_refused(make, capsys):
    make("source", "--key", "image-folder")
    capsys.readouterr()
    make("source", "--key", "image-folder")
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(InputError, match="is there already; name a folder that is new or empty"):
        make("source", "--key", "image-folder", "--seed", 1)


def test_the_head_says_how_it_was_made(make):
    folder = make("source", "--key", "image-folder", "--seed", 3)
    head = (folder / "clients.yaml").read_text().splitlines()[:4]
    assert head[0].startswith("# Made by: python -m fed.data source --input ")
    assert head[0].endswith("--key image-folder --seed 3")
    assert head[1] == "# Seed: 3"
    assert head[2].endswith(" bytes")
    assert "558k.json, " in head[2]
    assert "meta.json, " in head[3]


def commands() -> list[list[str]]:
    """All but those of the mix, which test_mix665k.py runs."""
    before, _, mix = README.partition("## LLaVA's mix665k, by task")
    text = before + mix[mix.index("\n## ") :]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def test_every_command_of_the_readme_runs(tmp_path, pretrain, cc12m, tiny, monkeypatch, capsys):
    from fed.data.make_clients import main

    (tmp_path / "playground/data").mkdir(parents=True)
    (tmp_path / "playground/data/LLaVA-Pretrain").symlink_to(pretrain)
    (tmp_path / "cc12m").symlink_to(cc12m)
    monkeypatch.chdir(tmp_path)
    small = {
        "cc12m/{00000..01242}.tar": "cc12m/{00000..00001}.tar",
        "openai/clip-vit-large-patch14-336": str(tiny / "vision_tower"),
        "cuda": "cpu",
        "1000": "5",
    }
    shapes = Counter()
    for python, m, script, *argv in commands():
        assert (python, m, script) == ("python", "-m", "fed.data")
        main([small.get(word, word) for word in argv])
        output = Path(argv[argv.index("--output") + 1])
        out = capsys.readouterr().out
        assert f"--fed_clients {output}/clients.yaml" in out
        assert sum(map(len, clients(output).values())) + len(heldout(output)) in (60, 52)
        assert len(heldout(output)) == 3
        shapes[argv[0], "cc12m" in str(output)] += 1
    assert set(shapes) == {
        (shape, big) for shape in ("source", "cluster", "style", "dirichlet") for big in (0, 1)
    }


@pytest.mark.slow
@pytest.mark.parametrize("data", ["json", "tar"])
def test_a_round_of_training_on_what_was_made(make, flags, tiny, tmp_path, data, pretrain):
    from fed.train import train

    out = make(
        "dirichlet", "--key", "url-host", *"--clients 2 --alpha 1 --heldout 6".split(), data=data
    )
    images = pretrain / "images" if data == "json" else out / "heldout/images"
    train(
        flags(
            fed_clients=out / "clients.yaml",
            fed_eval_data_path=[out / "heldout.json"],
            fed_eval_image_folder=images,
            image_folder=None,
            output_dir=tmp_path / "run",
        )
    )
    (line,) = (tmp_path / "run/rounds.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert sum(client["samples"] for client in record["clients"].values()) == 54
    domains = record["heldout"]["global"]["heldout"]["domains"]
    assert set(domains) == {row["domain"] for row in heldout(out)}


def test_the_script_itself_and_its_error_are_one_line(tmp_path):
    import subprocess
    import sys

    flags = "source --key a --input no.json --image_folder . --output out".split()
    done = subprocess.run(
        [sys.executable, "-m", "fed.data", *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --input no.json: no such file\n"
