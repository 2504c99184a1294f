package volumes

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tree builds a /sys, /proc and /dev in a temporary directory, laid out and linked as the kernel does.
type tree struct {
	t    testing.TB
	root string
	ids  int
}

func newTree(t testing.TB) *tree {
	tr := &tree{t: t, root: t.TempDir()}
	for _, dir := range []string{"sys/class/block", "sys/fs", "proc/self", "dev/mapper", "boot/efi", "usr", "var/lib"} {
		tr.must(os.MkdirAll(tr.root+"/"+dir, 0o755))
	}
	tr.write("proc/self/mountinfo", "")
	tr.write("proc/swaps", "Filename Type Size Used Priority\n")
	return tr
}

func (tr *tree) must(err error) {
	tr.t.Helper()
	if err != nil {
		tr.t.Fatal(err)
	}
}

func (tr *tree) write(path, content string) {
	tr.t.Helper()
	path = filepath.Join(tr.root, path)
	tr.must(os.MkdirAll(filepath.Dir(path), 0o755))
	tr.must(os.WriteFile(path, []byte(content), 0o644))
}

func (tr *tree) append(path, content string) {
	old, err := os.ReadFile(filepath.Join(tr.root, path))
	tr.must(err)
	tr.write(path, string(old)+content)
}

func (tr *tree) link(path, target string) {
	tr.t.Helper()
	path = filepath.Join(tr.root, path)
	tr.must(os.MkdirAll(filepath.Dir(path), 0o755))
	tr.must(os.Symlink(target, path))
}

func (tr *tree) remove(path string) { tr.must(os.RemoveAll(filepath.Join(tr.root, path))) }

const disksDir = "sys/devices/block/"

// disk adds a whole disk of 1 GiB; attributes are pairs of file and content that overrule the defaults.
func (tr *tree) disk(name, dev string, attributes ...string) {
	tr.t.Helper()
	dir := disksDir + name
	files := []string{
		"dev", dev, "size", "2097152", "ro", "0", "hidden", "0", "diskseq", "7",
		"queue/logical_block_size", "512", "queue/rotational", "0",
	}
	files = append(files, attributes...)
	for i := 0; i < len(files); i += 2 {
		tr.write(dir+"/"+files[i], files[i+1]+"\n")
	}
	for _, sub := range []string{"/holders", "/slaves"} {
		tr.must(os.MkdirAll(tr.root+"/"+dir+sub, 0o755))
	}
	tr.link("sys/class/block/"+name, "../../devices/block/"+name)
	tr.write("dev/"+strings.ReplaceAll(name, "!", "/"), "")
}

func (tr *tree) partition(disk, name, dev string) {
	tr.t.Helper()
	dir := disksDir + disk + "/" + name
	tr.write(dir+"/dev", dev+"\n")
	tr.write(dir+"/size", "1048576\n")
	tr.write(dir+"/partition", "1\n")
	tr.must(os.MkdirAll(tr.root+"/"+dir+"/holders", 0o755))
	tr.link("sys/class/block/"+name, "../../devices/block/"+disk+"/"+name)
	tr.write("dev/"+name, "")
}

// on builds one device on others, from both ends.
func (tr *tree) on(above string, under ...string) {
	for _, name := range under {
		tr.link("sys/class/block/"+above+"/slaves/"+name, "x")
		tr.link("sys/class/block/"+name+"/holders/"+above, "x")
	}
}

func (tr *tree) dm(kernel, dev, name, uuid string, under ...string) {
	tr.disk(kernel, dev, "dm/name", name, "dm/uuid", uuid)
	tr.link("dev/mapper/"+name, "../"+kernel)
	tr.on(kernel, under...)
}

func (tr *tree) mount(dev, point, fstype, source, options string) {
	tr.ids++
	tr.append("proc/self/mountinfo", fmt.Sprintf("%d 1 %s / %s rw,relatime shared:1 - %s %s %s\n",
		100+tr.ids, dev, point, fstype, source, options))
}

func (tr *tree) swap(path, kind string) {
	tr.append("proc/swaps", fmt.Sprintf("%s %s 1048572 0 -2\n", path, kind))
}

// nvme adds an EC2 NVMe disk.
func (tr *tree) nvme(name, dev, model, serial string) {
	tr.disk(name, dev, "device/model", model+"          ", "device/serial", serial+" ")
}

// boot adds a Nitro boot volume with /, /boot/efi and the usual pseudo filesystems.
func (tr *tree) boot() {
	tr.nvme("nvme0n1", "259:0", modelEBS, "vol0aaaaaaaaaaaaaaaa")
	tr.partition("nvme0n1", "nvme0n1p1", "259:1")
	tr.partition("nvme0n1", "nvme0n1p15", "259:2")
	tr.mount("0:21", "/proc", "proc", "proc", "rw")
	tr.mount("259:1", "/", "ext4", "/dev/root", "rw,discard")
	tr.mount("0:5", "/dev", "devtmpfs", "", "rw")
	tr.mount("259:2", "/boot/efi", "vfat", "/dev/nvme0n1p15", "rw")
	tr.mount("0:30", "/run", "tmpfs", "tmpfs", "rw")
}

const stateDir = "/var/lib/luks-kms-agent"

func (tr *tree) scanner() Scanner { return Scanner{Root: tr.root, StateDir: stateDir} }

func (tr *tree) scan(named ...string) Scan {
	tr.t.Helper()
	s := tr.scanner()
	s.Named = named
	scan, err := s.Scan(tr.t.Context())
	tr.must(err)
	return scan
}

func (s Scan) device(t testing.TB, name string) Device {
	t.Helper()
	for _, d := range s.Devices {
		if d.Name == name {
			return d
		}
	}
	t.Fatalf("device %s is not in the scan", name)
	return Device{}
}

// usesOf writes the uses of every device in a line each: "nvme0n1: system /, partitioned nvme0n1p1".
func (s Scan) usesOf() string {
	var lines []string
	for _, d := range s.Devices {
		var uses []string
		for _, u := range d.Uses {
			uses = append(uses, string(u.Kind)+" "+u.What)
		}
		lines = append(lines, d.Name+": "+strings.Join(uses, ", "))
	}
	return strings.Join(lines, "\n")
}
