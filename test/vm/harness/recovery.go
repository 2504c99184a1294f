package harness

import (
	"encoding/base64"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Document has the commands of the project's documents, to be run as they stand there: blocks of code whose info string is "sh", a
// place and a name, as in "sh node:restore-header".
type Document struct {
	tb     TB
	blocks map[string]string // by place and name
	ran    map[string]bool
}

var (
	fence  = regexp.MustCompile("(?ms)^```([^\n]*)\n(.*?)^```$")
	marked = regexp.MustCompile(`^sh ((?:node|admin):[a-z-]+)$`)
)

// ReadDocument reads the blocks of files below the top of the tree. In the first file every block must be marked: it is about nothing
// but commands.
func ReadDocument(tb TB, a *Assets, files ...string) *Document {
	tb.Helper()
	d := &Document{tb: tb, blocks: map[string]string{}, ran: map[string]bool{}}
	for i, file := range files {
		text, err := os.ReadFile(filepath.Join(a.Repo, file))
		if err != nil {
			tb.Fatalf("%v", err)
		}
		for _, found := range fence.FindAllStringSubmatch(string(text), -1) {
			info := marked.FindStringSubmatch(found[1])
			switch {
			case info == nil && i == 0:
				tb.Errorf("%s has a block %q that no story can run:\n%s", file, found[1], found[2])
			case info == nil:
			case d.blocks[info[1]] != "":
				tb.Errorf("%s: a second block %s", file, info[1])
			default:
				d.blocks[info[1]] = found[2]
			}
		}
	}
	return d
}

// Run runs blocks one after the other in one shell of the guest, where each command must succeed, and returns what they printed.
// Before, it sets variables ("DEVICE=/dev/nvme1n1"). Where the AWS CLI is called it has the credentials of an administrator.
func (d *Document) Run(n *Node, variables string, names ...string) string {
	d.tb.Helper()
	script := "set -eu\nexport AWS_ENDPOINT_URL_KMS=" + KMSEndpoint + " AWS_REGION=" + Region + " AWS_ACCESS_KEY_ID=admin AWS_SECRET_ACCESS_KEY=admin\n" + variables + "\n"
	for _, name := range names {
		block := d.blocks[name]
		if block == "" {
			d.tb.Fatalf("the documents have no block %s", name)
		}
		d.ran[name] = true
		script += block
	}
	r := n.Try(script)
	if r.Code != 0 {
		d.tb.Fatalf("%s: %s", strings.Join(names, ", "), r)
	}
	return r.Stdout
}

// WantAllRun fails the story for each block that was not run.
func (d *Document) WantAllRun() {
	d.tb.Helper()
	for _, name := range slices.Sorted(maps.Keys(d.blocks)) {
		if !d.ran[name] {
			d.tb.Errorf("block %s was never run", name)
		}
	}
}

// NewBootDisk takes the boot disk of a node that is switched off away and puts a new one in its place, with the agent and its
// configuration on it, and nothing else.
func (n *Node) NewBootDisk() {
	n.tb.Helper()
	n.mustBeOff()
	if err := errors.Join(os.Remove(n.overlay()), createOverlay("raw", n.assets.Root, n.overlay())); err != nil {
		n.tb.Fatalf("cannot create the boot disk: %v", err)
	}
}

// Become switches a running node off and gives it a new boot disk of another userland, as an upgrade of the distribution does: the agent's
// records, logs and configuration stay, and so do the disks and who the node is.
func (n *Node) Become(userland *Assets) {
	n.tb.Helper()
	kept := n.Sh("tar -C / -cz var/lib/luks-kms-agent var/log/luks-kms-agent etc/luks-kms-agent | base64 -w0")
	tree, err := base64.StdEncoding.DecodeString(kept)
	if err != nil {
		n.tb.Fatalf("%v", err)
	}
	n.PowerOff()
	n.assets, n.tree = userland, tree
	n.NewBootDisk()
}

// BecomeInstance gives a node that is switched off another instance id: it is a clone of itself then.
func (n *Node) BecomeInstance(id string) {
	n.tb.Helper()
	n.mustBeOff()
	n.checkManners()
	if err := n.servers.serveIMDS(n.assets, n.dir, id); err != nil {
		n.tb.Fatalf("%v", err)
	}
	n.IMDS = n.servers.imds
}

func (n *Node) mustBeOff() {
	n.tb.Helper()
	if n.vm != nil {
		n.tb.Fatalf("the node is switched on")
	}
}

// AdministerFromNode puts the AWS CLI into the node's PATH.
func (n *Node) AdministerFromNode() {
	n.tb.Helper()
	n.Sh("ln -sf /usr/local/lib/story/aws /usr/local/bin/aws")
}
