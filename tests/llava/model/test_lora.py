"""LoRA and QLoRA: what is saved, that it resumes to the bit, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava.errors import InputError
from llava.model import lora
from llava.model.builder import from_pretrained
from llava.model.checkpoint import model_class, read_config
from llava.train.arguments import parse
from llava.train.llava_trainer import LLaVATrainer
from llava.train.session import load_session
from llava.train.train import train

LAYERS = {
    f"base_model.model.model.layers.{i}.{layer}"
    for i in (0, 1)
    for layer in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
}
ADAPTER_KEYS = {f"{layer}.lora_{half}.weight" for layer in LAYERS for half in "AB"}
PROJECTOR_KEYS = {
    f"base_model.model.model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
}
TRIPLE = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "non_lora_trainables.bin",
    "trainer_state.json",
}


@pytest.fixture
def lora_flags(flags, tiny):
    """The flags of a small LoRA run that trains the projector, too; as `flags`."""

    def make(**changes) -> list[str]:
        values = {
            "data_path": tiny / "a.json",
            "tune_mm_mlp_adapter": False,
            "version": "v1",
            "lora_enable": True,
            "lora_r": 4,
            "lora_alpha": 8,
            "mm_projector_lr": 1e-3,
        }
        return flags(**{**values, **changes})

    return make


def parts(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a LoRA folder."""
    adapter = load_file(folder / "adapter_model.safetensors")
    return {**adapter, **torch.load(folder / "non_lora_trainables.bin", weights_only=True)}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def losses(folder: Path, key: str = "loss") -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


# -- runs -----------------------------------------------------------------------------------------


def test_a_run_and_each_of_its_checkpoints_leave_upstreams_three_parts(lora_flags, tiny, tmp_path):
    train(argv=lora_flags(save_strategy="steps", save_steps=2, save_total_limit=2,
                          eval_data_path=tiny / "heldout.json", eval_strategy="steps",
                          eval_steps=3))  # fmt: skip
    out = tmp_path / "out"
    assert names(out) == TRIPLE | {"run.json"}
    checkpoints = sorted(out.glob("checkpoint-*"))
    assert [folder.name for folder in checkpoints] == ["checkpoint-4", "checkpoint-6"]
    for folder in (out, *checkpoints):
        assert names(folder) >= TRIPLE
        assert load_file(folder / "adapter_model.safetensors").keys() == ADAPTER_KEYS
        others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        assert others.keys() == PROJECTOR_KEYS
    assert differing(parts(out), parts(checkpoints[-1])) == set()

    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["mm_projector_lr"] == 1e-3
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (4, 8, 0.05)
    assert adapter["target_modules"] == sorted({name.rpartition(".")[2] for name in LAYERS})
    # peft 0.7, which upstream's users have, dies of a key that it does not know.
    assert not {"exclude_modules", "use_dora", "lora_bias", "peft_version"} & adapter.keys()

    validation = losses(out, "eval_loss")
    assert len(validation) == 2
    assert validation[1] < validation[0]


@pytest.mark.parametrize("grouped", [False, True])
def test_resume_within_the_second_epoch_is_exact(lora_flags, tmp_path, grouped):
    """Projector, LoRA, their optimizer, the schedule, the order of samples, and dropout's RNG."""
    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2,
              "group_by_modality_length": grouped}  # fmt: skip
    train(argv=lora_flags(**saving, output_dir=tmp_path / "whole"))
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", cut / "checkpoint-8")
    # What a killed save left behind.
    shutil.copytree(tmp_path / "whole" / "checkpoint-9", cut / "checkpoint-9")
    (cut / "checkpoint-9" / "trainer_state.json").unlink()
    assert differing(parts(cut / "checkpoint-8"), parts(tmp_path / "whole"))
    train(argv=lora_flags(**saving, output_dir=cut))
    assert differing(parts(tmp_path / "whole"), parts(cut)) == set()


@pytest.mark.parametrize(
    "way",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"freeze_mm_mlp_adapter": True},
        {"freeze_backbone": True},
        {"lora_bias": "all", "mm_projector_lr": None},
        {"vision_tower": None, "data_path": "text"},
    ],
    ids=lambda way: next(iter(way)),
)
def test_lora_learns(lora_flags, tiny, tmp_path, way):
    if way.get("data_path") == "text":
        records = [
            {
                "conversations": [
                    {"from": "human", "value": "What?"},
                    {"from": "gpt", "value": "red"},
                ]
            }
        ]
        (tmp_path / "text.json").write_text(json.dumps(records * 12))
        way = {**way, "data_path": tmp_path / "text.json"}
    train(argv=lora_flags(**way, num_train_epochs=2))
    run = losses(tmp_path / "out")
    assert sum(run[-3:]) < sum(run[:3]) - 0.2
    frozen = way.get("freeze_mm_mlp_adapter") or "vision_tower" in way
    expected = ADAPTER_KEYS if frozen else ADAPTER_KEYS | PROJECTOR_KEYS
    assert parts(tmp_path / "out").keys() == expected


