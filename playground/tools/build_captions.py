"""Build playground/data/captions.json: what else than its name can be said of every concept.

    python -m playground.tools.build_captions [--cache FOLDER]

For each concept of the unpacked playground its CLDR keywords in English, reduced to plain
lower-case words as the names are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llava.atomic import write_text
from playground.tools.build_data import ROOT, annotations, fetch, plain_name

TARGET = ROOT / "playground/data/captions.json"
DATA = ROOT / "playground/data/emoji"
CLDR = ("cldr-annotations-full", "cldr-annotations-derived-full")


def keywords_of(name: str, words: list[str]) -> list[str]:
    """The keywords that say what the name does not.

    >>> keywords_of("diya lamp", ["diya", "lamp", "light", "oil"])
    ['light', 'oil']
    """
    plain = dict.fromkeys(plain_name(word.lower()) for word in words)
    return [w for w in plain if w and w not in name.split() and w != name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build/playground")
    args = parser.parse_args()
    packages = fetch(args.cache, CLDR)
    english = annotations(packages, "en")
    captions = {}
    for file in sorted(DATA.glob("clients/topic/*.json")) + sorted(DATA.glob("heldout_*.json")):
        for record in json.loads(file.read_text()):
            code, name = record["id"].split("-", 1)[1], record["conversations"][1]["value"]
            emoji = "".join(chr(int(point, 16)) for point in code.split("-")).replace("\ufe0f", "")
            captions[code] = keywords_of(name, english[emoji].get("default", []))
    lines = ",\n".join(f"{json.dumps(c)}: {json.dumps(captions[c])}" for c in sorted(captions))
    write_text(TARGET, f"{{\n{lines}\n}}\n")
    print(f"{TARGET}: {len(captions)} concepts")


if __name__ == "__main__":
    main()
