#!/usr/bin/env bash
# The tests that need a CUDA device, in parts: nothing that CI can run, so somebody with a card runs it before a kernel changes hands.
# usage: scripts/test_gpu.sh [write|decode|prefill|masks|far|model|fuzz ...]    (all without)
#   WORKERS=12 scripts/test_gpu.sh decode    processes that share the device (each holds a CUDA context and a few GiB)
# Every test's name is printed as it ends, and every part runs whatever the one before it said.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1

declare -A parts=(
  [write]="tests/ops/rope_write tests/ops/gather tests/ops/triton"
  [decode]="tests/ops/attend/decode tests/ops/attend/latent tests/ops/attend/flash tests/ops/attend/test_*.py tests/ops/test_cells.py"
  [prefill]="tests/ops/attend/prefill"
  [masks]="tests/ops/attend/interval"
  # Offsets past 2^31: up to 40 GiB a test, so one at a time.
  [far]="tests/ops/test_triton_far.py"
  [model]="tests/integrations/hf_transformers/steps/test_graph.py tests/integrations/hf_transformers/cache/test_prompts_gpu.py"
)

run() { # part
  if [ "$1" = fuzz ]; then
    "$python" scripts/fuzz.py --cases "${CASES:-300}" --seed "${SEED:-1}" --device cuda
    return
  fi
  local workers=(-n "${WORKERS:-8}" --dist worksteal)
  case $1 in far | model) workers=(-n 0) ;; esac
  # shellcheck disable=SC2086  # a part is a list of folders and files
  "$python" -m pytest -vv --tb=short -m gpu -p no:cacheprovider "${workers[@]}" ${parts[$1]}
}

[ $# -gt 0 ] || set -- write decode prefill masks far model fuzz
for part in "$@"; do
  [ "$part" = fuzz ] || [ -n "${parts[$part]:-}" ] || {
    echo "part: expected one of write, decode, prefill, masks, far, model, fuzz, got $part" >&2
    exit 2
  }
done
"$python" -c "import torch; assert torch.cuda.is_available()" 2> /dev/null || {
  echo "test_gpu.sh: expected a CUDA device and a torch that sees it, found none with $python" >&2
  exit 2
}
failed=()
for part in "$@"; do
  run "$part" || failed+=("$part")
done
[ ${#failed[@]} -eq 0 ] || {
  echo "failed: ${failed[*]}" >&2
  exit 1
}
