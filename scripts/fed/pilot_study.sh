#!/usr/bin/env bash
# Pilot, Pilot without each of its parts, and its baselines: playground/results/pilot.md.
#   bash scripts/fed/pilot_study.sh --hours 3    # as far as it gets in three hours; start it again to go on
#   bash scripts/fed/pilot_study.sh --hours 0    # the report of what has been measured
# Finished runs lie in playground/results/pilot.jsonl and are not made again. To measure anew, move
# that file away.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$PYTHON" -m playground.tools.unpack_data
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$PYTHON" scripts/fed/pilot_study.py "$@"
"$PYTHON" scripts/fed/pilot_report.py
