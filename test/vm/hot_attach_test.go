//go:build vm

package vm_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// noHotAttach masks the udev rule in stories that attach disks and want them left to a run.
func noHotAttach(n *harness.Node) {
	n.Provide("/etc/udev/rules.d/90-luks-kms-agent.rules", 0o644, "# none\n")
}

// attachAtOnce attaches disks all at the same time.
func attachAtOnce(n *harness.Node, disks []harness.Disk) {
	var script strings.Builder
	for _, d := range disks {
		fmt.Fprintf(&script, "/usr/local/lib/story/guest attach %s & ", d.Name)
	}
	n.Sh(script.String() + "wait")
}

// awaitInstances waits until no unit of an attached disk has anything left to do.
func awaitInstances(n *harness.Node) {
	const busy = "udevadm settle; systemctl list-units --no-legend --plain --state=activating 'luks-kms-agent@*'; systemctl list-jobs --no-legend"
	n.Await("the runs for attached disks end", 5*time.Minute, func() bool { return strings.TrimSpace(n.Sh(busy)) == "" })
}

// wantFailed wants exactly so many units to have failed.
func wantFailed(t *testing.T, n *harness.Node, failed ...string) {
	t.Helper()
	if got := strings.Fields(n.Sh("systemctl list-units --failed --no-legend --plain | cut -d: -f1")); !slices.Equal(got, failed) {
		t.Errorf("failed units: %v, want %v", got, failed)
	}
	if jobs := strings.TrimSpace(n.Sh("systemctl list-jobs --no-legend")); jobs != "" {
		t.Errorf("jobs hang: %s", jobs)
	}
}

