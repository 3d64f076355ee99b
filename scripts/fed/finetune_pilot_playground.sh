#!/usr/bin/env bash
# Pilot on the playground: nine clients with three tasks tune one LLaVA together, and each gets a
# model of its own. A projector is aligned first, briefly, on public pictures. Minutes on two cores.
# The flags stand in playground/flags.yaml; any of the federated run can be given again at the end.
#   bash scripts/fed/finetune_pilot_playground.sh --fed_clients playground/fed/pilot-b.yaml \
#       --fed_eval_data_path playground/data/tasks/heldout_test_b.json --output_dir runs/pilot-b
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$PYTHON" -m playground.tools.unpack_data
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

start="$("$PYTHON" -m playground.flags pilot_start)"
flags="$("$PYTHON" -m playground.flags pilot)"
[ -f runs/pilot-start/mm_projector.bin ] || "$PYTHON" llava/train/train.py $start
"$PYTHON" -m fed.train $flags "$@"
