//go:build vm

package vm_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestFirstBootAndReboot is the main job: five blank volumes of three kinds become LUKS2 volumes at the first boot, are open
// again after a reboot under other kernel names, and open with cryptsetup and nothing but what KMS answers.
func TestFirstBootAndReboot(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, plainAtData, ssd1, ssd2, ebs1, ebs2, plain)
	atTheSameTime(n)
	points := []string{"/data", "/mnt", "/mnt1", "/mnt2", "/mnt3"}

	n.Boot()
	n.AwaitVolumes()
	wantCalls(t, n, 1, 1, 1)
	wantMounted(t, n, points...)
	wantPlanWithReasons(t, n)
	for _, v := range volumes(t, n) {
		wantSpecifiedHeader(t, n, v)
	}
	wantPlaces(t, n)
	if saw := mounted(n.Sh("findmnt -rno SOURCE,TARGET")); len(saw) != 5 || n.Unit("consumer.service")["ActiveState"] != "active" {
		t.Errorf("the consumer did not start")
	}
	if saw := n.Sh("cat /run/consumer-saw"); strings.Count(saw, "/mnt") != 4 || !strings.Contains(saw, "/data") {
		t.Errorf("the consumer saw only %s", saw)
	}
	files := writeFiles(n, points...)
	headers := n.Digests(headerArea)

	// A second run finds everything as it should be: nothing is asked, nothing is written.
	state := n.State()
	if r := n.Agent("run"); r.Code != 0 || !strings.Contains(r.Stdout, "5 already open") {
		t.Errorf("second run: %s", r)
	}
	wantCalls(t, n, 0, 0, 0)
	if after := n.State(); after != state {
		t.Errorf("a second run changed records:\n%s\n%s", state, after)
	}

	// Reboot, with other kernel names, and with a watch on every program that is executed.
	n.Write("/etc/systemd/system/luks-kms-agent.service.d/strace.conf", 0o644, "[Service]\nExecStart=\n"+
		"SystemCallFilter=@debug process_vm_readv\nCapabilityBoundingSet=CAP_SYS_PTRACE\n"+
		"ExecStart=/usr/bin/strace -f -v -s 65536 -e trace=execve,execveat -o /var/log/agent.strace /usr/bin/luks-kms-agent run\n")
	n.Shuffle()
	n.Reboot()
	n.AwaitVolumes()
	wantCalls(t, n, 0, 1, 0)
	wantMounted(t, n, points...)
	wantFiles(t, n, files, "after the reboot", points...)
	wantHeaders(t, n, headers)
	wantWritesOnlyThroughMappings(t, n)
	if after := n.State(); after != state {
		t.Errorf("a reboot changed records:\n%s\n%s", state, after)
	}
	if stopped := n.Sh("cat /mnt/consumer-stopped"); strings.Count(stopped, "/mnt") != 4 {
		t.Errorf("at the shutdown the consumer was stopped with only these mounted: %s", stopped)
	}
	if failed := n.Sh("journalctl -b -1 -o cat | grep -i 'failed unmounting' || true"); failed != "" {
		t.Errorf("at the shutdown: %s", failed)
	}
	executed := string(n.Read("/var/log/agent.strace"))
	if !strings.Contains(executed, `execve("/usr/bin/luks-kms-agent"`) || strings.Contains(executed, "cryptsetup") {
		t.Errorf("executed at a reboot:\n%s", executed)
	}
	n.Sh("rm -r /etc/systemd/system/luks-kms-agent.service.d && systemctl daemon-reload")

	// By hand: lock one volume by its mount point, unlock it by its EBS id.
	if r := n.Agent("lock /mnt2"); r.Code != 0 {
		t.Errorf("lock: %s", r)
	}
	wantMounted(t, n, "/data", "/mnt", "/mnt1", "/mnt3")
	locked := volumes(t, n)["/mnt2"]
	if locked.State != "locked" {
		t.Errorf("status of a locked volume: %+v", locked)
	}
	wantBreakGlass(t, n, locked)
	if r := n.Agent("unlock " + locked.Identity); r.Code != 0 {
		t.Errorf("unlock: %s", r)
	}
	wantMounted(t, n, points...)
	wantCalls(t, n, 0, 1, 0)
	wantFiles(t, n, files, "after lock and unlock", points...)

	for _, leak := range n.Leaks() {
		t.Errorf("leak: %s", leak)
	}
	n.PowerOff()
	// Magic and block size: the magic alone, 4 bytes, also comes about in 100 MB of ciphertext once in forty times.
	superblock := []byte("XFSB\x00\x00\x10\x00")
	for _, d := range []string{"ssd1", "ssd2", "ebs1", "ebs2", "plain"} {
		if found := n.Find(d, []byte(marker), []byte("plaintext-file"), superblock); len(found) > 0 {
			t.Errorf("on the raw disk %s stands %v", d, found)
		}
	}
}

