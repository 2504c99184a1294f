// Command demo runs the main job in a VM on this machine and tells it as it goes: the first boot of a node with four EC2
// disks and a plain one, a reboot, a search of the raw disks, and one volume locked and unlocked by hand. It ends with
// "demo: OK", or with what failed and where the logs are.
package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

func main() {
	if !harness.Tell("demo", story) {
		fmt.Println("demo: FAILED")
		os.Exit(1)
	}
	fmt.Println("\ndemo: OK")
}

const (
	config = "volumes:\n  - name: /dev/loop0\n    mount_point: /data\n    filesystem: ext4\n"
	line   = "this line stands in a file on an encrypted volume"
)

var points = []string{"/mnt", "/mnt1", "/mnt2", "/mnt3", "/data"}

func story(t harness.TB) {
	step := harness.Announce(os.Stdout)
	heading("Getting ready")
	assets, err := harness.Prepare(context.Background(), step)
	if err != nil {
		t.Fatalf("cannot get ready: %v", err)
	}
	t.Cleanup(func() {
		if err := assets.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
	done := step("starting local-kms and the instance metadata mock on the loopback address")
	n := harness.NewNode(t, assets, config,
		harness.InstanceStore("ssd1", "AWS11111111111111111"), harness.InstanceStore("ssd2", "AWS22222222222222222"),
		harness.EBS("ebs1", "0aaaaaaaaaaaaaaa1"), harness.EBS("ebs2", "0bbbbbbbbbbbbbbb2"), harness.Loop("plain", "/dev/loop0"))
	done()

	files := firstBoot(t, n, step)
	reboot(t, n, step, files)
	rawDisks(t, n, step)
	byHand(t, n, step, files)
}

func firstBoot(t harness.TB, n *harness.Node, step harness.Step) (files string) {
	heading("First boot: two instance-store disks, two EBS volumes and a loop device, all blank")
	show("The whole configuration", n.Config(config))
	done := step("booting the node")
	n.Boot()
	done()
	done = step("luks-kms-agent.service formats, opens and mounts")
	n.AwaitVolumes()
	done()
	show("The plan, with its reasons", plan(t, n))
	calls(t, n, 1, 1, "one GenerateDataKey, and the Decrypt that proves it")
	show("lsblk", n.Sh("lsblk -o NAME,SIZE,TYPE,FSTYPE,MOUNTPOINTS,SERIAL --exclude 252,253 2>/dev/null || lsblk"))
	show("The header of an EBS volume", n.Sh("luks-kms-agent inspect /dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1")+
		n.Sh("cryptsetup luksDump /dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1 | grep -E '^(Version|UUID|Label|Subsystem)|Cipher key|PBKDF|sector|[0-9]: luks'"))
	done = step("writing a file on every volume")
	var script strings.Builder
	for _, point := range points {
		fmt.Fprintf(&script, "yes '%s, %s' | head -c 200000 >%s/file; ", line, point, point)
	}
	n.Sh("set -e; " + script.String() + "sync")
	done()
	files = digests(n)
	show("SHA-256", files)
	return files
}

func reboot(t harness.TB, n *harness.Node, step harness.Step, files string) {
	heading("Reboot: the disks come up in another order")
	n.Shuffle()
	done := step("shutting down")
	n.PowerOff()
	done()
	done = step("booting the node")
	n.Boot()
	n.AwaitVolumes()
	done()
	show("The plan, with its reasons", plan(t, n))
	calls(t, n, 0, 1, "one Decrypt for all volumes")
	now := digests(n)
	show("SHA-256", now)
	if now != files {
		t.Fatalf("the files are not what they were:\n%s", files)
	}
	fmt.Println("  The same as before the reboot.")
}

func rawDisks(t harness.TB, n *harness.Node, step harness.Step) {
	heading("What somebody sees who has the disks")
	done := step("searching the raw disk images for what the files say")
	n.Sh("sync")
	for _, disk := range []string{"ssd1", "ssd2", "ebs1", "ebs2", "plain"} {
		if found := n.Find(disk, []byte(line)); len(found) > 0 {
			t.Fatalf("%v stands on the raw disk %s", found, disk)
		}
		// The same search does find what is there.
		if found := n.Find(disk, []byte("LUKS\xba\xbe"), []byte("luks-kms-agent")); len(found) != 2 {
			t.Fatalf("the search found only %v on %s", found, disk)
		}
		fmt.Printf("  %-5s LUKS header found, the files' content not found\n", disk)
	}
	done()
}

func byHand(t harness.TB, n *harness.Node, step harness.Step, files string) {
	heading("By hand: lock one volume and unlock it")
	done := step("lock and unlock")
	for _, command := range []string{"luks-kms-agent lock /mnt2", "luks-kms-agent status", "luks-kms-agent unlock vol-0aaaaaaaaaaaaaaa1"} {
		show("# "+command, n.Sh(command))
	}
	done()
	calls(t, n, 0, 1, "one Decrypt for the volume")
	if now := digests(n); now != files {
		t.Fatalf("the files are not what they were:\n%s", now)
	}
}

// plan shows what the last run did with each disk and why.
func plan(t harness.TB, n *harness.Node) string {
	volumes, ok := n.Status()["volumes"].([]any)
	if !ok {
		t.Fatalf("the status has no volumes")
	}
	var b strings.Builder
	for _, entry := range volumes {
		v := entry.(map[string]any)
		fmt.Fprintf(&b, "%-7s %-14v %-22v %-14v %-6s %v\n", text(v["action"]), text(v["device"]), text(v["identity"]), text(v["class"]), text(v["mount_point"]), v["reason"])
	}
	return b.String()
}

func text(v any) string {
	if v == nil {
		return "-"
	}
	return fmt.Sprint(v)
}

// calls shows what KMS has seen since the last time, and checks it.
func calls(t harness.TB, n *harness.Node, generate, decrypt int, meaning string) {
	var b strings.Builder
	for _, call := range n.KMS.Calls() {
		fmt.Fprintln(&b, call)
	}
	show("What KMS has seen: "+meaning+"; no encryption context", b.String())
	if n.KMS.Count("GenerateDataKey") != generate || n.KMS.Count("Decrypt") != decrypt {
		t.Fatalf("that is not GenerateDataKey %d, Decrypt %d", generate, decrypt)
	}
	n.KMS.Forget()
}

func digests(n *harness.Node) string {
	return n.Sh("sha256sum " + strings.Join(points, "/file ") + "/file")
}

func heading(text string) { fmt.Printf("\n== %s ==\n", text) }

func show(title, text string) {
	fmt.Printf("%s:\n", title)
	for l := range strings.Lines(text) {
		fmt.Printf("    %s\n", strings.TrimRight(l, "\n"))
	}
}
