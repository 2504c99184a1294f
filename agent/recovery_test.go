package agent

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

func failuresOf(results []RecoveryResult, err error) error {
	for _, r := range results {
		err = errors.Join(err, r.Err)
	}
	return err
}

// addRecovery adds a recovery key and returns its text, as a person has it.
func (m *machine) addRecovery(replace bool, names ...string) (string, error) {
	m.t.Helper()
	var text string
	results, err := m.node().AddRecovery(m.t.Context(), names, replace, func(k *keycache.Key) error {
		text = string(k.Passphrase())
		return nil
	})
	return text, failuresOf(results, err)
}

func (m *machine) typed(text string) *keycache.Key {
	m.t.Helper()
	k, err := keycache.ParseRecoveryKey([]byte(text))
	if err != nil {
		m.t.Fatal(err)
	}
	return k
}

func (m *machine) testRecovery(text string, names ...string) error {
	m.t.Helper()
	results, err := m.node().TestRecovery(m.t.Context(), m.typed(text), names)
	return failuresOf(results, err)
}

func (m *machine) removeRecovery(names ...string) error {
	m.t.Helper()
	return failuresOf(m.node().RemoveRecovery(m.t.Context(), names))
}

// unlockRecovery unlocks by a recovery key and returns the verbs by identity.
func (m *machine) unlockRecovery(text string, names ...string) (map[string]Verb, error) {
	m.t.Helper()
	report, err := m.node().UnlockRecovery(m.t.Context(), m.typed(text), names)
	done := map[string]Verb{}
	for _, o := range report.Outcomes {
		done[o.Action.Device.Identity] = o.Action.Verb
	}
	return done, errors.Join(append(report.Failures(), err)...)
}

// noAWS takes KMS and IMDS away and counts what is asked of them from now on.
func (m *machine) noAWS() (asked func() int) {
	m.kms.Deny("Decrypt")
	before := len(m.imds.Requests()) + len(m.kms.Calls())
	return func() int { return len(m.imds.Requests()) + len(m.kms.Calls()) - before }
}

func TestRecoveryKeyOpensWithoutKMS(t *testing.T) {
	m := newMachine(t)
	ssd := m.disk(volumes.ClassInstanceStore, "ssd1")
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	text, err := m.addRecovery(false, "ssd1", "vol-1") // while they are mounted
	if err != nil {
		t.Fatal(err)
	}
	other, err := m.addRecovery(false, "vol-2")
	if err != nil || other == text {
		t.Fatal(err)
	}
	if err := m.testRecovery(text, "ssd1", "vol-1"); err != nil {
		t.Error(err)
	}
	if err := m.testRecovery(text, "vol-2"); !errors.Is(err, luks.ErrWrongRecoveryKey) {
		t.Errorf("another volume's: %v", err)
	}

	m.reboot()
	asked := m.noAWS()
	m.imds.SetIdentity("instanceId", "i-0123456789abcdeff") // a person is there
	sums := m.sums()
	records := m.records()
	done, err := m.unlockRecovery(text)
	if err != nil || done["ssd1"] != Unlock || done["vol-1"] != Unlock || done["vol-2"] != Leave || len(m.mounts) != 2 {
		t.Errorf("%v, %v, mounted %v", done, err, m.mounts)
	}
	if done, err := m.unlockRecovery(text); err != nil || done["ssd1"] != Nothing {
		t.Errorf("again: %v, %v", done, err)
	}
	if done, err := m.unlockRecovery(text, "vol-2"); !errors.Is(err, luks.ErrWrongRecoveryKey) || len(m.open) != 2 {
		t.Errorf("another volume by name: %v, %v", done, err)
	}
	if done, err := m.unlockRecovery(other); err != nil || len(m.mounts) != 3 {
		t.Errorf("the other key: %v, %v", done, err)
	}
	m.untouched(sums)
	for uuid, v := range m.records().Volumes {
		if v != records.Volumes[uuid] {
			t.Errorf("record %+v was %+v", v, records.Volumes[uuid])
		}
	}
	if n := asked(); n != 0 {
		t.Errorf("KMS and IMDS were asked %d times", n)
	}

	// Open, and unmounted by hand.
	for where := range m.mounts {
		delete(m.mounts, where)
	}
	if done, err := m.unlockRecovery(text, ssd.Path); err != nil || done["ssd1"] != Mount || len(m.mounts) != 1 {
		t.Errorf("unmounted: %v, %v, %v", done, err, m.mounts)
	}
}

