"""`llava.train`: what is saved, resume to the bit, validation loss, what comes back from disk."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.training_args import ParallelMode

from llava.errors import InputError
from llava.eval.run_llava import arguments, eval_model
from llava.model.attention_impl import choose_attention
from llava.model.builder import from_pretrained, load_pretrained_model, load_tokenizer
from llava.model.checkpoint import projector_state, read_config, save_full, write_config
from llava.progress import progress_shown
from llava.state import save
from llava.train.arguments import ModelArguments, TrainingArguments, _check, modernise, parse
from llava.train.llava_trainer import (
    LLaVATrainer,
    checkpoints,
    last_checkpoint,
    remove_oldest,
)
from llava.train.session import (
    load_session,
    smart_tokenizer_and_embedding_resize,
)
from llava.train.train import train

ROOT = Path(__file__).parents[3]


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


def test_resume_is_exact_and_puts_away_what_a_killed_save_left(flags, tiny, tmp_path, capsys):
    saving = {"data_path": tiny / "a.json", "save_strategy": "steps", "save_steps": 1}
    train(argv=flags(**saving, output_dir=tmp_path / "whole"))
    for step in (2, 4):
        cut = tmp_path / f"cut-{step}"
        cut.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", cut / f"checkpoint-{step}")
        half = cut / f"checkpoint-{step + 1}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step + 1}", half)
        (half / "trainer_state.json").write_text('{"global_step":')
        with progress_shown():
            assert last_checkpoint(str(cut)) == str(cut / f"checkpoint-{step}")
        said = f"{half}: cannot be continued; now called incomplete-{half.name}"
        assert said in capsys.readouterr().out
        train(argv=flags(**saving, output_dir=cut))
        a, b = ((tmp_path / n / "mm_projector.bin").read_bytes() for n in ("whole", cut.name))
        assert a == b


def test_a_full_disk_is_one_clear_error(flags, tiny, monkeypatch):
    def full(trainer, folder):
        torch.save(trainer.optimizer.state_dict(), "/dev/full")

    monkeypatch.setattr(LLaVATrainer, "_save_optimizer_and_scheduler", full)
    saving = {"data_path": tiny / "a.json", "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(InputError, match="checkpoint of step 2 cannot be written whole; .* GB"):
        train(argv=flags(**saving))


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
    assert len(losses) == 2
    assert losses[1] < losses[0]


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
    assert processor.crop_size["height"] == 16
    assert context == 2048
    names = set(model.state_dict())
    assert "model.mm_projector.2.bias" in names
    assert not any("vision_tower" in name for name in names)
    eval_model(ask(out, None, tiny))
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    """A full LLaVA of random weights; its projector is like no other."""
    model = load_session(*parse(session_flags(tiny, tmp_path_factory.mktemp("none")))).model
    out = tmp_path_factory.mktemp("full")
    torch.nn.init.normal_(model.get_model().mm_projector[2].bias)
    save_full(model, load_tokenizer(str(tiny / "llm")), out)
    return out


def test_fine_tuning_goes_on_from_a_full_llavas_own_projector(flags, tiny, full, tmp_path):
    start = {"model_name_or_path": full, "tune_mm_mlp_adapter": False, "version": "v1"}
    given = {"data_path": tiny / "a.json", "learning_rate": 0, "max_steps": 1, "save_steps": 1,
             "save_strategy": "steps"}  # fmt: skip
    train(argv=flags(**start, **given))
    out = tmp_path / "out"
    before, after = (load_file(folder / "model.safetensors") for folder in (full, out))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    with pytest.raises(InputError, match="--mm_projector_type is 'linear'.*'mlp2x_gelu'"):
        train(argv=flags(**start, **given, mm_projector_type="linear", output_dir=tmp_path / "b"))


@pytest.mark.parametrize("lora", [False, True])
def test_a_tuned_tower_is_saved_resumed_to_the_bit_and_loaded(flags, tiny, tmp_path, lora):
    tuning = {"data_path": tiny / "a.json", "tune_mm_mlp_adapter": False, "version": "v1",
              "unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1e-3, "lora_enable": lora,
              "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3}  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(argv=flags(**tuning, output_dir=whole))
    shutil.copytree(whole / "checkpoint-3", cut / "checkpoint-3")
    train(argv=flags(**tuning, output_dir=cut))
    key = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    if lora:
        a, b = (torch.load(f / "non_lora_trainables.bin", weights_only=True) for f in (whole, cut))
        key = f"base_model.model.{key}"
    else:
        a, b = (load_file(f / "model.safetensors") for f in (whole, cut))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert json.loads((whole / "config.json").read_text())["unfreeze_mm_vision_tower"] is True

    base = str(tiny / "llm") if lora else None
    _, model, _, _ = load_pretrained_model(str(whole), base, "any", device="cpu")
    tower = model.get_vision_tower().vision_tower
    (loaded,) = [p for n, p in tower.named_parameters() if n.endswith("layers.0.mlp.fc1.weight")]
    assert torch.equal(loaded, a[key])


def test_a_full_run_resumes_to_the_bit(flags, tiny, tmp_path):
    saving = {"data_path": tiny / "a.json", "tune_mm_mlp_adapter": False, "version": "v1",
              "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2,
              "save_total_limit": 2}  # fmt: skip
    train(argv=flags(**saving, output_dir=tmp_path / "whole"))
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", cut / "checkpoint-4")
    train(argv=flags(**saving, output_dir=cut))
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert a == b


def test_the_best_checkpoint_comes_back_at_the_end(flags, tiny, tmp_path):
    train(argv=flags(data_path=tiny / "a.json", eval_data_path=tiny / "heldout.json", max_steps=4,
                     eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                     load_best_model_at_end=True, metric_for_best_model="eval_loss",
                     greater_is_better=True, lr_scheduler_type="constant"))  # fmt: skip
    out = tmp_path / "out"
    best = json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best.endswith("checkpoint-1")
    a, b = ((Path(f) / "mm_projector.bin").read_bytes() for f in (best, out))
    assert a == b


@pytest.mark.parametrize("lora", [False, True])
def test_tiles_train(flags, tiny, tmp_path, lora):
    train(argv=flags(data_path=tiny / "a.json", tune_mm_mlp_adapter=not lora, lora_enable=lora,
                     image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad",
                     num_train_epochs=2))  # fmt: skip
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    run = [entry["loss"] for entry in history if "loss" in entry]
    assert run[-1] < run[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_grid_pinpoints"][0] == [16, 32]


def ask(path, base, tiny):
    args = arguments(
        ["--model-path", str(path), "--image-file", str(tiny / "images/a-0.png"),
         "--query", "What?", "--max_new_tokens", "4", "--temperature", "0", "--conv-mode", "v1"]
    )  # fmt: skip
    args.model_base = None if base is None else str(base)
    return args


def session_flags(tiny, out) -> list[str]:
    return ["--model_name_or_path", str(tiny / "llm"), "--vision_tower", str(tiny / "vision_tower"),
            "--version", "plain", "--mm_projector_type", "mlp2x_gelu", "--tune_mm_mlp_adapter",
            "True", "--mm_use_im_patch_token", "False", "--mm_vision_select_layer", "-2",
            "--output_dir", str(out)]  # fmt: skip


@pytest.fixture(scope="module")
def projector_only(tiny, tmp_path_factory):
    """A folder with a projector and its config."""
    out = tmp_path_factory.mktemp("projector")
    session = load_session(*parse(session_flags(tiny, out)))
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
    assert model_args.tune_mm_mlp_adapter
    assert model_args.mm_projector_type == "mlp2x_gelu"
    assert training_args.warmup_steps == 0.03
    assert training_args.eval_strategy == "no"
    assert training_args.get_warmup_steps(1000) == 30
    assert data_args.image_aspect_ratio == "square"


def test_modernise_knows_both_ways_of_writing_a_flag():
    argv = ["--lazy_preprocess=True", "--warmup_ratio=0.1", "--lazy_preprocess", "--a", "1"]
    assert modernise(argv) == ["--warmup_steps", "0.1", "--a", "1"]


@pytest.mark.filterwarnings("error")
def test_gradient_checkpointing_by_its_old_name_is_no_warning():
    assert parse(["--gradient_checkpointing", "True"])[2].gradient_checkpointing
    assert not parse([])[2].gradient_checkpointing


def test_a_process_takes_one_gpu(capsys):
    args = parse(["--per_device_train_batch_size", "3"])[2]
    args._n_gpu = 4  # what transformers counts when there is no launcher
    with progress_shown():
        _check(args)
    assert "1 of 4 GPUs" in capsys.readouterr().out
    assert args.n_gpu == 1
    assert args.train_batch_size == 3
    assert args.parallel_mode == ParallelMode.NOT_PARALLEL


@pytest.mark.parametrize(
    ("text", "message"), [(None, "No such file"), ('{"zero": ', "this is not JSON"), ("", "JSON")]
)
def test_the_last_deepspeed_file_is_the_one_that_counts(tmp_path, text, message):
    good, file = tmp_path / "good.json", tmp_path / "last.json"
    good.write_text("{}")
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=f"--deepspeed {file}: .*{message}"):
        parse(["--deepspeed", str(good), "--deepspeed", str(file)])


@pytest.mark.parametrize(
    ("changes", "package", "message"),
    [
        ({"optim": "galore_adamw"}, "galore_torch", "--optim galore_adamw: .*GaLore"),
        ({"use_liger_kernel": True}, "liger_kernel", "liger"),
        ({"report_to": "swanlab"}, "swanlab", "--report_to .*swanlab"),
    ],
)
def test_a_package_that_a_flag_needs_is_named(flags, tiny, changes, package, message):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(InputError, match=message):
        train(argv=flags(data_path=tiny / "a.json", **changes))


def test_deepspeed_without_its_package_is_one_sentence(tmp_path):
    """In a process of its own, for which the package is not there."""
    file = tmp_path / "zero2.json"
    file.write_text("{}")
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from llava.train.train import main\n"
        f"sys.argv = ['train', '--deepspeed', '{file}']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: --deepspeed needs the package deepspeed: pip install 'fedllava[train]'" in (
        done.stderr
    )


def test_a_near_flag_is_named_once():
    with pytest.raises(InputError, match="did you mean --mm_projector_type or") as caught:
        parse(["--mm_projector_tipe", "linear"])
    assert "mm-projector" not in str(caught.value)


def test_the_padding_token_is_set_without_a_word(flags, tiny, caplog):
    loggers = logging.getLogger("transformers")
    loggers.addHandler(caplog.handler)
    try:
        train(argv=flags(data_path=tiny / "b.json", max_steps=1))
    finally:
        loggers.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_upstreams_names_are_there():
    import llava.train.llava_trainer
    import llava.train.train
    import llava.train.train_xformers

    for name in llava.train.train.__all__:
        assert callable(getattr(llava.train.train, name))
    assert llava.train.llava_trainer.LengthGroupedSampler
    assert llava.train.train_xformers.main


def test_added_tokens_start_as_the_mean_of_the_others(tiny):
    model = from_pretrained(str(tiny / "llm"), read_config(tiny / "llm"), dtype=torch.float32)
    tokenizer = load_tokenizer(str(tiny / "llm"))
    known, rows = len(tokenizer), model.config.vocab_size
    more = [f"<{i}>" for i in range(rows - known + 3)]
    smart_tokenizer_and_embedding_resize({"additional_special_tokens": more}, tokenizer, model)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert len(weight) == len(tokenizer) == rows + 3
        torch.testing.assert_close(weight[rows:], weight[:rows].mean(0).expand(3, -1))


def test_upstreams_defaults():
    model_args, _, training_args = parse(["--output_dir", "x"], ModelArguments, *parse_rest())
    assert (model_args.mm_projector_type, model_args.mm_vision_select_layer) == ("linear", -1)
    assert training_args.model_max_length == 512
    assert training_args.lora_r == 64
    assert training_args.optim == "adamw_torch"
    assert not training_args.remove_unused_columns


def parse_rest() -> tuple[type, type]:
    from llava.train.arguments import DataArguments

    return DataArguments, TrainingArguments


def test_attention_falls_back_with_a_word(caplog):
    assert choose_attention("flash_attention_2", "cpu") == "sdpa"
    assert "sdpa" in caplog.text
    assert choose_attention(None, "cpu") == "sdpa"
    assert choose_attention("eager", "cpu") == "eager"


@pytest.mark.parametrize(
    ("capability", "compute", "chosen"),
    [
        ((8, 0), torch.bfloat16, "flash_attention_2"),
        ((9, 0), None, "flash_attention_2"),
        ((7, 5), torch.float16, "sdpa"),
        ((8, 6), torch.float32, "sdpa"),
    ],
)
def test_flash_attention_runs_on_new_gpus_in_16_bits(monkeypatch, capability, compute, chosen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert choose_attention("flash_attention_2", "cuda", compute) == chosen


def test_data_that_teach_nothing_are_refused_or_left_out(flags, tiny, tmp_path, capfd):
    def told(**changes) -> str:
        with pytest.raises(InputError) as caught:
            train(argv=flags(version="v1", data_path=tmp_path / "a.json", **changes))
        return str(caught.value)

    records = json.loads((tiny / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert "of 12 model_max_length 40 cuts the answer off" in told(model_max_length=40)
    for record in records[:10]:
        record["conversations"][1]["value"] = ""
    (tmp_path / "a.json").write_text(json.dumps(records[:10]))
    assert "a.json: there is nothing to learn in it: of 10 records, 10 have" in told()
    (tmp_path / "a.json").write_text(json.dumps(records))
    train(argv=flags(version="v1", data_path=tmp_path / "a.json"))
    assert "training: 2 samples, 10 left out: their answers are" in capfd.readouterr().out
    records[11]["conversations"][1]["value"] = "blue \ud83c"
    (tmp_path / "a.json").write_text(json.dumps(records))
    half = told(output_dir=tmp_path / "other")
    assert "a.json: record 11 (id 'a-11') has half a character" in half


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": None}, "data_path"),
        ({"data_path": "none.json", "model_name_or_path": "no/such/model"}, "none.json: no such"),
        ({"version": "v7", "model_name_or_path": "no/such/model"}, "'v7' is no conversation"),
        ({"freeze_mm_mlp_adapter": True}, "nothing would train"),
        ({"model_name_or_path": "no/such/model"}, "no/such/model"),
        ({"pretrain_mm_mlp_adapter": "none.bin"}, "none.bin"),
    ],
)
def test_bad_flags(flags, tiny, changes, message):
    with pytest.raises(InputError, match=message):
        train(argv=flags(**{"data_path": tiny / "a.json", **changes}))


def test_upstreams_checkpoints_of_a_projector_are_put_aside_and_not_lost(flags, tiny, tmp_path):
    old = tmp_path / "out" / "checkpoint-1"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    (old / "mm_projector.bin").write_bytes(b"of an earlier night")
    train(argv=flags(data_path=tiny / "a.json", save_strategy="steps", save_steps=3,
                     save_total_limit=1))  # fmt: skip
    assert {p.name for p in (tmp_path / "out").glob("*checkpoint*")} == {
        "checkpoint-6",
        "incomplete-checkpoint-1",
    }
    kept = tmp_path / "out" / "incomplete-checkpoint-1" / "mm_projector.bin"
    assert kept.read_bytes() == b"of an earlier night"


def test_weights_without_a_trainers_state_are_put_aside_and_half_a_save_is_removed(tmp_path):
    for time in range(3):
        for step in (5, 7):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "model.safetensors").write_text(f"of step {step}, time {time}")
        (tmp_path / "checkpoint-5/config.json").write_text("{}")
        assert last_checkpoint(str(tmp_path)) is None
    names = ["incomplete-checkpoint-5", "incomplete-checkpoint-5.2", "incomplete-checkpoint-5.3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    kept = [(tmp_path / name / "model.safetensors").read_text() for name in names]
    assert kept == [f"of step 5, time {time}" for time in range(3)]


def test_a_checkpoint_that_cannot_be_read_now_is_left_where_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")

    def fails(path, *args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(InputError, match="checkpoint-5/trainer_state.json cannot be read"):
        last_checkpoint(str(tmp_path))
    assert folder.is_dir()


def test_the_oldest_checkpoints_are_those_of_the_least_steps_whatever_the_clock_says(tmp_path):
    for age, step in enumerate((10, 3, 2, 9)):  # a clock that runs backwards
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (age, age))
    (tmp_path / "checkpoint-best").mkdir()
    remove_oldest(tmp_path, 3)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (3, 9, 10)]
    remove_oldest(tmp_path, 1, best=str(tmp_path / "checkpoint-3"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-10"]
    assert (tmp_path / "checkpoint-best").is_dir()


def test_what_has_diverged_is_not_saved(flags, tiny, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    wild = {"learning_rate": 1e30, "warmup_steps": 2, "max_grad_norm": 0}  # the first step is of 0
    with pytest.raises(InputError, match="has diverged, .*mm_projector.* after step [2-6];"):
        train(argv=flags(data_path=tiny / "a.json", **saving, **wild))
    (kept,) = checkpoints(tmp_path / "out")
    state = torch.load(kept / "mm_projector.bin", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not (tmp_path / "out/mm_projector.bin").exists()


def test_workers_share_the_data_whatever_way_python_starts_processes(flags, tiny, tmp_path):
    """From Python 3.14 on they are served by a process that has to be sent all that they need."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        # With two epochs the features are kept in memory.
        argv = flags(data_path=tiny / "a.json", dataloader_num_workers=2, num_train_epochs=2)
        train(argv=argv)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert (tmp_path / "out" / "mm_projector.bin").is_file()
