package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"strings"
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
		{&agent.ConfigError{Path: "c", Err: fs.ErrPermission}, 2, false},
		{&agent.UnknownVolumeError{Name: "x"}, 2, false},
		{&agent.EMRError{Line: 1, Column: 1, Err: errors.New("x")}, 2, false},
		{kms(keycache.ReasonInvalid), 2, false},
		{refused(agent.RefusedContent), 3, false},
		{refused(agent.RefusedRecord), 3, false},
		{refused(agent.RefusedShared), 3, false},
		{&agent.EMRNothingError{Reason: "x"}, 3, false},
		{refused(agent.RefusedInUse), 3, false},
		{refused(agent.RefusedWiping), 3, false},
		{refused(agent.RefusedBackup), 3, false},
		{&keycache.BackupError{Path: "p", Err: errors.New("x")}, 3, false},
		{&keycache.BackupError{Path: "p", Err: syscall.ENOSPC}, 6, false},
		{&keycache.BackupError{Path: "p", Err: fs.ErrExist}, 6, false},
		{&agent.BackupPlaceError{Path: "p"}, 2, false},
		{fmt.Errorf("x: %w", agent.ErrInImage), 2, false},
		{fmt.Errorf("x: %w", agent.ErrUnsaved), 3, false},
		{fmt.Errorf("x: %w", agent.ErrNoFilesystem), 6, false},
		{&keycache.RecordError{Path: "p", Err: errors.New("x")}, 3, true},
		{kms(keycache.ReasonDenied), 4, false},
		{kms(keycache.ReasonNotFound), 4, false},
		{kms(keycache.ReasonAWSManaged), 4, false},
		{kms(keycache.ReasonAsymmetric), 4, false},
		{kms(keycache.ReasonKeyState), 4, false},
		{kms(keycache.ReasonWrongRegion), 4, false},
		{kms(keycache.ReasonCiphertext), 4, false},
		{kms(keycache.ReasonAnswer), 4, false},
		{fmt.Errorf("x: %w", keycache.ErrOtherKey), 4, false},
		{kms(keycache.ReasonUnavailable), 5, false},
		{kms(keycache.ReasonIMDS), 5, false},
		{kms(keycache.ReasonNoCredentials), 5, false},
		{kms(keycache.ReasonClock), 5, false},
		{fmt.Errorf("x: %w", keycache.ErrLocked), 5, false},
		{refused(agent.RefusedDevice), 6, false},
		{refused(agent.RefusedStripe), 6, false},
		{store(syscall.ENOSPC), 6, false},
		{store(syscall.EROFS), 6, false},
		{store(syscall.ENOTDIR), 6, false},
		{&systemd.MountError{What: "/dev/x", Where: "/mnt", Err: errors.New("x")}, 6, false},
		{fmt.Errorf("x: %w", volumes.ErrChanged), 6, true},
		{fmt.Errorf("x: %w", luks.ErrBusy), 6, false},
		{fmt.Errorf("x: %w", syscall.EIO), 6, true},
		{fmt.Errorf("x: %w", &exec.ExitError{}), 6, true},
		{&luks.HeaderError{Path: "/dev/x", Reasons: []string{"x"}}, 7, false},
		{luks.ErrWrongKey, 7, false},
		{refused(agent.RefusedHeader), 7, false},
		{luks.ErrNoCryptsetup, 8, false},
		{luks.ErrNoDMCrypt, 8, false},
		{luks.ErrNoCipher, 8, false},
		{fmt.Errorf("x: %w", agent.ErrOldSystemd), 8, false},
		{fmt.Errorf("x: %w", agent.ErrNoUnit), 8, false},
		{&unreadyError{failed: 2, code: exitHeader}, 7, true},
		{volumes.ErrNoProgram, 8, false},
		{fmt.Errorf("x: %w", volumes.ErrNotEmpty), 3, true},
		{systemd.ErrNoSystemd, 8, false},
		{&failedError{errs: []error{refused(agent.RefusedContent), kms(keycache.ReasonUnavailable)}}, 5, true},
		{&failedError{errs: []error{refused(agent.RefusedContent), refused(agent.RefusedHeader)}}, 7, true},
		{failures(nil), 0, true},
		{failures([]error{refused(agent.RefusedContent)}), 3, true},
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

