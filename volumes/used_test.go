package volumes

import (
	"bytes"
	"os"
	"testing"
)

// TestEverMounted: what mkfs leaves was not mounted, and what a mount writes first is seen. That kernels do write it is tested in
// virtual machines.
func TestEverMounted(t *testing.T) {
	const uuid = "11111111-2222-4333-8444-555555555555"
	for _, test := range []struct {
		name, fstype string
		write        func(path string)
		want         bool
	}{
		{"fresh ext4", "ext4", func(string) {}, false},
		{"fresh xfs", "xfs", func(string) {}, false},
		{"ext4 with a time of a mount", "ext4", func(p string) { writeAt(t, p, 1024+44, 1) }, true},
		{"ext4 with a number of mounts", "ext4", func(p string) { writeAt(t, p, 1024+52, 1) }, true},
		{"xfs with a record behind the first", "xfs", func(p string) { writeAt(t, p, xfsLog(t, p)+1024, 0xfe, 0xed, 0xba, 0xbe, 0, 0, 0, 0) }, true},
		{"xfs with something far behind the first", "xfs", func(p string) { writeAt(t, p, xfsLog(t, p)+100<<10, 1) }, true},
		{"xfs whose log went round", "xfs", func(p string) { writeAt(t, p, xfsLog(t, p), 0xfe, 0xed, 0xba, 0xbe, 0, 0, 0, 2) }, true},
		{"xfs with another log", "xfs", func(p string) { writeAt(t, p, xfsLog(t, p), 9, 9) }, true},
		{"xfs whose mkfs was cut", "xfs", func(p string) { writeAt(t, p, xfsLog(t, p), 9, 9); writeAt(t, p, 126, 1) }, false},
		{"xfs whose log never reached the disk", "xfs", func(p string) { writeAt(t, p, xfsLog(t, p), make([]byte, 512<<10)...) }, false},
		{"swap", "swap", func(p string) { writeAt(t, p, 1<<20, 1) }, false},
		{"of a kind that is not known", "btrfs", func(string) {}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := image(t, 304*mib)
			made := test.fstype
			if made == "btrfs" {
				made = "ext4"
			}
			if err := MakeFilesystem(t.Context(), path, made, "", uuid); err != nil {
				t.Fatal(err)
			}
			test.write(path)
			got, err := EverMounted(path, test.fstype)
			if err != nil || got != test.want {
				t.Errorf("%v %v, want %v", got, err, test.want)
			}
		})
	}
	if _, err := EverMounted(t.TempDir()+"/none", "ext4"); err == nil {
		t.Error("what is not there was told")
	}
	// What cannot be read, or is no superblock of mkfs, is not unused.
	short, zeros, cut := image(t, 1000), image(t, mib), image(t, 304*mib)
	if err := MakeFilesystem(t.Context(), cut, "xfs", "", uuid); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(cut, 100*mib); err != nil { // its log is behind
		t.Fatal(err)
	}
	for name, test := range map[string][2]string{
		"a short ext4": {short, "ext4"}, "a short xfs": {image(t, 100), "xfs"}, "zeros as xfs": {zeros, "xfs"}, "xfs without its log": {cut, "xfs"},
	} {
		if got, err := EverMounted(test[0], test[1]); err == nil {
			t.Errorf("%s was told: %v", name, got)
		}
	}
}

// xfsLog finds the log of an xfs filesystem of 304 MiB by its first record: it is at the start of the third of four groups.
func xfsLog(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, mib)
	if _, err := f.ReadAt(b, 152*mib); err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(b, []byte{0xfe, 0xed, 0xba, 0xbe})
	if i < 0 {
		t.Fatal("there is no log")
	}
	return 152*mib + int64(i)
}
