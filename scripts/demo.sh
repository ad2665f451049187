#!/usr/bin/env bash
# The main job on a fresh machine: SmolLM2-135M-Instruct answers through an int8 cache.
# usage: scripts/demo.sh [prompt]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/python -m quantpage.demo_model --to models/smollm2 > /dev/null
exec .venv/bin/quantpage generate --model models/smollm2 --kv-format int8 --compare \
  --max-new-tokens 96 --prompt "${1:-Why is the sky blue? Answer in three sentences.}"
