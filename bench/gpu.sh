#!/usr/bin/env bash
# On a machine with a GPU, nvcc, torch and Triton (no Rust, no network): builds csrc in place, runs the tests marked gpu,
# then first benchmarks. Logs, JSON and CSV go to $OUT (default out/gpu). Stays within 9 minutes; PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 POTSTILL_CUDA=1
failed=()

step() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    printf '\n== %s\n' "$name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 60 || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - start))
}

capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
    { echo "no CUDA device that torch can use: $PYTHON sees none" >&2; exit 1; }
[ "$capability" = 90 ] && capability=90a
export POTSTILL_CUDA_ARCHS=$capability POTSTILL_ISAS=${POTSTILL_ISAS:-avx2}
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' |
    tee "$OUT/machine.txt"
workers=$(($(nproc) < 12 ? $(nproc) : 12))
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$workers") || parallel=()

step build 150 "$PYTHON" setup.py build_ext --inplace
# tests/cache and the folders above it need the Rust extension; the gpu tests do not
step tests 190 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${parallel[@]}" tests/kernels tests/test_*.py
# memory errors of the CUDA kernels, where the toolkit has its sanitizer
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -x tests/kernels/test_topk_gpu.py -k "alignment or adjacent or tokens"
else
    echo "compute-sanitizer is not here: skipped"
fi
step losses 115 "$PYTHON" bench/gpu_losses.py --out "$OUT/gpu_losses.json" --seconds 75
step topk 80 "$PYTHON" bench/gpu_topk.py --out "$OUT/gpu_topk.json" --seconds 50

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all steps passed in $SECONDS s"
