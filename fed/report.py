"""Results of federated runs side by side: a table and two pictures.

    python -m fed.report --runs "FedAvg=runs/fedavg" "Fed-CMP=runs/fedcmp" --output runs/report

Writes report.json, report.md, loss.png (held-out loss over rounds) and cosines.png (how much the
clients' updates agree), and prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fed.markdown import markdown_table
from llava.atomic import atomic_write, write_text
from llava.errors import InputError, one_clear_error
from llava.flags import FlagParser, pairs
from llava.train.private_statement import guarantees_in, section

# Colours that people with a colour-vision deficiency can tell apart (Okabe and Ito).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


MOST_CLIENTS = 12  # in a table; those with the lowest shares

COLUMNS = {
    "loss": "loss",
    "exact": "exact",
    "explained": "explained",
    "first": "first",
    "among_five": "first five",
}


@dataclass
class RunRecords:
    """A run's name for people, its rounds.jsonl, and what it promises of a record, by client."""

    name: str
    records: list[dict]
    private: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, folder: str | Path) -> RunRecords:
        file = Path(folder) / "rounds.jsonl"
        try:
            records = [json.loads(line) for line in file.read_text().splitlines()]
        except OSError:
            raise InputError(f"{file}: no such file; {folder} is not a finished run") from None
        except ValueError as error:
            raise InputError(f"{file}: not one JSON object a line ({error})") from None
        if not records:
            raise InputError(f"{file}: no round is finished")
        return cls(name, records, guarantees_in(Path(folder)))

    @property
    def final(self) -> dict[str, dict]:
        """The last measures: model → evaluation set → measures."""
        measured = [record["heldout"] for record in self.records if record["heldout"]]
        return measured[-1] if measured else {}


def rows_of(runs: Sequence[RunRecords]) -> list[dict]:
    """One row a model: a run's shared model, or each client's where a method keeps them apart.

    A row has `model`, `run`, `personal`, and by evaluation set the `measures`.
    """
    rows = []
    for run in runs:
        for model, sets in run.final.items():
            name = run.name if model == "global" else f"{model}, {run.name}"
            personal = model != "global"
            row = {"model": name, "run": run.name, "personal": personal, "measures": sets}
            rows.append(row)
    return rows


def table(rows: Sequence[dict], sets: Sequence[str]) -> str:
    """The measures per evaluation set, then loss and exact per domain of the first; Markdown."""
    if not rows:
        return "No run was measured on held-out data.\n"
    shown = [(name, what) for name in sets for what in COLUMNS if _measured(rows, name, what)]
    head = ["model", *(f"{name}: {COLUMNS[what]}" for name, what in shown)]
    body = [
        [row["model"], *(_cell(row["measures"].get(name), what) for name, what in shown)]
        for row in rows
    ]
    parts = [markdown_table(head, body)]
    domains = sorted({d for row in rows for d in _domains(row, sets[0])})
    for what, title in (("exact", "Exact names"), ("loss", "Caption loss")):
        if domains:
            body = [
                [row["model"], *(_cell(_domains(row, sets[0]).get(d), what) for d in domains)]
                for row in rows
            ]
            lines = markdown_table(["model", *domains], body)
            parts.append(f"{title} per domain, {sets[0]}:\n\n{lines}")
    return "\n".join(parts)


def _domains(row: dict, data: str) -> dict[str, dict]:
    return row["measures"].get(data, {}).get("domains", {})


def _measured(rows: Sequence[dict], name: str, what: str) -> bool:
    return what in ("loss", "exact") or any(what in row["measures"].get(name, {}) for row in rows)


def _cell(measures: dict | None, what: str) -> str:
    if not measures or measures.get(what) is None:
        return "–"
    return f"{measures[what]:.3f}" if what == "loss" else f"{100 * measures[what]:.1f} %"


def reliability_table(runs: Sequence[RunRecords]) -> str:
    """What each client's pictures explain of its captions, in the runs that weigh by it."""
    shown = [(run, r) for run in runs for r in (run.records[0], run.records[-1])[: len(run.records)]
             if "reliability" in r]  # fmt: skip
    every = list(dict.fromkeys(name for _, record in shown for name in record["reliability"]))
    if not every:
        return ""
    names = sorted(every, key=lambda name: _last_share(shown, name))[:MOST_CLIENTS]
    body = [
        [f"{run.name}, round {record['round']}",
         *(f"{100 * record['reliability'][n]:.0f} %" if n in record["reliability"] else "–"
           for n in names)]
        for run, record in shown
    ]  # fmt: skip
    few = f", the {MOST_CLIENTS} lowest" if len(every) > MOST_CLIENTS else ""
    lines = markdown_table(["reliability", *names], body)
    what = "What the clients' pictures explain of their captions, drawn to the mean"
    return f"\n{what}{few}:\n\n{lines}"


