"""The canary audit: visible without private training, below what is stated with it."""

from __future__ import annotations

import importlib.util
import math
import secrets
import sys

import pytest
from scipy.stats import binom

from llava.train.private_arguments import PrivacyArguments
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def audit():
    path = ROOT / "scripts/benchmark/privacy_audit.py"
    spec = importlib.util.spec_from_file_location("privacy_audit", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def guesses(audit, made, right, canaries):
    return [audit.Guesses(made, right, canaries, 0.0)]


def test_the_lower_bound_without_delta_is_that_of_coins(audit):
    # 100 of 100 right: e^eps / (1 + e^eps) to the 100th power is 5 %.
    chance = 0.05 ** (1 / 100)
    bound = audit.lower_bound(guesses(audit, 100, 100, 100), 0.0)
    assert bound == pytest.approx(math.log(chance / (1 - chance)), abs=1e-3)
    bound = audit.lower_bound(guesses(audit, 100, 80, 100), 0.0)
    chance = 1 / (1 + math.exp(-bound))
    assert binom.sf(79, 100, chance) == pytest.approx(0.05, rel=1e-3)
    assert audit.lower_bound(guesses(audit, 100, 55, 100), 0.0) == 0.0


def test_delta_lowers_it_and_guesses_of_several_runs_are_pooled(audit):
    one = audit.lower_bound(guesses(audit, 100, 95, 200), 0.0)
    assert audit.lower_bound(guesses(audit, 100, 95, 200), 1e-4) < one
    halves = guesses(audit, 50, 48, 100) + guesses(audit, 50, 47, 100)
    assert audit.lower_bound(halves, 0.0) == one


def test_a_randomised_response_of_known_epsilon_is_not_overrated(audit):
    import random

    draw, epsilon = random.Random(5), 1.0
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    bounds = [
        audit.lower_bound(
            guesses(audit, 200, sum(draw.random() < chance for _ in range(200)), 200), 0.0
        )
        for _ in range(200)
    ]
    assert sum(bound > epsilon for bound in bounds) <= 20  # 5 % of 200 are expected at most
    assert 0.5 < sorted(bounds)[100] < epsilon


@pytest.mark.slow
def test_canaries_are_seen_without_private_training_and_not_with_it(
    audit, flags, tmp_path, monkeypatch
):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "5a" * count)
    changes = {"num_train_epochs": 10, "per_device_train_batch_size": 16, "output_dir": None,
               "image_folder": None, "seed": None, "lr_scheduler_type": "constant"}  # fmt: skip
    privacy = PrivacyArguments(fed_dp_epsilon=1.0, fed_dp_delta=1e-5, fed_dp_clip=0.5)
    found = audit.audit(flags(**changes), 64, privacy, tmp_path, range(5))
    stated = found["private"]["epsilon"]
    assert stated == pytest.approx(1.0, abs=1e-6)
    assert found["private"]["epsilon at least"] < stated < 2 < found["open"]["epsilon at least"]
    assert found["private"]["accuracy"] < 0.65
    assert found["open"]["accuracy"] > 0.8
