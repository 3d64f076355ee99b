"""LoRA folders as peft itself writes them: loaded as peft loads them, or refused by true name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from fed.merge import merge
from llava.errors import InputError
from llava.model import lora
from llava.model.builder import load_pretrained_model, load_tokenizer
from llava.model.checkpoint import save_full
from llava.model.shards import Shards
from llava.train.train import train
from tests.conftest import tool
from tests.llava.model.test_lora import make_model

IDS = torch.tensor([[1, 40, 7, -200, 30, 31, 32]])
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
LAYERS = ["q_proj", "v_proj", "up_proj"]
WAYS = {
    "plain": {},
    "mm_projector": {"modules_to_save": ["mm_projector"]},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "embed_tokens": {"modules_to_save": ["embed_tokens", "lm_head", "mm_projector"]},
    "a norm": {"modules_to_save": ["norm"]},
    "DoRA": {"use_dora": True},
    "DoRA and projector": {"use_dora": True, "modules_to_save": ["mm_projector"]},
    "rank-stabilised": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.0.mlp.up_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*layers\.\d\.mlp\.(up|down)_proj"},
    "all biases": {"bias": "all"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "tokens": {"trainable_token_indices": [5, 40]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    """A full LLaVA, on which the adapters are."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(2)
    save_full(
        make_model(tiny, mm_use_im_patch_token=False), load_tokenizer(str(tiny / "llm")), folder
    )
    return folder


def load(folder: Path, base: Path | None = None):
    _, model, _, _ = load_pretrained_model(str(folder), base and str(base), "any", device="cpu")
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, images=PIXELS).logits


def write(folder: Path, base: Path, seed: int = 0, **way) -> torch.Tensor:
    """Train an adapter with peft alone, after a fashion; returns the logits of its model."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **way}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(**values))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        expected = logits(model)
        model.base_model.model.config.name_or_path = str(base)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(folder)
        # What this is compared with is what peft itself makes of the folder.
        again = PeftModel.from_pretrained(load(base), folder)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    return expected


@pytest.mark.parametrize("way", WAYS)
def test_what_peft_wrote_is_loaded(base, tmp_path, way):
    expected = write(tmp_path / "a", base, **WAYS[way])
    assert (expected - logits(load(base))).abs().max() > 1e-2
    torch.testing.assert_close(logits(load(tmp_path / "a", base)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "way",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [1200, 1201]},
        {},
    ],
    ids=str,
)
def test_an_embedding_that_has_grown(base, tmp_path, way):
    """peft saves it whole, beside it lies the tokenizer that has the new tokens."""
    tokenizer, model, _, _ = load_pretrained_model(str(base), None, "any", device="cpu")
    tokenizer.add_tokens([f"<{i}>" for i in range(1202 - len(tokenizer))])
    model.resize_token_embeddings(1202, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=LAYERS, **way))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        wrapped.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    read, loaded, _, _ = load_pretrained_model(str(tmp_path), str(base), "any", device="cpu")
    assert len(read) == loaded.get_input_embeddings().num_embeddings == 1202
    ids = torch.tensor([[1, 40, 1200, 1201, 30]])
    with torch.no_grad():
        found, expected = loaded(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def change_config(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens is \[5, 6\]"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"of_a_later_peft": 3}, "of_a_later_peft is 3, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda': .*plain LoRA"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"lora_bias": True}, "lora_B.bias is missing"),
        ({"modules_to_save": ["score"]}, "no tensor of score, which .* names in modules_to_save"),
        ({"target_modules": ["no_proj"]}, "does not fit this base model: No modules"),
    ],
)
def test_what_is_refused_by_its_name(base, tmp_path, values, said):
    write(tmp_path / "a", base)
    change_config(tmp_path / "a", **values)
    with pytest.raises(InputError, match=said) as caught:
        load(tmp_path / "a", base)
    assert "\n" not in str(caught.value)
    if values.keys() - {"lora_bias", "modules_to_save", "target_modules"}:
        with pytest.raises(InputError, match=said):
            merge([tmp_path / "a"] * 2, tmp_path / "out", method="linear", scope="all")


def test_biases_that_a_layer_cannot_take(base, tmp_path):
    write(tmp_path / "a", base, lora_bias=True)
    with pytest.raises(InputError, match=r"a: the adapter cannot be merged: .*bias"):
        load(tmp_path / "a", base)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_one_table_for_embedding_and_head(tiny, tmp_path, module):
    """peft unties them; a LLaVA whose config says that they are one cannot."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny / "llm", tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "llm")
    load_tokenizer(str(tiny / "llm")).save_pretrained(tmp_path / "llm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = LoraConfig(target_modules=LAYERS, modules_to_save=[module], task_type="CAUSAL_LM")
        get_peft_model(model, values).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="one table for both"):
        load(tmp_path / "a", tmp_path / "llm")


