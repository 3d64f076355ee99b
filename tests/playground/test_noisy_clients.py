"""Fed-CMP among clients of whom three have shuffled captions, on the playground's real pictures."""

from __future__ import annotations

import json
import re

import pytest

from fed.train import train
from playground import ROOT
from playground.flags import flags, words
from playground.tools.cut_clients import KINDS, NOISE, noisy_shares


@pytest.mark.slow
def test_clients_with_shuffled_captions_are_found_and_have_little_say(emoji, tmp_path, capsys):
    text = (ROOT / "playground/fed/noisy-dev.yaml").read_text()
    (tmp_path / "clients.yaml").write_text(text.replace("../data/emoji", str(emoji)))
    values = flags("pretrain") | {
        "fed_clients": tmp_path / "clients.yaml",
        "fed_eval_every": 0,
        "fed_eval_data_path": emoji / "unseen.json",
        "fed_eval_image_folder": emoji / "images",
        "optim": "sgd",
        "learning_rate": 2.0,
        "output_dir": tmp_path / "run",
        "report_to": "none",
    }
    train(words(values))
    bad = {name for name, share in noisy_shares(sorted(KINDS), NOISE["-dev"]).items() if share}
    assert len(bad) == 3
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])["reliability"]
    assert max(last[name] for name in bad) < 0.5 * min(last[name] for name in last.keys() - bad)
    named = re.findall(r"the pictures of client (\w+) explain", capsys.readouterr().out)
    assert set(named) == bad
