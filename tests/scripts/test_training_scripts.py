"""The scripts that train: upstream's flags, and ours beside them; bash reads every script."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fed import validation
from fed.methods.pilot.personalise import PersonaliseArguments
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"

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
