#!/usr/bin/env bash
# ScienceQA, test.
set -euo pipefail

CKPT=${CKPT:-llava-v1.5-13b}
ANSWERS=./playground/data/eval/scienceqa/answers/$CKPT

python -m llava.eval.model_vqa_science \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/scienceqa/llava_test_CQM-A.json \
    --image-folder ./playground/data/eval/scienceqa/images/test \
    --single-pred-prompt \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@" \
    --answers-file "$ANSWERS.jsonl"

python -m llava.eval.eval_science_qa \
    --base-dir ./playground/data/eval/scienceqa \
    --result-file "$ANSWERS.jsonl" \
    --output-file "${ANSWERS}_output.jsonl" \
    --output-result "${ANSWERS}_result.json"
