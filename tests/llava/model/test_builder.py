"""`load_pretrained_model`: every form on disk gives the same model, bad ones one clear error."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.model.builder import from_pretrained, load_pretrained_model, load_tokenizer
from llava.model.checkpoint import projector_state, read_config, save_full, write_config
from llava.model.checkpoint_names import ROWS
from llava.model.lora import add_lora, save_lora
from llava.model.quantize import quantization
from llava.state import save
from llava.train.train import train

IDS = torch.tensor([[1, 40, IMAGE_TOKEN_INDEX, 30, 31, 32]])
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, images=PIXELS).logits


def load(folder, base=None, **kwargs):
    return load_pretrained_model(str(folder), base and str(base), "any", device="cpu", **kwargs)[1]


def make_model(llm: Path, tower: Path):
    """A LLaVA in memory; the folders below are all of it."""
    config = read_config(llm)
    config.mm_hidden_size, config.mm_projector_type = 32, "mlp2x_gelu"
    config.mm_vision_tower, config.mm_vision_select_layer = str(tower), -2
    config.mm_use_im_patch_token = False
    torch.manual_seed(0)
    model = from_pretrained(str(llm), config, dtype=torch.float32).eval()
    model.load_vision_tower(torch.float32, "cpu")
    return model


def make_projector_only(model, folder: Path) -> Path:
    save(projector_state(model), folder / "mm_projector.bin")
    write_config(model.config, folder, full=False)
    return folder


def make_lora(full: Path, folder: Path) -> tuple[Path, torch.Tensor]:
    """A LoRA folder of a plain name, and the logits of its model."""
    torch.manual_seed(1)
    wrapped = add_lora(load(full), r=4, alpha=8, dropout=0.0)
    wrapped.get_model().mm_projector.requires_grad_(True)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_lora(wrapped, folder)
    write_config(wrapped.config, folder, full=False)
    return folder, logits(wrapped)


@pytest.fixture(scope="module")
def model(tiny):
    return make_model(tiny / "llm", tiny / "vision_tower")


@pytest.fixture(scope="module")
def full(model, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    save_full(model, load_tokenizer(str(tiny / "llm")), folder)
    return folder


@pytest.fixture(scope="module")
def projector_only(model, tmp_path_factory):
    return make_projector_only(model, tmp_path_factory.mktemp("projector"))


@pytest.fixture(scope="module")
def adapted(full, tmp_path_factory):
    return make_lora(full, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copy_of(tmp_path):
    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "a-plain-name"))

    return copied


# -- what is read ---------------------------------------------------------------------------------


def test_a_projector_on_its_base(model, projector_only, tiny):
    assert torch.equal(logits(load(projector_only, tiny / "llm")), logits(model))


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "sharded bin", "single bin", "sharded"])
def test_a_full_model_in_any_file_format(model, full, copy_of, tiny, form, tower):
    folder = copy_of(full)
    state = load_file(folder / "model.safetensors")
    if tower:  # as upstream writes a tower that it kept as a submodule
        for name, tensor in load_file(tiny / "vision_tower" / "model.safetensors").items():
            name = name.removeprefix("vision_model.")
            state[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
        # A buffer of old releases.
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = [names[::2], names[1::2]] if "sharded" in form else [names]
    write, end = (torch.save, "bin") if "bin" in form else (save_file, "safetensors")
    stem = "pytorch_model" if "bin" in form else "model"
    places = {}
    for i, part in enumerate(parts):
        file = f"{stem}-{i + 1:05d}-of-00002.{end}" if len(parts) > 1 else f"{stem}.{end}"
        write({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load(folder)), logits(model))


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llama"])
def test_flat_configs_of_any_model_type(model, full, copy_of, model_type):
    folder = copy_of(full)
    change_config(folder, model_type=model_type)
    assert torch.equal(logits(load(folder)), logits(model))


def test_a_tuned_tower_is_the_one_that_is_used(model, full, copy_of, tiny):
    """Upstream loses it: it loads the tower that `mm_vision_tower` names again."""
    tuned = load(full)
    tuned.tune_vision_tower()
    with torch.no_grad():
        for parameter in tuned.get_vision_tower().parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = copy_of(full)
    save_full(tuned, load_tokenizer(str(full)), folder)
    names = set(load_file(folder / "model.safetensors"))
    assert (
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding" in names
    )  # upstream's name
    assert json.loads((folder / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    loaded = load(folder)
    assert torch.equal(logits(loaded), logits(tuned))
    assert not torch.equal(logits(loaded), logits(model))
    assert not any("vision_tower" in name for name in loaded.state_dict())  # frozen again


def test_a_lora_is_merged_whatever_its_folder_is_called(full, adapted):
    folder, expected = adapted
    loaded = load(folder, full)
    assert type(loaded).__name__ == "LlavaLlamaForCausalLM"
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    # The folder itself says what its base was.
    torch.testing.assert_close(logits(load(folder)), expected, rtol=1e-5, atol=1e-5)


def test_transformers_own_layout(tiny, tmp_path):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_pretrained(tiny / "vision_tower"),
        text_config=LlamaConfig.from_pretrained(tiny / "llm"),
        image_token_index=1199,
    )
    torch.manual_seed(3)
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    load_tokenizer(str(tiny / "llm")).save_pretrained(tmp_path)
    shutil.copy(tiny / "vision_tower" / "preprocessor_config.json", tmp_path)
    ids = IDS.new_tensor([[1, 40, *[1199] * 4, 30, 31, 32]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=PIXELS).logits
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """Full, projector-only and LoRA folders of a width that 4-bit kernels take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny / "llm", root / "llm")
    torch.manual_seed(1)
    sizes = dict(hidden_size=128, intermediate_size=128, head_dim=64)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny / "llm", **sizes)).save_pretrained(
        root / "llm"
    )
    model = make_model(root / "llm", tiny / "vision_tower")
    save_full(model, load_tokenizer(str(tiny / "llm")), root / "full")
    make_projector_only(model, root / "projector")
    return root, make_lora(root / "full", root / "lora")[1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["full", "projector", "lora"])
