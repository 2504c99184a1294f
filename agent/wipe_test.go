package agent

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// addSlot adds a key slot with a passphrase, as a person would.
func (m *machine) addSlot(d volumes.Device) {
	m.t.Helper()
	for _, rec := range m.records().Keys {
		key, err := m.node().cloud.Decrypt(m.t.Context(), rec)
		if err != nil {
			m.t.Fatal(err)
		}
		defer key.Wipe()
		phrase := filepath.Join(m.t.TempDir(), "phrase")
		if err := os.WriteFile(phrase, []byte("a passphrase of a test"), 0o600); err != nil {
			m.t.Fatal(err)
		}
		add := exec.Command("cryptsetup", "luksAddKey", "--key-file=-", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", d.Path, phrase)
		add.Stdin = strings.NewReader(string(key.Passphrase()))
		if out, err := add.CombinedOutput(); err != nil {
			m.t.Fatalf("%v: %s", err, out)
		}
	}
}

func (m *machine) wipe(name string) (Wipe, error) {
	m.t.Helper()
	return m.node().Wipe(m.t.Context(), name, func(Wipe) error { return nil })
}

func TestWipe(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	other := m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	files, err := m.backUp("vol-1")
	if err != nil {
		t.Fatal(err)
	}
	var refused *RefusedError
	if _, err := m.wipe("vol-1"); !errors.As(err, &refused) || refused.Refusal != RefusedInUse {
		t.Errorf("while it is mounted: %v", err)
	}
	m.reboot()
	sums := m.sums()
	no := errors.New("no")
	if _, err := m.node().Wipe(t.Context(), "vol-1", func(Wipe) error { return no }); !errors.Is(err, no) {
		t.Errorf("%v", err)
	}
	m.untouched(sums)
	decrypts := m.kms.Count("Decrypt")
	w, err := m.wipe("vol-1")
	if err != nil || w.Backup == nil || w.Backup.Path != files["vol-1"] || !w.Formats || m.kms.Count("Decrypt") != decrypts {
		t.Fatalf("%+v, %v", w, err)
	}
	content, err := volumes.Probe(t.Context(), d.Path, d.Size)
	if err != nil || !content.Blank {
		t.Errorf("%+v, %v", content, err)
	}
	if now := m.sums(); now["vol-2"] != sums["vol-2"] {
		t.Error("the other volume was touched")
	}
	r := m.records()
	if len(r.Volumes) != 1 || len(r.Keys) != 1 || len(r.Problems) != 0 {
		t.Errorf("%+v", r)
	}
	if archived, _ := filepath.Glob(filepath.Join(m.cfg.StateDir, "archive/volumes", w.Volume.UUID+".*.json")); len(archived) != 2 {
		t.Errorf("archived: %v", archived)
	}
	// The next run makes a new volume of it, under the same data key; the other one opens.
	m.runOK()
	if len(m.mounts) != 2 || m.kms.Count("GenerateDataKey") != 1 {
		t.Errorf("mounted: %v", m.mounts)
	}
	if _, ok := m.records().Volumes[w.Volume.UUID]; ok {
		t.Error("the wiped volume is back")
	}
	_ = other
}

// Wherever a wipe is cut the volume is whole, or nothing but another wipe touches the disk; and that completes.
func TestWipeIsCutAtEveryStep(t *testing.T) {
	for _, class := range []volumes.Class{volumes.ClassEBS, volumes.ClassInstanceStore} {
		t.Run(string(class), func(t *testing.T) { wipeIsCut(t, class) })
	}
}

func wipeIsCut(t *testing.T, class volumes.Class) {
	m := newMachine(t)
	m.disk(class, "disk-1")
	m.runOK()
	m.reboot()
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) { at[s] = m.copyTo(filepath.Join(t.TempDir(), "cut")) }
	if _, err := n.Wipe(t.Context(), "disk-1", func(Wipe) error { return nil }); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, at, stepWipeIntent, stepSlotsWiped, stepHeaderWiped, stepBlank, stepWipeArchived)
	for s, cut := range at {
		if s == stepWipeArchived {
			continue // it is done
		}
		sums := cut.sums()
		r := cut.run()
		var refused *RefusedError
		if len(r.Failures()) != 1 || !errors.As(r.Failures()[0], &refused) || refused.Refusal != RefusedWiping {
			t.Errorf("%s, %s: %v", class, s, r.Failures())
		}
		cut.untouched(sums)
		w, err := cut.wipe("disk-1")
		if err != nil || w.Volume.State != keycache.StateWiping || len(cut.records().Volumes) != 0 {
			t.Errorf("%s, %s: %+v, %v", class, s, w, err)
		}
		cut.runOK()
		if len(cut.mounts) != 1 {
			t.Errorf("%s, %s: mounted %v", class, s, cut.mounts)
		}
	}
}

func TestWipeRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(m *machine, d volumes.Device) (volume string)
		says  string
	}{
		"unknown": {func(*machine, volumes.Device) string { return "vol-9" }, "cannot find volume"},
		"away":    {func(m *machine, d volumes.Device) string { m.devices = nil; return "vol-1" }, "is not attached"},
		"in use": {func(m *machine, d volumes.Device) string {
			m.devices[0].Uses = []volumes.Use{{Kind: volumes.UseHeld, Evidence: "somebody has it"}}
			return "vol-1"
		}, "somebody has it"},
		"read-only": {func(m *machine, d volumes.Device) string { m.devices[0].ReadOnly = true; return "vol-1" }, "read-only"},
		"held":      {func(m *machine, d volumes.Device) string { m.held[d.Path] = true; return "vol-1" }, "held already"},
		"a filesystem": {func(m *machine, d volumes.Device) string {
			m.write(d, 0, make([]byte, 4<<20))
			if err := volumes.MakeFilesystem(m.t.Context(), d.Path, "ext4", "theirs", ""); err != nil {
				m.t.Fatal(err)
			}
			return "vol-1"
		}, "it holds ext4 filesystem"},
		"the volume is on another disk": {func(m *machine, d volumes.Device) string {
			m.devices[0].Identity, m.devices[0].Serial = "vol-2", "vol-2"
			return "vol-1"
		}, "and it is on vol-2"},
		"a copy beside it": {func(m *machine, d volumes.Device) string {
			twin := m.disk(volumes.ClassEBS, "vol-2")
			b, err := os.ReadFile(d.Path)
			if err != nil {
				m.t.Fatal(err)
			}
			m.write(twin, 0, b)
			return "/mnt"
		}, "and it is on vol-2"},
	} {
		t.Run(name, func(t *testing.T) {
			m, d, _ := backedUp(t)
			volume := c.spoil(m, d)
			sums := m.sums()
			if _, err := m.wipe(volume); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
			m.untouched(sums)
			for _, v := range m.records().Volumes {
				if v.State != keycache.StateReady {
					t.Errorf("its record says %s", v.State)
				}
			}
		})
	}
}

// A volume whose header is destroyed, and without KMS, can be wiped: that is what it is for.
func TestWipeWithoutHeaderAndKMS(t *testing.T) {
	m, d, _ := backedUp(t)
	m.kms.SetState(m.kms.ARN(), kmstest.Disabled)
	m.destroy(d)
	if _, err := m.wipe("vol-1"); err != nil {
		t.Error(err)
	}
}
