//go:build vm && soak

package vm_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// rotateLasts is how long rotate and rewrap of two volumes take under emulation, rounded up.
const rotateLasts = 12 * time.Second

// keyCuts is how many power cuts TestSoakRotate makes for each of TestSoak.
const keyCuts = 5

// TestSoakRotate cuts the power at random moments of rotate and rewrap, every other time with the loss of what was not flushed. The next
// boot must open every volume by a recorded key, and what is run next must end the work.
func TestSoakRotate(t *testing.T) {
	random := rand.New(rand.NewPCG(*seed, 1000))
	t.Logf("seed %d", *seed)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1, ebs1)
	n.LoseUnflushed(random.Uint64())
	n.Resume()
	n.AwaitVolumes()
	files := writeFiles(n, "/mnt", "/mnt1")
	keys := []string{n.Key, n.CreateKey(map[string]string{})}
	table := []string{fmt.Sprintf("%-4s %-7s %8s  %-28s %-10s %s", "cut", "command", "after, s", "key records, key slots", "unflushed", "lost")}
	lost := 0
	for cut := 1; cut <= max(1, *cuts/keyCuts); cut++ {
		command := "rotate"
		if cut%3 == 0 {
			keys[0], keys[1] = keys[1], keys[0]
			n.Sh("sed -i 's|^kms_key:.*|kms_key: " + keys[0] + "|' " + harness.ConfigFile + "; sync")
			command = "rewrap"
		}
		n.Sh("systemd-run --quiet --no-block luks-kms-agent " + command)
		moment := time.Duration(random.Int64N(int64(rotateLasts)))
		time.Sleep(moment)
		n.PowerCut()
		n.Boot()
		code := n.AwaitAgent()
		state := fmt.Sprintf("%d, %s", len(n.KeyRecords()), strings.ReplaceAll(strings.TrimSpace(
			n.Sh("for d in $(lsblk -dnpo NAME | grep -v nvme0n1); do cryptsetup luksDump $d 2>/dev/null | grep -c ': luks2$'; done")), "\n", " and "))
		gone := ""
		if code != "0" || digestFiles(n, "/mnt", "/mnt1") != files {
			gone = "exit code " + code
			lost++
			t.Errorf("cut %d, %v into %s: exit code %s\n%s", cut, moment, command, code, n.Journal())
		}
		table = append(table, fmt.Sprintf("%-4d %-7s %8.1f  %-28s %-10d %s", cut, command, moment.Seconds(), state, n.LastCut().Lost, gone))
		if lost > 0 {
			break
		}
		out := n.Sh("luks-kms-agent " + command)
		if strings.Contains(out, "failed") || len(n.KeyRecords()) != 1 {
			t.Errorf("cut %d: %s then said\n%s", cut, command, out)
		}
		wantFiles(t, n, files, "after "+command, "/mnt", "/mnt1")
	}
	t.Logf("\n%s\nvolumes without a recorded key that opens them: %d", strings.Join(table, "\n"), lost)
}
