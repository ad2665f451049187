#!/usr/bin/env bash
# Make .venv and install what is pinned; does nothing when nothing changed. Called by demo and test.
# usage: scripts/setup.sh [requirements files]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# Two commands at once: the second waits for the first, then finds the work done.
exec 9>.venv.lock
if command -v flock >/dev/null && ! flock -n 9; then
  echo "setup: another one is under way; waiting for it" >&2
  flock 9
fi
if [ ! -x .venv/bin/python ]; then
  echo "setup: making .venv" >&2
  "$python" -m venv .venv
fi

# once STAMP SUM WORD PIP-ARGUMENTS: install, unless the stamp says that this very state is installed.
# A stamp each, so that demo and test do not undo each other's.
once() {
  local stamp=.venv/.$1 sum=$2 word=$3
  shift 3
  [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ] || return 0
  echo "setup: installing $word" >&2
  .venv/bin/pip install --quiet --disable-pip-version-check "$@"
  echo "$sum" > "$stamp"
}
for file in requirements.txt "$@"; do
  once "$file" "$(cksum < "$file")" "$file" -r "$file"
done
# An editable install knows its modules by name: one that moved is found after the next.
state=$(cat pyproject.toml CMakeLists.txt csrc/*; find src -name '*.py' | LC_ALL=C sort)
once quantpage "$(cksum <<< "$state")" quantpage --no-deps -e .