// TestHotAttach: ten volumes are attached at once to a running node, locked, detached and attached again; one is taken away without
// asking; one is foreign. Where the service is not active nothing is touched, and one that comes in the middle of the first run is not missed.
func TestHotAttach(t *testing.T) {
	parallel(t)
	var ten []harness.Disk
	points := []string{"/mnt"}
	for i := range 5 {
		ten = append(ten, away(harness.InstanceStore(fmt.Sprintf("hot%d", i), fmt.Sprintf("AWS4%d", i))), away(harness.EBS(fmt.Sprintf("hotebs%d", i), fmt.Sprintf("%017x", 0x40+i))))
		points = append(points, fmt.Sprintf("/mnt%d", 2*i+1), fmt.Sprintf("/mnt%d", 2*i+2))
	}
	foreign, blank, late := away(harness.EBS("foreign", "0f000000000000001")), away(harness.EBS("blank", "0b000000000000001")), away(harness.EBS("late", "01a7e000000000001"))
	slices.Sort(points)
	// The service does not wait for what is missing: stories are short.
	n := harness.NewNode(t, assets, "filesystem: ext4\ncall_timeout: 2s\ndevice_wait: 0s\n", slices.Concat([]harness.Disk{ssd1, foreign, blank, late}, ten)...)
	atTheSameTime(n)
	n.MakeExt4("foreign", "somebody")
	n.Boot()
	n.AwaitVolumes()
	wantCalls(t, n, 1, 1, 1)
	if ran := n.Sh("journalctl -b -o cat -u 'luks-kms-agent@*' | grep -v 'skipped because\\|unmet condition' || true"); strings.TrimSpace(ran) != "" {
		t.Errorf("at boot there were runs for single disks: %s", ran)
	}

	// Ten at once, all blank; then again, all of ours.
	attachAtOnce(n, ten)
	awaitInstances(n)
	wantMounted(t, n, points...)
	wantFewCalls(t, n)
	files := writeFiles(n, points...)
	var names []string
	for _, d := range ten {
		names = append(names, d.Name)
	}
	lock := "luks-kms-agent lock"
	for _, d := range ten {
		lock += " " + identity(d)
	}
	n.Sh(lock)
	n.Detach(names...)
	wantMounted(t, n, "/mnt")
	wantFailed(t, n)
	attachAtOnce(n, ten)
	awaitInstances(n)
	wantMounted(t, n, points...)
	wantFiles(t, n, files, "after all were attached again", points...)
	wantFewCalls(t, n)
	wantFailed(t, n)
	if units := n.Sh("systemctl list-units --all --no-legend --plain 'luks-kms-agent@*' | grep -Ev '^luks-kms-agent@(nvme|vd)' || true"); units != "" {
		t.Errorf("runs for what is no disk: %s", units)
	}

	// What a person locked stays locked, whatever udev says.
	ebs := ten[1]
	at := volumeOf(t, n, ebs).MountPoint
	others := slices.DeleteFunc(slices.Clone(points), func(p string) bool { return p == at })
	n.Sh("luks-kms-agent lock " + at)
	imds := len(n.IMDS.Requests())
	n.Sh("for a in change add; do udevadm trigger --action=$a --settle " + strings.Replace(volumeOf(t, n, ebs).Device, "/dev", "/sys/block", 1) + "; done")
	awaitInstances(n)
	wantMounted(t, n, others...)
	wantCalls(t, n, 0, 0, 0)
	if asked := n.IMDS.Requests()[imds:]; len(asked) > 0 {
		t.Errorf("IMDS was asked for nothing: %v", asked)
	}
	n.Sh("luks-kms-agent unlock " + at)
	wantCalls(t, n, 0, 1, 0)

	// One is taken away while it is mounted.
	n.Detach(ebs.Name)
	awaitInstances(n)
	wantFailed(t, n)
	if v := volumeOf(t, n, ebs); v.State != "missing" || !strings.Contains(strings.Join(v.Problems, " "), "its disk was taken away while it was mounted on "+at) {
		t.Errorf("taken away: %+v", v)
	}
	if text := n.Sh("luks-kms-agent status"); !strings.Contains(text, "1 missing") {
		t.Errorf("the status does not say that one is missing:\n%s", text)
	}
	n.Sh("luks-kms-agent lock " + at)
	wantMounted(t, n, others...)
	if metrics := n.Sh("cat /run/luks-kms-agent/metrics.prom"); !strings.Contains(metrics, `luks_kms_agent_volumes{state="missing"} 1`) {
		t.Errorf("metrics:\n%s", metrics)
	}
	n.Attach(ebs.Name)
	awaitInstances(n)
	wantMounted(t, n, points...)
	wantFiles(t, n, files, "after one was taken away", points...)
	wantCalls(t, n, 0, 1, 0)

	// A foreign one is refused: its unit fails, and only its.
	before := n.Digest("foreign", 0)
	n.Attach("foreign")
	awaitInstances(n)
	device := strings.TrimPrefix(volumesByIdentity(t, n)[identity(foreign)].Device, "/dev/")
	wantFailed(t, n, "luks-kms-agent@"+device)
	if n.Digest("foreign", 0) != before {
		t.Error("the foreign disk was written to")
	}
	n.Detach("foreign")
	n.Sh("systemctl reset-failed")

	// Where the service is not active, or never was, nothing happens to a disk.
	before = n.Digest("blank", 0)
	n.Sh("systemctl disable --now luks-kms-agent.service")
	n.Attach("blank")
	awaitInstances(n)
	n.Detach("blank")
	n.Reboot()
	n.Attach("blank")
	awaitInstances(n)
	wantMounted(t, n)
	wantFailed(t, n)
	if n.Digest("blank", 0) != before || n.KMS.Count("Decrypt") != 0 {
		t.Error("a disk was touched without the service")
	}

	// The first run waits for KMS, and has looked at the disks, when another one comes.
	n.Detach("blank")
	n.KMS.Inject(proxy.Fault{Kind: proxy.Hang, Ops: []string{"Decrypt"}})
	n.Sh("systemctl enable luks-kms-agent.service; systemctl start --no-block luks-kms-agent.service")
	n.Await("a data key is asked for", time.Minute, func() bool { return len(n.KMS.Calls()) > 0 })
	awaitPlan(n, 1)
	n.Attach("late")
	n.Sh("udevadm settle")
	n.KMS.Inject()
	if code := n.AwaitAgent(); code != "6" { // the ten are away, as at every boot
		t.Errorf("the service ended with exit code %s\n%s", code, n.Journal())
	}
	awaitInstances(n)
	if v := volumeOf(t, n, late); v.State != "mounted" {
		t.Errorf("one that came while the first run was at work: %+v\n%s", v, n.Sh("journalctl -b -o cat -u 'luks-kms-agent*'"))
	}
}

// wantFewCalls wants ten volumes to have cost less than ten calls, and no data key.
func wantFewCalls(t *testing.T, n *harness.Node) {
	t.Helper()
	calls := n.KMS.Calls()
	n.KMS.Forget()
	t.Logf("KMS calls of ten that came at once: %d", len(calls))
	for _, c := range calls {
		if c.Op != "Decrypt" || c.Status != 200 {
			t.Errorf("KMS: %s", c)
		}
	}
	if len(calls) == 0 || len(calls) > 5 {
		t.Errorf("%d KMS calls for ten volumes that came at once", len(calls))
	}
}

func volumeOf(t *testing.T, n *harness.Node, d harness.Disk) volume {
	t.Helper()
	return volumesByIdentity(t, n)[identity(d)]
}

func volumesByIdentity(t *testing.T, n *harness.Node) map[string]volume {
	t.Helper()
	var status struct{ Volumes []volume }
	if err := json.Unmarshal([]byte(n.Sh("luks-kms-agent status --json")), &status); err != nil {
		t.Fatalf("luks-kms-agent status --json: %v", err)
	}
	byIdentity := map[string]volume{}
	for _, v := range status.Volumes {
		byIdentity[v.Identity] = v
	}
	return byIdentity
}
