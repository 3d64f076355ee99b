"""A round of secure sums beside the open one: what it costs each client and the server.

    python scripts/benchmark/secure_round.py                        # LLaVA-1.5-7B's projector
    python scripts/benchmark/secure_round.py --methods fedavg --clients 4 --hidden 256

Eight clients with drawn updates; the two sides of the round run as they do at sites and server,
files included, in one process of one thread. Seconds are of the processor. `error` is the length of
the difference of both rounds' steps, relative to the step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fed import methods  # noqa: E402
from fed.clients.sum_client import Agreed, SumClient  # noqa: E402
from fed.markdown import markdown_table  # noqa: E402
from fed.methods.interface.sums import Own, Round  # noqa: E402
from fed.privacy.keys import Ed25519PrivateKey  # noqa: E402
from fed.server.secure_sums import SecureSums  # noqa: E402

AGREED = Agreed("0" * 32, 1, weight=1000.0, norm=1000.0)
OPTIONS = {"fedcmp": {"reliability": "none"}}


def measure(name: str, base: dict, states: list[dict], folder: Path) -> list[str]:
    """A row of the table."""
    options, count = OPTIONS.get(name, {}), len(states)
    weights = [300.0 + k for k in range(count)]
    sums = methods.get(name).summed(options)
    keys = {f"site-{k}": Ed25519PrivateKey.generate() for k in range(count)}
    sites = {n: key.public_key().public_bytes_raw() for n, key in keys.items()}
    spent: dict[int, float] = defaultdict(float)
    sent: dict[int, int] = defaultdict(int)

    def ask(requests):
        for site, request in requests.items():
            k, began = list(keys).index(site), time.process_time()
            own = Own(states[k], base, weights[k])
            client = SumClient(site, keys[site], sites, folder / site, sums, own, AGREED)
            answer = client.answer(request)
            spent[request.exchange] += (time.process_time() - began) / count
            sent[request.exchange] += len(answer)
            yield site, answer

    began = time.process_time()
    secure = SecureSums(folder / "round", AGREED, sites, ask)
    found = secure.outcome(sums, Round(base, {}, count, count))
    server = time.process_time() - began - count * sum(spent.values())
    began = time.process_time()
    plain = methods.get(name)(states, weights=weights, base=base, **options)
    whole = time.process_time() - began
    error = max(
        float((found.state[n] - t).norm() / (t - base[n]).norm()) for n, t in plain.state.items()
    )
    values = sum(t.numel() for t in base.values())
    return [
        name,
        ", ".join(f"{seconds:.2f}" for seconds in spent.values()),
        f"{sum(sent.values()) / count / (4 * values):.2f}",
        f"{server:.1f}",
        f"{whole:.1f}",
        f"{error:.0e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fedcmp"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096, help="width of the language model")
    parser.add_argument("--features", type=int, default=1024, help="width of the tower")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    widths = [args.features, args.hidden, args.hidden]
    shapes = {}
    for layer, (inside, out) in zip((0, 2), zip(widths, widths[1:], strict=False), strict=True):
        shapes |= {f"{layer}.weight": (out, inside), f"{layer}.bias": (out,)}
    base = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    states = [
        {name: t + 1e-3 * torch.randn(t.shape) for name, t in base.items()}
        for _ in range(args.clients)
    ]
    rows = []
    for name in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, base, states, Path(folder)))
    head = ["method", "client, s an exchange", "bytes, × float32", "server, s", "open, s", "error"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
