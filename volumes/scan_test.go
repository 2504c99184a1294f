package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func mkdir(path string) error { return os.MkdirAll(path, 0o755) }

func names(s Scan) string {
	var list []string
	for _, d := range s.Devices {
		list = append(list, d.Name)
	}
	return strings.Join(list, " ")
}

func TestDevicesListed(t *testing.T) {
	tr := newTree(t)
	tr.boot()
	tr.nvme("nvme10n1", "259:10", modelEBS, "vol0b")
	tr.nvme("nvme2n1", "259:11", modelEBS, "vol0c")
	tr.disk("nvme1c1n1", "0:0", "hidden", "1")
	tr.remove(disksDir + "nvme1c1n1/dev") // as hidden nodes are
	for i, name := range []string{"loop0", "nbd0", "zram0", "ram0", "md0", "md_home", "sr0", "fd0", "cciss!c0d0", "sdaa", "sdb"} {
		tr.disk(name, fmt.Sprintf("%d:0", 20+i))
	}
	tr.disk("sdc", "8:32", "size", "0")
	tr.dm("dm-0", "253:0", "x", "y")
	if got, want := names(tr.scan()), "cciss!c0d0 nvme0n1 nvme2n1 nvme10n1 sdb sdaa"; got != want {
		t.Errorf("devices %s, want %s", got, want)
	}
	if got := tr.scan().device(t, "cciss!c0d0").Path; got != "/dev/cciss/c0d0" {
		t.Errorf("path %s", got)
	}
}

func TestFacts(t *testing.T) {
	tr := newTree(t)
	tr.boot()
	tr.disk("sdb", "8:16", "ro", "1", "diskseq", "42", "queue/rotational", "1", "queue/logical_block_size", "4096",
		"device/model", "A disk  ", "serial", " S1 ")
	tr.link("dev/disk/by-id/ata-A_disk_S1", "../../sdb")
	tr.link("dev/disk/by-path/pci-0", "../by-id/ata-A_disk_S1")
	tr.link("dev/disk/by-path/dangling", "../../sdq")
	tr.link("dev/sdf", "/dev/sdb")
	tr.link("dev/core", "/proc/kcore")
	tr.link("dev/circle", "circle")
	got := tr.scan().device(t, "sdb")
	want := Device{
		Name: "sdb", Path: "/dev/sdb", Major: 8, Minor: 16, DiskSeq: 42, Size: 1 << 30, LogicalSectorSize: 4096,
		Rotational: true, ReadOnly: true, Model: "A disk", Serial: "S1",
		Links: []string{"/dev/sdf", "/dev/disk/by-id/ata-A_disk_S1", "/dev/disk/by-path/pci-0"}, root: tr.root,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("device\n%+v, want\n%+v", got, want)
	}

	tr.remove(disksDir + "sdb/diskseq") // kernels before 5.15
	tr.remove(disksDir + "sdb/serial")
	tr.write(disksDir+"sdb/device/vpd_pg80", "\x00\x80\x00\x04 S2 ")
	if got := tr.scan().device(t, "sdb"); got.DiskSeq != 0 || got.Serial != "S2" {
		t.Errorf("diskseq %d, serial %q", got.DiskSeq, got.Serial)
	}
}

func TestOpenMapping(t *testing.T) {
	tr := newTree(t)
	tr.boot()
	tr.nvme("nvme1n1", "259:3", modelInstanceStore, "AWS1")
	tr.dm("dm-0", "253:0", "luks-1", "CRYPT-LUKS2-1-luks-1", "nvme1n1")
	tr.mount("253:0", "/mnt", "xfs", "/dev/mapper/luks-1", "rw")
	tr.mount("253:0", `/my\040data`, "xfs", "/dev/mapper/luks-1", "rw")
	d := tr.scan().device(t, "nvme1n1")
	want := []Mapping{{Name: "luks-1", UUID: "CRYPT-LUKS2-1-luks-1", Kernel: "dm-0", Mounts: []string{"/mnt", "/my data"}}}
	if !reflect.DeepEqual(d.Mappings, want) {
		t.Errorf("mappings %+v, want %+v", d.Mappings, want)
	}
	tr.nvme("nvme2n1", "259:4", modelInstanceStore, "AWS2")
	tr.dm("dm-1", "253:1", "luks-2", "CRYPT-LUKS2-2-luks-2", "nvme2n1")
	tr.swap("/dev/dm-1", "partition")
	if got := tr.scan().device(t, "nvme2n1").Mappings; len(got) != 1 || !reflect.DeepEqual(got[0].Mounts, []string{SwapPoint}) {
		t.Errorf("swap: mappings %+v", got)
	}
	if got, want := (Scan{Devices: []Device{d}}).usesOf(), "nvme1n1: mounted /mnt, mounted /my data, held dm-0"; got != want {
		t.Errorf("uses %s, want %s", got, want)
	}
}

