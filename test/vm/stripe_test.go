//go:build vm

package vm_test

import (
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// noArraysBelow keeps mdadm's udev rules from the storage of the disks, which shows what the disks show.
func noArraysBelow(n *harness.Node) {
	n.Provide("/etc/udev/rules.d/63-story.rules", 0o644, "KERNEL==\"vd*\", ENV{ID_FS_TYPE}=\"\"\n")
}

const stripeUnit = "luks-kms-agent-stripe.service"

// wantStripe wants a volume of ours on a stripe of exactly those disks.
func wantStripe(t *testing.T, n *harness.Node, when, at string, serials ...string) {
	t.Helper()
	list := n.Sh("lsblk -snro TYPE,SERIAL $(findmnt -no SOURCE " + at + ")")
	kinds, disks := map[string]int{}, 0
	for line := range strings.Lines(list) {
		kind, serial, _ := strings.Cut(strings.TrimSpace(line), " ")
		kinds[kind]++
		for _, s := range serials {
			if serial == s {
				disks++
			}
		}
	}
	if kinds["crypt"] != 1 || kinds["raid0"] != 1 || disks != len(serials) {
		t.Errorf("%s: %s is on\n%s", when, at, list)
	}
	if unit := n.Unit(stripeUnit); unit["Result"] != "success" {
		t.Errorf("%s: %s: %v\n%s", when, stripeUnit, unit, n.Sh("journalctl -b -o cat -u "+stripeUnit))
	}
	if failed := n.Sh("systemctl --failed --no-legend"); failed != "" {
		t.Errorf("%s: failed: %s", when, failed)
	}
}

// TestStripe: two instance-store volumes become one, by the sandboxed unit, which is formatted, opened at the next boots whoever assembles it, and
// made anew of other disks after a stop. With a disk taken away it is told, and comes back.
func TestStripe(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "stripe_instance_store: on\ndevice_wait: 2s\nvolumes:\n  - name: /dev/md/luks-kms-agent\n    mount_point: /scratch\n", ssd1, ssd2, ebs1)
	noArraysBelow(n)
	n.Boot()
	n.AwaitVolumes()
	wantStripe(t, n, "first boot", "/scratch", ssd1.Serial, ssd2.Serial)
	wantMounted(t, n, "/mnt", "/scratch")
	files := writeFiles(n, "/mnt", "/scratch")
	for _, disk := range []string{"ssd1", "ssd2"} {
		if found := n.Find(disk, []byte(marker)); len(found) > 0 {
			t.Errorf("%s shows %v", disk, found)
		}
	}
	if s := strings.TrimSpace(n.Sh("grep -c '\"event\":\"stripe-made\",\"result\":\"ok\"' /var/log/luks-kms-agent/audit.jsonl")); s != "1" {
		t.Errorf("the audit log has %s stripes made", s)
	}
	if s := n.Sh("luks-kms-agent plan"); !strings.Contains(s, "part of the stripe") {
		t.Errorf("plan: %s", s)
	}

	n.Reboot()
	n.AwaitVolumes()
	wantStripe(t, n, "reboot", "/scratch", ssd1.Serial, ssd2.Serial)
	wantFiles(t, n, files, "after a reboot", "/mnt", "/scratch")
	for _, command := range []string{"lock /scratch", "unlock /scratch", "verify"} {
		if r := n.Agent(command); r.Code != 0 {
			t.Errorf("%s: %s", command, r)
		}
	}

	// Without mdadm's udev rules nobody but the agent assembles it.
	n.Write("/etc/udev/rules.d/64-md-raid-assembly.rules", 0o644, "# none\n")
	n.Reboot()
	n.AwaitVolumes()
	wantStripe(t, n, "reboot without udev's assembly", "/scratch", ssd1.Serial, ssd2.Serial)
	wantFiles(t, n, files, "after the agent assembled the stripe", "/mnt", "/scratch")
	n.Sh("rm /etc/udev/rules.d/64-md-raid-assembly.rules; sync")

	n.Detach("ssd2")
	if r := n.Try("luks-kms-agent status"); !strings.Contains(r.Stdout, "its disk was taken away while it was mounted on /scratch") {
		t.Errorf("status without a disk: %s", r)
	}
	n.PowerCut()
	n.Boot()
	n.AwaitVolumes()
	wantStripe(t, n, "after the disk came back", "/scratch", ssd1.Serial, ssd2.Serial)
	wantFiles(t, n, files, "after the disk came back", "/mnt", "/scratch")

	n.PowerOff()
	n.Replace("ssd1", "AWS33333333333333333")
	n.Replace("ssd2", "AWS44444444444444444")
	n.Boot()
	n.AwaitVolumes()
	wantStripe(t, n, "stop and start", "/scratch", "AWS33333333333333333", "AWS44444444444444444")
	wantMounted(t, n, "/mnt", "/scratch")
	if archived := n.Sh("ls /var/lib/luks-kms-agent/archive/volumes/*.json | grep -vc why"); strings.TrimSpace(archived) != "1" {
		t.Errorf("%s archived volume records, want 1", archived)
	}
}

// TestStripeCut: the power goes while a stripe is made, in the middle of mdadm's work, and before the intent is taken away. Each
// time the next boot has one stripe of both disks. A disk that shows part of a stripe that nobody has begun to make is left as it is.
func TestStripeCut(t *testing.T) {
	parallel(t)
	const idle = "instance_store: unlock\ndevice_wait: 2s\n"
	n := harness.NewNode(t, assets, idle, ssd1, ssd2)
	noArraysBelow(n)
	striping := n.Config("stripe_instance_store: on\ndevice_wait: 2s\n")
	// stop has the power go while a stripe is made, on blank disks, and boot goes on from there.
	stop := func(step string) {
		t.Helper()
		n.Replace("ssd1", ssd1.Serial)
		n.Replace("ssd2", ssd2.Serial)
		n.Provide(harness.ConfigFile, 0o600, n.Config(idle))
		n.Boot()
		n.AwaitAgent()
		n.Write("/root/striping.yaml", 0o600, striping)
		n.HoldCommand(step, "stripe --config /root/striping.yaml")
		n.PowerCut()
	}
	boot := func(when string) {
		t.Helper()
		n.Provide(harness.ConfigFile, 0o600, striping)
		n.Boot()
		n.AwaitVolumes()
		wantStripe(t, n, when, "/mnt", ssd1.Serial, ssd2.Serial)
		wantMounted(t, n, "/mnt")
		if left := n.Sh("ls /var/lib/luks-kms-agent/stripe.json 2>/dev/null || true"); left != "" {
			t.Errorf("%s: the intent is left", when)
		}
		n.PowerOff()
	}
	stop("the stripe is made")
	n.Fill("ssd2", 4096, make([]byte, 4096)) // as mdadm leaves it that has not come to the second disk
	boot("cut between the disks")

	stop("the stripe is made")
	boot("cut before the intent went")

	// Without an intent nobody knows whether the other disk had data.
	n.Fill("ssd2", 4096, make([]byte, 4096))
	before := n.Digests(0)
	n.Boot()
	if code := n.AwaitAgent(); code != "6" {
		t.Errorf("with half a stripe the run ended with exit code %s", code)
	}
	wantUntouched(t, n, before)
	if out := n.Sh("luks-kms-agent plan"); !strings.Contains(out, "1 of the 2 disks of") {
		t.Errorf("plan: %s", out)
	}
}
