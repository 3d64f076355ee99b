"""The small tools of scripts/ that write a model's files anew."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from llava.errors import InputError
from llava.model.shards import Shards, write_shards
from tests.conftest import UPSTREAM, logits_of, tool, upstream_copy

PROJECTOR = {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")}


@pytest.mark.parametrize("base_name", ["llm", "llava-full"], ids=["llm", "base with a tower"])
def test_a_merged_lora_is_a_full_llava(base_name, tmp_path):
    lora = upstream_copy("llava-lora", tmp_path)
    base = upstream_copy(base_name, tmp_path)
    # In float32 there is no rounding between merging then and merging now.
    tensors = {n: t.float() for n, t in Shards(base).items() if not n.endswith("inv_freq")}
    for file in [*base.glob("*.bin*"), *base.glob("*.safetensors")]:
        file.unlink()
    write_shards(base, tensors.items())
    out = tmp_path / "merged"
    tool("merge_lora_weights")(
        ["--model-path", str(lora), "--model-base", str(base), "--save-model-path", str(out)]
    )
    assert torch.equal(logits_of(out), logits_of(lora, base))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert (out / "tokenizer.model").is_file()
    assert set(Shards(out)) == {n for n in tensors if "position_ids" not in n} | PROJECTOR

    with pytest.raises(InputError, match="no adapter_config.json there"):
        tool("merge_lora_weights")(
            ["--model-path", str(out), "--save-model-path", str(tmp_path / "x")]
        )


def test_the_projector_comes_out_of_every_kind_of_folder(upstreams_full, tmp_path):
    extract = tool("extract_mm_projector")
    weights = Shards(upstreams_full)
    expected = {name: weights[name] for name in PROJECTOR}
    # Other shards are not read.
    index = json.loads((upstreams_full / "pytorch_model.bin.index.json").read_text())["weight_map"]
    others = set(index.values()) - {index[name] for name in PROJECTOR}
    assert others
    for file in others:
        (upstreams_full / file).write_bytes(b"")
    in_one, in_shards = tmp_path / "one", tmp_path / "shards"
    tensors = dict(Shards(UPSTREAM / "llava-full"))
    for folder, size in ((in_one, 10**9), (in_shards, 40_000)):
        folder.mkdir()
        write_shards(folder, tensors.items(), size)
    assert len(list(in_shards.glob("*.safetensors"))) > 1
    for folder in (upstreams_full, in_one, in_shards):
        extract(["--model-path", str(folder), "--output", str(tmp_path / "p.bin")])
        found = torch.load(tmp_path / "p.bin", weights_only=True)
        assert found.keys() == PROJECTOR
        assert all(torch.equal(found[name], expected[name]) for name in PROJECTOR)

    output = tmp_path / "lora.safetensors"
    extract(["--model-path", str(UPSTREAM / "llava-lora"), "--output", str(output)])
    assert load_file(output).keys() == PROJECTOR
    with pytest.raises(InputError, match="has no projector"):
        extract(["--model-path", str(UPSTREAM / "llm"), "--output", str(output)])
