package agent

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// copyTo is the machine as a power cut at this moment would leave it: disks and
// records as they are, nothing mapped, nothing mounted.
func (m *machine) copyTo(dir string) *machine {
	m.t.Helper()
	if out, err := exec.Command("cp", "-a", "--sparse=always", m.dir, dir).CombinedOutput(); err != nil {
		m.t.Fatalf("cp: %v: %s", err, out)
	}
	c := &machine{
		t: m.t, dir: dir, kms: m.kms, imds: m.imds, cfg: m.cfg, missing: m.missing, last: m.last,
		open: map[string]string{}, unfinished: map[string]bool{}, gone: map[string]bool{}, mounts: map[string]string{}, held: map[string]bool{}, swaps: map[string]bool{},
		fail: func(string, string) error { return nil },
	}
	c.cfg.StateDir = filepath.Join(dir, "state")
	c.cfg.AuditLog = filepath.Join(dir, "log", "audit.jsonl")
	for _, d := range m.devices {
		d.Path = filepath.Join(dir, filepath.Base(d.Path))
		c.devices = append(c.devices, d)
	}
	mapper := filepath.Join(dir, "mapper")
	if err := errors.Join(os.RemoveAll(mapper), os.Mkdir(mapper, 0o700)); err != nil {
		m.t.Fatal(err)
	}
	return c
}

// cuts runs the agent and cuts the power at every step that it reaches, each in a
// copy of the machine. There must be one disk: with more, others would be written
// to while the copy is made.
func (m *machine) cuts() map[step]*machine {
	m.t.Helper()
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) {
		if at[s] == nil && s != stepWiped { // that one writes nothing
			at[s] = m.copyTo(filepath.Join(m.t.TempDir(), "cut"))
		}
	}
	r, err := n.Run(m.t.Context())
	if err = errors.Join(append(r.Failures(), err)...); err != nil {
		m.t.Fatal(err)
	}
	return at
}

// wantSteps checks that a scenario reaches what it is about, and nothing else.
func wantSteps(t *testing.T, got map[step]*machine, want ...step) {
	t.Helper()
	reached := slices.Sorted(maps.Keys(got))
	slices.Sort(want)
	if !slices.Equal(reached, want) {
		t.Errorf("steps reached: %q, want %q", reached, want)
	}
}

// Wherever a first boot is cut, the next run makes the node whole, under the key
// and the UUID that were durable by then.
func TestFirstBootIsCutAtEveryStep(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	cuts := m.cuts()
	wantSteps(t, cuts, stepKeyMade, stepKeyRecorded, stepKeyProven, stepIntent, stepFormatted, stepOpened, stepCleared, stepFilesystem, stepReady)
	for at, c := range cuts {
		t.Run(string(at), func(t *testing.T) {
			c.t = t
			before := c.records()
			generated := m.kms.Count("GenerateDataKey")
			c.runOK()
			after := c.records()
			if len(after.Keys) != 1 || len(after.Volumes) != 1 || c.mounts["/mnt"] == "" {
				t.Fatalf("%d keys, %d volumes, mounts %v", len(after.Keys), len(after.Volumes), c.mounts)
			}
			for id := range before.Keys {
				if _, ok := after.Keys[id]; !ok || m.kms.Count("GenerateDataKey") != generated {
					t.Error("the recorded data key was not used")
				}
			}
			for uuid, was := range before.Volumes {
				is, ok := after.Volumes[uuid]
				if !ok || is.KeyID != was.KeyID || is.State != keycache.StateReady {
					t.Errorf("volume %+v became %+v", was, is)
				}
			}
			c.reboot()
			c.runOK()
		})
	}
}

// A cut after `ready` loses nothing that was written and flushed.
func TestCutAfterReadyKeepsTheData(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	c := m.cuts()[stepReady]
	before, err := os.ReadFile(c.plain("vol-1"))
	if err != nil {
		t.Fatal(err)
	}
	disk := c.sums()
	c.runOK()
	c.untouched(disk)
	if after, err := os.ReadFile(c.plain("vol-1")); err != nil || string(after) != string(before) {
		t.Errorf("the volume's content changed (%v)", err)
	}
}

