"""The bash scripts and the small tools: upstream's flags, and what they write."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file

from fed import validation
from fed.methods.pilot.personalise import PersonaliseArguments
from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token
from llava.model import apply_delta, consolidate, make_delta
from llava.model.builder import load_pretrained_model
from llava.model.shards import Shards, write_shards
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
UPSTREAM = ROOT / "tests" / "golden" / "upstream"

# Upstream's command lines, as in haotian-liu/LLaVA at c121f043, variables filled in.
_PICTURES = "--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False"
_V15_TOWER = "--vision_tower openai/clip-vit-large-patch14-336"
_V1_TOWER = "--vision_tower openai/clip-vit-large-patch14"
_V15_PICTURES = (
    f"--mm_projector_type mlp2x_gelu {_PICTURES} "
    "--image_aspect_ratio pad --group_by_modality_length True"
)
_V15_PROJECTOR = "--pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin"
_V15_DATA = "--data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data"
_V15_LORA = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5"
_ZERO2, _ZERO3 = "--deepspeed ./scripts/zero2.json", "--deepspeed ./scripts/zero3.json"
_VICUNA = "vicuna-v1-3-7b"
_V1_DATA = "--data_path ./playground/data/{} --image_folder /path/to/coco/train2017"
_I80K, _I158K = (_V1_DATA.format(f"llava_instruct_{n}k.json") for n in (80, 158))
_V1_MODEL = f"--model_name_or_path ./checkpoints/{_VICUNA} --version v1"
_V1_PROJECTOR = f"--pretrain_mm_mlp_adapter ./checkpoints/llava-{_VICUNA}-pretrain/mm_projector.bin"


def _rest(
    output, epochs=1, batch=16, accumulate=1, steps=50000, rate="2e-5", bf16=True, tf32=True
) -> str:
    return (
        f"--bf16 {bf16} --output_dir ./checkpoints/{output} --num_train_epochs {epochs} "
        f"--per_device_train_batch_size {batch} --per_device_eval_batch_size 4 "
        f"--gradient_accumulation_steps {accumulate} --evaluation_strategy no "
        f"--save_strategy steps --save_steps {steps} --save_total_limit 1 --learning_rate {rate} "
        "--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 "
        f"--tf32 {tf32} --model_max_length 2048 --gradient_checkpointing True "
        "--dataloader_num_workers 4 --lazy_preprocess True --report_to wandb"
    )


_V1_PRETRAIN = (
    f"{_ZERO2} --model_name_or_path ./checkpoints/{_VICUNA} --version plain "
    "--data_path /path/to/pretrain_data.json --image_folder /path/to/images "
    f"{_V1_TOWER} --tune_mm_mlp_adapter True {_PICTURES} "
)
_V1_FINETUNE = f"{_V1_TOWER} {_V1_PROJECTOR} {_PICTURES}"
UPSTREAMS = {
    "pretrain.sh": _V1_PRETRAIN + _rest(f"llava-{_VICUNA}-pretrain", steps=24000, rate="2e-3"),
    "pretrain_xformers.sh": _V1_PRETRAIN
    + _rest(f"llava-{_VICUNA}-pretrain", 1, 4, 4, steps=24000, rate="2e-3", bf16=False, tf32=False),
    "finetune.sh": f"{_ZERO2} {_V1_MODEL} {_I80K} {_V1_FINETUNE} "
    + _rest(f"llava-{_VICUNA}-finetune"),
    "finetune_full_schedule.sh": f"{_ZERO2} {_V1_MODEL} {_I158K} {_V1_FINETUNE} "
    + _rest(f"llava-{_VICUNA}-finetune", epochs=3),
    "finetune_lora.sh": f"{_ZERO2} --lora_enable True {_V1_MODEL} {_I80K} {_V1_FINETUNE} "
    + _rest(f"llava-{_VICUNA}-finetune_lora"),
    "finetune_qlora.sh": f"{_ZERO2} --lora_enable True --bits 4 {_V1_MODEL} {_I80K} "
    + f"{_V1_FINETUNE} {_rest(f'llava-{_VICUNA}-finetune_lora')}",
    "finetune_sqa.sh": f"{_ZERO2} --model_name_or_path lmsys/vicuna-13b-v1.3 --version v1 "
    "--data_path /Data/ScienceQA/data/scienceqa/llava_train_QCM-LEA.json "
    f"--image_folder /Data/ScienceQA/data/scienceqa/images/train {_V1_TOWER} "
    "--pretrain_mm_mlp_adapter ./checkpoints/huggingface/liuhaotian/"
    f"llava-pretrain-vicuna-13b-v1.3/mm_projector.bin {_PICTURES} "
    + _rest("llava-vicuna-13b-v1.3-pretrain_lcs558k_plain-ScienceQA_QCM_LEA-12e", epochs=12),
    "v1_5/pretrain.sh": f"{_ZERO2} --model_name_or_path lmsys/vicuna-13b-v1.5 --version plain "
    "--data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json "
    f"--image_folder ./playground/data/LLaVA-Pretrain/images {_V15_TOWER} "
    f"--mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True {_PICTURES} "
    + _rest("llava-v1.5-13b-pretrain", batch=32, steps=24000, rate="1e-3"),
    "v1_5/finetune.sh": f"{_ZERO3} --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1 "
    f"{_V15_DATA} {_V15_TOWER} {_V15_PROJECTOR} {_V15_PICTURES} " + _rest("llava-v1.5-13b"),
    "v1_5/finetune_lora.sh": f"{_V15_LORA} {_ZERO3} --model_name_or_path lmsys/vicuna-13b-v1.5 "
    f"--version v1 {_V15_DATA} {_V15_TOWER} {_V15_PROJECTOR} {_V15_PICTURES} "
    + _rest("llava-v1.5-13b-lora", rate="2e-4"),
    "v1_5/finetune_task.sh": f"{_ZERO3} --model_name_or_path liuhaotian/llava-v1.5-13b "
    f"--version v1 {_V15_DATA} {_V15_TOWER} {_V15_PICTURES} " + _rest("llava-v1.5-13b-task"),
    "v1_5/finetune_task_lora.sh": f"{_V15_LORA} {_ZERO3} "
    f"--model_name_or_path liuhaotian/llava-v1.5-13b --version v1 {_V15_DATA} {_V15_TOWER} "
    f"{_V15_PICTURES} " + _rest("llava-v1.5-13b-task-lora", rate="2e-4"),
}
OURS = sorted(set(UPSTREAMS) - {"pretrain_xformers.sh"})


def pairs(argv: list[str]) -> dict[str, str]:
    assert len(argv) % 2 == 0
    assert all(flag.startswith("--") for flag in argv[::2])
    return dict(zip(argv[::2], argv[1::2], strict=True))


def parsed(argv: list[str], *kinds: type) -> tuple:
    """The flags as our parser takes them, without starting DeepSpeed's process group."""
    values = pairs(argv)
    assert (ROOT / values.pop("--deepspeed")).is_file()
    return parse([word for pair in values.items() for word in pair], *kinds)


