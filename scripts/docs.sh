#!/usr/bin/env bash
# The documentation site in build/site, from docs/ and the docstrings; whatever is wrong with it is an error.
# usage: scripts/docs.sh             build/site/index.html opens without a server
#        scripts/docs.sh --serve     build it again whenever a page changes
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh requirements-docs.txt
# The theme's team warns of another project's plans.
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = --serve ]; then
  exec .venv/bin/mkdocs serve
fi
# Not --quiet, with which --strict lets warnings pass.
.venv/bin/mkdocs build --strict
echo "docs: build/site/index.html" >&2
