"""The studies by the name that a plan gives as `study`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from llava.errors import InputError, reason
from playground.studies import fedcmp_report, pilot_report, pivotmerge_report
from playground.studies.fedcmp import FedCMPPlan
from playground.studies.pilot import PilotPlan
from playground.studies.pivotmerge import PivotMergePlan
from playground.studies.plan import Plan, check_document

STUDIES = {
    "fedcmp": (FedCMPPlan, fedcmp_report.write_report),
    "pilot": (PilotPlan, pilot_report.write_report),
    "pivotmerge": (PivotMergePlan, pivotmerge_report.write_report),
}


def read_plan(path: Path) -> Plan:
    """Raises InputError for a file that is no plan."""
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {reason(error)}") from None
    check_document(document, path)
    if document.get("study") not in STUDIES:
        raise InputError(
            f"{path}: study is {document.get('study')!r}; {', '.join(STUDIES)} are known"
        )
    kind, _ = STUDIES[document["study"]]
    return kind(document)


def write_report(plan: Plan, rows: Sequence[Mapping], folder: Path, name: str) -> None:
    """Write the page NAME.md and its pictures into `folder`."""
    _, write = STUDIES[plan.document["study"]]
    write(plan, rows, folder, name)