@pytest.fixture
def argv_of(tmp_path):
    """Run a script with a `deepspeed` that writes down what it is given."""
    fake = tmp_path / "bin" / "deepspeed"
    fake.parent.mkdir()
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "$ARGV"\n')
    fake.chmod(0o755)

    def run(
        script: str, *more: str, module: str = "llava/train/train_mem.py", **variables: str
    ) -> list[str]:
        environment = {
            **os.environ,
            "PATH": f"{fake.parent}:{os.environ['PATH']}",
            "ARGV": str(tmp_path / "argv"),
            **variables,
        }
        subprocess.run(["bash", SCRIPTS / script, *more], cwd=ROOT, env=environment, check=True)
        program, *argv, _ = (tmp_path / "argv").read_text().split("\0")
        if program == "--module":
            program, *argv = argv
        assert program == module
        return argv

    return run


@pytest.mark.parametrize("name", UPSTREAMS)
def test_upstreams_command_line_parses(name):
    model_args, _, training_args = parsed(UPSTREAMS[name].split())
    assert training_args.lora_enable == ("lora" in name)
    assert model_args.tune_mm_mlp_adapter == ("pretrain" in name)
    assert training_args.warmup_steps == 0.03
    assert training_args.eval_strategy == "no"


@pytest.mark.parametrize("name", OURS)
def test_our_script_gives_upstreams_flags(name, argv_of):
    ours, theirs = pairs(argv_of(name)), pairs(UPSTREAMS[name].split())
    assert ours.pop("--report_to") == "tensorboard"
    theirs.pop("--report_to")
    for place in ("--data_path", "--image_folder"):
        if theirs[place].startswith("/"):  # a placeholder
            theirs[place] = ours[place]
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "module"), [("finetune_pilot", "fed.train"), ("personalise", "fed.personalise")]
)
def test_pilots_scripts_parse_and_agree_on_the_model(argv_of, name, module):
    argv = argv_of(f"fed/{name}.sh", module=module)
    if module == "fed.train":
        model_args, _, training_args, _ = validation.parse_arguments(argv)
    else:
        kinds = (ModelArguments, DataArguments, TrainingArguments, PersonaliseArguments)
        model_args, _, training_args, _ = parsed(argv, *kinds)
    assert model_args.mm_projector_type == "pilot"
    assert not model_args.pilot_tasks
    assert training_args.lora_enable
    assert training_args.lora_r == 64
    plain = pairs(argv_of("v1_5/finetune_lora.sh"))
    for flag in ("version", "vision_tower", "mm_vision_select_layer", "image_aspect_ratio"):
        assert pairs(argv_of(f"fed/{name}.sh", module=module))[f"--{flag}"] == plain[f"--{flag}"]


