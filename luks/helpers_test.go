package luks

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

const (
	testUUID  = "0a1b2c3d-0000-4000-8000-000000000001"
	testARN   = "arn:aws:kms:us-east-1:111122223333:key/0f1e2d3c-0000-4000-8000-00000000000a"
	imageSize = 17 << 20 // the data starts at 16 MiB
)

// testKey is a key without the care that real ones get.
type testKey [32]byte

func (k testKey) Bytes() []byte { return k[:] }
func (k testKey) Passphrase() []byte {
	return []byte(base64.StdEncoding.EncodeToString(k[:]))
}

// rightKey is 0, 1, 2, … 31; any other byte makes another key.
func rightKey() testKey { return keyOf(0) }

func keyOf(first byte) testKey {
	var k testKey
	for i := range k {
		k[i] = first + byte(i)
	}
	return k
}

func testOptions() FormatOptions {
	return FormatOptions{UUID: testUUID, Label: "data", KeyARN: testARN, WrappedKey: []byte("what KMS wrapped")}
}

// headBytes of an image are what tests copy: both header copies and the keyslots in use. What follows is a hole.
const headBytes = 1 << 20

// template is the head of an image that Format made, once for all tests.
var template = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "luks-test")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "image")
	if err := makeImage(path, nil, imageSize); err != nil {
		return nil, err
	}
	if err := Format(context.Background(), path, testOptions(), rightKey()); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return b[:headBytes:headBytes], nil
})

func makeImage(path string, head []byte, size int64) error {
	if err := os.WriteFile(path, head, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

// volume is a fresh copy of a formatted image.
func volume(t testing.TB) string {
	t.Helper()
	b, err := template()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image")
	if err := makeImage(path, b, imageSize); err != nil {
		t.Fatal(err)
	}
	return path
}

// blank is an image of zeros.
func blank(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "blank")
	if err := makeImage(path, nil, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func inspected(t testing.TB, path string) *Inspection {
	t.Helper()
	i, err := Inspect(path)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func content(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// write puts b at an offset of a file, as a cut, a bit flip or a stranger would.
func write(t testing.TB, path string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string, at, n int64) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if err := readFull(f, b, at); err != nil {
		t.Fatal(err)
	}
	return b
}

// flip inverts a bit.
func flip(t testing.TB, path string, at int64) {
	t.Helper()
	b := read(t, path, at, 1)
	write(t, path, at, []byte{b[0] ^ 1})
}

const (
	primaryAt   = 0
	secondaryAt = 0x4000
)

// rewrite lets edit change a header copy of 16 KiB and fixes its checksum: what an attacker does.
func rewrite(t testing.TB, path string, at int64, edit func(copy []byte)) {
	t.Helper()
	b := read(t, path, at, 0x4000)
	edit(b)
	lukstest.Seal(b)
	write(t, path, at, b)
}

// editText changes the JSON text of both copies.
func editText(t testing.TB, path string, edit func(string) string) {
	t.Helper()
	if err := lukstest.EditText(path, func(s string) (string, error) { return edit(s), nil }); err != nil {
		t.Fatal(err)
	}
}

type tree = lukstest.Tree

// edit changes the JSON of both copies.
func edit(t testing.TB, path string, change func(tree)) {
	t.Helper()
	if err := lukstest.Edit(path, change); err != nil {
		t.Fatal(err)
	}
}

func setSeqID(b []byte, n uint64) { binary.BigEndian.PutUint64(b[offSeqID:], n) }

// run runs a real tool with input and returns what it printed.
func run(t testing.TB, input []byte, name string, args ...string) (string, error) {
	t.Helper()
	path, err := findProgram(name)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdin = bytes.NewReader(input)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustRun(t testing.TB, input []byte, name string, args ...string) string {
	t.Helper()
	out, err := run(t, input, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

// stub puts a shell script named cryptsetup first into PATH. "$REAL" in it is the real one.
func stub(t *testing.T, script string) {
	t.Helper()
	programPath, err := findProgram("cryptsetup")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	text := "#!/bin/sh\nREAL=" + programPath + "\n" + script + "\n"
	if err := os.WriteFile(filepath.Join(dir, "cryptsetup"), []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// reasons returns those of a *HeaderError in err, as one text.
func reasons(t testing.TB, err error) string {
	t.Helper()
	var h *HeaderError
	if !errors.As(err, &h) {
		t.Fatalf("not a HeaderError: %v", err)
	}
	return strings.Join(h.Reasons, "; ")
}
