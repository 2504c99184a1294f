package packaging_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// The kind of each policy; a file that is not here is an error.
var policyKinds = map[string]kmstest.PolicyKind{
	"node-role.json":           kmstest.RolePolicy,
	"node-role-strict.json":    kmstest.RolePolicy,
	"rewrap-role.json":         kmstest.RolePolicy,
	"configure-role.json":      kmstest.RolePolicy,
	"escrow-role.json":         kmstest.RolePolicy,
	"log-role.json":            kmstest.RolePolicy,
	"key-policy.json":          kmstest.KeyPolicy,
	"key-policy-grants.json":   kmstest.KeyPolicy,
	"vpc-endpoint-policy.json": kmstest.EndpointPolicy,
	"keep-key-scp.json":        kmstest.ControlPolicy,
}

func policy(t *testing.T, name string) *kmstest.Policy {
	t.Helper()
	p, err := kmstest.ParsePolicy(policyKinds[name], []byte(read(t, filepath.Join("policies", name))))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return p
}

// Every policy keeps to the grammar of IAM, is small enough, names actions that KMS has, and is in the documentation.
func TestPoliciesAreWellFormed(t *testing.T) {
	files, err := filepath.Glob("policies/*.json")
	if err != nil || len(files) != len(policyKinds) {
		t.Fatalf("%v (%v), want %d", files, err, len(policyKinds))
	}
	doc := read(t, "../docs/policies.md")
	for _, file := range files {
		name := filepath.Base(file)
		policy(t, name)
		if !strings.Contains(doc, "| `"+name+"` |") {
			t.Errorf("docs/policies.md does not tell of %s", name)
		}
	}
}

// Each breaks one rule, in one of the policies.
func TestBrokenPoliciesAreSeen(t *testing.T) {
	for _, c := range []struct{ file, from, to, says string }{
		{"node-role.json", `"2012-10-17"`, `"2012-10-18"`, "Version is"},
		{"node-role.json", `"Version"`, `"version"`, "version is no known element"},
		{"node-role.json", `"Effect": "Allow",`, `"Effect": "allow",`, "Effect is"},
		{"node-role.json", `"Effect": "Allow",`, `"Effect": "Allow", "Effect": "Deny",`, "stands twice"},
		{"node-role.json", `"Effect": "Allow",`, ``, "Effect is"},
		{"node-role.json", `"Sid": "LuksKmsAgent"`, `"Sid": "luks-kms-agent"`, "letters and digits"},
		{"node-role.json", `kms:GenerateDataKey"`, `kms:GenerateDatakeys"`, "is no action"},
		{"node-role.json", `kms:Decrypt"`, `kms:ReEncrypt"`, "is no action"},
		{"node-role.json", `"kms:Decrypt"`, `"Decrypt"`, "is no action"},
		{"node-role.json", `["kms:GenerateDataKey", "kms:Decrypt", "kms:DescribeKey"]`, `[]`, "Action is"},
		{"node-role.json", `:key/1234abcd-`, `:1234abcd-`, "is no resource"},
		{"node-role.json", `:111122223333:`, `:1111:`, "is no resource"},
		{"node-role.json", `"Resource"`, `"Principal": "*", "Resource"`, "has no Principal"},
		{"node-role.json", "]\n}", "]\n}}", "something follows"},
		{"node-role.json", "]\n}", "]\n} {}", "something follows"},
		{"node-role.json", `"Action"`, `"NotAction"`, "no known element"},
		{"node-role.json", `1234abcd-12ab-34cd-56ef-1234567890ab"`, `1234abcd-12ab-34cd-56ef-1234567890ab` + strings.Repeat("x", 6144) + `"`, "AWS takes 6144"},
		{"node-role-strict.json", `"Null"`, `"IsNull"`, "no operator"},
		{"node-role-strict.json", `"true"`, `"yes"`, "Null wants"},
		{"node-role-strict.json", `kms:EncryptionContextKeys`, `kms:EncryptionContextKey`, "no condition key"},
		{"node-role-strict.json", `${aws:SourceVpc}`, `${aws:SourceVPCs}`, "no condition key"},
		{"rewrap-role.json", `"NewKey"`, `"OldKey"`, "stands twice"},
		{"key-policy.json", `"Principal": {"AWS": "arn:aws:iam::111122223333:role/NODE-ROLE"},`, ``, "needs a Principal"},
		{"key-policy.json", `arn:aws:iam::111122223333:role/NODE-ROLE`, `NODE-ROLE`, "is no principal"},
		{"key-policy.json", `"Resource": "*"`, `"Resource": "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"`, "is no resource"},
		{"key-policy-grants.json", `ForAllValues:`, `ForEveryValue:`, "no operator"},
		{"vpc-endpoint-policy.json", `"Principal": "*"`, `"Principal": "everybody"`, "Principal is"},
		{"keep-key-scp.json", `"Deny"`, `"Allow"`, "only denies"},
	} {
		text := read(t, filepath.Join("policies", c.file))
		if !strings.Contains(text, c.from) {
			t.Errorf("%s has no %s", c.file, c.from)
		}
		_, err := kmstest.ParsePolicy(policyKinds[c.file], []byte(strings.Replace(text, c.from, c.to, 1)))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s with %s: %v, want %q", c.file, c.to, err, c.says)
		}
	}
}

