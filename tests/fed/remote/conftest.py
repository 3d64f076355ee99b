"""Kits for a server on this machine and two sites, and processes that have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fed.remote.rig import SITES, Line, Rig, connect_to, free_port, listen_at


@pytest.fixture(scope="session")
def all_kits(tmp_path_factory) -> Path:
    pytest.importorskip("nvflare", reason="the extra `remote` is not installed")
    from fed.remote import kits

    output = tmp_path_factory.mktemp("flare") / "kits"
    kits.make_kits("localhost:1", SITES, output)
    return output


@pytest.fixture
def rig(all_kits, tmp_path):
    """Kits with a free port of this machine; nothing is left at work at the end."""
    made = Rig(tmp_path)
    shutil.copytree(all_kits, tmp_path / "kits")
    made.port = free_port()
    listen_at(tmp_path / "kits", made.port)
    yield made
    made.close()


@pytest.fixture
def line(rig):
    """What the site b is connected through."""
    line = Line(rig.port)
    connect_to(rig.folder / "kits", "b", line.port)
    yield line
    line.close()