// A disk that is taken away while it is open leaves its mapping and the mapping's link to it. That keeps nobody from looking at the others.
func TestDiskTakenAwayFromUnderAMapping(t *testing.T) {
	t.Parallel()
	tr := newTree(t)
	tr.boot()
	tr.nvme("nvme1n1", "259:3", modelEBS, "vol0b")
	tr.dm("dm-0", "253:0", "luks-1", "CRYPT-LUKS2-1-luks-1", "nvme1n1")
	tr.mount("253:0", "/mnt", "xfs", "/dev/mapper/luks-1", "rw")
	if scan := tr.scan(); len(scan.Gone) > 0 {
		t.Errorf("gone before it was taken away: %+v", scan.Gone)
	}
	tr.remove("sys/class/block/nvme1n1")
	tr.remove(disksDir + "nvme1n1")
	tr.remove("dev/nvme1n1")
	scan := tr.scan()
	want := []Mapping{{Name: "luks-1", UUID: "CRYPT-LUKS2-1-luks-1", Kernel: "dm-0", Mounts: []string{"/mnt"}}}
	if !reflect.DeepEqual(scan.Gone, want) || names(scan) != "nvme0n1" {
		t.Errorf("gone %+v, devices %s", scan.Gone, names(scan))
	}

	// Where the link leads to something, the disk is there and was not seen.
	link := disksDir + "dm-0/slaves/nvme1n1"
	tr.remove(link)
	tr.link(link, "../../nvme0n1")
	if _, err := tr.scanner().Scan(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot find nvme1n1, which dm-0 is built on") {
		t.Errorf("a disk that was not seen: %v", err)
	}
}

func TestUnannounced(t *testing.T) {
	tr := newTree(t)
	tr.boot()
	is := func() bool { return tr.scan().device(t, "nvme0n1").Unannounced }
	if is() {
		t.Error("without udev nothing will come")
	}
	tr.write("run/udev/control", "")
	if !is() {
		t.Error("udev is not done with it")
	}
	tr.write("run/udev/data/b259:0", "")
	if is() {
		t.Error("udev is done with it")
	}
}

