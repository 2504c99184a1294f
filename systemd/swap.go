package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/unit"
)

// SwapError is why a volume did not become swap, or is it still.
type SwapError struct {
	Device string
	Off    bool
	Result string // as that of a [MountError]
	Err    error  // never nil
}

func (e *SwapError) Error() string {
	if e.Off {
		return fmt.Sprintf("cannot take %s back from swap: %v", e.Device, e.Err)
	}
	return fmt.Sprintf("cannot use %s as swap: %v", e.Device, e.Err)
}

func (e *SwapError) Unwrap() error { return e.Err }

// StartSwap has systemd use a device as swap, and returns when it does, or ctx ends. It is a unit file for this boot: swapon(2) in a mount
// namespace of our own would leave a path in /proc/swaps that nobody can follow, and a swap unit cannot be transient. One that is used already is
// success. The error is a *SwapError.
func (m *Manager) StartSwap(ctx context.Context, device, description string) error {
	fail := func(result string, err error) error {
		return &SwapError{Device: device, Result: result, Err: err}
	}
	if err := checkPath(device); err != nil {
		return fail(resultInvalid, err)
	}
	name := swapName(device)
	u, err := m.load(ctx, name)
	if err != nil {
		return fail(requestResult(ctx), err)
	}
	if u.active == "active" {
		return nil
	}
	if u.load != "not-found" && u.fragment != m.swapFile(name) {
		return fail(resultUnit, fmt.Errorf("%s is already defined by %s", name, u.origin()))
	}
	text := fmt.Sprintf("# By luks-kms-agent, until the volume is locked.\n[Unit]\nDescription=%s\nDefaultDependencies=no\nBefore=%s %s\nConflicts=%s\n\n[Swap]\nWhat=%s\n",
		escape(oneLine(description)), target, umountTarget, umountTarget, escape(device))
	if err := os.WriteFile(m.swapFile(name), []byte(text), 0o644); err != nil {
		return fail(resultUnit, err)
	}
	if err := os.Chmod(m.swapFile(name), 0o644); err != nil { // whatever the umask
		return fail(resultUnit, err)
	}
	// systemd before 246 does not see new files, and no systemd those of a unit that it has in memory.
	if u, err := m.load(ctx, name); err != nil || u.load != "loaded" {
		if err = errors.Join(err, m.conn.ReloadContext(ctx)); err != nil {
			return fail(requestResult(ctx), err)
		}
	}
	done := make(chan string, 1)
	if _, err := m.conn.StartUnitContext(ctx, name, "fail", done); err != nil {
		return fail(requestResult(ctx), err)
	}
	if result, err := m.wait(ctx, name, done); err != nil {
		return fail(result, err)
	}
	return nil
}

// StopSwap takes a device back from swap and waits for it, or for ctx; what is in it goes into memory first. One that is no swap is success.
// The error is a *SwapError.
func (m *Manager) StopSwap(ctx context.Context, device string) error {
	fail := func(result string, err error) error {
		return &SwapError{Device: device, Off: true, Result: result, Err: err}
	}
	if err := checkPath(device); err != nil {
		return fail(resultInvalid, err)
	}
	name := swapName(device)
	u, err := m.load(ctx, name)
	if err != nil {
		return fail(requestResult(ctx), err)
	}
	if u.active != "inactive" && u.active != "failed" {
		done := make(chan string, 1)
		if _, err := m.conn.StopUnitContext(ctx, name, "replace", done); err != nil {
			return fail(requestResult(ctx), err)
		}
		if result, err := m.wait(ctx, name, done); err != nil {
			return fail(result, err)
		}
	}
	if err := os.Remove(m.swapFile(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fail(resultUnit, err)
	}
	return nil
}

func swapName(device string) string { return unit.UnitNamePathEscape(device) + ".swap" }

func (m *Manager) swapFile(name string) string { return filepath.Join(m.units, name) }
