#!/usr/bin/env bash
# The tests of attach() against the oldest and the newest Transformers that pyproject.toml allows; the
# version in between is the pinned one, which scripts/test.sh runs.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=tests/integrations/hf_transformers
for pins in "transformers==5.12.1 tokenizers==0.22.2" "transformers==5.24.0"; do
  folder=".venv/range/${pins%% *}"
  if [ ! -f "$folder/.complete" ]; then
    rm -rf "$folder"
    # shellcheck disable=SC2086
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target "$folder" $pins
    touch "$folder/.complete"
  fi
  echo "integration tests with ${pins%% *}"
  PYTHONPATH="$folder" OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist worksteal \
    $tests/test_attach.py $tests/test_sizes.py $tests/hooks/test_supply.py $tests/hooks/test_own.py \
    $tests/steps/test_cpu.py $tests/steps/test_gpu.py $tests/modules/test_latent.py
done