func TestClassAndIdentity(t *testing.T) {
	tr := newTree(t)
	tr.boot()
	tr.nvme("nvme1n1", "259:3", modelInstanceStore, "AWS1")
	tr.nvme("nvme2n1", "259:4", modelEBS, "vol-0b")
	tr.nvme("nvme3n1", "259:5", "Some other NVMe", "vol0c")
	tr.disk("xvdb", "202:16")
	tr.disk("xvdc", "202:32")
	tr.disk("xvdf", "202:80")
	tr.disk("sdb", "8:16", "serial", "S1")
	tr.disk("loop3", "7:3")
	s := tr.scanner()
	s.Ephemeral = []string{"sdb", "/dev/xvdc", ""}
	s.Named = []string{"/dev/loop3", "S1", "/dev/nvme2n1"}
	scan, err := s.Scan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range scan.Devices {
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", d.Name, d.Class, d.Identity, d.Named)))
	}
	want := []string{
		"loop3 explicit /dev/loop3 /dev/loop3",
		"nvme0n1 ebs vol-0aaaaaaaaaaaaaaaa",
		"nvme1n1 instance-store AWS1",
		"nvme2n1 ebs vol-0b /dev/nvme2n1",
		"nvme3n1",
		"sdb explicit S1 S1",
		"xvdb instance-store sdb",
		"xvdc instance-store xvdc",
		"xvdf ebs xvdf",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestNamed(t *testing.T) {
	tr := newTree(t)
	tr.boot()
	tr.disk("sdb", "8:16", "serial", "S1")
	tr.partition("sdb", "sdb1", "8:17")
	tr.disk("sdc", "8:32", "serial", "TWICE")
	tr.disk("sdd", "8:48", "serial", "TWICE")
	tr.disk("loop0", "7:0")
	tr.disk("loop1", "7:1", "size", "0")
	tr.disk("md0", "9:0")
	tr.dm("dm-0", "253:0", "vg-x", "")
	tr.link("dev/disk/by-id/b", "../../sdb")
	tr.write("root/disk.img", "")
	for name, want := range map[string]string{
		"/dev/sdb": "sdb", "sdb": "sdb", "/dev/../dev/sdb": "sdb", "/dev/disk/by-id/b": "sdb", "S1": "sdb",
		"vol-0aaaaaaaaaaaaaaaa": "nvme0n1", "vol0aaaaaaaaaaaaaaaa": "nvme0n1", "/dev/loop0": "loop0", "loop0": "loop0",
	} {
		scan := tr.scan(name)
		if len(scan.Missing) != 0 {
			t.Errorf("%s: missing: %s", name, scan.Missing[0].Reason)
		} else if d := scan.device(t, want); d.Named != name || !d.Is(name) {
			t.Errorf("%s: %s is named %q", name, want, d.Named)
		}
	}
	for name, want := range map[string]string{
		"/dev/sdb1":             "is a partition of sdb, not a whole disk",
		"sdb1":                  "is a partition of sdb, not a whole disk",
		"/dev/dm-0":             "is a device-mapper device (vg-x), not a disk",
		"/dev/mapper/vg-x":      "is a device-mapper device (vg-x), not a disk",
		"/dev/md0":              "is an md array, not a disk",
		"/dev/loop1":            "has no size: nothing is attached to it",
		"/dev/sdq":              "does not exist",
		"/root/disk.img":        "is not a block device",
		"S":                     "is no kernel name, serial or volume id of a device here",
		"":                      "is no kernel name, serial or volume id of a device here",
		"vol-0":                 "is no kernel name, serial or volume id of a device here",
		"TWICE":                 "means both sdc and sdd",
		"/dev/disk/by-id/other": "does not exist",
	} {
		scan := tr.scan(name)
		if len(scan.Missing) != 1 || scan.Missing[0] != (Missing{name, want}) {
			t.Errorf("%q: missing %+v, want %q", name, scan.Missing, want)
		}
		for _, d := range scan.Devices {
			if d.Named != "" || d.Class == ClassExplicit {
				t.Errorf("%q named %s all the same", name, d.Name)
			}
		}
	}
	scan := tr.scan("S1", "/dev/sdb")
	if want := (Missing{"/dev/sdb", "is sdb, which is named already as S1"}); len(scan.Missing) != 1 || scan.Missing[0] != want {
		t.Errorf("missing %+v, want %+v", scan.Missing, want)
	}
}

func TestIs(t *testing.T) {
	d := Device{Name: "nvme1n1", Path: "/dev/nvme1n1", Serial: "vol0b", Identity: "vol-0b", EC2Name: "sdf", Links: []string{"/dev/disk/by-id/x"}}
	for _, name := range []string{"nvme1n1", "/dev/nvme1n1", "/dev//nvme1n1", "vol0b", "vol-0b", "/dev/disk/by-id/x"} {
		if !d.Is(name) {
			t.Errorf("is not %q", name)
		}
	}
	for _, name := range []string{"", "nvme1", "nvme1n1p1", "/dev/nvme1n", "vol-0", "VOL0B", "x", "sdf", "/dev/disk/by-id/"} {
		if d.Is(name) {
			t.Errorf("is %q", name)
		}
	}
	if (Device{Name: "sdb", Path: "/dev/sdb"}).Is("") {
		t.Error("a device without serial is the empty name")
	}
}

func TestNaturalCompare(t *testing.T) {
	want := strings.Fields("loop2 loop10 nvme0n1 nvme0n2 nvme2n1 nvme10n1 sdb sdb1 sdb10 sdz sdaa vda xvdb xvdaa")
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, naturalCompare)
	if !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
}

func TestScanCancelled(t *testing.T) {
	tr := newTree(t)
	tr.boot()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tr.scanner().Scan(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// On the machine itself either every disk's uses are known or, as in a container whose root is an overlay of
// layers that it cannot see, none is.
func TestScanThisMachine(t *testing.T) {
	scan, err := Scanner{StateDir: stateDir}.Scan(t.Context())
	if err != nil && !strings.Contains(err.Error(), "cannot tell which disk holds") {
		t.Error(err)
	}
	if err != nil && len(scan.Devices) > 0 {
		t.Errorf("an error came with devices")
	}
	t.Logf("%v, uses:\n%s", err, scan.usesOf())
}

func BenchmarkScan(b *testing.B) {
	tr := newTree(b)
	tr.boot()
	for i := 1; i < 24; i++ {
		name, dm := fmt.Sprintf("nvme%dn1", i), fmt.Sprintf("dm-%d", i)
		tr.nvme(name, fmt.Sprintf("259:%d", 10+i), modelInstanceStore, fmt.Sprintf("AWS%d", i))
		tr.dm(dm, fmt.Sprintf("253:%d", i), "luks-"+name, "CRYPT-LUKS2-x", name)
		tr.mount(fmt.Sprintf("253:%d", i), fmt.Sprintf("/mnt%d", i), "xfs", "/dev/mapper/luks-"+name, "rw")
		tr.link("dev/disk/by-id/nvme-"+name, "../../"+name)
	}
	for b.Loop() {
		if n := len(tr.scan().Devices); n != 24 {
			b.Fatalf("%d devices", n)
		}
	}
}
