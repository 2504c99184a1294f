//go:build vm

package vm_test

import (
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// TestKMSUnreachableAtBoot: the boot does not wait for KMS, consumers do, and nobody has to do anything when it returns.
func TestKMSUnreachableAtBoot(t *testing.T) {
	t.Parallel()
	n := harness.NewNode(t, assets, "retry_limit: 15s\ncall_timeout: 3s\n", ssd1, ebs1)
	n.Boot()
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt", "/mnt1")
	files := writeFiles(n, "/mnt", "/mnt1")

	n.KMS.Inject(down)
	n.Reboot() // logins are possible
	n.Await("the agent says that it retries", time.Minute, func() bool {
		unit := n.Unit("luks-kms-agent.service")
		return unit["ActiveState"] == "activating" && strings.Contains(unit["StatusText"], "Decrypt")
	})
	if state := n.Unit("consumer.service")["ActiveState"]; state != "inactive" {
		t.Errorf("the consumer is %s while the volumes are locked", state)
	}
	wantMounted(t, n)
	n.Await("systemd restarts the agent", 2*time.Minute, func() bool { return n.Unit("luks-kms-agent.service")["NRestarts"] != "0" })
	if journal := n.Journal(); !strings.Contains(journal, "status=5") && !strings.Contains(n.Sh("journalctl -b -u luks-kms-agent.service"), "status=5") {
		t.Errorf("the agent did not end with the retryable exit code:\n%s", journal)
	}
	if state := n.Unit("consumer.service")["ActiveState"]; state != "inactive" {
		t.Errorf("the consumer is %s while the volumes are locked", state)
	}

	n.KMS.Inject()
	n.AwaitActive("consumer.service", 2*time.Minute)
	wantMounted(t, n, "/mnt", "/mnt1")
	wantFiles(t, n, files, "after KMS returned", "/mnt", "/mnt1")
	if saw := n.Sh("cat /run/consumer-saw"); !strings.Contains(saw, "/mnt1\n") {
		t.Errorf("the consumer started before the volumes were mounted: %s", saw)
	}
}

// TestKMSDenies: without the permissions nothing is formatted, whichever of them is missing; only DescribeKey is optional.
func TestKMSDenies(t *testing.T) {
	t.Parallel()
	n := harness.NewNode(t, assets, "", ssd1, ebs1)
	blank := n.Digests(0)
	n.KMS.Inject(denied)
	n.Boot()
	if code := n.AwaitAgent(); code != "4" {
		t.Errorf("the service ended with exit code %s, want 4:\n%s", code, n.Journal())
	}
	if journal := n.Journal(); !strings.Contains(journal, "kms:GenerateDataKey and kms:Decrypt") {
		t.Errorf("the journal does not name the remedy:\n%s", journal)
	}
	if restarts := n.Unit("luks-kms-agent.service")["NRestarts"]; restarts != "0" {
		t.Errorf("the service was restarted %s times: that mends no permission", restarts)
	}
	wantUntouched(t, n, blank)

	// A data key that this node could not get back locks no disk.
	n.KMS.Inject(proxy.Fault{Kind: proxy.Deny, Ops: []string{"Decrypt"}})
	wantRefusal(t, n.Agent("run"), 4, "kms:Decrypt")
	wantUntouched(t, n, blank)
	wantMounted(t, n)

	n.KMS.Inject(proxy.Fault{Kind: proxy.Deny, Ops: []string{"DescribeKey"}})
	n.KMS.Forget()
	n.Sh("systemctl restart luks-kms-agent.service")
	wantMounted(t, n, "/mnt", "/mnt1")
	// The data key that could not be proven before is good enough now: records do not pile up.
	if n.KMS.Count("Decrypt") != 1 || len(n.KeyRecords()) != 1 {
		t.Errorf("%d key records; KMS calls: %v", len(n.KeyRecords()), n.KMS.Calls())
	}
}

// TestKeyScopeVolume: each volume has a data key of its own, and no other opens it.
func TestKeyScopeVolume(t *testing.T) {
	t.Parallel()
	n := harness.NewNode(t, assets, "key_scope: volume\nfilesystem: ext4\n", ssd1, ebs1, ebs2)
	n.Boot()
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
