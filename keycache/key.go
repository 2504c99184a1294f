package keycache

import (
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// keyLen is the length of a data key in bytes: GenerateDataKey with
	// KeySpec AES_256 returns 32.
	keyLen = 32
	// passphraseLen is the length of 32 bytes in padded standard base64.
	passphraseLen = 44
	// redacted is what every printer and marshaller shows of a key.
	redacted = "[key]"
)

// errKeyLength reports a key that does not have keyLen bytes.
var errKeyLength = errors.New("a data key has 32 bytes")

// Key is a data key of 32 bytes and its passphrase of 44, or a recovery key of 20
// and its text of 47, in a page of their own, locked into memory and left out of
// core dumps.
//
// Whoever gets a Key owns it and calls [Key.Wipe] once nothing uses it any
// more. The other methods may run at the same time as one another, but not at
// the same time as Wipe. The zero value and nil are wiped keys.
//
// A Key shows as [key] under every verb of fmt and in JSON, text, YAML, slog
// and zap. Held in an unexported field of another struct, where fmt may not
// call methods, it shows as an address.
type Key struct{ m *material }

// material is behind a pointer so that no copy of a Key copies the key, and so
// that fmt, which follows no pointer inside a struct, cannot reach the bytes.
type material struct {
	page      atomic.Pointer[[]byte] // the key, then its passphrase
	keyLen    int
	end       int                // of the passphrase
	unmap     func([]byte) error // unix.Munmap; tests look at the page first
	requestID string             // no secret, and on the heap
}

// NewKey copies the 32 bytes of b to locked memory and wipes b, also when it
// fails. It fails if b has another length or if memory cannot be locked
// (RLIMIT_MEMLOCK).
func NewKey(b []byte) (*Key, error) {
	defer clear(b)
	if len(b) != keyLen {
		return nil, fmt.Errorf("cannot take a key of %d bytes: %w", len(b), errKeyLength)
	}
	return lockKey(b, passphraseLen, base64.StdEncoding.Encode)
}

// lockKey copies a key to locked memory and puts its passphrase behind it.
func lockKey(b []byte, passphraseLen int, encode func(passphrase, key []byte)) (*Key, error) {
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("cannot map memory for a key: %w", err)
	}
	// Locked before the key is in it: an unlocked page may be swapped at once.
	if err := unix.Mlock(page); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot lock memory for a key: %w", err), unix.Munmap(page))
	}
	if err := unix.Madvise(page, unix.MADV_DONTDUMP); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot keep a key out of core dumps: %w", err), unix.Munmap(page))
	}
	m := &material{keyLen: len(b), end: len(b) + passphraseLen, unmap: unix.Munmap}
	copy(page, b)
	encode(page[m.keyLen:m.end], page[:m.keyLen])
	m.page.Store(&page)
	return &Key{m: m}, nil
}

// Bytes returns the bytes of the key, 32 of a data key and 20 of a recovery key,
// nil once it is wiped. The slice is borrowed: reading it after Wipe is a fault
// that ends the process.
func (k *Key) Bytes() []byte { key, _ := k.parts(); return key }

// Passphrase returns the LUKS passphrase, nil once the key is wiped: of a data key
// 44 bytes of standard base64 without a newline, of a recovery key its text.
// Borrowed as Bytes is.
func (k *Key) Passphrase() []byte { _, passphrase := k.parts(); return passphrase }

// RequestID returns the id of the very KMS call that gave this key, as CloudTrail
// has it; "" where KMS told none or the key is from elsewhere. Wipe keeps it.
func (k *Key) RequestID() string {
	if k == nil || k.m == nil {
		return ""
	}
	return k.m.requestID
}

func (k *Key) parts() (key, passphrase []byte) {
	if k == nil || k.m == nil {
		return nil, nil
	}
	page := k.m.page.Load()
	if page == nil {
		return nil, nil
	}
	return (*page)[:k.m.keyLen:k.m.keyLen], (*page)[k.m.keyLen:k.m.end:k.m.end]
}

// Equal compares two keys in constant time. A wiped key equals nothing.
func (k *Key) Equal(other *Key) bool {
	a, b := k.Bytes(), other.Bytes()
	return a != nil && b != nil && subtle.ConstantTimeCompare(a, b) == 1
}

// Wipe zeroes the key and gives its memory back. Further calls do nothing.
func (k *Key) Wipe() {
	if k == nil || k.m == nil {
		return
	}
	page := k.m.page.Swap(nil)
	if page == nil {
		return
	}
	clear(*page)
	// A page that stays mapped is a leak of 4 KiB of zeros, not of a key.
	_ = k.m.unmap(*page)
}

// Format prints [key], whatever the verb and flags.
func (Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String returns [key].
func (Key) String() string { return redacted }

// GoString returns [key].
func (Key) GoString() string { return redacted }

// MarshalJSON returns "[key]".
func (Key) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText returns [key].
func (Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalYAML returns [key].
func (Key) MarshalYAML() (any, error) { return redacted, nil }

// LogValue returns [key].
func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }
