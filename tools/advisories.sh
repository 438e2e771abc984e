#!/usr/bin/env bash
# Looks for known faults in what we depend on. Says so when their database cannot be had: a check that was not made is no success.
set -euo pipefail
cd "$(dirname "$0")/.."

# Offline, an old database serves; where there is none, that is told and not taken for a fault of ours.
timeout 60 cargo deny --all-features fetch db >/dev/null 2>&1 || echo 'check: advisories: their database cannot be fetched now' >&2
if compgen -G "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs/*/.git" >/dev/null; then
    cargo deny --offline --all-features check advisories
else
    echo 'check: advisories: NOT CHECKED: the database (rustsec/advisory-db) was never fetched on this machine' >&2
fi
