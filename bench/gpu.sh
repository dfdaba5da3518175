#!/usr/bin/env bash
# On a machine with a GPU, nvcc, torch, Triton and pybind11 (no Rust, no network): builds csrc in place, runs the tests marked
# gpu, then the benchmarks, then the sanitizer. One log, and JSON, CSV and a plot of each benchmark go to $OUT (default out/gpu).
# Every step's time is cut to what is left of LIMIT seconds (default 520); a step that fails or is cut loses no other's results.
set -uo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD OUT=${OUT:-out/gpu} PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-520}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$ROOT/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 POTSTILL_CUDA=1
failed=()

say() { printf '%s\n' "$*" | tee -a "$OUT/log.txt"; }

step() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS left=$((LIMIT - SECONDS)) status
    shift 2
    ((limit > left)) && limit=$left
    if ((limit < 1)); then
        say "== $name: not run, the time is used up"
        failed+=("$name")
        return 1
    fi
    say "== $name"
    # an interrupt lets pytest and the benchmarks say and write what they have
    timeout -s INT -k 20 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt" | tail -n 60
    status=${PIPESTATUS[0]}
    ((status == 0)) || failed+=("$name")
    say "== $name: exit $status after $((SECONDS - start)) s"
    return "$status"
}

benchmark() { # name, seconds of the step, seconds of measuring
    step "$1" "$2" "$PYTHON" "bench/gpu_$1.py" --out "$OUT/gpu_$1.json" --seconds "$3"
    # 3: a kernel took the device down with it; what was left goes on in a process of its own, without that variant
    (($? != 3)) || step "$1, the rest" "$2" "$PYTHON" "bench/gpu_$1.py" --out "$OUT/gpu_$1.json" --seconds "$3" --resume
}

capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
    { echo "no CUDA device that torch can use: $PYTHON sees none" >&2; exit 1; }
[ "$capability" = 90 ] && capability=90a
workers=$(($(nproc) < 12 ? $(nproc) : 12))
export POTSTILL_CUDA_ARCHS=$capability POTSTILL_ISAS=${POTSTILL_ISAS:-avx2} POTSTILL_COMPILE_JOBS=$workers
say "$("$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())')"
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$workers") || parallel=()
# a line a test, so that the log names what failed even where the time ends the run
tests=("$PYTHON" -m pytest -v -m gpu -p no:cacheprovider --tb=short --continue-on-collection-errors)

# from an empty folder: an older setuptools does not know the licence field of pyproject.toml
mkdir -p build/empty
step build 170 env -C build/empty "$PYTHON" "$ROOT/setup.py" -q build_ext --build-lib "$ROOT/python" --build-temp "$ROOT/build/gpu"
# test_bench.py, tests/cache and the other folders need the Rust extension; the gpu tests do not
step tests 190 "${tests[@]}" "${parallel[@]}" tests/kernels tests/test_[!b]*.py
benchmark losses 130 75
benchmark topk 80 50
# memory errors of the CUDA kernels, where the toolkit has its sanitizer; every tensor an allocation of its own
if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    step sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 1 "${tests[@]}" -x \
        tests/kernels/test_topk_gpu.py tests/kernels/interpreted/test_gpu_rows.py \
        -k "cuda and (adjacent or tokens or layouts or one_byte or bad_labels)"
else
    say "compute-sanitizer is not here: skipped"
fi

if ((${#failed[@]})); then
    say "failed: ${failed[*]}"
    exit 1
fi
say "all steps passed in $SECONDS s"