// An instance-store disk that a stop took away is replaced at whatever point the
// run is cut, and the old record is always kept.
func TestReplacementIsCutAtEveryStep(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS1")
	m.runOK()
	m.reboot()
	var old string
	for old = range m.records().Volumes {
	}
	m.devices = nil
	m.disk(volumes.ClassInstanceStore, "AWS2")
	cuts := m.cuts()
	wantSteps(t, cuts, stepArchived, stepIntent, stepFormatted, stepOpened, stepCleared, stepFilesystem, stepReady)
	for at, c := range cuts {
		t.Run(string(at), func(t *testing.T) {
			c.t = t
			c.runOK()
			if len(c.records().Volumes) != 1 || c.mounts["/mnt"] == "" {
				t.Errorf("volumes %v, mounts %v", c.records().Volumes, c.mounts)
			}
			kept, err := filepath.Glob(filepath.Join(c.cfg.StateDir, "archive", "volumes", old+".*"))
			if err != nil || len(kept) == 0 {
				t.Errorf("the old record is gone (%v)", err)
			}
		})
	}
}

// A volume that is adopted on a new instance is adopted wherever that is cut, and
// the records of the old instance are neither used nor lost.
func TestAdoptionIsCutAtEveryStep(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.imds.SetIdentity("instanceId", "i-0fedcba9876543210")
	before := m.sums()
	cuts := m.cuts()
	wantSteps(t, cuts, stepQuarantined, stepAdoptedKey, stepAdopted)
	for at, c := range cuts {
		t.Run(string(at), func(t *testing.T) {
			c.t = t
			r := c.runOK()
			if verb := r.Outcomes[0].Action.Verb; verb != Adopt && verb != Unlock {
				t.Errorf("%s after the cut", verb)
			}
			if n := len(c.records().Keys); n != 1 {
				t.Errorf("%d key records for one wrapped key", n)
			}
			for _, v := range c.records().Volumes {
				if v.InstanceID != "i-0fedcba9876543210" || v.State != keycache.StateReady {
					t.Errorf("volume record %+v", v)
				}
			}
			kept, err := filepath.Glob(filepath.Join(c.cfg.StateDir, "quarantine", "*", "*", "*.json"))
			if err != nil || len(kept) != 2 {
				t.Errorf("quarantine has %v (%v)", kept, err)
			}
			c.untouched(before)
		})
	}
}

// A restore of the primary header that is cut is done again, or was done.
func TestHeaderRestoreIsCut(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.write(d, 4096+20, []byte("garbage"))
	cuts := m.cuts()
	wantSteps(t, cuts, stepRestored)
	c := cuts[stepRestored]
	c.runOK()
	if i, err := luks.Inspect(c.devices[0].Path); err != nil || !i.Pass() || i.PrimaryDamaged {
		t.Errorf("header %+v, %v", i, err)
	}
}

// Cuts do not add up: each run is cut at another step, until one is not.
func TestOneCutAfterAnother(t *testing.T) {
	order := []step{stepKeyRecorded, stepIntent, stepFormatted, stepOpened, stepCleared, stepFilesystem, stepReady}
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS1")
	for i, s := range order {
		c := m.cuts()[s]
		if c == nil {
			t.Fatalf("cut %d: a run after a cut at %q never reaches %q", i, order[max(i-1, 0)], s)
		}
		m = c
	}
	m.runOK()
	if r := m.records(); len(r.Keys) != 1 || len(r.Volumes) != 1 {
		t.Errorf("%d keys, %d volumes", len(r.Keys), len(r.Volumes))
	}
	if got := fmt.Sprint(m.kms.Count("GenerateDataKey")); got != "1" {
		t.Errorf("%s data keys were made, want 1", got)
	}
}
