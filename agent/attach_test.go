package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// attach adds a blank disk under the next sequence number, as the kernel gives them.
func (m *machine) attach(class volumes.Class, identity string) volumes.Device {
	m.t.Helper()
	d := m.disk(class, identity)
	m.detach(d)
	return m.attachAgain(d)
}

func (m *machine) attachAgain(d volumes.Device) volumes.Device {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seq++
	d.DiskSeq = m.seq
	m.devices = append(m.devices, d)
	return d
}

// detach takes a disk away, whoever uses it.
func (m *machine) detach(d volumes.Device) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.devices = slices.DeleteFunc(m.devices, func(other volumes.Device) bool { return other.Identity == d.Identity })
	for name, path := range m.open {
		if path == d.Path {
			m.gone[name] = true
		}
	}
}

func attachedAs(d volumes.Device) Attached { return Attached{Name: d.Name, DiskSeq: d.DiskSeq} }

// runFor is what udev starts for a disk. It wants nothing to be wrong with that disk.
func (m *machine) runFor(d volumes.Device) (r Report, done string) {
	m.t.Helper()
	r, done, err := m.node().RunAttached(m.t.Context(), attachedAs(d))
	if err != nil {
		m.t.Fatal(err)
	}
	for _, err := range r.FailuresOf(attachedAs(d)) {
		m.t.Errorf("%s: %v", d.Identity, err)
	}
	return r, done
}

func (m *machine) lockAll(names ...string) {
	m.t.Helper()
	locked, err := m.node().Lock(m.t.Context(), names)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, l := range locked {
		if l.Err != nil {
			m.t.Error(l.Err)
		}
	}
}

// asked counts what KMS and IMDS were asked.
func (m *machine) asked() string {
	return fmt.Sprintf("GenerateDataKey %d, Decrypt %d, IMDS %d", m.kms.Count("GenerateDataKey"), m.kms.Count("Decrypt"), len(m.imds.Requests()))
}

func (m *machine) state(identity string) VolumeStatus {
	m.t.Helper()
	status := m.status()
	i := slices.IndexFunc(status.Volumes, func(v VolumeStatus) bool { return v.Identity == identity })
	if i < 0 {
		m.t.Fatalf("the status has no %s: %+v", identity, status)
	}
	return status.Volumes[i]
}

// Of ten that are attached at once the first run makes all, under the node's key, with one Decrypt; the others find it done and ask nobody.
// Detached in order and attached again they are opened the same way.
func TestTenAttachedAtOnce(t *testing.T) {
	m := newMachine(t)
	m.attach(volumes.ClassInstanceStore, "AWS1")
	m.runOK()
	var ten []volumes.Device
	for i := range 10 {
		ten = append(ten, m.attach(volumes.ClassEBS, fmt.Sprintf("vol-%d", i)))
	}
	for round, verb := range []Verb{Format, Unlock} {
		decrypted := m.kms.Count("Decrypt")
		r, _ := m.runFor(ten[0])
		acted := 0
		for _, o := range r.Outcomes {
			if o.Action.Verb == verb && o.Err == nil {
				acted++
			}
		}
		if acted != 10 || len(m.mounts) != 11 || m.kms.Count("Decrypt") != decrypted+1 || m.kms.Count("GenerateDataKey") != 1 {
			t.Errorf("%s: %d of 10, mounts %v, %s", verb, acted, m.mounts, m.asked())
		}
		before := m.asked()
		for _, d := range ten[1:] {
			if _, done := m.runFor(d); !strings.Contains(done, "was dealt with") {
				t.Errorf("a later run for %s had something to do", d.Identity)
			}
		}
		if after := m.asked(); after != before {
			t.Errorf("later runs asked: %s, before %s", after, before)
		}
		if round == 0 {
			for i, d := range ten {
				m.lockAll(d.Identity)
				m.detach(d)
				ten[i] = m.attachAgain(d)
			}
		}
	}
}

