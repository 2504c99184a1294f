package lukstest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const metadata = `{"config":{"json_size":"12288"},"n":18446744073709551615}`

// image is a disk of 64 KiB with two copies of a header.
func image(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	const size = 16 << 10
	both := slices.Concat(New(0, size, "u", []byte(metadata)), New(size, size, "u", []byte(metadata)), make([]byte, 2*size))
	if err := os.WriteFile(path, both, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func content(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestEditKeepsTheChecksumRight(t *testing.T) {
	path := image(t)
	if err := Edit(path, func(m Tree) { m.At("config")["evil"] = true; m["short"] = m["n"]; delete(m, "n") }); err != nil {
		t.Fatal(err)
	}
	b := content(t, path)
	for _, header := range [][]byte{b[:16<<10], b[16<<10 : 32<<10]} {
		sum := bytes.Clone(header[448:512])
		clear(header[448:512])
		if want := sha256.Sum256(header); !bytes.Equal(sum, append(want[:], make([]byte, 32)...)) {
			t.Errorf("checksum %x, want %x", sum, want)
		}
		text, zeros, _ := bytes.Cut(header[4096:], []byte{0})
		if len(bytes.Trim(zeros, "\x00")) > 0 {
			t.Error("something of the old JSON is left")
		}
		var m map[string]json.RawMessage
		if err := json.Unmarshal(text, &m); err != nil {
			t.Fatal(err)
		}
		if string(m["short"]) != "18446744073709551615" || !bytes.Contains(m["config"], []byte(`"evil":true`)) || m["n"] != nil {
			t.Errorf("JSON: %s", text)
		}
	}
	if len(bytes.Trim(b[32<<10:], "\x00")) > 0 {
		t.Error("more than the header was written")
	}
}

// What cannot be done leaves the disk as it is.
func TestEditRefuses(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"what does not fit": func(path string) error {
			return Edit(path, func(m Tree) { m["long"] = strings.Repeat("x", 12<<10) })
		},
		"a change that fails": func(path string) error {
			return Rewrite(path, func(b []byte) error { b[0] ^= 1; return errors.New("x") })
		},
		"what is no JSON": func(path string) error {
			return Edit(path, func(m Tree) { m["f"] = func() {} })
		},
	} {
		path := image(t)
		before := content(t, path)
		if change(path) == nil || !bytes.Equal(before, content(t, path)) {
			t.Errorf("%s: no error, or the image was changed", name)
		}
	}
	blank := filepath.Join(t.TempDir(), "blank")
	if err := os.WriteFile(blank, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Edit(blank, func(Tree) {}); err == nil {
		t.Error("a blank image was edited")
	}
}

// The table is whole: each attack is seen by one check, and where only by one, it says why.
func TestAttacks(t *testing.T) {
	names := map[string]bool{}
	for _, a := range Attacks() {
		if names[a.Name] || (a.edit == nil) == (a.raw == nil) || a.Reason == "" && !a.MAC || (a.Why == "") != (a.Reason != "" && a.MAC) ||
			(a.Why == Plausible) != (a.Reason == "") {
			t.Errorf("%+v", a)
		}
		names[a.Name] = true
	}
	if len(names) < 24 {
		t.Errorf("%d attacks", len(names))
	}
}
