"""scripts/data and what makes its small data can be imported; the small data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "scripts" / "data"), str(HERE)]


@pytest.fixture(scope="session")
def pretrain(tmp_path_factory) -> Path:
    from small import make_pretrain

    return make_pretrain(tmp_path_factory.mktemp("data") / "LLaVA-Pretrain")


@pytest.fixture(scope="session")
def cc12m(tmp_path_factory) -> Path:
    from small import make_shards

    return make_shards(tmp_path_factory.mktemp("data") / "cc12m")


@pytest.fixture(scope="session")
def mix(tmp_path_factory) -> Path:
    from small import make_mix

    return make_mix(tmp_path_factory.mktemp("data") / "mix")
