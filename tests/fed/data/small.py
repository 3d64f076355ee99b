"""Small data of the layouts that fed.data reads."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

HOSTS = ("www.shop.example", "news.example", "photos.example", "blog.example")
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def picture(number: int, kind: str = "JPEG") -> bytes:
    """A small picture, red, green or blue in turn, with a little noise."""
    noise = np.random.default_rng(number).integers(-25, 25, (20, 20, 3))
    pixels = np.clip(np.array(COLOURS[number % 3]) + noise, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def host(number: int) -> str:
    """The first host has most pictures, the last one fewest."""
    return HOSTS[min(number % 10 // 4 + number % 20 // 13, 3)]


def make_pretrain(folder: Path, samples: int = 60) -> Path:
    """LLaVA-Pretrain's layout: JSON, meta JSON (in another order), images/00000/000000000.jpg."""
    records, meta = [], []
    for i in range(samples):
        name = f"{i // 20:05d}/{i:09d}.jpg"
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
        question = "Render a clear and concise summary of the photo.\n<image>"
        turns = [("human", question), ("gpt", f"picture {i}. On the wall, for sale")]
        conversations = [{"from": who, "value": text} for who, text in turns]
        record = {"id": f"{i:09d}", "image": name}
        records.append({**record, "conversations": conversations})
        url = f"http://{host(i)}/{i}.jpg"
        meta.append({**record, "blip_caption": f"a photo of the thing {i}", "url": url})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))
    (folder / "blip_laion_cc_sbu_558k_meta.json").write_text(json.dumps(meta[::-1]))
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes | str) -> None:
    """A member with this content."""
    data = data.encode() if isinstance(data, str) else data
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_shards(folder: Path, shards: int = 2, samples: int = 30) -> Path:
    """The layout of CC12M as img2dataset writes it: 00000.tar with KEY.jpg, KEY.txt, KEY.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(samples):
                key, number = f"{shard:05d}{i:04d}", shard * samples + i
                caption = f"Thing {number} in the sun. For sale!"
                fields = {"key": key, "caption": caption, "width": 20}
                fields["url"] = f"https://{host(number)}/{number}.jpg"
                add(tar, f"{key}.jpg", picture(number))
                add(tar, f"{key}.json", json.dumps(fields))
                add(tar, f"{key}.txt", caption)
    return folder


REGION = "Please provide a short description for this region: [0.1, 0.2, 0.5, 0.6]."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: the dog."
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
MIX = {
    "gqa": (12, "gqa/images/23{:02d}.jpg", f"Is it red?{WORD}"),
    "ocr-vqa": (13, "ocr_vqa/images/{:09d}.jpg", f"Who wrote this book?{WORD}"),
    "textcaps": (
        *(9, "textvqa/train_images/{:04x}.jpg"),
        "Provide a one-sentence caption for the provided image.\nReference OCR token: ON, OFF",
    ),
    "vg": (12, "vg/VG_100K_2/23{:02d}.jpg", REGION),
    "refcoco": (18, "coco/train2017/{:012d}.jpg", BOX),
    "a-okvqa": (8, "coco/train2017/{:012d}.jpg", f"Which colour is it?{LETTER}"),
    "vqa": (16, "coco/train2017/{:012d}.jpg", f"What is it?{WORD}"),
    "coco-detail": (14, "coco/train2017/{:012d}.jpg", "What is this photo about'?"),
    "llava-instruct": (7, "coco/train2017/{:012d}.jpg", "Why might it be red?"),
    "text": (5, None, "Tell a joke."),
    "other": (2, "textvqa/train_images/{:04x}.jpg", f"What does it say?{WORD}"),
}
"""Task → records, picture, first question. In coco/ the pictures 0 to 17 are in several tasks."""


def make_mix(folder: Path) -> Path:
    """LLaVA's mix665k: its JSON in no order, and the pictures of its folders."""
    records = []
    for task, (count, image, question) in MIX.items():
        for i in range(count):
            asked = (f"<image>\n{question}", f"{question}\n<image>")[i % 2] if image else question
            turns = [("human", asked), ("gpt", f"{task} {i}")]
            if task in ("gqa", "ocr-vqa", "vqa"):
                turns += [("human", "And what else?"), ("gpt", "nothing")]
            conversations = [{"from": who, "value": text} for who, text in turns]
            record = {"id": f"{task}-{i}", "conversations": conversations}
            if image:  # two boxes of one picture
                name = image.format(i // 2 if task == "refcoco" else i)
                record["image"] = name
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(picture(i))
            records.append(record)
    random.Random(0).shuffle(records)
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
    return folder