# -- what goes on from such a folder ---------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_training_goes_on_and_nothing_is_lost(base, flags, tiny, tmp_path, frozen):
    way = {"use_dora": True, "modules_to_save": ["mm_projector", "lm_head"]}
    expected = write(tmp_path / "a", base, **way)
    same = dict(model_name_or_path=base, lora_enable=True, lora_weight_path=tmp_path / "a",
                tune_mm_mlp_adapter=False, data_path=tiny / "a.json", version="v1",
                freeze_mm_mlp_adapter=frozen)  # fmt: skip
    train(argv=flags(**same, learning_rate=0, max_steps=1))
    out = tmp_path / "out"
    stored = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert {"base_model.model.lm_head.weight", "base_model.model.model.mm_projector.0.weight"} <= (
        stored.keys()
    )
    torch.testing.assert_close(logits(load(out, base)), expected, rtol=1e-4, atol=1e-4)
    train(argv=flags(**same, max_steps=2, output_dir=tmp_path / "on"))
    moved = torch.load(tmp_path / "on" / "non_lora_trainables.bin", weights_only=True)
    changed = {n for n in stored if not torch.equal(stored[n], moved[n])}
    assert "base_model.model.lm_head.weight" in changed
    assert ("base_model.model.model.mm_projector.0.weight" in changed) is not frozen


FILES = ("adapter_model.safetensors", "non_lora_trainables.bin")


def test_a_run_goes_on_to_the_bit(base, flags, tiny, tmp_path):
    write(tmp_path / "a", base, use_dora=True, modules_to_save=["mm_projector"])
    same = dict(model_name_or_path=base, lora_enable=True, lora_weight_path=tmp_path / "a",
                tune_mm_mlp_adapter=False, data_path=tiny / "a.json", version="v1",
                save_strategy="steps", save_steps=2)  # fmt: skip
    train(argv=flags(**same))
    whole = {f: (tmp_path / "out" / f).read_bytes() for f in FILES}
    for file in FILES:
        (tmp_path / "out" / file).unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    train(argv=flags(**same))
    assert whole == {f: (tmp_path / "out" / f).read_bytes() for f in FILES}


def test_the_script_merges_it(base, tmp_path):
    way = {"use_dora": True, "modules_to_save": ["mm_projector", "lm_head"]}
    expected = write(tmp_path / "a", base, **way)
    places = {"--model-path": "a", "--save-model-path": "f"}
    argv = [word for flag, name in places.items() for word in (flag, str(tmp_path / name))]
    tool("merge_lora_weights")([*argv, "--model-base", str(base)])
    torch.testing.assert_close(logits(load(tmp_path / "f")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["projector", "all"])
def test_two_of_them_are_merged(base, tmp_path, scope):
    """Half of what two adapters and their projectors learnt, by hand."""
    for seed, name in enumerate("ab"):
        write(tmp_path / name, base, seed, use_dora=True, modules_to_save=["mm_projector"])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="task_arithmetic", scope=scope,
          base=str(base), options={"scale": 0.5})  # fmt: skip
    name = "model.mm_projector.0.weight"
    start = Shards(base)[name]
    learnt = [lora.read_beside(tmp_path / n)[name] - start for n in "ab"]
    if scope == "projector":
        found = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)[name]
    else:
        found = lora.read_beside(tmp_path / "out")[name]
    torch.testing.assert_close(found, start + 0.5 * sum(learnt), rtol=1e-5, atol=1e-6)
    if scope == "all":
        files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "b", "out")]
        magnitude = next(n for n in files[0] if n.endswith("lora_magnitude_vector"))
        mean = (files[0][magnitude] + files[1][magnitude]) / 2
        torch.testing.assert_close(files[2][magnitude], mean, rtol=1e-5, atol=1e-6)
        load(tmp_path / "out", base)


def test_adapters_that_changed_the_base_are_not_merged(base, tmp_path):
    for seed, name in enumerate("ab"):
        write(tmp_path / name, base, seed, init_lora_weights="pissa")
    with pytest.raises(InputError, match="a: init_lora_weights is 'pissa', whose matrices"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="linear", scope="all")
