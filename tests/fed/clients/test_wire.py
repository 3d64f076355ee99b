"""What a client's update becomes on its way."""

from __future__ import annotations

import pytest
import torch

from fed import state as states
from fed.clients.update import Update, load_update, save_update
from fed.clients.wire import carried, decode, encode
from fed.state import StateError
from fed.train import train
from llava.errors import InputError


@pytest.fixture
def start() -> states.State:
    torch.manual_seed(0)
    return {"model.w": torch.randn(300, 200), "model.b": torch.randn(200)}


def moved(start: states.State, by: float) -> states.State:
    return {name: t + by * torch.randn_like(t) for name, t in start.items()}


def test_bf16_is_half_as_long_and_keeps_eight_bits_of_a_change(start, tmp_path):
    end = moved(start, 1e-4)
    update = Update(end, 5, {"loss": 1.0}, extras={"model.w": torch.ones(3)})
    for wire in ("float32", "bf16"):
        save_update(encode(update, start, wire), tmp_path / f"{wire}.safetensors")
    sizes = [(tmp_path / f"{wire}.safetensors").stat().st_size for wire in ("float32", "bf16")]
    assert sizes[1] < 0.52 * sizes[0]
    exact, found = (
        decode(load_update(tmp_path / f"{wire}.safetensors"), start, "client a")
        for wire in ("float32", "bf16")
    )
    here = carried(update, start, "bf16", "client a")
    for name, tensor in end.items():
        assert torch.equal(exact.state[name], tensor)
        assert torch.equal(found.state[name], here.state[name])
        assert found.state[name].dtype == torch.float32
        change = (tensor - start[name]).abs()
        off = (found.state[name] - tensor).abs()
        # Half a unit in the last of eight bits, and the rounding of float32 where it is added.
        assert (off <= change / 256 + tensor.abs() * 2**-23).all()
        assert off.max() > 0
        # A weight in bfloat16 would be off by more than the change.
        assert (tensor.bfloat16().float() - tensor).norm() > change.norm()
    assert (found.num_samples, found.metrics) == (5, {"loss": 1.0})
    assert torch.equal(found.extras["model.w"], torch.ones(3))


def test_what_has_not_moved_arrives_as_it_was(start):
    found = carried(Update(start, 0), start, "bf16", "client a").state
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_what_is_no_update_is_refused_by_name(start):
    half = encode(Update(moved(start, 1.0), 5), start, "bf16").state
    nan = {**half, "model.b": half["model.b"] * float("nan")}
    for bad, message in (
        ({"model.w": half["model.w"]}, "site x: tensor model.b is missing"),
        ({**half, "model.c": half["model.b"]}, "site x: tensor model.c is not expected"),
        ({**half, "model.b": half["model.b"][:5]}, "site x: tensor model.b has shape"),
        (nan, "site x: tensor model.b has 200 NaN"),
        ({**half, "model.b": start["model.b"]}, "torch.bfloat16, torch.float32; all"),
        ({n: t.half() for n, t in start.items()}, "its tensors are torch.float16; all"),
    ):
        with pytest.raises(StateError, match=message):
            decode(Update(bad, 5), start, "site x")


def test_a_run_averages_what_has_travelled(flags, tiny, tmp_path):
    one = tmp_path / "one.yaml"
    one.write_text(f"clients:\n  - {{name: a, data_path: {tiny}/a.json}}\n")
    train(flags(data_path=None, fed_clients=one, max_steps=1, output_dir=tmp_path / "start"))
    begun = {"pretrain_mm_mlp_adapter": tmp_path / "start" / "mm_projector.bin"}
    for wire in ("float32", "bf16"):
        train(flags(**begun, fed_clients=one, fed_wire=wire, output_dir=tmp_path / wire))
    start, exact, found = (
        states.load(tmp_path / name / "mm_projector.bin") for name in ("start", "float32", "bf16")
    )
    for name, tensor in exact.items():
        change = (tensor - start[name]).bfloat16().float()
        assert torch.equal(found[name], start[name] + change)
        assert not torch.equal(found[name], tensor)
    with pytest.raises(InputError, match="--fed_wire"):
        train(flags(**begun, fed_clients=one, output_dir=tmp_path / "bf16"))
    with pytest.raises(InputError, match="--fed_wire is 'fp8'; known are float32, bf16"):
        train(flags(**begun, fed_clients=one, fed_wire="fp8", output_dir=tmp_path / "x"))
