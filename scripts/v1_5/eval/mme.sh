#!/usr/bin/env bash
# MME; scored by the programs that come with its data.
set -euo pipefail

CKPT=${CKPT:-llava-v1.5-13b}

python -m llava.eval.model_vqa_loader \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/MME/llava_mme.jsonl \
    --image-folder ./playground/data/eval/MME/MME_Benchmark_release_version \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@" \
    --answers-file "./playground/data/eval/MME/answers/$CKPT.jsonl"

cd ./playground/data/eval/MME
python convert_answer_to_mme.py --experiment "$CKPT"
cd eval_tool
python calculation.py --results_dir "answers/$CKPT"
