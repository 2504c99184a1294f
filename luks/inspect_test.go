package luks

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

func TestKinds(t *testing.T) {
	t.Parallel()

	damage := func(offsets ...int64) func(t *testing.T) string {
		return func(t *testing.T) string {
			path := volume(t)
			for _, at := range offsets {
				flip(t, path, at)
			}
			return path
		}
	}
	small := func(b string) func(t *testing.T) string {
		return func(t *testing.T) string {
			path := filepath.Join(t.TempDir(), "small")
			if err := makeImage(path, []byte(b), int64(len(b))); err != nil {
				t.Fatal(err)
			}
			return path
		}
	}
	only := func(at int64, text string) func(t *testing.T) string {
		return func(t *testing.T) string {
			path := blank(t, imageSize)
			write(t, path, at, []byte(text))
			return path
		}
	}
	for _, c := range []struct {
		name string
		make func(t *testing.T) string
		kind Kind
	}{
		{"zeros", func(t *testing.T) string { return blank(t, imageSize) }, KindNone},
		{"empty file", small(""), KindNone},
		{"three bytes", small("LUK"), KindNone},
		{"a text", small(strings.Repeat("LUKS ", 5000)), KindNone},
		{"ext4", func(t *testing.T) string {
			path := blank(t, imageSize)
			mustRun(t, nil, "mkfs.ext4", "-q", path)
			return path
		}, KindNone},
		{"the magic alone", small(magicPrimary), KindTorn},
		{"the magic and a version", small(magicPrimary + "\x00\x01"), KindTorn},
		{"version 3", small(magicPrimary + "\x00\x03" + strings.Repeat("x", 8000)), KindTorn},
		{"a device that ends in the header", small(magicPrimary + "\x00\x02" + strings.Repeat("\x00", 6) + "\x40\x00" + strings.Repeat("\x00", 8000)), KindTorn},
		{"both copies flipped", damage(primaryAt+5000, secondaryAt+5000), KindTorn},
		{"both JSON ends flipped", damage(primaryAt+0x3fff, secondaryAt+0x3fff), KindTorn},
		{"both labels flipped", damage(primaryAt+offLabel, secondaryAt+offLabel), KindTorn},
		{"primary wiped, secondary flipped", func(t *testing.T) string {
			path := volume(t)
			write(t, path, 0, make([]byte, 0x4000))
			flip(t, path, secondaryAt+100)
			return path
		}, KindTorn},
		{"both wiped", func(t *testing.T) string {
			path := volume(t)
			write(t, path, 0, make([]byte, 0x8000))
			return path
		}, KindNone},
		// What a cut leaves of the text alone is torn; text of anybody else is none, so that it is never taken for ours.
		{"the text alone", only(binarySize, `{"keyslots":{"0":`), KindTorn},
		{"the text's second sector alone", only(secondaryAt+binarySize+512, `"size":"dynamic"}`), KindTorn},
		{"the text's first bytes alone", only(binarySize, `{"k`), KindTorn},
		{"the text at another place", only(0, `{"keyslots":{"0":`), KindNone},
		{"the text in the second header", only(secondaryAt+512, `{"keyslots":{"0":`), KindNone},
		{"another text", only(binarySize, `{"segments":{"0":`), KindNone},
		{"a text with spaces", only(binarySize+512, `some words`), KindNone},
		{"a text with lines", only(binarySize+512, "a\nb"), KindNone},
		{"bytes", only(binarySize+512, "\x80\xff"), KindNone},
		{"two texts in a sector", only(binarySize+512, "a\x00b"), KindNone},
		{"LUKS1", func(t *testing.T) string {
			path := blank(t, imageSize)
			mustRun(t, rightKey().Passphrase(), "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000",
				"--uuid", testUUID, "--key-file=-", path)
			return path
		}, KindLUKS1},
		{"no keyslots", func(t *testing.T) string {
			path := volume(t)
			edit(t, path, func(m tree) { m["keyslots"], m["tokens"] = tree{}, tree{}; m.At("digests", "0")["keyslots"] = []any{} })
			return path
		}, KindEmpty},
		{"no keyslots, primary damaged", func(t *testing.T) string {
			path := volume(t)
			edit(t, path, func(m tree) { m["keyslots"] = tree{} })
			flip(t, path, 5000)
			return path
		}, KindEmpty},
		{"no keyslots, primary damaged, three secondaries", func(t *testing.T) string {
			path := volume(t)
			edit(t, path, func(m tree) { m["keyslots"] = tree{} })
			text := lukstest.Text(read(t, path, secondaryAt, 0x4000))
			flip(t, path, 5000)
			for _, place := range headerSizes[1:3] {
				write(t, path, place, lukstest.New(int(place), int(place), testUUID, text))
			}
			return path
		}, KindLUKS2},
		// Somebody erased the slots of a volume that held data, and a cut came between.
		{"no keyslots in the newer copy only", func(t *testing.T) string {
			path := volume(t)
			old := read(t, path, secondaryAt, 0x4000)
			edit(t, path, func(m tree) { m["keyslots"] = tree{} })
			rewrite(t, path, primaryAt, func(b []byte) { setSeqID(b, 100) })
			write(t, path, secondaryAt, old)
			return path
		}, KindLUKS2},
		// "No keyslots" has to be said plainly: a header that only cannot be understood is not empty.
		{"keyslots missing", func(t *testing.T) string {
			path := volume(t)
			edit(t, path, func(m tree) { delete(m, "keyslots") })
			return path
		}, KindLUKS2},
		{"no keyslots, and a null", func(t *testing.T) string {
			path := volume(t)
			edit(t, path, func(m tree) { m["keyslots"], m.At("segments", "0")["integrity"] = tree{}, nil })
			return path
		}, KindLUKS2},
		{"keyslots a list", func(t *testing.T) string {
			path := volume(t)
			edit(t, path, func(m tree) { m["keyslots"] = []any{} })
			return path
		}, KindLUKS2},
		{"keyslots twice", func(t *testing.T) string {
			path := volume(t)
			editText(t, path, func(s string) string { return s[:len(s)-1] + `,"keyslots":{}}` })
			return path
		}, KindLUKS2},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := c.make(t)
			before := content(t, path)
			i := inspected(t, path)
			if i.Kind != c.kind || i.Pass() {
				t.Errorf("kind %s, pass %v, reasons %q", i.Kind, i.Pass(), i.Reasons)
			}
			if (i.Kind == KindNone) != (len(i.Reasons) == 0) {
				t.Errorf("%s with reasons %q", i.Kind, i.Reasons)
			}
			if (i.Header != nil) != (c.kind == KindLUKS1 || c.kind == KindLUKS2 || c.kind == KindEmpty) {
				t.Errorf("%s with header %+v", i.Kind, i.Header)
			}
			if c.kind == KindLUKS1 && (i.Header.UUID != testUUID || i.Header.Version != 1 || i.Header.Cipher != "aes-xts-plain64" || i.Header.KeySize == 0) {
				t.Errorf("%+v", i.Header)
			}
			reasons(t, i.Verify(rightKey()))
			if !bytes.Equal(before, content(t, path)) {
				t.Error("the image was changed")
			}
		})
	}
}

