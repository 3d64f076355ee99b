"""Clients and a server of a secure sum, side by side, whose messages a test may see and change."""

from __future__ import annotations

import numpy as np
import torch

from fed.privacy.client import Client
from fed.privacy.client_memory import STEPS
from fed.privacy.envelope import encode
from fed.privacy.keys import Ed25519PrivateKey
from fed.privacy.layout import Layout
from fed.privacy.server import Server
from fed.privacy.terms import Terms

RUN = "0" * 32
LIKE = {"w": torch.zeros(3, 5), "b": torch.zeros(4)}


def draw(seed, like=LIKE):
    source = torch.Generator().manual_seed(seed)
    return {name: torch.rand(t.shape, generator=source) * 2 - 1 for name, t in like.items()}


class Federation:
    """`count` clients a, b, …; `attempt` begins another attempt with new state machines."""

    def __init__(self, count=4, like=LIKE, folder=None, heaviest=1000, bits=64, **terms):
        self.names = [chr(ord("a") + i) for i in range(count)]
        self.keys = {name: Ed25519PrivateKey.generate() for name in self.names}
        self.sites = {n: key.public_key().public_bytes_raw() for n, key in self.keys.items()}
        self.layout = Layout.of(like, 1.0, count, heaviest, bits)
        self.tensors = {name: draw(i, like) for i, name in enumerate(self.names)}
        self.weights = {name: 10.0 * (i + 1) for i, name in enumerate(self.names)}
        self.folder = folder
        self.attempt(**terms)

    def attempt(self, round=1, exchange="sum", **terms):
        self.terms = Terms.new(RUN, round, exchange, self.sites, self.layout, **terms)
        self.server = Server(self.terms)
        self.clients = {name: self.client(name) for name in self.names}
        self.messages = dict.fromkeys(self.names, b"")  # of the server, for the step to come
        return self

    def client(self, name, **given):
        file = self.folder / f"{name}.json" if self.folder else None
        usual = {
            "terms": self.terms,
            "key": self.keys[name],
            "trusted": self.sites,
            "least": self.terms.least,
            "threshold": self.terms.threshold,
            "file": file,
        }
        return Client(name=name, **{**usual, **given})

    def answer(self, name, step):
        """A client's answer to what the server has sent it."""
        client, message = self.clients[name], self.messages[name]
        if step == "AdvertiseKeys":
            return client.advertise()
        if step == "ShareKeys":
            return client.share_keys(message)
        if step == "MaskedInputCollection":
            return client.mask(message, self.tensors[name], self.weights[name])
        if step == "ConsistencyCheck":
            return client.confirm(message)
        return client.unmask(message)

    def do(self, step, without=()):
        """One step, without clients that are gone before it."""
        for name in without:
            self.messages.pop(name, None)
        for name in self.messages:
            self.server.receive(name, self.answer(name, step))
        if step != STEPS[-1]:
            self.messages = self.server.proceed()

    def until(self, step, gone=()):
        """All steps before `step`; `gone` are clients with the step before which they are gone."""
        gone = dict(gone)
        for each in STEPS[: STEPS.index(step)]:
            self.do(each, [name for name, last in gone.items() if last == each])
        return self

    def run(self, gone=()):
        gone = dict(gone)
        self.until(STEPS[-1], gone)
        self.do(STEPS[-1], [name for name, last in gone.items() if last == STEPS[-1]])
        return self.server.finish()

    def plain(self, names):
        """sum_k weight_k x_k in float64, and sum_k weight_k."""
        sums = {
            key: sum(self.weights[n] * self.tensors[n][key].double() for n in names)
            for key in self.tensors[names[0]]
        }
        return sums, sum(self.weights[n] for n in names)

    def ring(self, names):
        """The sum of the encoded vectors, in the ring."""
        total = np.zeros(self.layout.size, self.layout.dtype)
        for name in names:
            for where, chunk in self.layout.encode(self.tensors[name], self.weights[name], name):
                total[where] += chunk
        return total


def assert_close(total, plain):
    """Within 1e-6 of the largest magnitude of each tensor; the weight exactly."""
    sums, weight = plain
    assert total.weight == weight
    for name, tensor in sums.items():
        scale = tensor.abs().max()
        assert (total.sums[name].double() - tensor).abs().max() <= 1e-6 * scale


def sign(made, name, message, body=b""):
    """A message as `name` would send it."""
    return encode(message, made.terms, name, made.keys[name]) + bytes(body)