def test_flags_at_the_end_of_a_script_win(argv_of):
    argv = argv_of("finetune_lora.sh", "--data_path", "my data.json", MODEL_VERSION="llama-2",
                   PROMPT_VERSION="llava_llama_2")  # fmt: skip
    model_args, data_args, training_args = parsed(argv)
    assert data_args.data_path == "my data.json"
    assert model_args.version == "llava_llama_2"
    assert training_args.output_dir == "./checkpoints/llava-llama-2-finetune_lora"


@pytest.mark.parametrize(
    "script", sorted(str(p.relative_to(SCRIPTS)) for p in SCRIPTS.rglob("*.sh"))
)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)


# -- setting up -----------------------------------------------------------------------------------


@pytest.fixture
def chosen(tmp_path):
    """`chosen(name="3.14", …)`: what setup.sh does where these interpreters are installed."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "dirname").symlink_to(shutil.which("dirname"))
    text = (SCRIPTS / "setup.sh").read_text().partition("\nbase_python=")[0]  # before it installs
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.sh").write_text(f"{text}\nfind_python\n")

    def run(**interpreters: str) -> subprocess.CompletedProcess:
        for name, version in interpreters.items():
            program = commands / name.replace("_", ".")
            program.write_text(
                f"#!{sys.executable}\nimport sys\n"
                f"sys.version_info = {tuple(map(int, version.split('.')))}\n"
                f"exec(sys.argv[2] if sys.argv[1] == '-c' else 'print(\"Python {version}\")')\n"
            )
            program.chmod(0o755)
        return subprocess.run(
            [shutil.which("bash"), tmp_path / "scripts" / "setup.sh"],
            env={"PATH": str(commands)}, capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("version", [f"3.{minor}" for minor in range(9, 17)])
def test_setup_takes_the_versions_that_the_project_asks_for(chosen, version):
    asked = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    done = chosen(python3=version)
    if SpecifierSet(asked).contains(version):
        assert (done.returncode, done.stdout) == (0, "python3\n")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(
            "error: Python 3.10 to 3.14 is needed; found Python " + version
        )


def test_setup_takes_a_version_that_was_run_before_others(chosen):
    assert chosen(python3_14="3.14").stdout == "python3.14\n"
    assert chosen(python3_13="3.13", python3="3.9").stdout == "python3.13\n"
    assert chosen(python3_11="3.11").stdout == "python3.11\n"


def test_every_extra_that_is_named_is_there():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"train", "flash"} <= extras.keys()  # upstream's, and what its guide adds
    files = [ROOT / "README.md", ROOT / "pyproject.toml"]
    files += [f for kind in ("*.sh", "*.py", "*.md") for f in SCRIPTS.rglob(kind)]
    files += [*(ROOT / "llava").rglob("*.py"), *(ROOT / "fed").rglob("*.py")]
    words = {
        word
        for file in files
        for found in re.findall(r"fedllava\[([\w,]+)\]|EXTRAS=([\w,]+)", file.read_text())
        for word in "".join(found).split(",")
    }
    assert {"deepspeed", "serve"} < words <= extras.keys()


# -- tools ----------------------------------------------------------------------------------------


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def full(tmp_path) -> Path:
    """A full LLaVA in three pickled shards, as upstream on an old release writes it."""
    return placed("llava-full", tmp_path)


def placed(name: str, folder: Path) -> Path:
    """A copy of one of upstream's folders, with its tower where it is on this machine."""
    out = Path(shutil.copytree(UPSTREAM / name, folder / name))
    config = json.loads((out / "config.json").read_text())
    config["mm_vision_tower"] = str(UPSTREAM / "tower")
    (out / "config.json").write_text(json.dumps(config))
    return out


