package harness

import (
	"os"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// DamagePrimary flips one bit in the JSON of a disk's first LUKS header.
func (n *Node) DamagePrimary(name string) {
	n.tb.Helper()
	const at = lukstest.Binary + 40
	n.Fill(name, at, []byte{n.readStart(name, at+1)[at] ^ 1})
}

// Tamper edits the JSON of both LUKS headers of a disk and makes the checksums right again, as somebody who can write to
// the disk would.
func (n *Node) Tamper(name string, edit func(metadata map[string]any)) {
	n.tb.Helper()
	if err := lukstest.Edit(n.Image(name), func(m lukstest.Tree) { edit(m) }); err != nil {
		n.tb.Fatalf("cannot tamper with %s: %v", name, err)
	}
}

func (n *Node) readStart(name string, size int) []byte {
	n.tb.Helper()
	f, err := os.Open(n.Image(name))
	if err != nil {
		n.tb.Fatalf("%v", err)
	}
	defer f.Close()
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		n.tb.Fatalf("cannot read %s: %v", f.Name(), err)
	}
	return b
}