// TestMostUrgentCodeWins: what passes by itself is tried again whatever else failed; of the rest, what needs a person most is told.
func TestMostUrgentCodeWins(t *testing.T) {
	kms := func(r keycache.Reason) error { return &keycache.Error{Op: "Decrypt", Reason: r, Err: errors.New("x")} }
	ordered := []error{
		kms(keycache.ReasonUnavailable), kms(keycache.ReasonDenied), &luks.HeaderError{}, luks.ErrNoCryptsetup, luks.ErrBusy,
		&agent.RefusedError{Refusal: agent.RefusedContent}, &usageError{errors.New("x")}, errors.New("x"),
	}
	for i, first := range ordered {
		for _, second := range ordered[i:] {
			if got, want := exitCode(failures([]error{second, first})), exitCode(first); got != want {
				t.Errorf("%v and %v: exit code %d, want %d", first, second, got, want)
			}
		}
	}
}

// TestOnlyForeignContentMayBeWiped: no remedy tells to wipe a disk that may be a volume.
func TestOnlyForeignContentMayBeWiped(t *testing.T) {
	for _, err := range []error{
		&agent.RefusedError{Refusal: agent.RefusedHeader}, &agent.RefusedError{Refusal: agent.RefusedRecord},
		&agent.RefusedError{Refusal: agent.RefusedShared}, &agent.RefusedError{Refusal: agent.RefusedDevice}, &agent.RefusedError{Refusal: agent.RefusedStripe},
		&luks.HeaderError{}, luks.ErrWrongKey, &keycache.RecordError{Err: errors.New("x")},
	} {
		if h := hint(err); strings.Contains(h, "wipefs") || strings.Contains(h, "zero") {
			t.Errorf("%T %+v: %q", err, err, h)
		}
	}
	if h := hint(&luks.HeaderError{}); !strings.Contains(h, "Do not use the volume") {
		t.Errorf("a header that is refused: %q", h)
	}
}

// TestRemediesOfWhatMayPass: each is for its own cause, and says that nobody has to start the service again.
func TestRemediesOfWhatMayPass(t *testing.T) {
	unavailable := func(code string, cause error) error {
		return &keycache.Error{Op: "Decrypt", Reason: keycache.ReasonUnavailable, Code: code, Err: cause}
	}
	for _, c := range []struct {
		err  error
		says string
	}{
		{unavailable("", errors.New("x")), "route, DNS and security groups"},
		{unavailable("", &net.DNSError{Err: "no such host"}), "cannot be resolved"},
		{unavailable("", &tls.CertificateVerificationError{Err: errors.New("x")}), "certificate"},
		{unavailable("ThrottlingException", errors.New("x")), "quota"},
		{unavailable("Throttling", errors.New("x")), "quota"},
		{unavailable("LimitExceededException", errors.New("x")), "quota"},
		{unavailable("RequestLimitExceeded", errors.New("x")), "quota"},
		{unavailable("TooManyRequestsException", errors.New("x")), "quota"},
		{unavailable("KMSInternalException", errors.New("x")), "AWS Health"},
		{unavailable("KeyUnavailableException", errors.New("x")), "custom key store"},
		{&keycache.Error{Reason: keycache.ReasonNoCredentials, Code: "HTTP404", Err: errors.New("x")}, "instance profile"},
		{&keycache.Error{Reason: keycache.ReasonNoCredentials, Code: "ExpiredTokenException", RequestID: "x", Err: errors.New("x")}, "does not accept the role's credentials"},
		{&keycache.Error{Reason: keycache.ReasonClock, Code: "RequestExpired", RequestID: "x", Err: errors.New("x")}, "clock"},
		{&keycache.Error{Reason: keycache.ReasonIMDS, Err: errors.New("x")}, "hop limit"},
	} {
		if got := hint(c.err); !strings.Contains(got, c.says) || !strings.HasSuffix(got, triesAgain) {
			t.Errorf("%v: %q, want %q in it and %q at its end", c.err, got, c.says, triesAgain)
		}
	}
}

// TestExitCodesAreDocumented: README.md says of each exit code what help and the man pages say.
func TestExitCodesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "## Exit codes\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var rows []string
	for _, line := range strings.Split(section, "\n") {
		if strings.HasPrefix(line, "| ") && !strings.HasPrefix(line, "| -") && line != "| | |" {
			rows = append(rows, line)
		}
	}
	if len(rows) != len(exitCodes) {
		t.Fatalf("README.md has %d exit codes, the program %d", len(rows), len(exitCodes))
	}
	for i, row := range rows {
		if want := fmt.Sprintf("| %d | %s |", exitCodes[i].code, exitCodes[i].meaning); row != want || exitCodes[i].code != i {
			t.Errorf("README.md says %s, want %s", row, want)
		}
	}
}
