#!/usr/bin/env bash
# Runs all tests that this machine can run, with everything they need. Arguments go to the test runner: `--test limits`, a name, …
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh test
((EUID == 0)) || { echo 'test: the tests start sandboxes: run them as root' >&2; exit 1; }

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
export SQLX_OFFLINE=true
# The programs that the tests start are built first, as cargo builds tests: it builds a package's own programs for its tests, not another's.
# The steps at which crash tests kill are in these programs, and in none that is installed.
cargo build --workspace --all-targets --locked --features fail-points

outcome=0
machines=
# Every service of this run keeps its data below this folder, so that what an interrupted run leaves is known by it and ended.
MAYFLY_TEST_FOLDER=$(mktemp -d /var/tmp/mayfly-tests.XXXXXX)
export MAYFLY_TEST_FOLDER
chmod 755 "$MAYFLY_TEST_FOLDER"

# shellcheck source=tools/scratch-postgres.sh
source tools/scratch-postgres.sh
# shellcheck disable=SC2317 # the trap calls it
clean_up() {
    local signal pid
    if [[ -n $machines ]]; then
        kill -TERM -- "-$machines" 2>/dev/null || true
        rm -f "$said_by_machines"
    fi
    for signal in TERM QUIT KILL; do
        for pid in $(pgrep -f "$MAYFLY_TEST_FOLDER"); do
            printf 'test: ending what was left running: %s\n' "$(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c -100)" >&2
            kill "-$signal" "$pid" || true
        done
        for _ in {1..50}; do
            pgrep -f "$MAYFLY_TEST_FOLDER" >/dev/null || break 2
            sleep 0.1
        done
    done
    rm -rf --one-file-system "$MAYFLY_TEST_FOLDER"
    scratch_postgres_stop
}
trap clean_up EXIT

# The other cgroup world, beside all other tests: its clock is its own, and it has only what time they leave. Whoever named some tests did not ask for it.
if (($# == 0)); then
    if [[ $(uname -m) == x86_64 ]]; then
        said_by_machines=$(mktemp)
        TIMEOUT_S=${TIMEOUT_S:-4800} setsid chrt --idle 0 tools/test-vm.sh >"$said_by_machines" 2>&1 &
        machines=$!
    else
        echo 'test: not run on this machine: the keeper under pure cgroup v2 (tools/test-vm.sh boots an x86-64 machine)' >&2
    fi
fi
images/busybox/build.sh >/dev/null
# Each unpacks packages with one processor.
builders=()
for image in python node gcc; do
    "images/$image/build.sh" >/dev/null &
    builders+=($!)
done
for builder in "${builders[@]}"; do wait "$builder"; done
scratch_postgres_start

# One service for all tests that do not need their own. It lives as long as we hold its stdin, and Ctrl-C is not for it.
coproc SERVICE { exec setsid "$CARGO_TARGET_DIR/debug/mayfly-test-service"; }
# shellcheck disable=SC2153 # coproc sets it
service_pid=$SERVICE_PID
service_in=${SERVICE[1]}
IFS= read -r place <&"${SERVICE[0]}" || { echo 'test: the service for the tests did not start' >&2; exit 1; }

runner=(test --no-fail-fast)
if cargo nextest --version >/dev/null 2>&1; then
    runner=(nextest run --no-fail-fast)
fi
said=$MAYFLY_TEST_FOLDER/said
MAYFLY_TEST_SERVICE=$place DATABASE_URL=$scratch_url cargo "${runner[@]}" --workspace --locked --features fail-points "$@" 2> >(tee "$said" >&2) || outcome=$?

exec {service_in}>&-
if ! wait "$service_pid"; then
    echo 'test: the service that the tests shared did not end cleanly' >&2
    outcome=1
fi

if [[ -n $machines ]]; then
    echo 'test: the keeper under pure cgroup v2:' >&2
    wait "$machines" || outcome=1
    machines=
    cat "$said_by_machines" >&2
    rm -f "$said_by_machines"
    # The summary is what should stand last.
    sed -n '/^ *Summary/,$p' "$said" >&2
fi
exit "$outcome"
