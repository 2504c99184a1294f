package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// rotate runs Rotate as a new process would, and returns what was done and the errors.
func (m *machine) rotate(names ...string) ([]Rotated, error) {
	m.t.Helper()
	done, err := m.node().Rotate(m.t.Context(), names)
	for _, r := range done {
		err = errors.Join(err, r.Err)
	}
	return done, err
}

// opener returns the recorded data key that opens a disk, and what the header says, and ends the test if none does.
func (m *machine) opener(d volumes.Device) (keycache.KeyRecord, *luks.Header) {
	m.t.Helper()
	header, err := luks.Inspect(d.Path)
	if err != nil || header.Header == nil {
		m.t.Fatalf("%s: %v, %+v", d.Identity, err, header)
	}
	r := m.records()
	for _, id := range keyIDs(r.Volumes[header.Header.UUID]) {
		if key, err := m.node().cloud.Decrypt(m.t.Context(), r.Keys[id]); err == nil {
			defer key.Wipe()
			if header.Verify(key) == nil {
				return r.Keys[id], header.Header
			}
		}
	}
	m.t.Fatalf("%s: no recorded key opens it: %+v", d.Identity, header)
	return keycache.KeyRecord{}, nil
}

// addTheirs adds somebody's own key slot to a disk.
func (m *machine) addTheirs(d volumes.Device, slot int) {
	m.t.Helper()
	key, _ := m.opener(d)
	k, err := m.node().cloud.Decrypt(m.t.Context(), key)
	if err != nil {
		m.t.Fatal(err)
	}
	defer k.Wipe()
	if err := luks.AddKeySlot(m.t.Context(), d.Path, slot, k, m.theirs()); err != nil {
		m.t.Fatal(err)
	}
}

// theirs is the key of somebody's own key slot.
func (m *machine) theirs() *keycache.Key {
	m.t.Helper()
	k, err := keycache.NewKey([]byte(strings.Repeat("t", 32)))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(k.Wipe)
	return k
}

func TestRotate(t *testing.T) {
	m := newMachine(t)
	disks := []volumes.Device{m.disk(volumes.ClassInstanceStore, "ssd1"), m.disk(volumes.ClassEBS, "vol-1")}
	m.runOK()
	m.addTheirs(disks[1], 1)
	old, _ := m.opener(disks[0])
	done, err := m.rotate() // while both are mounted
	if err != nil {
		t.Fatal(err)
	}
	if len(done) != 2 || done[0].From != old.ID || done[1].From != old.ID || m.kms.Count("GenerateDataKey") != 2 {
		t.Errorf("%+v", done)
	}
	a, headerA := m.opener(disks[0])
	b, headerB := m.opener(disks[1])
	if a.ID == old.ID || a.ID != b.ID {
		t.Errorf("keys %s and %s, was %s", a.ID, b.ID, old.ID)
	}
	// The old slot is gone, and somebody's own is there and opens.
	if len(headerA.Keyslots) != 1 || len(headerB.Keyslots) != 2 || luks.OpensKeySlot(t.Context(), disks[1].Path, 1, m.theirs()) != nil {
		t.Errorf("%+v %+v", headerA.Keyslots, headerB.Keyslots)
	}
	r := m.records()
	if _, there := r.Keys[old.ID]; there || len(r.Keys) != 1 {
		t.Errorf("records: %+v", r.Keys)
	}
	for _, v := range r.Volumes {
		if v.Rotation != nil || v.Version != 1 || v.KeyID != a.ID {
			t.Errorf("%+v", v)
		}
	}
	if files, _ := filepath.Glob(filepath.Join(m.cfg.StateDir, "archive/keys", old.ID+".*.json")); len(files) != 2 {
		t.Errorf("archived: %v", files)
	}
	m.reboot()
	m.runOK()
	// A volume that is made now gets the new data key; without the records the new token is enough.
	late := m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	if k, _ := m.opener(late); k.ID != a.ID {
		t.Errorf("the new volume has key %s, want %s", k.ID, a.ID)
	}
	m.reboot()
	m.cfg.StateDir += "-lost"
	m.runOK()
}

