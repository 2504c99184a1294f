//go:build vm

package vm_test

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// faulty returns an EBS disk that can be told to fail.
func faulty(name, id string) harness.Disk {
	d := harness.EBS(name, id)
	d.Faulty = true
	return d
}

// away returns a disk that is not there until it is attached.
func away(d harness.Disk) harness.Disk {
	d.Away = true
	return d
}

// told is what must have been said of one disk: of its identity, in the status as text and as JSON and in the journal. Without
// words nothing must have gone wrong with it.
type told map[harness.Disk][]string

// identity is what the agent calls a disk.
func identity(d harness.Disk) string { return strings.Replace(d.Serial, "vol", "vol-", 1) }

// wantTold lets the service run to its end and checks the exit code and what was said.
func wantTold(t *testing.T, n *harness.Node, code string, want told) {
	t.Helper()
	if got := n.AwaitAgent(); got != code {
		t.Errorf("the service ended with exit code %s, want %s:\n%s", got, code, n.Journal())
	}
	text, journal := n.Sh("luks-kms-agent status"), n.Journal()
	var status struct{ Volumes []volume }
	if err := json.Unmarshal([]byte(n.Sh("luks-kms-agent status --json")), &status); err != nil {
		t.Fatalf("luks-kms-agent status --json: %v", err)
	}
	for disk, words := range want {
		i := slices.IndexFunc(status.Volumes, func(v volume) bool {
			return v.Identity == identity(disk) && (v.Error != "") == (len(words) > 0)
		})
		if i < 0 {
			t.Errorf("the status does not have %s (%s) with an error: %v\n%s", disk.Name, identity(disk), len(words) > 0, text)
			continue
		}
		for _, word := range words {
			if !strings.Contains(status.Volumes[i].Error, word) {
				t.Errorf("the error of %s does not say %q: %s", disk.Name, word, status.Volumes[i].Error)
			}
		}
		if v := status.Volumes[i]; v.Action == "leave" || v.State == "" && len(v.Problems) == 0 {
			continue // the screen counts disks that are left alone, and is silent of those that are gone and were never recorded
		}
		told := func(block string) bool {
			return strings.Contains(block, identity(disk)) && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(block, w) })
		}
		// What is indented belongs to the volume above it.
		if !slices.ContainsFunc(strings.Split(strings.ReplaceAll(text, "\n ", " "), "\n"), told) {
			t.Errorf("no volume of the status says %q of %s:\n%s", words, identity(disk), text)
		}
		if !strings.Contains(journal, identity(disk)) || !strings.Contains(journal, status.Volumes[i].Error) {
			t.Errorf("the journal does not name %s with %q:\n%s", identity(disk), status.Volumes[i].Error, journal)
		}
	}
}

// start starts the service again, as a boot does, and does not wait for it.
func start(n *harness.Node) {
	const service = " luks-kms-agent.service"
	n.Sh("systemctl stop" + service + "; systemctl reset-failed" + service + "; systemctl start --no-block" + service)
}

// wantWhole lets the service run again, or to its end, and wants the volumes mounted.
func wantWhole(t *testing.T, n *harness.Node, points ...string) {
	t.Helper()
	start(n)
	n.AwaitVolumes()
	wantMounted(t, n, points...)
}

