package luks

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// discard tells a block device that it may forget a range, in bytes.
func discard(f *os.File, start, length int64) error {
	of := [2]uint64{uint64(start), uint64(length)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&of))); errno != 0 {
		return errno
	}
	return nil
}
