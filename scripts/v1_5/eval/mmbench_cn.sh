#!/usr/bin/env bash
# MMBench-CN, dev: an Excel table for its server.
set -euo pipefail

CKPT=${CKPT:-llava-v1.5-13b}
SPLIT=mmbench_dev_cn_20231003
DATA=./playground/data/eval/mmbench_cn

python -m llava.eval.model_vqa_mmbench \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file $DATA/$SPLIT.tsv \
    --lang cn \
    --single-pred-prompt \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@" \
    --answers-file "$DATA/answers/$SPLIT/$CKPT.jsonl"

python scripts/convert_mmbench_for_submission.py \
    --annotation-file $DATA/$SPLIT.tsv \
    --result-dir "$DATA/answers/$SPLIT" \
    --upload-dir ./playground/data/eval/mmbench/answers_upload/$SPLIT \
    --experiment "$CKPT"
