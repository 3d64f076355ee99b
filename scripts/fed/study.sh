#!/usr/bin/env bash
# Methods × scenarios × seeds on the playground, and what comes of it: playground/results/fedcmp.md.
#   bash scripts/fed/study.sh --hours 3      # as far as it gets in three hours; start it again to go on
#   bash scripts/fed/study.sh --hours 0      # the report of what has been measured
# Finished runs lie in playground/results/fedcmp.jsonl and are not made again. To measure anew, move
# that file away.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$PYTHON" -m playground.tools.unpack_data
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$PYTHON" scripts/fed/study.py "$@"
"$PYTHON" scripts/fed/study_report.py
