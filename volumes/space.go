package volumes

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Space is how full a filesystem is, in bytes.
type Space struct{ Used, Total int64 }

// Usage asks a mounted filesystem how full it is. What is kept for root counts as free.
func Usage(mountPoint string) (Space, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(mountPoint, &fs); err != nil {
		return Space{}, fmt.Errorf("cannot ask how full %s is: %w", mountPoint, err)
	}
	return Space{Used: int64(fs.Blocks-fs.Bfree) * int64(fs.Frsize), Total: int64(fs.Blocks) * int64(fs.Frsize)}, nil
}