// TestDiskErrors: disks that cannot be read or written, each in its own way, at first boot and when they have files. The others are
// made, or opened. Nothing is formatted because of an error, and once the disk is well the next run goes on under the same key.
func TestDiskErrors(t *testing.T) {
	parallel(t)
	var (
		header = faulty("header", "0aaaaaaaaaaaaaaa1")
		end    = faulty("end", "0bbbbbbbbbbbbbbb2")
		write  = faulty("write", "0ccccccccccccccc3")
		data   = faulty("data", "0ddddddddddddddd4")
	)
	points := []string{"/mnt", "/mnt1", "/mnt2", "/mnt3", "/mnt4"}
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1, header, end, write, data)
	n.Faults(map[string][]harness.Fault{
		"header": {harness.Errors(0, headerArea)},
		"end":    {harness.Errors(harness.DiskSize-1<<20, 0)},
		"write":  {harness.WriteErrors(0, 0)},
		"data":   {harness.Errors(64<<20, 320<<20)}, // away from both ends, which are read
	})
	blank := n.Digests(0)
	n.Resume()
	wantTold(t, n, "6", told{
		ssd1: nil, header: {"cannot inspect", "input/output error"}, end: {"cannot probe", "input/output error"},
		write: {"cannot format"}, data: {"cannot make filesystem"},
	})
	wantMounted(t, n, "/mnt")
	if changed := harness.ChangedDisks(blank, n.Digests(0)); !slices.Equal(changed, []string{"data", "ssd1"}) {
		t.Errorf("disks were written to: %v, want ssd1, and data up to where it failed", changed)
	}
	n.Faults(nil)
	wantWhole(t, n, points...)
	if keys := n.KeyRecords(); len(keys) != 1 || n.KMS.Count("GenerateDataKey") != 1 {
		t.Errorf("%d key records; KMS calls: %v", len(keys), n.KMS.Calls())
	}
	files := writeFiles(n, points...)
	at := volumes(t, n)

	// With files on them.
	n.Sh("luks-kms-agent lock")
	n.Faults(map[string][]harness.Fault{
		"header": {harness.Errors(0, headerArea)},
		"end":    {harness.Errors(0, 0)},
		"write":  {harness.WriteErrors(0, 0)},
		"data":   {harness.Slow(0, 0, 20*time.Millisecond)},
	})
	before := n.Digests(headerArea)
	start(n)
	wantTold(t, n, "6", told{
		ssd1: nil, data: nil,
		header: {"cannot inspect", "input/output error"}, end: {"cannot inspect", "input/output error"},
		write: {"cannot mount"}, // the filesystem wants to write, and says no
	})
	var opened []string
	for _, point := range points {
		v := at[point]
		switch {
		case v.Identity == identity(header), v.Identity == identity(end):
		case v.Identity == identity(write):
			n.Sh("dmsetup info " + v.Mapping)
		default:
			opened = append(opened, point)
		}
	}
	wantMounted(t, n, opened...)
	n.Faults(nil)
	wantWhole(t, n, points...)
	wantFiles(t, n, files, "after disk errors", points...)
	if changed := harness.ChangedDisks(before, n.Digests(headerArea)); len(changed) > 0 {
		t.Errorf("headers were written to: %v", changed)
	}
	wantCalls(t, n, 1, 4, 1)
}

