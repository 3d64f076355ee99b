#!/usr/bin/env bash
# VizWiz, test.
set -euo pipefail

CKPT=${CKPT:-llava-v1.5-13b}
ANSWERS=./playground/data/eval/vizwiz/answers/$CKPT.jsonl

python -m llava.eval.model_vqa_loader \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/vizwiz/llava_test.jsonl \
    --image-folder ./playground/data/eval/vizwiz/test \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@" \
    --answers-file "$ANSWERS"

python scripts/convert_vizwiz_for_submission.py \
    --annotation-file ./playground/data/eval/vizwiz/llava_test.jsonl \
    --result-file "$ANSWERS" \
    --result-upload-file "./playground/data/eval/vizwiz/answers_upload/$CKPT.json"
