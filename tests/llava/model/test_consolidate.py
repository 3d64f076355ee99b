"""`python -m llava.model.consolidate`: the same model in one safetensors file."""

from __future__ import annotations

import pytest
import torch

from llava.errors import InputError
from llava.model import consolidate
from llava.model.shards import Shards
from tests.conftest import logits_of


def test_consolidate_writes_the_same_model_anew(upstreams_full, tmp_path):
    consolidate.main(["--src", str(upstreams_full), "--dst", str(tmp_path / "new")])
    new, old = Shards(tmp_path / "new"), Shards(upstreams_full)
    assert set(new) == {name for name in old if not name.endswith("inv_freq")}
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert torch.equal(logits_of(tmp_path / "new"), logits_of(upstreams_full))
    with pytest.raises(InputError, match="is there already"):
        consolidate.main(["--src", str(upstreams_full), "--dst", str(tmp_path / "new")])
