"""One merge from beginning to end: open, check, merge, write, tell."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed import methods
from fed.merging import card, report, task_vectors, validation
from fed.merging.calibration import calibration
from fed.merging.choose_format import format_of
from fed.merging.config import Settings
from fed.merging.formats import Format, Put
from fed.merging.manifest import facts_of, plain
from fed.merging.merge_group import Job, merge_group
from fed.merging.output import check_output, check_space, output_folder
from fed.merging.sources import open_source
from fed.state import State


@dataclass
class Result:
    """What came of a merge.

    Attributes:
        folder: what was written; None of a dry run.
        state: the merged projector, of scope projector; None of a dry run.
        facts: what merge.json holds.
        lines: the same for people.
    """

    folder: Path | None
    state: State | None
    facts: dict[str, Any]
    lines: list[str]


def run(settings: Settings) -> Result:
    """Do what the settings say; warnings go to stderr as they come up.

    Raises:
        InputError: bad input; nothing has been written.
    """
    validation.check_method(settings)
    options = methods.get(settings.method).parse(settings.options)
    validation.rehearse(settings, options)
    experts = [open_source(path, "expert") for path in settings.experts]
    base = None if settings.base is None else open_source(settings.base, "base")
    path = None
    if settings.output is not None and not settings.dry_run:
        inputs = [source.path for source in (*experts, *([base] if base else []))]
        path = check_output(settings.output, settings.overwrite, inputs)
    forced = validation.check_identity(experts, base, settings)
    form = format_of(settings, experts, base)
    if len(form.groups) > 1:
        validation.check_streamed(settings)
    prints, of_base = form.prints()
    warnings = validation.check_same(experts, prints, base, of_base)
    warnings += [*validation.check_known(experts), *form.notes]
    _warn(forced + warnings)
    if base is None:
        _warn(["no base is given: the weighted mean of the experts stands in for it"])
    if path is not None:
        check_space(path, form.size)

    job = Job(
        None if settings.dry_run else settings.method,
        options,
        settings.shares,
        [expert.who for expert in experts],
        base.who if base else "the experts' mean",
        None if settings.dry_run else calibration(settings, experts),
        joint=settings.scope == "projector",
    )
    facts = facts_of(settings, options, form, experts, base, [*prints, of_base])
    facts |= {"forced": forced, "warnings": warnings}
    with contextlib.ExitStack() as stack:
        folder, state, put = None, {}, None
        if path is not None:
            folder = stack.enter_context(output_folder(path))
            put = stack.enter_context(form.writer(folder))
        _merge(job, form, facts, put, state if settings.scope == "projector" else None)
        if base is not None:
            late = validation.check_start(facts["all"], base)
            _warn(late)
            facts["warnings"] = warnings + late
        if folder is not None:
            card.write(folder, facts)
    lines = report.lines(facts, settings)
    return Result(path, None if settings.dry_run else state or None, facts, lines)


def _merge(job: Job, form: Format, facts: dict[str, Any], put: Put | None, keep: State | None):
    """Go through the groups; what is measured and what the method says goes into the facts."""
    grams: task_vectors.Gram = {}
    of_method: dict[str, Any] = {}
    for names in _progress(form.groups):
        merged = merge_group(job, names, form.experts, form.base)
        if merged.state is not None and put is not None:
            put(merged.state)
        if merged.state is not None and keep is not None:
            keep |= merged.state
        grams |= merged.grams
        layers = of_method.get("layers", {}) | merged.facts.get("layers", {})
        of_method |= {**merged.facts, **({"layers": layers} if layers else {})}
        if len(form.groups) == 1 and job.method is None:
            facts["directions"] = merged.facts
        form.release()
    kinds: task_vectors.Gram = {}
    for name, g in grams.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        kinds[kind] = kinds[kind] + g if kind in kinds else g
    for key, of in (("layers", grams), ("kinds", kinds), ("all", {"": task_vectors.total(grams)})):
        told = {name: task_vectors.describe(g, job.weights) for name, g in of.items()}
        facts[key] = told[""] if key == "all" else told
    if len(form.groups) > 1:  # what a method says of all layers together was said of one group
        of_method = {"layers": of_method["layers"]} if "layers" in of_method else {}
    facts["method_facts"] = plain(of_method)


def _progress(groups: Any) -> Iterator[Any]:
    """The groups, with a bar on a terminal where there are many."""
    if len(groups) == 1 or not sys.stderr.isatty():
        return iter(groups)
    from tqdm import tqdm

    return iter(tqdm(groups, desc="merging", unit="layer"))


def _warn(sentences: list[str]) -> None:
    for sentence in sentences:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
