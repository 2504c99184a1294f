package volumes

import (
	"strings"
	"testing"
)

// What the kernel shows, and who uses which disk then. evidence must be found word for word.
func TestUses(t *testing.T) {
	const bootUses = "nvme0n1: system /, system /boot/efi, partitioned nvme0n1p1, partitioned nvme0n1p15"
	two := func(tr *tree) { // two spare disks
		tr.disk("sdb", "8:16")
		tr.disk("sdc", "8:32")
	}
	tests := []struct {
		name     string
		build    func(tr *tree)
		named    []string
		uses     []string
		evidence []string
	}{
		{
			name:  "NVMe boot disk with partitions, the only disk",
			build: func(tr *tree) { tr.boot() },
			uses:  []string{bootUses},
			evidence: []string{
				"/ is on /dev/nvme0n1p1 (259:1), a partition of nvme0n1",
				"nvme0n1p15 is a partition of nvme0n1",
			},
		}, {
			name: "root on an unpartitioned disk",
			build: func(tr *tree) {
				tr.disk("vda", "254:0")
				tr.mount("254:0", "/", "ext4", "/dev/root", "rw")
			},
			uses:     []string{"vda: system /"},
			evidence: []string{"/ is on /dev/vda (254:0)"},
		}, {
			name: "root on LVM over two disks",
			build: func(tr *tree) {
				two(tr)
				tr.partition("sdb", "sdb1", "8:17")
				tr.dm("dm-0", "253:0", "vg-root", "LVM-x", "sdb1", "sdc")
				tr.mount("253:0", "/", "xfs", "/dev/mapper/vg-root", "rw")
			},
			uses: []string{"sdb: system /, partitioned sdb1, held dm-0", "sdc: system /, held dm-0"},
			evidence: []string{
				"/ is on /dev/mapper/vg-root (dm-0, 253:0), built on sdb1, a partition of sdb",
				"dm-0 (vg-root) is built on sdb1, a partition of sdb",
			},
		}, {
			name: "root on md",
			build: func(tr *tree) {
				two(tr)
				tr.disk("md127", "9:127")
				tr.on("md127", "sdb", "sdc")
				tr.mount("9:127", "/", "ext4", "/dev/md127", "rw")
			},
			uses:     []string{"sdb: system /, held md127", "sdc: system /, held md127"},
			evidence: []string{"/ is on /dev/md127 (9:127), built on sdc"},
		}, {
			name: "slaves or holders alone suffice",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.disk("md1", "9:1")
				tr.disk("md2", "9:2")
				tr.link(disksDir+"md1/slaves/sdb", "x")
				tr.link(disksDir+"sdc/holders/md2", "x")
				tr.mount("9:2", "/data", "ext4", "/dev/md2", "rw")
				tr.link(disksDir+"sdc/holders/md3", "x") // nobody lists that
			},
			uses: []string{bootUses, "sdb: held md1", "sdc: mounted /data, held md2, held md3"},
		}, {
			name: "/var on its own dm",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.dm("dm-0", "253:0", "var", "CRYPT-LUKS2-x", "sdb")
				tr.mount("253:0", "/var", "ext4", "/dev/mapper/var", "rw")
			},
			uses: []string{bootUses, "sdb: system /var, held dm-0", "sdc: "},
		}, {
			name: "btrfs root over two disks, of which mountinfo names one",
			build: func(tr *tree) {
				two(tr)
				tr.link("sys/fs/btrfs/1234/devices/sdb", "x")
				tr.link("sys/fs/btrfs/1234/devices/sdc", "x")
				tr.write("sys/fs/btrfs/features/acl", "0")
				tr.mount("0:24", "/", "btrfs", "/dev/sdc", "rw,subvol=/@")
			},
			uses:     []string{"sdb: system /", "sdc: system /"},
			evidence: []string{"/ is on /dev/sdb (8:16)"},
		}, {
			name: "btrfs root that calls itself /dev/root",
			build: func(tr *tree) {
				two(tr)
				tr.link("sys/fs/btrfs/1234/devices/sdb", "x")
				tr.mount("0:24", "/", "btrfs", "/dev/root", "rw")
			},
			uses: []string{"sdb: system /", "sdc: "},
		}, {
			name: "btrfs that is mounted where we do not see it",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.link("sys/fs/btrfs/1234/devices/sdb", "x")
			},
			uses:     []string{bootUses, "sdb: mounted btrfs 1234", "sdc: "},
			evidence: []string{"the mounted btrfs 1234 is on /dev/sdb (8:16)"},
		}, {
			name: "overlay root",
			build: func(tr *tree) {
				two(tr)
				tr.write("media/root-ro/x", "")
				tr.write("media/a:b/upper/x", "")
				tr.write("media/a:b/workdir/x", "")
				tr.mount("8:16", "/media/root-ro", "ext4", "/dev/sdb", "ro")
				tr.mount("8:32", "/media/a:b", "ext4", "/dev/sdc", "rw")
				tr.mount("0:40", "/", "overlay", "overlayroot",
					`rw,lowerdir=/media/root-ro,upperdir=/media/a:b/upper,workdir=/media/a:b/workdir`)
			},
			uses: []string{"sdb: system /, mounted /media/root-ro", "sdc: system /, mounted /media/a:b"},
			evidence: []string{
				"/ is, through its overlay layer /media/root-ro, on /dev/sdb (8:16)",
			},
		}, {
			name: "overlay whose lower layer's name has a colon and a blank, upper in memory",
			build: func(tr *tree) {
				two(tr)
				tr.write("a:b c/x", "")
				tr.write("run/upper/x", "")
				tr.mount("0:30", "/run", "tmpfs", "tmpfs", "rw")
				tr.mount("8:16", `/a:b\040c`, "ext4", "/dev/sdb", "ro")
				tr.mount("0:40", "/", "overlay", "overlay", `rw,lowerdir=/a\134:b\040c,upperdir=/run/upper`)
			},
			uses: []string{"sdb: system /, mounted /a:b c", "sdc: "},
		}, {
			name: "root in memory or from the network needs no disk",
			build: func(tr *tree) {
				two(tr)
				tr.mount("0:1", "/", "rootfs", "rootfs", "rw")
				tr.mount("0:40", "/", "nfs4", "10.0.0.1:/export", "rw")
				tr.mount("0:41", "/var", "virtiofs", "share", "rw")
			},
			uses: []string{"sdb: ", "sdc: "},
		}, {
			name: "of two mounts on one point both count",
			build: func(tr *tree) {
				two(tr)
				tr.mount("8:16", "/", "ext4", "/dev/sdb", "rw")
				tr.mount("8:32", "/", "ext4", "/dev/sdc", "rw")
			},
			uses: []string{"sdb: system /", "sdc: system /"},
		}, {
			name: "swap partition and swap file",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.partition("sdb", "sdb1", "8:17")
				tr.mount("8:32", "/data", "ext4", "/dev/sdc", "rw")
				tr.swap("/dev/sdb1", "partition")
				tr.swap(`/data/swap\040file\040(deleted)`, "file")
			},
			uses: []string{bootUses, "sdb: swap /dev/sdb1, partitioned sdb1", "sdc: swap /data/swap file, mounted /data"},
			evidence: []string{
				"swap is on /dev/sdb1 (8:17), a partition of sdb",
				"swap file /data/swap file (in the filesystem mounted on /data) is on /dev/sdc (8:32)",
			},
		}, {
			name: "swap on dm, by another name",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.dm("dm-3", "253:3", "swap", "", "sdb")
				tr.swap("/dev/mapper/swap", "partition")
			},
			uses: []string{bootUses, "sdb: swap /dev/mapper/swap, held dm-3", "sdc: "},
		}, {
			name: "swap on dm, whose link udev did not make",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.dm("dm-3", "253:3", "swap", "", "sdb")
				tr.remove("dev/mapper/swap")
				tr.swap("/dev/mapper/swap", "partition")
			},
			uses: []string{bootUses, "sdb: swap /dev/mapper/swap, held dm-3", "sdc: "},
		}, {
			name: "compressed swap that writes back to a disk",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.disk("zram0", "251:0", "backing_dev", "/dev/sdb")
				tr.disk("zram1", "251:1", "backing_dev", "none")
				tr.swap("/dev/zram0", "partition")
				tr.swap("/dev/zram1", "partition")
			},
			uses: []string{bootUses, "sdb: swap /dev/zram0, held zram0", "sdc: "},
		}, {
			name: "state directory on its own disk",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.mount("8:16", "/var/lib", "ext4", "/dev/sdb", "rw")
				tr.mount("8:32", "/var/lib/luks", "ext4", "/dev/sdc", "rw") // a prefix of the name only
			},
			uses:     []string{bootUses, "sdb: system " + stateDir, "sdc: mounted /var/lib/luks"},
			evidence: []string{stateDir + " (in the filesystem mounted on /var/lib) is on /dev/sdb (8:16)"},
		}, {
			name: "/var/lib is a link to another disk",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.remove("var/lib")
				tr.link("var/lib", "/data/../data/lib")
				tr.write("data/lib/x", "")
				tr.mount("8:16", "/data", "ext4", "/dev/sdb", "rw")
			},
			uses: []string{bootUses, "sdb: system " + stateDir, "sdc: "},
		}, {
			name: "loop chain: /usr in a file on a disk",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.disk("loop0", "7:0", "loop/backing_file", "/img s/usr.img (deleted)")
				tr.mount("8:16", `/img\040s`, "ext4", "/dev/sdb", "rw")
				tr.mount("7:0", "/usr", "squashfs", "/dev/loop0", "ro")
			},
			named: []string{"/dev/loop0"},
			uses:  []string{"loop0: system /usr", bootUses, "sdb: system /usr, mounted /img s", "sdc: "},
			evidence: []string{
				"/usr is on /dev/loop0 (7:0), a loop over the file /img s/usr.img on sdb",
			},
		}, {
			name: "loop over a disk, mounted and not",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.disk("loop0", "7:0", "loop/backing_file", "/dev/sdb")
				tr.disk("loop1", "7:1", "loop/backing_file", "/dev/sdc")
				tr.mount("7:0", "/mnt", "ext4", "/dev/loop0", "ro")
			},
			uses:     []string{bootUses, "sdb: mounted /mnt, held loop0", "sdc: held loop1"},
			evidence: []string{"/mnt is on /dev/loop0 (7:0), built on sdb"},
		}, {
			name: "xfs with its log on another disk",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.mount("8:16", "/data", "xfs", "/dev/sdb", "rw,logdev=/dev/sdc,noquota")
			},
			uses: []string{bootUses, "sdb: mounted /data", "sdc: mounted /data"},
		}, {
			name: "xfs whose log device is gone is on its disk all the same",
			build: func(tr *tree) {
				two(tr)
				tr.mount("0:1", "/", "rootfs", "rootfs", "rw")
				tr.mount("8:16", "/data", "xfs", "/dev/sdb", "rw,logdev=/dev/gone")
			},
			uses: []string{"sdb: mounted /data", "sdc: "},
		}, {
			name: "bcachefs over two disks",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.mount("0:50", "/data", "bcachefs", "/dev/sdb:/dev/sdc", "rw")
			},
			uses: []string{bootUses, "sdb: mounted /data", "sdc: mounted /data"},
		}, {
			name: "partitions without mounts",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.partition("sdb", "sdb1", "8:17")
			},
			uses: []string{bootUses, "sdb: partitioned sdb1", "sdc: "},
		}, {
			name: "mounts that are no concern",
			build: func(tr *tree) {
				tr.boot()
				two(tr)
				tr.mount("8:80", "/old", "ext4", "/dev/sdf", "rw") // outlived its disk
				tr.mount("0:60", "/sshfs", "fuse.sshfs", "me@there:", "rw")
				tr.mount("0:61", "/gone", "overlay", "overlay", "lowerdir=l/AB:l/CD")
			},
			uses: []string{bootUses, "sdb: ", "sdc: "},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			tr := newTree(t)
			test.build(tr)
			scan := tr.scan(test.named...)
			if got, want := scan.usesOf(), strings.Join(test.uses, "\n"); got != want {
				t.Errorf("uses:\n%s\nwant:\n%s", got, want)
			}
			var all []string
			for _, d := range scan.Devices {
				for _, u := range d.Uses {
					all = append(all, u.Evidence)
				}
			}
			for _, want := range test.evidence {
				if !strings.Contains("\n"+strings.Join(all, "\n")+"\n", "\n"+want+"\n") {
					t.Errorf("no evidence %q in:\n%s", want, strings.Join(all, "\n"))
				}
			}
		})
	}
}

