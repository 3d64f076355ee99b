#!/usr/bin/env bash
# GQA, test-dev balanced, on every GPU of CUDA_VISIBLE_DEVICES; scored by GQA's own eval.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/in_chunks.sh"

CKPT=${CKPT:-llava-v1.5-13b}
SPLIT=llava_gqa_testdev_balanced
GQADIR=./playground/data/eval/gqa/data
ANSWERS=./playground/data/eval/gqa/answers/$SPLIT/$CKPT/merge.jsonl

in_chunks "$ANSWERS" model_vqa_loader \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/gqa/$SPLIT.jsonl \
    --image-folder ./playground/data/eval/gqa/data/images \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@"

python scripts/convert_gqa_for_eval.py --src "$ANSWERS" --dst "$GQADIR/testdev_balanced_predictions.json"

cd $GQADIR
python eval/eval.py --tier testdev_balanced
