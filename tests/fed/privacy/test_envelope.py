import dataclasses
import hashlib
import json
import mmap
import struct

import numpy as np
import pytest

from fed.privacy import envelope, messages
from fed.privacy.envelope import decode, encode, head_of
from fed.privacy.messages import AdvertiseKeys, MaskedInput, ShareKeys, Survivors, Unmasking
from llava.errors import InputError
from tests.fed.privacy.federation import Federation

FEDERATION = Federation(3)
TERMS, KEYS = FEDERATION.terms, FEDERATION.keys
ADVERTISED = AdvertiseKeys(b"c" * 32, b"s" * 32, b"b" * 32)


def sign(message, sender="a", terms=TERMS, key=None):
    return encode(message, terms, sender, key or KEYS[sender])


def rewrite(data, key=KEYS["a"], **changes):
    """A message with other fields, signed by `key`; None takes a field away."""
    text, _, body = envelope._parts(data, TERMS, "")
    fields = {**json.loads(text), **changes}
    return pack({n: v for n, v in fields.items() if v is not None}, key) + bytes(body)


def pack(header, key=KEYS["a"]):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + key.sign(b"fedllava secure sum message\0" + text)


def masked(values):
    values = np.asarray(values, "<u8")
    return sign(MaskedInput(hashlib.sha256(values.tobytes()).digest())) + values.tobytes()


EACH = [
    ADVERTISED,
    ShareKeys({"a": b"x" * 60}, {"a": b"y" * 32}, {"a": b"z" * 32}),
    messages.ConsistencyCheck(("a", "c")),
    Unmasking({"b": b"1" * 16}, {"a": b"2" * 16, "c": b"3" * 16}),
    messages.Roster({"a": b"any", "b": b""}),
    messages.Shares({"a": b"x" * 60}, {"a": b"y" * 32}, {"a": b"z" * 32}),
    Survivors(("a", "b")),
    messages.Confirmations({"c": b"\0\1"}),
]


@pytest.mark.parametrize("message", EACH, ids=lambda message: type(message).__name__)
def test_what_was_sent_comes(message):
    sender = "a" if message.of_client else ""
    data = encode(message, TERMS, sender, KEYS["a"] if sender else None)
    assert data == encode(message, TERMS, sender, KEYS["a"] if sender else None)
    assert decode(data, type(message), TERMS, sender) == message
    assert head_of(data) == data


def test_a_masked_input_stays_where_it_is():
    count = TERMS.layout.size
    data = bytearray(masked(np.arange(count)))
    found = decode(data, MaskedInput, TERMS, "a").values
    assert (found == np.arange(count)).all()
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))
    assert found.flags.aligned
    assert head_of(data) == data[: -8 * count]


