//go:build vm

package vm_test

import (
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestSwap: an instance-store volume is encrypted swap, at first boot and after a reboot; what was swapped out does not stand on the
// disk, and lock takes it back.
func TestSwap(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "volumes:\n  - name: AWS11111111111111111\n    filesystem: swap\n", ssd1, ebs1)
	wantSwap := func(when string) {
		t.Helper()
		list := strings.Split(strings.TrimSpace(n.Sh("swapon --show=NAME,TYPE --noheadings --raw; lsblk -nro NAME,MOUNTPOINT | grep '^luks-.* \\[SWAP\\]$'")), "\n")
		if len(list) != 2 || !strings.HasPrefix(list[0], "/dev/dm-") {
			t.Errorf("%s: swap is %q", when, list)
		}
		wantMounted(t, n, "/mnt")
	}
	n.Resume()
	n.AwaitVolumes()
	wantSwap("first boot")

	// What a group writes to a tmpfs, and may not keep in memory, goes to swap: the marker is in every page.
	const marker = "SWAPPED-OUT-MARKER-7d1f"
	n.Sh("mkdir /sys/fs/cgroup/story && echo 8M >/sys/fs/cgroup/story/memory.max && bash -c 'echo $$ >/sys/fs/cgroup/story/cgroup.procs; yes " + marker + " | head -c 24000000 >/run/marked'")
	if swapped := n.Sh("cat /sys/fs/cgroup/story/memory.swap.current"); len(swapped) < len("10000000\n") {
		t.Errorf("only %s bytes were swapped out", strings.TrimSpace(swapped))
	}
	n.Sh("sync")
	if found := n.Find("ssd1", []byte(marker)); len(found) > 0 {
		t.Errorf("the disk shows %v", found)
	}
	n.Sh("rm /run/marked && rmdir /sys/fs/cgroup/story") // the limit would hold back what swapoff brings back
	if s := n.Sh("luks-kms-agent status"); !strings.Contains(s, "[SWAP]") || !strings.Contains(s, "swap") {
		t.Errorf("status: %s", s)
	}

	n.Reboot()
	n.AwaitVolumes()
	wantCalls(t, n, 1, 2, 1)
	wantSwap("reboot")
	if failed := n.Sh("systemctl --failed --no-legend; journalctl -b -1 -o cat | grep -i 'failed deactivating\\|failed unmounting' || true"); failed != "" {
		t.Errorf("failed: %s", failed)
	}

	if r := n.Agent("lock AWS11111111111111111"); r.Code != 0 || !strings.Contains(r.Stdout, "locked [SWAP] ") {
		t.Errorf("lock: %s", r)
	}
	if left := n.Sh("swapon --show --noheadings"); left != "" {
		t.Errorf("swap after the lock: %s", left)
	}
	if r := n.Agent("unlock"); r.Code != 0 {
		t.Errorf("unlock: %s", r)
	}
	wantSwap("unlocked")
}
