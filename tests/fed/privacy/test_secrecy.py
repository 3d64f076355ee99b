"""Secrecy, as far as it can be measured: of a single vector nothing is seen in what a server gets.

Vectors have fixed seeds, masks are the operating system's. What is looked at are the bits, and the
signed value, of the sums in the ring that an observer can make ("features"). Where masks do their
work each is uniform and independent of the vectors; scaled to variance 1,

    z = sum_j feature_j x_j / sqrt(sum_j x_j^2)

is then sub-Gaussian with variance 1 (Hoeffding), and P(|z| > 8) < 3e-14. A test looks at fewer than
10,000 of them: a false alarm has a probability below 1e-9. The same looking finds vectors at once
where masks are left out or used twice.
"""

import hashlib
import itertools
import random

import numpy as np
import pytest
import torch

from fed.privacy import derived_keys, masks
from fed.privacy.client_memory import STEPS
from fed.privacy.envelope import decode, head_of
from fed.privacy.keys import public_of
from fed.privacy.messages import MaskedInput
from fed.privacy.unmasking import mask_keys
from tests.fed.privacy.federation import Federation, draw

FIRST, SECOND, MASKED, CHECK, LAST = STEPS
LIKE = {"w": torch.zeros(2000)}
RUNS = 11  # the first one is only compared with
BOUND = 8.0
FOUND = 30.0  # what there is to be seen is far above it; by chance 1e-195