// What the policies refuse. What the node needs is tried in agent, with the agent.
func TestPoliciesRefuse(t *testing.T) {
	const (
		key      = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
		otherKey = "arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321"
		logKey   = "arn:aws:kms:us-east-1:111122223333:key/3456cdef-34cd-56ef-78ab-3456789012cd"
		escrow   = "arn:aws:kms:us-east-1:111122223333:key/5678efab-56ef-78ab-90cd-567890abcdef"
		role     = "arn:aws:iam::111122223333:role/"
		node     = role + "NODE-ROLE"
		admin    = role + "KEY-ADMINISTRATOR"
	)
	type keys = map[string][]string
	all, err := kmstest.ParsePolicy(kmstest.RolePolicy, []byte(`{"Version": "2012-10-17", "Statement": [
		{"Sid": "Everything", "Effect": "Allow", "Action": "kms:*", "Resource": "*"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	may := &kmstest.Access{Role: []*kmstest.Policy{all}}
	with := func(change func(*kmstest.Access)) *kmstest.Access { a := *may; change(&a); return &a }
	ofRole := func(name string) *kmstest.Access { return &kmstest.Access{Role: []*kmstest.Policy{policy(t, name)}} }
	ofKey := func(name string) *kmstest.Access {
		return with(func(a *kmstest.Access) { a.Keys = map[string]*kmstest.Policy{key: policy(t, name)} })
	}
	endpoint := with(func(a *kmstest.Access) { a.Endpoint = policy(t, "vpc-endpoint-policy.json") })
	control := with(func(a *kmstest.Access) { a.Control = []*kmstest.Policy{policy(t, "keep-key-scp.json")} })
	home := keys{"aws:SourceVpc": {"vpc-1"}, "aws:EC2InstanceSourceVPC": {"vpc-1"}}
	grant := func(grantee string, ops ...string) keys {
		return keys{"kms:GranteePrincipal": {grantee}, "kms:GrantOperations": ops}
	}

	for _, c := range []struct {
		what          string
		access        *kmstest.Access
		who, does, on string
		context       keys
		allowed       bool
	}{
		{"node-role", ofRole("node-role.json"), node, "Decrypt", key, nil, true},
		{"node-role: another key", ofRole("node-role.json"), node, "Decrypt", otherKey, nil, false},
		{"node-role: Encrypt", ofRole("node-role.json"), node, "Encrypt", key, nil, false},
		{"strict, at home", ofRole("node-role-strict.json"), node, "Decrypt", key, home, true},
		{"strict: not through an endpoint", ofRole("node-role-strict.json"), node, "Decrypt", key, keys{"aws:EC2InstanceSourceVPC": {"vpc-1"}}, false},
		{"strict: another VPC", ofRole("node-role-strict.json"), node, "Decrypt", key, keys{"aws:SourceVpc": {"vpc-2"}, "aws:EC2InstanceSourceVPC": {"vpc-1"}}, false},
		{"strict: of no instance", ofRole("node-role-strict.json"), node, "Decrypt", key, keys{"aws:SourceVpc": {"vpc-1"}}, false},
		{"strict: with a context", ofRole("node-role-strict.json"), node, "Decrypt", key,
			keys{"aws:SourceVpc": {"vpc-1"}, "aws:EC2InstanceSourceVPC": {"vpc-1"}, "kms:EncryptionContextKeys": {"aws:s3:arn"}}, false},
		{"rewrap: old to new, not back", ofRole("rewrap-role.json"), node, "ReEncryptFrom", otherKey, nil, false},
		{"rewrap: no new data key", ofRole("rewrap-role.json"), node, "GenerateDataKey", otherKey, nil, false},
		{"configure: look", ofRole("configure-role.json"), role + "X", "DescribeKey", key, nil, true},
		{"configure: use", ofRole("configure-role.json"), role + "X", "Decrypt", key, nil, false},
		{"configure: change", ofRole("configure-role.json"), role + "X", "PutKeyPolicy", key, nil, false},
		{"configure: look at the log key", ofRole("configure-role.json"), role + "X", "DescribeKey", logKey, nil, true},
		{"configure: look at the escrow's key", ofRole("configure-role.json"), role + "X", "DescribeKey", escrow, nil, true},
		{"configure: use the escrow's key", ofRole("configure-role.json"), role + "X", "Decrypt", escrow, nil, false},
		{"configure: use the log key", ofRole("configure-role.json"), role + "X", "GenerateDataKey", logKey, nil, false},
		{"configure: who may use the log key", ofRole("configure-role.json"), role + "X", "GetKeyPolicy", logKey, nil, false},
		{"logs: encrypt", ofRole("log-role.json"), node, "GenerateDataKey", logKey, keys{"kms:EncryptionContextKeys": {"aws:s3:arn"}}, true},
		{"logs: read", ofRole("log-role.json"), node, "Decrypt", logKey, nil, false},
		{"logs: look at the key", ofRole("log-role.json"), node, "DescribeKey", logKey, nil, false},
		{"logs: the disks' key", ofRole("log-role.json"), node, "GenerateDataKey", key, nil, false},
		{"key policy: who has kms:* by IAM", ofKey("key-policy.json"), role + "X", "Decrypt", key, nil, false},
		{"key policy: they administer", ofKey("key-policy.json"), role + "X", "PutKeyPolicy", key, nil, true},
		{"key policy: they make no grants", ofKey("key-policy.json"), role + "X", "CreateGrant", key, grant(node, "Decrypt"), false},
		{"grants: a node without one", ofKey("key-policy-grants.json"), node, "Decrypt", key, nil, false},
		{"grants: the administrator makes one", ofKey("key-policy-grants.json"), admin, "CreateGrant", key, grant(node, "GenerateDataKey", "Decrypt"), true},
		{"grants: for somebody else", ofKey("key-policy-grants.json"), admin, "CreateGrant", key, grant(role+"X", "Decrypt"), false},
		{"grants: for more", ofKey("key-policy-grants.json"), admin, "CreateGrant", key, grant(node, "Decrypt", "CreateGrant"), false},
		{"grants: for who knows what", ofKey("key-policy-grants.json"), admin, "CreateGrant", key, keys{"kms:GranteePrincipal": {node}}, false},
		{"grants: by somebody else", ofKey("key-policy-grants.json"), role + "X", "CreateGrant", key, grant(node, "Decrypt"), false},
		{"grants: the administrator uses the key", ofKey("key-policy-grants.json"), admin, "Decrypt", key, nil, false},
		{"endpoint: the node", endpoint, node, "Decrypt", key, nil, true},
		{"endpoint: another role", endpoint, role + "X", "Decrypt", key, nil, false},
		{"endpoint: another key", endpoint, node, "Decrypt", otherKey, nil, false},
		{"control: use", control, node, "Decrypt", key, nil, true},
		{"control: deletion", control, node, "ScheduleKeyDeletion", key, keys{"kms:ScheduleKeyDeletionPendingWindowInDays": {"30"}}, false},
		{"control: disabling", control, node, "DisableKey", key, nil, false},
		{"control: deletion by the administrator", control, admin, "ScheduleKeyDeletion", key, keys{"kms:ScheduleKeyDeletionPendingWindowInDays": {"30"}}, true},
		{"control: too soon", control, admin, "ScheduleKeyDeletion", key, keys{"kms:ScheduleKeyDeletionPendingWindowInDays": {"7"}}, false},
	} {
		got := c.access.Allows(kmstest.Request{Principal: c.who, Action: "kms:" + c.does, Resource: c.on, Context: c.context})
		if got != c.allowed {
			t.Errorf("%s: allowed %v", c.what, got)
		}
	}
	if n := len(kmstest.PolicyActions()); n < 50 || !slices.Contains(kmstest.PolicyActions(), "kms:ScheduleKeyDeletion") {
		t.Errorf("KMS has %d actions", n)
	}
}