// TestDisksChangeUnderARun: between the plan and the deed lies an answer of KMS. What happens to the disks in that time is
// noticed: bytes, another disk at the same place, another header, nothing at all. Nothing is written to what changed.
func TestDisksChangeUnderARun(t *testing.T) {
	parallel(t)
	ebs3, ebs4 := harness.EBS("ebs3", "0ccccccccccccccc3"), harness.EBS("ebs4", "0ddddddddddddddd4")
	points := []string{"/mnt", "/mnt1", "/mnt2", "/mnt3", "/mnt4", "/mnt5"}
	n := harness.NewNode(t, assets, "filesystem: ext4\ncall_timeout: 2s\ndevice_wait: 0s\n", ssd1, ssd2, ebs1, ebs2, ebs3, ebs4)
	atTheSameTime(n)
	noHotAttach(n)
	n.Provide("/run/luks-kms-agent/disks.json", 0o600, `{"version":1,"disks":[]}`) // else the first run looks once more, and uses what it finds
	n.KMS.Inject(proxy.Fault{Kind: proxy.Hang, Ops: []string{"GenerateDataKey"}})
	n.Resume()
	awaitPlan(n, 6)
	n.Await("a data key is asked for", time.Minute, func() bool { return len(n.KMS.Calls()) > 0 })
	const ebs1Device = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1"
	n.Sh("echo precious | dd conv=fsync bs=1 seek=1048576 of=" + ebs1Device)
	n.Detach("ssd1", "ssd2", "ebs4")
	n.Attach("ssd2", "ssd1") // under each other's name
	before := n.Digests(0)
	n.KMS.Inject()
	wantTold(t, n, "6", told{
		ssd1: {"not the device that was scanned"}, ssd2: {"not the device that was scanned"},
		ebs1: {"it changed after it was planned on", "offset 1048576"}, ebs4: {"no such file or directory"},
		ebs2: nil, ebs3: nil,
	})
	if changed := harness.ChangedDisks(before, n.Digests(0)); !slices.Equal(changed, []string{"ebs2", "ebs3"}) {
		t.Errorf("disks were written to: %v, want ebs2 and ebs3", changed)
	}
	n.Sh("dd conv=fsync bs=1 seek=1048576 count=9 if=/dev/zero of=" + ebs1Device)
	n.Attach("ebs4")
	wantWhole(t, n, points...)
	if keys := n.KeyRecords(); len(keys) != 1 {
		t.Errorf("%d key records, want 1", len(keys))
	}
	files := writeFiles(n, points...)

	// The same with volumes that hold data. The disks are written to from outside, as by an instance that shares them.
	n.Sh("luks-kms-agent lock")
	n.KMS.Inject(proxy.Fault{Kind: proxy.Hang, Ops: []string{"Decrypt"}})
	start(n)
	awaitPlan(n, 6)
	good := map[string][]byte{}
	for _, name := range []string{"ebs1", "ebs2", "ebs3"} {
		good[name] = head(t, n, name)
	}
	n.Tamper("ebs1", func(metadata map[string]any) {
		metadata["segments"].(map[string]any)["0"].(map[string]any)["encryption"] = "cipher_null-ecb"
	})
	n.Fill("ebs2", 0, good["ebs3"])
	n.Detach("ssd1", "ssd2", "ebs4")
	n.Attach("ssd2", "ssd1")
	before, state := n.Digests(0), n.State()
	n.KMS.Inject()
	wantTold(t, n, "7", told{
		ssd1: {"not the device that was scanned"}, ssd2: {"not the device that was scanned"}, ebs4: {"no such file or directory"},
		ebs1: {"the header changed after it was inspected", "cipher_null-ecb"}, ebs2: {"the header changed after it was inspected"},
		ebs3: nil,
	})
	if out := n.Sh("dmsetup ls --target crypt"); strings.Count(out, "luks-") != 1 {
		t.Errorf("mapped: %s", out)
	}
	if changed := harness.ChangedDisks(before, n.Digests(0)); !slices.Equal(changed, []string{"ebs3"}) {
		t.Errorf("disks were written to: %v, want that which is open", changed)
	}
	if after := n.State(); after != state {
		t.Errorf("records changed:\n%s\n%s", state, after)
	}
	n.Fill("ebs1", 0, good["ebs1"])
	n.Fill("ebs2", 0, good["ebs2"])
	n.Attach("ebs4")
	wantWhole(t, n, points...)
	wantFiles(t, n, files, "after disks changed under a run", points...)
}

// awaitPlan waits until the run that is under way has planned for so many disks besides the boot disk.
func awaitPlan(n *harness.Node, disks int) {
	const planned = "journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID=$(systemctl show -p InvocationID --value luks-kms-agent.service) | grep -c 'plan.*identity\": \"[AWSvol]' || true"
	n.Await("the run has a plan", 2*time.Minute, func() bool {
		var count int
		_, err := fmt.Sscan(n.Sh(planned), &count)
		return err == nil && count >= disks
	})
}