def rounds(count, gone=(), runs=RUNS):
    """Finished sums of fresh vectors, each with the masked inputs of its clients, in the ring."""
    for run in range(runs):
        made = Federation(count, LIKE, heaviest=1, threshold=count // 2 + 1, least=2)
        made.weights = dict.fromkeys(made.names, 1.0)
        made.tensors = {n: draw(1000 * run + i, LIKE) for i, n in enumerate(made.names)}
        made.until(MASKED)
        sent = {name: made.answer(name, MASKED) for name in made.names if name not in gone}
        made.do(MASKED, gone)
        made.do(CHECK)
        made.do(LAST)
        yield made, {n: decode(m, MaskedInput, made.terms, n).values for n, m in sent.items()}


def plain(made, name):
    return made.tensors[name]["w"].double().numpy()


def without(values, keys):
    """Values less masks, each of a key with its sign."""
    found = values.copy()
    masks.Masks([(key, -sign) for key, sign in keys], found.dtype).add_to(found)
    return found


def opened(made, masked):
    """y_u - PRG(b_u) by client, and less the masks with those that are gone: the server's view."""
    server = made.server
    there = server._survivors
    dropped = [name for name in server._dealt if name not in there]
    arguments = server._unmasking, server._advertised, dropped, there, made.terms
    keys = list(mask_keys(*arguments))
    own = dict(zip(there, keys, strict=False))
    pairs = iter(keys[len(there) :])
    with_gone = {name: [] for name in there}
    for _ in dropped:
        for name in there:
            with_gone[name].append(next(pairs))
    return {n: without(values, [own[n], *with_gone[n]]) for n, values in masked.items()}


def subset_sums(by_client, most):
    """The sum of each set of at most `most` clients."""
    for size in range(1, most + 1):
        for some in itertools.combinations(by_client, size):
            yield sum(by_client[name] for name in some)


def server_view(made, masked):
    """All sums of masked inputs, and of those that it has opened, but for the sum of all of these:
    that one it is to learn."""
    yield from subset_sums(masked, len(masked))
    yield from subset_sums(opened(made, masked), len(masked) - 1)


def looks(values):
    """The bits of elements of the ring, as -1 and 1, and their signed value: (65, n)."""
    bits = (values >> np.arange(64, dtype=np.uint64)[:, None]) & np.uint64(1)
    signed = values.view(np.int64) * (3**0.5 / 2.0**63)
    return np.concatenate([bits.astype(np.float64) * 2 - 1, signed[None]])


def seen(found, view, target):
    """The largest |z| over all features of a view, and of its differences to the last run's."""
    sums, squares, last = 0.0, 0.0, None
    for made, masked in found:
        now = [values[:-1] for values in view(made, masked)]  # the last coordinate is the weight
        if last is not None:
            x = target(made)
            features = [*now, *(a - b for a, b in zip(now, last, strict=True))]
            sums = sums + np.stack([looks(values) @ x for values in features])
            squares += x @ x
        last = now
    assert np.size(sums) < 10_000
    return np.abs(sums).max() / squares**0.5


def no_masks(patch):
    patch.setattr(masks.Masks, "add_to", lambda self, values: None)


def same_masks(patch):
    """Keys that depend on the clients alone: those of the last run again."""

    def key(*words):
        return hashlib.sha256("/".join(words).encode()).digest()

    patch.setattr(derived_keys, "self_mask", lambda terms, client, seed: key(client))
    patch.setattr(
        derived_keys,
        "pair_mask",
        lambda terms, private, public, client, peer, whose: key(*sorted((client, peer))),
    )


@pytest.mark.parametrize(("count", "gone"), [(3, ""), (4, "d")])
def test_the_server_sees_nothing_of_a_single_vector(count, gone):
    found = list(rounds(count, gone))
    for name in "abc":
        assert seen(found, server_view, lambda made, name=name: plain(made, name)) < BOUND


@pytest.mark.parametrize("broken", [no_masks, same_masks])
def test_without_masks_or_with_used_ones_it_is_seen(monkeypatch, broken):
    broken(monkeypatch)
    found = list(rounds(3))
    assert seen(found, server_view, lambda made: plain(made, "a")) > FOUND


def test_the_sum_itself_is_seen():
    """What may be learned is learned: x_a from the sum of all, as far as it is in it."""
    found = list(rounds(3))

    def everything(made, masked):
        return [sum(opened(made, masked).values())]

    assert seen(found, everything, lambda made: plain(made, "a")) > FOUND


@pytest.mark.parametrize(("count", "gone"), [(3, ""), (4, "d")])
def test_a_regression_on_all_that_the_server_has_explains_nothing(monkeypatch, count, gone):
    """R^2 of x_a on the signed sums together: n R^2 is chi-squared with as many degrees of freedom
    (at most 22; above 150 with a probability below 1e-20)."""

    def n_r2():
        rows, x = [], []
        for made, masked in rounds(count, gone, runs=5):
            sums = [values[:-1] for values in server_view(made, masked)]
            rows.append(np.stack(sums).view(np.int64).T / 2.0**63)
            x.append(plain(made, "a"))
        rows, x = np.concatenate(rows), np.concatenate(x)
        assert rows.shape[1] <= 22
        rows, x = rows - rows.mean(0), x - x.mean()
        fitted = rows @ np.linalg.lstsq(rows, x, rcond=None)[0]
        return len(x) * (fitted @ fitted) / (x @ x)

    assert n_r2() < 150
    no_masks(monkeypatch)
    assert n_r2() > 0.9 * 5 * 2000


# Clients on the server's side


def known_to(colluders, made, masked):
    """What the server has, less the masks that the colluding clients share with the others."""
    found = opened(made, masked)
    for name in found:
        keys = [(key, derived_keys.sign(name, peer)) for peer in colluders
                if (key := made.pair_keys.get(frozenset((name, peer)))) is not None]  # fmt: skip
        if name not in colluders:
            found[name] = without(found[name], keys)
    return {name: values for name, values in found.items() if name not in colluders}


@pytest.fixture
def pair_keys(monkeypatch):
    """Each Federation notes the keys of its pairs, as both clients of a pair know them."""
    real, known = derived_keys.pair_mask, {}

    def noted(terms, private, public, client, peer, whose):
        key = real(terms, private, public, client, peer, whose)
        known[terms.attempt, frozenset((client, peer))] = key
        return key

    monkeypatch.setattr(derived_keys, "pair_mask", noted)

    def of(made):
        made.pair_keys = {pair: key for (attempt, pair), key in known.items()
                          if attempt == made.terms.attempt}  # fmt: skip
        return made

    return of


def test_all_others_together_learn_the_last_vector(pair_keys):
    for made, masked in rounds(4, runs=1):
        left = known_to("bcd", pair_keys(made), masked)
        assert np.array_equal(left["a"], made.ring("a"))


def test_fewer_learn_the_others_sum_alone(pair_keys):
    found = [(pair_keys(made), masked) for made, masked in rounds(4)]

    def view(made, masked):
        return known_to("cd", made, masked).values()

    for made, masked in found:
        assert np.array_equal(sum(view(made, masked)), made.ring("ab"))
    for target in (
        lambda made: plain(made, "a"),
        lambda made: plain(made, "b"),
        lambda made: plain(made, "a") - plain(made, "b"),
    ):
        assert seen(found, view, target) < BOUND


# All else


def test_nothing_but_the_masked_values_depends_on_the_vectors(monkeypatch):
    """With the same random numbers and other vectors, all other messages are the same."""

    def record(offset):
        source = random.Random(0)
        monkeypatch.setattr("secrets.token_bytes", source.randbytes)
        monkeypatch.setattr("secrets.token_hex", lambda n: source.randbytes(n).hex())
        monkeypatch.setattr("Crypto.Protocol.SecretSharing.rng", source.randbytes)
        made = Federation.__new__(Federation)
        made.__dict__.update(first.__dict__)
        made.attempt()
        made.tensors = {n: draw(offset + i) for i, n in enumerate(made.names)}
        made.weights = {n: 10.0 * offset + i for i, n in enumerate(made.names)}
        found = {}
        for step in STEPS:
            for name in [n for n in made.messages if (step, n) != (MASKED, "e")]:
                found[step, name] = message = bytes(made.answer(name, step))
                if step == MASKED:
                    values = decode(message, MaskedInput, made.terms, name)
                    found[step, name] = len(head_of(message)), len(values.values)
                made.server.receive(name, message)
            if step != LAST:
                made.messages = made.server.proceed()
        return found

    first = Federation(5)
    assert record(1) == record(7)


def test_no_mask_is_used_twice(monkeypatch, tmp_path):
    """All keys of masks, over rounds, sums, attempts and restarts, with what they have masked."""
    used, real, serving = {}, masks.Masks.__init__, []

    def noted(self, keys, dtype):
        serving[:] = keys
        real(self, serving, dtype)

    monkeypatch.setattr(masks.Masks, "__init__", noted)
    made, attempts = Federation(4), 0
    for round, exchange, last in itertools.product((1, 2), ("x", "y"), (MASKED, CHECK, LAST)):
        made.folder = tmp_path / f"{round}-{exchange}"
        made.attempt(round=round, exchange=exchange).until(MASKED)
        attempts += 1
        for name in made.names * 3:
            message = bytes(made.answer(name, MASKED))
            for key, sign in serving:
                used.setdefault(key, set()).add((attempts, name, sign, message))
            made.clients[name] = made.client(name)  # killed and started again
        for step in STEPS[2 : STEPS.index(last) + 1]:
            made.do(step)
    own = [uses for uses in used.values() if len(uses) == 1]
    pairs = [sorted(uses) for uses in used.values() if len(uses) == 2]
    assert attempts == 12
    assert len(own) == 4 * attempts
    assert len(pairs) == 6 * attempts
    assert len(used) == len(own) + len(pairs)
    for first, second in pairs:  # of one attempt, by two clients, with opposite signs
        assert first[0] == second[0]
        assert first[1] < second[1]
        assert (first[2], second[2]) == (-1, 1)


def test_two_attempts_share_no_key():
    made = Federation(4).until(MASKED)
    before = {public_of(c._memory.secrets.channel_key) for c in made.clients.values()}
    seeds = {v for c in made.clients.values() for v in vars(c._memory.secrets).values()}
    made.attempt().until(MASKED)
    after = {public_of(c._memory.secrets.channel_key) for c in made.clients.values()}
    again = {v for c in made.clients.values() for v in vars(c._memory.secrets).values()}
    assert len(before | after) == 8
    assert len(seeds | again) == 24
