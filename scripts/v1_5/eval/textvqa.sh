#!/usr/bin/env bash
# TextVQA, validation.
set -euo pipefail

CKPT=${CKPT:-llava-v1.5-13b}
ANSWERS=./playground/data/eval/textvqa/answers/$CKPT.jsonl

python -m llava.eval.model_vqa_loader \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/textvqa/llava_textvqa_val_v051_ocr.jsonl \
    --image-folder ./playground/data/eval/textvqa/train_images \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@" \
    --answers-file "$ANSWERS"

python -m llava.eval.eval_textvqa \
    --annotation-file ./playground/data/eval/textvqa/TextVQA_0.5.1_val.json \
    --result-file "$ANSWERS"
