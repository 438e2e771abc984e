#!/usr/bin/env bash
# Puts load on a service that it starts, in every shape or in those that are named, and leaves a report, JSON and pictures. Arguments go to `loadtest run`.
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
export SQLX_OFFLINE=true
tools/setup.sh run
# shellcheck source=tools/measured-service.sh
source tools/measured-service.sh
trap measured_stop EXIT
measured_start busybox python node gcc

out=$CARGO_TARGET_DIR/load/$(date +%Y-%m-%dT%H-%M-%S)
outcome=0
MAYFLY_TOKEN=$measured_token "$CARGO_TARGET_DIR/release/loadtest" run --url "$measured_url" --data-dir "$measured_folder/data" \
    --about "$(measured_about)" --out "$out" "$@" || outcome=$?
[[ ! -d $out ]] || printf 'load: report, JSON and pictures are in %s\n' "$out"
exit "$outcome"
