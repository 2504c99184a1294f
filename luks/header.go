package luks

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The binary header of LUKS2, from the LUKS2 On-Disk Format Specification 1.1.1, section 2.1. Big endian, offsets in bytes.
const (
	magicPrimary   = "LUKS\xba\xbe"
	magicSecondary = "SKUL\xba\xbe"

	binarySize = 4096 // the binary header; the JSON area follows at once

	offVersion   = 6
	offSize      = 8
	offSeqID     = 16
	offLabel     = 24
	offAlgorithm = 72
	offSalt      = 104
	offUUID      = 168
	offSubsystem = 208
	offOffset    = 256
	offChecksum  = 448

	lenLabel     = 48
	lenAlgorithm = 32
	lenSalt      = 64
	lenUUID      = 40
	lenSubsystem = 48
	lenChecksum  = 64

	algorithm = "sha256" // the only checksum that cryptsetup writes
)

// headerSizes are the sizes that a header (binary plus JSON area) may have. The secondary copy starts right after the primary,
// so these also are the offsets at which one can be found. Section 2.3 of the specification.
var headerSizes = [...]int64{0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000, 0x100000, 0x200000, 0x400000}

// A headerCopy is one copy whose magic, sizes and checksum hold. Its texts and JSON are not judged yet.
type headerCopy struct {
	offset    int64
	size      int64 // binary and JSON area, bytes
	seqID     uint64
	label     []byte // without the padding
	uuid      []byte
	subsystem []byte
	json      []byte // without the padding
	malformed string // why the JSON area is not a text and padding, "" if it is
}

// readCopy reads the copy at offset. It returns (nil, magic found, why) for a copy that is not valid, and an error only where
// reading failed. Memory is bounded by the largest header size.
func readCopy(r io.ReaderAt, deviceSize, offset int64) (c *headerCopy, magic bool, why string, err error) {
	want := magicPrimary
	if offset != 0 {
		want = magicSecondary
	}
	head := make([]byte, max(0, min(binarySize, deviceSize-offset)))
	if err := readFull(r, head, offset); err != nil {
		return nil, false, "", err
	}
	if !bytes.HasPrefix(head, []byte(want)) {
		return nil, false, "it has no LUKS magic", nil
	}
	if len(head) < binarySize {
		return nil, true, "it does not fit on the device", nil
	}
	if v := binary.BigEndian.Uint16(head[offVersion:]); v != 2 {
		return nil, true, fmt.Sprintf("it has version %d", v), nil
	}
	size, ok := headerSize(binary.BigEndian.Uint64(head[offSize:]))
	switch {
	case !ok:
		return nil, true, "its size is not one of LUKS2", nil
	case offset != 0 && size != offset:
		return nil, true, "its size and its place disagree", nil
	case binary.BigEndian.Uint64(head[offOffset:]) != uint64(offset):
		return nil, true, "it does not name its own place", nil
	case deviceSize < 2*size:
		return nil, true, "both copies do not fit on the device", nil
	case string(trimNUL(head[offAlgorithm:offAlgorithm+lenAlgorithm])) != algorithm:
		return nil, true, "its checksum is not sha256", nil
	}

	area := make([]byte, size-binarySize)
	if err := readFull(r, area, offset+binarySize); err != nil {
		return nil, true, "", err
	}
	if sum := checksum(head, area); subtle.ConstantTimeCompare(sum[:], head[offChecksum:offChecksum+len(sum)]) != 1 {
		return nil, true, "its checksum is wrong", nil
	}

	c = &headerCopy{
		offset:    offset,
		size:      size,
		seqID:     binary.BigEndian.Uint64(head[offSeqID:]),
		label:     trimNUL(head[offLabel : offLabel+lenLabel]),
		uuid:      trimNUL(head[offUUID : offUUID+lenUUID]),
		subsystem: trimNUL(head[offSubsystem : offSubsystem+lenSubsystem]),
	}
	end := bytes.IndexByte(area, 0)
	switch {
	case end < 0:
		c.malformed = "the JSON area has no end"
	case len(bytes.Trim(area[end:], "\x00")) != 0:
		c.malformed = "the JSON area has bytes after its end"
	default:
		c.json = area[:end]
	}
	return c, true, "", nil
}

// same says whether two copies carry the same header.
func (c *headerCopy) same(o *headerCopy) bool {
	return c.size == o.size && c.seqID == o.seqID && c.malformed == o.malformed &&
		bytes.Equal(c.label, o.label) && bytes.Equal(c.uuid, o.uuid) &&
		bytes.Equal(c.subsystem, o.subsystem) && bytes.Equal(c.json, o.json)
}

// buildPrimary makes the bytes of a primary copy around a JSON text. It fails where the text does not fit.
func buildPrimary(size int64, uuid string, text []byte) ([]byte, error) {
	if int64(len(text)) >= size-binarySize || len(uuid) >= lenUUID {
		return nil, errors.New("the header does not fit")
	}
	b := make([]byte, size)
	copy(b, magicPrimary)
	binary.BigEndian.PutUint16(b[offVersion:], 2)
	binary.BigEndian.PutUint64(b[offSize:], uint64(size))
	binary.BigEndian.PutUint64(b[offSeqID:], 1)
	copy(b[offAlgorithm:], algorithm)
	copy(b[offUUID:], uuid)
	copy(b[binarySize:], text)
	sum := checksum(b[:binarySize], b[binarySize:])
	copy(b[offChecksum:], sum[:])
	return b, nil
}

// checksum is the sha256 over the whole copy, with the checksum field itself as zeros.
func checksum(head, area []byte) [sha256.Size]byte {
	h := sha256.New()
	h.Write(head[:offChecksum])
	h.Write(make([]byte, lenChecksum))
	h.Write(head[offChecksum+lenChecksum:])
	h.Write(area)
	return [sha256.Size]byte(h.Sum(nil))
}

func headerSize(n uint64) (int64, bool) {
	for _, s := range headerSizes {
		if n == uint64(s) {
			return s, true
		}
	}
	return 0, false
}

func trimNUL(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}

// readFull reads exactly len(b) bytes. A device that ends too early is an error: its size was asked before.
func readFull(r io.ReaderAt, b []byte, offset int64) error {
	n, err := r.ReadAt(b, offset)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("cannot read %d bytes at offset %d: %w", len(b), offset, err)
}
