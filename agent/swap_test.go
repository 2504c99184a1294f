package agent

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

func TestSwapPointIsTheSameEverywhere(t *testing.T) {
	if keycache.SwapPoint != volumes.SwapPoint {
		t.Errorf("records say %s, disks %s", keycache.SwapPoint, volumes.SwapPoint)
	}
}

// swapMachine has a disk that is to be swap, and one that is not.
func swapMachine(t *testing.T) (m *machine, swap volumes.Device) {
	m = newMachine(t)
	swap = m.disk(volumes.ClassInstanceStore, "AWS1")
	m.cfg.Volumes = []VolumeConfig{{Name: swap.Path, Filesystem: swapType}}
	return m, swap
}

func TestSwap(t *testing.T) {
	m, swap := swapMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS2")
	wantSwap := func(when string) {
		t.Helper()
		if len(m.swaps) != 1 || len(m.mounts) != 1 || m.mounts["/mnt"] == "" {
			t.Errorf("%s: swap %v, mounts %v", when, m.swaps, m.mounts)
		}
	}
	m.runOK()
	wantSwap("first boot")
	for _, v := range m.records().Volumes {
		if (v.Identity == "AWS1") != (v.MountPoint == volumes.SwapPoint && v.Filesystem == "swap") {
			t.Errorf("recorded: %+v", v)
		}
	}
	if r := m.runOK(); r.Outcomes[0].Action.Verb != Nothing {
		t.Errorf("a second run: %s", r.Outcomes[0].Action.Verb)
	}
	s, err := m.node().Status(t.Context())
	if err != nil || s.Well == nil || !*s.Well {
		t.Errorf("status: %+v, %v", s, err)
	}

	before := m.sums()
	m.reboot()
	m.runOK()
	wantSwap("reboot")
	m.untouched(before)

	busy := errors.New("no memory")
	m.fail = func(what, _ string) error {
		if what == "swapoff" {
			return busy
		}
		return nil
	}
	locked, err := m.node().Lock(t.Context(), []string{swap.Identity})
	if err != nil || len(locked) != 1 || !errors.Is(locked[0].Err, busy) {
		t.Errorf("lock without memory: %+v, %v", locked, err)
	}
	wantSwap("after a lock that failed")
	m.fail = func(string, string) error { return nil }
	if locked, err := m.node().Lock(t.Context(), []string{volumes.SwapPoint}); err != nil || len(locked) != 1 || locked[0].Err != nil || len(m.swaps) != 0 || len(m.open) != 1 {
		t.Errorf("lock: %+v, %v; swap %v, open %v", locked, err, m.swaps, m.open)
	}

	m.reboot()
	m.cfg.StateDir = filepath.Join(m.dir, "other state")
	m.runOK()
	wantSwap("adopted")

	// Without its record, and without a word of the configuration, it is known by what is in it.
	m.reboot()
	m.cfg.StateDir, m.cfg.Volumes = filepath.Join(m.dir, "third state"), nil
	m.runOK()
	if len(m.swaps) != 1 || len(m.mounts) != 1 {
		t.Errorf("adopted: swap %v, mounts %v", m.swaps, m.mounts)
	}
}

// Wherever the format of swap is cut, the next run makes it whole.
func TestSwapIsCutAtEveryStep(t *testing.T) {
	m, _ := swapMachine(t)
	cuts := m.cuts()
	wantSteps(t, cuts, stepKeyMade, stepKeyRecorded, stepKeyProven, stepIntent, stepFormatted, stepOpened, stepCleared, stepFilesystem, stepReady)
	for at, c := range cuts {
		t.Run(string(at), func(t *testing.T) {
			c.t = t
			c.cfg.Volumes = []VolumeConfig{{Name: c.devices[0].Path, Filesystem: swapType}}
			c.runOK()
			if len(c.swaps) != 1 || len(c.mounts) != 0 || len(c.records().Volumes) != 1 {
				t.Errorf("swap %v, mounts %v", c.swaps, c.mounts)
			}
		})
	}
}

// A filesystem that is there already is not made into swap.
func TestFilesystemDoesNotBecomeSwap(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	before := m.sums()
	m.cfg.Volumes = []VolumeConfig{{Name: d.Path, Filesystem: swapType}}
	m.runOK()
	m.untouched(before)
	if m.mounts["/mnt"] == "" || len(m.swaps) != 0 {
		t.Errorf("swap %v, mounts %v", m.swaps, m.mounts)
	}

	m.reboot()
	m.cfg.StateDir = filepath.Join(m.dir, "other state")
	errs := m.run().Failures()
	if len(errs) != 1 || !strings.Contains(errs[0].Error(), "the configuration says that it is swap, but volume ") || len(m.open)+len(m.records().Volumes) != 0 {
		t.Errorf("without its record: %v; open %v, records %v", errs, m.open, m.records().Volumes)
	}
	m.untouched(before)
}

// Where there is no record the configuration says that it is swap.
func TestSwapOpensByRecoveryKeyWithoutRecord(t *testing.T) {
	m, swap := swapMachine(t)
	m.runOK()
	text, err := m.addRecovery(false, "AWS1")
	if err != nil {
		t.Fatal(err)
	}
	m.reboot()
	m.cfg.StateDir = filepath.Join(m.dir, "other state")
	m.devices[0].Named = swap.Path
	done, err := m.unlockRecovery(text, swap.Path)
	if err != nil || done["AWS1"] != Unlock || len(m.swaps) != 1 {
		t.Errorf("%v, %v, swap %v", done, err, m.swaps)
	}
}
