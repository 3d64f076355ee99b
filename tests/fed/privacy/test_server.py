"""The server, and whole sums: what comes out, who may be gone, and what a client may do wrong."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from fed.privacy import layout
from fed.privacy.client_memory import STEPS
from fed.privacy.envelope import decode
from fed.privacy.keys import new_seed
from fed.privacy.messages import (
    AdvertiseKeys,
    ConsistencyCheck,
    MaskedInput,
    ShareKeys,
    Unmasking,
)
from fed.privacy.server import Server
from llava.errors import InputError
from tests.fed.privacy.federation import Federation, assert_close, sign

FIRST, SECOND, MASKED, CHECK, LAST = STEPS


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("count", range(3, 9))
def test_the_sum_in_the_ring_is_the_plain_one(count, bits):
    made = Federation(count, bits=bits)
    total = made.run()
    assert total.clients == tuple(made.names)
    assert np.array_equal(made.server._unmasked(), made.ring(made.names))
    assert np.array_equal(made.server._unmasked(), made.ring(made.names))  # asked for again
    if bits == 64:
        assert_close(total, made.plain(made.names))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", range(3, 9))
def test_clients_may_be_gone_before_each_step(count, step):
    made = Federation(count)
    may = count - made.terms.threshold  # none of 3, 1 of 4 to 6, 2 of 7 and 8
    gone = made.names[1 : 1 + may]
    total = made.run(dict.fromkeys(gone, step))
    counted = made.names
    if step in (FIRST, SECOND, MASKED):
        counted = [name for name in made.names if name not in gone]
    assert list(total.clients) == counted
    assert np.array_equal(made.server._unmasked(), made.ring(counted))
    assert_close(total, made.plain(counted))


def test_a_client_may_be_gone_at_each_step_of_one_sum():
    made = Federation(11, threshold=6)
    total = made.run(dict(zip("cfgik", STEPS, strict=True)))
    assert "".join(total.clients) == "abdehijk"
    assert np.array_equal(made.server._unmasked(), made.ring(total.clients))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [3, 5, 8])
def test_below_the_threshold_the_error_says_who_is_waited_for(count, step):
    made = Federation(count).until(step)
    there = made.terms.threshold - 1
    for name in made.names[:there]:
        made.server.receive(name, made.answer(name, step))
    text = (
        f"secure sum sum of round 1: {made.terms.threshold} clients are needed in {step}, there "
        f"are {there}; waiting for {', '.join(made.names[there:])}$"
    )
    end = made.server.finish if step == LAST else made.server.proceed
    with pytest.raises(InputError, match=text):
        end()
    assert made.server.step == step  # and it goes on once one more has come
    made.server.receive(made.names[there], made.answer(made.names[there], step))
    assert end()


def test_the_least_counts_where_it_is_above_the_threshold():
    made = Federation(8, threshold=5, least=7).until(MASKED)
    for name in "abcdef":
        made.server.receive(name, made.answer(name, MASKED))
    with pytest.raises(InputError, match="7 clients are needed in MaskedInputC.*, there are 6"):
        made.server.proceed()
    made.server.receive("g", made.answer("g", MASKED))
    made.messages = made.server.proceed()
    made.do(CHECK, "fg")  # five are enough to unmask
    made.do(LAST)
    assert "".join(made.server.finish().clients) == "abcdefg"


def test_many_chunks(monkeypatch):
    for module in ("layout", "masks", "server"):
        monkeypatch.setattr(f"fed.privacy.{module}.CHUNK", 7)
    made = Federation(5, like={"w": torch.zeros(4, 25), "b": torch.zeros(7)})
    total = made.run({"b": MASKED})
    assert layout.CHUNK == 7
    assert np.array_equal(made.server._unmasked(), made.ring("acde"))
    assert_close(total, made.plain("acde"))


def test_the_weighted_mean():
    made = Federation(5, heaviest=1e6)
    made.weights = dict(zip(made.names, (1, 10, 1000, 10**6, 0), strict=True))
    total, (sums, weight) = made.run(), made.plain(made.names)
    assert total.weight == weight
    for name, tensor in sums.items():
        mean, plain = total.sums[name] / total.weight, tensor / weight
        assert (mean - plain).abs().max() <= 1e-6 * plain.abs().max()


def test_a_server_that_was_killed_is_what_it_was():
    made = Federation(5)
    kept, again = [], Server(made.terms)
    for step in STEPS:
        for name in [n for n in made.messages if (n, step) != ("c", MASKED)]:
            kept.append((name, bytes(made.answer(name, step))))
            made.server.receive(*kept[-1])
        if step != LAST:
            made.messages = made.server.proceed()
            kept.append(("", made.messages))
    for name, message in kept:
        if name:
            again.receive(name, message)
        else:
            assert again.proceed() == message
    assert np.array_equal(again._unmasked(), made.server._unmasked())


def test_the_same_message_again_is_passed_over():
    made = Federation(4)
    sent = {}
    for step in STEPS:
        for name in made.messages:
            sent[step, name] = made.answer(name, step)
            for earlier in STEPS[: STEPS.index(step) + 1]:  # some come twice, some late
                made.server.receive(name, sent[earlier, name])
                made.server.receive(name, sent[earlier, name])
        if step != LAST:
            made.messages = made.server.proceed()
    assert_close(made.server.finish(), made.plain(made.names))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("changes", "text"),
    [({}, "attempt"), ({"round": 2}, "round 1, expected 2"), ({"exchange": "x"}, "exchange 'sum'")],
)
def test_a_message_of_another_attempt(step, changes, text):
    made = Federation(4).until(step)
    old = made.answer("b", step)
    made.attempt(**changes).until(step)
    with pytest.raises(InputError, match=f"^client b: its .* message has {text}"):
        made.server.receive("b", old)
    made.do(step)  # and nothing has come of it


@pytest.mark.parametrize("step", STEPS)
def test_a_message_of_another_client(step):
    made = Federation(4).until(step)
    good = made.answer("b", step)
    with pytest.raises(InputError, match="^client a: its .* message has a signature that is not a"):
        made.server.receive("a", good)
    with pytest.raises(InputError, match="^client z is not one of this secure sum"):
        made.server.receive("z", good)
    made.do(step)


def test_a_message_of_another_step():
    made = Federation(4).until(SECOND)
    message = sign(made, "b", ConsistencyCheck(("a", "b", "c")))
    with pytest.raises(InputError, match="^client b: its ShareKeys message has kind 'Consistency"):
        made.server.receive("b", message)


def test_keys_of_another_client():
    made = Federation(4)
    keys = decode(made.answer("a", FIRST), AdvertiseKeys, made.terms, "a")
    made.server.receive("a", sign(made, "a", keys))
    with pytest.raises(InputError, match="^client b: advertises a key of client a"):
        made.server.receive("b", sign(made, "b", keys))
    same = dataclasses.replace(keys, channel_key=bytes(32), mask_key=bytes(32))
    with pytest.raises(InputError, match="^client b: its two public keys are the same"):
        made.server.receive("b", sign(made, "b", same))


def test_shares_for_others_than_those_that_are_there():
    made = Federation(5)
    made.do(FIRST, "e")
    good = decode(made.answer("b", SECOND), ShareKeys, made.terms, "b")
    assert "".join(good.sealed) == "abcd"
    for part in ("sealed", "mask_key_commitments", "self_mask_commitments"):
        shares = getattr(good, part)
        for wrong in ({n: shares[n] for n in "abc"}, {**shares, "e": shares["a"]}):
            message = sign(made, "b", dataclasses.replace(good, **{part: wrong}))
            with pytest.raises(InputError, match="^client b: deals shares to .*, expected a, b, c"):
                made.server.receive("b", message)


def test_a_second_masked_input():
    made = Federation(4).until(MASKED)
    made.server.receive("b", made.answer("b", MASKED))
    other = np.arange(made.layout.size).astype(np.uint64).tobytes()
    text = "^client b: a second, different message in MaskedInputCollection"
    with pytest.raises(InputError, match=text):
        made.server.receive("b", masked(made, "b", other))
    made.do(MASKED)
    made.do(CHECK)
    made.do(LAST)
    assert_close(made.server.finish(), made.plain(made.names))


def masked(made, name, body):
    return sign(made, name, MaskedInput(hashlib.sha256(body).digest()), body)


def test_who_was_gone_does_not_come_back():
    made = Federation(5).until(SECOND)
    made.do(SECOND, "b")
    body = bytes(made.layout.nbytes)
    with pytest.raises(InputError, match="^client b: has dropped out: it was not in time before"):
        made.server.receive("b", masked(made, "b", body))


def test_a_signature_over_other_survivors():
    made = Federation(5).until(CHECK, {"e": MASKED})
    message = sign(made, "b", ConsistencyCheck(("a", "b", "c")))
    with pytest.raises(InputError, match="^client b: signed the survivors a, b, c, expected a, b"):
        made.server.receive("b", message)


@pytest.mark.parametrize(
    ("part", "dealer", "kind"),
    [("mask_key_shares", "e", "mask key"), ("self_mask_shares", "a", "self mask")],
)
def test_a_share_that_is_not_one(part, dealer, kind):
    made = Federation(5).until(LAST, {"e": MASKED})
    good = decode(made.answer("b", LAST), Unmasking, made.terms, "b")
    wrong = {**getattr(good, part), dealer: new_seed()}
    text = f"^client b: its share of the {kind} of client {dealer} is not the one that {dealer} com"
    with pytest.raises(InputError, match=text):
        made.server.receive("b", sign(made, "b", dataclasses.replace(good, **{part: wrong})))
    made.do(LAST)  # b thinks better of it
    assert_close(made.server.finish(), made.plain("abcd"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mask_key_shares": {}}, "gives shares of the mask key of nobody, expected e"),
        ({"mask_key_shares": {"a": bytes(16)}}, "gives shares of the mask key of a, expected e"),
        ({"self_mask_shares": {"a": bytes(16)}}, "self mask of a, expected a, b, c, d"),
    ],
)
def test_shares_that_nobody_asked_for(changes, text):
    made = Federation(5).until(LAST, {"e": MASKED})
    good = decode(made.answer("b", LAST), Unmasking, made.terms, "b")
    with pytest.raises(InputError, match=f"^client b: .*{text}"):
        made.server.receive("b", sign(made, "b", dataclasses.replace(good, **changes)))


@pytest.mark.parametrize(("victim", "kind"), [("e", "mask key"), ("a", "self mask")])
def test_a_dealer_whose_shares_are_of_another_secret(monkeypatch, victim, kind):
    """Each share is what was committed to; together they are not what was advertised."""
    made = Federation(5).until(SECOND)
    client = made.clients[victim]
    secrets = client._memory.secrets
    field = "mask_key_seed" if kind == "mask key" else "self_mask_seed"
    with monkeypatch.context() as patch:
        other = dataclasses.replace(secrets, **{field: new_seed()})
        patch.setattr(type(client._memory), "secrets", property(lambda memory: other))
        made.server.receive(victim, client.share_keys(made.messages[victim]))
    for name in set(made.names) - {victim}:
        made.server.receive(name, made.answer(name, SECOND))
    made.messages = made.server.proceed()
    made.do(MASKED, "e")
    made.do(CHECK)
    made.do(LAST)
    text = f"^client {victim}: the shares that it dealt do not make the {kind} that it advertised"
    with pytest.raises(InputError, match=text):
        made.server.finish()
