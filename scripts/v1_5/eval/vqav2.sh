#!/usr/bin/env bash
# VQAv2, test-dev, on every GPU of CUDA_VISIBLE_DEVICES. Any flag can be given again at the end:
#   CKPT=mine bash scripts/v1_5/eval/vqav2.sh --model-path checkpoints/mine --batch_size 16
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/in_chunks.sh"

CKPT=${CKPT:-llava-v1.5-13b}
SPLIT=llava_vqav2_mscoco_test-dev2015

in_chunks "./playground/data/eval/vqav2/answers/$SPLIT/$CKPT/merge.jsonl" model_vqa_loader \
    --model-path liuhaotian/llava-v1.5-13b \
    --question-file ./playground/data/eval/vqav2/$SPLIT.jsonl \
    --image-folder ./playground/data/eval/vqav2/test2015 \
    --temperature 0 \
    --conv-mode vicuna_v1 \
    "$@"

python scripts/convert_vqav2_for_submission.py --split $SPLIT --ckpt "$CKPT"
