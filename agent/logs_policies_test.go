package agent

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// logRole is log-role.json for this machine's key, and the permissions of S3 that it gives.
func (m *machine) logRole() (p *kmstest.Policy, ofS3 []string) {
	m.t.Helper()
	p = m.shippedPolicy(kmstest.RolePolicy, "log-role", "", shippedLogsKey, m.cfg.Logs.KMSKey, ":::my-logs", ":::"+logBucket)
	for permission := range escrowPermissions {
		on := "arn:aws:s3:::" + logBucket
		if permission != "ListBucket" {
			on += "/" + m.cfg.Logs.Prefix + "x"
		}
		if slices.ContainsFunc(p.Statements, func(s kmstest.Statement) bool {
			return slices.Contains(s.Action, "s3:"+permission) && slices.ContainsFunc(s.Resource, func(r string) bool {
				folder, all := strings.CutSuffix(r, "*")
				return r == on || all && strings.HasPrefix(on, folder)
			})
		}) {
			ofS3 = append(ofS3, permission)
		}
	}
	return p, ofS3
}

// TestLogsNeedWhatIsDocumented: docs/logs.md says what each command needs. It is tried with just that, with log-role.json, and with each part missing;
// then it says which, the spool keeps what was read, and all of it arrives once, when it may.
func TestLogsNeedWhatIsDocumented(t *testing.T) {
	verify := func(m *machine) error {
		objects, err := m.node().VerifyLogs(m.t.Context(), false)
		if err == nil && len(objects) != 1 {
			m.t.Errorf("verified %+v", objects)
		}
		for _, o := range objects {
			err = errors.Join(err, o.Err)
		}
		return err
	}
	archiving := func(m *machine) error {
		done, err := m.node().ArchiveLogs(m.t.Context())
		if err != nil && (done.Pieces != 0 || done.Waiting == 0 || done.Lost != nil) {
			m.t.Errorf("%+v", done)
		}
		return err
	}
	commands := map[string]func(*machine) error{"`logs archive`": archiving, "`logs verify`": verify}
	// What the message has, so that nobody has to guess. The answer to a HEAD has no text.
	says := map[string]string{
		"GenerateDataKey": "is not authorized to perform: kms:GenerateDataKey", "PutObject": "is not authorized to perform: s3:PutObject",
		"ListBucket": "is not authorized to perform: s3:ListBucket", "GetObject": "cannot read the properties of s3://" + logBucket + "/logs/",
	}
	enforce := func(m *machine, s *s3test.S3, role *kmstest.Policy, ofS3 []string) {
		m.kms.Enforce(&kmstest.Access{Role: []*kmstest.Policy{role}})
		for permission, ops := range escrowPermissions {
			if !slices.Contains(ofS3, permission) {
				s.Deny(ops...)
			}
		}
	}
	split := func(cell string) []string {
		if cell == "nothing" {
			return nil
		}
		return strings.Split(cell, ", ")
	}
	for _, row := range documented(t, "logs.md")[1:] {
		command := commands[row[0]]
		if command == nil {
			t.Errorf("the table has the command %s, which is not tried", row[0])
			continue
		}
		delete(commands, row[0])
		ofKMS, ofS3 := split(row[1]), split(row[2])
		try := func(name string, as func(*machine, *s3test.S3), missing string) {
			t.Run(strings.Trim(row[0], "`")+" "+name, func(t *testing.T) {
				m, s, dir := withLogs(t)
				appendTo(t, filepath.Join(dir, "a.log"), "1\n2\n")
				if row[0] == "`logs verify`" {
					if _, err := m.node().ArchiveLogs(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				as(m, s)
				err := command(m)
				var e *archive.Error
				switch denied := errors.As(err, &e) && (e.Reason == archive.ReasonDenied || e.Reason == archive.ReasonKMSDenied); {
				case missing == "" && err != nil:
					t.Error(err)
				case missing != "" && (!denied || !strings.Contains(err.Error(), says[missing])):
					t.Errorf("%v, want %q", err, says[missing])
				}
				for _, c := range m.kms.Calls() {
					if c.KeyID == m.cfg.Logs.KMSKey && c.Op != "GenerateDataKey" {
						t.Errorf("KMS was asked for %s", c.Op)
					}
				}
				s.Heal()
				m.kms.Enforce(nil)
				if done, err := m.node().ArchiveLogs(t.Context()); err != nil || done.Waiting != 0 {
					t.Errorf("allowed again: %+v, %v", done, err)
				}
				if text := m.archived(s); text != "1\n2\n" || len(s.Keys(logBucket)) != 1 {
					t.Errorf("there is %q in %v", text, s.Keys(logBucket))
				}
			})
		}
		only := func(ofKMS, ofS3 []string) func(*machine, *s3test.S3) {
			return func(m *machine, s *s3test.S3) {
				enforce(m, s, onlyAllows(m.t, map[string][]string{m.cfg.Logs.KMSKey: ofKMS}), ofS3)
			}
		}
		try("with just that", only(ofKMS, ofS3), "")
		try("with log-role.json", func(m *machine, s *s3test.S3) {
			role, ofS3 := m.logRole()
			enforce(m, s, role, ofS3)
		}, "")
		for i, missing := range ofKMS {
			try("without "+missing, only(slices.Delete(slices.Clone(ofKMS), i, i+1), ofS3), missing)
		}
		for i, missing := range ofS3 {
			try("without "+missing, only(ofKMS, slices.Delete(slices.Clone(ofS3), i, i+1)), missing)
		}
		if len(ofKMS) > 0 {
			try("without anything", only(nil, nil), "PutObject")
		}
	}
	for command := range commands {
		t.Errorf("the table does not have %s", command)
	}
}
