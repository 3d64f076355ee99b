#!/usr/bin/env bash
# Several projectors that were aligned on different data from one start, merged into one, for
# --pretrain_mm_mlp_adapter of scripts/v1_5/finetune.sh.
#   bash scripts/merge/projectors.sh --dry_run        # how they relate; nothing is written
#   bash scripts/merge/projectors.sh --method ties --options density=0.3
# A projector's file may be named in place of its folder. Without --base the experts' mean stands in.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

"$PYTHON" -m fed.merge \
    --method pivotmerge \
    --experts \
        ./checkpoints/llava-v1.5-13b-pretrain-a \
        ./checkpoints/llava-v1.5-13b-pretrain-b \
        ./checkpoints/llava-v1.5-13b-pretrain-c \
    --base ./checkpoints/llava-v1.5-13b-pretrain-start \
    --output ./checkpoints/llava-v1.5-13b-pretrain-merged \
    "$@"
