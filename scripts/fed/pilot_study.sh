#!/usr/bin/env bash
# Pilot, Pilot without each of its parts, and its baselines: playground/results/pilot.md.
#   bash scripts/fed/pilot_study.sh --hours 3    # as far as it gets in three hours; start it again to go on
#   bash scripts/fed/pilot_study.sh --hours 0    # the page of what has been measured
# Finished runs lie in playground/results/pilot.jsonl and are not made again. To measure anew, move
# that file away. The plan is playground/studies/pilot.yaml.
set -euo pipefail
EXTRAS=studies
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$PYTHON" -m playground.tools.unpack_data
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$PYTHON" -m playground.studies playground/studies/pilot.yaml "$@"
