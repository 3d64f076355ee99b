#!/usr/bin/env bash
# SEED-Bench, on every GPU of CUDA_VISIBLE_DEVICES.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/in_chunks.sh"

CKPT=${CKPT:-llava-v1.5-13b}
ANSWERS=./playground/data/eval/seed_bench/answers/$CKPT/merge.jsonl

in_chunks "$ANSWERS" model_vqa_loader \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/seed_bench/llava-seed-bench.jsonl \
    --image-folder ./playground/data/eval/seed_bench \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@"

python scripts/convert_seed_for_submission.py \
    --annotation-file ./playground/data/eval/seed_bench/SEED-Bench.json \
    --result-file "$ANSWERS" \
    --result-upload-file "./playground/data/eval/seed_bench/answers_upload/$CKPT.jsonl"
