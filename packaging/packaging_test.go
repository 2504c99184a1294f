// Package packaging_test proves that what is shipped as an example works as it stands.
package packaging_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func load(t *testing.T, text string) (agent.Config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return agent.LoadConfig(file)
}

// A line that is a field behind a comment sign, as opposed to prose.
var commentedField = regexp.MustCompile(`(?m)^# (( {2,}(- )?)?[a-z_]+:( .*)?)$`)

func TestExampleConfiguration(t *testing.T) {
	text := read(t, "config.yaml")
	// As it is installed, it does nothing by accident.
	if _, err := load(t, text); err == nil || !strings.Contains(err.Error(), "kms_key is missing") {
		t.Errorf("as shipped: %v, want that kms_key is missing", err)
	}
	all := commentedField.ReplaceAllString(text, "$1")
	config, err := load(t, all)
	if err != nil {
		t.Fatalf("with every line in force: %v\n%s", err, all)
	}
	if len(config.Volumes) != 1 || len(config.AllowedKeys) != 1 || len(config.Exclude) != 2 {
		t.Errorf("lines were lost: %+v", config)
	}

	// Defaults are shown as they are: the example with every line in force is the smallest file, but for what has no default.
	least, err := load(t, "kms_key: "+config.KMSKey)
	if err != nil {
		t.Fatal(err)
	}
	if config.KeyScope != least.KeyScope || config.Filesystem != least.Filesystem || config.InstanceStore != least.InstanceStore ||
		config.EBS != least.EBS || config.RetryLimit != least.RetryLimit || config.CallTimeout != least.CallTimeout ||
		config.Workqueues != least.Workqueues || config.StateDir != least.StateDir || config.AuditLog != least.AuditLog {
		t.Errorf("a default is shown wrong:\n%+v, the defaults are\n%+v", config, least)
	}

	// Every field that the agent knows stands in the example and in the documentation, and none that it does not know.
	_, err = load(t, "no_such_field: 1")
	if err == nil {
		t.Fatal("an unknown field was accepted")
	}
	_, list, ok := strings.Cut(err.Error(), "(allowed: ")
	if !ok {
		t.Fatalf("the message names no allowed fields: %v", err)
	}
	fields := strings.Split(strings.TrimSuffix(list, ")"), ", ")
	var shown map[string]any
	if err := yaml.Unmarshal([]byte(all), &shown); err != nil {
		t.Fatal(err)
	}
	doc := read(t, "../docs/configuration.md")
	for _, f := range fields {
		if _, ok := shown[f]; !ok {
			t.Errorf("the example does not show %s", f)
		}
		if !strings.Contains(doc, "| `"+f+"` |") {
			t.Errorf("docs/configuration.md does not tell of %s", f)
		}
	}
}

// The drop-in is one that logrotate takes: it renames the log, makes a new one of mode 0600, and compresses at the next time.
func TestLogrotate(t *testing.T) {
	logrotate, err := exec.LookPath("logrotate")
	if err != nil {
		if logrotate, err = exec.LookPath("/usr/sbin/logrotate"); err != nil {
			t.Fatal("install logrotate (make test-unit does)")
		}
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	group, err := user.LookupGroupId(me.Gid)
	if err != nil {
		t.Fatal(err)
	}
	least, err := load(t, "kms_key: alias/data")
	if err != nil {
		t.Fatal(err)
	}
	text, dir := read(t, "logrotate/luks-kms-agent"), t.TempDir()
	if ok, err := filepath.Match(filepath.Dir(least.AuditLog)+"/*.jsonl", least.AuditLog); !ok || err != nil || !strings.Contains(text, filepath.Dir(least.AuditLog)+"/*.jsonl {") {
		t.Errorf("the default audit log %s is not the one that is rotated:\n%s", least.AuditLog, text)
	}
	if !strings.Contains(text, "create 0600 root root") {
		t.Errorf("the new file is made otherwise:\n%s", text)
	}
	// As who runs this, and in a directory of this test.
	text = strings.ReplaceAll(text, filepath.Dir(least.AuditLog), dir)
	text = strings.ReplaceAll(text, "create 0600 root root", "create 0600 "+me.Username+" "+group.Name)
	if err := errors.Join(os.Chmod(dir, 0o700), os.WriteFile(filepath.Join(dir, "conf"), []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, filepath.Base(least.AuditLog))
	for i, want := range [][]string{{"audit.jsonl", "audit.jsonl.1"}, {"audit.jsonl", "audit.jsonl.1", "audit.jsonl.2.gz"}} {
		if err := os.WriteFile(log, []byte("{}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(logrotate, "--force", "--state", filepath.Join(dir, "state"), filepath.Join(dir, "conf")).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		files, err := filepath.Glob(filepath.Join(dir, "audit*"))
		for i := range files {
			files[i] = filepath.Base(files[i])
		}
		info, errStat := os.Stat(log)
		if err := errors.Join(err, errStat); err != nil || !slices.Equal(files, want) || info.Mode().Perm() != 0o600 || info.Size() != 0 {
			t.Errorf("rotation %d: %v (%v), %v", i+1, files, err, info)
		}
	}
}

func TestCloudInitLeavesTheDisksAlone(t *testing.T) {
	var c struct{ Mounts [][]*string }
	if err := yaml.Unmarshal([]byte(read(t, "90_luks-kms-agent.cfg")), &c); err != nil {
		t.Fatal(err)
	}
	if len(c.Mounts) != 1 || len(c.Mounts[0]) != 2 || *c.Mounts[0][0] != "ephemeral0" || c.Mounts[0][1] != nil {
		t.Errorf("mounts are %v, want [[ephemeral0, null]]", c.Mounts)
	}
}

// The policies grant what the agent calls and nothing else, and the README shows the same text.
func TestPolicies(t *testing.T) {
	type statement struct {
		Sid, Effect string
		Action      []string
		Resource    string
		Principal   map[string]string
	}
	var policy struct {
		Version   string
		Statement []statement
	}
	want := []string{"kms:GenerateDataKey", "kms:Decrypt", "kms:DescribeKey"}
	for file, sid := range map[string]string{"node-role.json": "LuksKmsAgent", "key-policy.json": "NodesUseKey"} {
		text := read(t, filepath.Join("policies", file))
		if err := json.Unmarshal([]byte(text), &policy); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		i := slices.IndexFunc(policy.Statement, func(s statement) bool { return s.Sid == sid })
		if i < 0 || !slices.Equal(policy.Statement[i].Action, want) || policy.Statement[i].Effect != "Allow" {
			t.Errorf("%s: statement %s of %+v does not allow just %v", file, sid, policy.Statement, want)
		}
		for _, s := range policy.Statement {
			if s.Sid != sid && slices.ContainsFunc(s.Action, func(a string) bool {
				return slices.Contains(want[:2], a) || a == "kms:*" || a == "kms:G*" || a == "kms:D*" || a == "kms:GenerateDataKey*"
			}) {
				t.Errorf("%s: statement %s lets others use the key", file, s.Sid)
			}
		}
		if !strings.Contains(read(t, "../README.md"), strings.TrimSpace(text)) {
			t.Errorf("README.md does not show %s as it is", file)
		}
	}
}
