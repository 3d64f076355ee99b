#!/usr/bin/env bash
# POPE.
set -euo pipefail

CKPT=${CKPT:-llava-v1.5-13b}
ANSWERS=./playground/data/eval/pope/answers/$CKPT.jsonl

python -m llava.eval.model_vqa_loader \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/pope/llava_pope_test.jsonl \
    --image-folder ./playground/data/eval/pope/val2014 \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@" \
    --answers-file "$ANSWERS"

python -m llava.eval.eval_pope \
    --annotation-dir ./playground/data/eval/pope/coco \
    --question-file ./playground/data/eval/pope/llava_pope_test.jsonl \
    --result-file "$ANSWERS"
