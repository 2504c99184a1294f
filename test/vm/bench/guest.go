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
// What is measured starts no program that a user's script would not start.
const guestScript = `
# A disk has no page cache below it, so the loop devices that stand for disks must do without.
slice() { # STORES PER_STORE BYTES
	mkdir -p /run/bench /bench
	local i=10 s k d
	for s in $(seq 0 $(($1 - 1))); do
		d=$(cat /sys/block/loop$s/loop/backing_file)
		losetup -d /dev/loop$s
		for k in $(seq 0 $(($2 - 1))); do
			[ -b /dev/loop$i ] || mknod -m 0660 /dev/loop$i b 7 $i
			losetup --direct-io=on -o $((k * $3)) --sizelimit $3 /dev/loop$i $d
			mkdir -p /bench/$i
			i=$((i + 1))
		done
	done
	udevadm settle
}
blank() { local i; for ((i = 10; i < 10 + $1; i++)); do blkdiscard -z /dev/loop$i; done; }
agent() { luks-kms-agent --config /root/bench-$1.yaml $2; }
# The records of the first so many volumes.
records() {
	umask 077
	local from=/var/lib/luks-kms-agent to=/var/lib/luks-kms-agent-$1 i names=""
	for ((i = 10; i < 10 + $1; i++)); do names="$names -e \"/dev/loop$i\""; done
	mkdir -p $to/keys $to/volumes
	cp -a $from/keys/*.json $to/keys/
	cp -a $(grep -l $names $from/volumes/*.json) $to/volumes/
}
# Data is cold, programs are not.
cool() { sync; blockdev --flushbufs /dev/vd? /dev/loop[1-9][0-9]; udevadm settle; }
freeze() { sync; echo 3 >/proc/sys/vm/drop_caches; udevadm settle; }
written() { local sum=0 f w; for f in /sys/block/loop[1-9][0-9]/stat; do read -r _ _ _ _ _ _ w _ <$f; sum=$((sum + w)); done; echo $((sum * 512)); }
points() { local p; while read -r _ p _; do case $p in /bench/*|/sysd/*) echo $p ;; esac; done </proc/mounts; }
mounted() { local p; p=$(points); set -- $p; echo $#; }
closeall() {
	local p
	p=$(points)
	[ -z "$p" ] || umount $p
	p=$(systemctl list-units --plain --no-legend --state=active 'systemd-cryptsetup@*' | cut -d' ' -f1)
	[ -z "$p" ] || systemctl stop $p
	p=$(dmsetup ls --target crypt | grep '(' | cut -f1) || true
	[ -z "$p" ] || dmsetup remove --retry $p
	udevadm settle
}
floor() { /usr/local/lib/story/floor "$@"; }
pairs() { local a="" i; for ((i = 10; i < 10 + n; i++)); do a="$a /dev/loop$i=${1:-/bench/$i}"; done; echo "$a"; }
floor_open() { floor $(pairs) </run/bench/key; }
floor_kms() { floor -kms /var/lib/luks-kms-agent/keys/*.json -endpoint $1 $(pairs); }
# As many bytes as mkfs writes to one volume.
floor_format() { floor -format $(pairs $(</run/bench/mkfs)); }
mkfs_bytes() {
	local before after
	before=$(written)
	mkfs.ext4 -q -E nodiscard /dev/loop10
	after=$(written)
	echo $((after - before)) >/run/bench/mkfs
}
open_one() { cryptsetup open --type luks2 --key-file /run/bench/key /dev/loop$1 b$1; mount /dev/mapper/b$1 /bench/$1; }
open_serial() { local i; for ((i = $1; i < $1 + n; i++)); do open_one $i; done; }
open_parallel() { local i; for ((i = 10; i < 10 + n; i++)); do open_one $i & done; wait; }
make_one() { # DEVICE OPTIONS
	cryptsetup luksFormat --batch-mode --type luks2 $2 --key-file /run/bench/key /dev/loop$1
	cryptsetup open --type luks2 --key-file /run/bench/key /dev/loop$1 b$1
	mkfs.ext4 -q -E nodiscard /dev/mapper/b$1
	mount /dev/mapper/b$1 /bench/$1
}
make_serial() { local i; for ((i = 10; i < 10 + n; i++)); do make_one $i "$1"; done; }
make_parallel() { local i; for ((i = 10; i < 10 + n; i++)); do make_one $i "$1" & done; wait; }
# The first one is measured for the machine, which takes long; the others are made like it.
defaults_setup() { # FROM NUMBER
	local i like=""
	for ((i = $1; i < $1 + $2; i++)); do
		make_one $i "$like"
		[ -n "$like" ] || like=$(cryptsetup luksDump /dev/loop$i |
			sed -n -e 's/.*Time cost: */--pbkdf-force-iterations /p' -e 's/.*Memory: */--pbkdf-memory /p' -e 's/.*Threads: */--pbkdf-parallel /p')
	done
	closeall
}
clevis_setup() { # FROM NUMBER URL THUMBPRINT
	local i
	for ((i = $1; i < $1 + $2; i++)); do
		{
			make_one $i "--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
			clevis luks bind -y -f -k /run/bench/key -d /dev/loop$i tang "{\"url\":\"$3\",\"thp\":\"$4\"}" </dev/null
		} &
	done
	wait
	closeall
}
open_clevis() { local i; for ((i = $1; i < $1 + n; i++)); do clevis luks unlock -d /dev/loop$i -n b$i; mount /dev/mapper/b$i /bench/$i; done; }
# Mount points of their own: the agent takes none that has a line in fstab. Mappings too: systemd takes part where one in crypttab is opened.
systemd_setup() {
	local i
	: >/etc/crypttab
	: >/etc/fstab
	for ((i = 10; i < 10 + $1; i++)); do
		mkdir -p /sysd/$i
		echo "s$i /dev/loop$i /run/bench/key luks,noauto,nofail" >>/etc/crypttab
		echo "/dev/mapper/s$i /sysd/$i ext4 noauto,nofail 0 0" >>/etc/fstab
	done
	systemctl daemon-reload
}
open_systemd() { local u="" i; for ((i = 10; i < 10 + n; i++)); do u="$u sysd-$i.mount"; done; systemctl start $u; }
`
