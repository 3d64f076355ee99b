import dataclasses
import json

import pytest

from fed.privacy.terms import Terms
from llava.errors import InputError
from tests.fed.privacy.federation import RUN, Federation

FEDERATION = Federation(8)
GOOD = FEDERATION.terms


def test_they_are_the_same_on_both_sides():
    found = Terms.from_bytes(GOOD.to_bytes())
    assert found == GOOD
    assert found.digest == GOOD.digest
    assert found.names == tuple("abcdefgh")
    assert found.threshold == 6  # of 8: two may be gone
    assert found.needed == 6


@pytest.mark.parametrize(("count", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (32, 22)])
def test_the_threshold_is_above_two_thirds(count, threshold):
    sites = {f"s{i}": bytes([i]) * 32 for i in range(count)}
    layout = dataclasses.replace(FEDERATION.layout, clients=count)
    assert Terms.new(RUN, 1, "sum", sites, layout).threshold == threshold


def test_each_attempt_is_new_and_each_label_another():
    one, two = (Terms.new(RUN, 1, "sum", GOOD.sites, GOOD.layout) for _ in range(2))
    assert one.attempt != two.attempt
    labels = [terms.label(*words) for terms in (one, two) for words in
              (("mask key", "a"), ("mask key", "b"), ("self mask", "a"), ("mask key", "a", "b"),
               ("mask key", "a b"), ("mask key",))]  # fmt: skip
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    "changes", [{"round": 2}, {"exchange": "other"}, {"threshold": 7}, {"least": 4},
                {"run": "1" * 32}, {"layout": dataclasses.replace(GOOD.layout, heaviest=7.0)}]
)  # fmt: skip
def test_the_digest_covers_all_of_it(changes):
    assert dataclasses.replace(GOOD, **changes).digest != GOOD.digest


BAD = [
    ({"run": "x"}, "run is 'x'"),
    ({"run": 3}, "run is 3"),
    ({"round": -1}, "round is -1"),
    ({"round": True}, "round is True"),
    ({"round": 1.0}, "round is 1.0"),
    ({"exchange": "../x"}, "exchange is '../x'"),
    ({"attempt": "0" * 31}, "attempt is '000"),
    ({"threshold": 4}, "the threshold is 4, expected 5 to 8"),
    ({"threshold": 9}, "the threshold is 9, expected 5 to 8"),
    ({"least": 1}, "the least is 1, expected 2 to 8"),
    ({"least": 9}, "the least is 9, expected 2 to 8"),
    ({"sites": {**GOOD.sites, "i": bytes(32)}}, "the layout is for 8 clients, there are 9"),
    ({"sites": {**GOOD.sites, "h": bytes(31)}}, "site 'h'"),
    ({"sites": {**GOOD.sites, "h/": bytes(32)}}, "site 'h/'"),
    ({"sites": {**GOOD.sites, "h": GOOD.sites["a"]}}, "two sites have the same public key"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[text for _, text in BAD])
def test_bad_terms(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(GOOD, **changes)


def changed(**changes):
    return json.dumps({**json.loads(GOOD.to_bytes()), **changes}, sort_keys=True).encode()


LAYOUT = json.loads(GOOD.to_bytes())["layout"]
BAD_BYTES = [
    (b"", "not readable JSON"),
    (b"[]", "a JSON object is expected, found a list"),
    (b"[" * 10**5, "not readable JSON"),
    (b'{"run": 1, "run": 2}', "a key twice"),
    (b" " * (2**22 + 1), "has 4194305 bytes"),
    (GOOD.to_bytes() + b" ", "not in the one form"),
    (changed(protocol=99), "of version 99, this site's of 1: install"),
    (changed(more=1), "not well formed"),
    (changed(sites=[]), "not well formed"),
    (changed(sites={"a": 3}), "not well formed"),
    (changed(sites={"a": "zz"}), "not well formed"),
    (changed(layout=None), "not well formed"),
    (changed(layout={**LAYOUT, "slots": [{"name": "w"}]}), "not well formed"),
    (changed(layout={**LAYOUT, "slots": [{"name": "w", "shape": ["2"], "bound": 1.0}]}), "shape"),
    (changed(layout={**LAYOUT, "slots": [{"name": "w", "shape": [-2], "bound": 1.0}]}), "shape"),
    (
        changed(layout={**LAYOUT, "slots": [{"name": 5, "shape": [2], "bound": 1.0}]}),
        "a tensor is called 5",
    ),
    (changed(layout={**LAYOUT, "bits": "64"}), "has '64' bits"),
    (changed(layout={**LAYOUT, "bits": []}), "not well formed"),
    (changed(layout={**LAYOUT, "heaviest": "1"}), "not well formed"),
    (changed(layout={**LAYOUT, "clients": 8.5}), "for 8.5 clients"),
]


@pytest.mark.parametrize(("data", "message"), BAD_BYTES, ids=[text for _, text in BAD_BYTES])
def test_what_a_server_may_send_and_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        Terms.from_bytes(data)
