#!/usr/bin/env bash
# The server asked by schemathesis, which draws calls from its own OpenAPI: no status but those that are described, none of 5xx.
#   scripts/try_openapi.sh [examples a call]      in an environment of its own, .venv-schemathesis
set -euo pipefail
cd "$(dirname "$0")/.."
env=.venv-schemathesis
[ -f $env/ready ] || { python3 -m venv $env; $env/bin/pip install --quiet --disable-pip-version-check schemathesis; touch $env/ready; }
work=$(mktemp -d)
trap 'kill $server 2> /dev/null || true; rm -rf "$work"' EXIT
.venv/bin/python -c "from tests.server.small import save_small; save_small('$work/small', context=128)" 2> /dev/null
.venv/bin/quantpage serve --model "$work/small" --engine embedded --port 0 --memory 4MiB --page-size 16 --prefix-cache-file "$work/known" 2> "$work/log" &
server=$!
until url=$(grep -o 'http://[0-9.:]*' "$work/log"); do kill -0 $server || { cat "$work/log"; exit 1; }; sleep 1; done
# Left out: a body of the described shape may still be refused (a prompt that is too long, both of two parameters).
$env/bin/st run "$url/openapi.json" --max-examples "${1:-40}" --phases fuzzing --request-timeout 60 --continue-on-failure \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
