import math

import numpy as np
import pytest
import torch

from fed.privacy import layout as layouts
from fed.privacy.layout import Layout, Slot
from llava.errors import InputError

LIKE = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}


def vector(layout, tensors, weight, who="client a"):
    found = np.zeros(layout.size, layout.dtype)
    for where, chunk in layout.encode(tensors, weight, who):
        found[where] = chunk
    return found


def test_values_then_the_weight():
    layout = Layout.of(LIKE, {"w": 4.0, "b": 1.0}, clients=2, heaviest=3)
    assert layout.size == 9
    assert layout.nbytes == 72
    tensors = {"w": torch.arange(6.0).view(2, 3) / 2, "b": torch.tensor([1.0, -1.0])}
    found = vector(layout, tensors, 2).view(np.int64)  # w = 2 / 4, the unit being 4
    assert (found[:6] / 2.0**59).tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]  # 2 * 4 * 2**59 < 2**63
    assert (found[6:] / 2.0**61).tolist() == [0.5, -0.5, 0.5]


@pytest.mark.parametrize("bits", [32, 64])
def test_sums_are_those_of_weighted_values(monkeypatch, bits):
    monkeypatch.setattr(layouts, "CHUNK", 4)  # several chunks a tensor
    layout = Layout.of(LIKE, 1.0, clients=3, heaviest=100, bits=bits)
    source = torch.Generator().manual_seed(0)
    clients = [{n: torch.rand(t.shape, generator=source) for n, t in LIKE.items()} for _ in "abc"]
    weights = [100, 1, 37]
    total = sum(vector(layout, x, w) for x, w in zip(clients, weights, strict=True))
    sums, weight = layout.decode(total)
    assert weight == pytest.approx(138, rel=0 if bits == 64 else 1e-7)
    for name, tensor in sums.items():
        plain = sum(w * x[name].double() for x, w in zip(clients, weights, strict=True))
        assert tensor.dtype == torch.float32
        assert (tensor - plain).abs().max() <= 1e-6 * plain.abs().max()


def test_a_few_samples_among_a_million_keep_their_precision():
    like = {"w": torch.zeros(1000)}
    layout = Layout.of(like, 100.0, clients=8, heaviest=1e6)
    source = torch.Generator().manual_seed(1)
    clients = [{"w": torch.randn(1000, generator=source)} for _ in range(8)]
    sums, weight = layout.decode(sum(vector(layout, x, k + 1) for k, x in enumerate(clients)))
    plain = sum((k + 1) * x["w"].double() for k, x in enumerate(clients)) / 36
    mean = sums["w"].double() / weight
    assert (mean - plain).abs().max() <= 1e-6 * plain.abs().max()


def test_bfloat16_and_views_are_read_as_they_are():
    layout = Layout.of({"w": torch.zeros(3, 2)}, 4.0, clients=2)
    tensor = torch.tensor([[1.0, 2, 3], [-1, -2, -3]]).bfloat16().T
    sums, _ = layout.decode(vector(layout, {"w": tensor}, 1))
    assert sums["w"].tolist() == [[1, -1], [2, -2], [3, -3]]


GOOD = {"w": torch.ones(2, 3), "b": torch.ones(2)}
BAD = [
    ({"w": GOOD["w"]}, 1, "client a: tensor b is missing"),
    ({**GOOD, "c": GOOD["b"]}, 1, "client a: tensor c is not expected"),
    ({**GOOD, "b": torch.ones(3)}, 1, r"tensor b has shape \(3,\), expected \(2,\)"),
    ({**GOOD, "b": torch.ones(2, dtype=torch.int64)}, 1, "tensor b is torch.int64"),
    ({**GOOD, "b": torch.tensor([1.0, math.nan])}, 1, "client a: tensor b has 1 NaN or infinite"),
    ({**GOOD, "w": GOOD["w"] * 5}, 1, "client a: tensor w has values beyond 4, the bound"),
    (GOOD, 11, "client a: the weight is not in 0 to 10"),
    (GOOD, -1, "client a: the weight is not in 0 to 10"),
    (GOOD, math.nan, "client a: the weight is not in 0 to 10"),
]


@pytest.mark.parametrize(("tensors", "weight", "message"), BAD)
def test_what_cannot_be_summed_is_named(tensors, weight, message):
    layout = Layout.of(LIKE, 4.0, clients=2, heaviest=10)
    with pytest.raises(InputError, match=message):
        vector(layout, tensors, weight)


def test_bad_layouts():
    with pytest.raises(InputError, match="two tensors have the same name"):
        Layout((Slot("w", (1,), 1.0), Slot("w", (2,), 1.0)), 3)
    with pytest.raises(InputError, match=r"tensor 'w' has shape \(0,\)"):
        Slot("w", (0,), 1.0)
    with pytest.raises(InputError, match="the bound is 0"):
        Slot("w", (1,), 0.0)
    with pytest.raises(InputError, match="heaviest is 0"):
        Layout((Slot("w", (1,), 1.0),), 3, heaviest=0.0)
    with pytest.raises(InputError, match="has 8 bits"):
        Layout((Slot("w", (1,), 1.0),), 3, bits=8)