def test_quantised_with_a_lora_and_a_projector_that_are_not(wide, kind, bits):
    import bitsandbytes

    root, of_lora = wide
    expected = of_lora if kind == "lora" else logits(load(root / "full"))
    base = {"full": None, "projector": root / "llm", "lora": root / "full"}[kind]
    loaded = load(root / kind, base, **{f"load_{bits}bit": True})
    layers = dict(loaded.named_modules())
    q = layers["model.layers.0.self_attn.q_proj"]
    linear = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    assert isinstance(getattr(q, "base_layer", q), linear)
    assert type(layers["model.mm_projector.0"]) is torch.nn.Linear
    assert type(layers["lm_head"]) is torch.nn.Linear
    found = logits(loaded).float()
    similar = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0)
    assert similar > 0.97
    assert not torch.equal(found, expected)
    loaded.generate(IDS, images=PIXELS, max_new_tokens=2, do_sample=False)


def test_a_tower_in_the_folder_itself_is_found_after_a_move(model, full, copy_of, tiny):
    folder = copy_of(full)
    shutil.copytree(tiny / "vision_tower", folder / "vision_tower")
    change_config(folder, mm_vision_tower="/where/it/was/made/vision_tower")
    assert torch.equal(logits(load(folder)), logits(model))


def test_a_tower_by_its_relative_path_is_found_from_the_folder(
    model, full, copy_of, tiny, tmp_path, monkeypatch
):
    """The folder was written, and its tower named, from where it lies."""
    folder = copy_of(full)
    shutil.copytree(tiny / "vision_tower", folder / "towers" / "of" / "mine")
    change_config(folder, mm_vision_tower="towers/of/mine")
    monkeypatch.chdir(tiny)
    assert torch.equal(logits(load(folder)), logits(model))


def test_what_a_program_does_that_loads_the_tower_itself(full):
    from llava import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(full, dtype=torch.float32)
    tower = model.get_vision_tower()
    assert not tower.is_loaded
    tower.load_model()
    tower.to(device=model.device, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load(full)))
    assert tower.image_processor.crop_size["height"] == 16


