#!/usr/bin/env bash
# Set everything up and run the tests: bash scripts/test.sh [pytest options]
# Without options the quick numerical tests run first, under each instruction set of this CPU.
set -euo pipefail
EXTRAS=dev
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m playground.tools.unpack_data
echo "== lint"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
[ $# -gt 0 ] || bash scripts/numerics.sh
echo "== tests"
exec "$PYTHON" -m pytest "$@"