func TestTwoCopies(t *testing.T) {
	t.Parallel()

	older := func(t *testing.T, path string, at int64) {
		rewrite(t, path, at, func(b []byte) { setSeqID(b, 1) })
	}
	for _, c := range []struct {
		name               string
		change             func(t *testing.T, path string)
		want               string // in a reason; "" passes
		primary, secondary bool   // damaged
	}{
		{"secondary flipped", func(t *testing.T, p string) { flip(t, p, secondaryAt+5000) }, "", false, true},
		{"secondary without magic", func(t *testing.T, p string) { flip(t, p, secondaryAt) }, "", false, true},
		{"secondary wiped", func(t *testing.T, p string) { write(t, p, secondaryAt, make([]byte, 0x4000)) }, "", false, true},
		{"secondary of another size", func(t *testing.T, p string) {
			b := read(t, p, secondaryAt, 0x8000) // with what now would be its JSON area: keyslots
			b[offSize+6] = 0x80
			lukstest.Seal(b)
			write(t, p, secondaryAt, b)
		}, "", false, true},
		{"secondary older", func(t *testing.T, p string) { older(t, p, secondaryAt) }, "", false, true},
		{"secondary newer", func(t *testing.T, p string) { older(t, p, primaryAt) }, "secondary header copy is newer", false, false},
		{"labels differ", func(t *testing.T, p string) {
			rewrite(t, p, secondaryAt, func(b []byte) { b[offLabel] ^= 1 })
		}, "copies differ", false, false},
		{"UUIDs differ", func(t *testing.T, p string) {
			rewrite(t, p, secondaryAt, func(b []byte) { b[offUUID] ^= 1 })
		}, "copies differ", false, false},
		{"subsystems differ", func(t *testing.T, p string) {
			rewrite(t, p, secondaryAt, func(b []byte) { b[offSubsystem] ^= 1 })
		}, "copies differ", false, false},
		{"JSONs differ", func(t *testing.T, p string) {
			rewrite(t, p, secondaryAt, func(b []byte) {
				lukstest.SetText(b, bytes.Replace(trimNUL(b[binarySize:]), []byte("us-east-1"), []byte("us-east-2"), 1))
			})
		}, "copies differ", false, false},
		{"secondary's JSON malformed", func(t *testing.T, p string) {
			rewrite(t, p, secondaryAt, func(b []byte) { b[len(b)-1] = 1 })
		}, "copies differ", false, false},
		{"primary flipped", func(t *testing.T, p string) { flip(t, p, 5000) }, "", true, false},
		{"primary's UUID flipped", func(t *testing.T, p string) { flip(t, p, offUUID) }, "", true, false},
		{"primary's size flipped", func(t *testing.T, p string) { flip(t, p, offSize+7) }, "", true, false},
		{"primary's head wiped", func(t *testing.T, p string) { write(t, p, 0, make([]byte, binarySize)) }, "", true, false},
		{"primary wiped", func(t *testing.T, p string) { write(t, p, 0, make([]byte, 0x4000)) }, "", true, false},
		{"primary overwritten", func(t *testing.T, p string) { write(t, p, 1024, []byte("x")); write(t, p, 0, make([]byte, 1024)) }, "not LUKS", false, false},
		{"primary swapped to", func(t *testing.T, p string) {
			write(t, p, 0, append(make([]byte, binarySize-10), "SWAPSPACE2"...))
		}, "not LUKS", false, false},
		{"primary flipped, secondary refused", func(t *testing.T, p string) {
			edit(t, p, func(m tree) { m["tokens"] = tree{} })
			flip(t, p, 5000)
		}, "primary header copy is damaged", false, false},
		{"primary flipped, several secondaries", func(t *testing.T, p string) {
			b := read(t, p, secondaryAt, 0x4000)
			big := make([]byte, 0x8000)
			copy(big, b)
			big[offSize+6], big[offOffset+6] = 0x80, 0x80
			lukstest.Seal(big)
			write(t, p, 0x8000, big)
			flip(t, p, 5000)
		}, "several secondary", false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := volume(t)
			c.change(t, path)
			i := inspected(t, path)
			if i.Kind != KindLUKS2 || !i.Ours || i.PrimaryDamaged != c.primary || i.SecondaryDamaged != c.secondary {
				t.Errorf("kind %s, ours %v, damaged %v %v", i.Kind, i.Ours, i.PrimaryDamaged, i.SecondaryDamaged)
			}
			if c.want == "" {
				if !i.Pass() || i.Header.UUID != testUUID {
					t.Errorf("reasons %q", i.Reasons)
				}
				if err := i.Verify(rightKey()); err != nil {
					t.Error(err)
				}
				return
			}
			if i.Pass() || !strings.Contains(strings.Join(i.Reasons, "\n"), c.want) {
				t.Errorf("pass %v, reasons %q", i.Pass(), i.Reasons)
			}
			reasons(t, i.Verify(rightKey()))
		})
	}
}