// head returns the header area of a disk's image.
func head(t *testing.T, n *harness.Node, name string) []byte {
	t.Helper()
	f, err := os.Open(n.Image(name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, headerArea)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestLateDisks: a disk that the configuration names, or a record, is waited for while the others are open already; one that never
// comes costs the time and nothing else.
func TestLateDisks(t *testing.T) {
	parallel(t)
	const config = "filesystem: ext4\nvolumes:\n  - name: vol-0bbbbbbbbbbbbbbb2\n    mount_point: /data\n"
	n := harness.NewNode(t, assets, config+"device_wait: 5m\n", ssd1, ebs1, away(ebs2))
	arrive := func(after time.Duration) {
		t.Helper()
		n.Await("the others are open", 3*time.Minute, func() bool {
			return slices.Equal(mounted(n.Sh("findmnt -rno SOURCE,TARGET")), []string{"/mnt", "/mnt1"})
		})
		time.Sleep(after)
		if unit := n.Unit("luks-kms-agent.service"); unit["ActiveState"] != "activating" {
			t.Errorf("the run did not wait: %v", unit)
		}
		n.Attach("ebs2")
		n.AwaitVolumes()
		wantMounted(t, n, "/data", "/mnt", "/mnt1")
	}
	n.Resume()
	arrive(20 * time.Second)
	wantCalls(t, n, 1, 1, 1)
	files := writeFiles(n, "/data", "/mnt", "/mnt1")

	n.Reboot()
	arrive(20 * time.Second)
	wantCalls(t, n, 0, 1, 0)
	wantFiles(t, n, files, "after the disk came late", "/data", "/mnt", "/mnt1")

	n.Sh("luks-kms-agent lock")
	n.Detach("ebs2")
	n.Write(harness.ConfigFile, 0o600, n.Config(config+"device_wait: 5s\n"))
	start(n)
	if code := n.AwaitAgent(); code != "6" {
		t.Errorf("the service ended with exit code %s, want 6", code)
	}
	wantMounted(t, n, "/mnt", "/mnt1")
	for what, said := range map[string]string{"status": n.Sh("luks-kms-agent status"), "JSON": n.Sh("luks-kms-agent status --json"), "journal": n.Journal()} {
		if !strings.Contains(said, "vol-0bbbbbbbbbbbbbbb2") || !strings.Contains(said, "no disk shows it") {
			t.Errorf("the %s does not name the disk that is missing:\n%s", what, said)
		}
	}
	n.Attach("ebs2")
	wantWhole(t, n, "/data", "/mnt", "/mnt1")
	wantFiles(t, n, files, "after the disk was missing", "/data", "/mnt", "/mnt1")
}

// TestOddDisks: sectors of 512 and 4096 bytes, a size that is no multiple of 4096, disks that are read-only or too small.
func TestOddDisks(t *testing.T) {
	parallel(t)
	sized := func(name, id string, size int64) harness.Disk {
		d := away(harness.EBS(name, id))
		d.Size = size
		return d
	}
	native, odd := harness.EBS("native", "0444444444444444f"), sized("odd", "0555555555555555f", harness.DiskSize-512)
	native.SectorSize, odd.Away = 4096, false
	small := []harness.Disk{sized("mib1", "01111111111111111", 1<<20), sized("mib15", "01515151515151515", 15<<20), sized("mib17", "01717171717171717", 17<<20), sized("mib20", "02020202020202020", 20<<20)}
	n := harness.NewNode(t, assets, "filesystem: xfs\ndevice_wait: 0s\n", slices.Concat([]harness.Disk{ssd1, native, odd, ebs1}, small)...)
	n.Wake()
	n.Attach("mib1", "mib15", "mib17", "mib20")
	const ebs1Device = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1"
	n.Sh("blockdev --setro $(readlink -f " + ebs1Device + ")")
	blank := n.Digests(0)
	n.StartServices()
	want := told{ssd1: nil, native: nil, odd: nil, ebs1: nil}
	for _, d := range small {
		want[d] = []string{fmt.Sprintf("it has %d bytes, too few", d.Size), "at least 331350016"}
	}
	wantTold(t, n, "6", want)
	wantMounted(t, n, "/mnt", "/mnt1", "/mnt2")
	if r := n.Agent("plan"); !strings.Contains(r.Stdout, "read-only") {
		t.Errorf("the plan does not say that a disk is read-only: %s", r)
	}
	if changed := harness.ChangedDisks(blank, n.Digests(0)); !slices.Equal(changed, []string{"native", "odd", "ssd1"}) {
		t.Errorf("disks were written to: %v", changed)
	}

	n.Detach("mib1", "mib15", "mib17", "mib20")
	n.Sh("blockdev --setrw $(readlink -f " + ebs1Device + ")")
	points := []string{"/mnt", "/mnt1", "/mnt2", "/mnt3"}
	wantWhole(t, n, points...)
	for disk, sectors := range map[harness.Disk][2]string{ssd1: {"512", "4096"}, native: {"4096", "4096"}, odd: {"512", "512"}} {
		script := "d=$(lsblk -dnro PATH,SERIAL | sed -n 's/ " + disk.Serial + "$//p'); blockdev --getss $d; cryptsetup luksDump $d | sed -n 's/.*sector: \\([0-9]*\\) .*/\\1/p'"
		if got := n.Sh(script); got != sectors[0]+"\n"+sectors[1]+"\n" {
			t.Errorf("logical sectors and the header's of %s: %q, want %v", disk.Name, got, sectors)
		}
	}
	// The power goes, and a boot volume comes back that says of one that was mounted, and no more, that it is being formatted.
	files := writeFiles(n, points[:3]...)
	const record = "/var/lib/luks-kms-agent/volumes/$(luks-kms-agent status --json | tr -d ' ,\"' | sed -n '/^identity:vol-0aaaaaaaaaaaaaaa1$/,/^uuid:/s/^uuid://p').json"
	n.Sh("cp -a " + record + " /root/ready.json && sed -i 's/\"ready\"/\"formatting\"/' " + record + " && sync")
	n.PowerCut()
	n.Boot()
	wantTold(t, n, "3", told{ssd1: nil, native: nil, odd: nil, ebs1: {"recorded as being formatted", "the record is older than the volume"}})
	wantMounted(t, n, points[:3]...)
	wantFiles(t, n, files, "after the power cut", points[:3]...)
	n.Sh("cp -a /root/ready.json " + record)
	wantWhole(t, n, points...)

	// One with data is refused where it cannot be written: a filesystem that is not quite clean needs to write.
	n.Sh("luks-kms-agent lock && blockdev --setro $(readlink -f " + ebs1Device + ")")
	start(n)
	wantTold(t, n, "6", told{ssd1: nil, native: nil, odd: nil, ebs1: {"read-only"}})
	n.Sh("blockdev --setrw $(readlink -f " + ebs1Device + ")")
	wantWhole(t, n, points...)
	wantFiles(t, n, files, "in the end", points[:3]...)
}

// TestClonesAndOldRecords: a clone beside its original, boot volumes that were restored to an older state or come from another
// instance, and the disks that a stop of the instance leaves. Volumes are adopted by their tokens or refused; none is formatted but
// instance store that is new.
func TestClonesAndOldRecords(t *testing.T) {
	parallel(t)
	const state = "/var/lib/luks-kms-agent"
	points := []string{"/mnt", "/mnt1"}
	n := harness.NewNode(t, assets, "filesystem: ext4\ndevice_wait: 0s\n", ssd1, ebs1, away(ebs2))
	noHotAttach(n)
	n.Resume()
	n.AwaitVolumes()
	files := writeFiles(n, points...)
	wantAll := func(when string) {
		t.Helper()
		wantWhole(t, n, points...)
		wantFiles(t, n, files, when, points...)
	}

	// The clone of an open volume is refused beside it; of two that are not open neither is the right one.
	n.Clone("ebs1", "ebs2")
	n.Attach("ebs2")
	before := n.Digests(headerArea)
	both := []string{identity(ebs1), identity(ebs2), "show the same LUKS UUID"}
	start(n)
	wantTold(t, n, "3", told{ssd1: nil, ebs1: nil, ebs2: both})
	wantMounted(t, n, points...)
	n.Sh("luks-kms-agent lock")
	start(n)
	wantTold(t, n, "3", told{ssd1: nil, ebs1: both, ebs2: both})
	wantMounted(t, n, "/mnt")
	if changed := harness.ChangedDisks(before, n.Digests(headerArea)); len(changed) > 0 {
		t.Errorf("headers were written to: %v", changed)
	}
	n.Detach("ebs2")
	wantAll("after the clone went")

	// A boot volume from before the first run: there are no records. From within it: they say formatting.
	n.KMS.Forget()
	n.Sh("luks-kms-agent lock && cp -a " + state + " /root/ready && rm -r " + state)
	wantAll("of volumes adopted")
	wantCalls(t, n, 0, 1, 0)
	n.Sh("luks-kms-agent lock && rm -r " + state + " && cp -a /root/ready " + state + ` && sed -i 's/"ready"/"formatting"/' ` + state + "/volumes/*.json")
	before = n.Digests(0)
	start(n)
	older := []string{"recorded as being formatted", "the record is older than the volume"}
	wantTold(t, n, "3", told{ssd1: older, ebs1: older})
	wantMounted(t, n)
	wantUntouched(t, n, before)
	n.Sh("mv " + state + "/volumes/*.json " + state + "/archive/volumes/") // as the remedy says
	wantAll("of volumes whose records were too old")

	// Records of another instance, as an image of its boot volume brings them.
	n.Sh("luks-kms-agent lock && sed -i 's/" + harness.InstanceID + "/i-0fedcba9876543210/' " + state + "/volumes/*.json " + state + "/keys/*.json")
	wantAll("of volumes with another instance's records")
	if out := n.Sh("ls " + state + "/quarantine/*/volumes/*.json " + state + "/quarantine/*/keys/*.json; grep -l 9876543210 " + state + "/volumes/*.json || true"); strings.Count(out, ".json") != 3 || strings.Count(out, "/quarantine/") != 3 {
		t.Errorf("records of another instance: %s", out)
	}

	// Stop and start: instance store is blank and another disk. An EBS volume that is blank is not what it was.
	n.Sh("luks-kms-agent lock")
	n.Detach("ssd1", "ebs1")
	n.Clone("ebs1", "ebs2") // to have it back
	n.Replace("ssd1", "AWS99999999999999999")
	n.Replace("ebs1", ebs1.Serial)
	n.Attach("ssd1", "ebs1")
	newSSD := ssd1
	newSSD.Serial = "AWS99999999999999999"
	before = n.Digests(0)
	start(n)
	wantTold(t, n, "3", told{newSSD: nil, ebs1: {"is recorded ready, but the disk is blank"}})
	wantMounted(t, n, "/mnt")
	if changed := harness.ChangedDisks(before, n.Digests(0)); !slices.Equal(changed, []string{"ssd1"}) {
		t.Errorf("disks were written to: %v, want the new instance store", changed)
	}
	if out := n.Sh("ls /mnt; grep -l AWS11111111111111111 " + state + "/archive/volumes/*.json"); strings.Contains(out, "plaintext-file") || !strings.Contains(out, ".json") {
		t.Errorf("the old instance store: %s", out)
	}
	n.Detach("ebs1")
	n.Clone("ebs2", "ebs1")
	n.Attach("ebs1")
	wantWhole(t, n, points...)
	if got := n.Sh("sha256sum /mnt1/plaintext-file"); !strings.Contains(files, got) {
		t.Errorf("the file of the EBS volume: %s, before: %s", got, files)
	}
	wantCalls(t, n, 0, 5, 1) // a data key is not made for the new disk
}
