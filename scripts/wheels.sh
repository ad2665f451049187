#!/usr/bin/env bash
# A wheel and an sdist of this checkout in dist/, and the wheel tried in a fresh environment.
# usage: scripts/wheels.sh          a wheel for this machine
#        scripts/wheels.sh --all    manylinux wheels through cibuildwheel (needs docker)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/build"
rm -rf dist
"$work/build/bin/pip" install --quiet --disable-pip-version-check build
if [ "${1:-}" = --all ]; then
  "$work/build/bin/pip" install --quiet --disable-pip-version-check cibuildwheel
  "$work/build/bin/python" -m build --quiet --sdist --outdir dist
  "$work/build/bin/python" -m cibuildwheel --output-dir dist dist/*.tar.gz
else
  # The wheel is made from the sdist, so that what is missing in the sdist is found.
  "$work/build/bin/python" -m build --quiet --outdir dist
fi

echo "wheels: trying $(ls dist/*.whl)" >&2
"$python" -m venv "$work/fresh"
"$work/fresh/bin/pip" install --quiet --disable-pip-version-check --find-links dist quantpage
# Away from the checkout, so that the installed package is what is tried.
cd "$work"
fresh/bin/quantpage --version
fresh/bin/quantpage formats --quiet
fresh/bin/quantpage doctor
# Without Transformers a command says what it needs, in one line.
code=0
fresh/bin/quantpage capacity --model . --memory 1GiB --quiet 2> said || code=$?
cat said >&2
[ $code = 3 ] && [ "$(wc -l < said)" = 1 ]
