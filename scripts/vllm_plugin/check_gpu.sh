#!/usr/bin/env bash
# vLLM 0.33 on a GPU with QuantPage's pages: do a random float32 model's answers leave quantpage.attach's on the same GPU?
#   scripts/vllm_plugin/check_gpu.sh [FOLDER] [NAME..]  PYTHON: one that has vLLM, CUDA and quantpage; settings side by side; all, or those
#                                          of these names: plain, keys (key maps), windows,
#                                          engine (sleep mode, torch.compile)
#   TP=2 scripts/vllm_plugin/check_gpu.sh [FOLDER] [NAME..]  on two GPUs of one host, tensor-parallel: int4, int8
# Each setting's result is printed when it ends. One setting compiles all kernels at its start (--warm-up), the others what they need.
# Products with codes are in 16 bits on a GPU, which moves this model's log-probabilities by up to 0.24 (k8v4, docs/vllm.md): an answer may leave where
# the best token led by less than TIE (0.25 logits). Whether it is rounding that moves them scripts/vllm_plugin/logits_gpu.sh says. Exact pages
# are as long as vLLM's blocks have room for (formats.exact_page): what is expected has pages of that size. `none` has no kernel for float32.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} folder=${1:-/tmp/quantpage-vllm-gpu} failed=0
wanted=" ${*:2} " tp=${TP:-1}
asked() { [[ "$wanted" != *[a-z]* || "$wanted" == *" $1 "* ]]; }
check() { HF_HUB_OFFLINE=1 "$python" scripts/vllm_plugin/check.py "$@" --dtype float32; }
expected=()
prepare() {  # FOLDER FAMILY FORMAT-PAGE...: a model, and in the background what it should answer
  local model=$1 family=$2 each; shift 2
  mkdir -p "$model"
  [ -f "$model/prompts.json" ] || check model "$model" --family "$family" --head-dim 128 || exit 1
  for each; do
    # Of an earlier version, maybe.
    rm -f "$model/expect-$each.json"
    { check expect "$model" "${each%-*}" "${each#*-}" > "$model/expect-$each.log" 2>&1 || echo "FAILED: see $model/expect-$each.log"; } &
    expected+=($!)
  done
}

graphs='compilation_config={"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY","cudagraph_capture_sizes":[5]}'
# Settings are checked side by side on one card: none may ask what is free.
shared=('attention_config={"backend":"CUSTOM"}' kv_cache_memory_bytes=3000000000 gpu_memory_utilization=0.1)
running=() cases=0
case_() {  # EXPECTED KV_DTYPE SETTINGS...: in the background; what it says when it ends
  local expect=$1 dtype=$2 log
  shift 2
  log=${model:-$folder}/run-$dtype-$((cases++)).log
  (
    SECONDS=0
    check run "${model:-$folder}" "$dtype" --expect "$expect" --wait 300 --tie "${TIE:-0.25}" ${warm:-} --set "${shared[@]}" "$@" > "$log" 2>&1
    code=$?
    said=$(grep -hE '^quantpage_|^  tokens|^  where' "$log" | cut -c1-240)
    if [ $code -ne 0 ]; then said+=$'\n'"FAILED: see $log"; fi
    # At once, as others end too.
    echo "$said"$'\n'"  in $SECONDS s"
    exit $code
  ) &
  running+=($!)
}
finish() {
  local each
  for each in "${running[@]}"; do wait "$each" || failed=1; done
  running=()
}
if [ "$tp" -gt 1 ]; then
  # Sums over NCCL alone, without NVLink's multicast.
  export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0 VLLM_ALLREDUCE_USE_FLASHINFER=0
  export VLLM_ENABLE_V1_MULTIPROCESSING=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  shared+=(tensor_parallel_size="$tp" disable_custom_all_reduce=true)
  # One after the other: two servers' sums would wait for each other's turn on the cards.
  if asked int4; then prepare "$folder" llama int4-32; case_ int4-32 quantpage_int4 block_size=256 enforce_eager=false "$graphs"; fi
  if asked int8; then prepare "$folder" llama int8-64; fi
  finish
  if asked int8; then case_ int8-64 quantpage_int8 block_size=64; finish; fi
  exit $failed
fi
if asked plain; then
  prepare "$folder" llama int8-64 fp8-64 k8v4-32 int4-32 int8_exact-32 int6-64 int4_near8-64
  # Seven processes of each kind would start more slowly than one after the other.
  wait "${expected[@]}"
  case_ int8-64 quantpage_int8 block_size=64
  case_ int8-64 quantpage_int8 block_size=64 max_num_batched_tokens=64 max_num_seqs=8
  case_ fp8-64 quantpage_fp8 block_size=64 enforce_eager=false "$graphs"
  case_ k8v4-32 quantpage_k8v4 block_size=192
  finish
  warm=--warm-up case_ int4-32 quantpage_int4 block_size=256 enforce_eager=false "$graphs"
  case_ int8_exact-32 quantpage_int8_exact block_size=128 enforce_eager=false "$graphs"
  case_ int6-64 quantpage_int6 block_size=64 enforce_eager=false "$graphs"
  case_ int4_near8-64 quantpage_int4_near8 block_size=128 enforce_eager=false "$graphs"
  finish
fi
if asked keys; then
  # Keys with large biases, taken out by the maps of a calibration; without its file answers are others.
  model=$folder/keys
  # In int4 this model makes another text of a rounding: scripts/vllm_plugin/logits_gpu.sh FOLDER keys.
  prepare "$model" qwen2 int6-64
  check run "$model" quantpage_int6 --calibration none --expect int6-64 --wait 300 --tie "${TIE:-0.25}" --set "${shared[@]}" block_size=64 > "$model/without.log" 2>&1 &
  without=$!
  case_ int6-64 quantpage_int6 block_size=64 enforce_eager=false "$graphs"
  finish
  if wait $without || ! grep -q 'wrong answers' "$model/without.log"; then
    failed=1; echo "FAILED: without the key maps answers are the same: see $model/without.log"
  else
    echo "without the key maps: $(grep -o '[0-9]* wrong answers' "$model/without.log")"
  fi
fi
if asked windows; then
  model=$folder/windows
  prepare "$model" gemma3 int8-64 k8v4-32 int4-32
  case_ int8-64 quantpage_int8 block_size=64 enforce_eager=false "$graphs"
  case_ k8v4-32 quantpage_k8v4 block_size=192
  case_ int4-32 quantpage_int4 block_size=256 enforce_eager=false "$graphs"
  case_ int4-32 quantpage_int4 block_size=256 max_num_batched_tokens=64 max_num_seqs=8
  finish
fi
if asked engine; then
  model=
  prepare "$folder" llama int8-64 int4-32
  case_ int8-64 quantpage_int8 block_size=64 --sleep
  case_ int4-32 quantpage_int4 block_size=256 enforce_eager=false "$graphs" --sleep
  # As vLLM compiles a model where nobody asks for less.
  compiled='compilation_config={"mode":3,"cudagraph_capture_sizes":[5]}'
  case_ int8-64 quantpage_int8 block_size=64 enforce_eager=false "$compiled"
  case_ int4-32 quantpage_int4 block_size=256 enforce_eager=false "$compiled"
  finish
fi
exit $failed
