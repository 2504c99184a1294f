//go:build vm

package vm_test

import (
	"bytes"
	"encoding/base64"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestForeignDataIsRefused: somebody's filesystem, and bytes that nobody knows, stay as they are; the rest of the node works.
func TestForeignDataIsRefused(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "", ssd1, ebs1, ebs2)
	n.MakeExt4("ebs1", "precious")
	n.Fill("ebs2", harness.DiskSize-5<<20, []byte("a few bytes without any signature"))
	before := n.Digests(0)
	n.Resume()
	if code := n.AwaitAgent(); code != "3" {
		t.Errorf("the service ended with exit code %s, want 3:\n%s", code, n.Journal())
	}
	wantMounted(t, n, "/mnt")
	journal := n.Journal()
	for _, word := range []string{"ext4", "precious", "vol-0aaaaaaaaaaaaaaa1", "vol-0bbbbbbbbbbbbbbb2", "not blank", "exclude:"} {
		if !strings.Contains(journal, word) {
			t.Errorf("the journal does not say %q:\n%s", word, journal)
		}
	}
	n.PowerOff()
	if changed := harness.ChangedDisks(before, n.Digests(0)); !slices.Equal(changed, []string{"ssd1"}) {
		t.Errorf("disks were written to: %v, want ssd1 alone", changed)
	}
}

// TestBootDiskIsNeverACandidate: it looks like any EBS volume and is the only disk; not even by name is it touched.
func TestBootDiskIsNeverACandidate(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "")
	n.Boot()
	n.AwaitVolumes()
	wantCalls(t, n, 0, 0, 0)
	plan := n.Agent("plan")
	if plan.Code != 0 || !strings.Contains(plan.Stdout, "vol-0b007b007b007b007") || !strings.Contains(plan.Stdout, "/ is on /dev/nvme0n1p1") ||
		!strings.Contains(plan.Stdout, "Nothing would be changed.") {
		t.Errorf("plan: %s", plan)
	}
	const start = "head -c 1M /dev/nvme0n1 | sha256sum" // the partition table and what lies before the first partition
	before := n.Sh(start)
	for _, name := range []string{
		"/dev/nvme0n1", "vol-0b007b007b007b007", "vol0b007b007b007b007", "/dev/nvme0n1p1",
		"/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0b007b007b007b007",
	} {
		n.Write("/root/named.yaml", 0o600, n.Config("volumes:\n  - name: "+name+"\n    mount_point: /data\n"))
		r := n.Agent("--config /root/named.yaml run")
		if r.Code != 3 && r.Code != 6 {
			t.Errorf("want exit code 3 (in use) or 6 (a partition is no volume) of %s", r)
		}
		if !strings.Contains(r.Stderr, "nvme0n1") {
			t.Errorf("the refusal of %s does not name the disk: %s", name, r)
		}
	}
	wantMounted(t, n)
	wantCalls(t, n, 0, 0, 0)
	if after := n.Sh(start); after != before {
		t.Error("the boot disk was written to")
	}
}

// TestDamagedAndTamperedHeaders: damage of the first header copy is mended, tampering is refused, and neither keeps the
// other volumes from opening.
func TestDamagedAndTamperedHeaders(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, plainAtData, ssd1, ssd2, ebs1, ebs2, plain)
	n.Boot()
	n.AwaitVolumes()
	files := writeFiles(n, "/mnt", "/mnt1")
	state := n.State()
	n.PowerOff()

	n.DamagePrimary("ssd1")
	token := func(edit func(map[string]any)) func(map[string]any) {
		return func(metadata map[string]any) { edit(metadata["tokens"].(map[string]any)["0"].(map[string]any)) }
	}
	n.Tamper("ebs1", token(func(token map[string]any) {
		// A plausible MAC, only of something else.
		name, mac := macOf(token)
		mac[0] ^= 1
		token[name] = base64.StdEncoding.EncodeToString(mac)
	}))
	n.Tamper("ebs2", func(metadata map[string]any) {
		// The attack of CVE-2025-59054: what is written then is plaintext.
		segment := metadata["segments"].(map[string]any)["0"].(map[string]any)
		segment["encryption"] = "cipher_null-ecb"
	})
	n.Tamper("plain", func(metadata map[string]any) {
		// A digest without bytes takes any passphrase.
		digest := metadata["digests"].(map[string]any)["0"].(map[string]any)
		digest["digest"] = ""
	})
	before := n.Digests(0)

	n.Boot()
	if code := n.AwaitAgent(); code != "7" {
		t.Errorf("the service ended with exit code %s, want 7:\n%s", code, n.Journal())
	}
	wantMounted(t, n, "/mnt", "/mnt1")
	wantFiles(t, n, files, "of the other volumes", "/mnt", "/mnt1")
	journal := n.Journal()
	for _, word := range []string{"restored from the secondary", "cipher_null-ecb", "Do not use the volume"} {
		if !strings.Contains(journal, word) {
			t.Errorf("the journal does not say %q:\n%s", word, journal)
		}
	}
	if after := n.State(); after != state {
		t.Errorf("records changed:\n%s\n%s", state, after)
	}
	if out := n.Sh("dmsetup ls --target crypt"); strings.Count(out, "luks-") != 2 {
		t.Errorf("mapped: %s", out)
	}
	n.Sh("cryptsetup luksDump /dev/disk/by-id/nvme-Amazon_EC2_NVMe_Instance_Storage_AWS11111111111111111")
	n.PowerOff()
	changed := harness.ChangedDisks(before, n.Digests(0))
	if !slices.Equal(changed, []string{"ssd1", "ssd2"}) {
		t.Errorf("disks were written to: %v, want those that were opened", changed)
	}
}

// macOf finds the one field of a token that is 32 bytes in base64.
func macOf(token map[string]any) (name string, mac []byte) {
	for name, value := range token {
		text, ok := value.(string)
		if !ok {
			continue
		}
		if b, err := base64.StdEncoding.DecodeString(text); err == nil && len(b) == 32 {
			return name, b
		}
	}
	return "", bytes.Repeat([]byte{1}, 32)
}
