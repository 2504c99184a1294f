package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// resume makes a node of the copy of a booted guest: its clock stands still since the snapshot, its random numbers are those
// of every other copy, and it has no disks and files yet. Standard input gives it random bytes.
func resume(now string) error {
	nanoseconds, err := strconv.ParseInt(now, 10, 64)
	if err != nil {
		return err
	}
	clock := unix.NsecToTimeval(nanoseconds)
	if err := unix.Settimeofday(&clock); err != nil {
		return fmt.Errorf("cannot set the clock to %v: %w", time.Unix(0, nanoseconds), err)
	}
	seed, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	if err := reseed(seed); err != nil {
		return fmt.Errorf("cannot seed the kernel's random numbers: %w", err)
	}
	if err := setup(); err != nil {
		return err
	}
	// A boot comes to its logins long after udev has named the disks.
	return runProgram("udevadm", "settle")
}

func reseed(seed []byte) error {
	random, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer random.Close()
	// struct rand_pool_info: bits of entropy, bytes, the bytes.
	pool := binary.NativeEndian.AppendUint32(nil, uint32(8*len(seed)))
	pool = binary.NativeEndian.AppendUint32(pool, uint32(len(seed)))
	pool = append(pool, seed...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&pool[0]))); errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}
