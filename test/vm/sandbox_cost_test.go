//go:build vm && soak

package vm_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestCostOfSandbox measures what the sandbox costs the opening of eight volumes, in one node, alternately: with it, and without it, where
// the agent mounts by itself. It fails only where volumes are not opened.
func TestCostOfSandbox(t *testing.T) {
	const rounds, dropIn = 7, "/run/systemd/system/luks-kms-agent.service.d/open.conf"
	var disks []harness.Disk
	for i := range 8 {
		disks = append(disks, harness.InstanceStore(fmt.Sprintf("ssd%d", i), fmt.Sprintf("AWS%d", i)))
	}
	n := harness.NewNode(t, assets, "", disks...)
	n.Resume()
	n.AwaitVolumes()
	took := map[string][]int{} // milliseconds
	for range rounds {
		for how, text := range map[string]string{
			"sandbox": "",
			"open": "PrivateMounts=no\nProtectKernelTunables=no\nReadWritePaths=\nProtectKernelLogs=no\nProtectControlGroups=no\nProtectProc=default\n" +
				"ProtectClock=no\nProtectHostname=no\nCapabilityBoundingSet=~\nDevicePolicy=auto\nDeviceAllow=\nSystemCallFilter=\n",
		} {
			n.Write(dropIn, 0o644, "[Service]\n"+text)
			n.Sh("systemctl stop luks-kms-agent.service && luks-kms-agent lock && udevadm settle && systemctl daemon-reload && systemctl start luks-kms-agent.service")
			if got := len(mounted(n.Sh("findmnt -rno SOURCE,TARGET"))); got != len(disks) {
				t.Fatalf("%d volumes are mounted\n%s", got, n.Journal())
			}
			var at [2]int // microseconds
			for i, property := range []string{"ExecMainStartTimestampMonotonic", "ExecMainExitTimestampMonotonic"} {
				var err error
				if at[i], err = strconv.Atoi(strings.TrimSpace(n.Sh("systemctl show -P " + property + " luks-kms-agent.service"))); err != nil {
					t.Fatal(err)
				}
			}
			took[how] = append(took[how], (at[1]-at[0])/1000)
		}
	}
	for how, ms := range took {
		slices.Sort(ms)
		t.Logf("%-8s median %d ms, of %v", how, ms[len(ms)/2], ms)
	}
}
