#!/usr/bin/env bash
# Make .venv and install what is pinned; does nothing when nothing changed. Sourced by demo and test.
# usage: scripts/setup.sh [requirements files]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
files=(requirements.txt "$@")
stamp=.venv/.installed
wanted=$(cat "${files[@]}" pyproject.toml CMakeLists.txt csrc/* 2>/dev/null | cksum)

if [ ! -x .venv/bin/python ]; then
  echo "setup: making .venv" >&2
  "$python" -m venv .venv
fi
if [ "$(cat "$stamp" 2>/dev/null)" != "${files[*]} $wanted" ]; then
  for file in "${files[@]}"; do
    echo "setup: installing $file" >&2
    .venv/bin/pip install --quiet --disable-pip-version-check -r "$file"
  done
  echo "setup: installing quantpage" >&2
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
  echo "${files[*]} $wanted" > "$stamp"
fi
