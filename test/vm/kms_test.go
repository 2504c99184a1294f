//go:build vm

package vm_test

import (
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestKeyScopeVolume: each volume has a data key of its own, and no other opens it.
func TestKeyScopeVolume(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "key_scope: volume\nfilesystem: ext4\n", ssd1, ebs1, ebs2)
	n.Resume()
	n.AwaitVolumes()
	wantCalls(t, n, 3, 3, 3)
	wantMounted(t, n, "/mnt", "/mnt1", "/mnt2")
	files := writeFiles(n, "/mnt", "/mnt1", "/mnt2")
	keys := n.KeyRecords()
	if len(keys) != 3 {
		t.Fatalf("%d key records, want 3", len(keys))
	}
	for _, v := range volumes(t, n) {
		for _, key := range keys {
			opens := n.TryWith([]byte(n.Unwrap(key)), "cryptsetup open --test-passphrase --key-file=- "+v.Device).Code == 0
			if opens != (key.ID == v.KeyID) {
				t.Errorf("key %s opens %s (key %s): %v", key.ID, v.Device, v.KeyID, opens)
			}
		}
	}
	n.Shuffle()
	n.Reboot()
	n.AwaitVolumes()
	wantCalls(t, n, 0, 3, 0)
	wantFiles(t, n, files, "after the reboot", "/mnt", "/mnt1", "/mnt2")
}
