package harness

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/search"
)

// The models that EC2's NVMe disks report.
const (
	ModelEBS           = "Amazon Elastic Block Store"
	ModelInstanceStore = "Amazon EC2 NVMe Instance Storage"
)

// DiskSize is the size of a disk of a story, in bytes: room for LUKS2's 16 MiB and the 300 MiB that mkfs.xfs asks for.
const DiskSize = 384 << 20

// Disk is one data disk of a node. Its content is a sparse raw image on the host.
type Disk struct {
	Name   string // how the story calls it: "ebs1"; at most 20 bytes
	Model  string // ModelEBS, ModelInstanceStore; "" for a plain loop device in the guest
	Serial string // of the NVMe disk: "vol0aaa…" or "AWS…"; at most 20 bytes
	Loop   string // the loop device: "/dev/loop0"

	Size       int64 // what the node sees of its image, bytes; 0 is all of it, DiskSize
	SectorSize int   // logical, bytes; 0 is 512
	Faulty     bool  // it can be told to fail, by [Node.Faults]
	Away       bool  // it appears only by [Node.Attach]
}

func (d Disk) size() int64 { return cmp.Or(d.Size, DiskSize) }

// EBS returns a disk that EC2 would call vol-<id>; id is 17 hexadecimal digits.
func EBS(name, id string) Disk { return Disk{Name: name, Model: ModelEBS, Serial: "vol" + id} }

// InstanceStore returns a disk of the host machine.
func InstanceStore(name, serial string) Disk {
	return Disk{Name: name, Model: ModelInstanceStore, Serial: serial}
}

// Loop returns a disk that is nothing but a loop device in the guest.
func Loop(name, device string) Disk { return Disk{Name: name, Loop: device} }

// Image returns the path of a disk's raw image.
func (n *Node) Image(name string) string { return filepath.Join(n.dir, name+".img") }

