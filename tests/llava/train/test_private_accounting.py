"""epsilon against the closed form worked out by hand, and against Opacus' other accountants."""

from __future__ import annotations

import math
import warnings

import pytest

from llava.errors import InputError
from llava.train.private_accounting import epsilon_of, guarantee, noise_for
from llava.train.private_arguments import PrivacyArguments

CASES = [
    (0.7, 1, 1e-6),
    (1.0, 1, 1e-5),
    (2.0, 3, 1e-6),
    (5.0, 1, 1e-6),
    (0.5, 1, 1e-6),
    (6.0, 40, 1e-7),
]


def delta_by_hand(epsilon: float, sigma: float) -> float:
    """Balle and Wang 2018, equation 6, for sensitivity 1; erfc keeps the tails' digits."""

    def phi(t: float) -> float:
        return math.erfc(-t / math.sqrt(2)) / 2

    return phi(1 / (2 * sigma) - epsilon * sigma) - math.exp(epsilon) * phi(
        -1 / (2 * sigma) - epsilon * sigma
    )


@pytest.mark.parametrize(("noise", "entries", "delta"), CASES)
def test_epsilon_solves_the_closed_form_of_the_gaussian_mechanism(noise, entries, delta):
    epsilon = epsilon_of(noise, entries, delta)
    assert delta_by_hand(epsilon, noise / math.sqrt(entries)) == pytest.approx(delta, rel=1e-6)


def test_delta_by_hand_is_the_integral_of_the_two_densities():
    # sup over events of P - e^eps Q is that over {p > e^eps q}, here x > eps sigma^2 + 1/2.
    sigma, epsilon, step = 0.8, 1.3, 1e-4
    total = 0.0
    for i in range(int(12 / step)):
        x = epsilon * sigma**2 + 0.5 + (i + 0.5) * step
        densities = [math.exp(-((x - m) ** 2) / (2 * sigma**2)) for m in (1, 0)]
        total += step * (densities[0] - math.exp(epsilon) * densities[1])
    total /= sigma * math.sqrt(2 * math.pi)
    assert delta_by_hand(epsilon, sigma) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("noise", "entries", "delta"), CASES)
def test_opacus_accountants_say_the_same_within_their_margins(noise, entries, delta):
    from opacus.accountants import PRVAccountant, RDPAccountant

    epsilon = epsilon_of(noise, entries, delta)
    said = {}
    for kind in (PRVAccountant, RDPAccountant):
        accountant = kind()
        accountant.history = [(noise, 1.0, entries)]  # a rate of 1: no sampling
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said[kind] = accountant.get_epsilon(delta)
    assert (
        epsilon < said[PRVAccountant] < epsilon + 0.025
    )  # an upper bound, by up to 0.01 on its own
    assert epsilon < said[RDPAccountant] < 1.15 * epsilon


@pytest.mark.parametrize("entries", [1, 5])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 100.0])
def test_the_noise_for_an_epsilon_gives_it_and_is_no_more(epsilon, entries):
    noise = noise_for(epsilon, 1e-6, entries)
    assert epsilon_of(noise, entries, 1e-6) <= epsilon
    assert epsilon_of(noise, entries, 1e-6) == pytest.approx(epsilon, rel=1e-6)
    assert epsilon_of(noise * 0.999, entries, 1e-6) > epsilon


def test_steps_compose_as_one_of_less_noise_and_replacing_halves_it():
    assert epsilon_of(2.0, 4, 1e-6) == pytest.approx(epsilon_of(1.0, 1, 1e-6))
    flags = PrivacyArguments(fed_dp_noise=2.0, fed_dp_delta=1e-6, fed_dp_clip=0.5)
    of = guarantee(flags, entries=4, records=100, step=8, who="x")
    assert of.epsilon == epsilon_of(2.0, 4, 1e-6)
    assert of.replaced == epsilon_of(1.0, 4, 1e-6)
    assert (of.noise, of.clip, of.entries, of.records, of.step) == (2.0, 0.5, 4, 100, 8)


def test_known_numbers():
    # mu = 1: Dong, Roth, Su 2019 have 1-GDP; delta(1) = Phi(-1/2) - e Phi(-3/2).
    by_table = 0.308537538725987 - math.e * 0.0668072012688581
    assert delta_by_hand(1.0, 1.0) == pytest.approx(by_table, rel=1e-12)
    assert epsilon_of(1.0, 1, by_table) == pytest.approx(1.0, rel=1e-9)


def test_so_much_noise_that_nothing_is_revealed_and_so_little_that_all_is():
    assert epsilon_of(1e6, 1, 1e-5) == 0.0
    assert epsilon_of(0.02, 1, 1e-6) == math.inf
    flags = PrivacyArguments(fed_dp_noise=0.02, fed_dp_delta=1e-6, fed_dp_clip=1.0)
    with pytest.raises(InputError, match="x: --fed_dp_noise 0.02 with 1 steps .* above 500"):
        guarantee(flags, entries=1, records=10, step=2, who="x")


def test_delta_above_one_by_the_records_is_refused():
    flags = PrivacyArguments(fed_dp_epsilon=8, fed_dp_delta=0.011, fed_dp_clip=1.0)
    with pytest.raises(InputError, match="client a: --fed_dp_delta is 0.011, at most 1 / 100"):
        guarantee(flags, entries=1, records=100, step=2, who="client a")
    guarantee(flags, entries=1, records=90, step=2, who="client a")
