#!/usr/bin/env bash
# Talk to models on a web page, and compare them: bash scripts/serve/demo.sh [[NAME=]MODEL …]
#   bash scripts/serve/demo.sh                       # what scripts/quickstart.sh made
#   bash scripts/serve/demo.sh merged=runs/merged --model-base lmsys/vicuna-7b-v1.5 --load-4bit
# Starts controller, workers and page on this machine, and prints one address; Ctrl-C stops all of it.
# --help lists the flags.
set -euo pipefail
EXTRAS=serve
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
export TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m llava.serve.demo "$@"
