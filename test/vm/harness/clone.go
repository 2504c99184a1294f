package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// Image is a copy of a node's boot disk, as an AMI is one.
type Image struct {
	of   *Node
	disk string // qcow2
}

// TakeImage copies the boot disk of a node. One that is running is kept from writing while it is copied.
func (n *Node) TakeImage(name string) Image {
	n.tb.Helper()
	image := Image{of: n, disk: filepath.Join(n.dir, name+".qcow2")}
	if n.vm != nil {
		n.Sh("sync; fsfreeze --freeze /")
	}
	err := command(context.Background(), n.dir, "cp", "--sparse=always", n.overlay(), image.disk)
	if n.vm != nil {
		n.Sh("fsfreeze --unfreeze /")
	}
	if err != nil {
		n.tb.Fatalf("cannot copy the boot disk: %v", err)
	}
	return image
}

// Launch makes a node that is switched off, from an image: another instance with disks of its own, under the same KMS. What its configuration
// is the image says.
func (i Image) Launch(tb TB, instance string, disks ...Disk) *Node {
	tb.Helper()
	n := newNode(tb, i.of.assets, disks)
	n.servers = &servers{upstream: i.of.servers.upstream}
	if err := n.servers.startClone(n.assets, n.dir, instance); err != nil {
		tb.Fatalf("%v", err)
	}
	n.KMS, n.IMDS, n.Key = n.servers.kms, n.servers.imds, i.of.Key
	if err := errors.Join(n.createDisks(), createOverlay("qcow2", i.disk, n.overlay())); err != nil {
		tb.Fatalf("cannot create the disks: %v", err)
	}
	return n
}

// startClone starts what is a clone's own: what its calls are recorded by, and its metadata.
func (s *servers) startClone(a *Assets, dir, instance string) (err error) {
	s.kms = proxy.NewKMS(s.upstream, Region)
	if s.kmsAddr, err = s.serve(s.kms); err != nil {
		return err
	}
	if err := s.serveTLS(s.kms); err != nil {
		return fmt.Errorf("cannot serve KMS with TLS: %w", err)
	}
	return s.serveIMDS(a, dir, instance)
}

// newNode makes the folders of a node.
func newNode(tb TB, a *Assets, disks []Disk) *Node {
	tb.Helper()
	dir, err := os.MkdirTemp("", "luks-kms-node-")
	if err != nil {
		tb.Fatalf("%v", err)
	}
	n := &Node{tb: tb, assets: a, disks: disks, dir: dir, logs: filepath.Join(a.Logs, tb.Name()), faults: map[string][]Fault{}}
	tb.Cleanup(n.close)
	if err := errors.Join(os.RemoveAll(n.logs), os.MkdirAll(n.logs, 0o755)); err != nil {
		tb.Fatalf("%v", err)
	}
	return n
}
