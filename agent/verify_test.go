package agent

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// verify returns the findings that are not ok, a line each.
func (m *machine) verify() string {
	m.t.Helper()
	verified, err := m.node().Verify(m.t.Context(), nil)
	if err != nil {
		m.t.Fatal(err)
	}
	var lines []string
	for _, v := range verified {
		for _, f := range v.Findings {
			if (f.Result == ResultFailed) != (f.Err != nil) {
				m.t.Errorf("%+v", f)
			}
			if f.Result != ResultOK {
				lines = append(lines, string(f.Result)+" "+f.Check+": "+f.Detail)
			}
		}
	}
	return strings.Join(lines, "\n")
}

// tree is everything below a directory.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() && info.Name() != "audit.jsonl" { // which tells of each use of a data key
			b, readErr := os.ReadFile(path)
			all.WriteString(path + info.Mode().String() + info.ModTime().String() + keycache.Sum(b) + "\n")
			err = readErr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

func TestVerify(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "ssd1")
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	before := tree(t, m.dir)
	if got := m.verify(); strings.Count(got, "warning backup: there is no header backup") != 2 || strings.Contains(got, "failed") {
		t.Error(got)
	}
	if tree(t, m.dir) != before {
		t.Error("something was written")
	}
	if _, err := m.backUp(); err != nil {
		t.Fatal(err)
	}
	for _, state := range []string{"open", "locked"} {
		before, decrypts, open := tree(t, m.dir), m.kms.Count("Decrypt"), len(m.open)
		if got := m.verify(); got != "" {
			t.Errorf("%s: %s", state, got)
		}
		if m.kms.Count("Decrypt") != decrypts+1 || len(m.open) != open || tree(t, m.dir) != before {
			t.Errorf("%s: it did more than to look", state)
		}
		m.reboot()
	}
}

func TestVerifyFinds(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(m *machine, d volumes.Device)
		want  string
	}{
		"a damaged primary copy":   {func(m *machine, d volumes.Device) { m.write(d, 5000, []byte{0xff}) }, "failed copies: cannot trust the LUKS header"},
		"a damaged secondary copy": {func(m *machine, d volumes.Device) { m.write(d, 5000+16<<10, []byte{0xff}) }, "failed copies: cannot trust the LUKS header"},
		"both damaged": {func(m *machine, d volumes.Device) {
			m.write(d, 5000, []byte{0xff})
			m.write(d, 5000+16<<10, []byte{0xff})
		}, "failed header: "},
		"no header":          {func(m *machine, d volumes.Device) { m.destroy(d) }, "it is not there"},
		"a damaged key slot": {func(m *machine, d volumes.Device) { m.write(d, 40<<10, []byte{1, 2, 3}) }, "failed mac: "},
		"KMS says no":        {func(m *machine, d volumes.Device) { m.kms.SetState(m.kms.ARN(), kmstest.Disabled) }, "failed key: "},
		"another data key": {func(m *machine, d volumes.Device) {
			m.kms.Fail(kmstest.Fault{Op: "Decrypt", Rewrite: func(a map[string]any) { a["Plaintext"] = bytes.Repeat([]byte{1}, 32) }})
		}, "failed mac: "},
		"a token that was not rewrapped": {func(m *machine, d volumes.Device) {
			to := m.kms.NewKey(kmstest.KeySpec{})
			m.cfg.KMSKey = to
			n := m.node()
			devices := m.devices
			m.devices = nil
			if _, err := n.Rewrap(m.t.Context()); err != nil {
				m.t.Fatal(err)
			}
			m.devices = devices
		}, "failed token: "},
		"a lost key record": {func(m *machine, d volumes.Device) {
			for id := range m.records().Keys {
				if err := os.Remove(filepath.Join(m.cfg.StateDir, "keys", id+".json")); err != nil {
					m.t.Fatal(err)
				}
			}
		}, "failed key: cannot use volume"},
		"another disk": {func(m *machine, d volumes.Device) { m.devices[0].Identity = "vol-2" }, "failed record: "},
		"a larger disk": {func(m *machine, d volumes.Device) {
			m.devices[0].Size += 4096
			if err := os.Truncate(d.Path, m.devices[0].Size); err != nil {
				m.t.Fatal(err)
			}
		}, "warning record: "},
		"no disk": {func(m *machine, d volumes.Device) { m.devices = nil }, "failed device: "},
		"a header that changed since": {func(m *machine, d volumes.Device) {
			m.addSlot(d)
		}, "warning backup: the header changed after the last backup"},
	} {
		t.Run(name, func(t *testing.T) {
			m, d, _ := backedUp(t)
			c.spoil(m, d)
			sums := m.sums()
			if got := m.verify(); !strings.Contains(got, c.want) {
				t.Errorf("found %q, want %q", got, c.want)
			}
			m.untouched(sums)
		})
	}
}

// While a data key is being replaced each verb knows which one the volume has, or waits.
func TestHeaderVerbsDuringRotate(t *testing.T) {
	m, _, file := backedUp(t)
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) { at[s] = m.copyTo(filepath.Join(t.TempDir(), "cut")) }
	if _, err := n.Rotate(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for s, cut := range at {
		rotating := false
		for _, v := range cut.records().Volumes {
			rotating = v.Rotation != nil
		}
		if got := cut.verify(); strings.Contains(got, "failed") || strings.Contains(got, "rotate goes on") != rotating {
			t.Errorf("%s: %s", s, got)
		}
		if !rotating {
			continue
		}
		if _, err := cut.backUp(); !errors.Is(err, ErrRotating) {
			t.Errorf("%s: backup: %v", s, err)
		}
		if _, err := cut.restore(file, ""); !errors.Is(err, ErrRotating) {
			t.Errorf("%s: restore: %v", s, err)
		}
		if _, err := cut.wipe("vol-1"); err != nil {
			t.Errorf("%s: wipe: %v", s, err)
		}
	}
	// A header from before opens by the old data key, which is not the record's.
	if _, err := m.restore(file, ""); !errors.Is(err, luks.ErrWrongKey) {
		t.Errorf("%v", err)
	}
}

func TestVerifyUnknownVolume(t *testing.T) {
	m, _, _ := backedUp(t)
	if _, err := m.node().Verify(t.Context(), []string{"vol-9"}); !errors.As(err, new(*UnknownVolumeError)) {
		t.Errorf("%v", err)
	}
}
