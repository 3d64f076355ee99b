"""The page of a run or a merge: what `fed` wrote of it, as plots, live while it goes on."""

from __future__ import annotations

import asyncio
import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llava.serve.ui import run_data
from llava.serve.ui.worker_client import PageError, WorkerClient

EVERY = 2.0  # seconds between looks at the records

# The plots: x, y, kind, a title that fits on a phone, and the meaning of y.
PLOTS = (
    ("round", "loss", "line", "Held-out loss of each model", "nats a token"),
    ("round", "explained share", "line", "What the pictures explain", "share of the captions"),
    ("round", "loss", "line", "Training loss of each client", "nats a token"),
    ("round", "reliability", "line", "What clients' pictures explain", "share of the captions"),
    ("round", "cosine", "line", "Agreement of the clients", "mean cosine with the others"),
    ("direction", "share", "line", "Spectrum of the shared space", "share of the energy"),
    ("layer", "weight", "bar", "Weight of each expert", "weight"),
    ("layer", "share", "bar", "What the experts agree on", "share of what they learnt"),
)
WITH_MEAN = "cosine with the mean update"  # the agreement's y where it has this meaning
RANGE: dict[str, list[float | None]] = {
    "loss": [0, None],
    "cosine": [-1, 1],
    "share": [0, 1],
    "explained share": [None, 1],
    "reliability": [0, 1],
    "weight": [0, None],
}


def run_tab(client: WorkerClient, folders: Sequence[str]):
    """Build the tab; returns its choice of runs, and `choices()`, which looks for them."""
    import gradio as gr

    known: dict[str, Path] = {}  # what may be opened, by the name shown

    async def choices():
        """An update of the choice: the folders given, and those that workers' models came from."""
        found = [Path(folder) for folder in folders]
        try:
            workers = [client.worker(model) for model in await client.models()]
            told = await asyncio.gather(*workers, return_exceptions=True)
            found += [Path(w.runs) for w in told if not isinstance(w, BaseException) and w.runs]
        except PageError:
            pass  # the chat's tab says it
        known.update({str(folder): folder for folder in found})
        return gr.update(choices=list(known), value=next(iter(known), None))

    run = gr.Dropdown([], label="Run or merge", elem_id="run")
    sites = gr.HTML(visible=False, elem_id="sites", max_height=400)
    about = gr.Markdown()
    plots = [_plot(*plot) for plot in PLOTS]
    plots += [_plot("of", y, "bar", *text) for _, y, kind, *text in PLOTS if kind == "line"]
    cosines = gr.HTML(visible=False)
    seen = gr.State(None)
    outputs = [about, *plots, cosines, sites, seen]

    def show(name: str | None, before: tuple | None):
        if name not in known:
            text = "No run is known. Start this page with `--run FOLDER` to see one."
            return [text, *[gr.update(visible=False)] * (len(outputs) - 2), None]
        return changed_in(known[name], before)

    run.change(lambda name: show(name, None), run, outputs, show_progress="hidden")
    gr.Timer(EVERY).tick(show, [run, seen], outputs, show_progress="hidden")
    return run, choices


def changed_in(folder: Path, before: tuple | None) -> list:
    """Updates of what has changed, and the stamps that are `before` the next time.

    The sites' steps change often; the plots are not drawn again for them.
    """
    import gradio as gr

    now = run_data.stamp(folder), run_data.sites_stamp(folder)
    records, sites = before or (None, None)
    updates = [gr.skip()] * len(_shown([], None)) if now[0] == records else seen_in(folder)
    return [*updates, gr.skip() if now[1] == sites else sites_in(folder), now]


def _plot(x: str, y: str, kind: str, title: str, y_title: str):
    import gradio as gr

    line = kind == "line"
    return (gr.LinePlot if line else gr.BarPlot)(
        x=x, y=y, color=None if x == "of" else "of", x_title=" " if x == "of" else x,
        y_title=y_title, color_title=" ", title=title, x_axis_format="d" if line else None,
        height=280, tooltip="all", visible=False, buttons=[],
        y_lim=None if line else RANGE[y],  # type: ignore[arg-type]  # gradio's own default is None
    )  # fmt: skip


def seen_in(folder: Path) -> list:
    """Updates of the text, the plots and the table; what is wrong is said in the text."""
    try:
        return _shown(*run_data.read(folder))
    except PageError as error:
        text = html.escape(str(error))
    except (KeyError, TypeError, AttributeError, ValueError):
        text = f"The records in {html.escape(str(folder))} are not as `fed` writes them."
    return [text, *_shown([], None)[1:]]


def _shown(rounds: list[dict], merge: dict | None) -> list:
    text = "\n\n".join(filter(None, [_of_run(rounds), _of_merge(merge) if merge else ""]))
    text = text or "No round is finished yet."
    return [text, *_plotted(rounds, merge), _cosines(rounds)]


