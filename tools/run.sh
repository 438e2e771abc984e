#!/usr/bin/env bash
# Sets up, builds, starts the service with a first image, does a first run, and serves until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'run: %s\n' "$*" >&2; exit 1; }

((EUID == 0)) || fail 'sandboxes need root: sudo make run'
DATA_DIR=${DATA_DIR:-/var/lib/mayfly}
LISTEN=${LISTEN:-127.0.0.1:8080}
METRICS_LISTEN=${METRICS_LISTEN:-127.0.0.1:9464}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
export SQLX_OFFLINE=true

tools/setup.sh run
cargo build --workspace --release --locked
archive=$(images/python/build.sh)

mayfly=$CARGO_TARGET_DIR/release/mayfly
said=$(mktemp)
# In a session of its own, so that Ctrl-C reaches this script alone and the service is stopped once, in order.
setsid "$mayfly" serve --data-dir "$DATA_DIR" --listen "$LISTEN" --metrics-listen "$METRICS_LISTEN" >"$said" &
service=$!

stop() {
    trap - EXIT
    trap '' INT TERM
    rm -f "$said"
    if kill -TERM "$service" 2>/dev/null; then
        printf '\nrun: stopping\n'
        wait "$service" || true
    fi
}
trap stop EXIT
trap 'exit 0' INT TERM

for ((tries = 0; ; tries++)); do
    grep -q '^mayfly is ready on ' "$said" && break
    kill -0 "$service" 2>/dev/null || fail 'the service did not start; what it said stands above'
    ((tries < 600)) || fail 'the service is not ready after a minute'
    sleep 0.1
done
cat "$said"

url=http://$LISTEN
token() { "$mayfly" token --data-dir "$DATA_DIR" --tenant demo --sub "$1" --scope "$2" --ttl 24h; }
admin=$(token operator admin)
user=$(token me 'runs sandboxes:read sandboxes:write images:read images:write volumes webhooks metrics:read')

# The same image is imported once: its manifest's digest says whether it is the same.
wanted=$(tar -xOf "$archive" index.json | jq -r '.manifests[0].digest')
held=$(curl -s -H "Authorization: Bearer $admin" "$url/v1/images/python" | jq -r '.digest // empty')
if [[ $held != "$wanted" ]]; then
    "$mayfly" image import "$archive" --reference python --url "$url" --token "$admin"
fi

request='{"image":"python","command":["python3","-c","print(\"hello from a sandbox\")"]}'
printf '\nA first run:\n'
curl -sS --fail-with-body -H "Authorization: Bearer $user" -H 'Content-Type: application/json' -d "$request" "$url/v1/runs" |
    jq '{id, state, stdout, reason: .outcome.reason, exit_code: .outcome.exit_code, usage: .outcome.usage}'

# As `make dashboard` has to be told of what is not where it looks by itself.
dashboard='make dashboard'
[[ $LISTEN == 127.0.0.1:8080 ]] || dashboard+=" LISTEN=$LISTEN"
[[ $METRICS_LISTEN == 127.0.0.1:9464 ]] || dashboard+=" METRICS_LISTEN=$METRICS_LISTEN"
[[ $DATA_DIR == /var/lib/mayfly ]] || dashboard+=" DATA_DIR=$DATA_DIR"

cat <<END

A token for the tenant "demo", good for a day:

export MAYFLY_TOKEN=$user

Try it (paste both into another terminal):

curl -sS -H "Authorization: Bearer \$MAYFLY_TOKEN" -H 'Content-Type: application/json' \\
  -d '$request' $url/v1/runs

Or as a command, with the output and the exit code of the program:

$mayfly run --url $url python -- python3 -c 'print("hello from a sandbox")'

Or at once:

curl -sS -H 'Authorization: Bearer $user' -H 'Content-Type: application/json' -d '$request' $url/v1/runs

Boards with live figures, from another terminal: $dashboard

Metrics: http://$METRICS_LISTEN/metrics   Contract: $url/openapi.yaml   Stop: Ctrl-C
END

# `wait` returns early on a signal we trap; the service's own end is the other way out.
wait "$service" || fail "the service ended with status $?"
