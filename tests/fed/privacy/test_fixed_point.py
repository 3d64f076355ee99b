import math

import numpy as np
import pytest

from fed.privacy.fixed_point import FixedPoint
from llava.errors import InputError


def test_by_hand():
    point = FixedPoint(bound=1.0, clients=3, bits=32)
    assert point.fraction == 29  # 3 * 2**29 < 2**31 <= 3 * 2**30
    assert point.resolution == 2.0**-29
    found = point.encode(np.array([0.5, -0.5, 0.0, 1.0]), "x")
    assert found.dtype == np.uint32
    assert found.tolist() == [2**28, 2**32 - 2**28, 0, 2**29]
    total = found + found + found  # the last one uses the range up
    assert point.decode(total).tolist() == [1.5, -1.5, 0.0, 3.0]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("clients", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize("bound", [1e-20, 0.1, 1.0, 3.7, 2.0**40])
def test_a_sum_of_the_largest_numbers_does_not_wrap(bits, clients, bound):
    point = FixedPoint(bound, clients, bits)
    for sign in (1, -1):
        one = int(point.encode(np.array([sign * bound]), "x").view(f"<i{bits // 8}")[0])
        assert -(2 ** (bits - 1)) <= clients * one < 2 ** (bits - 1)
        assert clients * abs(one) >= 2 ** (bits - 2) * 0.99  # and the range is used
        total = np.array([clients * one]).astype(point.dtype)
        assert point.decode(total)[0] == pytest.approx(clients * sign * bound, rel=1e-5)


@pytest.mark.parametrize("bits", [32, 64])
def test_rounding_is_within_half_a_step(bits):
    point = FixedPoint(2.0, 8, bits)
    values = np.random.default_rng(0).uniform(-2, 2, (8, 1000))
    total = np.zeros(1000, point.dtype)
    for row in values:
        total += point.encode(row, "x")
    # float64 itself rounds sums of up to 16 by 2**-50
    assert np.abs(point.decode(total) - values.sum(0)).max() <= 4 * point.resolution + 2.0**-49


@pytest.mark.parametrize("value", [1.0000001, -1.0000001, 1e300])
def test_a_value_beyond_the_bound_is_refused_and_not_told(value):
    with pytest.raises(
        InputError, match=r"^client a: tensor w has values beyond 1, the bound"
    ) as e:
        FixedPoint(1.0, 3).encode(np.array([0.0, value]), "client a: tensor w")
    assert "00000" not in str(e.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(InputError, match="tensor w has NaN or infinite values"):
        FixedPoint(1.0, 3).encode(np.array([value, 0.0]), "tensor w")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 16}, "has 16 bits, expected 32 or 64"),
        ({"bound": 0.0}, "the bound is 0.0"),
        ({"bound": -1.0}, "the bound is -1.0"),
        ({"bound": math.nan}, "the bound is nan"),
        ({"bound": math.inf}, "the bound is inf"),
        ({"clients": 0}, "for 0 clients"),
    ],
)
def test_bad_parameters(changes, message):
    with pytest.raises(InputError, match=message):
        FixedPoint(**{"bound": 1.0, "clients": 3, **changes})
