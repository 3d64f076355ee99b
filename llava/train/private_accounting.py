"""The privacy of a record, from the noise of the steps that it enters.

A step gives out sum_i clip(g_i, C) + N(0, (noise C)^2 I), over the samples of a fixed batch. Two
data sets are neighbours where one record of the one gives nothing (a gradient of zero) in the
other, all others in their places: zero-out adjacency (Kairouz et al. 2021, arXiv 2103.00039), the
form of add-or-remove for batches whose size is fixed and known. The sums then differ by at most C,
and the step is the Gaussian mechanism of sensitivity C; divided by a fixed number of samples it is
the same. Where a record is replaced by another one, they differ by at most 2 C: half the noise.

A record that enters `entries` steps has run through as many such mechanisms, each chosen in the
knowledge of those before. Their composition is, exactly, one Gaussian mechanism of noise noise /
sqrt(entries) (Dong, Roth, Su 2019, arXiv 1905.02383, Corollary 3.3). Of the steps that it does not
enter nothing is to be counted: what they give out depends on the record through earlier outputs
alone (parallel composition). In one pass entries is 1, however many steps and rounds the run has.

Batches are cut from a shuffled list, not Poisson sampled, and whoever knows the seed knows the
batches: no amplification by sampling is claimed.

epsilon is the number of the analytic Gaussian mechanism (Balle, Wang 2018, arXiv 1805.06530,
Theorem 8), with mu = sqrt(entries) / noise:

    delta = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)

which is exact; Opacus has it as the dual of mu-GDP, and that is what is called. Opacus' PRV
accountant gives the same plus its margin of 0.01, its RDP accountant a few percent more
(`tests/llava/train/test_private_accounting.py`); dp-accounting 0.6 cannot be installed beside
NVFlare 2.9, whose attrs is newer than it allows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from llava.errors import InputError
from llava.train.private_arguments import LARGEST, PrivacyArguments


@dataclass(frozen=True)
class Guarantee:
    """What a run may reveal of one record: (epsilon, delta), and all that it follows from.

    Attributes:
        replaced: epsilon at the same delta where neighbours have another record in its place; None
            above 500.
        noise: the standard deviation in units of `clip`.
        entries: the most steps that a record enters in the run.
        records: how many there are; public.
        step: the number of samples by which a step's sum is divided.
        shares: how many clients' noise makes up `noise`, where nobody sees less than their sum.
        betrayed: epsilon where one of them tells its own; None above 500, and where there is one.
    """

    epsilon: float
    delta: float
    replaced: float | None
    noise: float
    clip: float
    entries: int
    records: int
    step: int
    shares: int = 1
    betrayed: float | None = None

    @property
    def own_noise(self) -> float:
        """The noise that each adds by itself, in units of `clip`."""
        return self.noise / math.sqrt(self.shares)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def epsilon_of(noise: float, entries: int, delta: float) -> float:
    """epsilon of a record that enters `entries` steps; inf above 500."""
    from opacus.accountants.analysis.gdp import delta_eps_mu
    from scipy.optimize import brentq

    mu = math.sqrt(entries) / noise

    def excess(epsilon: float) -> float:
        return float(delta_eps_mu(eps=epsilon, mu=mu)) - delta

    if excess(0.0) <= 0:
        return 0.0
    return math.inf if excess(LARGEST) > 0 else float(brentq(excess, 0.0, LARGEST))


def noise_for(epsilon: float, delta: float, entries: int) -> float:
    """The least noise with which a record that enters `entries` steps has (epsilon, delta)."""
    from opacus.accountants.analysis.gdp import delta_eps_mu
    from scipy.optimize import brentq

    def excess(mu: float) -> float:
        return float(delta_eps_mu(eps=epsilon, mu=mu)) - delta

    most = 1.0
    while excess(most) < 0:
        most *= 2
    mu = float(brentq(excess, 1e-9, most, xtol=1e-13))
    return math.sqrt(entries) / mu * (1 + 1e-9)  # the root may lie on the other side


def guarantee(
    privacy: PrivacyArguments,
    *,
    entries: int,
    records: int,
    step: int,
    who: str,
    shares: int = 1,
) -> Guarantee:
    """The guarantee of a run of these flags; `who` opens messages.

    Raises:
        InputError: delta is above 1 / records, or the noise is so little that epsilon is above 500.
    """
    delta, clip = privacy.fed_dp_delta, privacy.fed_dp_clip
    assert delta is not None, "`check_privacy` has looked"
    assert clip is not None, "`check_privacy` has looked"
    if delta * records > 1:
        raise InputError(
            f"{who}: --fed_dp_delta is {delta:g}, at most 1 / {records} is expected, one by the "
            "number of records: with more, giving a whole record away would be private"
        )
    noise = privacy.fed_dp_noise
    if noise is None:
        assert privacy.fed_dp_epsilon is not None, "training is private"
        noise = noise_for(privacy.fed_dp_epsilon, delta, entries)
    epsilon = epsilon_of(noise, entries, delta)
    if epsilon > LARGEST:
        raise InputError(
            f"{who}: --fed_dp_noise {noise:g} with {entries} steps a record has an epsilon above "
            f"{LARGEST:g}, which protects nobody"
        )
    replaced, betrayed = epsilon_of(noise / 2, entries, delta), math.inf
    if shares > 1:
        betrayed = epsilon_of(noise * math.sqrt(1 - 1 / shares), entries, delta)
    return Guarantee(
        epsilon,
        delta,
        None if replaced > LARGEST else replaced,
        noise,
        clip,
        entries,
        records,
        step,
        shares,
        None if betrayed > LARGEST else betrayed,
    )
