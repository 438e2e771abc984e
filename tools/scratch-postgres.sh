# A Postgres that lives as long as the script that sources this: on loopback, in a temporary folder, without durability.
# shellcheck shell=bash
# Sets scratch_url. To be sourced under `set -euo pipefail`; whoever sources it traps EXIT with scratch_postgres_stop.

scratch_bin=$(compgen -G '/usr/lib/postgresql/*/bin' | sort -V | tail -n 1)
scratch_folder=
scratch_url=

# The server refuses root: it runs as `nobody` then.
scratch_as_user() {
    if ((EUID == 0)); then setpriv --reuid=nobody --regid=nogroup --clear-groups -- "$@"; else "$@"; fi
}

scratch_psql() { "$scratch_bin/psql" --quiet --no-psqlrc -v ON_ERROR_STOP=1 "$scratch_url" "$@"; }

scratch_postgres_start() {
    scratch_folder=$(mktemp -d /tmp/mayfly-postgres.XXXXXX)
    chmod 755 "$scratch_folder"
    ((EUID != 0)) || chown nobody "$scratch_folder"
    (
        cd "$scratch_folder" || exit
        scratch_as_user "$scratch_bin/initdb" -D "$scratch_folder/data" -U mayfly --auth=trust --no-sync -E UTF8 --locale=C.UTF-8 >/dev/null
        # Port 0 is not to be had from Postgres: a free one is searched for.
        for _ in 1 2 3 4 5; do
            port=$((20000 + RANDOM % 20000))
            if scratch_as_user "$scratch_bin/pg_ctl" -D "$scratch_folder/data" -l "$scratch_folder/log" -s -w start \
                -o "-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories=$scratch_folder -c fsync=off -c max_connections=200"; then
                printf '%s' "$port" >"$scratch_folder/port"
                exit 0
            fi
        done
        cat "$scratch_folder/log" >&2
        exit 1
    )
    scratch_url=postgres://mayfly@127.0.0.1:$(<"$scratch_folder/port")/postgres
}

scratch_postgres_stop() {
    [[ -n $scratch_folder ]] || return 0
    (cd / && scratch_as_user "$scratch_bin/pg_ctl" -D "$scratch_folder/data" -s -m immediate stop) || true
    rm -rf --one-file-system "$scratch_folder"
    scratch_folder=
}
