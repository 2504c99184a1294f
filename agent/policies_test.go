package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

const policiesDir = "../packaging/policies"

// The keys of logs and escrow in the policies.
const (
	shippedLogsKey   = "arn:aws:kms:us-east-1:111122223333:key/3456cdef-34cd-56ef-78ab-3456789012cd"
	shippedEscrowKey = "arn:aws:kms:us-east-1:111122223333:key/5678efab-56ef-78ab-90cd-567890abcdef"
)

// shippedPolicy is one of ours, for this machine's keys and role; mine is what else has another name here, in pairs.
func (m *machine) shippedPolicy(kind kmstest.PolicyKind, name, newKey string, mine ...string) *kmstest.Policy {
	m.t.Helper()
	text, err := os.ReadFile(filepath.Join(policiesDir, name+".json"))
	if err != nil {
		m.t.Fatal(err)
	}
	const arn = "arn:aws:kms:us-east-1:111122223333:key/"
	mine = append(mine, arn+"1234abcd-12ab-34cd-56ef-1234567890ab", m.kms.ARN(), arn+"0987dcba-09fe-87dc-65ba-ab0987654321", newKey,
		"arn:aws:iam::111122223333:role/NODE-ROLE", kmstest.RoleARN)
	p, err := kmstest.ParsePolicy(kind, []byte(strings.NewReplacer(mine...).Replace(string(text))))
	if err != nil {
		m.t.Fatalf("%s: %v", name, err)
	}
	return p
}

