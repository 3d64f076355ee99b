"""The client: what it refuses to a server, and to other clients, that lie."""

import dataclasses

import pytest

from fed.privacy.client import Client
from fed.privacy.client_memory import STEPS
from fed.privacy.envelope import decode, encode
from fed.privacy.keys import Ed25519PrivateKey, new_seed
from fed.privacy.messages import (
    AdvertiseKeys,
    Confirmations,
    ConsistencyCheck,
    Roster,
    ShareKeys,
    Shares,
    Survivors,
    Unmasking,
)
from llava.errors import InputError
from tests.fed.privacy.federation import Federation, assert_close, draw, sign

FIRST, SECOND, MASKED, CHECK, LAST = STEPS


def changed(made, name, kind, **changes):
    """The server's message to `name`, with other fields."""
    message = decode(made.messages[name], kind, made.terms)
    return encode(dataclasses.replace(message, **changes), made.terms)


# Terms


def test_only_sites_that_are_trusted():
    made = Federation(4)
    other = Ed25519PrivateKey.generate()
    trusted = {**made.sites, "c": other.public_key().public_bytes_raw()}
    with pytest.raises(InputError, match="^client a: does not trust the key that .* have for c"):
        made.client("a", trusted=trusted)
    with pytest.raises(InputError, match="^client a: does not trust the key that .* have for b"):
        made.client("a", trusted={})
    with pytest.raises(InputError, match="^client a: the terms .* have another key for it"):
        made.client("a", key=other)


def test_a_site_has_a_least_of_its_own():
    made = Federation(4, least=2)
    with pytest.raises(InputError, match="^client a: the run asks for sums of 2 .* 3 or more"):
        Client(made.terms, "a", made.keys["a"], made.sites)
    made.client("a", least=2)


def test_a_site_has_a_lowest_threshold():
    made = Federation(8, threshold=5)
    with pytest.raises(
        InputError, match="^client a: the run's threshold is 5 of 8, .* with 6 or m"
    ):
        made.client("a", threshold=None)
    with pytest.raises(
        InputError, match="^client a: the run's threshold is 5 of 8, .* with 7 or m"
    ):
        made.client("a", threshold=7)
    made.client("a", threshold=5)


# Round 0


def test_a_roster_below_the_threshold():
    made = Federation(5).until(SECOND)
    roster = decode(made.messages["a"], Roster, made.terms).advertised
    for names, text in (
        ("abc", "4 clients with keys are needed, there are 3"),
        ("bcde", "without"),
    ):
        few = changed(made, "a", Roster, advertised={n: roster[n] for n in names})
        with pytest.raises(InputError, match=f"^client a: .*{text}"):
            made.clients["a"].share_keys(few)


def test_keys_that_their_owner_has_not_signed():
    made = Federation(4).until(SECOND)
    roster = decode(made.messages["a"], Roster, made.terms).advertised
    keys = AdvertiseKeys(bytes(32), b"s" * 32, b"b" * 32)
    for message, text in (
        (signed_by(made, "a", "b", keys), "has a signature that is not b's"),
        (signed_by(made, "b", "a", keys), "has sender 'a', expected 'b'"),
        (roster["c"], "has a signature that is not b's"),
        (b"", "is cut short"),
    ):
        wrong = changed(made, "a", Roster, advertised={**roster, "b": message})
        with pytest.raises(InputError, match=f"^client b: its AdvertiseKeys message.* {text}"):
            made.clients["a"].share_keys(wrong)


def signed_by(made, signer, sender, message):
    """A message in the name of `sender`."""
    return encode(message, made.terms, sender, made.keys[signer])


def test_keys_of_another_attempt():
    made = Federation(4).until(SECOND)
    old = decode(made.messages["b"], Roster, made.terms).advertised["b"]
    made.attempt().until(SECOND)
    roster = decode(made.messages["a"], Roster, made.terms).advertised
    wrong = changed(made, "a", Roster, advertised={**roster, "b": old})
    with pytest.raises(InputError, match="^client b: its AdvertiseKeys message has attempt"):
        made.clients["a"].share_keys(wrong)


def test_two_clients_with_one_key():
    made = Federation(4).until(SECOND)
    roster = decode(made.messages["a"], Roster, made.terms).advertised
    keys = decode(roster["b"], AdvertiseKeys, made.terms, "b")
    wrong = changed(made, "a", Roster, advertised={**roster, "c": sign(made, "c", keys)})
    with pytest.raises(InputError, match="^client c: its key is one of client b, too"):
        made.clients["a"].share_keys(wrong)
    small = dataclasses.replace(keys, channel_key=bytes(32))
    wrong = changed(made, "a", Roster, advertised={**roster, "b": sign(made, "b", small)})
    with pytest.raises(InputError, match="^client b: the public key that it advertised is not one"):
        made.clients["a"].share_keys(wrong)


