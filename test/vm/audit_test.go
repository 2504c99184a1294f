//go:build vm

package vm_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// auditLog is where the agent writes it.
const auditLog = "/var/log/luks-kms-agent/audit.jsonl"

// auditLines reads audit logs of the node strictly, the oldest first.
func auditLines(t *testing.T, n *harness.Node, files ...string) (lines []agent.AuditLine, events []string) {
	t.Helper()
	for _, file := range files {
		for text := range strings.Lines(string(n.Read(file))) {
			dec := json.NewDecoder(strings.NewReader(text))
			dec.DisallowUnknownFields()
			var line agent.AuditLine
			if err := dec.Decode(&line); err != nil || line.Version != 1 || !strings.HasSuffix(text, "\n") {
				t.Fatalf("%s has the line %q: %v", file, text, err)
			}
			lines = append(lines, line)
			events = append(events, line.Command+" "+string(line.Event)+" "+line.Result)
		}
	}
	slices.Sort(events)
	return lines, events
}

// wantInJournal checks that the journal has the same events, field by field.
func wantInJournal(t *testing.T, n *harness.Node, lines []agent.AuditLine) {
	t.Helper()
	entries := strings.Split(strings.TrimSpace(n.Sh("journalctl --sync; journalctl --no-pager -o json LUKS_KMS_AGENT_VERSION=1")), "\n")
	if len(entries) != len(lines) {
		t.Errorf("the journal has %d entries, the log %d lines", len(entries), len(lines))
	}
	for i, line := range lines {
		var entry map[string]string
		if err := json.Unmarshal([]byte(entries[min(i, len(entries)-1)]), &entry); err != nil {
			t.Fatal(err)
		}
		for field, want := range map[string]string{
			"LUKS_KMS_AGENT_EVENT": string(line.Event), "LUKS_KMS_AGENT_RESULT": line.Result, "LUKS_KMS_AGENT_VOLUME": line.Volume,
			"LUKS_KMS_AGENT_KMS_REQUEST_ID": line.KMSRequestID, "LUKS_KMS_AGENT_REASON": line.Reason, "MESSAGE_ID": line.Event.MessageID(),
			"_PID": fmt.Sprint(line.PID), "_BOOT_ID": strings.ReplaceAll(line.BootID, "-", ""),
		} {
			if entry[field] != want {
				t.Errorf("entry %d has %s=%q, want %q", i, field, entry[field], want)
			}
		}
	}
}

// TestAudit: each event of two boots is in the audit log and in the journal, with the id that KMS gave its call; the log is rotated
// meanwhile; and a full disk costs lines of the log, but no volume.
func TestAudit(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1, ebs1)
	to := n.CreateKey(map[string]string{"Description": "the next one"})
	n.Resume()
	n.AwaitVolumes()
	lines, events := auditLines(t, n, auditLog)
	if want := []string{
		"run data-key-made ok", "run data-key-unwrapped ok", "run volume-formatted ok", "run volume-formatted ok", "run volume-opened ok", "run volume-opened ok",
	}; !slices.Equal(events, want) {
		t.Errorf("first boot: %q", events)
	}
	wantInJournal(t, n, lines)
	if modes := n.Sh("stat -c '%a %U' /var/log/luks-kms-agent " + auditLog); modes != "700 root\n600 root\n" {
		t.Errorf("modes: %s", modes)
	}

	n.Sh("luks-kms-agent rewrap --to " + to)
	n.Sh("sed -i 's|^kms_key:.*|kms_key: " + to + "|' " + harness.ConfigFile)
	n.Sh("test -s /etc/logrotate.d/luks-kms-agent; cd /var/log/luks-kms-agent; mv audit.jsonl audit.jsonl.1; install -m 0600 /dev/null audit.jsonl")
	n.PowerOff()
	n.Tamper("ebs1", func(metadata map[string]any) {
		metadata["segments"].(map[string]any)["0"].(map[string]any)["encryption"] = "cipher_null-ecb"
	})
	n.Boot()
	if code := n.AwaitAgent(); code != "7" {
		t.Errorf("the service ended with exit code %s, want 7:\n%s", code, n.Journal())
	}
	wantMounted(t, n, "/mnt")
	lines, events = auditLines(t, n, auditLog)
	if want := []string{"run data-key-unwrapped ok", "run volume-opened ok", "run volume-refused failed"}; !slices.Equal(events, want) {
		t.Errorf("second boot: %q", events)
	}
	for _, line := range lines {
		if refused := line.Event == agent.EventVolumeRefused; refused && (line.Refusal != agent.RefusedHeader ||
			line.Identity != "vol-0aaaaaaaaaaaaaaa1" || !strings.Contains(line.Reason, "cipher_null")) || line.InstanceID != harness.InstanceID {
			t.Errorf("%+v", line)
		}
	}
	lines, events = auditLines(t, n, auditLog+".1", auditLog)
	if rewrapped := slices.Index(events, "rewrap data-key-rewrapped ok"); rewrapped < 0 || len(events) != 6+6+3 {
		t.Errorf("in all: %q", events)
	}
	wantInJournal(t, n, lines)
	asked := map[string]string{}
	for _, c := range n.KMS.Calls() {
		asked[c.RequestID] = c.Op
	}
	for _, line := range lines {
		want := "Decrypt"
		switch line.Event {
		case agent.EventDataKeyMade:
			want = "GenerateDataKey"
		case agent.EventDataKeyRewrapped:
			want = "ReEncrypt"
		case agent.EventRecordArchived, agent.EventVolumeRefused:
			want = ""
		}
		if asked[line.KMSRequestID] != want {
			t.Errorf("%s has the request %q, which was a %q, want %q", line.Event, line.KMSRequestID, asked[line.KMSRequestID], want)
		}
	}

	// The disk of the log is full.
	n.Sh("mount -t tmpfs -o size=8k,mode=0700 none /var/log/luks-kms-agent; head -c 1M /dev/zero >/var/log/luks-kms-agent/fill || true")
	n.Sh("luks-kms-agent lock /mnt")
	wantRefusal(t, n.Agent("unlock"), 7, "cannot write the audit log", "no space left on device", "1 unlocked")
	wantMounted(t, n, "/mnt")
	wantRefusal(t, n.Agent("status"), 0, "cannot write the audit log", "journal only: 3")
	if got := n.Sh("journalctl --sync; journalctl --no-pager -o cat LUKS_KMS_AGENT_COMMAND=unlock LUKS_KMS_AGENT_EVENT=volume-opened"); !strings.Contains(got, "audit: volume-opened ok") {
		t.Errorf("the journal has %q", got)
	}
	n.Sh("umount /var/log/luks-kms-agent")
	for _, leak := range n.Leaks() {
		t.Errorf("leak: %s", leak)
	}
}
