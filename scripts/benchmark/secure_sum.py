"""The cost and the accuracy of secure sums: ciphers, rings, a client's part, the server's part.

    python scripts/benchmark/secure_sum.py                          # LLaVA-1.5-7B's projector
    python scripts/benchmark/secure_sum.py --values 100000 --clients 4 8

One core; seconds are of the processor (`time.process_time`), so that other work on the machine
counts less. The protocol runs as it is, with its state machines and messages; only the sites'
training is missing: values are drawn. A quarter of the clients send no masked input and are gone.

`error` is that of the decoded sum against the plain sum in float64, relative to the largest
magnitude of that sum. Values fill 1/100 of their bound, weights are samples of at most 10**6.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fed.privacy.client import Client  # noqa: E402
from fed.privacy.keys import Ed25519PrivateKey, keystream  # noqa: E402
from fed.privacy.layout import CHUNK, Layout  # noqa: E402
from fed.privacy.secret_shares import combine, split  # noqa: E402
from fed.privacy.server import Server  # noqa: E402
from fed.privacy.terms import Terms  # noqa: E402

BOUND = 100.0
HEAVIEST = 1e6


class Clock:
    """Seconds of the processor, by what they were used for."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds.setdefault(what, []).append(time.process_time() - began)

    def median(self, what: str) -> float:
        return float(np.median(self.seconds.get(what, [0.0])))

    def total(self, what: str) -> float:
        return sum(self.seconds.get(what, []))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The bytes by which this process's memory rises above what it is at the beginning."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before, found = _memory("VmRSS"), [0]
    yield found
    found[0] = _memory("VmHWM") - before


def _memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def ciphers() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    made = {
        "AES-256-CTR": lambda key: keystream(key),
        "ChaCha20": lambda key: Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor(),
    }
    print("| keystream | GB/s |\n|---|---:|")
    zeros, out = bytes(8 * CHUNK), bytearray(8 * CHUNK)
    for name, make in made.items():
        seconds = []
        for _ in range(5):
            stream, began = make(os.urandom(32)), time.process_time()
            for _ in range(400):
                stream.update_into(zeros, out)
            seconds.append(time.process_time() - began)
        print(f"| {name} | {400 * len(zeros) / min(seconds) / 1e9:.2f} |", flush=True)


def draw(client: int, values: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(values, generator=torch.Generator().manual_seed(client)).clamp_(-5, 5)}


def weight_of(client: int) -> int:
    return 200 + 100 * client


def rings(values: int, clients: int) -> None:
    """Encoding and decoding alone, without masks."""
    sums, most = plain_sum(range(clients), values)
    print(f"\n{clients} clients; weights 200 to {weight_of(clients - 1)}\n")
    print("| bits | bound | heaviest | bytes, × float32 | encoding, s | adding, s | error |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for bits in (32, 64):
        for bound, heaviest in ((5.0, weight_of(clients - 1)), (BOUND, HEAVIEST)):
            layout = Layout.of(draw(0, values), bound, clients, heaviest, bits)
            total, clock = np.zeros(layout.size, layout.dtype), Clock()
            encoded = np.empty(layout.size, layout.dtype)
            for client in range(clients):
                tensors = draw(client, values)
                with clock.of("encode"):
                    for where, chunk in layout.encode(tensors, weight_of(client), "a client"):
                        encoded[where] = chunk
                with clock.of("add"):
                    total += encoded
            found, _ = layout.decode(total)
            error = (found["x"].double() - sums).abs().max().item() / most
            print(
                f"| {bits} | {bound:g} | {heaviest:g} | {layout.nbytes / (4 * values):.2f} | "
                f"{clock.median('encode'):.2f} | {clock.median('add'):.2f} | {error:.1e} |",
                flush=True,
            )


def plain_sum(clients: range | list[int], values: int) -> tuple[torch.Tensor, float]:
    sums = torch.zeros(values, dtype=torch.float64)
    for client in clients:
        sums += weight_of(client) * draw(client, values)["x"].double()
    return sums, sums.abs().max().item()


def protocol(values: int, count: int, bits: int) -> dict[str, float]:
    """A sum of `count` clients of whom a quarter drop out after they have shared their keys."""
    names = [f"site-{i:03d}" for i in range(count)]
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    sites = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    layout = Layout.of(draw(0, values), BOUND, count, HEAVIEST, bits)
    terms = Terms.new("0" * 32, 1, "sum", sites, layout)
    server, clock = Server(terms), Clock()
    clients = {name: Client(terms, name, keys[name], sites) for name in names}
    there, grown = names[: count - count // 4], 0
    for name in names:
        with clock.of("small"):
            answer = clients[name].advertise()
        server.receive(name, answer)
    messages = server.proceed()
    for name in names:
        with clock.of("small"):
            answer = clients[name].share_keys(messages[name])
        server.receive(name, answer)
    messages = server.proceed()
    for name in there:
        tensors, weight = draw(names.index(name), values), weight_of(names.index(name))
        with peak() as found, clock.of("mask"):
            answer = clients[name].mask(messages[name], tensors, weight)
        grown = max(grown, found[0])
        with clock.of("receive"):
            server.receive(name, answer)
    messages = server.proceed()
    for name in there:
        server.receive(name, clients[name].confirm(messages[name]))
    messages = server.proceed()
    for name in there:
        with clock.of("shares"):
            server.receive(name, clients[name].unmask(messages[name]))
    with clock.of("unmask"):
        total = server.finish()
    sums, most = plain_sum([names.index(name) for name in there], values)
    return {
        "mask": clock.median("mask"),
        "small": 2 * clock.median("small"),
        "grown": grown / layout.nbytes,
        "receive": clock.median("receive"),
        "unmask": clock.total("unmask"),
        "combine": combining(terms, count),
        "streams": len(there) * (1 + count - len(there)),
        "error": (total.sums["x"].double() - sums).abs().max().item() / most,
    }


def combining(terms: Terms, count: int) -> float:
    """Seconds in which `count` secrets are made of their shares, which `unmask` has in it."""
    shares = split(bytes(16), terms)
    began = time.process_time()
    for _ in range(count):
        combine(shares, terms)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--values", type=int, default=20_979_712)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--bits", type=int, nargs="+", default=[64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = platform.processor() or platform.machine()
    print(f"{args.values:,} values a client; {where}, one core\n")
    ciphers()
    rings(args.values, args.clients[0])
    print(
        "\n| clients | gone | bits | client: keys, s | masking, s | memory, × its message "
        "| server: a masked input, s | unmasking, s | of it, shares | masks | error |"
    )
    print("|" + "---:|" * 11)
    for count in args.clients:
        for bits in args.bits:
            found = protocol(args.values, count, bits)
            print(
                f"| {count} | {count // 4} | {bits} | {found['small']:.3f} | {found['mask']:.2f} "
                f"| {found['grown']:.2f} | {found['receive']:.2f} | {found['unmask']:.1f} "
                f"| {found['combine']:.2f} | {found['streams']} | {found['error']:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
