#!/usr/bin/env bash
# Checks every SQL query against a scratch database with our migrations and renews the offline cache in .sqlx.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh run

# shellcheck source=tools/scratch-postgres.sh
source tools/scratch-postgres.sh
scratch_postgres_start
for migration in migrations/*.sql; do
    scratch_psql -f "$migration"
done

rm -rf .sqlx
mkdir .sqlx
# The macros run while the crate is compiled: without a change in a file cargo would not compile it again.
touch service/src/lib.rs
DATABASE_URL=$scratch_url SQLX_OFFLINE=false SQLX_OFFLINE_DIR=$PWD/.sqlx cargo check -p mayfly --all-targets
printf '%s queries in .sqlx\n' "$(find .sqlx -name '*.json' | wc -l)"