// TestRotateIsCutAtEveryStep: at each a recorded key opens the volume, also at the next boot; and run again, rotate ends with one data key,
// that of the run that was cut, one slot more than before in no header, and somebody's own slot as it was.
func TestRotateIsCutAtEveryStep(t *testing.T) {
	steps := []step{stepKeyMade, stepKeyRecorded, stepKeyProven, stepRotating, stepSlotAdded, stepTokenMoved, stepSlotRemoved, stepRotated, stepKeyArchived}
	for _, scope := range []KeyScope{ScopeNode, ScopeVolume} {
		t.Run(string(scope), func(t *testing.T) {
			m := newMachine(t)
			m.cfg.KeyScope = scope
			m.disk(volumes.ClassEBS, "vol-1")
			m.disk(volumes.ClassEBS, "vol-2")
			m.runOK()
			for _, d := range m.devices {
				m.addTheirs(d, 1)
			}
			was := m.records()
			type cut struct {
				name string
				*machine
			}
			var cuts []cut
			count := map[step]int{}
			n := m.node()
			n.atStep = func(s step) {
				count[s]++
				cuts = append(cuts, cut{fmt.Sprintf("%s, %d", s, count[s]), m.copyTo(filepath.Join(t.TempDir(), "cut"))})
			}
			if _, err := n.Rotate(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			for _, s := range steps {
				if count[s] == 0 {
					t.Errorf("step %q was not reached", s)
				}
			}
			table := []string{fmt.Sprintf("%-62s %-10s %-10s", "cut after", "vol-1", "vol-2")}
			for _, c := range cuts {
				row := fmt.Sprintf("%-62s", c.name)
				for _, d := range c.devices {
					rec, header := c.opener(d)
					which := "new"
					if _, old := was.Keys[rec.ID]; old {
						which = "old"
					}
					row += fmt.Sprintf(" %-10s", fmt.Sprintf("%s, slot %d", which, header.Token.Keyslot))
				}
				table = append(table, row)
				c.runOK()
				if len(c.mounts) != 2 {
					t.Errorf("%s: mounted %v", c.name, c.mounts)
				}
				pending := map[string]bool{}
				for _, v := range c.records().Volumes {
					if v.Rotation != nil {
						pending[v.Rotation.KeyID] = true
					}
				}
				done, err := c.rotate()
				if slices.ContainsFunc(done, func(r Rotated) bool { return r.Left }) {
					_, more := c.rotate()
					err = errors.Join(err, more)
				}
				if err != nil {
					t.Errorf("%s: %v", c.name, err)
				}
				for _, d := range c.devices {
					rec, header := c.opener(d)
					if _, old := was.Keys[rec.ID]; old || len(header.Keyslots) != 2 || luks.OpensKeySlot(t.Context(), d.Path, 1, m.theirs()) != nil {
						t.Errorf("%s: %s is opened by %s, slots %+v", c.name, d.Identity, rec.ID, header.Keyslots)
					}
					if scope == ScopeNode && len(pending) == 1 && !pending[rec.ID] {
						t.Errorf("%s: %s did not get the data key of the run that was cut", c.name, d.Identity)
					}
				}
				if r := c.records(); scope == ScopeNode && len(r.Keys) != 1 {
					t.Errorf("%s: %d key records", c.name, len(r.Keys))
				}
				c.reboot()
				c.runOK()
			}
			t.Log("\n" + strings.Join(table, "\n"))
		})
	}
}

// Somebody may add and remove slots between a cut and the run that goes on.
func TestRotateLeavesSlotsOfOthers(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) { at[s] = m.copyTo(filepath.Join(t.TempDir(), "cut")) }
	if _, err := n.Rotate(t.Context(), []string{d.Identity}); err != nil {
		t.Fatal(err)
	}
	// The number that was to be the new slot's is taken, and so is that of the old slot once it was removed.
	for s, slot := range map[step]int{stepRotating: 1, stepSlotRemoved: 0} {
		c := at[s]
		c.addTheirs(c.devices[0], slot)
		if _, err := c.rotate(); err != nil {
			t.Errorf("%s: %v", s, err)
		}
		if _, header := c.opener(c.devices[0]); len(header.Keyslots) != 2 || luks.OpensKeySlot(t.Context(), c.devices[0].Path, slot, m.theirs()) != nil {
			t.Errorf("%s: %+v", s, header.Keyslots)
		}
	}
}

