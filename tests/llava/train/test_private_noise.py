"""The noise: its distribution, what it depends on, and its secret's file."""

from __future__ import annotations

import json
import math
import stat

import pytest
import torch

from llava.errors import InputError
from llava.train.private_noise import GaussianStream, NoiseSecret


def test_the_stream_is_standard_normal():
    count = 400_000
    z = GaussianStream(bytes(range(32))).draw(count)
    assert z.dtype is torch.float64
    moments = [(z**k).mean().item() for k in (1, 2, 3, 4)]
    bounds = [math.sqrt(v / count) for v in (1, 2, 15, 96)]  # variances of z, z^2, z^3, z^4
    for moment, expected, bound in zip(moments, (0, 1, 0, 3), bounds, strict=True):
        assert abs(moment - expected) < 5 * bound
    ordered = z.sort().values
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    apart = (torch.special.ndtr(ordered) - steps).abs().max().item()
    assert apart < 2.5 / math.sqrt(count)  # Kolmogorov and Smirnov: 1 in 10^5
    half = count // 2
    assert abs((z[:half] * z[half:]).mean().item()) < 5 / math.sqrt(half)


def noised(secret, *args):
    return dict(secret.noised(*args))


def test_draws_do_not_depend_on_how_many_are_asked_for_at_a_time():
    whole = GaussianStream(b"k" * 32).draw(2**21)
    stream = GaussianStream(b"k" * 32)
    parts = torch.cat([stream.draw(2**20), stream.draw(2**20)])
    assert torch.equal(whole, parts)
    assert not torch.equal(GaussianStream(b"l" * 32).draw(8), whole[:8])
    assert len(GaussianStream(b"k" * 32).draw(0)) == 0
    assert len(GaussianStream(b"k" * 32).draw(3)) == 3


@pytest.fixture
def secret(tmp_path):
    return NoiseSecret(tmp_path / "noise" / "a.json")


SUMS = {"a": torch.zeros(300), "b": torch.ones(20, 10)}


def test_noise_is_added_once_by_its_scale(secret):
    found = noised(secret, "task", 3, {"a": torch.full((50_000,), 2.0)}, 0.7)["a"]
    assert found.mean().item() == pytest.approx(2.0, abs=5 * 0.7 / math.sqrt(50_000))
    assert found.std().item() == pytest.approx(0.7, rel=0.03)


def test_the_same_sum_of_a_step_has_the_same_noise_and_nothing_else_has(secret):
    first = noised(secret, "task", 3, SUMS, 1.0)
    again = noised(NoiseSecret(secret.file), "task", 3, SUMS, 1.0)
    assert all(torch.equal(first[n], again[n]) for n in SUMS)
    moved = {**SUMS, "b": SUMS["b"].clone()}
    moved["b"][0, 0] += 1e-6
    for other in (
        noised(secret, "task", 4, SUMS, 1.0),
        noised(secret, "other task", 3, SUMS, 1.0),
        noised(secret, "task", 3, moved, 1.0),
        noised(NoiseSecret(secret.file.with_name("b.json")), "task", 3, SUMS, 1.0),
    ):
        alike = torch.corrcoef(torch.stack([first["a"], other["a"]]))[0, 1]
        assert abs(alike) < 0.3
        assert not torch.equal(first["a"], other["a"])


def test_its_file_is_the_owners_alone_and_a_broken_one_is_named(secret):
    assert stat.S_IMODE(secret.file.stat().st_mode) == 0o600
    assert len(json.loads(secret.file.read_text())["secret"]) == 64
    secret.begin("t", "x")
    assert stat.S_IMODE(secret.file.stat().st_mode) == 0o600
    assert [path.name for path in secret.file.parent.iterdir()] == ["a.json"]
    secret.file.write_text('{"secret": "00", "tasks": {}}')
    with pytest.raises(InputError, match=r"a.json: not the secret of a run's noise"):
        NoiseSecret(secret.file)


def test_a_task_begins_from_one_state_alone(secret):
    secret.begin("round 1", "x")
    secret.begin("round 1", "x")
    secret.begin("round 2", "y")
    with pytest.raises(InputError, match="round 1 has begun before from another state"):
        NoiseSecret(secret.file).begin("round 1", "y")
