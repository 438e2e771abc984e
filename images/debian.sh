# An image of Debian's packages, with no registry at hand. Sourced by recipes, after common.sh.
# shellcheck shell=bash
# shellcheck disable=SC2016 # "$1" in a hook is the new root: mmdebstrap fills it in.
# shellcheck disable=SC2154 # `work` is where `reuse` of common.sh has a recipe work

# debian PACKAGES [CONFIG…]: finishes an image of this Debian's smallest system and these packages (commas between), with options of `umoci config`.
debian() {
    local packages=$1 sources suite
    shift
    # This machine's own sources say where Debian's packages are. Sources of other vendors are left out.
    sources=/etc/apt/sources.list.d/debian.sources
    [[ -f $sources ]] || sources=/etc/apt/sources.list
    suite=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
    # Times stay as the packages have them: Python compares its byte code with them and would compile at every start.
    mmdebstrap --quiet --variant=minbase --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/lintian/*' \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/cache/debconf/* "$1"/var/log/*' \
        --customize-hook='rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/etc/apt/apt.conf.d/*proxy* "$1"/etc/resolv.conf "$1"/etc/hostname' \
        --customize-hook='install -d -m 1777 "$1"/work' \
        "$suite" "$work/root.tar" "$sources" >&2
    finish "$work/root.tar" \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        --config.env LANG=C.UTF-8 \
        --config.workingdir /work \
        "$@"
}
