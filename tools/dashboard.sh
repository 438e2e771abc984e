#!/usr/bin/env bash
# Shows the boards with the live figures of a service that runs beside, until Ctrl-C: on console pages of Prometheus, and in Grafana where that is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'dashboard: %s\n' "$*" >&2; exit 1; }
say() { printf 'dashboard: %s\n' "$*" >&2; }
ask() { curl -sS --noproxy '*' --max-time 10 "$@"; }

DATA_DIR=${DATA_DIR:-/var/lib/mayfly}
MAYFLY_URL=${MAYFLY_URL:-http://${LISTEN:-127.0.0.1:8080}}
METRICS_LISTEN=${METRICS_LISTEN:-127.0.0.1:9464}
PROMETHEUS_LISTEN=${PROMETHEUS_LISTEN:-127.0.0.1:9090}
GRAFANA_LISTEN=${GRAFANA_LISTEN:-127.0.0.1:3000}
mayfly=${CARGO_TARGET_DIR:-$PWD/target}/release/mayfly
boards=(overview node launch tenant)
scrape_interval=2s
rate_interval=30s

tools/setup.sh dashboard
ask --fail --output /dev/null "http://$METRICS_LISTEN/metrics" ||
    fail "no service tells its figures at http://$METRICS_LISTEN/metrics: start one with 'make run' in another terminal, or say where it is (METRICS_LISTEN=127.0.0.1:9464)"

folder=$(mktemp -d)
children=()
stop() {
    trap - EXIT
    trap '' INT TERM
    local child
    for child in "${children[@]}"; do kill -TERM "$child" 2>/dev/null || true; done
    wait "${children[@]}" 2>/dev/null || true
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 0' INT TERM

# Neither Prometheus nor Grafana needs to be root, or to outlive this script; Ctrl-C is for this script alone.
unprivileged=(setpriv --pdeathsig TERM)
((EUID)) || unprivileged+=(--reuid nobody --regid nogroup --clear-groups --bounding-set=-all --no-new-privs)
# start LOG COMMAND…: a child of this script, which ends with it.
start() {
    local log=$1
    shift
    setsid "${unprivileged[@]}" "$@" >"$log" 2>&1 </dev/null &
    children+=($!)
}
# until_it LOG COMMAND…: waits until the youngest child does what the command asks for.
until_it() {
    local log=$1 tries
    shift
    for ((tries = 0; ; tries++)); do
        "$@" && return
        kill -0 "${children[-1]}" 2>/dev/null || { tail -n 5 "$log" >&2; return 1; }
        ((tries < 600)) || { tail -n 5 "$log" >&2; return 1; }
        sleep 0.1
    done
}

# The boards, the rules and what shows them, where a program that is nobody can read them.
mkdir "$folder"/{boards,consoles,assets,data,grafana}
cp helm/dashboards/*.json "$folder/boards/"
cp helm/dashboards/alerts.yaml "$folder/"
cp -r helm/dashboards/grafana "$folder/provisioning"
cp tools/dashboard/board.{js,css} "$folder/assets/"
names=$(printf '%s\n' "${boards[@]}" | jq -R . | jq -s .)
titles=$(cd helm/dashboards && jq -n --argjson names "$names" '[inputs | .title] | [$names, .] | transpose | map({ name: .[0], title: .[1] })' "${boards[@]/%/.json}")
for board in "${boards[@]}"; do
    jq -r --arg name "$board" --argjson boards "$titles" --arg rate_interval "$rate_interval" -f tools/dashboard/console.jq \
        "helm/dashboards/$board.json" >"$folder/consoles/$board.html"
done

# A tenant's own figures need a token of it: what the caller has, or one that the service's own secret makes.
may_read_metrics() { [[ -n $1 ]] && ask --fail --output /dev/null --header @- "$MAYFLY_URL/v1/metrics" <<<"Authorization: Bearer $1" 2>/dev/null; }
token=${MAYFLY_TOKEN:-}
# Nobody below needs it but by way of its file.
unset MAYFLY_TOKEN
if ! may_read_metrics "$token" && [[ -r $DATA_DIR/jwt-secret && -x $mayfly ]]; then
    token=$("$mayfly" token --data-dir "$DATA_DIR" --tenant demo --sub dashboard --scope metrics:read --ttl 720h)
fi
tenant=
if may_read_metrics "$token"; then
    (umask 077 && printf '%s' "$token" >"$folder/token")
    tenant="  - job_name: mayfly-tenant
    scheme: ${MAYFLY_URL%%://*}
    metrics_path: /v1/metrics
    authorization: { credentials_file: token }
    static_configs: [{ targets: ['${MAYFLY_URL#*://}'] }]"
else
    say "the tenant's board stays empty: it needs MAYFLY_TOKEN, of a token with metrics:read"
fi
cat >"$folder/prometheus.yml" <<END
global: { scrape_interval: $scrape_interval, scrape_timeout: $scrape_interval, evaluation_interval: $scrape_interval }
rule_files: [alerts.yaml]
scrape_configs:
  - job_name: mayfly
    static_configs: [{ targets: ['$METRICS_LISTEN'] }]
$tenant
END
((EUID)) || chown -R nobody:nogroup "$folder"

prometheus=
is_scraping() {
    prometheus=$(sed -nE 's/.*msg="Listening on".* address=([^ ]+).*/\1/p' "$folder/prometheus.log")
    [[ -n $prometheus ]] && ask --fail "http://$prometheus/api/v1/query?query=up%7Bjob%3D%22mayfly%22%7D" 2>/dev/null |
        jq -e '.data.result[0].value[1] == "1"' >/dev/null
}
start "$folder/prometheus.log" prometheus --config.file="$folder/prometheus.yml" --storage.tsdb.path="$folder/data" \
    --web.listen-address="$PROMETHEUS_LISTEN" --web.console.templates="$folder/consoles" --web.console.libraries="$folder/consoles" \
    --web.user-assets="$folder/assets"
until_it "$folder/prometheus.log" is_scraping ||
    fail "Prometheus does not come to scrape; if its port is taken, name another one (PROMETHEUS_LISTEN=127.0.0.1:9091)"

for board in "${boards[@]}"; do printf 'Board:   http://%s/consoles/%s.html\n' "$prometheus" "$board"; done
printf 'Alerts:  http://%s/alerts   Any question: http://%s/graph\n' "$prometheus" "$prometheus"

server=()
if command -v grafana >/dev/null; then
    server=(grafana server)
elif command -v grafana-server >/dev/null; then
    server=(grafana-server)
fi
if ((${#server[@]})); then
    # A package has its files there; an archive that was unpacked, beside its programs.
    home=$(dirname "$(dirname "$(readlink -f "$(command -v "${server[0]}")")")")
    [[ -e $home/conf/defaults.ini ]] || home=/usr/share/grafana
    start "$folder/grafana.log" env MAYFLY_PROMETHEUS_URL="http://$prometheus" MAYFLY_SCRAPE_INTERVAL="$scrape_interval" MAYFLY_BOARDS="$folder/boards" \
        GF_PATHS_PROVISIONING="$folder/provisioning" GF_PATHS_DATA="$folder/grafana" GF_PATHS_LOGS="$folder/grafana" GF_PATHS_PLUGINS="$folder/grafana" \
        GF_SERVER_HTTP_ADDR="${GRAFANA_LISTEN%:*}" GF_SERVER_HTTP_PORT="${GRAFANA_LISTEN##*:}" \
        GF_AUTH_ANONYMOUS_ENABLED=true GF_AUTH_ANONYMOUS_ORG_ROLE=Viewer GF_AUTH_DISABLE_LOGIN_FORM=true \
        GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH="$folder/boards/overview.json" \
        GF_ANALYTICS_REPORTING_ENABLED=false GF_ANALYTICS_CHECK_FOR_UPDATES=false GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES=false GF_PLUGINS_PREINSTALL_DISABLED=true \
        "${server[@]}" --homepath="$home"
    is_serving() { ask --fail --output /dev/null "http://$GRAFANA_LISTEN/api/health" 2>/dev/null; }
    until_it "$folder/grafana.log" is_serving || fail "Grafana does not come to serve; if its port is taken, name another one (GRAFANA_LISTEN=127.0.0.1:3001)"
    printf 'Grafana: http://%s/dashboards\n' "$GRAFANA_LISTEN"
else
    say 'Grafana is not installed here: where it is, the same boards are shown in it, too'
fi
printf 'Stop: Ctrl-C\n'

# `wait` returns early on a signal we trap; the end of a child is the other way out.
wait -n "${children[@]}" || fail "what showed the boards ended with status $?"
