#!/usr/bin/env bash
# Checks every SQL query against a scratch database with our migrations and renews the offline cache in .sqlx.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh run

# shellcheck source=tools/scratch-postgres.sh
source tools/scratch-postgres.sh
trap scratch_postgres_stop EXIT
scratch_postgres_start
for migration in migrations/*.sql; do
    scratch_psql -f "$migration"
done

# Into a folder of its own first: others may be building with the old one.
new=$(mktemp -d .sqlx-new.XXXXXX)
chmod 755 "$new"
# The macros run while the crate is compiled: without a change in a file cargo would not compile it again.
touch service/src/lib.rs
DATABASE_URL=$scratch_url SQLX_OFFLINE=false SQLX_OFFLINE_DIR=$PWD/$new cargo check -p mayfly --all-targets
rm -rf .sqlx
mv "$new" .sqlx
printf '%s queries in .sqlx\n' "$(find .sqlx -name '*.json' | wc -l)"
