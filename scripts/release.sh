#!/usr/bin/env bash
# A release, up to the two lines that make it public, which it prints.
# usage: scripts/release.sh VERSION     (semantic: before 1.0 a minor number may break what is public)
# Before: write "## VERSION (not released)" over the changelog's entries, and commit.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/release.sh VERSION}
[ "$(git branch --show-current)" = main ] || { echo "release: expected the branch main" >&2; exit 2; }
[ -z "$(git status --porcelain)" ] || { echo "release: expected nothing that is not committed" >&2; exit 2; }
! git rev-parse -q --verify "refs/tags/v$version" > /dev/null || { echo "release: v$version is there already" >&2; exit 2; }

# What fails from here on leaves the checkout as it was.
trap 'git checkout -q -- .' ERR
"${PYTHON:-python3}" scripts/release.py "$version"
scripts/test.sh
scripts/docs.sh
scripts/wheels.sh ${WHEELS:-}    # WHEELS=--all for every platform, with docker
git commit -qam "Version $version"
git tag -a "v$version" -m "QuantPage $version"
echo "release: v$version is tagged and dist/ is built. To publish:" >&2
echo "  git push origin main v$version"
echo "  python -m twine upload dist/*"
