#!/usr/bin/env bash
# compute-sanitizer over a small case of each kernel; needs a CUDA device. Fails on any finding.
# usage: scripts/sanitize.sh [memcheck|racecheck ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# Every allocation its own, so that a read past a tensor is a read past an allocation.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
cases="reads_every_format or windows_sinks_and_softcap[16 or segments_join \
  or test_every_format or spans_fill or partials_join"
for tool in "${@:-memcheck racecheck}"; do
  for one in $tool; do
    compute-sanitizer --tool "$one" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -W ignore -k "${SANITIZE_CASES:-$cases}" \
      tests/ops/test_triton_{decode,rope_write,gather,merge}.py
  done
done
