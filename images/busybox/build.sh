#!/usr/bin/env bash
# Builds the tiny `busybox` image: a static shell and the small C programs that tests and benchmarks run. Prints the archive's path.
set -euo pipefail
# shellcheck source=images/common.sh
source "$(dirname "$0")/../common.sh"

reuse busybox

root=$work/root
install -d -m 755 "$root" "$root"/{bin,etc,proc,dev,root,home}
install -d -m 1777 "$root/tmp" "$root/work"
install -d -m 755 -o 1000 -g 1000 "$root/home/user"

install -m 755 "$(command -v busybox)" "$root/bin/busybox"
"$root/bin/busybox" --list | while read -r applet; do
    [[ $applet == busybox ]] || ln -s busybox "$root/bin/$applet"
done

# Our programs come after the applets, so that `true` is the smallest program there can be and not busybox.
for source in "$here"/busybox/*.c; do
    program=$root/bin/$(basename "$source" .c)
    rm -f "$program"
    gcc -static -O2 -Wall -Wextra -Werror -s -o "$program" "$source"
done

printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\nuser:x:1000:\nextra:x:1001:user\n' >"$root/etc/group"

tar -C "$root" --numeric-owner --sort=name -cf "$work/root.tar" .
finish "$work/root.tar" \
    --config.env PATH=/bin \
    --config.cmd sh \
    --config.workingdir /work