// onlyAllows is a role's policy that allows operations on each key, by ARN, and nothing else.
func onlyAllows(t testing.TB, on map[string][]string) *kmstest.Policy {
	t.Helper()
	type statement struct {
		Sid, Effect, Resource string
		Action                []string
	}
	var all []statement
	for arn, ops := range on {
		s := statement{Sid: fmt.Sprintf("S%d", len(all)), Effect: "Allow", Resource: arn, Action: []string{"kms:CreateAlias"}}
		for _, op := range ops {
			s.Action = append(s.Action, "kms:"+op)
		}
		all = append(all, s)
	}
	text, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": all})
	if err != nil {
		t.Fatal(err)
	}
	p, err := kmstest.ParsePolicy(kmstest.RolePolicy, text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// docs/policies.md says what each command needs of KMS, and with which of our policies it works. Both are tried.
func TestPoliciesDocumentedAreThoseNeeded(t *testing.T) {
	blank := newMachine(t)
	blank.disk(volumes.ClassEBS, "vol-1")
	locked := blank.copyTo(filepath.Join(t.TempDir(), "locked"))
	locked.runOK()
	files, err := locked.backUp()
	if err != nil {
		t.Fatal(err)
	}
	locked.reboot()
	withRecovery := locked.copyTo(filepath.Join(t.TempDir(), "recovery"))
	onPaper, err := withRecovery.addRecovery(false, "vol-1")
	if err != nil {
		t.Fatal(err)
	}
	newKey := blank.kms.NewKey(kmstest.KeySpec{})
	arns := []string{blank.kms.ARN(), newKey}

	outcome := func(r Report, err error) error { return errors.Join(append(r.Failures(), err)...) }
	commands := map[string]struct {
		on *machine
		do func(*machine) error
	}{
		"`run` at first boot":  {blank, func(m *machine) error { return outcome(m.node().Run(t.Context())) }},
		"`run` at later boots": {locked, func(m *machine) error { return outcome(m.node().Run(t.Context())) }},
		"`unlock`":             {locked, func(m *machine) error { return outcome(m.node().Unlock(t.Context(), nil)) }},
		"`preflight`": {blank, func(m *machine) error {
			m.cfg.Path, m.cfg.RetryLimit = m.dir, -1
			checks := (&inspected{machine: m}).check()
			if checks["data key"].Result == CheckSkipped {
				t.Errorf("no data key was tried: %+v", checks)
			}
			return checks["data key"].Err
		}},
		"`verify`": {locked, func(m *machine) error {
			verified, err := m.node().Verify(t.Context(), nil)
			for _, v := range verified {
				for _, f := range v.Findings {
					err = errors.Join(err, f.Err)
				}
			}
			return err
		}},
		"`header backup`":         {locked, func(m *machine) error { _, err := m.backUp(); return err }},
		"`header restore`":        {locked, func(m *machine) error { _, err := m.restore(files["vol-1"], ""); return err }},
		"`recovery-key add`":      {locked, func(m *machine) error { _, err := m.addRecovery(false, "vol-1"); return err }},
		"`recovery-key remove`":   {withRecovery, func(m *machine) error { return m.removeRecovery("vol-1") }},
		"`recovery-key list`":     {withRecovery, func(m *machine) error { return failuresOf(m.node().ListRecovery(t.Context(), nil)) }},
		"`recovery-key test`":     {withRecovery, func(m *machine) error { return m.testRecovery(onPaper, "vol-1") }},
		"`unlock --recovery-key`": {withRecovery, func(m *machine) error { _, err := m.unlockRecovery(onPaper, "vol-1"); return err }},
		"`wipe`":                  {locked, func(m *machine) error { _, err := m.wipe("vol-1"); return err }},
		"`rotate`":                {locked, func(m *machine) error { _, err := m.rotate(); return err }},
		"`rewrap`":                {locked, func(m *machine) error { _, err := m.rewrap(newKey); return err }},
		"`plan`":                  {locked, func(m *machine) error { _, err := m.node().Plan(t.Context()); return err }},
		"`status`":                {locked, func(m *machine) error { m.status(); return nil }},
		"`lock`":                  {locked, func(m *machine) error { _, err := m.node().Lock(t.Context(), nil); return err }},
	}
	nodeRole := blank.shippedPolicy(kmstest.RolePolicy, "node-role", newKey)
	ofKey := func(name string) map[string]*kmstest.Policy {
		return map[string]*kmstest.Policy{blank.kms.ARN(): blank.shippedPolicy(kmstest.KeyPolicy, name, newKey)}
	}
	vpc := []string{"vpc-0123456789abcdef0"}
	shipped := map[string]*kmstest.Access{
		"node-role": {Role: []*kmstest.Policy{nodeRole}},
		"node-role-strict": {
			Role:    []*kmstest.Policy{blank.shippedPolicy(kmstest.RolePolicy, "node-role-strict", newKey)},
			Context: map[string][]string{"aws:SourceVpc": vpc, "aws:EC2InstanceSourceVPC": vpc},
		},
		"rewrap-role": {Role: []*kmstest.Policy{nodeRole, blank.shippedPolicy(kmstest.RolePolicy, "rewrap-role", newKey)}},
		"key-policy":  {Keys: ofKey("key-policy")},
		"key-policy-grants": {
			Keys:   ofKey("key-policy-grants"),
			Grants: []kmstest.Grant{{Key: blank.kms.ARN(), Grantee: kmstest.RoleARN, Operations: []string{"GenerateDataKey", "Decrypt", "DescribeKey"}}},
		},
		"vpc-endpoint-policy": {Role: []*kmstest.Policy{nodeRole}, Endpoint: blank.shippedPolicy(kmstest.EndpointPolicy, "vpc-endpoint-policy", newKey)},
		"configure-role":      {Role: []*kmstest.Policy{blank.shippedPolicy(kmstest.RolePolicy, "configure-role", newKey)}},
	}

	try := func(command string, a *kmstest.Access) error {
		c := commands[command]
		m := c.on.copyTo(filepath.Join(t.TempDir(), "m"))
		m.kms.Enforce(a)
		defer m.kms.Enforce(nil)
		err := c.do(m)
		if denied := new(keycache.Error); err != nil && (!errors.As(err, &denied) || denied.Reason != keycache.ReasonDenied) {
			t.Errorf("%s: it does not fail because it was denied: %v", command, err)
		}
		return err
	}
	rows := documented(t, "policies.md")
	columns := rows[0][2:]
	if len(columns) != len(shipped) {
		t.Errorf("the table has columns for %v", columns)
	}
	for _, row := range rows[1:] {
		command, needs := row[0], row[1]
		if commands[command].do == nil {
			t.Errorf("the table has the command %s, which is not tried", command)
			continue
		}
		allowed := map[string][]string{arns[0]: nil}
		for i, ops := range strings.SplitN(needs, "; on the new key ", 2) {
			if ops != "nothing" {
				allowed[arns[i]] = strings.Split(ops, ", ")
			}
		}
		if err := try(command, &kmstest.Access{Role: []*kmstest.Policy{onlyAllows(t, allowed)}}); err != nil {
			t.Errorf("%s with just %s: %v", command, needs, err)
		}
		for arn, ops := range allowed {
			for i, op := range ops {
				allowed[arn] = slices.Delete(slices.Clone(ops), i, i+1)
				if err := try(command, &kmstest.Access{Role: []*kmstest.Policy{onlyAllows(t, allowed)}}); err == nil {
					t.Errorf("%s works without %s", command, op)
				}
			}
			allowed[arn] = ops
		}
		for i, policy := range columns {
			if needs == "nothing" { // and works with nothing, so with each
				if row[2+i] != "yes" {
					t.Errorf("%s with %s: the table says %s", command, policy, row[2+i])
				}
				continue
			}
			err := try(command, shipped[policy])
			if (row[2+i] == "yes") != (err == nil) {
				t.Errorf("%s with %s: the table says %s, but: %v", command, policy, row[2+i], err)
			}
		}
		delete(commands, command)
	}
	for command := range commands {
		t.Errorf("the table does not have %s", command)
	}
}

// documented is the table of what commands need in a document, its head first.
func documented(t *testing.T, document string) (rows [][]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../docs", document))
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "\n| command |")
	table, _, ok := strings.Cut("| command |"+table, "\n\n")
	if !ok {
		t.Fatalf("docs/%s has no table of commands", document)
	}
	for i, line := range strings.Split(table, "\n") {
		var cells []string
		for cell := range strings.SplitSeq(strings.Trim(line, "| "), "|") {
			cells = append(cells, strings.TrimSpace(cell))
		}
		if i != 1 { // the line below the head
			rows = append(rows, cells)
		}
	}
	return rows
}
