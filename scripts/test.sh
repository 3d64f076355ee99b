#!/usr/bin/env bash
# Set everything up and run the tests: bash scripts/test.sh [pytest options]
# They run in a process for each CPU, four at most; the option `-n 0` runs them in one.
# Without options the quick numerical tests run first, under each instruction set of this CPU.
set -euo pipefail
EXTRAS=dev
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE # or each of hundreds of processes would compile our files anew
"$PYTHON" -m playground.tools.unpack_data
echo "== lint"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy >/dev/null &
[ $# -gt 0 ] || bash scripts/numerics.sh
wait $! || "$PYTHON" -m mypy # again, from its cache, so that what it says stands last
echo "== tests"
exec "$PYTHON" -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
