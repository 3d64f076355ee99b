"""Clients that add the noise of private training together, in secure sums."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fed.train import train
from llava.errors import InputError

pytest.importorskip("opacus")

NOISE, CLIP, RATE, STEP = 50.0, 0.5, 1e-3, 12
SHARES = {
    "fed_dp_noise": NOISE, "fed_dp_delta": 1e-6, "fed_dp_clip": CLIP, "fed_dp_shares": True,
    "fed_secure": True, "fed_secure_min": 2, "fed_options": ["paper_compat=true"],
    "optim": "sgd", "max_grad_norm": 0, "learning_rate": RATE, "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": STEP // 2, "weight_decay": 0,
}  # fmt: skip


@pytest.fixture
def shared(flags, tiny):
    def make(**changes):
        return flags(**{"fed_clients": tiny / "clients.yaml", **SHARES, **changes})

    return make


def deviation(folder, start) -> float:
    """Of what training has moved."""
    before, after = (
        torch.load(path / "mm_projector.bin", weights_only=True) for path in (start, folder)
    )
    moved = torch.cat(
        [(after[name] - tensor).double().flatten() for name, tensor in before.items()]
    )
    return float(moved.std())


def test_the_sum_has_the_noise_that_is_stated_and_each_client_a_share(
    shared, flags, tiny, tmp_path
):
    start, one, two = (tmp_path / name for name in ("start", "whole", "shares"))
    train(flags(fed_clients=tiny / "clients.yaml", output_dir=start, learning_rate=0))
    train(shared(output_dir=one, fed_dp_shares=False))
    train(shared(output_dir=two))
    # Two clients' means of steps of 12 samples; what the samples add is a thousandth of it.
    expected = RATE * NOISE * CLIP / STEP / 2
    assert deviation(two, start) == pytest.approx(expected, rel=0.1)
    assert deviation(one, start) == pytest.approx(expected * math.sqrt(2), rel=0.1)
    stated = json.loads((two / "privacy.json").read_text())
    for of in stated["guarantees"].values():
        assert (of["noise"], of["shares"]) == (NOISE, 2)
        assert of["epsilon"] < of["betrayed"] < of["replaced"]
    assert "Noise in shares" in stated["assumptions"][-1]
    assert "Noise in shares" in (two / "README.md").read_text()
    alone = json.loads((one / "privacy.json").read_text())
    assert alone["guarantees"]["a"]["betrayed"] is None
    assert "Noise in shares" not in (one / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fed_dp_noise": None, "fed_dp_delta": None, "fed_dp_clip": None}, "is for private train"),
        ({"fed_secure": False}, "needs --fed_secure True"),
        ({"fed_method": "fedexp"}, "no place with --fed_method fedexp"),
        ({"fed_method": "scaffold", "fed_options": ["weighting=uniform"]}, "fed_method scaffold"),
        ({"fed_method": "fedcmp", "fed_options": ["reliability=none"]}, "--fed_method fedcmp"),
        ({"fed_method": "median", "fed_options": ["weighted=true"]}, "looks at single clients"),
        ({"fed_options": ["server_lr=1"]}, "clients that count alike"),
        ({"optim": "adamw_torch"}, "--optim is 'adamw_torch', 'sgd' is expected"),
        ({"optim_args": "momentum=0.9"}, "--optim_args is 'momentum=0.9', '' is expected"),
        ({"max_grad_norm": 1}, "--max_grad_norm is '1', '0' is expected"),
        ({"gradient_accumulation_steps": 3}, "a takes 2 steps on the 12 records of round 1"),
        ({"num_train_epochs": 2}, "client a takes 2 steps"),
    ],
)  # fmt: skip
def test_what_is_no_sum_of_single_linear_steps_is_refused(shared, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(shared(**changes))
    assert not (tmp_path / "out" / "privacy.json").exists()


def test_a_client_with_steps_of_its_own_is_refused(shared, tiny, tmp_path):
    entries = [
        {"name": n, "data_path": str(tiny / f"{n}.json"), "image_folder": str(tiny / "images")}
        for n in "ab"
    ]
    entries[1]["learning_rate"] = 1e-2
    (tmp_path / "own.yaml").write_text(json.dumps({"clients": entries}))
    with pytest.raises(InputError, match="client b: learning_rate is its own"):
        train(shared(fed_clients=tmp_path / "own.yaml"))