def test_a_plain_language_model_has_no_picture_processor(tiny):
    _, model, processor, _ = load_pretrained_model(str(tiny / "llm"), None, "x", device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert processor is None


# -- what is refused ------------------------------------------------------------------------------


def change_config(folder: Path, **changes) -> None:
    """Set keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


SECOND = "model-00002-of-00002.safetensors"


def shard(folder: Path, lose: bool = True) -> None:
    """Two shards and an index, of which the second shard is then lost."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    places = {}
    for i, part in enumerate([names[::2], names[1::2]]):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if lose:
        (folder / SECOND).unlink()


def unindexed(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def write_index(text: str):
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return spoil


def empty(name: str, file: str = "model.safetensors"):
    """A tensor as ZeRO-3 leaves it where nobody gathers."""

    def spoil(folder: Path) -> None:
        read, write = (load_file, save_file) if file.endswith("s") else (torch.load, torch.save)
        state = read(folder / file)
        write({**state, name: torch.empty(0)}, folder / file)

    return spoil


class Bomb:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


BAD_FULL = {
    "cut short": (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "a lost shard": (shard, "names the shard model-00002-of-00002.safetensors, .* not there"),
    "shards without an index": (
        unindexed,
        "model-00001-of-00002.safetensors is a shard, and model.safetensors.index.json, .* not",
    ),
    "an index of nothing": (write_index('{"weight_map": {}}'), "weight_map is empty"),
    "an index that is none": (write_index('{"weight_map": 3}'), "not an index of shards"),
    "an index cut short": (write_index('{"weight_map": {"a'), "index.json: no readable JSON"),
    "an empty embedding": (empty("model.embed_tokens.weight"), "embed_tokens.weight is empty"),
    "an empty norm": (empty("model.norm.weight"), "model.norm.weight is empty, .*ZeRO-3"),
    "an empty tensor in a shard": (
        lambda f: [shard(f, lose=False), empty("model.norm.weight", SECOND)(f)],
        "model-00002-of-00002.safetensors: tensor model.norm.weight is empty",
    ),
    "config cut short": (lambda f: cut(f / "config.json"), "config.json: no readable JSON"),
    "a tower on a path that is none": (
        lambda f: change_config(f, mm_vision_tower="towers/of/mine"),
        "mm_vision_tower 'towers/of/mine': there is no such folder, neither from .* nor from",
    ),
    "a tower of a number": (
        lambda f: change_config(f, mm_vision_tower=3),
        "mm_vision_tower 3, expected a value of type str",
    ),
    "an embedding that is no table": (
        lambda f: change_weights(f, lambda s: s.update({ROWS: s[ROWS].flatten()})),
        r"embed_tokens.weight has shape \(57600,\)",
    ),
    "a lost tensor": (
        lambda f: change_weights(f, lambda s: s.pop("model.norm.weight")),
        "tensors are missing .* model.norm.weight",
    ),
    "a projector lost": (
        lambda f: change_weights(f, lambda s: s.pop("model.mm_projector.2.bias")),
        "no model.mm_projector.2.bias",
    ),
    "no mm keys": (
        lambda f: change_config(f, mm_hidden_size=None),
        "hold a projector .* config.json has no mm_hidden_size",
    ),
    "another vocabulary": (
        lambda f: change_config(f, vocab_size=1300),
        "embed_tokens.weight is 1200 x 48, the config has vocab_size 1300",
    ),
    "another width": (lambda f: change_config(f, hidden_size=64), "has hidden_size 64"),
    "another projector": (
        lambda f: change_config(f, mm_projector_type="mlp3x_gelu"),
        "no model.mm_projector.4.bias",
    ),
    "a projector of another shape": (
        lambda f: change_weights(
            f, lambda s: s.update({"model.mm_projector.0.weight": torch.ones(48, 31)})
        ),
        "do not load",
    ),
    "an unknown projector": (lambda f: change_config(f, mm_projector_type="mlp"), "'mlp'"),
    "an unknown merge type": (
        lambda f: change_config(f, mm_patch_merge_type="diagonal"),
        "mm_patch_merge_type is 'diagonal'",
    ),
    "an unknown language model": (lambda f: change_config(f, model_type="llava_x"), "'x'"),
    "a lost tower": (lambda f: change_config(f, mm_vision_tower="/no/tower"), "/no/tower"),
    "a tower that is none": (
        lambda f: change_config(f, mm_vision_tower=str(f)),
        "vision tower .* has model_type 'llava_llama'; there are clip_vision_model, ",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        "no readable tokenizer",
    ),
    "a tokenizer with too many tokens": (
        lambda f: more_tokens(f),
        "tokenizer has 1203 tokens, the embedding only 1200 rows",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither weights nor"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
}


def more_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("case", BAD_FULL)
def test_bad_full_folders(full, copy_of, case):
    spoil, message = BAD_FULL[case]
    folder = copy_of(full)
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_code_in_a_shard_is_never_run(full, copy_of, tmp_path):
    folder = copy_of(full)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps({"model.norm.weight": Bomb(tmp_path / "ran")}, protocol=2)
    )
    with pytest.raises(InputError, match="pytorch_model.bin"):
        load(folder)
    assert not (tmp_path / "ran").exists()


BAD_LORA = {
    "an adapter cut short": (
        lambda f: cut(f / "adapter_model.safetensors"),
        "adapter_model.safetensors: empty, cut short",
    ),
    "an adapter lost": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors: no such file",
    ),
    "an adapter config that is none": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "adapter_config.json",
    ),
    "the other half lost": (
        lambda f: torch.save({}, f / "non_lora_trainables.bin"),
        None,  # the base is a LLaVA, its projector stays
    ),
    "the other half cut short": (
        lambda f: cut(f / "non_lora_trainables.bin"),
        "non_lora_trainables.bin: empty, cut short",
    ),
    "another projector": (
        lambda f: torch.save(
            {"base_model.model.model.mm_projector.0.weight": torch.ones(7, 32)},
            f / "non_lora_trainables.bin",
        ),
        r"mm_projector.0.weight has shape \(7, 32\), expected \(48, 32\)",
    ),
    "an empty tensor": (
        empty(
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
            "adapter_model.safetensors",
        ),
        r"adapter_model.safetensors: .*up_proj.lora_A.weight is empty, of shape \(0,\)",
    ),
    "an empty projector": (
        empty("base_model.model.model.mm_projector.0.weight", "non_lora_trainables.bin"),
        "non_lora_trainables.bin: .*mm_projector.0.weight is empty",
    ),
    "another base's width": (
        lambda f: widen(f / "adapter_model.safetensors"),
        r"down_proj.lora_A.weight has shape \(4, 128\), expected \(4, 64\)",
    ),
}


def widen(file: Path) -> None:
    state = load_file(file)
    wide = {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in state.items()}
    save_file(wide, file)


@pytest.mark.parametrize("case", BAD_LORA)
def test_bad_lora_folders(full, adapted, copy_of, case):
    spoil, message = BAD_LORA[case]
    folder = copy_of(adapted[0])
    spoil(folder)
    if message is None:
        load(folder, full)
        return
    with pytest.raises(InputError, match=message):
        load(folder, full)


def test_a_lora_without_its_projector_on_a_plain_base(adapted, copy_of, tiny):
    folder = copy_of(adapted[0])
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(InputError, match="no model.mm_projector"):
        load(folder, tiny / "llm")


def test_a_projector_whose_config_is_no_llavas(projector_only, copy_of, tiny):
    folder = copy_of(projector_only)
    change_config(folder, mm_hidden_size=None)
    with pytest.raises(InputError, match="no mm_hidden_size"):
        load(folder, tiny / "llm")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_tower_of_which_a_file_is_cut_short(full, copy_of, tiny, file):
    folder = copy_of(full)
    shutil.copytree(tiny / "vision_tower", folder / "tower")
    change_config(folder, mm_vision_tower="tower")
    cut(folder / "tower" / file)
    with pytest.raises(InputError, match="vision tower .*/tower: (it does not load|no readable)"):
        load(folder)


@pytest.mark.parametrize("base", ["no/such/base", "/no/such/base", "nobase"])
def test_a_base_that_is_not_there(projector_only, base):
    with pytest.raises(InputError, match=f"^{base}: no such folder, looked for from {Path.cwd()}"):
        load(projector_only, base)


def test_a_lora_or_a_projector_is_no_base(adapted, projector_only):
    for folder, hint in ((adapted[0], "merge_lora_weights"), (projector_only, "pretrain_mm_mlp")):
        with pytest.raises(InputError, match=hint):
            load(projector_only, folder)


@pytest.mark.parametrize("device_map", ["auto", {"": "cuda:1"}])
def test_a_quantised_model_is_spread_as_was_asked(device_map):
    assert quantization(4, torch.float16, device_map)["device_map"] == device_map


def test_a_tuned_tower_that_lacks_a_tensor_is_refused(full, copy_of):
    tuned = load(full)
    tuned.tune_vision_tower()
    folder = copy_of(full)
    save_full(tuned, load_tokenizer(str(full)), folder)
    lost = "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"
    change_weights(folder, lambda state: state.pop(lost))
    with pytest.raises(
        InputError, match="checkpoint's vision tower: .*post_layernorm.bias is miss"
    ):
        load(folder)


def test_quantising_without_bitsandbytes_says_what_to_install(full, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "bitsand" in name else find(name, *a)
    )
    with pytest.raises(InputError, match=r"fedllava\[quant\]"):
        load(full, load_4bit=True)


def test_a_projector_goes_onto_its_base_though_training_added_a_token(tiny, flags, tmp_path):
    """`mm_use_im_patch_token` is on by default, and a vocabulary may have no spare row for it."""
    from transformers import AutoModelForCausalLM

    tokenizer, llm, out = load_tokenizer(str(tiny / "llm")), tmp_path / "llm", tmp_path / "out"
    base = AutoModelForCausalLM.from_pretrained(tiny / "llm")
    base.resize_token_embeddings(rows := len(tokenizer))
    base.save_pretrained(llm)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tiny / "llm" / file, llm)
    more = {"model_name_or_path": llm, "mm_use_im_patch_token": True, "max_steps": 1}
    train(argv=flags(data_path=tiny / "a.json", output_dir=out, **more))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows + 1
    loaded = load(out, llm)
    embedding = loaded.get_input_embeddings().weight
    torch.testing.assert_close(embedding[:rows], base.get_input_embeddings().weight)
    torch.testing.assert_close(embedding[rows], embedding[:rows].mean(0))
    assert logits(loaded).shape[-1] == rows + 1
