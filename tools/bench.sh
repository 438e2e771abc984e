#!/usr/bin/env bash
# Measures the service beside bubblewrap, crun and runc on this machine, and writes docs/performance.md. RUNS=200 by default.
set -euo pipefail
cd "$(dirname "$0")/.."

((EUID == 0)) || { echo 'bench: sandboxes need root' >&2; exit 1; }
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
export SQLX_OFFLINE=true
tools/setup.sh bench
cargo build --workspace --release --locked
busybox=$(images/busybox/build.sh)
python=$(images/python/build.sh)

# On a disk, and reachable by the service's own user.
folder=$(mktemp -d /var/tmp/mayfly-bench.XXXXXX)
chmod 755 "$folder"
service=
stop() {
    [[ -z $service ]] || { kill -TERM "$service" && wait "$service"; } || true
    rm -rf --one-file-system "$folder"
}
trap stop EXIT

mayfly=$CARGO_TARGET_DIR/release/mayfly
setsid "$mayfly" serve --data-dir "$folder/data" --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 >"$folder/said" 2>"$folder/log" &
service=$!
for ((tries = 0; ; tries++)); do
    url=$(sed -nE 's/^mayfly is ready on (http:[^ ,]*).*/\1/p' "$folder/said")
    [[ -z $url ]] || break
    if ! kill -0 "$service" 2>/dev/null || ((tries == 600)); then
        cat "$folder/log" >&2
        exit 1
    fi
    sleep 0.1
done
admin=$("$mayfly" token --data-dir "$folder/data" --tenant bench --sub bench --scope admin --ttl 2h)
"$mayfly" image import "$busybox" --reference busybox --url "$url" --token "$admin" >/dev/null
"$mayfly" image import "$python" --reference python --url "$url" --token "$admin" >/dev/null

unpack() {
    mkdir "$folder/$2"
    tar -C "$folder/$2" -xf "$1"
    umoci raw unpack --image "$folder/$2:latest" "$folder/$2-root"
}
unpack "$busybox" busybox
unpack "$python" python

about="$(nproc) cores ($(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)), Linux $(uname -r), $(date -I)"
# crun 1.8 takes a hybrid host's nearly empty cgroup2 for the whole: it must not see it. Only our own mount namespace changes.
# shellcheck disable=SC2016 # the inner shell fills in its arguments
unshare --mount --propagation private sh -c '
    if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
    exec "$@"
' sh "$CARGO_TARGET_DIR/release/loadtest" bench --url "$url" --token "$admin" --busybox-root "$folder/busybox-root" \
    --python-root "$folder/python-root" --runs "${RUNS:-200}" --about "$about" --markdown docs/performance.md
