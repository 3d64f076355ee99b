#!/usr/bin/env bash
# The quick numerical tests under each instruction set that this CPU has, with one and two threads:
# a result may differ by a rounding then, and no test may fail of it.
#   bash scripts/numerics.sh [pytest options]
set -euo pipefail
EXTRAS=dev
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

tests=(tests/fed/numerics tests/fed/methods tests/fed/server/test_round_metrics.py
    --ignore tests/fed/methods/pilot/test_run.py
    --ignore tests/fed/methods/test_all_methods.py)
# Without those that count bytes, or draw or step hundreds of times.
quick="not makes and not blocks and not seeds and not adam_goes"

# As torch, MKL (which listens on Intel's alone) and oneDNN call them; a CPU has the ones before too.
case "$("$PYTHON" -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')" in
    AVX512*) sets=("default SSE4_2 SSE41" "avx2 AVX2 AVX2" "avx512 AVX512 AVX512_CORE") ;;
    AVX2) sets=("default SSE4_2 SSE41" "avx2 AVX2 AVX2") ;;
    *) sets=("default SSE4_2 SSE41") ;;
esac
for set in "${sets[@]}"; do
    read -r aten mkl onednn <<<"$set"
    for threads in 1 2; do
        echo "== numerical tests with $mkl, threads: $threads"
        ATEN_CPU_CAPABILITY=$aten MKL_ENABLE_INSTRUCTIONS=$mkl ONEDNN_MAX_CPU_ISA=$onednn \
            OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads \
            "$PYTHON" -m pytest -q --no-header -m "not slow" -k "$quick" "${tests[@]}" "$@"
    done
done
