# Shared by the recipes in this folder: where images are kept, when one is built again, how a layer becomes an OCI archive.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -n ${XDG_CACHE_HOME:-} ]]; then
    cache=$XDG_CACHE_HOME/mayfly/images
else
    cache=${CARGO_TARGET_DIR:-$here/../target}/images
fi
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

say() { printf '%s\n' "$*" >&2; }

# reuse NAME: prints the archive's path and ends the recipe if it was built from exactly these files before.
# The platform belongs to the recipe: a cache may be shared between machines.
reuse() {
    name=$1
    archive=$cache/$name.oci.tar
    recipe=$({ uname -m; cat "$here"/*.sh; find "$here/$name" -type f -print0 | sort -z | xargs -0 cat; } | sha256sum | cut -d' ' -f1)
    if [[ -f $archive && -f $archive.recipe && $(<"$archive.recipe") == "$recipe" ]]; then
        say "image $name: already built ($(du -h "$archive" | cut -f1))"
        printf '%s\n' "$archive"
        exit 0
    fi
    say "image $name: building"
    started=$SECONDS
    work=$(mktemp -d "$cache/.$name.XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
}

# finish LAYER_TAR CONFIG…: makes the OCI archive of one layer and a config (options of `umoci config`), and prints its path.
finish() {
    local layer=$1 layout=$work/layout
    shift
    umoci init --layout "$layout"
    umoci new --image "$layout:latest"
    umoci raw add-layer --image "$layout:latest" "$layer"
    umoci config --image "$layout:latest" "$@"
    umoci gc --layout "$layout"
    tar -C "$layout" --owner=0 --group=0 --numeric-owner -cf "$work/archive.tar" oci-layout index.json blobs
    mv "$work/archive.tar" "$archive"
    printf '%s\n' "$recipe" >"$archive.recipe"
    say "image $name: $(du -h "$archive" | cut -f1) in $((SECONDS - started)) s"
    printf '%s\n' "$archive"
}