# Round 1


def parts(made, name):
    found = decode(made.messages[name], Shares, made.terms)
    return {f.name: dict(getattr(found, f.name)) for f in dataclasses.fields(found)}


def test_too_few_shares():
    made = Federation(5).until(MASKED)
    for names, text in (
        ("abc", "4 clients with shares are needed, there are 3"),
        ("bcde", "clients with shares are without"),
    ):
        few = {part: {n: values[n] for n in names} for part, values in parts(made, "a").items()}
        with pytest.raises(InputError, match=f"^client a: .*{text}"):
            made.clients["a"].mask(encode(Shares(**few), made.terms), made.tensors["a"])
    uneven = parts(made, "a")
    uneven["sealed"].pop("b")
    with pytest.raises(InputError, match="^client a: the server's shares and commitments do not"):
        made.clients["a"].mask(encode(Shares(**uneven), made.terms), made.tensors["a"])


@pytest.mark.parametrize("part", ["sealed", "mask_key_commitments", "self_mask_commitments"])
def test_sealed_shares_that_were_changed_swapped_or_replayed(part):
    made = Federation(4).until(MASKED)
    old = parts(made, "a")
    made.attempt().until(MASKED)
    good, of_c = parts(made, "a"), parts(made, "c")
    flipped = good[part]["b"][:-1] + bytes([good[part]["b"][-1] ^ 1])
    for wrong in (flipped, good[part]["c"], of_c[part]["b"], old[part]["b"]):
        message = encode(Shares(**{**good, part: {**good[part], "b": wrong}}), made.terms)
        with pytest.raises(InputError, match="^client b: what it sealed for client a does not op"):
            made.clients["a"].mask(message, made.tensors["a"])


def test_shares_that_are_not_those_that_were_committed_to(monkeypatch):
    """A dealer that would have its holder blamed at the end is named before anything is masked."""
    made = Federation(4).until(SECOND)
    with monkeypatch.context() as patch:
        patch.setattr("fed.privacy.derived_keys.commit", lambda label, value: new_seed() * 2)
        dealt = made.answer("b", SECOND)
    for name in "acd":
        made.server.receive(name, made.answer(name, SECOND))
    made.server.receive("b", dealt)
    made.messages = made.server.proceed()
    text = "^client b: the shares that it dealt to client a are not those that it committed to"
    with pytest.raises(InputError, match=text):
        made.answer("a", MASKED)


# Round 2


def test_values_that_cannot_be_summed_are_named_and_nothing_is_masked():
    made = Federation(4).until(MASKED)
    good = made.tensors["a"]
    made.tensors["a"] = {**good, "w": good["w"] * 1e6}
    with pytest.raises(InputError, match="^client a: tensor w has values beyond 1, the bound"):
        made.answer("a", MASKED)
    made.tensors["a"] = good  # nothing was sent: these are the first
    made.do(MASKED)


def test_survivors():
    made = Federation(6, threshold=4).until(CHECK, {"f": SECOND, "e": MASKED})
    for names, text in (
        ("abc", "4 survivors are needed, there are 3"),
        ("bcde", "survivors are without this client"),
        ("abcf", "client f survives, and had dealt no shares"),
    ):
        with pytest.raises(InputError, match=f"^client a: .*{text}"):
            made.clients["a"].confirm(encode(Survivors(tuple(names)), made.terms))
    made.do(CHECK)


# Rounds 3 and 4


def test_a_server_that_tells_clients_different_survivors():
    made = Federation(6, threshold=4).until(CHECK)
    told = {name: "abcdef" if name in "abcd" else "bcdef" for name in "abcdef"}
    told["a"] = "abcde"
    signed = {
        name: made.clients[name].confirm(encode(Survivors(tuple(told[name])), made.terms))
        for name in "abcdef"
    }
    message = encode(Confirmations(signed), made.terms)
    text = "^client b: client a signed the survivors a, b, c, d, e, expected a, b, c, d, e, f: the"
    with pytest.raises(InputError, match=text):
        made.clients["b"].unmask(message)
    same = {name: signed[name] for name in "bcd"}  # it keeps the others' signatures to itself
    with pytest.raises(InputError, match="^client b: 4 signed survivors are needed, there are 3"):
        made.clients["b"].unmask(encode(Confirmations(same), made.terms))


