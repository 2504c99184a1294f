#!/bin/sh
# Builds the root disk that every VM of the stories starts from, and its kernel:
#
#   image.sh OUTDIR SUITE SOURCES APTCONF MORE
#
# writes OUTDIR/root.img (raw, one partition with ext4) and OUTDIR/vmlinuz. Runs as root. SUITE is Debian's release; SOURCES is a file of apt
# sources for it, or "" for mmdebstrap's default mirror; APTCONF is a file of apt settings (proxies); MORE are packages
# besides those that every story needs. Nothing of the agent is in here: what changes with every commit is laid on top later, so that this is built once.
set -eu
export LC_ALL=C PATH="/usr/sbin:/sbin:$PATH"

out=$1 suite=$2 sources=$3 aptconf=$4 more=$5

# strace, procps: the stories look at processes. rpm: one installs our package with it. gdisk etc. are not needed: sfdisk of the host partitions the disk.
packages='systemd systemd-sysv udev dbus kmod linux-image-cloud-amd64 cryptsetup-bin dmsetup e2fsprogs xfsprogs
mdadm iproute2 strace procps rpm '"$more"

work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root

set -- --variant=minbase --format=directory --aptopt="$aptconf" \
    --include="$(echo "$packages" | tr -s ' \n' ',' | sed 's/,$//')" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/info/*'
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ ! -e "$keyring" ] || set -- "$@" --keyring="$keyring"
# The kernel has NVMe and ext4 built in: the root disk needs no initramfs, and a boot without one is quicker.
export INITRD=No
if [ -n "$sources" ]; then
    mmdebstrap "$@" "$suite" "$root" "$sources"
else
    mmdebstrap "$@" "$suite" "$root"
fi

# Nothing but the story should run, and nothing should run in the middle of it.
for unit in serial-getty@ttyS0.service getty@tty1.service getty.target \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    mdcheck_start.timer mdcheck_continue.timer mdmonitor.service mdmonitor-oneshot.timer \
    fstrim.timer systemd-tmpfiles-clean.timer systemd-timesyncd.service systemd-pstore.service \
    systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-user-sessions.service \
    systemd-logind.service user.slice console-getty.service systemd-resolved.service \
    systemd-rfkill.service systemd-networkd.service systemd-networkd.socket systemd-networkd-wait-online.service modprobe@drm.service modprobe@efi_pstore.service \
    modprobe@fuse.service modprobe@configfs.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount \
    ldconfig.service systemd-firstboot.service systemd-journal-catalog-update.service systemd-update-done.service \
    systemd-hwdb-update.service systemd-sysusers.service systemd-boot-system-token.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done

# The journal of every boot is kept: a story searches all of them for secrets.
mkdir -p "$root/var/log/journal"
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=persistent\nRateLimitBurst=0\nMaxLevelConsole=debug\n' >"$root/etc/systemd/journald.conf.d/story.conf"
echo node >"$root/etc/hostname"
: >"$root/etc/fstab"
# A fixed machine id: a first boot would otherwise write one and enable every preset.
echo 5709f1c0d3a84d0fa9d6fe1a6a7f0b11 >"$root/etc/machine-id"
passwd -R "$root" -d root
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/lib/dpkg/info/*.md5sums
rm -rf "$root"/etc/apt/apt.conf.d/99mmdebstrap "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/*
rm -f "$root"/etc/resolv.conf

cp "$(find "$root/boot" -name 'vmlinuz-*' | sort | tail -n 1)" "$work/vmlinuz"
rm -rf "${root:?}"/boot/*

# Partitioned, as a real boot disk is: root=PARTUUID=... finds it without an initramfs.
truncate -s 3G "$work/root.img"
printf 'label: gpt\nunit: sectors\nstart=2048, type=linux, uuid=4c554b53-4b4d-5301-8000-000000000001\n' |
    sfdisk -q "$work/root.img"
mke2fs -q -t ext4 -O ^resize_inode -E offset=1048576,lazy_itable_init=1 -L story-root \
    -d "$root" "$work/root.img" 2900M

chmod 0644 "$work/vmlinuz" "$work/root.img"
mv "$work/vmlinuz" "$work/root.img" "$out/"