// A volume that cannot be rotated is as it was, and the others are done.
func TestRotateReportsEachVolume(t *testing.T) {
	m := newMachine(t)
	gone := m.disk(volumes.ClassEBS, "vol-1")
	torn := m.disk(volumes.ClassEBS, "vol-2")
	good := m.disk(volumes.ClassEBS, "vol-3")
	m.runOK()
	old, _ := m.opener(gone)
	m.reboot()
	m.write(torn, 5000, []byte{0xff})
	m.devices = m.devices[1:]
	done, err := m.rotate()
	var header *luks.HeaderError
	var refused *RefusedError
	if !errors.As(err, &header) || !errors.As(err, &refused) || refused.Refusal != RefusedDevice || len(done) != 3 {
		t.Errorf("%v", err)
	}
	if _, err := m.rotate("vol-9"); err == nil || !strings.Contains(err.Error(), `"vol-9"`) {
		t.Errorf("%v", err)
	}
	m.devices = append(m.devices, gone)
	m.runOK()
	for d, want := range map[string]bool{gone.Path: true, torn.Path: true, good.Path: false} {
		i := slices.IndexFunc(m.devices, func(v volumes.Device) bool { return v.Path == d })
		if k, _ := m.opener(m.devices[i]); (k.ID == old.ID) != want {
			t.Errorf("%s is opened by %s", d, k.ID)
		}
	}
	if _, there := m.records().Keys[old.ID]; !there {
		t.Error("a key record that volumes need was archived")
	}
}

// Where KMS does not give the new data key back, no disk is touched.
func TestRotateProvesTheNewKeyFirst(t *testing.T) {
	for name, spoil := range map[string]func(m *machine){
		"no GenerateDataKey": func(m *machine) { m.kms.Deny("GenerateDataKey") },
		"another data key": func(m *machine) {
			seen := 0
			m.kms.Fail(kmstest.Fault{Op: "Decrypt", Rewrite: func(a map[string]any) {
				if seen++; seen > 1 { // the first is the old key
					a["Plaintext"] = make([]byte, 32)
				}
			}})
		},
		"no Decrypt": func(m *machine) { m.kms.Deny("Decrypt") },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.disk(volumes.ClassEBS, "vol-1")
			m.runOK()
			spoil(m)
			sums := m.sums()
			if _, err := m.rotate(); err == nil {
				t.Error("rotated")
			}
			m.untouched(sums)
			for _, v := range m.records().Volumes {
				if v.Rotation != nil {
					t.Errorf("%+v", v)
				}
			}
		})
	}
}

// A volume whose key record is lost is refused as that, and is not written to.
func TestRotateWithoutTheKeyRecord(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	for id := range m.records().Keys {
		if err := os.Remove(filepath.Join(m.cfg.StateDir, "keys", id+".json")); err != nil {
			t.Fatal(err)
		}
	}
	sums := m.sums()
	var refused *RefusedError
	if _, err := m.rotate(); !errors.As(err, &refused) || refused.Refusal != RefusedRecord || !strings.Contains(err.Error(), "is missing") {
		t.Errorf("%v", err)
	}
	m.untouched(sums)
}
