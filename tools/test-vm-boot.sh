#!/bin/busybox sh
# The first program in the machine of test-vm.sh: makes a disk and hands over to it. The tests cannot run from the initial ramdisk,
# out of which the kernel refuses pivot_root, and whose files cannot be mounted with mapped ids before Linux 6.3.
# shellcheck shell=dash
set -e
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
insmod /modules/overlay.ko
insmod /modules/brd.ko rd_nr=2 rd_size=524288
insmod /modules/loop.ko
insmod /modules/quota_tree.ko
insmod /modules/quota_v2.ko
insmod /modules/af_alg.ko
insmod /modules/vsock.ko
# The real one: busybox has one, too, which knows ext2 alone.
mount -o bind /dev /root/dev
chroot /root /usr/sbin/mke2fs -q -F -t ext4 -O extent,filetype,has_journal /dev/ram0 >/dev/null
umount /root/dev
mount -t ext4 /dev/ram0 /disk
cp -a /root/. /disk
cp /bin/busybox /disk/bin/busybox
umount /dev
exec switch_root /disk /sbin/init
