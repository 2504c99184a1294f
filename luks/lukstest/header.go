// Package lukstest changes LUKS2 headers as somebody would who can write to the disk: what it wrote has right checksums.
// [Attacks] are changes that luks.go, cryptsetup or both fall for. It is a test kit: no program imports it.
//
// It knows the format from the LUKS2 On-Disk Format Specification 1.1.1, section 2, and takes nothing from package luks, whose
// mistakes it would share.
package lukstest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// The binary header at the start of each copy; bytes, big endian.
const (
	Binary = 4096 // its size; the JSON text follows

	versionAt   = 6
	sizeAt      = 8
	seqIDAt     = 16
	algorithmAt = 72
	uuidAt      = 168
	placeAt     = 256
	checksumAt  = 448
	checksumLen = 64

	maxSize = 4 << 20 // of a copy
)

// Tree is the decoded JSON of a header. Numbers are json.Number.
type Tree map[string]any

// At is the object to which keys lead. It panics where there is none.
func (m Tree) At(keys ...string) Tree {
	for _, k := range keys {
		m = m[k].(map[string]any)
	}
	return m
}

// Seal makes the checksum of a copy right.
func Seal(header []byte) {
	checksum := header[checksumAt : checksumAt+checksumLen]
	clear(checksum)
	sum := sha256.Sum256(header)
	copy(checksum, sum[:])
}

// SetText replaces the JSON of a copy; one that does not fit is cut.
func SetText(header, text []byte) {
	clear(header[Binary:])
	copy(header[Binary:], text)
}

// Text is the JSON of a copy.
func Text(header []byte) []byte {
	text, _, _ := bytes.Cut(header[Binary:], []byte{0})
	return text
}

// New is a copy of a size (16 KiB << 0…8) for a place on the disk, 0 being the primary's, with sequence id 1. It is sealed.
func New(place, size int, uuid string, text []byte) []byte {
	b := make([]byte, size)
	copy(b, "LUKS\xba\xbe")
	if place != 0 {
		copy(b, "SKUL\xba\xbe")
	}
	binary.BigEndian.PutUint16(b[versionAt:], 2)
	binary.BigEndian.PutUint64(b[sizeAt:], uint64(size))
	binary.BigEndian.PutUint64(b[seqIDAt:], 1)
	copy(b[algorithmAt:], "sha256")
	copy(b[uuidAt:], uuid)
	binary.BigEndian.PutUint64(b[placeAt:], uint64(place))
	SetText(b, text)
	Seal(b)
	return b
}

// Edit changes the JSON of both copies on a disk or image.
func Edit(path string, change func(Tree)) error {
	return EditText(path, func(text string) (string, error) {
		d := json.NewDecoder(bytes.NewReader([]byte(text)))
		d.UseNumber()
		var m Tree
		if err := d.Decode(&m); err != nil {
			return "", err
		}
		change(m)
		b, err := json.Marshal(m)
		return string(b), err
	})
}

// EditText changes the JSON of both copies on a disk or image as text.
func EditText(path string, change func(string) (string, error)) error {
	return Rewrite(path, func(header []byte) error {
		text, err := change(string(Text(header)))
		if err != nil {
			return err
		}
		if len(text) >= len(header)-Binary {
			return fmt.Errorf("the JSON has %d bytes, more than fit", len(text))
		}
		SetText(header, []byte(text))
		return nil
	})
}

// Rewrite changes the bytes of both copies on a disk or image and seals them. Nothing is written where change fails.
func Rewrite(path string, change func(header []byte) error) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size := make([]byte, 8)
	if _, err := f.ReadAt(size, sizeAt); err != nil {
		return fmt.Errorf("cannot read %s: %w", path, err)
	}
	n := binary.BigEndian.Uint64(size)
	if n <= Binary || n > maxSize {
		return fmt.Errorf("%s has no LUKS2 header", path)
	}
	both := make([]byte, 2*n)
	if _, err := f.ReadAt(both, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("cannot read %s: %w", path, err)
	}
	for _, header := range [][]byte{both[:n], both[n:]} {
		if err := change(header); err != nil {
			return err
		}
		Seal(header)
	}
	_, err = f.WriteAt(both, 0)
	return err
}