// brokenReader fails to read a part of a volume.
type brokenReader struct {
	io.ReaderAt
	from, to int64
}

func (r brokenReader) ReadAt(b []byte, at int64) (int, error) {
	if at < r.to && at+int64(len(b)) > r.from {
		return 0, syscall.EIO
	}
	return r.ReaderAt.ReadAt(b, at)
}

// A disk that cannot be read is never "no LUKS", and never "damaged": that would be mended, or formatted.
func TestReadErrors(t *testing.T) {
	good, err := template()
	if err != nil {
		t.Fatal(err)
	}
	wiped := bytes.Clone(good)
	clear(wiped[:0x4000])
	zeros := make([]byte, 8<<20)
	for _, c := range []struct {
		name string
		disk []byte
		from int64
		to   int64
	}{
		{"primary", good, 0, 512},
		{"primary's JSON", good, 8192, 8193},
		{"secondary", good, secondaryAt, secondaryAt + 512},
		{"keyslot", good, 40000, 40001},
		{"secondary after a wiped primary", wiped, secondaryAt, secondaryAt + 512},
		{"zeros, first place", zeros, 0, 1},
		{"zeros, last place", zeros, 0x400000, 0x400001},
		{"zeros, where a cut may leave text", zeros, binarySize + 512, binarySize + 513},
	} {
		r := brokenReader{bytes.NewReader(c.disk), c.from, c.to}
		if i, err := inspect(r, int64(imageSize)); !errors.Is(err, syscall.EIO) || i != nil {
			t.Errorf("%s: %v %+v", c.name, err, i)
		}
	}
	// A device that is shorter than it said.
	if i, err := inspect(bytes.NewReader(good[:100]), imageSize); !errors.Is(err, io.ErrUnexpectedEOF) || i != nil {
		t.Errorf("short: %v", err)
	}
}

