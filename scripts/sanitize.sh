#!/usr/bin/env bash
# compute-sanitizer over a small case of each GPU kernel; needs a CUDA device. Fails on any finding.
# usage: scripts/sanitize.sh [memcheck|racecheck ...]
#   KERNELS="decode gluon_prefill" scripts/sanitize.sh    only these of the list below
#   WARM=1 scripts/sanitize.sh    the same cases without the sanitizer: compiles, into Triton's cache
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# Every allocation its own, so that a read past a tensor is a read past an allocation.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# What runs for a kernel: a file of tests/ops, and which of its cases.
declare -A files=(
  [decode]=attend/decode/test_triton [gluon_decode]=attend/decode/test_gluon [merge]=attend/flash/test_triton_merge
  [prefill]=attend/prefill/test_triton [gluon_prefill]=attend/prefill/test_gluon
  [mask]=attend/interval/test_triton [gluon_mask]=attend/interval/test_triton [mask_plan]=attend/interval/test_triton
  [latent]=attend/latent/test_triton [gluon_latent]=attend/latent/test_gluon
  [write]=rope_write/test_triton [in_turn]=rope_write/test_triton_in_turn [in_lanes]=rope_write/test_triton_in_turn_lanes
  [gather]=gather/test_triton [hadamard]=triton/test_hadamard
)
declare -A cases=(
  [decode]="reads_every_format or windows_sinks_and_softcap[16 or segments_join and -16 or of_many_pieces"
  [gluon_decode]="every_format and 64 and (int8] or fp8] or int4]) or segments_join and int4"
  [write]="test_every_format"
  [gather]="one_request_of_every_format and 64 or spans_fill"
  [merge]="partials_join"
  [prefill]="test_every_format or keys_split or sinks or mixed_step"
  [gluon_prefill]="test_every_format and fp16 or capped_workspace or keys_split or softcap"
  [mask]="portable and (in_a_ragged_batch or formats_in_prefill) or splits_of_a_decode"
  [gluon_mask]="hopper and (in_a_ragged_batch or formats_in_prefill)"
  [mask_plan]="device_plan_is_the_torch_plan or order_is_by_visits"
  [hadamard]="every_row and not 700"
  [in_turn]="rounded_in_turn and 128"
  [in_lanes]="of_the_reference and 128"
  [latent]="heads_and_drafts or a_fresh_prompt"
  [gluon_latent]="heads_and_drafts or windows_sinks_and_softcap"
)

find_sanitizer() {
  command -v compute-sanitizer && return
  for found in /usr/local/cuda*/bin/compute-sanitizer; do
    [ -x "$found" ] && echo "$found" && return
  done
  echo "compute-sanitizer: expected in PATH or in /usr/local/cuda*/bin, found in neither" >&2
  return 1
}

run() { # kernel, then what runs pytest
  local kernel=$1
  shift
  "$@" "$python" -m pytest -q -W ignore -k "${SANITIZE_CASES:-${cases[$kernel]}}" \
    "tests/ops/${files[$kernel]}.py"
}

# What racecheck says of a Gluon kernel's warps (2025.3, CUDA 13): "Race reported between Read access
# at prefill_kernel+0x140 and Write access at +0x97a0, +0x12020", and nothing of TMA or mbarriers.
# The read is the byte that tells waiting warps what to run, which Triton's gl.warp_specialize reads
# between two BAR.SYNC 1 of the whole block; the writes come before such a barrier, but at another
# instruction of it (nvdisasm). The code is the compiler's: findings at the lines it belongs to, the
# kernel's first and those of the call (_roles), are counted and let pass, any other fails.
dispatch_only() { # what the sanitizer said
  local said=$1 lines
  lines=$(grep -nE '^def \w+_kernel\(|^(def |    )_roles\(|^    gl\.warp_specialize\(' src/quantpage/ops/attend/*/gluon_kernel.py |
    sed -E 's|^.*/([^/]+):([0-9]+):.*|\1:\2|')
  grep -oE '(Read|Write) access at .*' "$said" | grep -oE '\w+\.py:[0-9]+' | sort | uniq -c
  [ -n "$lines" ] && ! grep -E '^FAILED|[0-9] failed' "$said" &&
    ! grep -E 'Error:|Warning:' "$said" | grep -v 'Race reported' &&
    ! grep 'access at' "$said" | grep -vwFf <(printf '%s\n' "$lines")
}

chosen=${KERNELS:-decode gluon_decode write gather merge prefill gluon_prefill mask gluon_mask mask_plan hadamard in_turn in_lanes latent gluon_latent}
if [ -n "${WARM:-}" ]; then
  for kernel in $chosen; do run "$kernel"; done
  exit
fi
sanitizer=$(find_sanitizer)
said=$(mktemp)
trap 'rm -f "$said"' EXIT
for tool in ${@:-memcheck racecheck}; do
  for kernel in $chosen; do
    echo "$tool: $kernel"
    failed=0
    run "$kernel" "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
      > "$said" 2>&1 || failed=$?
    if [ "$tool $failed" = "racecheck 9" ] && dispatch_only "$said"; then
      failed=0
    fi
    if [ "$failed" != 0 ]; then
      cat "$said"
      exit "$failed"
    fi
    grep -E 'passed|SUMMARY|100%' "$said"
  done
done
