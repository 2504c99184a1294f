//go:build vm

package vm_test

import (
	"os"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestNewerUserland: a node goes from Debian 12 to 13 and back, with the records of the one before. What either made, with its kernel,
// cryptsetup and mkfs, the other opens, rotates and verifies; on 13 the package, the sandboxed units and the udev rule work as on 12.
func TestNewerUserland(t *testing.T) {
	parallel(t)
	trixie, err := assets.Userland(t.Context(), harness.Announce(os.Stdout), harness.Trixie)
	if err != nil {
		t.Fatal(err)
	}
	ext4 := away(harness.EBS("ext4", "0cccccccccccccccc"))
	n := harness.NewNode(t, assets, "device_wait: 0s\n", ssd1, ebs1, away(ebs2), ext4)
	versions := func() string {
		return n.Sh(". /etc/os-release; systemctl --version | head -n 1; cryptsetup --version; uname -sr; mkfs.xfs -V; mkfs.ext4 -V 2>&1 | head -n 1; echo Debian $VERSION_ID")
	}
	n.Resume()
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt", "/mnt1")
	before := versions()
	t.Logf("made by\n%s", before)
	old := writeFiles(n, "/mnt", "/mnt1")
	made := n.KeyRecords()

	n.Become(trixie)
	n.Boot()
	n.AwaitVolumes()
	after := versions()
	t.Logf("opened by\n%s", after)
	if !strings.HasSuffix(before, "Debian 12\n") || !strings.HasSuffix(after, "Debian 13\n") {
		t.Errorf("the node went from\n%sto\n%s", before, after)
	}
	wantFiles(t, n, old, "under Debian 13", "/mnt", "/mnt1")
	if got := n.KeyRecords(); len(got) != 1 || got[0].ID != made[0].ID {
		t.Errorf("key records: %+v, before %+v", got, made)
	}

	// The udev rule starts the unit for attached disks, and new volumes are made: xfs, and ext4.
	n.Write(harness.ConfigFile, 0o600, n.Config("device_wait: 0s\nvolumes:\n  - name: vol-0cccccccccccccccc\n    mount_point: /data\n    filesystem: ext4\n"))
	n.AttachForGood("ebs2", "ext4")
	awaitInstances(n)
	wantMounted(t, n, "/data", "/mnt", "/mnt1", "/mnt2")
	recent := writeFiles(n, "/mnt2", "/data")
	if types := n.Sh("findmnt -no FSTYPE /mnt2; findmnt -no FSTYPE /data"); types != "xfs\next4\n" {
		t.Errorf("filesystems of /mnt2 and /data: %q", types)
	}
	if out := n.Sh("luks-kms-agent rotate"); strings.Count(out, " rotated") != 4 {
		t.Errorf("rotate:\n%s", out)
	}
	n.Sh("mkdir -m 0700 /root/headers && luks-kms-agent header backup --to /root/headers")
	if out := n.Sh("luks-kms-agent verify"); strings.Count(out, "ok ") != 4 {
		t.Errorf("verify:\n%s", out)
	}

	// The package and the units.
	if got := n.Sh("dpkg-query -W -f '${db:Status-Status}\\n' luks-kms-agent; dpkg -V luks-kms-agent | grep -v ' c /etc/' || true"); got != "installed\n" {
		t.Errorf("dpkg: %s", got)
	}
	n.Sh("systemd-analyze verify --man=no luks-kms-agent.service luks-kms-agent.target luks-kms-agent-stripe.service luks-kms-agent@.service luks-kms-agent-escrow.service luks-kms-agent-escrow.timer")
	figure := n.Sh("systemd-analyze security --no-pager --threshold=30 luks-kms-agent.service >/run/exposure && tail -n 1 /run/exposure")
	t.Logf("%s", figure)
	if strange := n.Sh("journalctl -b -o cat _PID=1 | grep -i 'luks-kms-agent.*\\(unknown\\|ignoring\\|deprecated\\)' || true"); strange != "" {
		t.Errorf("systemd says:\n%s", strange)
	}
	wantFailed(t, n)

	n.Become(assets)
	n.Boot()
	n.AwaitVolumes()
	wantMounted(t, n, "/data", "/mnt", "/mnt1", "/mnt2")
	wantFiles(t, n, old, "back under Debian 12", "/mnt", "/mnt1")
	wantFiles(t, n, recent, "back under Debian 12", "/mnt2", "/data")
	n.Sh("mkdir -m 0700 /root/headers && luks-kms-agent header backup --to /root/headers")
	if out := n.Sh("luks-kms-agent verify"); strings.Count(out, "ok ") != 4 {
		t.Errorf("verify under Debian 12:\n%s", out)
	}
}