def _last_share(shown: Sequence[tuple[RunRecords, dict]], name: str) -> float:
    return [r["reliability"][name] for _, r in shown if name in r["reliability"]][-1]


def privacy_table(runs: Sequence[RunRecords]) -> str:
    """What the runs that trained in private promise of a record, with all that it assumes."""
    stated = {
        f"{run.name}, {client}": values
        for run in runs
        for client, values in sorted(run.private.items(), key=lambda of: -of[1]["epsilon"])[
            :MOST_CLIENTS
        ]
    }
    if not stated:
        return ""
    return f"\nDifferential privacy of a record:\n\n{section(stated)}\n"


def draw_loss(runs: Sequence[RunRecords], data: str, path: Path) -> None:
    """Held-out loss over rounds: a line per run of several rounds, a dashed level per other one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for run, colour in zip(runs, PALETTE * len(runs), strict=False):
        measured = [r for r in run.records if any(data in s for s in r["heldout"].values())]
        if "global" not in (measured[-1]["heldout"] if measured else {}):
            losses = [sets[data]["loss"] for sets in run.final.values() if data in sets]
            if losses:
                axes.axhspan(min(losses), max(losses), color=colour, alpha=0.12, lw=0)
                axes.text(0.99, (min(losses) + max(losses)) / 2, f"{run.name} (all clients)",
                          transform=axes.get_yaxis_transform(), ha="right", va="center",
                          color=colour, fontsize=9)  # fmt: skip
            continue
        rounds = [r["round"] for r in measured]
        losses = [r["heldout"]["global"][data]["loss"] for r in measured]
        if len(run.records) == 1:
            axes.axhline(losses[0], color=colour, ls="--", lw=1.5, label=f"{run.name}")
        else:
            axes.plot(rounds, losses, color=colour, marker="o", lw=2, label=run.name)
    axes.set(xlabel="round", ylabel=f"caption loss, {data} (nats a token)")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    write_figure(figure, path)


def draw_cosines(run: RunRecords, path: Path) -> None:
    """Cosines between the clients' updates, in the first and in the last round of a run.

    Nothing is drawn of rounds with so many clients that there are none (`fed.server.comparison`).
    """
    import matplotlib

    matplotlib.use("Agg")
    import numpy
    from matplotlib import pyplot

    shown = [run.records[0]] + ([run.records[-1]] if len(run.records) > 1 else [])
    if not all(record["cosines"] for record in shown):
        return
    size = 1.6 + 0.55 * max(len(r["clients"]) for r in shown)
    figure, all_axes = pyplot.subplots(
        1, len(shown), figsize=(size * len(shown) + 0.8, size), layout="constrained", squeeze=False
    )
    for axes, record in zip(all_axes[0], shown, strict=True):
        cosines = numpy.array(
            [[numpy.nan if c is None else c for c in row] for row in record["cosines"]], dtype=float
        )
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        names = list(record["clients"])
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{run.name}, round {record['round']}", fontsize=10)
        for i, row in enumerate(cosines):
            for j, value in enumerate(row):
                text = "–" if numpy.isnan(value) else f"{round(value, 2) + 0:.2f}"
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=all_axes, shrink=0.8, label="cosine of the clients' updates")
    write_figure(figure, path)


def write_figure(figure, path: Path) -> None:
    from matplotlib import pyplot

    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)


def report(runs: Sequence[RunRecords], output: Path, title: str, note: str = "") -> str:
    """Write all files of the report into `output`; returns the Markdown."""
    rows = rows_of(runs)
    sets = list(dict.fromkeys(name for row in rows for name in row["measures"]))
    text = f"# {title}\n\n" + (f"{note}\n\n" if note else "")
    text += table(rows, sets) + reliability_table(runs) + privacy_table(runs)
    write_text(output / "report.json", json.dumps({"title": title, "rows": rows}, indent=1))
    write_text(output / "report.md", text)
    if sets:
        draw_loss(runs, sets[0], output / "loss.png")
    several = [run for run in runs if len(run.records[0]["clients"]) > 1]
    shared = [run for run in several if "global" in run.final] or several
    if shared:
        draw_cosines(shared[0], output / "cosines.png")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = FlagParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="Federated pre-training")
    parser.add_argument("--note", default="", help="a paragraph under the title")
    args = parser.parse_args(argv)
    with one_clear_error():
        folders = pairs("--runs", args.runs, "NAME=FOLDER")
        runs = [RunRecords.load(name, folder) for name, folder in folders.items()]
        print(report(runs, args.output, args.title, args.note), end="")


if __name__ == "__main__":
    main()
