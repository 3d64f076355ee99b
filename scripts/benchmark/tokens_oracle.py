"""Token ids of transformers 4.37.2's slow Llama tokenizer, into tests/golden/upstream_tokens.json.

    python3.11 -m venv /tmp/slow
    /tmp/slow/bin/pip install transformers==4.37.2 sentencepiece protobuf "numpy<2"
    /tmp/slow/bin/python scripts/benchmark/tokens_oracle.py

That tokenizer is what upstream trains and asks with. A prompt is read as upstream reads it: each
text between two pictures by itself, the begin-of-text id kept of the first alone, -200 for a
picture. Nothing of upstream is run or copied. `legacy` None is a config that does not say it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from transformers import AutoTokenizer

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden"
ADDED = ["<im_patch>", "<im_start>", "<im_end>"]
BEGINNINGS = ["", " ", "  ", "   ", "\n", " \n", "\n ", "\t", "▁", "</s>", "</s> ", " </s>"]
BEGINNINGS += [
    "</s>  ",
    "<im_end>",
    "<im_end>\n",
    "<im_end> ",
    " <im_end>",
    "<im_end></s> ",
    "<unk> ",
]
ENDINGS = ["", "please. ASSISTANT:", "What is this?</s>USER: And</s> now", "é猫🙂</s>  x "]
PROMPTS = [
    "USER: Compare <image> please. ASSISTANT:",
    "USER: Compare <image> with <image>  and<image>\n<image> . ASSISTANT:",
    " <image> <image> ",
    "<image>",
    "<im_start><image><im_end>\nWhat? ASSISTANT: A cat.</s>USER: <im_start><image><im_end> Why?",
    "### Human: a <image> b\n### Assistant: c <image>",
    "[INST] <image>\nHi [/INST] Hello </s><s>[INST] <image> Bye [/INST]",
    "<image> red square\n",
]


def tokenizer_of(legacy: bool | None):
    """The tokenizer of a folder whose config says `legacy`, with upstream's tokens added."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(GOLDEN / "toy_tokenizer.model", Path(folder) / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        if legacy is not None:
            config["legacy"] = legacy
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    tokenizer.add_tokens(ADDED, special_tokens=True)
    return tokenizer


def read(prompt: str, tokenizer) -> list[int]:
    """The prompt's ids, -200 for each picture."""
    ids: list[int] = []
    for i, text in enumerate(prompt.split("<image>")):
        begin, *rest = tokenizer(text).input_ids
        assert begin == tokenizer.bos_token_id
        ids += [-200, *rest] if i else [begin, *rest]
    return ids


def main() -> None:
    texts = [begin + end for begin in BEGINNINGS for end in ENDINGS]
    prompts = [*PROMPTS, *(f"USER: a<image>{text}" for text in texts), *texts]
    found = {}
    for legacy in (False, True, None):
        tokenizer = tokenizer_of(legacy)
        found[json.dumps(legacy)] = [read(prompt, tokenizer) for prompt in prompts]
    versions = {name: version(name) for name in ("transformers", "sentencepiece")}
    values = {"made with": versions, "added": ADDED, "prompts": prompts, "legacy": found}
    lines = json.dumps(values, ensure_ascii=False, indent=None, separators=(",", ":"))
    (GOLDEN / "upstream_tokens.json").write_text(lines.replace("],", "],\n") + "\n")


if __name__ == "__main__":
    main()
