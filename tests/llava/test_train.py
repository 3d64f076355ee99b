"""`llava.train`: what is saved, resume to the bit, validation loss, what comes back from disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llava.errors import InputError
from llava.eval.run_llava import arguments, eval_model
from llava.model.builder import load_pretrained_model
from llava.train.arguments import ModelArguments, TrainingArguments, modernise, parse
from llava.train.llava_trainer import last_checkpoint
from llava.train.train import choose_attention, train

ROOT = Path(__file__).parents[2]


def test_a_projector_only_run_saves_the_projector_and_upstreams_config(flags, tiny, tmp_path):
    train(argv=flags(data_path=tiny / "a.json", save_strategy="steps", save_steps=2,
                     save_total_limit=1))  # fmt: skip
    out = tmp_path / "out"
    assert {"mm_projector.bin", "config.json", "trainer_state.json"} <= {
        p.name for p in out.iterdir()
    }
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-6"]
    state = torch.load(out / "mm_projector.bin", weights_only=True)
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == {
        "model.mm_projector.0.weight": ((48, 32), torch.float32),
        "model.mm_projector.0.bias": ((48,), torch.float32),
        "model.mm_projector.2.weight": ((48, 48), torch.float32),
        "model.mm_projector.2.bias": ((48,), torch.float32),
    }
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    expected = {
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": True,
        "use_mm_proj": True,
        "image_aspect_ratio": "square",
        "tokenizer_padding_side": "right",
    }
    assert {key: config[key] for key in expected} == expected


def test_resume_is_exact_and_passes_over_what_a_killed_save_left(flags, tiny, tmp_path):
    saving = {"data_path": tiny / "a.json", "save_strategy": "steps", "save_steps": 1}
    train(argv=flags(**saving, output_dir=tmp_path / "whole"))
    for step in (2, 4):
        cut = tmp_path / f"cut-{step}"
        cut.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", cut / f"checkpoint-{step}")
        half = cut / f"checkpoint-{step + 1}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step + 1}", half)
        (half / "trainer_state.json").write_text('{"global_step":')
        assert last_checkpoint(str(cut)) == str(cut / f"checkpoint-{step}")
        train(argv=flags(**saving, output_dir=cut))
        a, b = ((tmp_path / n / "mm_projector.bin").read_bytes() for n in ("whole", cut.name))
        assert a == b


def test_resume_within_the_second_epoch_of_grouped_samples_is_exact(flags, tiny, tmp_path):
    saving = {"data_path": tiny / "a.json", "save_strategy": "steps", "save_steps": 1,
              "num_train_epochs": 3, "group_by_modality_length": True}  # fmt: skip
    train(argv=flags(**saving, output_dir=tmp_path / "whole"))
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", cut / "checkpoint-8")
    train(argv=flags(**saving, output_dir=cut))
    a, b = ((tmp_path / n / "mm_projector.bin").read_bytes() for n in ("whole", "cut"))
    assert a == b


def test_validation_loss(flags, tiny, tmp_path):
    train(argv=flags(data_path=tiny / "a.json", eval_data_path=tiny / "heldout.json",
                     evaluation_strategy="steps", eval_steps=3))  # fmt: skip
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_several_epochs_give_the_same_with_and_without_the_feature_cache(flags, tiny, tmp_path):
    for name, cache in (("memory", "memory"), ("off", "off"), ("disk", tmp_path / "features")):
        train(argv=flags(data_path=tiny / "a.json", num_train_epochs=2, feature_cache=cache,
                         output_dir=tmp_path / name))  # fmt: skip
    memory, off, disk = (
        torch.load(tmp_path / name / "mm_projector.bin", weights_only=True)
        for name in ("memory", "off", "disk")
    )
    for name in memory:
        assert torch.equal(memory[name], disk[name])
        torch.testing.assert_close(memory[name], off[name], rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_saves_a_folder_that_loads_and_answers(flags, tiny, tmp_path, capsys):
    train(argv=flags(data_path=tiny / "a.json", tune_mm_mlp_adapter=False, version="v1",
                     learning_rate=1e-4, mm_projector_lr=1e-3,
                     group_by_modality_length=True))  # fmt: skip
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    _, model, processor, context = load_pretrained_model(str(out), None, "any", device="cpu")
    assert processor.crop_size["height"] == 16 and context == 2048
    names = set(model.state_dict())
    assert "model.mm_projector.2.bias" in names
    assert not any("vision_tower" in name for name in names)
    eval_model(ask(out, None, tiny))
    assert capsys.readouterr().out


def ask(path, base, tiny):
    args = arguments(
        ["--model-path", str(path), "--image-file", str(tiny / "images/a-0.png"),
         "--query", "What?", "--max_new_tokens", "4", "--temperature", "0", "--conv-mode", "v1"]
    )  # fmt: skip
    args.model_base = None if base is None else str(base)
    return args


@pytest.fixture(scope="module")
def projector_only(tiny, tmp_path_factory):
    """A folder with a projector and its config."""
    from llava.model.checkpoint import projector_state, write_config
    from llava.state import save
    from llava.train.train import load_session

    out = tmp_path_factory.mktemp("projector")
    argv = ["--model_name_or_path", str(tiny / "llm"), "--vision_tower", str(tiny / "vision_tower"),
            "--version", "plain", "--mm_projector_type", "mlp2x_gelu", "--tune_mm_mlp_adapter",
            "True", "--mm_use_im_patch_token", "False", "--mm_vision_select_layer", "-2",
            "--output_dir", str(out)]  # fmt: skip
    session = load_session(*parse(argv))
    save(projector_state(session.model), out / "mm_projector.bin")
    write_config(session.model.config, out, full=False)
    return out


def test_a_projector_only_folder_answers_with_its_base(projector_only, tiny):
    one = eval_model(ask(projector_only, tiny / "llm", tiny))
    assert one == eval_model(ask(projector_only, tiny / "llm", tiny))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_projectors_of_any_prefix_and_float_load(projector_only, tiny, tmp_path, dtype, prefix):
    state = torch.load(projector_only / "mm_projector.bin", weights_only=True)
    other = {prefix + name.removeprefix("model."): t.to(dtype) for name, t in state.items()}
    shutil.copy(projector_only / "config.json", tmp_path)
    torch.save(other, tmp_path / "mm_projector.bin")
    _, model, _, _ = load_pretrained_model(str(tmp_path), str(tiny / "llm"), "x", device="cpu")
    loaded = model.get_model().mm_projector[0].weight
    assert torch.equal(loaded, state["model.mm_projector.0.weight"].to(dtype).float())


@pytest.mark.parametrize(
    ("spoil", "base", "message"),
    [
        (lambda f: None, None, "--model-base"),
        (lambda f: (f / "mm_projector.bin").write_bytes(b""), "llm", "mm_projector.bin: "),
        (lambda f: (f / "mm_projector.bin").unlink(), "llm", "mm_projector.bin"),
        (lambda f: (f / "config.json").unlink(), "llm", "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "llm", "config.json"),
        (lambda f: (f / "config.json").write_text('{"text_config": {}}'), "llm", "text_config"),
    ],
)
def test_bad_folders(projector_only, tiny, tmp_path, spoil, base, message):
    folder = tmp_path / "folder"
    shutil.copytree(projector_only, folder)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_pretrained_model(str(folder), base and str(tiny / base), "llava", device="cpu")


def test_code_in_a_bin_is_never_run(projector_only, tiny, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "folder"
    shutil.copytree(projector_only, folder)
    (folder / "mm_projector.bin").write_bytes(pickle.dumps({"mm_projector.weight": Bomb()}))
    with pytest.raises(InputError, match="mm_projector.bin"):
        load_pretrained_model(str(folder), str(tiny / "llm"), "llava", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_upstreams_command_line_parses_verbatim():
    """The flags of scripts/v1_5/pretrain.sh are upstream's, renamed and dropped ones included."""
    script = (ROOT / "scripts" / "v1_5" / "pretrain.sh").read_text().replace("\\\n", " ")
    (command,) = [line for line in script.splitlines() if "train_mem.py" in line]
    argv = [word.strip('"') for word in command.split()[2:] if word != '"$@"']
    assert {"--evaluation_strategy", "--warmup_ratio", "--lazy_preprocess", "--tf32"} <= set(argv)
    at = argv.index("--deepspeed")
    model_args, data_args, training_args = parse(argv[:at] + argv[at + 2 :])
    assert model_args.tune_mm_mlp_adapter and model_args.mm_projector_type == "mlp2x_gelu"
    assert training_args.warmup_steps == 0.03 and training_args.eval_strategy == "no"
    assert training_args.get_warmup_steps(1000) == 30
    assert data_args.image_aspect_ratio == "square"