def test_signatures_that_are_not_the_clients():
    made = Federation(4).until(LAST)
    signed = decode(made.messages["a"], Confirmations, made.terms).confirmed
    there = ConsistencyCheck(tuple("abcd"))
    for message in (signed["c"], signed_by(made, "c", "b", there)):
        wrong = changed(made, "a", Confirmations, confirmed={**signed, "b": message})
        with pytest.raises(InputError, match="^client b: its ConsistencyCheck message has a sig"):
            made.clients["a"].unmask(wrong)
    old = signed["b"]
    made.attempt().until(LAST)
    signed = decode(made.messages["a"], Confirmations, made.terms).confirmed
    wrong = changed(made, "a", Confirmations, confirmed={**signed, "b": old})
    with pytest.raises(InputError, match="^client b: its ConsistencyCheck message has attempt"):
        made.clients["a"].unmask(wrong)


def test_a_server_that_asks_for_both_shares():
    """First as if e had survived, then as if it had not: neither step is done a second time."""
    made = Federation(5).until(CHECK)
    others = encode(Survivors(tuple("abcd")), made.terms)
    made.do(CHECK)
    with pytest.raises(InputError, match="^client a: the server sends a second message for Consis"):
        made.clients["a"].confirm(others)
    signed = {name: sign(made, name, ConsistencyCheck(tuple("abcd"))) for name in "bcd"}
    own = decode(made.messages["a"], Confirmations, made.terms).confirmed["a"]
    both = encode(Confirmations({"a": own, **signed}), made.terms)
    text = "^client a: client b signed the survivors a, b, c, d, expected a, b, c, d, e"
    with pytest.raises(InputError, match=text):
        made.clients["a"].unmask(both)
    answer = made.answer("a", LAST)
    with pytest.raises(InputError, match="^client a: the server sends a second message for Unmask"):
        made.clients["a"].unmask(both)
    shares = decode(answer, Unmasking, made.terms, "a")
    assert "".join(shares.self_mask_shares) == "abcde"
    assert shares.mask_key_shares == {}


def test_never_both_shares_of_one_client():
    made = Federation(8, threshold=5).until(LAST, {"g": SECOND, "h": MASKED, "c": CHECK})
    for name in "abdef":
        shares = decode(made.answer(name, LAST), Unmasking, made.terms, name)
        assert "".join(shares.self_mask_shares) == "abcdef"  # c's masked input came
        assert "".join(shares.mask_key_shares) == "h"  # g dealt nothing


def test_steps_are_done_in_order():
    made = Federation(4)
    a = made.clients["a"]
    with pytest.raises(InputError, match="^client a: it is not the turn of ShareKeys; done: nothi"):
        a.share_keys(b"x")
    a.advertise()
    with pytest.raises(InputError, match="not the turn of MaskedInputCollection; done: AdvertiseK"):
        a.mask(b"x", {})
    with pytest.raises(InputError, match="not the turn of Unmasking"):
        a.unmask(b"x")


@pytest.mark.parametrize("data", [b"", b"x" * 100, bytes(100), None])
def test_what_is_no_message_of_a_server(data):
    made = Federation(4).until(SECOND)
    own = made.answer("a", SECOND) if data is None else data
    with pytest.raises(InputError, match="^(the server: its|client a: the server sends)"):
        made.clients["a"].share_keys(own)


def test_the_same_message_gets_the_same_answer_and_another_none():
    made = Federation(4)
    for step in STEPS:
        answers = {name: made.answer(name, step) for name in made.names}
        assert answers == {name: made.answer(name, step) for name in made.names}
        if step not in (FIRST, LAST):
            message, made.messages["a"] = made.messages["a"], made.messages["a"] + b" "
            with pytest.raises(InputError, match=f"^client a: .* a second message for {step}, oth"):
                made.answer("a", step)
            made.messages["a"] = message
        made.do(step)
    assert_close(made.server.finish(), made.plain(made.names))


def test_masks_serve_one_input():
    made = Federation(4).until(MASKED)
    first, text = made.answer("a", MASKED), "^client a: a second, different input in the same att"
    made.weights["a"] += 1
    with pytest.raises(InputError, match=text):
        made.answer("a", MASKED)
    made.weights["a"] -= 1
    made.tensors["a"]["b"][0] += 1e-3
    with pytest.raises(InputError, match=text):
        made.answer("a", MASKED)
    made.tensors["a"]["b"][0] = draw(0)["b"][0]
    assert made.answer("a", MASKED) == first


def test_dealt_shares_are_for_each_of_those_that_advertised():
    made = Federation(5)
    made.do(FIRST, "e")
    message = decode(made.answer("a", SECOND), ShareKeys, made.terms, "a")
    assert "".join(message.sealed) == "abcd"
    assert (
        len({*message.mask_key_commitments.values(), *message.self_mask_commitments.values()}) == 8
    )
