//go:build vm

package vm_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// The disks of the stories.
var (
	ssd1  = harness.InstanceStore("ssd1", "AWS11111111111111111")
	ssd2  = harness.InstanceStore("ssd2", "AWS22222222222222222")
	ebs1  = harness.EBS("ebs1", "0aaaaaaaaaaaaaaa1")
	ebs2  = harness.EBS("ebs2", "0bbbbbbbbbbbbbbb2")
	plain = harness.Loop("plain", "/dev/loop0")
)

// plainAtData makes the loop device a volume.
const plainAtData = "volumes:\n  - name: /dev/loop0\n    mount_point: /data\n    filesystem: ext4\n"

// headerArea is what LUKS2 takes of a disk before the data, in bytes.
const headerArea = 16 << 20

// wantMounted checks that exactly these are mounts of our volumes.
func wantMounted(t *testing.T, n *harness.Node, points ...string) {
	t.Helper()
	if got := mounted(n.Sh("findmnt -rno SOURCE,TARGET")); !slices.Equal(got, points) {
		t.Errorf("mounted: %v, want %v\n%s", got, points, n.Journal())
	}
}

// mounted returns the mount points of our volumes in findmnt's list, sorted.
func mounted(list string) []string {
	var points []string
	for line := range strings.Lines(list) {
		if source, target, _ := strings.Cut(strings.TrimSpace(line), " "); strings.HasPrefix(source, "/dev/mapper/luks-") {
			points = append(points, target)
		}
	}
	slices.Sort(points)
	return points
}

// wantCalls checks which calls KMS has seen since the last check: all of them, and that they succeeded. DescribeKey may be
// among them once, or not.
func wantCalls(t *testing.T, n *harness.Node, generate, decrypt, describe int) {
	t.Helper()
	calls := n.KMS.Calls()
	n.KMS.Forget()
	count := map[string]int{}
	for _, c := range calls {
		if c.Status != 200 {
			t.Errorf("KMS: %s", c)
		}
		count[c.Op]++
	}
	if count["GenerateDataKey"] != generate || count["Decrypt"] != decrypt || count["DescribeKey"] > describe || len(calls) > generate+decrypt+describe {
		t.Errorf("KMS calls: %v, want GenerateDataKey %d, Decrypt %d, DescribeKey at most %d", calls, generate, decrypt, describe)
	}
}

// wantUntouched checks that disks still have the bytes that they had.
func wantUntouched(t *testing.T, n *harness.Node, before map[string]string) {
	t.Helper()
	if changed := harness.ChangedDisks(before, n.Digests(0)); len(changed) > 0 {
		t.Errorf("disks were written to: %v", changed)
	}
}

// wantRefusal checks an exit code and that the output has each of the words.
func wantRefusal(t *testing.T, r harness.Result, code int, words ...string) {
	t.Helper()
	if r.Code != code {
		t.Errorf("want exit code %d of %s", code, r)
	}
	for _, word := range words {
		if !strings.Contains(r.Stdout+r.Stderr, word) {
			t.Errorf("want %q in the output of %s", word, r)
		}
	}
}

// volume is what `status --json` says of one volume.
type volume struct {
	Device, Identity, UUID, Mapping, Action, Reason, Error, State string
	MountPoint                                                    string `json:"mount_point"`
	KeyID                                                         string `json:"key_id"`
	Problems                                                      []string
}

// volumes returns the volumes of the status by mount point.
func volumes(t *testing.T, n *harness.Node) map[string]volume {
	t.Helper()
	var status struct{ Volumes []volume }
	if err := json.Unmarshal([]byte(n.Sh("luks-kms-agent status --json")), &status); err != nil {
		t.Fatalf("luks-kms-agent status --json: %v", err)
	}
	byPoint := map[string]volume{}
	for _, v := range status.Volumes {
		if v.MountPoint != "" {
			byPoint[v.MountPoint] = v
		}
	}
	return byPoint
}

// marker is what the stories write into files: not to be found on a raw disk.
const marker = "the quick brown fox of volume "

// writeFiles puts a file onto each volume and returns their digests.
func writeFiles(n *harness.Node, points ...string) string {
	var script strings.Builder
	for _, point := range points {
		fmt.Fprintf(&script, "yes '%s%s' | head -c 300000 >%s/plaintext-file; ", marker, point, point)
	}
	n.Sh("set -e; " + script.String() + "sync")
	return digestFiles(n, points...)
}

func digestFiles(n *harness.Node, points ...string) string {
	return n.Sh("sha256sum " + strings.Join(points, "/plaintext-file ") + "/plaintext-file")
}

// wantFiles checks that the files of writeFiles are what they were; when says after what.
func wantFiles(t *testing.T, n *harness.Node, before, when string, points ...string) {
	t.Helper()
	if got := digestFiles(n, points...); got != before {
		t.Errorf("files %s:\n%s\nbefore:\n%s", when, got, before)
	}
}

// denied, down and so on are the faults of KMS that stories speak of.
var (
	down   = proxy.Fault{Kind: proxy.Drop}
	denied = proxy.Fault{Kind: proxy.Deny}
)
