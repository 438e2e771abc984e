#!/bin/busybox sh
# The first program in the machine of test-vm.sh: finds the disk and hands over to it. The tests cannot run from here, since
# the kernel refuses pivot_root out of an initial ramdisk.
# shellcheck shell=dash
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
for module in /modules/*; do
    insmod "$module" || exit 1
done
mount -t ext4 /dev/vda /disk || exit 1
umount /dev
exec switch_root /disk /sbin/init
