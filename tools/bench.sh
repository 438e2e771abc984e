#!/usr/bin/env bash
# Measures the service beside bubblewrap, crun, runc, runsc and Docker Engine on this machine, and beside what it promises; renews docs/performance.md.
# RUNS=400 ROWS=1000000 SANDBOXES=1000 PAGE=docs/performance.md by default; pictures go to OUT.
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
export SQLX_OFFLINE=true
tools/setup.sh bench
# shellcheck source=tools/measured-service.sh
source tools/measured-service.sh
engine=
# shellcheck disable=SC2329 # the trap calls it
stop() {
    if [[ -n $engine ]]; then
        { kill -TERM "$engine" && wait "$engine"; } || true
        rmdir /sys/fs/cgroup/{.,*}/"$groups" 2>/dev/null || true
    fi
    measured_stop
}
trap stop EXIT
measured_start busybox python

unpack() {
    mkdir "$measured_folder/$1"
    tar -C "$measured_folder/$1" -xf "$("images/$1/build.sh" 2>/dev/null)"
    umoci raw unpack --image "$measured_folder/$1:latest" "$measured_folder/$1-root" >/dev/null
}
unpack busybox
unpack python

# crun 1.8 and Docker 20.10 take a hybrid host's nearly empty cgroup2 for the whole: they must not see it. Only a mount namespace of their own changes.
without_cgroup2() {
    # shellcheck disable=SC2016 # the inner shell fills in its arguments
    exec unshare --mount --propagation private sh -c '
        if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
        exec "$@"
    ' sh "$@"
}

# A Docker Engine of our own with its own containerd, without any network and with nothing of one that may run here already.
groups=mayfly-bench-$$
docker=$measured_folder/docker
mkdir "$docker"
echo '{}' >"$docker/config.json"
(without_cgroup2 setsid dockerd --config-file "$docker/config.json" --data-root "$docker/data" --exec-root "$docker/exec" --pidfile "$docker/pid" \
    --host "unix://$docker/sock" --cgroup-parent "/$groups" --bridge=none --iptables=false --ip-forward=false --ip-masq=false \
    --log-level error >"$docker/log" 2>&1) &
engine=$!
for ((tries = 0; ; tries++)); do
    ! curl -sf --unix-socket "$docker/sock" http://docker/_ping >/dev/null || break
    if ! kill -0 "$engine" 2>/dev/null || ((tries == 300)); then
        cat "$docker/log" >&2
        exit 1
    fi
    sleep 0.1
done

export MAYFLY_URL=$measured_url MAYFLY_TOKEN=$measured_token
(without_cgroup2 "$CARGO_TARGET_DIR/release/loadtest" bench --data-dir "$measured_folder/data" --docker-socket "$docker/sock" \
    --busybox-root "$measured_folder/busybox-root" --python-root "$measured_folder/python-root" \
    --runs "${RUNS:-400}" --rows "${ROWS:-1000000}" --sandboxes "${SANDBOXES:-1000}" --about "$(measured_about)" \
    --markdown "${PAGE:-docs/performance.md}" --out "${OUT:-$CARGO_TARGET_DIR/bench}" "$@")
