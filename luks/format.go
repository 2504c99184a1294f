package luks

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// DataOffset is where the encrypted data starts in what Format makes, bytes. It is cryptsetup's default; asked for, because some devices move it.
const DataOffset = 16 << 20

// KeyslotsOffset is where the key slots start in what Format makes, bytes: behind two header copies of 16 KiB each, cryptsetup's
// default. luksFormat fills the key slots' room with noise, and what is behind with zeros, before it writes a header.
const KeyslotsOffset = 32 << 10

// keyslotsSize is the room for key slots in what Format makes, bytes: eight of 252 KiB, as LUKS1 has. luksFormat fills it with noise, which
// with cryptsetup's default, all up to DataOffset, is half of what it writes.
const keyslotsSize = 2 << 20

// FormatOptions says what a new header carries.
type FormatOptions struct {
	UUID       string // canonical, lower case
	Label      string // at most 47 bytes of printable text, may be empty
	KeyARN     string // of the KMS key that wrapped the data key
	WrappedKey []byte // the data key as KMS wrapped it
}

// reasonOther: what was written is a header, but another one.
const reasonOther = "it is not the header that was asked for"

// Format makes path (a block device or an image file) a LUKS2 volume that k opens, with our token, and proves it: it inspects what
// was written and unseals it. Whatever was on path is lost; whether that may be is the caller's decision, and the caller holds
// the device.
//
// It is not atomic. A cut, an error or the end of ctx can leave [KindNone], [KindTorn], [KindEmpty], or a header of ours
// without a token; formatting again with the same options mends all of them.
//
// The sector size is 4096 where the size of the device is a multiple of it, else 512: cryptsetup refuses 4096 there, and disks of
// decimal sizes, such as EC2's instance store of 300 GB, are not.
func Format(ctx context.Context, path string, o FormatOptions, k Key) error {
	if err := format(ctx, path, o, k); err != nil {
		return fmt.Errorf("cannot format %s: %w", path, err)
	}
	return nil
}

func format(ctx context.Context, path string, o FormatOptions, k Key) error {
	if err := o.check(); err != nil {
		return err
	}
	if err := checkKey(k); err != nil {
		return err
	}
	before, err := inspectPath(path) // for the size only
	if err != nil {
		return err
	}
	sectorSize := 4096
	if before.Size%int64(sectorSize) != 0 {
		sectorSize = 512
	}

	if err := luksFormat(ctx, path, o, sectorSize, k); err != nil {
		return err
	}
	bare, err := inspectPath(path)
	if err != nil {
		return err
	}
	if bare.Kind != KindLUKS2 {
		// cryptsetup was content, and the disk lies: that is no matter of trust.
		return fmt.Errorf("%w: the header that was written is not there (found: %s)", unix.EIO, bare.Kind)
	}
	if bare.checked == nil || !slices.Equal(bare.Reasons, []string{reasonNoToken}) {
		return &HeaderError{path, append(bare.Reasons, reasonOther)}
	}
	token := &Token{KeyARN: o.KeyARN, WrappedKey: o.WrappedKey, Version: tokenVersion}
	if token.MAC, err = bare.checked.mac(k, token.Version); err != nil {
		return err
	}
	text, err := token.encode()
	if err != nil {
		return err
	}
	if err := importToken(ctx, path, 0, text); err != nil {
		return err
	}

	done, err := inspectPath(path)
	if err != nil {
		return err
	}
	if err := done.verify(k); err != nil {
		return err
	}
	h := done.Header
	switch {
	case done.SecondaryDamaged || done.PrimaryDamaged,
		h.UUID != o.UUID, h.Label != o.Label, h.Subsystem != Subsystem,
		h.SectorSize != sectorSize, h.Offset != DataOffset, len(h.Keyslots) != 1,
		h.Token.KeyARN != o.KeyARN, !bytes.Equal(h.Token.WrappedKey, o.WrappedKey):
		return &HeaderError{path, []string{reasonOther}}
	}
	return flush(path)
}

func (o FormatOptions) check() error {
	switch {
	case !canonicalUUID(o.UUID):
		return fmt.Errorf("%q is not a UUID in lower case", o.UUID)
	case len(o.Label) >= lenLabel || printable([]byte(o.Label)) != o.Label:
		return fmt.Errorf("the label %q is not printable text of at most %d bytes", o.Label, lenLabel-1)
	}
	if err := checkARN(o.KeyARN); err != nil {
		return fmt.Errorf("the token would be refused: %w", err)
	}
	if err := checkWrapped(o.WrappedKey); err != nil {
		return fmt.Errorf("the token would be refused: %w", err)
	}
	return nil
}

// flush makes the header durable. cryptsetup does so for each write; this also covers the device's own cache of what it wiped.
func flush(path string) error {
	// Read-only is enough to flush, and the close of a writer would make udev look again.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return pathCause(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("cannot flush what was written: %w", pathCause(err))
	}
	return nil
}
