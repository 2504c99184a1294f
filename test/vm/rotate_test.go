//go:build vm

package vm_test

import (
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestRotate: the volumes of a running node get a new data key, with a power cut when the first has its new key slot and its old one;
// somebody's own passphrase stays.
func TestRotate(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1, ebs1)
	n.Resume()
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt", "/mnt1")
	files := writeFiles(n, "/mnt", "/mnt1")
	was := n.KeyRecords()[0]
	device := volumes(t, n)["/mnt"].Device
	n.ShWith([]byte(n.Unwrap(was)), "cat >/run/key && printf mine >/run/mine && cryptsetup luksAddKey --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "+
		"--key-file=/run/key "+device+" /run/mine; rm /run/key")

	n.HoldCommand("the token names the new key slot", "rotate")
	n.PowerCut()
	n.Boot()
	n.AwaitVolumes()
	wantFiles(t, n, files, "after a cut with two key slots", "/mnt", "/mnt1")
	if status := n.Sh("luks-kms-agent status"); strings.Count(status, "its data key is being replaced") != 2 {
		t.Errorf("status:\n%s", status)
	}
	if records := n.KeyRecords(); len(records) != 2 {
		t.Errorf("%d key records while a rotation is under way", len(records))
	}

	out := n.Sh("luks-kms-agent rotate") // while both are mounted
	if strings.Count(out, " rotated") != 2 {
		t.Errorf("after the cut:\n%s", out)
	}
	records := n.KeyRecords()
	if len(records) != 1 || records[0].ID == was.ID {
		t.Errorf("key records: %+v", records)
	}
	device = volumes(t, n)["/mnt"].Device
	for d, want := range map[string]string{device: "2\n", volumes(t, n)["/mnt1"].Device: "1\n"} {
		if slots := n.Sh("cryptsetup luksDump " + d + " | grep -c ': luks2$'"); slots != want {
			t.Errorf("key slots of %s: %s", d, slots)
		}
	}
	n.Sh("printf mine | cryptsetup open --test-passphrase --key-file=- " + device)
	n.Sh("luks-kms-agent lock && luks-kms-agent unlock")
	wantFiles(t, n, files, "after rotate", "/mnt", "/mnt1")

	// The new tokens are enough.
	n.Sh("luks-kms-agent lock && rm -r /var/lib/luks-kms-agent && luks-kms-agent run")
	wantFiles(t, n, files, "adopted by the new tokens", "/mnt", "/mnt1")
}