func (n *Node) createDisks() error {
	for _, d := range n.disks {
		f, err := os.Create(n.Image(d.Name))
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(DiskSize), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// disk returns a disk of the node by its name, to be changed.
func (n *Node) disk(name string) *Disk {
	n.tb.Helper()
	i := slices.IndexFunc(n.disks, func(d Disk) bool { return d.Name == name })
	if i < 0 {
		n.tb.Fatalf("the node has no disk %s", name)
	}
	return &n.disks[i]
}

// A Fault is what part of a disk does instead of reading and writing.
type Fault struct {
	from, to int64  // bytes; to 0 is the end of the disk
	target   string // of device-mapper, with its arguments; "%d" stands for the sector below
}

// The ways to fail. Each is of the bytes from one offset to another; 0 as the other is the end of the disk.

// Errors lets neither reads nor writes through.
func Errors(from, to int64) Fault { return Fault{from, to, "error"} }

// WriteErrors lets reads through and fails writes.
func WriteErrors(from, to int64) Fault {
	// Always in the second of flakey's two times, of none and 3600 s.
	return Fault{from, to, "flakey " + channel.Storage + " %d 0 3600 1 error_writes"}
}

// Slow delays everything.
func Slow(from, to int64, by time.Duration) Fault {
	return Fault{from, to, fmt.Sprintf("delay %s %%d %d", channel.Storage, by.Milliseconds())}
}

// table returns the device-mapper table of a disk with faults, which are in order and do not overlap.
func (d Disk) table(faults []Fault) string {
	const sector = 512
	var lines []string
	line := func(from, to int64, target string) {
		if to > from {
			if strings.Contains(target, "%d") {
				target = fmt.Sprintf(target, from/sector)
			}
			lines = append(lines, fmt.Sprintf("%d %d %s", from/sector, (to-from)/sector, target))
		}
	}
	at := int64(0)
	for _, f := range slices.Concat(faults, []Fault{{from: d.size()}}) {
		line(at, f.from, "linear "+channel.Storage+" %d")
		at = cmp.Or(f.to, d.size())
		line(f.from, at, f.target)
	}
	return strings.Join(lines, "\n")
}

// Faults says how the disks fail, at once and at every later boot, until Faults is called again. Disks that it does not name are well.
func (n *Node) Faults(faults map[string][]Fault) {
	n.tb.Helper()
	var changed []string
	for _, d := range n.disks {
		if len(faults[d.Name]) > 0 && !d.Faulty {
			n.tb.Fatalf("disk %s is not made to fail", d.Name)
		}
		if !slices.Equal(faults[d.Name], n.faults[d.Name]) {
			changed = append(changed, d.Name)
		}
	}
	n.faults = faults
	n.tellGuest("reload", changed...)
}

// Detach takes NVMe disks away from the running node, whoever uses them, as EC2's forced detachment does. At the next
// boot they are there again, unless they are away.
func (n *Node) Detach(names ...string) { n.tb.Helper(); n.tellGuest("detach", names...) }

// Attach brings disks to the running node that were detached, or away, in this order.
func (n *Node) Attach(names ...string) { n.tb.Helper(); n.tellGuest("attach", names...) }

// AttachForGood is Attach of disks that were away, and are not at later boots.
func (n *Node) AttachForGood(names ...string) {
	n.tb.Helper()
	for _, name := range names {
		n.disk(name).Away = false
	}
	n.Attach(names...)
}

// Replace puts a blank disk with another serial in the place of one that is detached, or of a node that is switched off, as a
// stop of the instance does with instance store.
func (n *Node) Replace(name, serial string) {
	n.tb.Helper()
	d := n.disk(name)
	d.Serial = serial
	if err := errors.Join(os.Truncate(n.Image(name), 0), os.Truncate(n.Image(name), DiskSize)); err != nil {
		n.tb.Fatalf("%v", err)
	}
}

// Clone makes what is on a disk that is detached, or of a node that is switched off, what is on another, as a volume made
// from a snapshot has it.
func (n *Node) Clone(from, to string) {
	n.tb.Helper()
	if err := command(context.Background(), n.dir, "cp", "--sparse=always", n.Image(from), n.Image(to)); err != nil {
		n.tb.Fatalf("%v", err)
	}
}

// tellGuest lets the running node do something about disks, as the manifest is now. One that is off sees that at its boot.
func (n *Node) tellGuest(what string, names ...string) {
	n.tb.Helper()
	if n.vm == nil || len(names) == 0 {
		return
	}
	if err := n.writeManifest(); err != nil {
		n.tb.Fatalf("cannot write the manifest: %v", err)
	}
	n.Sh("/usr/local/lib/story/guest " + what + " " + strings.Join(names, " "))
}

// writeManifest writes the disk that tells the guest what to be.
func (n *Node) writeManifest() error {
	manifest := channel.Manifest{Tree: n.tree, Files: n.files}
	for _, d := range n.disks {
		disk := channel.Disk{Virtio: d.Name, Model: d.Model, Serial: d.Serial, Loop: d.Loop, SectorSize: d.SectorSize, Away: d.Away}
		if d.Faulty || d.Size != 0 {
			disk.Table = d.table(n.faults[d.Name])
		}
		manifest.Disks = append(manifest.Disks, disk)
	}
	b, err := encodeManifest(manifest)
	if err != nil {
		return err
	}
	return os.WriteFile(n.Image(channel.ManifestSerial), b, 0o600)
}

// Digest returns a digest of what the first limit bytes of a disk say, or all of it if limit is 0. Zeros that were written
// and zeros that never were are the same.
func (n *Node) Digest(name string, limit int64) string {
	n.tb.Helper()
	f, err := os.Open(n.Image(name))
	if err != nil {
		n.tb.Fatalf("%v", err)
	}
	defer f.Close()
	if limit == 0 {
		limit = DiskSize
	}
	digest, err := digestData(f, limit)
	if err != nil {
		n.tb.Fatalf("cannot read %s: %v", f.Name(), err)
	}
	return digest
}

// digestBlock is a unit of digestData, in bytes.
const digestBlock = 64 << 10

// digestData hashes the blocks before limit that are not all zero, each with its place.
func digestData(f *os.File, limit int64) (string, error) {
	h := sha256.New()
	block, zeros := make([]byte, digestBlock), make([]byte, digestBlock)
	for offset := int64(0); offset < limit; offset += digestBlock {
		data, err := f.Seek(offset, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // only a hole is left
		}
		if err != nil {
			return "", err
		}
		offset = max(offset, data/digestBlock*digestBlock)
		read, err := f.ReadAt(block[:max(0, min(digestBlock, limit-offset))], offset)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		if !bytes.Equal(block[:read], zeros[:read]) {
			fmt.Fprintln(h, offset)
			h.Write(block[:read])
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// data reads what a sparse file has between its holes.
type data struct {
	f           *os.File
	offset, end int64 // of what is left of the current piece
}

func (d *data) Read(p []byte) (int, error) {
	if d.offset == d.end {
		begin, err := d.f.Seek(d.end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
		end, err := d.f.Seek(begin, unix.SEEK_HOLE)
		if err != nil {
			return 0, err
		}
		d.offset, d.end = begin, end
	}
	read, err := d.f.ReadAt(p[:min(int64(len(p)), d.end-d.offset)], d.offset)
	d.offset += int64(read)
	return read, err
}

// Digests returns the Digest of every data disk.
func (n *Node) Digests(limit int64) map[string]string {
	n.tb.Helper()
	digests := map[string]string{}
	for _, d := range n.disks {
		digests[d.Name] = n.Digest(d.Name, limit)
	}
	return digests
}

// Find returns which of the needles stand in a disk's raw image.
func (n *Node) Find(name string, needles ...[]byte) []string {
	n.tb.Helper()
	f, err := os.Open(n.Image(name))
	if err != nil {
		n.tb.Fatalf("%v", err)
	}
	defer f.Close()
	indexes, err := search.Find(&data{f: f}, needles)
	if err != nil {
		n.tb.Fatalf("cannot search %s: %v", f.Name(), err)
	}
	var found []string
	for _, i := range indexes {
		found = append(found, fmt.Sprintf("%.60q", needles[i]))
	}
	return found
}

// Fill puts bytes into a disk of a node that is switched off.
func (n *Node) Fill(name string, offset int64, content []byte) {
	n.tb.Helper()
	f, err := os.OpenFile(n.Image(name), os.O_RDWR, 0)
	if err != nil {
		n.tb.Fatalf("%v", err)
	}
	_, err = f.WriteAt(content, offset)
	if err := errors.Join(err, f.Close()); err != nil {
		n.tb.Fatalf("cannot write %s: %v", f.Name(), err)
	}
}

// MakeExt4 puts an ext4 filesystem onto a disk of a node that is switched off, as somebody else's data.
func (n *Node) MakeExt4(name, label string) {
	n.tb.Helper()
	if err := command(context.Background(), n.dir, "mke2fs", "-q", "-F", "-t", "ext4", "-L", label, n.Image(name)); err != nil {
		n.tb.Fatalf("%v", err)
	}
}
