package volumes

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const mib = 1 << 20

// image makes a sparse file.
func image(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func writeAt(t testing.TB, path string, offset int64, b ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(b, offset)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func run(t testing.TB, stdin, name string, args ...string) {
	t.Helper()
	cmd, err := program(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}

func luksFormat(t testing.TB, path string) {
	run(t, "pass", "cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2",
		"--pbkdf-force-iterations", "1000", "--key-file=-", path)
}

func TestProbe(t *testing.T) {
	const size = 64 * mib
	tests := []struct {
		name  string
		write func(path string)
		want  Content
	}{
		{"zeros", func(string) {}, Content{Blank: true}},
		{"ext4", func(p string) { run(t, "", "mke2fs", "-q", "-t", "ext4", "-L", "data", p) },
			Content{Type: "ext4", Detail: "ext4 filesystem (label data)"}},
		{"label with odd characters", func(p string) { run(t, "", "mke2fs", "-q", "-t", "ext4", "-L", "my\x1b data", p) },
			Content{Type: "ext4", Detail: `ext4 filesystem (label "my^[ data")`}},
		{"LUKS", func(p string) { luksFormat(t, p) },
			Content{Type: "crypto_LUKS", Detail: "crypto_LUKS encrypted volume"}},
		{"LUKS with its primary header torn", func(p string) { luksFormat(t, p); writeAt(t, p, 0, make([]byte, 4096)...) },
			Content{Type: "crypto_LUKS", Detail: "crypto_LUKS encrypted volume"}},
		{"swap", func(p string) { run(t, "", "mkswap", p) }, Content{Type: "swap", Detail: "swap signature"}},
		{"MBR", func(p string) { run(t, "label: dos\nsize=10M\n", "sfdisk", "-q", p) },
			Content{Type: "dos", Detail: "dos partition table"}},
		{"GPT", func(p string) { run(t, "label: gpt\nsize=10M\n", "sfdisk", "-q", p) },
			Content{Type: "gpt", Detail: "gpt partition table"}},
		{"two formats at once", func(p string) {
			run(t, "", "mke2fs", "-q", "-t", "ext4", p)
			run(t, "", "mkswap", p)
			writeAt(t, p, 1024+56, 0x53, 0xef) // mkswap wiped it
		}, Content{Detail: "signatures of more than one format"}},
		{"last byte", func(p string) { writeAt(t, p, size-1, 0x4f) }, Content{Detail: "byte 0x4f at offset 67108863 is not zero", NoiseFrom: size - 1, Noise: true}},
		{"first byte of the last 16 MiB", func(p string) { writeAt(t, p, 48*mib, 1) }, Content{Detail: "byte 0x01 at offset 50331648 is not zero", NoiseFrom: 48 * mib, Noise: true}},
		{"last byte of the first 16 MiB", func(p string) { writeAt(t, p, 16*mib-1, 255) }, Content{Detail: "byte 0xff at offset 16777215 is not zero", NoiseFrom: 16*mib - 1, Noise: true}},
		{"both ends", func(p string) { writeAt(t, p, 5, 7); writeAt(t, p, size-1, 7) }, Content{Detail: "byte 0x07 at offset 5 is not zero", NoiseFrom: 5, Noise: true}},
		{"first byte", func(p string) { writeAt(t, p, 0, 7) }, Content{Detail: "byte 0x07 at offset 0 is not zero", Noise: true}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := image(t, size)
			test.write(path)
			got, err := Probe(t.Context(), path, size)
			got.UUID = "" // a new one every time
			if err != nil || got != test.want {
				t.Errorf("content %+v, %v, want %+v", got, err, test.want)
			}
		})
	}
}

// What blkid has no name for is not blank: noise, and what remains of a LUKS volume without either header.
func TestProbeRemains(t *testing.T) {
	noise := image(t, 64*mib)
	b := make([]byte, mib)
	rand.NewChaCha8([32]byte{1}).Read(b)
	writeAt(t, noise, 20000, b...)

	luks := image(t, 64*mib)
	luksFormat(t, luks)
	writeAt(t, luks, 0, make([]byte, 32768)...) // both headers; the key slots stay

	for _, path := range []string{noise, luks} {
		got, err := Probe(t.Context(), path, 0)
		if err != nil || got.Blank || got.Type != "" || !strings.HasSuffix(got.Detail, "is not zero") {
			t.Errorf("Probe: %+v, %v", got, err)
		}
		if got, err := Filesystem(t.Context(), path); err != nil || got != (Content{Blank: true}) {
			t.Errorf("Filesystem: %+v, %v", got, err)
		}
	}
}

func TestProbeSmall(t *testing.T) {
	for _, size := range []int64{1, 4096, mib + 1, 20 * mib, 32*mib + 1} {
		path := image(t, size)
		if got, err := Probe(t.Context(), path, 0); err != nil || !got.Blank {
			t.Errorf("%d bytes: %+v, %v", size, got, err)
		}
		writeAt(t, path, size-1, 9)
		if got, err := Probe(t.Context(), path, 0); err != nil || got.Blank {
			t.Errorf("%d bytes, the last not zero: %+v, %v", size, got, err)
		}
	}
}

// An error is never "blank". blkid itself exits with 2, "nothing found", for most of these.
func TestProbeErrors(t *testing.T) {
	blank := image(t, 4*mib)
	for name, test := range map[string]struct {
		path string
		size int64
	}{
		"absent": {blank + "x", 0}, "directory": {filepath.Dir(blank), 0}, "empty": {image(t, 0), 0},
		"grown": {blank, 3 * mib}, "shrunk": {blank, 5 * mib}, "not a disk": {"/dev/null", 0},
	} {
		for _, probe := range []func() (Content, error){
			func() (Content, error) { return Probe(t.Context(), test.path, test.size) },
			func() (Content, error) { return probe(t.Context(), test.path, test.size, readable) },
		} {
			if got, err := probe(); err == nil || got != (Content{}) {
				t.Errorf("%s: %+v, %v", name, got, err)
			}
		}
	}
	if _, err := Probe(t.Context(), blank, 3*mib); !errors.Is(err, ErrChanged) {
		t.Errorf("wrong size: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got, err := Probe(ctx, blank, 0); !errors.Is(err, context.Canceled) || got.Blank {
		t.Errorf("cancelled: %+v, %v", got, err)
	}
}

// fakeProgram puts a shell script in the place of a program.
func fakeProgram(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestBlkidExitCodes(t *testing.T) {
	ext4 := image(t, 8*mib)
	run(t, "", "mke2fs", "-q", "-t", "ext4", ext4)
	blank := image(t, 8*mib)
	for _, test := range []struct {
		script, path string
		want         Content
		fails        bool
	}{
		{"exit 2", blank, Content{Blank: true}, false},
		{"exit 8", blank, Content{Detail: "signatures of more than one format"}, false},
		{"echo DEVNAME=x; exit 0", blank, Content{Detail: "a signature that blkid does not name"}, false},
		{"exit 0", blank, Content{Detail: "a signature that blkid does not name"}, false},
		{"echo 'blkid: input/output error' >&2; exit 2", blank, Content{}, true},
		{"echo TYPE=x; exit 2", blank, Content{}, true},
		{"exit 4", blank, Content{}, true},
		{"exit 1", blank, Content{}, true},
		{"kill -9 $$", blank, Content{}, true},
		{"exit 2", ext4, Content{}, true}, // did not read it
	} {
		fakeProgram(t, "blkid", test.script)
		got, err := Filesystem(t.Context(), test.path)
		if got != test.want || (err != nil) != test.fails {
			t.Errorf("%q: %+v, %v", test.script, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: error of more than one line: %v", test.script, err)
		}
	}
	fakeProgram(t, "blkid", "exit 2")
	if got, err := Probe(t.Context(), ext4, 0); err != nil || got.Blank {
		t.Errorf("ext4 that blkid did not read: %+v, %v", got, err)
	}
	xfs := image(t, 8*mib)
	writeAt(t, xfs, 0, []byte("XFSB")...)
	if got, err := Filesystem(t.Context(), xfs); err == nil || got.Blank {
		t.Errorf("xfs that blkid did not read: %+v, %v", got, err)
	}
	// What blkid and mkfs could be led astray by.
	for _, name := range []string{"BLKID_FILE", "LIBBLKID_DEBUG", "MKE2FS_CONFIG"} {
		t.Setenv(name, "x")
	}
	fakeProgram(t, "blkid", `[ -z "$BLKID_FILE$LIBBLKID_DEBUG$MKE2FS_CONFIG" ] || exit 4; exit 2`)
	if got, err := Filesystem(t.Context(), blank); err != nil || !got.Blank {
		t.Errorf("blkid has our environment: %+v, %v", got, err)
	}
}

// TestUnreadableIsNotBlank: a disk that goes bad while blkid looks. blkid reads the start only, and says "nothing found".
func TestUnreadableIsNotBlank(t *testing.T) {
	for name, probe := range map[string]func(context.Context, string) (Content, error){
		"Probe":      func(ctx context.Context, path string) (Content, error) { return Probe(ctx, path, 64*mib) },
		"Filesystem": Filesystem,
	} {
		path := image(t, 64*mib)
		fakeProgram(t, "blkid", "truncate -s 20M "+path+"; exit 2")
		if got, err := probe(t.Context(), path); err == nil || got != (Content{}) {
			t.Errorf("%s of a disk whose end cannot be read: %+v, %v", name, got, err)
		}
	}
}

func TestMissingProgram(t *testing.T) {
	if _, err := program(t.Context(), "mkfs.none-such"); !errors.Is(err, ErrNoProgram) || !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("error %v", err)
	}
	t.Setenv("PATH", "/nonexistent")
	if _, err := program(t.Context(), "blkid"); err != nil {
		t.Errorf("blkid in sbin, which PATH lacks: %v", err)
	}
}

func TestCheckMakeFilesystem(t *testing.T) {
	for _, fstype := range []string{"xfs", "ext4"} {
		if err := CheckMakeFilesystem(fstype); err != nil {
			t.Error(err)
		}
	}
	if err := CheckMakeFilesystem("absent"); !errors.Is(err, ErrNoProgram) {
		t.Errorf("a program that is not there: %v", err)
	}
}

// TestZeroEnds: what blkid finds in noise, wherever it is, is gone, and what lies between stays.
func TestZeroEnds(t *testing.T) {
	for _, size := range []int64{3*mib + 512, 8 * mib, 24 * mib} {
		path := image(t, size)
		noise := make([]byte, size)
		rand.NewChaCha8([32]byte{5}).Read(noise)
		copy(noise[size-512:], "JM")
		writeAt(t, path, 0, noise...)
		if got, err := Filesystem(t.Context(), path); err != nil || got.Type != "jmicron_raid_member" {
			t.Fatalf("before: %+v, %v", got, err)
		}
		if err := ZeroEnds(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		clear(noise[:min(size, headLength)])
		clear(noise[max(0, size-tailLength):])
		if !bytes.Equal(b, noise) {
			t.Errorf("%d bytes: it is not both ends that were cleared", size)
		}
	}
	if err := ZeroEnds(t.Context(), "/dev/full"); err == nil {
		t.Error("a device that takes nothing was cleared")
	}
	if err := ZeroEnds(t.Context(), filepath.Join(t.TempDir(), "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
}

func TestMakeFilesystem(t *testing.T) {
	const uuid = "0f8fad5b-d9cb-469f-a165-70867728950e"
	swap := image(t, 64*mib)
	if err := MakeFilesystem(t.Context(), swap, "swap", "", uuid); err != nil {
		t.Fatal(err)
	}
	if got, err := Filesystem(t.Context(), swap); err != nil || got != (Content{Type: "swap", UUID: uuid, Detail: "swap signature"}) {
		t.Errorf("swap: %+v, %v", got, err)
	}
	for fstype, size := range map[string]int64{"ext4": 64 * mib, "xfs": 400 * mib} {
		path := image(t, size)
		if err := MakeFilesystem(t.Context(), path, fstype, "my data", uuid); err != nil {
			t.Fatal(err)
		}
		got, err := Filesystem(t.Context(), path)
		want := Content{Type: fstype, UUID: uuid, Detail: fstype + ` filesystem (label "my data")`}
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", fstype, got, err)
		}
		if path := image(t, size); MakeFilesystem(t.Context(), path, fstype, "", "") != nil {
			t.Errorf("%s without label and uuid failed", fstype)
		}
	}
}

func TestMakeFilesystemRefuses(t *testing.T) {
	const size = 64 * mib
	used := image(t, size)
	run(t, "", "mke2fs", "-q", "-t", "ext4", "-L", "precious", used)
	before, err := os.ReadFile(used)
	if err != nil {
		t.Fatal(err)
	}
	for _, fstype := range []string{"xfs", "ext4"} {
		if err := MakeFilesystem(t.Context(), used, fstype, "", ""); err == nil || !strings.Contains(err.Error(), "it is not empty: ext4 filesystem (label precious)") {
			t.Errorf("over ext4: %v", err)
		}
	}
	if after, err := os.ReadFile(used); err != nil || string(after) != string(before) {
		t.Errorf("a refused device was changed (%v)", err)
	}
	blank := image(t, size)
	for _, args := range [][3]string{
		{"btrfs", "", ""}, {"", "", ""}, {"xfs", "thirteen long", ""}, {"ext4", "seventeen letters", ""}, {"ext4", "", "not-a-uuid"}, {"xfs", "", "not-a-uuid"}, {"swap", "", "not-a-uuid"}, {"swap", "any", ""},
	} {
		if err := MakeFilesystem(t.Context(), blank, args[0], args[1], args[2]); err == nil {
			t.Errorf("%q succeeded", args)
		}
	}
	if got, err := Probe(t.Context(), blank, 0); err != nil || !got.Blank {
		t.Errorf("a refused device was changed: %+v, %v", got, err)
	}
	// blkid may err; mkfs.xfs looks for itself, and is not forced.
	swap := image(t, 400*mib)
	run(t, "", "mkswap", swap)
	system := os.Getenv("PATH")
	fakeProgram(t, "blkid", "exit 2")
	if err := MakeFilesystem(t.Context(), swap, "xfs", "", ""); err == nil || !strings.Contains(err.Error(), "mkfs.xfs: exit status 1") {
		t.Errorf("over swap that blkid did not find: %v", err)
	}
	t.Setenv("PATH", system)
	if got, err := Filesystem(t.Context(), swap); err != nil || got.Type != "swap" {
		t.Errorf("a refused device was changed: %+v, %v", got, err)
	}
	fakeProgram(t, "mkfs.xfs", "exit 0")
	if err := MakeFilesystem(t.Context(), blank, "xfs", "", ""); err == nil {
		t.Error("mkfs that makes nothing succeeded")
	}
	fakeProgram(t, "mkfs.xfs", "echo no space >&2; exit 1")
	if err := MakeFilesystem(t.Context(), blank, "xfs", "", ""); err == nil || !strings.HasSuffix(err.Error(), "mkfs.xfs: exit status 1: no space") {
		t.Errorf("failing mkfs: %v", err)
	}
}

func TestLeastSize(t *testing.T) {
	for _, fstype := range []string{"xfs", "ext4"} {
		if err := MakeFilesystem(t.Context(), image(t, LeastSize(fstype)), fstype, "", ""); err != nil {
			t.Error(err)
		}
	}
}

func BenchmarkProbe(b *testing.B) {
	path := image(b, 1<<30)
	b.SetBytes(2 * proofLength)
	for b.Loop() {
		if got, err := Probe(b.Context(), path, 0); err != nil || !got.Blank {
			b.Fatal(got, err)
		}
	}
}
