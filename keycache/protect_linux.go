package keycache

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ProtectMemory keeps this process's memory out of swap, core dumps and the
// reach of other processes of the same user (ptrace, /proc/PID/mem). It is
// called once, before the first key.
//
// All three protections are tried; the error joins those that failed, each
// naming itself. mlockall needs CAP_IPC_LOCK or an RLIMIT_MEMLOCK above the
// whole address space (a Go program maps over 1 GB without using it), hence
// LimitMEMLOCK=infinity in the unit. MCL_ONFAULT locks pages as they are
// touched: without it the same program has 50 MB resident instead of 3.
func ProtectMemory() error {
	var errs []error
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		errs = append(errs, fmt.Errorf("cannot make the process undumpable: %w", err))
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		errs = append(errs, fmt.Errorf("cannot turn core dumps off: %w", err))
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		errs = append(errs, fmt.Errorf("cannot lock memory: %w", err))
	}
	return errors.Join(errs...)
}