// Without records a volume has to be named, and is mounted only where the configuration says.
func TestRecoveryKeyWithoutRecords(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	text, err := m.addRecovery(false, "vol-1", "vol-2")
	if err != nil {
		t.Fatal(err)
	}
	m.reboot()
	m.noAWS()
	m.cfg.StateDir += "-lost"
	if done, err := m.unlockRecovery(text); err != nil || len(done) != 0 {
		t.Errorf("not named: %v, %v", done, err)
	}
	if done, err := m.unlockRecovery(text, d.Path); err != nil || done["vol-1"] != Unlock || len(m.open) != 1 || len(m.mounts) != 0 {
		t.Errorf("named: %v, %v, open %v", done, err, m.open)
	}
	var refused *RefusedError
	if _, err := m.unlockRecovery(text, d.Path); !errors.As(err, &refused) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("where it is open: %v", err)
	}
	m.cfg.Volumes = []VolumeConfig{{Name: "vol-2", MountPoint: "/data"}}
	if done, err := m.unlockRecovery(text, "vol-2"); err != nil || m.mounts["/data"] == "" {
		t.Errorf("configured: %v, %v, %v", done, err, m.mounts)
	}
	var unknown *UnknownVolumeError
	if _, err := m.unlockRecovery(text, "vol-3"); !errors.As(err, &unknown) {
		t.Errorf("unknown: %v", err)
	}
	if r := m.records(); len(r.Volumes)+len(r.Keys) != 0 {
		t.Errorf("records were written: %+v", r)
	}
}

func TestOneRecoveryKeyForAVolume(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	old, err := m.addRecovery(false, "vol-1")
	if err != nil {
		t.Fatal(err)
	}
	sums := m.sums()
	var there *RecoveryKeyThereError
	if text, err := m.addRecovery(false, "vol-1"); !errors.As(err, &there) || text != "" {
		t.Errorf("a second: %v; shown: %v", err, text != "")
	}
	m.untouched(sums)
	text, err := m.addRecovery(true, "vol-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.testRecovery(old); !errors.Is(err, luks.ErrWrongRecoveryKey) {
		t.Errorf("the old: %v", err)
	}
	if err := m.testRecovery(text); err != nil {
		t.Errorf("the new: %v", err)
	}
	// Removed only where KMS gives the data key, and that one opens.
	m.kms.SetState(m.kms.ARN(), kmstest.Disabled)
	sums = m.sums()
	if err := m.removeRecovery("vol-1"); err == nil {
		t.Error("removed without KMS")
	}
	m.untouched(sums)
	m.kms.SetState(m.kms.ARN(), kmstest.Enabled)
	if err := m.removeRecovery("vol-1"); err != nil {
		t.Error(err)
	}
	if err := errors.Join(m.testRecovery(text)); !errors.Is(err, luks.ErrNoRecoveryKey) {
		t.Errorf("the removed: %v", err)
	}
	if err := m.removeRecovery("vol-1"); !errors.Is(err, luks.ErrNoRecoveryKey) {
		t.Errorf("removed again: %v", err)
	}
	m.reboot()
	m.runOK()
}