// wantPlanWithReasons checks that the journal tells what was planned for each disk, with the evidence.
func wantPlanWithReasons(t *testing.T, n *harness.Node) {
	t.Helper()
	journal := n.Journal()
	if blank := strings.Count(journal, "proven blank"); blank < 5 {
		t.Errorf("%d volumes were proven blank, want 5:\n%s", blank, journal)
	}
	if !strings.Contains(journal, "nvme0n1p1") {
		t.Errorf("the boot disk was left alone without evidence:\n%s", journal)
	}
}

// wantPlaces checks that classes are mounted in their order: instance store before EBS.
func wantPlaces(t *testing.T, n *harness.Node) {
	t.Helper()
	v := volumes(t, n)
	for point, identity := range map[string]string{
		"/mnt": "AWS11111111111111111", "/mnt1": "AWS22222222222222222",
		"/mnt2": "vol-0aaaaaaaaaaaaaaa1", "/mnt3": "vol-0bbbbbbbbbbbbbbb2", "/data": "/dev/loop0",
	} {
		if v[point].Identity != identity {
			t.Errorf("on %s is %s, want %s", point, v[point].Identity, identity)
		}
	}
}

// wantSpecifiedHeader checks with cryptsetup that a header is what is specified.
func wantSpecifiedHeader(t *testing.T, n *harness.Node, v volume) {
	t.Helper()
	if v.UUID == "" {
		return
	}
	var metadata struct {
		Keyslots map[string]struct {
			KeySize int `json:"key_size"`
			KDF     struct {
				Type, Hash string
				Iterations int
			}
		}
		Segments map[string]struct {
			Encryption string
			SectorSize int `json:"sector_size"`
		}
		Tokens map[string]struct{ Type string }
	}
	if err := json.Unmarshal([]byte(n.Sh("cryptsetup luksDump --dump-json-metadata "+v.Device)), &metadata); err != nil {
		t.Fatalf("luksDump of %s: %v", v.Device, err)
	}
	slot, segment, token := metadata.Keyslots["0"], metadata.Segments["0"], metadata.Tokens["0"]
	got := fmt.Sprintln(len(metadata.Keyslots), slot.KeySize*8, slot.KDF.Type, slot.KDF.Hash, slot.KDF.Iterations,
		len(metadata.Segments), segment.Encryption, segment.SectorSize, len(metadata.Tokens), token.Type)
	if want := fmt.Sprintln(1, 512, "pbkdf2", "sha256", 1000, 1, "aes-xts-plain64", 4096, 1, "luks-kms-agent"); got != want {
		t.Errorf("header of %s: %swant %s", v.Device, got, want)
	}
	dump := strings.Join(strings.Fields(n.Sh("cryptsetup luksDump "+v.Device)), " ")
	for _, part := range []string{"UUID: " + v.UUID, "Subsystem: luks-kms-agent", "Version: 2"} {
		if !strings.Contains(dump, part) {
			t.Errorf("luksDump of %s does not say %q: %s", v.Device, part, dump)
		}
	}
	table := n.Sh("dmsetup table " + v.Mapping)
	if strings.HasPrefix(v.Device, "/dev/nvme") && !strings.HasSuffix(strings.TrimSpace(table), " 2 no_write_workqueue sector_size:4096") {
		t.Errorf("%s is mapped with other options: %s", v.Device, table)
	}
	if strings.Contains(dump, "Label: (no label)") {
		t.Errorf("%s has no label", v.Device)
	}
}