def logits(path, base=None) -> torch.Tensor:
    tokenizer, model, processor, _ = load_pretrained_model(
        str(path), base and str(base), "any", device="cpu"
    )
    ids = tokenizer_image_token("USER: <image>\nWhat?", tokenizer, return_tensors="pt")
    side = processor.crop_size["height"]
    with torch.no_grad():
        return model(ids[None], images=torch.ones(1, 3, side, side)).logits


PROJECTOR = {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")}


@pytest.mark.parametrize("base_name", ["llm", "llava-full"], ids=["llm", "base with a tower"])
def test_a_merged_lora_is_a_full_llava(base_name, tmp_path):
    lora = placed("llava-lora", tmp_path)
    base = placed(base_name, tmp_path)
    # In float32 there is no rounding between merging then and merging now.
    tensors = {n: t.float() for n, t in Shards(base).items() if not n.endswith("inv_freq")}
    for file in [*base.glob("*.bin*"), *base.glob("*.safetensors")]:
        file.unlink()
    write_shards(base, tensors.items())
    out = tmp_path / "merged"
    tool("merge_lora_weights")(
        ["--model-path", str(lora), "--model-base", str(base), "--save-model-path", str(out)]
    )
    assert torch.equal(logits(out), logits(lora, base))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert (out / "tokenizer.model").is_file()
    assert set(Shards(out)) == {n for n in tensors if "position_ids" not in n} | PROJECTOR

    with pytest.raises(InputError, match="no adapter_config.json there"):
        tool("merge_lora_weights")(
            ["--model-path", str(out), "--save-model-path", str(tmp_path / "x")]
        )


def test_the_projector_comes_out_of_every_kind_of_folder(full, tmp_path):
    extract = tool("extract_mm_projector")
    weights = Shards(full)
    expected = {name: weights[name] for name in PROJECTOR}
    # Other shards are not read.
    index = json.loads((full / "pytorch_model.bin.index.json").read_text())["weight_map"]
    others = set(index.values()) - {index[name] for name in PROJECTOR}
    assert others
    for file in others:
        (full / file).write_bytes(b"")
    in_one, in_shards = tmp_path / "one", tmp_path / "shards"
    tensors = dict(Shards(UPSTREAM / "llava-full"))
    for folder, size in ((in_one, 10**9), (in_shards, 40_000)):
        folder.mkdir()
        write_shards(folder, tensors.items(), size)
    assert len(list(in_shards.glob("*.safetensors"))) > 1
    for folder in (full, in_one, in_shards):
        extract(["--model-path", str(folder), "--output", str(tmp_path / "p.bin")])
        found = torch.load(tmp_path / "p.bin", weights_only=True)
        assert found.keys() == PROJECTOR
        assert all(torch.equal(found[name], expected[name]) for name in PROJECTOR)

    output = tmp_path / "lora.safetensors"
    extract(["--model-path", str(UPSTREAM / "llava-lora"), "--output", str(output)])
    assert load_file(output).keys() == PROJECTOR
    with pytest.raises(InputError, match="has no projector"):
        extract(["--model-path", str(UPSTREAM / "llm"), "--output", str(output)])


def test_consolidate_writes_the_same_model_anew(full, tmp_path):
    consolidate.main(["--src", str(full), "--dst", str(tmp_path / "new")])
    new, old = Shards(tmp_path / "new"), Shards(full)
    assert set(new) == {name for name in old if not name.endswith("inv_freq")}
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert torch.equal(logits(tmp_path / "new"), logits(full))
    with pytest.raises(InputError, match="is there already"):
        consolidate.main(["--src", str(full), "--dst", str(tmp_path / "new")])


def test_a_difference_is_made_and_applied(full, tmp_path):
    """With two tokens more than the base has, as the first LLaVA had."""
    tensors = {n: t for n, t in Shards(full).items() if "inv_freq" not in n}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2] * 2])
    target = tmp_path / "target"
    target.mkdir()
    write_shards(target, tensors.items())
    shutil.copy(full / "config.json", target)
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
