package keycache

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCheckDirWritesNothing(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "a", "state")
	if f, err := CheckDir(dir); err != nil || f.Exists || f.Free <= 0 {
		t.Errorf("one that is not there: %+v, %v", f, err)
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) != 0 {
		t.Errorf("it made %v (%v)", entries, err)
	}
	if _, err := OpenStore(dir); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := CheckDir(dir); err != nil || !f.Exists {
		t.Errorf("one that is there: %+v, %v", f, err)
	}
	if after, err := os.Stat(dir); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("it wrote to the directory (%v)", err)
	}
}

// TestCheckDirRefusesWhatOpenStoreRefuses, so that a preflight that is green means something.
func TestCheckDirRefusesWhatOpenStoreRefuses(t *testing.T) {
	for name, spoil := range map[string]func(dir string) error{
		"open to others":        func(dir string) error { return os.Chmod(dir, 0o755) },
		"a folder open to all":  func(dir string) error { return os.Chmod(filepath.Join(dir, quarantineDir), 0o777) },
		"a folder is a file":    func(dir string) error { return putFile(filepath.Join(dir, archiveDir, volumesDir)) },
		"the directory, a file": putFile,
		"a link": func(dir string) error {
			return errors.Join(os.Rename(dir, dir+"-moved"), os.Symlink(dir+"-moved", dir))
		},
	} {
		dir := filepath.Join(t.TempDir(), "state")
		if _, err := OpenStore(dir); err != nil {
			t.Fatal(err)
		}
		if err := spoil(dir); err != nil {
			t.Fatal(err)
		}
		_, opened := OpenStore(dir)
		_, checked := CheckDir(dir)
		var e *StoreError
		if !errors.As(opened, &e) || !errors.As(checked, &e) {
			t.Errorf("%s: OpenStore says %v, CheckDir says %v", name, opened, checked)
		}
	}
}

// putFile puts a file where a directory is.
func putFile(dir string) error {
	return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
}

func TestCheckDirOnAReadOnlyDisk(t *testing.T) {
	_, err := CheckDir("/proc/sys/state")
	var e *StoreError
	if !errors.As(err, &e) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in /proc: %v", err)
	}
	if os.Geteuid() == 0 {
		return // nothing is forbidden to root
	}
	if _, err := CheckDir("/state"); !errors.Is(err, unix.EACCES) {
		t.Error(err)
	}
}
