package luks

import (
	"bytes"
	"strings"
	"testing"
)

func TestRestorePrimary(t *testing.T) {
	t.Parallel()

	for name, damage := range map[string]func(t *testing.T, path string){
		"flipped":    func(t *testing.T, path string) { flip(t, path, 5000) },
		"torn":       func(t *testing.T, path string) { write(t, path, 4096, make([]byte, 512)) },
		"head wiped": func(t *testing.T, path string) { write(t, path, 0, make([]byte, 4096)) },
		"wiped":      func(t *testing.T, path string) { write(t, path, 0, make([]byte, 0x4000)) },
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			sound := inspected(t, path)
			rest := content(t, path)[0x8000:]
			damage(t, path)
			if i := inspected(t, path); !i.Pass() || !i.PrimaryDamaged {
				t.Fatalf("%+v", i)
			}
			if err := RestorePrimary(t.Context(), path); err != nil {
				t.Fatal(err)
			}
			i := inspected(t, path)
			if !i.Pass() || i.PrimaryDamaged || i.SecondaryDamaged || i.Verify(rightKey()) != nil || sameHeader(sound, i) != nil {
				t.Errorf("%+v", i)
			}
			if !bytes.Equal(content(t, path)[0x8000:], rest) {
				t.Error("more than the header was written")
			}
		})
	}
}

// Where there is nothing to restore from, or something that would be lost, not a byte is written.
func TestRestorePrimaryRefuses(t *testing.T) {
	t.Parallel()

	for _, c := range []struct {
		name, want string
		change     func(t *testing.T, path string)
	}{
		{"the secondary is refused", "sector size 0", func(t *testing.T, path string) {
			edit(t, path, func(m tree) { m.At("segments", "0")["sector_size"] = 0 })
			flip(t, path, 5000)
		}},
		{"not ours", reasonNoToken, func(t *testing.T, path string) {
			edit(t, path, func(m tree) { m["tokens"] = tree{} })
			for _, at := range []int64{primaryAt, secondaryAt} {
				rewrite(t, path, at, func(b []byte) { clear(b[offSubsystem : offSubsystem+lenSubsystem]) })
			}
			flip(t, path, 5000)
		}},
		{"both damaged", "no usable LUKS2 header", func(t *testing.T, path string) {
			flip(t, path, 5000)
			flip(t, path, secondaryAt+5000)
		}},
		{"a swap area", "not LUKS", func(t *testing.T, path string) {
			secondary := read(t, path, secondaryAt, 0x4000)
			mustRun(t, nil, "mkswap", "-q", path)
			write(t, path, secondaryAt, secondary)
		}},
		{"a filesystem", "not LUKS", func(t *testing.T, path string) {
			secondary := read(t, path, secondaryAt, 0x4000)
			mustRun(t, nil, "mkfs.ext4", "-q", "-F", path)
			write(t, path, secondaryAt, secondary) // as if mkfs had left it
		}},
		{"the secondary is newer", "newer", func(t *testing.T, path string) {
			rewrite(t, path, primaryAt, func(b []byte) { setSeqID(b, 1) })
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := volume(t)
			c.change(t, path)
			before := content(t, path)
			if r := reasons(t, RestorePrimary(t.Context(), path)); !strings.Contains(r, c.want) {
				t.Error(r)
			}
			if !bytes.Equal(before, content(t, path)) {
				t.Error("the image was changed")
			}
		})
	}
}

func TestRestorePrimaryOfASoundVolume(t *testing.T) {
	path := volume(t)
	before := content(t, path)
	stub(t, "exit 1")
	if err := RestorePrimary(t.Context(), path); err != nil || !bytes.Equal(before, content(t, path)) {
		t.Error(err)
	}
}

// What cryptsetup did is looked at, not believed.
func TestRestorePrimaryChecksTheResult(t *testing.T) {
	other := volume(t)
	for _, at := range []int64{primaryAt, secondaryAt} {
		rewrite(t, other, at, func(b []byte) { copy(b[offLabel:], "mine") })
	}
	for name, c := range map[string]struct{ script, want string }{
		"nothing":        {"true", "still is damaged"},
		"another header": {`for p; do :; done; cat ` + other + ` > "$p"`, "another one"},
	} {
		path := volume(t)
		flip(t, path, 5000)
		stub(t, c.script)
		if r := reasons(t, RestorePrimary(t.Context(), path)); !strings.Contains(r, c.want) {
			t.Errorf("%s: %s", name, r)
		}
	}
}