// A volume that a person locked stays locked, and one that a person unmounted is not mounted, when another disk is attached, and when udev
// repeats itself. The status is of all.
func TestAttachedDiskLeavesOthersAlone(t *testing.T) {
	m := newMachine(t)
	locked := m.attach(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.lockAll("vol-1")
	other := m.attach(volumes.ClassEBS, "vol-2")
	before := m.kms.Count("Decrypt")
	m.runFor(other)
	if m.kms.Count("Decrypt") != before+1 || len(m.mounts) != 1 || m.mounts["/mnt1"] == "" {
		t.Errorf("mounts %v, %s", m.mounts, m.asked())
	}
	if v := m.state("vol-1"); v.State != "locked" || len(v.Problems) > 0 || v.LastUnlock.IsZero() {
		t.Errorf("the locked volume: %+v", v)
	}
	if v := m.state("vol-2"); v.State != "mounted" {
		t.Errorf("the new volume: %+v", v)
	}
	calls := m.asked()
	if _, done := m.runFor(locked); done == "" || m.asked() != calls || len(m.mounts) != 1 {
		t.Errorf("a repeated event: done %q, mounts %v, %s", done, m.mounts, m.asked())
	}
	if m.runOK(); len(m.mounts) != 2 {
		t.Errorf("run by hand: mounts %v", m.mounts)
	}
}

// Also one that no run could open, and that was locked by hand.
func TestLockedVolumeThatFailedStaysLocked(t *testing.T) {
	m := newMachine(t)
	m.attach(volumes.ClassEBS, "vol-1")
	fail := m.fail
	m.fail = func(step, what string) error {
		if step == "mount" {
			return fmt.Errorf("no")
		}
		return nil
	}
	m.run()
	m.fail = fail
	m.lockAll("vol-1")
	m.runFor(m.attach(volumes.ClassEBS, "vol-2"))
	if len(m.open) != 1 || m.mounts["/mnt1"] == "" {
		t.Errorf("open %v, mounts %v", m.open, m.mounts)
	}
}

// While the service is not active nothing is done with a disk, and nobody is asked.
func TestNothingIsAttachedWithoutTheService(t *testing.T) {
	m := newMachine(t)
	m.attach(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.inactive = true
	d := m.attach(volumes.ClassEBS, "vol-2")
	before, calls := m.sums(), m.asked()
	if _, done := m.runFor(d); !strings.Contains(done, "not active") || m.asked() != calls {
		t.Errorf("done %q, %s", done, m.asked())
	}
	m.untouched(before)
}

// A disk that comes while the first run of a boot is at work, when no run is started for it, is dealt with by that run.
func TestDiskThatComesDuringTheFirstRun(t *testing.T) {
	m := newMachine(t)
	m.attach(volumes.ClassEBS, "vol-1")
	came := false
	m.fail = func(step, what string) error {
		if step == "mount" && !came {
			came = true
			go m.attach(volumes.ClassEBS, "vol-2")
			for there := 0; there < 2; time.Sleep(time.Millisecond) {
				m.mu.Unlock()
				time.Sleep(time.Millisecond)
				m.mu.Lock()
				there = len(m.devices)
			}
		}
		return nil
	}
	if r := m.runOK(); len(r.Outcomes) != 2 || m.mounts["/mnt1"] == "" || m.kms.Count("Decrypt") != 1 {
		t.Errorf("outcomes %+v, mounts %v, %s", r.Outcomes, m.mounts, m.asked())
	}
}

// A disk that udev is not done with is left to its own run, also by the first run when it looks once more: a link that names or excludes
// it may not be there yet.
func TestDiskThatUdevIsNotDoneWith(t *testing.T) {
	m := newMachine(t)
	m.attach(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.cfg.Exclude = []string{"/dev/disk/by-id/b"}
	a, b := m.attach(volumes.ClassEBS, "vol-a"), m.attach(volumes.ClassEBS, "vol-b")
	m.unannounced = map[string]bool{"vol-b": true}
	m.runFor(a)
	if len(m.mounts) != 2 {
		t.Errorf("mounts %v", m.mounts)
	}
	m.unannounced = nil
	m.devices[len(m.devices)-1].Links = []string{"/dev/disk/by-id/b"}
	if r, done := m.runFor(b); done != "" || len(m.mounts) != 2 {
		t.Errorf("its own run: %q, %+v", done, r)
	}
	if _, done := m.runFor(b); done == "" {
		t.Error("an excluded disk is looked at twice")
	}
}

// The first run of a boot leaves a disk alone that it does not know by the links that are there. udev makes the link, and starts nothing for the
// disk as the run has not ended; the run looks once more.
func TestDiskThatIsNamedDuringTheFirstRun(t *testing.T) {
	m := newMachine(t)
	m.attach(volumes.ClassEBS, "vol-1")
	named := m.attach(volumes.ClassExplicit, "S1")
	m.devices[1].Class, m.devices[1].Identity = "", ""
	m.unannounced = map[string]bool{"S1": true}
	m.fail = func(step, what string) error {
		if step == "mount" {
			m.devices[1], m.unannounced = named, nil
		}
		return nil
	}
	if m.runOK(); len(m.mounts) != 2 {
		t.Errorf("mounts %v", m.mounts)
	}
}

// What is wrong with others is told, and is not the failure of this disk's run; nobody waits for what is missing. What failed is tried again.
func TestAttachedDiskFailsByItself(t *testing.T) {
	m := newMachine(t)
	m.cfg.DeviceWait = time.Hour
	gone := m.attach(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.lockAll()
	m.detach(gone)
	foreign := m.attach(volumes.ClassEBS, "vol-2")
	m.write(foreign, 1080, []byte{0x53, 0xef}) // ext4's magic number
	good := m.attach(volumes.ClassEBS, "vol-3")
	r, _ := m.runFor(good)
	if len(r.Failures()) != 2 || m.mounts["/mnt1"] == "" {
		t.Errorf("failures %v, mounts %v", r.Failures(), m.mounts)
	}
	for range 2 {
		r, done, err := m.node().RunAttached(t.Context(), attachedAs(foreign))
		if failed := r.FailuresOf(attachedAs(foreign)); err != nil || done != "" || len(failed) != 1 || !strings.Contains(failed[0].Error(), "not blank") {
			t.Errorf("the foreign disk: %q, %v, %v", done, failed, err)
		}
	}
	if v := m.state("vol-2"); v.Error == "" {
		t.Errorf("status of the foreign disk: %+v", v)
	}

	m.lockAll()
	m.detach(good)
	good = m.attachAgain(good)
	m.impatient()
	m.kms.Fail(kmstest.Fault{Cut: true})
	r, _, err := m.node().RunAttached(t.Context(), attachedAs(good))
	if failed := r.FailuresOf(attachedAs(good)); err != nil || len(failed) != 1 {
		t.Errorf("while KMS is away: %v, %v", failed, err)
	}
	m.kms.Heal()
	m.runFor(good)
	if m.mounts["/mnt1"] == "" {
		t.Errorf("after KMS is back: mounts %v", m.mounts)
	}
}

// A disk that has gone when its run comes to it, or another one under its name, is no failure.
func TestAttachedDiskThatHasGone(t *testing.T) {
	m := newMachine(t)
	d := m.attach(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.lockAll()
	m.detach(d)
	m.attachAgain(d)
	calls := m.asked()
	if _, done := m.runFor(d); !strings.Contains(done, "is not there") || m.asked() != calls || len(m.mounts) > 0 {
		t.Errorf("done %q, mounts %v, %s", done, m.mounts, m.asked())
	}
}

// A volume whose disk was taken away while it was mounted is missing, and why is told. When the disk comes back before it was locked, it
// is not used beside the old mapping; lock lets go of that, and then it is opened.
func TestDiskTakenAwayWhileMounted(t *testing.T) {
	m := newMachine(t)
	d := m.attach(volumes.ClassEBS, "vol-1")
	m.attach(volumes.ClassEBS, "vol-2")
	m.runOK()
	m.detach(d)
	if v := m.state("vol-1"); v.State != "missing" || len(v.Problems) != 1 || !strings.Contains(v.Problems[0], "taken away while it was mounted on /mnt,") {
		t.Errorf("taken away: %+v", v)
	}
	again := m.attachAgain(d)
	before := m.sums()
	r, _, err := m.node().RunAttached(t.Context(), attachedAs(again))
	if failed := r.FailuresOf(attachedAs(again)); err != nil || len(failed) != 1 || !strings.Contains(failed[0].Error(), "was not locked before") {
		t.Errorf("back too early: %v, %v", failed, err)
	}
	m.untouched(before)
	m.detach(again)
	m.lockAll("vol-1")
	if len(m.open) != 1 || len(m.mounts) != 1 {
		t.Errorf("after lock: open %v, mounts %v", m.open, m.mounts)
	}
	if v := m.state("vol-1"); v.State != "missing" {
		t.Errorf("after lock: %+v", v)
	}
	m.runFor(m.attachAgain(d))
	if v := m.state("vol-1"); v.State != "mounted" || len(v.Problems) > 0 {
		t.Errorf("back again: %+v", v)
	}
}

// The place of instance store that was taken away while mounted is not given to another disk.
func TestMountedInstanceStoreIsNotReplaced(t *testing.T) {
	m := newMachine(t)
	d := m.attach(volumes.ClassInstanceStore, "AWS1")
	m.runOK()
	m.detach(d)
	m.runFor(m.attach(volumes.ClassInstanceStore, "AWS2"))
	if len(m.mounts) != 2 || len(m.records().Volumes) != 2 {
		t.Errorf("mounts %v, records %+v", m.mounts, m.records().Volumes)
	}
}

// Kernels before 5.15 do not number disks: the one that udev names counts as new, and no other does.
func TestAttachedDiskWithoutNumber(t *testing.T) {
	m := newMachine(t)
	one, other := m.disk(volumes.ClassEBS, "vol-1"), m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	m.lockAll()
	m.runFor(one)
	if len(m.mounts) != 1 || m.mounts["/mnt"] == "" {
		t.Errorf("mounts %v", m.mounts)
	}
	m.runFor(other)
	if len(m.mounts) != 2 {
		t.Errorf("mounts %v", m.mounts)
	}
}

// The unit starts only where a run has said which disks it dealt with.
func TestAttachedUnitWaitsForTheFirstRun(t *testing.T) {
	unit, err := os.ReadFile("../systemd/luks-kms-agent@.service")
	if err != nil || !strings.Contains(string(unit), "\nConditionPathExists="+DefaultDisksPath+"\n") {
		t.Errorf("no condition of %s: %v", DefaultDisksPath, err)
	}
	m := newMachine(t)
	m.attach(volumes.ClassEBS, "vol-1")
	disks := filepath.Join(m.dir, "run", filepath.Base(DefaultDisksPath))
	m.fail = func(string, string) error {
		if _, err := os.Stat(disks); err == nil {
			t.Error("the file is there before the disks were dealt with")
		}
		return nil
	}
	if _, err := m.node().Unlock(t.Context(), nil); err != nil {
		t.Error(err)
	}
	m.runOK()
	if _, err := os.Stat(disks); err != nil {
		t.Error(err)
	}
}

func TestParseAttached(t *testing.T) {
	for text, want := range map[string]Attached{
		"nvme1n1:22": {"nvme1n1", 22}, "nvme1n1": {"nvme1n1", 0}, "/dev/sdb:1": {"sdb", 1}, "cciss!c0d0:3": {"cciss!c0d0", 3},
		"": {}, ":1": {}, "nvme1n1:": {}, "nvme1n1:0": {}, "nvme1n1:x": {}, "nvme1n1:-1": {},
	} {
		got, err := ParseAttached(text)
		if (err == nil) != (want.Name != "") || err == nil && got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}