def test_a_masked_input_may_be_a_mapped_file(tmp_path):
    count = TERMS.layout.size
    (tmp_path / "message").write_bytes(masked(np.arange(count)))
    with open(tmp_path / "message", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert (decode(mapped, MaskedInput, TERMS, "a").values == np.arange(count)).all()


def test_there_is_a_kind_of_message_for_each_field_of_the_paper():
    kinds = {m.__name__ for m in messages.Message.__subclasses__()} | {"Shares"}
    assert kinds == {type(m).__name__ for m in EACH} | {"MaskedInput"}


GOOD = sign(ADVERTISED)
LONG = pack(b" " * 40_000 + b"{}")
BAD = [
    (b"", "is cut short: it has 0 bytes"),
    (GOOD[:100], "is cut short: it has 100 bytes"),
    (GOOD[:-1], "is cut short"),
    (GOOD + b"x", "has 1 bytes after its end"),
    (b"\xff" * 200, "has a header of 18446744073709551615 bytes"),
    (LONG, "has a header of 40002 bytes, expected 35072 at most"),
    (GOOD[:30] + b"X" + GOOD[31:], "has a signature that is not a's"),
    (sign(ADVERTISED, "b"), "has a signature that is not a's"),
    (sign(ADVERTISED, "a", key=KEYS["b"]), "has a signature that is not a's"),
    (GOOD[:-64] + bytes(64), "has a signature that is not a's"),
    (sign(ADVERTISED, "b", key=KEYS["a"]), "has sender 'b', expected 'a'"),
    (sign(messages.ConsistencyCheck(("a",))), "has kind 'ConsistencyCheck', expected 'Advert"),
    (rewrite(GOOD, run="1" * 32), "has run '1111"),
    (rewrite(GOOD, round=2), "has round 2, expected 1"),
    (rewrite(GOOD, round=True), "has round True, expected 1"),
    (rewrite(GOOD, round=1.0), "has round 1.0, expected 1"),
    (rewrite(GOOD, exchange="y"), "has exchange 'y', expected 'sum'"),
    (rewrite(GOOD, attempt="1" * 32), "has attempt '1111"),
    (rewrite(GOOD, terms="1" * 64), "has terms '1111"),
    (rewrite(GOOD, round=None), "has round None, expected 1"),
    (rewrite(GOOD, mask_key=None), "has a bad mask_key, expected 64 hex digits"),
    (rewrite(GOOD, mask_key="00" * 31), "has a bad mask_key, expected 64 hex digits"),
    (rewrite(GOOD, mask_key="0G" * 32), "has a bad mask_key, expected 64 hex digits"),
    (rewrite(GOOD, mask_key="AA" * 32), "has a bad mask_key, expected 64 hex digits"),
    (rewrite(GOOD, mask_key=5), "has a bad mask_key"),
    (rewrite(GOOD, mask_key=["00" * 32]), "has a bad mask_key"),
    (rewrite(GOOD, more=5), "has a field 'more', which is not expected"),
    (pack(b"[]"), "a JSON object is expected, found a list"),
    (pack(b"{"), "not readable JSON"),
    (pack(b"\xff"), "not readable JSON"),
    (pack(b"[" * 9000), "not readable JSON"),
    (pack(b'{"round": NaN}'), "not readable JSON"),
    (pack(b'{"round": 1, "round": 1}'), "has a key twice"),
]


@pytest.mark.parametrize(("data", "text"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_what_is_no_message_of_this_client_and_attempt(data, text):
    with pytest.raises(InputError, match=f"^client a: its AdvertiseKeys message.* {text}"):
        decode(data, AdvertiseKeys, TERMS, "a")


SETS = [
    (["b", "a"], "clients in order, each once"),
    (["a", "a"], "clients in order, each once"),
    (["a", "z"], "clients of this sum, and not 'z'"),
    ([1], "a list of clients"),
    ("ab", "a list of clients"),
    ({"a": 1}, "a list of clients"),
]


@pytest.mark.parametrize(("value", "text"), SETS)
def test_bad_sets_of_clients(value, text):
    good = sign(messages.ConsistencyCheck(("a",)))
    with pytest.raises(InputError, match=f"has a bad survivors, expected {text}"):
        decode(rewrite(good, survivors=value), messages.ConsistencyCheck, TERMS, "a")


MAPS = [
    ([], "values by client"),
    ({"z": "00" * 16}, "clients of this sum, and not 'z'"),
    ({"a": "00" * 15}, "32 hex digits"),
    ({"a": None}, "32 hex digits"),
]


@pytest.mark.parametrize(("value", "text"), MAPS)
def test_bad_values_by_client(value, text):
    good = sign(Unmasking({}, {}))
    with pytest.raises(InputError, match=f"has a bad self_mask_shares, expected {text}"):
        decode(rewrite(good, self_mask_shares=value), Unmasking, TERMS, "a")


@pytest.mark.parametrize("value", ["?", 5, None, "AAA", "AA AA"])
def test_bad_base64(value):
    data = encode(messages.Roster({}), TERMS)
    text = json.loads(envelope._parts(data, TERMS, "")[0])
    with pytest.raises(InputError, match="^the server: its Roster message has a bad advertised"):
        decode(pack({**text, "advertised": {"a": value}}), messages.Roster, TERMS)


def test_bad_values_of_a_masked_input():
    count = TERMS.layout.size
    good = masked(np.arange(count))
    for data in (good[:-8], good[:-1], good + bytes(8)):
        with pytest.raises(InputError, match=f"has values of .* bytes, expected {8 * count}"):
            decode(data, MaskedInput, TERMS, "a")
    with pytest.raises(InputError, match="has values of another SHA-256 than its header says"):
        decode(good[:-1] + b"\1", MaskedInput, TERMS, "a")


def test_a_message_under_other_terms_is_refused():
    other = dataclasses.replace(TERMS, threshold=2, least=2)
    with pytest.raises(InputError, match="client a: its AdvertiseKeys message has terms"):
        decode(sign(ADVERTISED, terms=other), AdvertiseKeys, TERMS, "a")


def test_the_longest_messages_of_many_clients_are_allowed():
    names = [f"{'x' * 120}{i:08d}" for i in range(40)]
    terms = dataclasses.replace(
        TERMS,
        sites={name: i.to_bytes(32, "little") for i, name in enumerate(names)},
        layout=dataclasses.replace(TERMS.layout, clients=40),
        threshold=30,
    )
    confirmed = encode(messages.ConsistencyCheck(tuple(names)), terms, names[0], KEYS["a"])
    message = messages.Confirmations(dict.fromkeys(names, confirmed))
    assert decode(encode(message, terms), messages.Confirmations, terms) == message
    advertised = encode(ADVERTISED, terms, names[0], KEYS["a"])
    message = messages.Roster(dict.fromkeys(names, advertised))
    assert decode(encode(message, terms), messages.Roster, terms) == message
    shares = [dict.fromkeys(names, b"x" * size) for size in (60, 32, 32)]
    message = messages.Shares(*shares)
    assert decode(encode(message, terms), messages.Shares, terms) == message
