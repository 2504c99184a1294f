package main

import (
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// slowKMS adds to each answer of KMS.
func (b *bench) slowKMS(by time.Duration) {
	if by == 0 {
		b.n.KMS.Inject()
		return
	}
	b.n.KMS.Inject(proxy.Fault{Kind: proxy.Slow, Delay: by})
}

// guestScript has the peers and what is around them. Volumes are /dev/loop10 and up, the passphrase is in /run/bench/key, on a tmpfs.
const guestScript = `
list() { seq 10 $(($1 + 9)); }
slice() { # STORES PER_STORE BYTES
	mkdir -p /run/bench /bench
	local i=10 s k d
	for s in $(seq 0 $(($1 - 1))); do
		d=$(cat /sys/block/loop$s/loop/backing_file)
		losetup -d /dev/loop$s
		for k in $(seq 0 $(($2 - 1))); do
			[ -b /dev/loop$i ] || mknod -m 0660 /dev/loop$i b 7 $i
			losetup -o $((k * $3)) --sizelimit $3 /dev/loop$i $d
			mkdir -p /bench/$i
			i=$((i + 1))
		done
	done
	udevadm settle
}
blank() { for i in $(list $1); do blkdiscard -z /dev/loop$i; done; }
agent() { luks-kms-agent --config /root/bench-$1.yaml $2; }
# The records of the first n volumes, for each n.
records() {
	umask 077
	local from=/var/lib/luks-kms-agent n to
	for n in $(seq 1 23); do
		to=/var/lib/luks-kms-agent-$n
		mkdir -p -m 0700 $to/keys $to/volumes
		cp -a $from/keys/*.json $to/keys/
		for i in $(list $n); do cp -a $(grep -l "\"/dev/loop$i\"" $from/volumes/*.json) $to/volumes/; done
	done
}
written() { local sum=0 i w; for i in $(list 32); do read -r _ _ _ _ _ _ w _ </sys/block/loop$i/stat; sum=$((sum + w)); done; echo $((sum * 512)); }
mounted() { grep -c -E ' /(bench|sysd)/' /proc/mounts || true; }
points() { sed -n -E 's/^[^ ]* (\/(bench|sysd)\/[0-9]*) .*/\1/p' /proc/mounts; }
closeall() {
	local m units=""
	for m in $(points); do m=$(systemd-escape -p --suffix=mount $m); units="$units $m"; done
	[ -z "$units" ] || systemctl stop $units
	for m in $(points); do umount $m; done
	units=$(systemctl list-units --plain --no-legend --state=active 'systemd-cryptsetup@*' | cut -d' ' -f1)
	[ -z "$units" ] || systemctl stop $units
	for m in $(dmsetup ls --target crypt | grep '(' | cut -f1); do dmsetup remove --retry $m; done
	udevadm settle
}
floor() { local a="" i; for i in $(list $n); do a="$a /dev/loop$i=/bench/$i"; done; /usr/local/lib/story/guest floor $a </run/bench/key; }
open_one() { cryptsetup open --type luks2 --key-file /run/bench/key /dev/loop$1 b$1; mount /dev/mapper/b$1 /bench/$1; }
open_serial() { local i; for i in $(seq $1 $(($1 + $2 - 1))); do open_one $i; done; }
open_parallel() { local i; for i in $(list $n); do open_one $i & done; wait; }
open_clevis() { local i; for i in $(list $n); do clevis luks unlock -d /dev/loop$i -n b$i; mount /dev/mapper/b$i /bench/$i; done; }
clevis_setup() {
	local i
	for i in $(list $1); do
		clevis luks bind -y -f -k /run/bench/key -d /dev/loop$i tang "{\"url\":\"$2\",\"thp\":\"$3\"}" </dev/null
	done
}
make_one() { # DEVICE OPTIONS
	cryptsetup luksFormat --batch-mode --type luks2 $2 --key-file /run/bench/key /dev/loop$1
	cryptsetup open --type luks2 --key-file /run/bench/key /dev/loop$1 b$1
	mkfs.ext4 -q -E nodiscard /dev/mapper/b$1
	mount /dev/mapper/b$1 /bench/$1
}
make_serial() { local i; for i in $(list $n); do make_one $i "$1"; done; }
make_parallel() { local i; for i in $(list $n); do make_one $i "$1" & done; wait; }
defaults_setup() { local i; for i in $(seq 34 41); do mkdir -p /bench/$i; make_one $i ""; done; closeall; }
# What mkfs writes to one volume.
mkfs_bytes() {
	local w
	read -r _ _ _ _ _ _ w _ </sys/block/loop10/stat
	mkfs.ext4 -q -E nodiscard /dev/loop10
	read -r _ _ _ _ _ _ s _ </sys/block/loop10/stat
	echo $(((s - w) * 512)) >/run/bench/mkfs
}
floor_format() { local a="" i b=$(cat /run/bench/mkfs); for i in $(list $n); do a="$a /dev/loop$i=$b"; done; /usr/local/lib/story/guest floor-format $a; }
# Mount points of their own: the agent takes none that has a line in fstab.
systemd_setup() {
	local i
	: >/etc/crypttab
	: >/etc/fstab
	for i in $(list $1); do
		mkdir -p /sysd/$i
		echo "b$i /dev/loop$i /run/bench/key luks,noauto,nofail" >>/etc/crypttab
		echo "/dev/mapper/b$i /sysd/$i ext4 noauto,nofail 0 0" >>/etc/fstab
	done
	systemctl daemon-reload
}
open_systemd() { local u="" i; for i in $(list $n); do u="$u sysd-$i.mount"; done; systemctl start $u; }
`
