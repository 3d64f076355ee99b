#!/usr/bin/env bash
# Experts aligned apart, merged by every method, measured: playground/results/pivotmerge.md.
#   bash scripts/merge/study.sh --hours 3    # as far as it gets in three hours; start it again to go on
#   bash scripts/merge/study.sh --hours 0    # the page of what has been measured
# Finished measures lie in playground/results/pivotmerge.jsonl and are not made again. To measure anew, move
# that file away. The plan is playground/studies/pivotmerge.yaml.
set -euo pipefail
EXTRAS=studies
. "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$PYTHON" -m playground.tools.unpack_data
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
"$PYTHON" -m playground.studies playground/studies/pivotmerge.yaml "$@"
