#!/usr/bin/env bash
# Full models that were finetuned from one start, all of their weights merged layer by layer.
#   bash scripts/merge/full_models.sh --scope projector   # of models that differ in nothing else
# The result has the layout of the first expert, upstream's or transformers'.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

"$PYTHON" -m fed.merge \
    --method task_arithmetic \
    --scope all \
    --experts \
        ./checkpoints/llava-v1.5-13b-task-a \
        ./checkpoints/llava-v1.5-13b-task-b \
    --base liuhaotian/llava-v1.5-13b \
    --output ./checkpoints/llava-v1.5-13b-merged \
    "$@"
