//go:build vm

package vm_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestStatusScreen: what status says of real volumes while they are mounted, then locked, then one is away, on a terminal and to programs.
func TestStatusScreen(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1, ebs1)
	noHotAttach(n)
	n.Resume()
	n.AwaitVolumes()
	kms, imds := len(n.KMS.Calls()), len(n.IMDS.Requests())

	// A key slot of its owner's, which is none of ours, and one that a token calls a recovery key's.
	n.ShWith([]byte(n.Unwrap(n.KeyRecords()[0])), `umask 077; cat >/run/key; printf 0123456789 >/run/pass
for i in 1 2; do cryptsetup luksAddKey -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /run/key `+byID(ebs1)+` /run/pass; done; rm /run/key
printf '{"type":"luks-kms-agent-recovery","keyslots":["2"]}' | cryptsetup token import `+byID(ebs1))

	status := n.Status()
	mounted := volumes(t, n)
	ours := func(status map[string]any, identity string) map[string]any {
		for _, v := range status["volumes"].([]any) {
			if v.(map[string]any)["identity"] == identity {
				return v.(map[string]any)
			}
		}
		t.Fatalf("the status has no %s: %v", identity, status)
		return nil
	}
	ebs, ssd := ours(status, identity(ebs1)), ours(status, ssd1.Serial)
	if status["well"] != true || len(mounted) != 2 || ebs["state"] != "mounted" || ssd["state"] != "mounted" {
		t.Errorf("mounted: %v", status)
	}
	if ebs["other_key_slots"] != 1.0 || ebs["recovery_key"] != true || ssd["other_key_slots"] != 0.0 || ssd["recovery_key"] != false {
		t.Errorf("key slots: %v\n%v", ebs, ssd)
	}
	if ebs["key_arn"] != n.Key || ebs["filesystem_size"].(float64) < 1<<20 || ebs["filesystem_used"] == nil {
		t.Errorf("facts: %v", ebs)
	}
	wantDocumented(t, status, ebs)

	for _, columns := range []string{"80", "120"} {
		screen := n.Sh("script -qec 'stty cols " + columns + " rows 40; TERM=xterm luks-kms-agent status' /dev/null </dev/null")
		plain := regexp.MustCompile("\x1b\\[[0-9]*m").ReplaceAllString(screen, "")
		words := strings.Join(strings.Fields(plain), " ")
		if plain == screen || !strings.Contains(words, "All well: 2 volumes mounted") || !strings.Contains(words, "recovery key; 1 other key slot; unlocked ") {
			t.Errorf("%s columns:\n%s", columns, plain)
		}
	}
	if text := n.Sh("luks-kms-agent status"); strings.Contains(text, "\x1b") {
		t.Errorf("colour on a pipe: %q", text)
	}
	// Programs get a line each time, and Ctrl-C is how it ends; on a terminal the cursor comes back.
	lines := n.Sh("timeout --preserve-status -s INT 5 luks-kms-agent status --watch --interval 300ms --json | head -n 3")
	for _, line := range strings.Split(strings.TrimSpace(lines), "\n") {
		var s map[string]any
		if err := json.Unmarshal([]byte(line), &s); err != nil || s["well"] != true {
			t.Errorf("--watch --json: %v in %q", err, line)
		}
	}
	if strings.Count(lines, "\n") != 3 {
		t.Errorf("--watch --json: %q", lines)
	}
	if text := n.Sh("timeout --preserve-status -s INT 3 luks-kms-agent status --watch --interval 500ms"); strings.Count(text, "All well") < 2 || strings.Contains(text, "\x1b") {
		t.Errorf("--watch on a pipe: %q", text)
	}
	if text := n.Sh("script -qec 'TERM=xterm timeout --foreground --preserve-status -s INT 3 luks-kms-agent status --watch --interval 500ms' /dev/null </dev/null"); !strings.HasPrefix(text, "\x1b[?25l\x1b[H\x1b[2J") || !strings.HasSuffix(strings.TrimSpace(text), "\x1b[?25h") {
		t.Errorf("--watch on a terminal: %q", text)
	}
	if r := n.Try("setpriv --reuid 65534 --clear-groups luks-kms-agent status"); r.Code != 6 || !strings.Contains(r.Stderr, "Run the agent as root") {
		t.Errorf("not as root: %s", r)
	}

	// One volume is locked, then away.
	n.Sh("luks-kms-agent lock " + identity(ebs1))
	status = n.Status()
	if v := ours(status, identity(ebs1)); status["well"] != false || v["state"] != "locked" || v["last_unlock"] != ebs["last_unlock"] || v["other_key_slots"] != 1.0 {
		t.Errorf("locked: %v", v)
	}
	n.Detach("ebs1")
	status = n.Status()
	if v := ours(status, identity(ebs1)); v["state"] != "missing" || v["problems"] == nil || v["device"] != nil {
		t.Errorf("away: %v", v)
	}
	text := n.Sh("flock /var/lib/luks-kms-agent/lock timeout 20 luks-kms-agent status")
	if !strings.Contains(text, "Not all well: 2 volumes: 1 missing, 1 mounted, 1 problem") {
		t.Errorf("away, under a lock:\n%s", text)
	}
	if len(n.KMS.Calls()) != kms || len(n.IMDS.Requests()) != imds {
		t.Errorf("status asked KMS or IMDS: %v, %v", n.KMS.Calls()[kms:], n.IMDS.Requests()[imds:])
	}
	n.Attach("ebs1")
	// Who waits on a terminal is told for what, and the line is taken away.
	unlock := n.Sh("flock /var/lib/luks-kms-agent/lock sleep 5 & sleep 1; script -qec 'TERM=xterm luks-kms-agent unlock " + identity(ebs1) + "' /dev/null </dev/null; wait")
	if !strings.Contains(unlock, "\r\x1b[KWaiting for another command, process ") || !strings.Contains(unlock, " … 2 s\r\x1b[K") {
		t.Errorf("unlock on a terminal: %q", unlock)
	}
	status = n.Status()
	if v := ours(status, ssd1.Serial); status["well"] != true || v["last_unlock"] != ssd["last_unlock"] || ours(status, identity(ebs1))["last_unlock"] == ebs["last_unlock"] {
		t.Errorf("after unlock of the other: %v", status)
	}
}

// wantDocumented finds in a status and one of its volumes each field that docs/records.md has, but for those that are there only in trouble.
func wantDocumented(t *testing.T, status, volume map[string]any) {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "records.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(doc), "## /run/luks-kms-agent/status.json")
	section, _, _ = strings.Cut(section, "```json status")
	top, ofVolume, _ := strings.Cut(section, "| field of a volume")
	absent := []string{"error", "audit_error", "header_backup_stale", "missing", "problems", "quarantined", "logs", "rewrap_pending", "header_backup", "escrow", "escrow_pending", "primary_damaged", "secondary_damaged"}
	row := regexp.MustCompile("(?m)^\\| (`[^|]*`) \\|")
	for part, has := range map[string]map[string]any{top: status, ofVolume: volume} {
		for _, cell := range row.FindAllStringSubmatch(part, -1) {
			for _, field := range strings.Split(cell[1], ", ") {
				field = strings.Trim(field, "`")
				if _, ok := has[field]; !ok && !slices.Contains(absent, field) {
					t.Errorf("%q of the document is not in %v", field, has)
				}
			}
		}
	}
}