// Every failure to read what could be a use ends the scan: nothing is free because it is unknown.
func TestUnreadableIsAnError(t *testing.T) {
	tests := []struct {
		name   string
		damage func(tr *tree)
		want   string
	}{
		{"no block class", func(tr *tree) { tr.remove("sys/class/block") }, "sys/class/block"},
		{"device number unreadable", func(tr *tree) { tr.remove(disksDir + "sdb/dev") }, "cannot read device sdb"},
		{"device number garbled", func(tr *tree) { tr.write(disksDir+"sdb/dev", "8") }, `"8" is not a device number`},
		{"size garbled", func(tr *tree) { tr.write(disksDir+"sdb/size", "big") }, "cannot read device sdb"},
		{"slaves unreadable", func(tr *tree) { tr.remove(disksDir + "sdb/slaves") }, "cannot read device sdb"},
		{"holders unreadable", func(tr *tree) { tr.remove(disksDir + "sdb/holders") }, "cannot read what is built on sdb"},
		{"partition's holders unreadable", func(tr *tree) { tr.remove(disksDir + "nvme0n1/nvme0n1p1/holders") }, "cannot read what is built on nvme0n1p1"},
		{"write protection unreadable", func(tr *tree) { tr.remove(disksDir + "sdb/ro") }, "write protection of sdb"},
		{"slave that was not seen", func(tr *tree) {
			tr.disk("md0", "9:0")
			tr.link(disksDir+"md0/slaves/sdz", "../../nvme0n1")
		}, "cannot find sdz, which md0 is built on"},
		{"partition of a disk that does not exist", func(tr *tree) { tr.remove("sys/class/block/nvme0n1") }, "cannot find the disk nvme0n1 of partition nvme0n1p1"},
		{"mapping's name unreadable", func(tr *tree) {
			tr.dm("dm-0", "253:0", "x", "y", "sdb")
			tr.remove(disksDir + "dm-0/dm/name")
		}, "cannot read device dm-0"},
		{"loop's file unreadable", func(tr *tree) {
			tr.disk("loop0", "7:0")
			tr.must(mkdir(tr.root + "/" + disksDir + "loop0/loop/backing_file"))
		}, "cannot read what loop0 is backed by"},
		{"btrfs members unreadable", func(tr *tree) { tr.link("sys/fs/btrfs/1234/devices", "devices") }, "btrfs"},
		{"btrfs member that does not exist", func(tr *tree) { tr.link("sys/fs/btrfs/1234/devices/sdz", "x") }, "a member of btrfs 1234"},
		{"links unreadable", func(tr *tree) { tr.write("dev/disk/by-id", "") }, "by-id"},
		{"no mountinfo", func(tr *tree) { tr.remove("proc/self/mountinfo") }, "mountinfo"},
		{"empty mountinfo", func(tr *tree) { tr.write("proc/self/mountinfo", "") }, "cannot tell which disk holds /: no mount"},
		{"mountinfo cut off", func(tr *tree) { tr.append("proc/self/mountinfo", "30 1 8:16 / /data rw - ext4\n") }, "cannot understand"},
		{"mountinfo garbled", func(tr *tree) { tr.append("proc/self/mountinfo", "30 1 816 / /data rw - ext4 /dev/sdb rw\n") }, "cannot understand"},
		{"swaps unreadable", func(tr *tree) {
			tr.remove("proc/swaps")
			tr.must(mkdir(tr.root + "/proc/swaps"))
		}, "swaps"},
		{"swaps garbled", func(tr *tree) { tr.swap("/dev/sdb", "blockish") }, "cannot understand"},
		{"swap on an unknown device", func(tr *tree) { tr.swap("/dev/sdq", "partition") }, "cannot tell which disk holds swap /dev/sdq"},
		{"swap file on an unknown device", func(tr *tree) {
			tr.mount("8:80", "/old", "ext4", "/dev/sdf", "rw")
			tr.swap("/old/swap", "file")
		}, "cannot tell which disk holds /old/swap"},
		{"/var on an unknown device", func(tr *tree) { tr.mount("8:80", "/var", "ext4", "/dev/sdf", "rw") }, "cannot tell which disk holds /var"},
		{"/var on zfs", func(tr *tree) { tr.mount("0:70", "/var", "zfs", "rpool/var", "rw") }, `zfs on "rpool/var"`},
		{"/var on btrfs of an unknown device", func(tr *tree) { tr.mount("0:70", "/var", "btrfs", "/dev/root", "rw") }, "cannot tell which disk holds /var"},
		{"data on btrfs of an unknown device", func(tr *tree) { tr.mount("0:70", "/data", "btrfs", "/dev/root", "rw") }, "cannot find the devices of /data"},
		{"state directory on an unknown filesystem", func(tr *tree) { tr.mount("0:70", stateDir, "fuse.x", "x", "rw") }, "cannot tell which disk holds " + stateDir},
		{"/var an overlay over a layer that is not visible", func(tr *tree) {
			tr.mount("0:70", "/var", "overlay", "overlay", "lowerdir=/root-before-pivot")
		}, "cannot find layer /root-before-pivot"},
		{"/var an overlay over a relative layer", func(tr *tree) { tr.mount("0:70", "/var", "overlay", "overlay", "lowerdir=dev") }, "cannot find layer dev"},
		{"/var an overlay over itself", func(tr *tree) { tr.mount("0:70", "/var", "overlay", "overlay", "lowerdir=/var/lib") }, "cannot find layer /var/lib"},
		{"/var an overlay without layers", func(tr *tree) { tr.mount("0:70", "/var", "overlay", "overlay", "rw") }, "cannot find the layers"},
		{"/usr on a loop over an untraceable file", func(tr *tree) {
			tr.disk("loop0", "7:0", "loop/backing_file", "/odd/usr.img")
			tr.mount("0:70", "/odd", "fuse.x", "x", "rw")
			tr.mount("7:0", "/usr", "squashfs", "/dev/loop0", "ro")
		}, "cannot tell which disk holds /usr"},
		{"/usr on a loop over a file inside of it", func(tr *tree) {
			tr.disk("loop0", "7:0", "loop/backing_file", "/usr/usr.img")
			tr.mount("7:0", "/usr", "squashfs", "/dev/loop0", "ro")
		}, "lies on itself"},
		{"/var a circle of links", func(tr *tree) {
			tr.remove("var")
			tr.link("var", "var")
		}, "cannot resolve /var"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			tr := newTree(t)
			tr.boot()
			tr.disk("sdb", "8:16")
			tr.scan() // sound before it is broken
			test.damage(tr)
			scan, err := tr.scanner().Scan(t.Context())
			if err == nil {
				t.Fatalf("scan succeeded:\n%s", scan.usesOf())
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %q does not tell %q", err, test.want)
			}
			if len(scan.Devices) != 0 {
				t.Errorf("an error came with devices")
			}
		})
	}
}

// A device that is unplugged between listing and reading leaves a dangling name, and no harm.
func TestUnpluggedMeanwhile(t *testing.T) {
	tr := newTree(t)
	tr.boot()
	tr.link("sys/class/block/sdb", "../../devices/block/sdb")
	if got := len(tr.scan().Devices); got != 1 {
		t.Errorf("%d devices, want 1", got)
	}
}