def test_lora_weight_path_goes_on_from_a_folder(lora_flags, folder, tmp_path):
    start = {"lora_weight_path": folder, "lora_r": 16}  # the folder's rank holds
    train(argv=lora_flags(**start, learning_rate=0, mm_projector_lr=0))
    assert differing(parts(folder), parts(tmp_path / "out")) == set()
    train(argv=lora_flags(**start, output_dir=tmp_path / "on"))
    moved = differing(parts(folder), parts(tmp_path / "on"))
    assert {name.replace("lora_A", "lora_B") for name in moved} >= PROJECTOR_KEYS | {
        name for name in ADAPTER_KEYS if "lora_B" in name
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_learns_beside_quantised_weights(lora_flags, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    argv = lora_flags(bits=bits, num_train_epochs=3)
    session = load_session(*parse(argv))
    layer = session.model.get_model().layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert type(session.model.get_model().mm_projector[0]) is nn.Linear
    assert type(session.model.get_base_model().lm_head) is nn.Linear

    seen = {}
    trainer_init = LLaVATrainer.__init__

    def remember(self, model, **kwargs):
        seen["model"], seen["before"] = model, quantised(model)
        trainer_init(self, model=model, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLaVATrainer, "__init__", remember)
        train(argv=argv)
    assert len(seen["before"]) == 14
    assert differing(seen["before"], quantised(seen["model"])) == set()
    run = losses(tmp_path / "out")
    assert sum(run[-3:]) < sum(run[:3]) - 0.5
    assert parts(tmp_path / "out").keys() == ADAPTER_KEYS | PROJECTOR_KEYS
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def quantised(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: p for name, p in found.items() if not p.is_floating_point()}


def test_the_projector_alone_trains_on_a_quantised_model(flags, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    train(argv=flags(data_path=tiny / "a.json", bits=4, quant_type="fp4", num_train_epochs=3))
    assert {"mm_projector.bin", "config.json"} <= names(tmp_path / "out")
    run = losses(tmp_path / "out")
    assert run[-1] < run[0]


# -- a model gets LoRA ----------------------------------------------------------------------------


def make_model(tiny: Path, llm: str | Path = "llm", **changes):
    """A model with a projector, and a config that may differ from that of its weights."""
    config = read_config(tiny / llm)
    values = {"mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
              "mm_vision_tower": str(tiny / "vision_tower"), **changes}  # fmt: skip
    for key, value in values.items():
        setattr(config, key, value)
    return from_pretrained(str(tiny / llm), config, dtype=torch.float32)


def test_lora_stays_out_of_a_tower_that_trains(tiny, tmp_path):
    """The tower's layers are called as the language model's (q_proj, …)."""
    model = make_model(tiny)
    tower = model.load_vision_tower(torch.float32, "cpu")
    model.tune_vision_tower()
    wrapped = lora.add_lora(model, r=4, alpha=8, dropout=0.0)
    assert lora.adapter_state(wrapped).keys() == ADAPTER_KEYS
    tower.requires_grad_(True)
    lora.save_lora(wrapped, tmp_path)
    stored = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    prefix = "base_model.model.model.vision_tower.vision_tower.vision_model."
    assert f"{prefix}encoder.layers.0.self_attn.q_proj.weight" in stored

    again = make_model(tiny)
    again.load_vision_tower(torch.float32, "cpu")
    again.tune_vision_tower()
    names_before = list(again.state_dict())
    attached = lora.attach_lora(again, tmp_path)
    assert lora.adapter_state(attached).keys() == ADAPTER_KEYS
    assert list(attached.unload().state_dict()) == names_before


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_train_and_return_as_lora_bias_says(tiny, tmp_path, bias):
    import transformers

    config = transformers.Qwen2Config(vocab_size=40, hidden_size=16, intermediate_size=24,
                                      num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=2, mm_hidden_size=8,
                                      mm_projector_type="linear")  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config)(config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = lora.add_lora(model, r=2, alpha=2, dropout=0.0, bias=bias)
    wrapped.get_model().mm_projector.requires_grad_(True)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    of_layers = {name for name in trained if name.endswith("base_layer.bias")}
    assert len(of_layers) == (0 if bias == "none" else 3)  # of q, k and v
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name in trained:
                parameter.normal_()
    lora.save_lora(wrapped, tmp_path)
    assert of_layers <= load_file(tmp_path / "adapter_model.safetensors").keys()

    again = model_class(config)(config)
    again.load_state_dict(start)
    lora.load_non_lora(again, lora.read_non_lora(tmp_path), "it")
    attached = lora.attach_lora(again, tmp_path)
    ids = torch.arange(9)[None]
    assert torch.equal(attached.eval()(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits)


# -- folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """A LoRA folder whose every tensor differs from what it started as."""
    out = tmp_path_factory.mktemp("lora")
    model = lora.add_lora(make_model(tiny), r=4, alpha=8, dropout=0.05)
    model.get_model().mm_projector.requires_grad_(True)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    lora.save_lora(model, out)
    return out


def test_what_is_attached_and_merged_computes_the_same(tiny, folder):
    ids = torch.arange(20)[None]
    wrapped = lora.attach_lora(make_model(tiny), folder).eval()
    assert not any(p.requires_grad for p in wrapped.parameters())
    logits = wrapped(input_ids=ids).logits
    assert (logits - make_model(tiny)(input_ids=ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(wrapped.merge_and_unload()(input_ids=ids).logits, logits)


def test_only_the_rank_that_writes_does(tiny, folder, tmp_path):
    lora.save_lora(lora.attach_lora(make_model(tiny), folder), tmp_path, write=False)
    assert list(tmp_path.iterdir()) == []


def test_the_non_lora_part_has_the_models_own_names(folder, tmp_path):
    own = {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert lora.read_non_lora(folder).keys() == own
    # Files that were saved without peft's prefix, or by one that named the base layer.
    stored = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    stored = {name.removeprefix("base_model."): tensor for name, tensor in stored.items()}
    stored["base_model.model.model.layers.0.mlp.up_proj.base_layer.bias"] = torch.zeros(2)
    torch.save(stored, tmp_path / "non_lora_trainables.bin")
    expected = own | {"model.layers.0.mlp.up_proj.bias"}
    assert lora.read_non_lora(tmp_path).keys() == expected


def edit(file: str, change):
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return spoil


def cut(file: str):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


ONE = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "'IA3'"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no such file"),
        (cut("adapter_model.safetensors"), "adapter_model.safetensors: empty, cut short"),
        (edit("adapter_model.safetensors", lambda t: t.pop(ONE)), f"{ONE} is missing"),
        (
            edit("adapter_model.safetensors", lambda t: t.update({ONE + "x": t[ONE].clone()})),
            "not expected",
        ),
        (
            edit("adapter_model.safetensors", lambda t: t.update({ONE: t[ONE] / 0})),
            "NaN or infinite",
        ),
    ],
)
def test_broken_adapters(tiny, folder, tmp_path, spoil, message):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    spoil(broken)
    with pytest.raises(InputError, match=message):
        lora.attach_lora(make_model(tiny), broken)


def test_an_adapter_of_another_base_is_refused_and_nothing_is_changed(tiny, folder):
    config = read_config(tiny / "llm")
    config.update({"hidden_size": 64, "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu"})
    model = model_class(config)(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"shape \(.*\), expected \(.*another base model"):
        lora.attach_lora(model, folder)
    with pytest.raises(InputError, match=r"mm_projector.* shape .*another base model"):
        lora.load_non_lora(model, lora.read_non_lora(folder), "non_lora_trainables.bin")
    assert differing(before, model.state_dict()) == set()

    other_projector = make_model(tiny, mm_projector_type="linear")
    with pytest.raises(InputError, match="mm_projector"):
        lora.load_non_lora(other_projector, lora.read_non_lora(folder), "non_lora_trainables.bin")


def test_what_trained_otherwise_is_not_resumed(tiny, folder, tmp_path):
    model = lora.attach_lora(make_model(tiny), folder, trainable=True)
    with pytest.raises(InputError, match="mm_projector.* is not expected"):  # it is frozen now
        lora.load_lora(model, folder)
    model.requires_grad_(True)
    with pytest.raises(InputError, match=r"non_lora_trainables\.bin: .* is missing"):
        lora.load_lora(model, folder)


def test_code_in_the_non_lora_part_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "non_lora_trainables.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(InputError, match=r"non_lora_trainables\.bin: "):
        lora.read_non_lora(tmp_path)
    assert not (tmp_path / "ran").exists()


# -- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "--bits is 5; known are 4, 8, 16"),
        ({"bits": 4, "lora_enable": False}, "quantised weights do not train"),
        ({"quant_type": "int4"}, "--quant_type"),
        ({"lora_r": 0}, "--lora_r is 0"),
        ({"lora_dropout": 1}, "--lora_dropout"),
        ({"lora_bias": "some"}, "--lora_bias"),
        ({"tune_mm_mlp_adapter": True}, "projector alone"),
        ({"lora_enable": False, "lora_weight_path": "x"}, "--lora_enable True only"),
        ({"lora_weight_path": "no/such/folder"}, "no/such/folder"),
        ({"fp16": True}, "--fp16 True needs a GPU"),
        ({"unfreeze_mm_vision_tower": True, "feature_cache": "x"}, "--feature_cache x"),
        ({"unfreeze_mm_vision_tower": True, "vision_tower": None}, "--vision_tower"),
    ],
)
def test_bad_flags(lora_flags, changes, message):
    with pytest.raises(InputError, match=message):
        train(argv=lora_flags(**changes))


def test_bits_without_bitsandbytes_name_the_extra(lora_flags, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"fedllava\[quant\]"):
        parse(lora_flags(bits=4))
