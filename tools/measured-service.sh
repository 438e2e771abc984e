# A release service of one's own to be measured: durable, with a private Postgres and the starter images. Sourced by load.sh and bench.sh.
# shellcheck shell=bash
# Needs CARGO_TARGET_DIR. Sets measured_folder, measured_url and measured_token; whoever sources it traps EXIT with measured_stop.

measured_folder=
measured_service=

# measured_start IMAGE…: builds, starts, imports these.
measured_start() {
    ((EUID == 0)) || { echo 'measuring: sandboxes need root' >&2; return 1; }
    cargo build --workspace --release --locked
    local image
    for image; do "images/$image/build.sh" >/dev/null; done

    # On a disk, and reachable by the service's own user.
    measured_folder=$(mktemp -d /var/tmp/mayfly-measured.XXXXXX)
    chmod 755 "$measured_folder"
    local mayfly=$CARGO_TARGET_DIR/release/mayfly
    # What is measured is the machine, not what a node promises of it: 1,000 idle sandboxes and bursts of a hundred are more CPU and memory than this
    # machine has, none of them uses what it is promised, and nobody is to wait in the queue for that.
    setsid "$mayfly" serve --data-dir "$measured_folder/data" --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 \
        --overcommit-cpu-percent 20000 --overcommit-memory-percent 400 \
        --tenant-quotas '{"sandboxes": null, "queued": null, "log_bytes": null}' \
        >"$measured_folder/said" 2>"$measured_folder/log" &
    measured_service=$!
    local tries
    for ((tries = 0; ; tries++)); do
        measured_url=$(sed -nE 's/^mayfly is ready on (http:[^ ,]*).*/\1/p' "$measured_folder/said")
        [[ -z $measured_url ]] || break
        if ! kill -0 "$measured_service" 2>/dev/null || ((tries == 600)); then
            cat "$measured_folder/log" >&2
            return 1
        fi
        sleep 0.1
    done
    local admin
    admin=$("$mayfly" token --data-dir "$measured_folder/data" --tenant operator --sub operator --scope admin --ttl 1h)
    for image; do
        "$mayfly" image import "$("images/$image/build.sh" 2>/dev/null)" --reference "$image" --url "$measured_url" --token "$admin" >/dev/null
    done
    # shellcheck disable=SC2034 # whoever sources this uses it
    measured_token=$("$mayfly" token --data-dir "$measured_folder/data" --tenant load --sub load --scope 'runs sandboxes:read sandboxes:write' --ttl 12h)
}

# shellcheck disable=SC2329 # the trap calls it
measured_stop() {
    [[ -z $measured_service ]] || { kill -TERM "$measured_service" && wait "$measured_service"; } || true
    [[ -z $measured_folder ]] || rm -rf --one-file-system "$measured_folder"
}

# What stands at the head of every report.
measured_about() {
    printf '%s cores (%s), %s GiB, Linux %s, %s' "$(nproc)" "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)" \
        "$(awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo)" "$(uname -r)" "$(date -I)"
}