func wantHeaders(t *testing.T, n *harness.Node, before map[string]string) {
	t.Helper()
	if changed := harness.ChangedDisks(before, n.Digests(headerArea)); len(changed) > 0 {
		t.Errorf("headers were written to: %v", changed)
	}
}

// wantWritesOnlyThroughMappings checks that in this boot every sector that was written to a data disk was written through
// its mapping, by the filesystem: the agent itself wrote nothing.
func wantWritesOnlyThroughMappings(t *testing.T, n *harness.Node) {
	t.Helper()
	// Seventh field: sectors written (Documentation/admin-guide/iostats.rst). The kernel does not count for an NVMe disk with
	// multipath, so what is read is the virtio disk behind each.
	const script = `sync; for m in /dev/mapper/luks-*; do read -r _ _ _ _ _ _ w _ </sys/block/$(basename $(readlink $m))/stat; t=$((t + w)); done
for s in /sys/block/vd*; do case $(cat $s/serial) in manifest) ;; *) read -r _ _ _ _ _ _ w _ <$s/stat; d=$((d + w));; esac; done; echo $t $d`
	var through, disks int
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Second) {
		if _, err := fmt.Sscan(n.Sh(script), &through, &disks); err != nil {
			t.Fatal(err)
		}
		if through == disks && through > 0 {
			return
		}
	}
	t.Errorf("%d sectors were written to the disks, %d of them through the mappings", disks, through)
}

// wantBreakGlass opens a locked volume without the agent, as the README tells.
func wantBreakGlass(t *testing.T, n *harness.Node, v volume) {
	t.Helper()
	records := n.KeyRecords()
	if len(records) != 1 {
		t.Fatalf("%d key records, want 1", len(records))
	}
	base64 := n.Unwrap(records[0])
	n.ShWith([]byte(base64), "cryptsetup open --test-passphrase --key-file=- "+v.Device)
	n.ShWith([]byte(base64+"\n"), "cryptsetup open "+v.Device+" rescue && mkdir -p /rescue && mount -o ro,norecovery /dev/mapper/rescue /rescue")
	if got := n.Sh("head -n 1 /rescue/plaintext-file"); got != marker+v.MountPoint+"\n" {
		t.Errorf("with plain cryptsetup the file says %q", got)
	}
	n.Sh("umount /rescue && cryptsetup close rescue")
}

// TestEightVolumes is about size: one Decrypt for all of them, within 40 MiB of memory, also while KMS is busy.
func TestEightVolumes(t *testing.T) {
	parallel(t)
	const limit = 40 << 10 // KiB
	var disks []harness.Disk
	for i := range 4 {
		disks = append(disks, harness.InstanceStore(fmt.Sprintf("ssd%d", i), fmt.Sprintf("AWS%d", i)), harness.EBS(fmt.Sprintf("ebs%d", i), fmt.Sprintf("%017x", i)))
	}
	n := harness.NewNode(t, assets, "filesystem: ext4\n", disks...)
	atTheSameTime(n)
	points := []string{"/mnt", "/mnt1", "/mnt2", "/mnt3", "/mnt4", "/mnt5", "/mnt6", "/mnt7"}
	n.Boot()
	n.AwaitVolumes()
	wantCalls(t, n, 1, 1, 1)
	wantMounted(t, n, points...)
	files := writeFiles(n, points...)
	n.Write("/etc/systemd/system/luks-kms-agent.service.d/memory.conf", 0o644, "[Service]\nExecStart=\n"+
		"ExecStart=/usr/local/lib/story/guest rusage /run/agent-memory /usr/bin/luks-kms-agent run\n")
	n.Shuffle()
	n.Reboot()
	n.AwaitVolumes()
	wantCalls(t, n, 0, 1, 0)
	wantMounted(t, n, points...)
	wantFiles(t, n, files, "after the reboot", points...)
	var peak int
	if _, err := fmt.Sscan(n.Sh("cat /run/agent-memory"), &peak); err != nil {
		t.Fatal(err)
	}
	t.Logf("peak resident memory of run: %d KiB; %s", peak, lastLine(n.Journal()))
	if peak > limit {
		t.Errorf("peak resident memory of run is %d KiB, more than %d", peak, limit)
	}
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return text[strings.LastIndex(text, "\n")+1:]
}
