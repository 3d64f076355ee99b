#!/usr/bin/env bash
# Talk to models on a web page, and compare them: bash scripts/serve/demo.sh [NAME=]MODEL […]
#   bash scripts/serve/demo.sh                       # what scripts/quickstart.sh made
#   bash scripts/serve/demo.sh merged=runs/merged --model-base lmsys/vicuna-7b-v1.5 --load-4bit
# Starts controller, workers and page on this machine, and prints one address; Ctrl-C stops all of it.
# --help lists the flags.
set -euo pipefail
EXTRAS=serve
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export TOKENIZERS_PARALLELISM=false

if [ $# -eq 0 ]; then
    made=runs/quickstart
    if [ ! -d $made/fedcmp ]; then
        echo "error: $made/fedcmp is not there: run bash scripts/quickstart.sh first, or name a model" >&2
        exit 2
    fi
    export HF_HUB_OFFLINE=1
    set -- "Fed-CMP=$made/fedcmp" "FedAvg=$made/fedavg" "objects-alone=$made/alone/clients/objects" \
        "centralised=$made/central" --model-base playground/backbones/llm --run $made/fedcmp --run $made/fedavg
fi
exec "$PYTHON" -m llava.serve.demo "$@"
