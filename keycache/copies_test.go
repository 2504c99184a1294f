package keycache

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Each runs in a process of its own: memory that other tests use must not be searched while they do.

func TestWipeAllWipesEveryCopy(t *testing.T) {
	if out, err := child(t, "copies", "").Output(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func TestWipeAllLeavesNothingOfACall(t *testing.T) {
	n := newNode(t)
	_, r := n.generate(t)
	// The server is in this process, so what is found in the other is the client's.
	arg := fmt.Sprintf("%s %s %s %s", n.kms.ARN(), n.kms.URL(), n.imds.URL(), base64.StdEncoding.EncodeToString(r.WrappedKey))
	out, err := child(t, "remains", arg).Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// childCopies plants copies of two keys, wipes the keys, and looks at what became of the copies.
func childCopies(string) error {
	raw := make([]byte, keyLen)
	_, _ = rand.Read(raw)
	k, err := NewKey(bytes.Clone(raw))
	if err != nil {
		return err
	}
	second := make([]byte, keyLen)
	_, _ = rand.Read(second)
	other, err := NewKey(bytes.Clone(second))
	if err != nil {
		return err
	}
	recovery, err := NewRecoveryKey()
	if err != nil {
		return err
	}
	passphrase := bytes.Clone(k.Passphrase())
	xored := func(pad byte) []byte {
		b := bytes.Clone(passphrase)
		for i := range b {
			b[i] ^= pad
		}
		return b
	}
	// A mapping full of copies, so that some lie where blocks meet.
	const pages = 48
	page := os.Getpagesize()
	mapping, err := unix.Mmap(-1, 0, pages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(mapping) }()
	planted := map[string][]byte{
		"raw": raw, "passphrase": passphrase, "inner pad": xored(innerPad), "outer pad": xored(outerPad), "other": second, "recovery": bytes.Clone(recovery.Passphrase()), "most of the recovery key's bytes": bytes.Clone(recovery.Bytes()[:16]),
		"first half": bytes.Clone(raw[:16]), "second half": bytes.Clone(raw[16:]), "end of the passphrase": bytes.Clone(passphrase[32:]),
		"in JSON": append([]byte(`{"Plaintext":"`), passphrase...)[len(`{"Plaintext":"`):],
	}
	for at := 5*page - 50; at < len(mapping)-page; at += passphraseLen {
		planted[fmt.Sprint("mapping at ", at)] = mapping[at : at+copy(mapping[at:], k.Passphrase())]
	}
	innocent := bytes.Repeat([]byte("nobody's key, sixteen or more bytes of it. "), 100)
	zeros, kept := mapping[2*page:3*page], bytes.Clone(innocent)

	if err := WipeAll(k, other, recovery, nil); err != nil {
		return err
	}
	for name, b := range planted {
		if !bytes.Equal(b, make([]byte, len(b))) {
			return fmt.Errorf("%s: still there", name)
		}
	}
	switch {
	case k.Bytes() != nil || other.Passphrase() != nil:
		return errors.New("a key is not wiped")
	case !bytes.Equal(innocent, kept):
		return errors.New("memory that held no key was overwritten")
	case !bytes.Equal(zeros, make([]byte, len(zeros))):
		return errors.New("zeros are not zeros")
	}
	// A key that is not random is in the memory of everybody: it is wiped, and not looked for.
	sevens := bytes.Repeat([]byte{7}, 2*keyLen)
	if k, err = NewKey(bytes.Clone(sevens[:keyLen])); err != nil {
		return err
	}
	if err := WipeAll(k); err != nil {
		return err
	}
	if k.Bytes() != nil || !bytes.Equal(sevens, bytes.Repeat([]byte{7}, 2*keyLen)) {
		return errors.New("memory with a key that is not random was overwritten, or the key was not wiped")
	}
	return nil
}

// childRemains decrypts a key, uses it as package luks does, wipes it, and searches its own memory with other means than WipeAll.
func childRemains(arg string) error {
	var keyID, endpoint, metadata, wrapped string
	if _, err := fmt.Sscan(arg, &keyID, &endpoint, &metadata, &wrapped); err != nil {
		return err
	}
	c, err := New(Options{KeyID: keyID, KMSEndpoint: endpoint, IMDSEndpoint: metadata, RetryLimit: -1})
	if err != nil {
		return err
	}
	blob, err := base64.StdEncoding.DecodeString(wrapped)
	if err != nil {
		return err
	}
	k, err := c.Decrypt(context.Background(), KeyRecord{KeyARN: keyID, WrappedKey: blob})
	if err != nil {
		return err
	}
	if _, err := hkdf.Key(sha256.New, k.Bytes(), nil, "info", 32); err != nil {
		return err
	}
	if _, err := pbkdf2.Key(sha256.New, string(k.Passphrase()), make([]byte, 32), 1000, 64); err != nil {
		return err
	}
	// What is looked for must not be found in what looks for it: it is kept inverted.
	inverted := func(b []byte) []byte {
		b = bytes.Clone(b)
		for i := range b {
			b[i] = ^b[i]
		}
		return b
	}
	needles := map[string][]byte{"raw": inverted(k.Bytes()), "passphrase": inverted(k.Passphrase())}
	before, err := countInverted(needles)
	if err != nil {
		return err
	}
	// The key's own page has one of each: more are the copies that prove the search.
	if before["raw"] < 2 || before["passphrase"] < 2 {
		return fmt.Errorf("before the wipe, memory has only %v", before)
	}
	if err := WipeAll(k); err != nil {
		return err
	}
	after, err := countInverted(needles)
	if err != nil {
		return err
	}
	if len(after) > 0 {
		return fmt.Errorf("after the wipe, memory still has %v; before: %v", after, before)
	}
	fmt.Println("before the wipe:", before)
	return nil
}

// countInverted counts in the memory of this process what is the inverse of each needle.
func countInverted(needles map[string][]byte) (map[string]int, error) {
	runtime.GC() // a copy in garbage counts
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	found := map[string]int{}
	block, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Munmap(block) }()
	self := spanOf(block)
	for line := range strings.Lines(string(maps)) {
		var s span
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &s.from, &s.to, &mode); err != nil || !strings.HasPrefix(mode, "rw") || s.from == self.from {
			continue
		}
		for at := s.from; at < s.to; at += int64(len(block)) - 64 {
			n, err := mem.ReadAt(block[:min(int64(len(block)), s.to-at)], at)
			if err != nil {
				break
			}
			b := block[:n]
			for i := range b {
				b[i] = ^b[i]
			}
			for name, needle := range needles {
				found[name] += bytes.Count(b, needle)
			}
			clear(block)
		}
	}
	for name, n := range found {
		if n == 0 {
			delete(found, name)
		}
	}
	return found, nil
}

// BenchmarkWipeAll is what a run pays at its end, with some memory in use.
func BenchmarkWipeAll(b *testing.B) {
	memory := slices.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB
	for b.Loop() {
		raw := make([]byte, keyLen)
		_, _ = rand.Read(raw)
		k, err := NewKey(raw)
		if err != nil {
			b.Fatal(err)
		}
		if err := WipeAll(k); err != nil {
			b.Fatal(err)
		}
	}
	runtime.KeepAlive(memory)
}
