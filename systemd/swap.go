package systemd

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Swap is a matter between the kernel and us: systemd reads /proc/swaps, makes a unit of what is there, and takes it down at
// shutdown (systemd.swap(5), "Implicit Dependencies": Conflicts=umount.target).

// StartSwap makes a device swap that is used. One that is already is success.
func StartSwap(device string) error {
	err := swapCall(unix.SYS_SWAPON, device)
	if errors.Is(err, unix.EBUSY) {
		if used, readErr := isSwap(device); readErr != nil || used {
			err = readErr
		}
	}
	if err != nil {
		return fmt.Errorf("cannot use %s as swap: %w", device, os.NewSyscallError("swapon", err))
	}
	return nil
}

// StopSwap takes a device back from swap; what is in it goes into memory first. One that is no swap is success.
func StopSwap(device string) error {
	if err := swapCall(unix.SYS_SWAPOFF, device); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("cannot take %s back from swap: %w", device, os.NewSyscallError("swapoff", err))
	}
	return nil
}

// isSwap tells whether a device is in /proc/swaps.
func isSwap(device string) (bool, error) {
	list, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(list)) {
		if path, _, _ := strings.Cut(line, " "); path != "" && sameDevice(path, device) {
			return true, nil
		}
	}
	return false, nil
}

// swapCall is swapon(2) without flags, or swapoff(2), which ignores them.
func swapCall(call uintptr, device string) error {
	path, err := unix.BytePtrFromString(device)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(call, uintptr(unsafe.Pointer(path)), 0, 0); errno != 0 {
		return errno
	}
	return nil
}
