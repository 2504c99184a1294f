package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
)

// someChecks are one of each result.
func someChecks() []agent.Check {
	denied := &keycache.Error{Op: "GenerateDataKey", Reason: keycache.ReasonDenied, Err: errors.New("AccessDeniedException: not allowed")}
	return []agent.Check{
		{Name: "configuration", Result: agent.CheckOK, Detail: "/etc/luks-kms-agent/config.yaml, mode 0600, key arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"},
		{Name: "KMS key", Result: agent.CheckWarning, Detail: agent.ErrMayNotDescribe.Error(), Err: agent.ErrMayNotDescribe},
		{Name: "data key", Result: agent.CheckFailure, Detail: denied.Error(), Err: denied},
		{Name: "service", Result: agent.CheckSkipped, Detail: "depends on systemd"},
	}
}

func TestPreflightIsReadable(t *testing.T) {
	for width, want := range map[int]string{
		0: `
ok       configuration  /etc/luks-kms-agent/config.yaml, mode 0600, key arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab
warning  KMS key        the role may not call DescribeKey: the key's kind and state are not known
                        -> Optional: allow kms:DescribeKey on the key to the node's role; then a wrong key is named before it is used.
failure  data key       cannot generate a data key under: AccessDeniedException: not allowed
                        -> Allow kms:GenerateDataKey on the key to the node's role, in its IAM policy and in the key policy (README, "Policies").
skipped  service        depends on systemd
1 ok, 1 warning, 1 failure, 1 skipped
`,
		80: `
ok       configuration  /etc/luks-kms-agent/config.yaml, mode 0600, key
                        arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab
warning  KMS key        the role may not call DescribeKey: the key's kind and
                        state are not known
                        -> Optional: allow kms:DescribeKey on the key to the
                           node's role; then a wrong key is named before it is
                           used.
failure  data key       cannot generate a data key under: AccessDeniedException:
                        not allowed
                        -> Allow kms:GenerateDataKey on the key to the node's
                           role, in its IAM policy and in the key policy
                           (README, "Policies").
skipped  service        depends on systemd
1 ok, 1 warning, 1 failure, 1 skipped
`,
		120: `
ok       configuration  /etc/luks-kms-agent/config.yaml, mode 0600, key
                        arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab
warning  KMS key        the role may not call DescribeKey: the key's kind and state are not known
                        -> Optional: allow kms:DescribeKey on the key to the node's role; then a wrong key is named
                           before it is used.
failure  data key       cannot generate a data key under: AccessDeniedException: not allowed
                        -> Allow kms:GenerateDataKey on the key to the node's role, in its IAM policy and in the key
                           policy (README, "Policies").
skipped  service        depends on systemd
1 ok, 1 warning, 1 failure, 1 skipped
`,
	} {
		var out strings.Builder
		if err := printPreflight(&out, someChecks(), width); err != nil {
			t.Fatal(err)
		}
		if got := "\n" + out.String(); got != want {
			t.Errorf("%d columns:\n%s\nwant\n%s", width, got, want)
		}
	}
}

func TestPreflightExitCode(t *testing.T) {
	fails := func(err error) agent.Check { return agent.Check{Result: agent.CheckFailure, Err: err} }
	warns := agent.Check{Result: agent.CheckWarning, Err: agent.ErrNotEnabled}
	kms := func(r keycache.Reason) error { return &keycache.Error{Op: "Decrypt", Reason: r, Err: errors.New("x")} }
	for _, tc := range []struct {
		made []agent.Check
		code int
	}{
		{[]agent.Check{{Result: agent.CheckOK}, {Result: agent.CheckSkipped}, warns}, exitOK},
		{[]agent.Check{warns, fails(&agent.ConfigError{Path: "c", Err: errors.New("x")})}, exitUsage},
		{[]agent.Check{fails(kms(keycache.ReasonDenied)), warns}, exitKMSDenied},
		{[]agent.Check{fails(fmt.Errorf("x: %w", agent.ErrNoUnit)), fails(kms(keycache.ReasonDenied))}, exitKMSDenied},
		{[]agent.Check{fails(kms(keycache.ReasonClock)), fails(luks.ErrNoCipher)}, exitUnavailable},
		{[]agent.Check{fails(luks.ErrNoCipher)}, exitMissing},
	} {
		if got := exitCode(unready(tc.made)); got != tc.code {
			t.Errorf("%+v: exit code %d, want %d", tc.made, got, tc.code)
		}
		report := newPreflightJSON(tc.made)
		if report.Ready != (tc.code == exitOK) || report.ExitCode != tc.code || len(report.Checks) != len(tc.made) {
			t.Errorf("%+v as JSON is %+v", tc.made, report)
		}
	}
}

func TestEveryFindingHasARemedy(t *testing.T) {
	for _, err := range []error{
		agent.ErrOtherRegion, agent.ErrClockOff, agent.ErrMayNotDescribe, agent.ErrNoReplace, agent.ErrNotOnBoot, agent.ErrOldSystemd,
		agent.ErrNoUnit, agent.ErrNotEnabled, agent.ErrNotReloaded, agent.ErrCloudInit, agent.ErrUnprotected,
	} {
		if remedy(agent.Check{Err: fmt.Errorf("x: %w", err)}) == "" {
			t.Errorf("%v names no remedy", err)
		}
	}
}

func TestPreflightJSON(t *testing.T) {
	data, err := json.Marshal(newPreflightJSON(someChecks()[1:]))
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"version":1,"ready":false,"exit_code":4,"checks":[` +
		`{"name":"KMS key","result":"warning","detail":"the role may not call DescribeKey: the key's kind and state are not known",` +
		`"remedy":"Optional: allow kms:DescribeKey on the key to the node's role; then a wrong key is named before it is used."},` +
		`{"name":"data key","result":"failure","detail":"cannot generate a data key under: AccessDeniedException: not allowed",` +
		`"remedy":"Allow kms:GenerateDataKey on the key to the node's role, in its IAM policy and in the key policy (README, \"Policies\").","exit_code":4},` +
		`{"name":"service","result":"skipped","detail":"depends on systemd"}]}`
	if string(data) != want {
		t.Errorf("got\n%s\nwant\n%s", data, want)
	}
}

// TestDeniedPermissionIsNamed with the key that it is missing on.
func TestDeniedPermissionIsNamed(t *testing.T) {
	for op, want := range map[string]string{
		"Decrypt":   "Allow kms:Decrypt on the key to",
		"ReEncrypt": "kms:ReEncryptTo on the new one",
	} {
		if got := hint(&keycache.Error{Op: op, Reason: keycache.ReasonDenied, Err: errors.New("x")}); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", op, got, want)
		}
	}
}
