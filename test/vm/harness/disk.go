package harness

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

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
}

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

// writeManifest writes the disk that tells the guest what to be.
func (n *Node) writeManifest() error {
	manifest := channel.Manifest{Files: n.files}
	for _, d := range n.disks {
		manifest.Disks = append(manifest.Disks, channel.Disk{Virtio: d.Name, Model: d.Model, Serial: d.Serial, Loop: d.Loop})
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

// HasHeader says whether a disk begins as a LUKS volume does.
func (n *Node) HasHeader(name string) bool {
	n.tb.Helper()
	return bytes.HasPrefix(n.readStart(name, headerBinary), []byte("LUKS\xba\xbe"))
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