// A key that could not be shown is nobody's: nothing of it stays.
func TestRecoveryKeyThatIsNotShown(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	gone := errors.New("the terminal is gone")
	if _, err := m.node().AddRecovery(t.Context(), []string{"vol-1"}, false, func(*keycache.Key) error { return gone }); !errors.Is(err, gone) {
		t.Error(err)
	}
	list, err := m.node().ListRecovery(t.Context(), nil)
	if err != nil || len(list) != 1 || list[0].Err != nil || len(list[0].Keys)+len(list[0].Other) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
}

// At every step the data key opens the volume, list says what there is, no key counts that nobody has, and the command can be repeated.
func TestRecoveryKeyIsCutAtEveryStep(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	old, err := m.addRecovery(false, "vol-1")
	if err != nil {
		t.Fatal(err)
	}
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) { at[s] = m.copyTo(filepath.Join(t.TempDir(), "cut")) }
	text := ""
	results, err := n.AddRecovery(t.Context(), []string{"vol-1"}, true, func(k *keycache.Key) error {
		text = string(k.Passphrase())
		return nil
	})
	if err := failuresOf(results, err); err != nil {
		t.Fatal(err)
	}
	for s, want := range map[step]struct {
		keys, other int
		old, new    bool
	}{
		stepRecoverySlot:      {1, 1, true, false},
		stepRecoveryShown:     {1, 1, true, false},
		stepRecoveryToken:     {2, 0, true, true},
		stepRecoverySlotGone:  {2, 0, false, true},
		stepRecoveryTokenGone: {1, 0, false, true},
	} {
		cut := at[s]
		if cut == nil {
			t.Fatalf("step %q was not reached", s)
		}
		list, err := cut.node().ListRecovery(t.Context(), nil)
		if err != nil || len(list) != 1 || len(list[0].Keys) != want.keys || len(list[0].Other) != want.other {
			t.Errorf("%s: %+v, %v", s, list, err)
		}
		if opens := cut.testRecovery(old) == nil; opens != want.old {
			t.Errorf("%s: the old key opens: %v", s, opens)
		}
		if opens := cut.testRecovery(text) == nil; opens != want.new {
			t.Errorf("%s: the new key opens: %v", s, opens)
		}
		cut.runOK()
		again, err := cut.addRecovery(true, "vol-1")
		if err != nil {
			t.Errorf("%s, again: %v", s, err)
			continue
		}
		if err := cut.testRecovery(again); err != nil || cut.testRecovery(old) == nil || cut.testRecovery(text) == nil {
			t.Errorf("%s, again: %v, or an earlier key opens", s, err)
		}
		if err := cut.removeRecovery("vol-1"); err != nil {
			t.Errorf("%s, removed: %v", s, err)
		}
		cut.reboot()
		cut.runOK()
	}
}

// Each attack on a header with a recovery key: unlock --recovery-key maps and mounts nothing, and opens the other volume.
func TestAttacksInUnlockByRecoveryKey(t *testing.T) {
	m := newMachine(t)
	victim := m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	text, err := m.addRecovery(false, "vol-1", "vol-2")
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(victim.Path)
	if err != nil {
		t.Fatal(err)
	}
	m.noAWS()
	for _, a := range lukstest.Attacks() {
		t.Run(a.Name, func(t *testing.T) {
			m.t = t
			m.reboot()
			m.write(victim, 0, good[:1<<20])
			if err := a.Do(victim.Path); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(victim.Path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = m.unlockRecovery(text)
			var header *luks.HeaderError
			if err == nil || !errors.As(err, &header) && a.Name != "another UUID" || !strings.Contains(err.Error(), a.Reason) {
				t.Errorf("want a header that is refused, %q: %v", a.Reason, err)
			}
			if len(m.open) != 1 || len(m.mounts) != 1 || slices.Contains(opened(m), victim.Path) {
				t.Errorf("open %v, mounted %v", m.open, m.mounts)
			}
			if after, err := os.ReadFile(victim.Path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the disk was written to (%v)", err)
			}
		})
	}
}