func TestInspectRefusesOtherThings(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	socket, link, loop := filepath.Join(dir, "socket"), filepath.Join(dir, "link"), filepath.Join(dir, "loop")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := errors.Join(os.Symlink(fifo, link), os.Symlink(loop, loop)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for _, path := range []string{dir, fifo, socket, link, loop, "/dev/null", "/dev/zero", filepath.Join(dir, "none")} {
		i, err := Inspect(path)
		if err == nil || i != nil || strings.Count(err.Error(), path) != 1 {
			t.Errorf("%s: %v", path, err)
		}
	}
	// Links to devices are how people name them.
	good := filepath.Join(dir, "good")
	if err := os.Symlink(volume(t), good); err != nil {
		t.Fatal(err)
	}
	if i := inspected(t, good); !i.Pass() || i.Path != good {
		t.Errorf("through a link: %+v", i)
	}
	if _, err := Inspect(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if time.Since(begin) > 5*time.Second {
		t.Error("it waited")
	}
}

// FuzzInspect: whatever is on a disk, Inspect returns, and what passes can be unsealed without a panic. The input is the JSON
// text of both copies, or the disk itself.
func FuzzInspect(f *testing.F) {
	good, err := template()
	if err != nil {
		f.Fatal(err)
	}
	text := trimNUL(good[binarySize:0x4000])
	f.Add(text, true)
	f.Add([]byte(`{"keyslots":{},"tokens":{},"segments":{},"digests":{},"config":{}}`), true)
	f.Add([]byte(`{"keyslots":{"0":{}},"tokens":{"0":{"type":"luks-kms-agent"}},"segments":{"0":{}},"digests":{"0":{"segments":["0"]}},"config":{}}`), true)
	f.Add([]byte(`{"keyslots":null,"tokens":[],"segments":0,"digests":"","config":{"requirements":{}}}`), true)
	f.Add(bytes.Replace(text, []byte(`"iterations":1000`), []byte(`"iterations":4294967295`), 2), true)
	f.Add(bytes.Replace(text, []byte(`"dynamic"`), []byte(`"4096"`), 1), true)
	f.Add([]byte(strings.Repeat(`{"a":`, 2000)), true)
	f.Add([]byte{}, true)
	f.Add(good[:0x8000], false)
	f.Add(good[secondaryAt:0x8000], false)
	f.Add([]byte(magicPrimary+"\x00\x02"), false)
	f.Add([]byte(magicPrimary+"\x00\x01"+strings.Repeat("\xff", 300)), false)
	f.Fuzz(func(t *testing.T, input []byte, asText bool) {
		disk := input
		if asText {
			disk = bytes.Clone(good)
			for _, at := range []int{primaryAt, secondaryAt} {
				b := disk[at : at+0x4000]
				lukstest.SetText(b, input)
				lukstest.Seal(b)
			}
		}
		size := int64(imageSize)
		if !asText {
			size = int64(len(disk))
		}
		i := bounded(t, holes{disk, size})
		seenByCryptsetup(t, i, holes{disk, size})
		if i.Pass() != (i.Kind == KindLUKS2 && len(i.Reasons) == 0) {
			t.Errorf("pass %v with kind %s and reasons %q", i.Pass(), i.Kind, i.Reasons)
		}
		if i.Pass() && i.checked.token != nil && i.checked.slot.KDF.Iterations < 10000 && i.checked.digest.Iterations < 10000 {
			if err := i.Verify(rightKey()); err != nil && strings.Contains(err.Error(), "panicked") {
				t.Error(err)
			}
		}
	})
}

// holes is a disk of zeros that begins with some bytes.
type holes struct {
	head []byte
	size int64
}

func (h holes) ReadAt(b []byte, at int64) (int, error) {
	n := int(min(int64(len(b)), max(0, h.size-at)))
	clear(b[:n])
	if at < int64(len(h.head)) {
		copy(b[:n], h.head[at:])
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func BenchmarkInspect(b *testing.B) {
	path := volume(b)
	b.ReportAllocs()
	for b.Loop() {
		if i, err := Inspect(path); err != nil || !i.Pass() {
			b.Fatal(err, i)
		}
	}
}

func BenchmarkUnseal(b *testing.B) {
	i := inspected(b, volume(b))
	key := rightKey()
	b.ReportAllocs()
	for b.Loop() {
		if err := i.Verify(key); err != nil {
			b.Fatal(err)
		}
	}
}
