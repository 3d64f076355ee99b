#!/usr/bin/env bash
# MM-Vet; scored by its own notebook.
set -euo pipefail

CKPT=${CKPT:-llava-v1.5-13b}
ANSWERS=./playground/data/eval/mm-vet/answers/$CKPT.jsonl

python -m llava.eval.model_vqa \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/mm-vet/llava-mm-vet.jsonl \
    --image-folder ./playground/data/eval/mm-vet/images \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@" \
    --answers-file "$ANSWERS"

python scripts/convert_mmvet_for_eval.py \
    --src "$ANSWERS" \
    --dst "./playground/data/eval/mm-vet/results/$CKPT.json"
