#!/usr/bin/env bash
# Put together what sqa_eval_batch.sh answered, and score it.
set -euo pipefail

CHUNKS=${CHUNKS:-8}
DATA=${DATA:-./playground/data/eval/scienceqa}

for IDX in $(seq 0 $((CHUNKS - 1))); do
    cat "./test_llava-13b-chunk$IDX.jsonl"
done > test_llava-13b.jsonl.tmp
mv test_llava-13b.jsonl.tmp test_llava-13b.jsonl

python -m llava.eval.eval_science_qa \
    --base-dir "$DATA" \
    --result-file ./test_llava-13b.jsonl \
    --output-file ./test_llava-13b_output.json \
    --output-result ./test_llava-13b_result.json \
    "$@"
