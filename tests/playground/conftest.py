"""The playground's data, unpacked once for all tests that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from playground.tools import unpack_data


@pytest.fixture(scope="session")
def emoji(tmp_path_factory) -> Path:
    """The folder of the emoji; what lies beside it is made by tests."""
    folder = tmp_path_factory.mktemp("playground") / "emoji"
    assert unpack_data.unpack(target=folder)
    return folder
