#!/usr/bin/env bash
# vLLM 0.33 on a GPU with QuantPage's pages: is what its answers differ by from quantpage.attach's rounding, or a defect? (scripts/vllm_plugin/logits.py)
#   scripts/vllm_plugin/logits_gpu.sh [FOLDER] [keys]   PYTHON: one that has vLLM, CUDA and quantpage; all side by side, about two minutes
#                                                keys: of a model with key biases and its key maps, in int4 and int6 alone
# The reference computes attention in float32 from the same codes; attach computes it by kernels, whose products with codes are in 16 bits. Exact
# pages are as long as vLLM's blocks have room for (formats.exact_page).
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} folder=${1:-/tmp/quantpage-vllm-logits} failed=0
mkdir -p "$folder"
export HF_HUB_OFFLINE=1
kind=${2:-plain} family=llama
[ "$kind" = keys ] && family=qwen2
[ -f "$folder/prompts.json" ] || "$python" scripts/vllm_plugin/check.py model "$folder" --family "$family" --head-dim 128 --dtype float32 || exit 1
running=()
logits() {  # NAME ARGUMENTS...: in the background; its words go to a log
  local name=$1; shift
  "$python" scripts/vllm_plugin/logits.py "$1" "$folder" "${@:2}" --name "$name" > "$folder/$name.log" 2>&1 &
  running+=("$!:$name")
}
inside() {  # NAME KV_DTYPE SETTINGS...; side by side on one card: none may ask what is free
  local name=$1 dtype=$2; shift 2
  logits "$name" run "$dtype" --set 'attention_config={"backend":"CUSTOM"}' kv_cache_memory_bytes=3000000000 gpu_memory_utilization=0.1 "$@"
}
graphs='compilation_config={"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY","cudagraph_capture_sizes":[5]}'
if [ "$kind" = keys ]; then
  inside int4-vllm quantpage_int4 block_size=256 enforce_eager=false "$graphs"
  inside int6-vllm quantpage_int6 block_size=64 enforce_eager=false "$graphs"
  formats=("int4 32" "int6 64") noisy="int4 32"
else
  inside k8v4-vllm quantpage_k8v4 block_size=192
  inside int4-vllm quantpage_int4 block_size=256
  inside int4-graphs quantpage_int4 block_size=256 enforce_eager=false "$graphs"
  inside int8-vllm quantpage_int8 block_size=64
  inside k8v4-chunks quantpage_k8v4 block_size=192 max_num_batched_tokens=64 max_num_seqs=8
  formats=("k8v4 32" "int4 32" "int8 64") noisy="k8v4 32"
fi
for each in "${formats[@]}"; do
  logits "${each% *}-attach" attach $each
  logits "${each% *}-float32" attach $each --by torch
done
# How much this model makes of one relative error of attention's results.
logits "${noisy% *}-noise" attach $noisy --by torch --noise 1e-3
for each in "${running[@]}"; do
  wait "${each%%:*}" || { failed=1; echo "FAILED: ${each#*:}"; tail -n 5 "$folder/${each#*:}.log" | cut -c1-300; }
done
compare() { "$python" scripts/vllm_plugin/logits.py compare "$folder" "$1-float32" "$1-attach" "${@:2}" || failed=1; }
if [ "$kind" = keys ]; then
  compare int4 int4-vllm
  compare int6 int6-vllm
else
  compare k8v4 k8v4-vllm k8v4-chunks
  compare int4 int4-vllm int4-graphs
  compare int8 int8-vllm
fi
noisy=${noisy% *}
"$python" scripts/vllm_plugin/logits.py compare "$folder" "$noisy-float32" "$noisy-noise" "$noisy-attach"
exit $failed
