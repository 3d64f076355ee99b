#!/usr/bin/env bash
# One federated run on the playground: LLaVA's pre-training flags and the --fed_* ones, which stand
# in playground/flags.yaml; any can be given again at the end.
#   bash scripts/fed/pretrain_playground.sh --fed_method fedavg --fed_rounds 3 --output_dir X
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$PYTHON" -m playground.tools.unpack_data
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

flags="$("$PYTHON" -m playground.flags pretrain)"
"$PYTHON" -m fed.train $flags "$@"
