#!/usr/bin/env bash
# Kills service, keeper and Postgres at every named step and at random moments under a mixed load, looks at everything after each kill, and
# makes ten thousand short runs; prints what was done. Arguments go to the test runner. MAYFLY_CRASH_SEED gives a seed again that a failure
# told; tests/crash.rs says what else can be set.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'test-crash: %s\n' "$*" >&2; exit 1; }

tools/setup.sh test
((EUID == 0)) || fail 'the tests start sandboxes: run them as root'

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
export SQLX_OFFLINE=true
cargo build --workspace --all-targets --locked --quiet --features fail-points
images/busybox/build.sh >/dev/null 2>&1

# Every service of this run keeps its data below this folder, so that what an interrupted run leaves is known by it and ended.
MAYFLY_TEST_FOLDER=$(mktemp -d /var/tmp/mayfly-crash.XXXXXX)
export MAYFLY_TEST_FOLDER
chmod 755 "$MAYFLY_TEST_FOLDER"
export MAYFLY_CRASH_TABLE=$MAYFLY_TEST_FOLDER/table
# shellcheck disable=SC2317 # the trap calls it
clean_up() {
    local signal pid
    for signal in TERM QUIT KILL; do
        for pid in $(pgrep -f "$MAYFLY_TEST_FOLDER"); do
            kill "-$signal" "$pid" || true
        done
        for _ in {1..50}; do
            pgrep -f "$MAYFLY_TEST_FOLDER" >/dev/null || break 2
            sleep 0.1
        done
    done
    rm -rf --one-file-system "$MAYFLY_TEST_FOLDER"
}
trap clean_up EXIT

export MAYFLY_CRASH_TURNS=${MAYFLY_CRASH_TURNS:-2} MAYFLY_CRASH_KILLS=${MAYFLY_CRASH_KILLS:-14} MAYFLY_CRASH_RUNS=${MAYFLY_CRASH_RUNS:-10000}
runner=(test --no-fail-fast --test crash)
if cargo nextest --version >/dev/null 2>&1; then
    # By a filter: naming the one program would have everything built in another way first.
    runner=(nextest run --no-fail-fast --cargo-quiet --profile crash --filterset 'binary(crash)')
fi
outcome=0
said=$MAYFLY_TEST_FOLDER/said
cargo "${runner[@]}" --workspace --locked --features fail-points "$@" >"$said" 2>&1 || outcome=$?
((outcome == 0)) || cat "$said"

[[ -s $MAYFLY_CRASH_TABLE ]] || fail 'nothing was counted'
{
    printf 'victim\tkilled at\tkills\taccepted\tlog bytes\tsnapshots\tends by reason\n'
    sort "$MAYFLY_CRASH_TABLE"
    awk -F '\t' '{ kills += $3; accepted += $4; bytes += $5; snapshots += $6 }
        END { printf "all\t\t%d\t%d\t%d\t%d\t\n", kills, accepted, bytes, snapshots }' "$MAYFLY_CRASH_TABLE"
} | awk -F '\t' '{ printf "%-16s %-32s %6s %9s %12s %10s  %s\n", $1, $2, $3, $4, $5, $6, $7 }'
# Who asked for some tests alone did not ask for that many.
(($# > 0)) || awk -F '\t' '{ kills += $3 } END { exit kills < 200 }' "$MAYFLY_CRASH_TABLE" || fail 'fewer than 200 kills'
exit "$outcome"
