"""`make_delta` and `apply_delta`: a model to its difference to a base, and back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from llava.errors import InputError
from llava.model import apply_delta, make_delta
from llava.model.shards import Shards, write_shards
from tests.conftest import UPSTREAM


def test_a_difference_is_made_and_applied(upstreams_full, tmp_path):
    """With two tokens more than the base has, as the first LLaVA had."""
    tensors = {n: t for n, t in Shards(upstreams_full).items() if "inv_freq" not in n}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2] * 2])
    target = tmp_path / "target"
    target.mkdir()
    write_shards(target, tensors.items())
    shutil.copy(upstreams_full / "config.json", target)
    base, delta, back = str(UPSTREAM / "llm"), tmp_path / "delta", tmp_path / "back"
    make_delta.main(["--base-model-path", base, "--target-model-path", str(target),
                     "--delta-path", str(delta)])  # fmt: skip
    apply_delta.main(["--base-model-path", base, "--target-model-path", str(back),
                      "--delta-path", str(delta)])  # fmt: skip
    difference, result, start = Shards(delta), Shards(back), Shards(base)
    for name, tensor in tensors.items():
        if name in start:
            rows = len(start[name])
            assert torch.equal(difference[name][:rows], tensor[:rows] - start[name].half())
            assert torch.equal(difference[name][rows:], tensor[rows:])
            torch.testing.assert_close(result[name], tensor, rtol=2e-3, atol=2e-3)
        else:
            assert torch.equal(result[name], tensor)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "float16"

    tensors["model.norm.weight"] = torch.ones(3)
    write_shards(target, tensors.items())
    with pytest.raises(InputError, match=r"model.norm.weight is \(3,\), that of .* is \(16,\)"):
        make_delta.main(["--base-model-path", base, "--target-model-path", str(target),
                         "--delta-path", str(tmp_path / "x")])  # fmt: skip
    assert not (tmp_path / "x").exists()