def test_modernise_knows_both_ways_of_writing_a_flag():
    argv = ["--lazy_preprocess=True", "--warmup_ratio=0.1", "--lazy_preprocess", "--a", "1"]
    assert modernise(argv) == ["--warmup_steps", "0.1", "--a", "1"]


def test_upstreams_defaults():
    model_args, _, training_args = parse(["--output_dir", "x"], ModelArguments, *parse_rest())
    assert (model_args.mm_projector_type, model_args.mm_vision_select_layer) == ("linear", -1)
    assert training_args.model_max_length == 512 and training_args.lora_r == 64
    assert training_args.optim == "adamw_torch" and not training_args.remove_unused_columns


def parse_rest() -> tuple[type, type]:
    from llava.train.arguments import DataArguments

    return DataArguments, TrainingArguments


def test_attention_falls_back_with_a_word(capsys):
    assert choose_attention("flash_attention_2", "cpu") == "sdpa"
    assert "sdpa" in capsys.readouterr().out
    assert choose_attention(None, "cpu") == "sdpa" and choose_attention("eager", "cpu") == "eager"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_enable": True}, "lora_enable"),
        ({"bits": 4}, "--bits 4"),
        ({"data_path": None}, "data_path"),
        ({"freeze_mm_mlp_adapter": True}, "nothing would train"),
        ({"model_name_or_path": "no/such/model"}, "no/such/model"),
        ({"pretrain_mm_mlp_adapter": "none.bin"}, "none.bin"),
    ],
)
def test_bad_flags(flags, tiny, changes, message):
    with pytest.raises(InputError, match=message):
        train(argv=flags(**{"data_path": tiny / "a.json", **changes}))
