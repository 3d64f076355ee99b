"""Flags of the playground's runs, a section of flags.yaml each.

python -m playground.flags pretrain    # as words for bash, none of which has a space
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("flags.yaml")


def sections() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(FILE.read_text())


def flags(section: str) -> dict[str, Any]:
    """Flags by name."""
    return sections()[section]


def words(values: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("section", choices=sections())
    print("\n".join(words(flags(parser.parse_args().section))))
