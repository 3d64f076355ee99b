"""Small data of the layouts that fed.data reads."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pretrain(tmp_path_factory) -> Path:
    from tests.fed.data.small import make_pretrain

    return make_pretrain(tmp_path_factory.mktemp("data") / "LLaVA-Pretrain")


@pytest.fixture(scope="session")
def cc12m(tmp_path_factory) -> Path:
    from tests.fed.data.small import make_shards

    return make_shards(tmp_path_factory.mktemp("data") / "cc12m")


@pytest.fixture(scope="session")
def mix(tmp_path_factory) -> Path:
    from tests.fed.data.small import make_mix

    return make_mix(tmp_path_factory.mktemp("data") / "mix")
