//go:build vm

package vm_test

import (
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// keySlots are the numbers of the key slots of each volume, as cryptsetup sees them.
const keySlots = "for d in $(lsblk -dnpo NAME | grep -v nvme0n1); do cryptsetup luksDump $d 2>/dev/null | sed -n '/^Keyslots:/,/^Tokens:/p'; done"

// TestRewrap: the data keys of a running node come under another KMS key, with a power cut between the record and the tokens; then
// the old KMS key is taken away, and at last the records.
func TestRewrap(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1, ebs1)
	n.Boot()
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt", "/mnt1")
	files := writeFiles(n, "/mnt", "/mnt1")
	slots := n.Sh(keySlots)
	to := n.CreateKey(map[string]string{})

	n.HoldCommand("the key record is rewrapped", "rewrap --to "+to)
	n.PowerCut()
	n.Boot()
	n.AwaitVolumes()
	wantFiles(t, n, files, "after a cut between record and tokens", "/mnt", "/mnt1")

	out := n.Sh("luks-kms-agent rewrap --to " + to)
	if strings.Count(out, "rewrapped") != 2 || strings.Count(out, "already there") != 1 {
		t.Errorf("after the cut:\n%s", out)
	}
	if again := n.Sh("luks-kms-agent rewrap --to " + to); strings.Count(again, "already there") != 3 {
		t.Errorf("again:\n%s", again)
	}
	if now := n.Sh(keySlots); now != slots {
		t.Errorf("key slots were\n%s\nand are\n%s", slots, now)
	}
	wantFiles(t, n, files, "after rewrap", "/mnt", "/mnt1")

	n.Administer("DisableKey", map[string]string{"KeyId": n.Key}, nil)
	n.Provide(harness.ConfigFile, 0o600, n.ConfigFor(to, "filesystem: ext4\n"))
	n.Reboot()
	n.AwaitVolumes()
	wantFiles(t, n, files, "without the old KMS key", "/mnt", "/mnt1")
	n.Sh("luks-kms-agent lock && rm -r /var/lib/luks-kms-agent && luks-kms-agent run")
	wantFiles(t, n, files, "adopted by the new tokens", "/mnt", "/mnt1")
}
