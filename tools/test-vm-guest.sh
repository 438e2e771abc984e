#!/bin/busybox sh
# What the machine of test-vm.sh does with its disk: mounts what a Linux has, runs the tests, says how they ended, goes off.
# shellcheck shell=dash
/bin/busybox --install -s /bin
export PATH=/usr/bin:/bin

die() {
    echo "test-vm: $*"
    poweroff -f
}

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
mount -t securityfs security /sys/kernel/security
mount -t cgroup2 cgroup2 /sys/fs/cgroup || die 'no cgroup2'
hostname -F /etc/hostname
# Attacks on other processes are to be stopped by us and not by Yama.
echo 0 >/proc/sys/kernel/yama/ptrace_scope
ifconfig lo 127.0.0.1 up

# A second disk, with the quotas that the first one lacks: layers on disk are made in another way there.
mkdir /quotas
# By its path: busybox' shell takes its own program of that name otherwise.
/usr/sbin/mke2fs -q -F -b 4096 -I 256 -O extent,filetype,has_journal,quota,project -E quotatype=prjquota /dev/ram1 >/dev/null || die 'no second disk'
mount -t ext4 -o prjquota /dev/ram1 /quotas || die 'no project quotas'

# Without these it would only repeat what other machines test.
lsm=$(sed -n 's/.*security=\([a-z]*\).*/\1/p' /proc/cmdline)
grep -qw "$lsm" /sys/kernel/security/lsm || die "$lsm is off"
for controller in cpu io memory pids; do
    grep -qw "$controller" /sys/fs/cgroup/cgroup.controllers || die "cgroup2 has no controller $controller"
done
echo "test-vm: Linux $(uname -r), cgroup2 with $(cat /sys/fs/cgroup/cgroup.controllers), $(cat /sys/kernel/security/lsm)"

if [ "$lsm" = selinux ]; then
    mount -t selinuxfs selinux /sys/fs/selinux || die 'no selinuxfs'
    # The kernel takes a policy in one write.
    dd if=/etc/policy.selinux of=/sys/fs/selinux/load bs=1M conv=notrunc 2>/dev/null || die 'the kernel refuses the SELinux policy'
fi

set --
while IFS= read -r word; do
    set -- "$@" "$word"
done <"/etc/command.$(sed -n 's/.*machine=\([a-z0-9-]*\).*/\1/p' /proc/cmdline)"
"$@"
echo "test-vm: the tests ended with $?"
poweroff -f
