#!/usr/bin/env bash
# Everything that has to pass: style, types, import direction, tests.
# usage: scripts/test.sh [pytest arguments]    (with arguments: only pytest)
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh requirements-dev.txt requirements-docs.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/python -m quantpage.demo_model --to models/smollm2 > /dev/null
if [ $# -gt 0 ]; then
  exec .venv/bin/pytest "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
.venv/bin/lint-imports
.venv/bin/python scripts/structure.py --check
.venv/bin/python scripts/figures.py --check
# One thread a process: the tests are many and small.
OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist worksteal
scripts/test_transformers_range.sh
