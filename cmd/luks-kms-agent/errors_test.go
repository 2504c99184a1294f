package main

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

func TestExitCodesAndRemedies(t *testing.T) {
	kms := func(r keycache.Reason) error { return &keycache.Error{Op: "Decrypt", Reason: r, Err: errors.New("x")} }
	refused := func(r agent.Refusal) error { return &agent.RefusedError{Refusal: r, Device: "/dev/x", Reason: "x"} }
	store := func(errno syscall.Errno) error { return &keycache.StoreError{Path: "/var/lib/x", Err: errno} }
	for _, tc := range []struct {
		err    error
		want   int
		silent bool // there is no remedy to name, or each part has its own
	}{
		{nil, 0, true},
		{errors.New("x"), 1, true},
		{&usageError{errors.New("x")}, 2, false},
		{&agent.ConfigError{Path: "c", Err: errors.New("x")}, 2, false},
		{&agent.ConfigError{Path: "c", Err: fs.ErrNotExist}, 2, false},
		{&agent.UnknownVolumeError{Name: "x"}, 2, false},
		{kms(keycache.ReasonInvalid), 2, false},
		{refused(agent.RefusedContent), 3, false},
		{refused(agent.RefusedRecord), 3, false},
		{&keycache.RecordError{Path: "p", Err: errors.New("x")}, 3, true},
		{kms(keycache.ReasonDenied), 4, false},
		{kms(keycache.ReasonNotFound), 4, false},
		{kms(keycache.ReasonAWSManaged), 4, false},
		{kms(keycache.ReasonAsymmetric), 4, false},
		{kms(keycache.ReasonKeyState), 4, false},
		{kms(keycache.ReasonWrongRegion), 4, false},
		{kms(keycache.ReasonCiphertext), 4, false},
		{kms(keycache.ReasonUnavailable), 5, false},
		{kms(keycache.ReasonIMDS), 5, false},
		{kms(keycache.ReasonNoCredentials), 5, false},
		{fmt.Errorf("x: %w", keycache.ErrLocked), 5, false},
		{refused(agent.RefusedDevice), 6, false},
		{store(syscall.ENOSPC), 6, false},
		{store(syscall.EROFS), 6, false},
		{store(syscall.ENOTDIR), 6, false},
		{&systemd.MountError{What: "/dev/x", Where: "/mnt", Err: errors.New("x")}, 6, false},
		{fmt.Errorf("x: %w", volumes.ErrChanged), 6, true},
		{fmt.Errorf("x: %w", luks.ErrBusy), 6, false},
		{fmt.Errorf("x: %w", syscall.EIO), 6, true},
		{&luks.HeaderError{Path: "/dev/x", Reasons: []string{"x"}}, 7, false},
		{luks.ErrWrongKey, 7, false},
		{refused(agent.RefusedHeader), 7, false},
		{luks.ErrNoCryptsetup, 8, false},
		{luks.ErrNoDMCrypt, 8, false},
		{volumes.ErrNoProgram, 8, false},
		{systemd.ErrNoSystemd, 8, false},
		{&failedError{errs: []error{refused(agent.RefusedContent), kms(keycache.ReasonUnavailable)}}, 5, true},
		{&failedError{errs: []error{refused(agent.RefusedContent), refused(agent.RefusedHeader)}}, 7, true},
	} {
		if got := exitCode(tc.err); got != tc.want {
			t.Errorf("exit code of %v is %d, want %d", tc.err, got, tc.want)
		}
		if tc.err == nil || tc.silent {
			continue
		}
		if hint(tc.err) == "" {
			t.Errorf("%T %v names no remedy", tc.err, tc.err)
		}
	}
}
