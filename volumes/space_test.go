package volumes

import (
	"errors"
	"io/fs"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	space, err := Usage(dir)
	if err != nil {
		t.Fatal(err)
	}
	var want unix.Statfs_t
	if err := unix.Statfs(dir, &want); err != nil {
		t.Fatal(err)
	}
	if space.Total != int64(want.Blocks)*int64(want.Bsize) || space.Used < 0 || space.Used > space.Total {
		t.Errorf("got %+v of %+v", space, want)
	}
	if _, err := Usage(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
}
