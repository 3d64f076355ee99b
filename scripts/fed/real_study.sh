#!/usr/bin/env bash
# Few methods × two scenarios × seeds between the real parts: playground/results/fedcmp_real.md.
#   bash scripts/fed/real_study.sh --hours 3    # as far as it gets; start it again to go on
# Runs take minutes, and are in bfloat16: a processor that multiplies it itself takes half as long.
# The plan is playground/studies/fedcmp_real.yaml, finished runs lie in playground/results.
set -euo pipefail
EXTRAS=gguf,studies
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
if ! "$PYTHON" -c 'import efficientnet_lite' 2>/dev/null; then
    "$PYTHON" -m pip install --progress-bar off -q --no-deps -e playground/real/efficientnet_lite
fi
"$PYTHON" -m playground.tools.unpack_data
"$PYTHON" -m playground.real.prepare runs/real/parts
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$PYTHON" -m playground.studies playground/studies/fedcmp_real.yaml "$@"
