#!/usr/bin/env bash
# Several LoRA folders of scripts/v1_5/finetune_lora.sh, with their projectors, merged into one.
# --base is the projector that all of them began with; LoRA itself begins with no change at all.
#   bash scripts/merge/lora.sh --lora product         # merges B A and not A and B; takes longer
# Then scripts/merge_lora_weights.py makes a full model of the result.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

"$PYTHON" -m fed.merge \
    --method linear \
    --scope all \
    --lora factors \
    --experts \
        ./checkpoints/llava-v1.5-13b-lora-a \
        ./checkpoints/llava-v1.5-13b-lora-b \
    --weights 1 1 \
    --base ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin \
    --output ./checkpoints/llava-v1.5-13b-lora-merged \
    "$@"
