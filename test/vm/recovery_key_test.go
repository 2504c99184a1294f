//go:build vm

package vm_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestRecoveryKey: a recovery key is added to volumes in use; KMS says no at the next boot, and the key opens and mounts them; when it is
// removed it opens nothing.
func TestRecoveryKey(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1, ebs1)
	n.Resume()
	n.AwaitVolumes()
	files := writeFiles(n, "/mnt", "/mnt1")

	if r := n.Agent("recovery-key add /mnt | cat; exit ${PIPESTATUS[0]}"); r.Code != 2 || !strings.Contains(r.Stderr, "not a terminal") || r.Stdout != "" {
		t.Errorf("into a pipe: %s", r)
	}
	// script gives it a terminal.
	out := n.Sh("script -qec 'luks-kms-agent recovery-key add --qr /mnt /mnt1' /dev/null")
	key := regexp.MustCompile(`(?m)^([0-9A-HJKMNP-TV-Z]{5}-){7}[0-9A-HJKMNP-TV-Z]{5}\r?$`).FindString(out)
	if key = strings.TrimSpace(key); key == "" || strings.Count(out, key) != 1 || strings.Count(out, "▀") < 100 || strings.Count(out, "added to") != 2 {
		t.Fatalf("add printed\n%s", out)
	}
	if list := n.Sh("luks-kms-agent recovery-key list"); strings.Count(list, "key slot 1, since 20") != 2 || strings.Contains(list, "unknown") {
		t.Errorf("list:\n%s", list)
	}
	typed := []byte(strings.ToLower(strings.ReplaceAll(key, "-", " ")) + "\n")
	if tested := n.ShWith(typed, "luks-kms-agent recovery-key test"); strings.Count(tested, "opens\n") != 2 {
		t.Errorf("test:\n%s", tested)
	}
	if r := n.TryWith([]byte(key[:7]+"?"+key[8:]), "luks-kms-agent recovery-key test"); r.Code != 2 || !strings.Contains(r.Stderr, "group 2 of 8 has a typo") {
		t.Errorf("with a typo: %s", r)
	}

	state := n.State()
	kmsKey := map[string]any{"KeyId": n.Key}
	n.Administer("DisableKey", kmsKey, nil)
	n.Reboot()
	if code := n.AwaitAgent(); code != "4" {
		t.Fatalf("without KMS the service ended with exit code %s\n%s", code, n.Journal())
	}
	wantMounted(t, n)
	unlocked := n.ShWith([]byte(key), "luks-kms-agent unlock --recovery-key")
	if !strings.Contains(unlocked, "2 unlocked") || !strings.Contains(unlocked, "0 Decrypt") {
		t.Errorf("unlock --recovery-key:\n%s", unlocked)
	}
	wantMounted(t, n, "/mnt", "/mnt1")
	wantFiles(t, n, files, "opened by the recovery key", "/mnt", "/mnt1")
	// All is open, so the service has nothing to ask for.
	n.Sh("systemctl restart luks-kms-agent.service luks-kms-agent.target")
	if after := n.State(); after != state {
		t.Errorf("records changed:\n%s\n%s", state, after)
	}

	n.Administer("EnableKey", kmsKey, nil)
	if removed := n.Sh("luks-kms-agent recovery-key remove /mnt /mnt1"); strings.Count(removed, "removed from") != 2 {
		t.Errorf("remove:\n%s", removed)
	}
	n.Sh("luks-kms-agent lock")
	if r := n.TryWith([]byte(key), "luks-kms-agent unlock --recovery-key"); r.Code != 3 || !strings.Contains(r.Stderr, "has no recovery key") {
		t.Errorf("with the removed key: %s", r)
	}
	wantMounted(t, n)
	n.Sh("luks-kms-agent unlock")
	wantFiles(t, n, files, "after the recovery key was removed", "/mnt", "/mnt1")
	if found := n.ShWith([]byte(key), "grep -rlaFf - /run /var /etc /root /tmp; journalctl --all --no-pager -o export | grep -caFf <(echo "+key[:17]+") || true"); strings.TrimSpace(found) != "0" {
		t.Errorf("the recovery key stands in %s", found)
	}
}
