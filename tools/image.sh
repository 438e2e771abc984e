#!/usr/bin/env bash
# Builds the image of a node from the Dockerfile, without a registry and without a daemon: its base is made of Debian's packages, and the programs are those that cargo built here. Prints the path of an OCI archive.
#
#   IMAGE=mayfly:0.1.0     what it is called in the archive
#   DEBIAN=bookworm        the release that its base is of
#   BASE_IMAGE=…           another base, as buildah names images: registry.example/debian@sha256:…
#   PROGRAMS=…             a folder of programs that are built already
#   SOURCE_DATE_EPOCH=…    the time that everything in it bears; that of the last commit, unless it is given
#   OUT=…                  where the archive goes
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'image: %s\n' "$*" >&2; }

target=${CARGO_TARGET_DIR:-$PWD/target}
version=$(sed -nE '/^\[workspace.package\]/,/^\[/s/^version = "(.*)"/\1/p' Cargo.toml)
image=${IMAGE:-mayfly:$version}
debian=${DEBIAN:-$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")}
out=${OUT:-$target/mayfly-image.oci.tar}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

programs=${PROGRAMS:-}
if [[ -z $programs ]]; then
    cargo build --release --locked --package mayfly --package sandbox-core --bins >&2
    programs=$target/release
fi

mkdir -p "$target"
work=$(mktemp -d "$target/.image.XXXXXX")
store() { buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$@"; }
trap 'chmod -R u+rwX "$work" 2>/dev/null || true; rm -rf --one-file-system "$work"' EXIT

# The smallest Debian with what the Dockerfile would install, so that building asks nobody for anything. Kept beside what is built: packages are the same for the same file.
base_of_packages() {
    local sources=/etc/apt/sources.list.d/debian.sources recipe kept
    [[ -f $sources ]] || sources=/etc/apt/sources.list
    recipe=$({ uname -m; printf '%s\n' "$debian"; cat "$sources" tools/image.sh; } | sha256sum | cut -c -16)
    kept=${XDG_CACHE_HOME:-$target}/mayfly-image-base-$recipe.tar
    if [[ ! -f $kept ]]; then
        say "making a base of Debian's packages"
        # Every time in it is the same, so that the same packages are the same base.
        # shellcheck disable=SC2016 # "$1" in a hook is the new root: mmdebstrap fills it in.
        SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --variant=minbase --include=apparmor,ca-certificates,e2fsprogs,util-linux \
            --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
            --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
            --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/cache/ldconfig/aux-cache "$1"/var/cache/debconf/* "$1"/var/log/*' \
            --customize-hook='rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/*proxy* "$1"/etc/resolv.conf "$1"/etc/hostname' \
            "$debian" "$work/base.tar" "$sources" >&2
        mv "$work/base.tar" "$kept"
    fi
    local container
    container=$(store from scratch)
    store add --quiet "$container" "$kept" / >/dev/null
    store commit --quiet --timestamp 0 "$container" localhost/mayfly-base >/dev/null
    store rm "$container" >/dev/null
    printf 'localhost/mayfly-base'
}
base=${BASE_IMAGE:-$(base_of_packages)}

# In place of the Dockerfile's first stage: what that would leave. Programs only: beside them cargo keeps gigabytes.
mkdir -p "$work/programs/target/release"
for program in mayfly sandbox-keeper sandbox-init sandbox-unpack; do
    install -m 0755 "$programs/$program" "$work/programs/target/release/"
    strip --strip-debug "$work/programs/target/release/$program"
done

say "building $image"
store build --quiet --isolation chroot --pull=never --timestamp "$SOURCE_DATE_EPOCH" \
    --build-arg "DEBIAN=$debian" --build-arg "BASE_IMAGE=$base" --build-context "programs=$work/programs" \
    --label "org.opencontainers.image.title=mayfly" --label "org.opencontainers.image.version=$version" --label "org.opencontainers.image.licenses=Apache-2.0" \
    --tag "localhost/$image" . >/dev/null
mkdir -p "$(dirname "$out")"
rm -f "$out"
store push --quiet "localhost/$image" "oci-archive:$out:$image" >&2
say "$image: $(du -h "$out" | cut -f1)"
printf '%s\n' "$out"
