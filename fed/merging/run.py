"""One merge from beginning to end: open, check, merge, write, report."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fed import methods
from fed.merging import card, compatibility, manifest, task_vectors
from fed.merging.config import MergeConfig
from fed.merging.formats.choose import format_of
from fed.merging.formats.format import Format, Put
from fed.merging.merge_group import MergeJob, check_method, check_streamed, merge_group, rehearse
from fed.merging.output import check_output, check_space, output_folder
from fed.merging.sources import Source, open_source
from fed.state import State


@dataclass
class Result:
    """The result of a merge.

    Attributes:
        folder: the folder that was written; None of a dry run.
        state: the merged projector, of scope projector; None of a dry run.
        facts: the contents of merge.json.
        lines: the same for people.
    """

    folder: Path | None
    state: State | None
    facts: dict[str, Any]
    lines: list[str]


def run(config: MergeConfig) -> Result:
    """The merge that `config` describes; warnings go to stderr as they come up.

    Raises:
        InputError: bad input; nothing has been written.
    """
    check_method(config)
    options = methods.get(config.method).parse(config.options)
    rehearse(config, options)
    experts = [open_source(path, "expert") for path in config.experts]
    base = None if config.base is None else open_source(config.base, "base")
    path = None
    if config.output is not None and not config.dry_run:
        inputs = [source.path for source in (*experts, *([base] if base else []))]
        path = check_output(config.output, config.overwrite, inputs)
    forced = compatibility.check_identity(experts, base, config)
    form = format_of(config, experts, base)
    if len(form.groups) > 1:
        check_streamed(config)
    prints, base_print = form.prints()
    warnings = compatibility.check_same(experts, prints, base, base_print)
    warnings += [*compatibility.check_known(experts), *form.notes]
    _warn(forced + warnings)
    if base is None:
        _warn(["no base is given: the weighted mean of the experts stands in for it"])
    if path is not None:
        check_space(path, form.size)

    job = _job(config, options, experts, base)
    facts = manifest.facts_of(config, options, form, experts, base, [*prints, base_print])
    facts |= {"forced": forced, "warnings": warnings}
    state: State = {}
    with contextlib.ExitStack() as stack:
        puts: list[Put] = [state.update] if config.scope == "projector" else []
        if path is not None:
            folder = stack.enter_context(output_folder(path))
            puts.append(stack.enter_context(form.writer(folder)))
        facts |= _merge(job, form, puts)
        if base is not None:
            late = task_vectors.check_start(facts["all"], base)
            _warn(late)
            facts["warnings"] = warnings + late
        if path is not None:
            manifest.write(folder, facts)
            card.write(folder, facts)
    return Result(path, state or None, facts, card.lines(facts, config))


def _job(
    config: MergeConfig, options: dict[str, Any], experts: Sequence[Source], base: Source | None
) -> MergeJob:
    method = calibration = None
    if not config.dry_run:
        method = methods.get(config.method)
        if config.calibration_data:
            from fed.merging.calibration import calibration_of  # which needs transformers

            calibration = calibration_of(config, experts)
    return MergeJob(
        method,
        options,
        config.shares,
        [expert.label for expert in experts],
        base.label if base else "the experts' mean",
        calibration,
        joint=config.scope == "projector",
    )


def _merge(job: MergeJob, form: Format, puts: Sequence[Put]) -> dict[str, Any]:
    """Every group's merged state into `puts`; the facts of what was measured, and the method's."""
    grams: task_vectors.Gram = {}
    facts: dict[str, Any] = {}
    method_facts: dict[str, Any] = {}
    for names in _progress(form.groups):
        merged = merge_group(job, names, form.experts, form.base)
        if merged.state is not None:
            for put in puts:
                put(merged.state)
        grams |= merged.grams
        layers = method_facts.get("layers", {}) | merged.facts.get("layers", {})
        method_facts |= {**merged.facts, **({"layers": layers} if layers else {})}
        if len(form.groups) == 1 and job.method is None:
            facts["directions"] = merged.facts
        form.release()
    kinds: task_vectors.Gram = {}
    for name, g in grams.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        kinds[kind] = kinds[kind] + g if kind in kinds else g
    for key, by_name in (("layers", grams), ("kinds", kinds)):
        facts[key] = {n: task_vectors.describe(g, job.weights) for n, g in by_name.items()}
    facts["all"] = task_vectors.describe(task_vectors.total(grams), job.weights)
    if len(form.groups) > 1:  # what a method says of all layers together was said of one group
        method_facts = {"layers": method_facts["layers"]} if "layers" in method_facts else {}
    facts["method_facts"] = manifest.plain(method_facts)
    return facts


def _progress(groups: Sequence[Sequence[str]]) -> Iterable[Sequence[str]]:
    """The groups, with a bar on a terminal where there are many."""
    if len(groups) == 1 or not sys.stderr.isatty():
        return groups
    from tqdm import tqdm

    return tqdm(groups, desc="merging", unit="layer")


def _warn(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
