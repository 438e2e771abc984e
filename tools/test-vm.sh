#!/usr/bin/env bash
# Runs the keeper's tests where cgroup v2 is the only one and AppArmor is on, and those of tests/selinux where SELinux is on, in small
# emulated machines with Debian's kernel. Each has one processor, which takes one of ours: two of them share the keeper's tests.
# LSMS (apparmor selinux) says in which. Arguments go to the tests, as in `tools/test-vm.sh limits --exact …`, and one machine after the
# other then. Only installing packages needs root. TIMEOUT_S (2400) bounds the life of each machine.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'test-vm: %s\n' "$*" >&2; exit 1; }
say() { printf 'test-vm: %s\n' "$*" >&2; }

[[ $(uname -m) == x86_64 ]] || fail 'the machine that it boots is an x86-64 one, and so must this be'
tools/setup.sh vm

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
cache=${XDG_CACHE_HOME:+$XDG_CACHE_HOME/mayfly}
cache=${cache:-$CARGO_TARGET_DIR}/vm
mkdir -p "$cache"
work=$(mktemp -d "$cache/.work.XXXXXX")
beside=
# shellcheck disable=SC2317,SC2329 # the trap calls it
clean_up() {
    [[ -z $beside ]] || kill -TERM -- "-$beside" 2>/dev/null || true
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT

# A file system and RAM disks to run on, what layers on disk are made with; sockets that attacks try to make.
modules=(overlay brd loop quota_tree quota_v2 af_alg vsock)
# The kernel's package is unpacked, not installed: how this machine boots is none of our business.
find_kernel() { kernel_package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: //p' | head -n 1); }
fetch_kernel() {
    [[ -n $kernel_package ]] || return
    kernel=$cache/$kernel_package-${#modules[@]}
    [[ ! -d $kernel ]] || return 0
    say "fetching $kernel_package"
    # apt's own user, to which it drops for the download, may not look into our folder.
    (cd "$work" && apt-get download -q -o APT::Sandbox::User=root "$kernel_package" >&2) &&
        dpkg -x "$work/$kernel_package"_*.deb "$work/package" &&
        mkdir "$work/kernel" &&
        mv "$work/package/boot"/vmlinuz-* "$work/kernel/vmlinuz" &&
        for module in "${modules[@]}"; do
            find "$work/package/lib/modules" -name "$module.ko" -exec mv -t "$work/kernel" {} +
            [[ -e $work/kernel/$module.ko ]] || return 1
        done &&
        mv -T "$work/kernel" "$kernel"
}
find_kernel
if ! fetch_kernel; then
    say 'refreshing the package lists'
    apt-get update -q >&2 || true
    find_kernel
    fetch_kernel || fail 'fetching the kernel (linux-image-cloud-amd64) failed'
fi

say 'building'
# With the features of the other tests: without them half the libraries would be built once more.
built=$(cargo build --workspace --lib --bins --examples --test keeper --test selinux --locked --features fail-points --message-format json |
    grep -E '"package_id":"[^"]*/sandbox-core#' | sed -nE 's/.*"executable":"([^"]+)".*/\1/p' |
    grep -E '/(keeper-[^/]*|selinux-[^/]*|weak_keeper|sandbox-(keeper|init|unpack))$')
suite_of() { grep "/$1-[^/]*\$" <<<"$built" || fail "cargo built no test program $1"; }
keeper=$(suite_of keeper)
selinux=$(suite_of selinux)

# One initial ramdisk holds everything. The programs and their libraries lie at the paths that they have here, where they look for
# each other. setsid is util-linux': the tests use an option of it that busybox' lacks. mke2fs is what the keeper makes layers with.
initial=$work/initial
root=$initial/root
mkdir -p "$initial"/{bin,dev,disk,modules} "$root"/{bin,dev,etc,proc,run,sys,tmp}
chmod 1777 "$root/tmp"
while IFS= read -r program; do
    install -D "$program" "$root$program"
    strip "$root$program"
    while IFS= read -r library; do
        [[ -e $root$library ]] || install -D "$library" "$root$library"
    done < <({ ldd "$program" 2>/dev/null || true; } | grep -oE '/[^ ]+')
done <<<"$built"$'\n'"$(command -v setsid)"$'\n'"$(command -v prlimit)"$'\n'"$(command -v apparmor_parser)"$'\n'/usr/sbin/mke2fs$'\n'"$(command -v runsc)"
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\n' >"$root/etc/group"
echo machine >"$root/etc/hostname"
# command_of MACHINE WORD…: what its guest runs.
command_of() { printf '%s\n' "${@:2}" >"$root/etc/command.$1"; }
command_of apparmor "$keeper" "$@"
names=$("$keeper" --list --format terse | sed -n 's/: test$//p')
for half in 0 1; do
    mapfile -t of_half < <(sed -n "$((half + 1))~2p" <<<"$names")
    command_of "apparmor-$half" "$keeper" --exact "${of_half[@]}"
done
# One of them switches enforcing off for a moment.
command_of selinux "$selinux" --test-threads=1 "$@"
secilc -c 33 -o "$root/etc/policy.selinux" -f /dev/null sandbox-core/tests/selinux/policy.cil
install -D tools/test-vm-guest.sh "$root/sbin/init"
install tools/test-vm-boot.sh "$initial/init"
install "$(command -v busybox)" "$initial/bin/busybox"
cp "$kernel"/*.ko "$initial/modules/"
(cd "$initial" && find . | cpio --quiet -o -H newc -R 0:0) >"$work/initial.cpio"

# Its clock counts instructions (two nanoseconds each), not the time of this machine: however slow emulation is and however busy this
# machine, limits in time are met exactly or not at all. That takes one processor, and no device that answers in our time. The rest is
# speed: string instructions (erms, fsrm) are emulated byte by byte under such a clock; a larger cache of translated code
# (tb-size, in MiB) is searched longer than it saves; mitigations of processor errata switch page tables all the time.
emulator=(
    qemu-system-x86_64 -accel 'tcg,tb-size=256' -cpu 'max,erms=off,fsrm=off' -smp 1 -m 2048 -icount 'shift=1,sleep=off' -rtc clock=vm
    -display none -vga none -monitor none -net none -serial stdio -no-reboot
    -kernel "$kernel/vmlinuz" -initrd "$work/initial.cpio"
    -append
)
# boot MACHINE: runs what its guest is to run, and fails as that fails.
boot() {
    local console=$work/console.$1 status
    local options="console=ttyS0 loglevel=1 panic=-1 mitigations=off cgroup_no_v1=all security=${1%-*} selinux=1 enforcing=1 machine=$1"
    say "booting $1"
    timeout --foreground --kill-after=5 "${TIMEOUT_S:-2400}" "${emulator[@]}" "$options" </dev/null |
        sed -uE 's/\r$//; /reboot: Power down$/d' | tee "$console" | sed -u "s/^/$1: /" ||
        fail "$1 did not come to its end; what it said stands above"
    status=$(sed -n 's/^test-vm: the tests ended with //p' "$console")
    [[ -n $status ]] || fail "$1 ended without a result; what it said stands above"
    return "$status"
}
ended=0
read -ra machines <<<"${LSMS:-apparmor selinux}"
if [[ $# == 0 && ${machines[0]} == apparmor ]]; then
    # A process group of its own, which ends with us.
    set -m
    boot apparmor-0 &
    beside=$!
    set +m
    machines[0]=apparmor-1
fi
for machine in "${machines[@]}"; do boot "$machine" || ended=$?; done
if [[ -n $beside ]]; then
    wait "$beside" || ended=$?
    beside=
fi
exit "$ended"