def _plotted(rounds: list[dict], merge: dict | None) -> list:
    """Updates of the plots; what would be a line of one point is bars, the plots at the end."""
    import gradio as gr
    import pandas

    of_run = [
        run_data.heldout_losses,
        run_data.explained_shares,
        run_data.client_losses,
        run_data.reliabilities,
        run_data.agreements,
        run_data.spectrum,
    ]
    of_merge = [run_data.layer_weights, run_data.layer_agreements]
    rows = [make(rounds) for make in of_run] + [make(merge) if merge else [] for make in of_merge]
    y_titles = [y_title for *_, y_title in PLOTS]
    if run_data.compared_with_mean(rounds):
        y_titles[of_run.index(run_data.agreements)] = WITH_MEAN
    points = []
    for i, (x, _, kind, *_) in enumerate(PLOTS):
        if kind == "line":
            single = len({row[x] for row in rows[i]}) == 1
            points.append(rows[i] if single else [])
            rows[i] = [] if single else rows[i]
            y_titles.append(y_titles[i])
    return [
        gr.update(value=pandas.DataFrame(each), y_title=y_title, visible=True)
        if each
        else gr.update(visible=False)
        for each, y_title in zip(rows + points, y_titles, strict=True)
    ]


def _of_run(rounds: list[dict]) -> str:
    """A paragraph on the run so far."""
    if not rounds:
        return ""
    last = rounds[-1]
    parts = [f"**{html.escape(last['method'])}**, round {last['round']} is finished, with "
             f"{len(last['clients'])} clients."]  # fmt: skip
    if last["failed"]:
        why = "; ".join(f"{name}: {reason}" for name, reason in last["failed"].items())
        parts.append(f"**Left out:** {html.escape(why)}.")
    if last["norms"] is None:
        parts.append("Sums are secure: no client's loss or update is known here.")
    if last["drift"] is not None:
        parts.append(f"Drift {last['drift']:.2f}: 0 is when all clients move alike, 1 when their "
                     "updates cancel.")  # fmt: skip
    return " ".join(parts)


def _of_merge(merge: dict) -> str:
    """A paragraph on the merge."""
    names = ", ".join(map(html.escape, run_data.experts(merge)))
    warnings = "".join(f" **!** {html.escape(w)}" for w in merge["forced"] + merge["warnings"])
    chance = merge["all"]["chance"]
    common = f" Unrelated experts would have {chance:.2f} in common." if chance else ""
    return f"**{html.escape(merge['method'])}** of {names}.{common}{warnings}"


def sites_in(folder: Path):
    """An update of the table of sites: how each is, and since when."""
    import gradio as gr

    try:
        found = run_data.sites(folder)
    except PageError as error:
        return gr.update(value=f"<p>{html.escape(str(error))}</p>", visible=True)
    if not found or not found[0]:
        return gr.update(visible=False)
    rows, written = found
    states = Counter(row["state"].split(":")[0] for row in rows)
    counts = ", ".join(f"{count} {html.escape(state)}" for state, count in states.items())
    body = "".join(
        f'<tr><th scope="row">{html.escape(row["site"])}</th><td>{html.escape(_doing(row))}</td>'
        f"<td>{_unbroken(row['since'])}</td></tr>"
        for row in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Site", "State", "Since"))
    caption = f"Sites: {counts}; last change {written}"
    table = f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"
    return gr.update(value=table, visible=True)


def _unbroken(text: str) -> str:
    """Words of which none is broken, as a date would be at a hyphen on a phone."""
    return " ".join(f"<span>{html.escape(word)}</span>" for word in text.split(" "))


def _doing(row: dict) -> str:
    """A site's state in words, with the step and the loss of one that is at work."""
    parts = []
    if "step" in row and "steps" in row:
        parts.append(f"step {row['step']} of {row['steps']}")
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if not parts:
        return row["state"]
    asked = f" on {row['asked']}" if "asked" in row else ""
    return f"{row['state']}{asked}: {', '.join(parts)}"


def _cosines(rounds: list[dict]):
    """The last round's cosines between clients, the higher the stronger in the theme's colour."""
    import gradio as gr

    if not rounds or len(rounds[-1]["clients"]) < 2 or not rounds[-1]["cosines"]:
        return gr.update(visible=False)
    names = [html.escape(name) for name in rounds[-1]["clients"]]
    rows = []
    for name, row in zip(names, rounds[-1]["cosines"], strict=True):
        cells = "".join(
            f'<td style="background: color-mix(in srgb, var(--secondary-500) '
            f'{0 if c is None else max(0, round(60 * c))}%, transparent)">'
            f"{'–' if c is None else f'{round(c, 2) + 0:.2f}'}</td>"
            for c in row
        )
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    caption = f"Cosines of the clients' updates, round {rounds[-1]['round']}"
    table = f"<table><caption>{caption}</caption><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    return gr.update(value=f'<div class="cosines">{table}</div>', visible=True)
