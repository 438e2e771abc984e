#!/usr/bin/env bash
# Measures parts of the programs by themselves. Arguments go to criterion: a part of a name (`launch`, `admission`), --save-baseline NAME, --baseline NAME.
set -euo pipefail
cd "$(dirname "$0")/.."

((EUID == 0)) || { echo 'bench-micro: sandboxes need root' >&2; exit 1; }
tools/setup.sh run
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
export SQLX_OFFLINE=true
# shellcheck source=tools/scratch-postgres.sh
source tools/scratch-postgres.sh
trap scratch_postgres_stop EXIT
scratch_postgres_start
cargo bench --locked --package sandbox-core --bench launch --bench log --bench unpack -- "$@"
DATABASE_URL=$scratch_url cargo bench --locked --package mayfly --bench admission --bench logs -- "$@"
