#!/usr/bin/env bash
# Make .venv, fetch the small model, and serve it to OpenAI clients through an int8 cache.
# usage: scripts/serve.sh [flags of `quantpage serve`]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/python -m quantpage.demo_model --to models/smollm2 > /dev/null
exec .venv/bin/quantpage serve --model models/smollm2 "$@"
