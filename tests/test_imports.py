"""Imports point down: from commands to rooms, from `fed` to `llava`, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = (  # from the top down; those of a row may import each other
    {"commands", "site"},
    {"validation"},
    {"server", "drivers", "remote", "merging", "data"},
    {"clients", "methods"},
    {"numerics", "privacy"},
    {"arguments", "state", "markdown", "yaml_file"},
    {"llava"},
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(p): p for package in ("fed", "llava") for p in (ROOT / package).rglob("*.py")}


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that a file imports, wherever in it, but for its annotations alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module is not None, "a relative import"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in FILES else child.module for name in names)
        yield from imported(child)


ARROWS = {
    name: {module for module in imported(ast.parse(path.read_text())) if module in FILES}
    for name, path in FILES.items()
}


def room_of(module: str) -> str:
    package, *rest = module.split(".")
    if package == "llava":
        return package
    known = set().union(*ROOMS)
    return rest[0] if rest and (rest[0] in known or len(rest) > 1) else "commands"


def test_no_import_goes_up():
    rank = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    new = {room_of(name) for name in FILES} - rank.keys()
    assert not new, "a room without a place in ROOMS"
    assert [
        f"{name} imports {other}"
        for name, others in ARROWS.items()
        for other in others
        if rank[room_of(name)] > rank[room_of(other)]
    ] == []


def test_no_import_goes_in_a_circle():
    TopologicalSorter(ARROWS).prepare()  # raises CycleError, which names the circle
