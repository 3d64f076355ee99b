#!/usr/bin/env bash
# ScienceQA's test questions on eight GPUs; sqa_eval_gather.sh scores the answers.
set -euo pipefail

CHUNKS=${CHUNKS:-8}
DATA=${DATA:-./playground/data/eval/scienceqa}

processes=()
for IDX in $(seq 0 $((CHUNKS - 1))); do
    CUDA_VISIBLE_DEVICES=$IDX python -m llava.eval.model_vqa_science \
        --model-path liuhaotian/llava-lcs558k-scienceqa-vicuna-13b-v1.3 \
        --question-file "$DATA/llava_test_QCM-LEA.json" \
        --image-folder "$DATA/images/test" \
        --conv-mode llava_v1 \
        "$@" \
        --answers-file "./test_llava-13b-chunk$IDX.jsonl" \
        --num-chunks "$CHUNKS" \
        --chunk-idx "$IDX" &
    processes+=($!)
done
for process in "${processes[@]}"; do
    wait "$process"
done
