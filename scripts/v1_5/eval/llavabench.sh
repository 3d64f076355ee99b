#!/usr/bin/env bash
# LLaVA-Bench in the wild: the answers. (Upstream had them reviewed by models no longer served.)
set -euo pipefail

CKPT=${CKPT:-llava-v1.5-13b}

python -m llava.eval.model_vqa \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/llava-bench-in-the-wild/questions.jsonl \
    --image-folder ./playground/data/eval/llava-bench-in-the-wild/images \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@" \
    --answers-file "./playground/data/eval/llava-bench-in-the-wild/answers/$CKPT.jsonl"
