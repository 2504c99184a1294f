//go:build vm

package vm_test

import (
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestHeaderVerbs: headers are backed up while the volumes are in use, and verified. One is destroyed, and restored, with a power cut in the
// middle. The other volume is wiped, with a power cut in the middle: no run touches it until the wipe is done, and then it is a new volume.
func TestHeaderVerbs(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\ndevice_wait: 1s\n", ebs1, ebs2)
	n.Resume()
	n.AwaitVolumes()
	files := writeFiles(n, "/mnt", "/mnt1")
	kept := digestFiles(n, "/mnt")
	old := volumes(t, n)["/mnt1"].UUID
	point := map[string]string{} // by identity
	for where, v := range volumes(t, n) {
		point[v.Identity] = where
	}
	const first, second = "vol-0aaaaaaaaaaaaaaa1", "vol-0bbbbbbbbbbbbbbb2"
	if point[first] != "/mnt" || point[second] != "/mnt1" {
		t.Fatalf("mounted: %v", point)
	}

	if r := n.Agent("header backup --to /mnt"); r.Code != 2 {
		t.Errorf("a backup on the volume itself: %s", r)
	}
	n.Sh("mkdir -m 0700 /root/headers && luks-kms-agent header backup --to /root/headers")
	n.Sh("cd /root/headers && for f in *.tar; do tar -xf $f && sha256sum --quiet -c SHA256SUMS; done")
	if out := n.Sh("luks-kms-agent verify"); strings.Count(out, "ok ") != 2 {
		t.Errorf("verify: %s", out)
	}
	if r := n.Agent("header restore /root/headers/" + first + ".*.tar --yes"); r.Code != 3 || !strings.Contains(r.Stderr, "it is open") {
		t.Errorf("restore while it is open: %s", r)
	}
	if r := n.Agent("wipe " + second + " --yes --identity " + second); r.Code != 3 || !strings.Contains(r.Stderr, "it is open") {
		t.Errorf("wipe while it is open: %s", r)
	}

	n.Sh("luks-kms-agent lock; dd if=/dev/urandom of=" + byID(ebs1) + " bs=1M count=3 conv=nocreat,notrunc,fsync status=none")
	if r := n.Agent("verify"); r.Code != 7 {
		t.Errorf("verify without a header: %s", r)
	}
	n.HoldCommand("the key slots are restored", "header restore /root/headers/"+first+".*.tar --yes")
	n.PowerCut()
	n.Boot()
	if code := n.AwaitAgent(); code != "7" {
		t.Errorf("with a header that is half restored the service ended with %s: %s", code, n.Journal())
	}
	n.Sh("luks-kms-agent header restore $(ls /root/headers/" + first + ".*.tar) --yes && luks-kms-agent unlock && luks-kms-agent verify")
	wantFiles(t, n, files, "after the restore", "/mnt", "/mnt1")

	n.Sh("luks-kms-agent lock")
	n.HoldCommand("the key slots are wiped", "wipe "+second+" --yes --identity "+second)
	n.PowerCut()
	n.Boot()
	if code := n.AwaitAgent(); code != "3" {
		t.Errorf("with a wipe that was cut the service ended with %s: %s", code, n.Journal())
	}
	wantFiles(t, n, kept, "after a wipe of the other was cut", "/mnt")
	out := n.Sh("luks-kms-agent wipe " + second + " --yes --identity " + second)
	if !strings.Contains(out, "the disk is proven blank") || !strings.Contains(out, "still opens the data") || !strings.Contains(out, "The next run formats it") {
		t.Errorf("wipe: %s", out)
	}
	if out := n.Agent("inspect " + byID(ebs2)); !strings.Contains(out.Stdout, "content: blank") {
		t.Errorf("after the wipe: %s", out)
	}
	n.Sh("luks-kms-agent run")
	wantFiles(t, n, kept, "after all", "/mnt")
	if now := volumes(t, n)["/mnt1"]; now.UUID == old || now.State != "mounted" {
		t.Errorf("%+v", now)
	}
}
