package harness

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
)

// The LUKS2 header on the disk (LUKS2 On-Disk Format Specification, section 2): 4096 binary bytes, then JSON up to the size
// that the binary part gives; the second copy follows at that size.
const (
	headerBinary     = 4096
	headerSizeAt     = 8
	headerChecksumAt = 448
	headerChecksum   = 64
)

// DamagePrimary flips one bit in the JSON of a disk's first LUKS header.
func (n *Node) DamagePrimary(name string) {
	n.tb.Helper()
	b := n.readStart(name, headerBinary+64)
	n.Fill(name, headerBinary+40, []byte{b[headerBinary+40] ^ 1})
}

// Tamper edits the JSON of both LUKS headers of a disk and makes the checksums right again, as somebody who can write to
// the disk would.
func (n *Node) Tamper(name string, edit func(metadata map[string]any)) {
	n.tb.Helper()
	if err := n.tamper(name, edit); err != nil {
		n.tb.Fatalf("cannot tamper with %s: %v", name, err)
	}
}

func (n *Node) tamper(name string, edit func(map[string]any)) error {
	size := binary.BigEndian.Uint64(n.readStart(name, headerBinary)[headerSizeAt:])
	both := n.readStart(name, 2*int(size))
	for _, header := range [][]byte{both[:size], both[size:]} {
		if err := tamperHeader(header, edit); err != nil {
			return err
		}
	}
	n.Fill(name, 0, both)
	return nil
}

// tamperHeader edits one copy in place.
func tamperHeader(header []byte, edit func(map[string]any)) error {
	area := header[headerBinary:]
	decoder := json.NewDecoder(bytes.NewReader(bytes.TrimRight(area, "\x00")))
	decoder.UseNumber()
	var metadata map[string]any
	if err := decoder.Decode(&metadata); err != nil {
		return err
	}
	edit(metadata)
	b, err := json.Marshal(metadata)
	if err != nil {
		return err
	}
	if len(b) >= len(area) {
		return fmt.Errorf("the metadata has %d bytes, more than fit", len(b))
	}
	clear(area)
	copy(area, b)
	checksum := header[headerChecksumAt : headerChecksumAt+headerChecksum]
	clear(checksum)
	sum := sha256.Sum256(header)
	copy(checksum, sum[:])
	return nil
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
