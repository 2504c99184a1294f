package luks

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// readAll reads an image.
func readAll(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func scribble(t *testing.T, path string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(b, at)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestReadHeaderIsWhatCryptsetupBacksUp(t *testing.T) {
	path := volume(t)
	header, i, err := ReadHeader(path)
	if err != nil {
		t.Fatal(err)
	}
	by := filepath.Join(t.TempDir(), "header")
	if out, err := exec.Command("cryptsetup", "luksHeaderBackup", path, "--header-backup-file", by).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !bytes.Equal(header, readAll(t, by)) {
		t.Error("cryptsetup backs up something else")
	}
	if err := i.Verify(rightKey()); err != nil {
		t.Error(err)
	}
	scribble(t, path, 5000, []byte{0xff})
	if _, _, err := ReadHeader(path); !errors.As(err, new(*HeaderError)) {
		t.Errorf("with a damaged copy: %v", err)
	}
}

func TestInspectHeaderWantsAllOfIt(t *testing.T) {
	path := volume(t)
	header, _, err := ReadHeader(path)
	if err != nil {
		t.Fatal(err)
	}
	flip := func(at int) []byte {
		b := bytes.Clone(header)
		b[at] ^= 1
		return b
	}
	for name, b := range map[string][]byte{
		"empty": nil, "cut in the key slots": header[:1<<20], "cut in the copies": header[:20<<10], "longer": append(bytes.Clone(header), 0),
		"primary damaged": flip(5000), "secondary damaged": flip(5000 + 16<<10),
	} {
		if _, err := InspectHeader(name, b, imageSize); !errors.As(err, new(*HeaderError)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	i, err := InspectHeader("a damaged key slot", flip(40<<10), imageSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Verify(rightKey()); !errors.As(err, new(*HeaderError)) {
		t.Errorf("a damaged key slot: %v", err)
	}
}

func TestRestoreHeader(t *testing.T) {
	path := volume(t)
	scribble(t, path, DataOffset, []byte("data"))
	whole := readAll(t, path)
	header, _, err := ReadHeader(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(){
		"gone":             func() { scribble(t, path, 0, make([]byte, len(header))) },
		"noise":            func() { scribble(t, path, 0, bytes.Repeat([]byte{0xa5}, len(header))) },
		"without slots":    func() { scribble(t, path, KeyslotsOffset, make([]byte, 1<<20)) },
		"sound":            func() {},
		"another sequence": func() { _ = lukstest.Attacks()[0].Do(path) },
	} {
		spoil()
		var parts []Part
		err := RestoreHeader(path, header, rightKey(), func(p Part) {
			parts = append(parts, p)
			i, err := Inspect(path)
			if err != nil {
				t.Fatal(err)
			}
			switch p {
			case PartTorn, PartKeyslots:
				if i.Kind != KindTorn {
					t.Errorf("%s, %s: %s", name, p, i.Kind)
				}
			case PartSecondary:
				if err := i.Verify(rightKey()); err != nil || !i.PrimaryDamaged {
					t.Errorf("%s, %s: %v", name, p, err)
				}
			}
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(readAll(t, path), whole) {
			t.Errorf("%s: the image is not as it was", name)
		}
		if !slices.Equal(parts, []Part{PartTorn, PartKeyslots, PartSecondary, PartPrimary}) {
			t.Errorf("%s: parts %q", name, parts)
		}
	}
}

// What does not prove itself is not written.
func TestRestoreHeaderProvesBeforeItWrites(t *testing.T) {
	path := volume(t)
	header, _, err := ReadHeader(path)
	if err != nil {
		t.Fatal(err)
	}
	before := readAll(t, path)
	slot := bytes.Clone(header)
	slot[40<<10] ^= 1
	if err := RestoreHeader(path, slot, rightKey(), nil); !errors.As(err, new(*HeaderError)) {
		t.Errorf("a damaged slot: %v", err)
	}
	if err := RestoreHeader(path, header, keyOf(7), nil); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another key: %v", err)
	}
	for _, a := range lukstest.Attacks() {
		attacked := filepath.Join(t.TempDir(), "attacked")
		if err := makeImage(attacked, header, imageSize); err != nil {
			t.Fatal(err)
		}
		if err := a.Do(attacked); err != nil {
			t.Fatal(err)
		}
		b := readAll(t, attacked)[:len(header)]
		if a.Reason == "" && !a.MAC {
			continue
		}
		if err := RestoreHeader(path, b, rightKey(), nil); !errors.As(err, new(*HeaderError)) {
			t.Errorf("%s: %v", a.Name, err)
		}
	}
	if !bytes.Equal(readAll(t, path), before) {
		t.Error("the image was written to")
	}
}

func TestWipe(t *testing.T) {
	path := volume(t)
	scribble(t, path, DataOffset, []byte("data"))
	header, _, err := ReadHeader(path)
	if err != nil {
		t.Fatal(err)
	}
	err = Wipe(path, func(p Part) {
		i, err := Inspect(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := i.Verify(rightKey()); err == nil {
			t.Errorf("after %s it opens", p)
		}
		if p == PartKeyslots && !bytes.Equal(readAll(t, path)[KeyslotsOffset:DataOffset], make([]byte, DataOffset-KeyslotsOffset)) {
			t.Error("key slots are left")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	b := readAll(t, path)
	if len(bytes.Trim(b[:DataOffset], "\x00")) != 0 || !bytes.HasPrefix(b[DataOffset:], []byte("data")) {
		t.Error("not all in front of the data is zero, or the data was written to")
	}
	// The header that was saved before still opens it: that is what the command warns of.
	if err := RestoreHeader(path, header, rightKey(), nil); err != nil {
		t.Error(err)
	}
}
