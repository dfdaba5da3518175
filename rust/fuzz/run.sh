#!/usr/bin/env bash
# Builds the targets with the coverage that libFuzzer needs, on a stable toolchain, and runs them side by side.
#   run.sh SECONDS [TARGET ...]      SECONDS=0 replays the corpus only
# Seeds are the golden files. New inputs go to out/fuzz/TARGET. A finding stays in out/fuzz/findings and fails the run; with
# its fix it goes into corpus/TARGET, which rust/core/tests/fuzz_corpus.rs replays without a fuzzer.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
seconds=${1:-60}
shift || true
targets=("$@")
((${#targets[@]})) || targets=(header index block log align)
out=${FUZZ_OUT:-$here/../../out/fuzz}
host=$(rustc -vV | sed -n 's/^host: //p')
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-trace-compares"
coverage+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
target_dir=${CARGO_TARGET_DIR:-$here/target}/fuzz
# with --target the flags leave build scripts and macros alone
RUSTFLAGS="$coverage -Cforce-frame-pointers" CARGO_TARGET_DIR=$target_dir \
    cargo build --quiet --locked --release --target "$host" --manifest-path "$here/Cargo.toml" $(printf -- '--bin %s ' "${targets[@]}")
mkdir -p "$out/findings"

run() {
    local target=$1 corpus=$here/corpus/$1
    shift
    POTSTILL_SEEDS=$out/seeds/$target "$target_dir/$host/release/$target" -artifact_prefix="$out/findings/$target-" -rss_limit_mb=512 -malloc_limit_mb=256 \
        -timeout=10 -max_len=8192 -print_final_stats=1 "$@" >"$out/$target.log" 2>&1 ||
        { tail -25 "$out/$target.log"; echo "$target: see $out/findings"; return 1; }
    echo "$target: $(grep -E 'cov: ' "$out/$target.log" | tail -1)"
}

pids=()
for target in "${targets[@]}"; do
    mkdir -p "$out/$target" "$out/seeds/$target" "$here/corpus/$target"
    if ((seconds)); then
        run "$target" -max_total_time="$seconds" "$out/$target" "$here/corpus/$target" "$out/seeds/$target" &
    else
        run "$target" -runs=0 "$here/corpus/$target" &
    fi
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
