#!/usr/bin/env bash
# Interval masks against FlexAttention on one GPU: benchmarks/masks.sh <csv> <commit>
# FlexAttention's kernels are compiled side by side first: its cache makes the timed run short.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src:. PYTHONUNBUFFERED=1
python3 benchmarks/masks.py --only-check &
check=$!
compiled=()
for kind in causal full causal_document causal_blockwise prefix_lm global_sliding_window; do
  for size in 8192 32768; do
    python3 benchmarks/masks.py --only-compile --sizes $size --kinds $kind & compiled+=($!)
  done
done
python3 benchmarks/masks.py --only-compile --sizes 65536 --kinds causal,causal_document & compiled+=($!)
wait "${compiled[@]}"
wait $check || exit 1
python3 benchmarks/masks.py --no-check --sizes 8192,32768,65536 --commit "$2" --out "$1"
python3 benchmarks/masks.py --no-check --no-flex --sizes 131072 --commit "$2" --out "${1%.csv}-128k.csv"
