#!/usr/bin/env bash
# The compiled core's tests under the address and undefined-behaviour sanitizers.
# usage: scripts/sanitize_cpu.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cmake -S . -B "$folder" -DCMAKE_BUILD_TYPE=None -DQUANTPAGE_SANITIZE=ON > /dev/null
cmake --build "$folder" --parallel "$(nproc)" > /dev/null
# Leaks of the interpreter and of torch are not ours to judge.
LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  .venv/bin/python - "$folder"/libquantpage_cpu* "$@" <<'PYTHON'
import sys

from quantpage import cpu_core

cpu_core.use_library(sys.argv[1])
assert cpu_core.find_core() is not None, cpu_core.absence()

import pytest

tests = (
    "tests/cpu_core/test_products.py",
    "tests/ops/attend/cpu",
    "tests/ops/attend/test_hidden_numbers.py",
    "tests/ops/attend/test_unlike_values.py",
    "tests/ops/rope_write/test_cpu.py",
    "tests/ops/gather/test_cpu.py",
    "tests/ops/test_far_pages.py",
    "tests/ops/test_latent_rows.py",
)
quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
sys.exit(pytest.main([*tests, *quiet, *sys.argv[2:]]))
PYTHON
