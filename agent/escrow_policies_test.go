package agent

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// escrowPermissions are the operations that a permission of S3's lets.
var escrowPermissions = map[string][]string{"PutObject": {"PutObject"}, "GetObject": {"GetObject", "HeadObject"}, "ListBucket": {"ListObjectsV2"}}

// docs/escrow.md says what each command needs. It is tried with just that, and with each part of it missing.
func TestEscrowNeedsWhatIsDocumented(t *testing.T) {
	for _, mode := range escrowModes {
		t.Run(string(mode), func(t *testing.T) {
			blank, s := withEscrow(t, mode)
			blank.disk(volumes.ClassEBS, "vol-1")
			locked := blank.copyTo(filepath.Join(t.TempDir(), "locked"))
			locked.runOK()
			escrowed := locked.copyTo(filepath.Join(t.TempDir(), "escrowed"))
			if _, err := escrowed.escrow(); err != nil {
				t.Fatal(err)
			}

			run := func(m *machine) error {
				m.cfg.Escrow.Required = true
				r, err := m.node().Run(t.Context())
				return errors.Join(append(r.Failures(), err)...)
			}
			fetch := func(m *machine, then func(file string) error) error {
				m.cfg.StateDir += "-lost"
				found, err := m.node().EscrowFor(t.Context(), nil)
				if err == nil && len(found) != 1 {
					t.Errorf("found %+v", found)
				}
				for _, o := range found {
					file := filepath.Join(t.TempDir(), "copy")
					if ferr := m.node().FetchEscrow(t.Context(), o.Name, file); ferr != nil {
						err = errors.Join(err, o.Err, ferr)
					} else {
						err = errors.Join(err, o.Err, then(file))
					}
				}
				return err
			}
			commands := map[string]struct {
				on *machine
				do func(*machine) error
			}{
				"`escrow put`":                     {locked, func(m *machine) error { _, err := m.escrow(); return err }},
				"`run` at first boot, `required`":  {blank, run},
				"`run` at later boots, `required`": {escrowed, run},
				"`escrow list`": {escrowed, func(m *machine) error {
					all, err := m.node().EscrowObjects(t.Context(), nil)
					for _, o := range all {
						err = errors.Join(err, o.Err)
					}
					return err
				}},
				"`escrow get`": {escrowed, func(m *machine) error { return fetch(m, func(string) error { return nil }) }},
				"`escrow verify`": {escrowed, func(m *machine) error {
					verified, err := m.node().VerifyEscrow(t.Context(), nil)
					for _, v := range verified {
						err = errors.Join(err, v.Err)
					}
					return err
				}},
				"`escrow restore`": {escrowed, func(m *machine) error {
					return fetch(m, func(file string) error { _, err := m.restore(file, ""); return err })
				}},
			}
			arns := []string{blank.kms.ARN(), blank.cfg.Escrow.KMSKey}
			tries := 0
			try := func(command string, kms map[string][]string, ofS3 []string) error {
				c := commands[command]
				m := c.on.copyTo(filepath.Join(t.TempDir(), "m"))
				if c.on != escrowed { // what an earlier try sent in this second has the same name
					tries++
					m.cfg.Escrow.Bucket = fmt.Sprintf("%s-%d", escrowBucket, tries)
					s.NewBucket(m.cfg.Escrow.Bucket, s3test.Bucket{})
				}
				m.kms.Enforce(&kmstest.Access{Role: []*kmstest.Policy{onlyAllows(t, kms)}})
				defer m.kms.Enforce(nil)
				for permission, ops := range escrowPermissions {
					if !slices.Contains(ofS3, permission) {
						s.Deny(ops...)
					}
				}
				defer s.Heal()
				err := c.do(m)
				var ofKMS *keycache.Error
				var ofArchive *archive.Error
				denied := errors.As(err, &ofKMS) && ofKMS.Reason == keycache.ReasonDenied ||
					errors.As(err, &ofArchive) && (ofArchive.Reason == archive.ReasonDenied || ofArchive.Reason == archive.ReasonKMSDenied)
				if err != nil && !denied {
					t.Errorf("%s: it does not fail because it was denied: %v", command, err)
				}
				return err
			}
			split := func(cell string) []string {
				if cell == "nothing" {
					return nil
				}
				return strings.Split(cell, ", ")
			}
			for _, row := range documented(t, "escrow.md")[1:] {
				command := row[0]
				if commands[command].do == nil {
					t.Errorf("the table has the command %s, which is not tried", command)
					continue
				}
				needs := [][]string{split(row[1]), split(row[2]), split(row[3])}
				with := func(n [][]string) error {
					return try(command, map[string][]string{arns[0]: n[0], arns[1]: n[1]}, n[2])
				}
				if err := with(needs); err != nil {
					t.Errorf("%s with just %v: %v", command, needs, err)
				}
				for i := range needs {
					for j, missing := range needs[i] {
						less := slices.Clone(needs)
						less[i] = slices.Delete(slices.Clone(needs[i]), j, j+1)
						if with(less) == nil {
							t.Errorf("%s works without %s", command, missing)
						}
					}
				}
				delete(commands, command)
			}
			for command := range commands {
				t.Errorf("the table does not have %s", command)
			}
		})
	}
}
