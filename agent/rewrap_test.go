package agent

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// rewrap runs Rewrap to a key as a new process would, and returns what was done and the errors.
func (m *machine) rewrap(to string) ([]Rewrapped, error) {
	m.t.Helper()
	configured := m.cfg.KMSKey
	defer func() { m.cfg.KMSKey = configured }()
	m.cfg.KMSKey = to
	done, err := m.node().Rewrap(m.t.Context())
	for _, r := range done {
		err = errors.Join(err, r.Err)
	}
	return done, err
}

// agree wants every record and token of the machine's volumes to be under a key, and each volume to open by what KMS makes of both.
func (m *machine) agree(under string) {
	m.t.Helper()
	r := m.records()
	for _, d := range m.devices {
		header, err := luks.Inspect(d.Path)
		if err != nil || header.Header == nil {
			m.t.Errorf("%s: %v, %+v", d.Identity, err, header)
			continue
		}
		rec := r.Keys[r.Volumes[header.Header.UUID].KeyID]
		token := header.Header.Token
		if rec.KeyARN != under || token.KeyARN != under || !bytes.Equal(token.WrappedKey, rec.WrappedKey) {
			m.t.Errorf("%s: record under %s, token under %s, want %s", d.Identity, rec.KeyARN, token.KeyARN, under)
		}
	}
}

func TestRewrap(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "ssd1")
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	old := m.kms.ARN()
	to := m.kms.NewKey(kmstest.KeySpec{})
	before := m.records()
	generated := m.kms.Count("GenerateDataKey")

	done, err := m.rewrap(to) // while both are mounted
	if err != nil {
		t.Fatal(err)
	}
	m.agree(to)
	if len(done) != 3 || done[0].IsToken() || !done[1].IsToken() || !done[2].IsToken() {
		t.Errorf("%+v", done)
	}
	for _, r := range done {
		if r.From != old || r.Key.KeyARN != to {
			t.Errorf("%+v", r)
		}
	}
	if m.kms.Count("ReEncrypt") != 1 || m.kms.Count("GenerateDataKey") != generated {
		t.Errorf("calls: %+v", m.kms.Calls())
	}
	for id, was := range before.Keys {
		is := m.records().Keys[id]
		was.KeyARN, was.WrappedKey, was.RequestID = is.KeyARN, is.WrappedKey, is.RequestID
		if is.ID != was.ID || !is.Created.Equal(was.Created) {
			t.Errorf("record %+v was %+v", is, was)
		}
	}
	if files, _ := filepath.Glob(filepath.Join(m.cfg.StateDir, "archive/keys/*.json")); len(files) != 2 {
		t.Errorf("archived: %v", files)
	}
	// Again: nothing is done.
	sums := m.sums()
	done, err = m.rewrap(to)
	if err != nil {
		t.Error(err)
	}
	for _, r := range done {
		if r.From != "" {
			t.Errorf("done twice: %+v", r)
		}
	}
	m.untouched(sums)
	if m.kms.Count("ReEncrypt") != 1 {
		t.Error("wrapped twice")
	}
	// The old KMS key is not needed any more.
	m.kms.SetState(old, kmstest.Disabled)
	m.reboot()
	m.cfg.KMSKey = to
	m.runOK()
	if len(m.mounts) != 2 {
		t.Errorf("mounted: %v", m.mounts)
	}
	// Nor are the records.
	m.reboot()
	m.cfg.StateDir += "-lost"
	m.runOK()
	if len(m.mounts) != 2 {
		t.Errorf("mounted: %v", m.mounts)
	}
}

func TestRewrapIsCutAtEveryStep(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	old, to := m.kms.ARN(), m.kms.NewKey(kmstest.KeySpec{})
	m.cfg.KMSKey = to
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) { at[s] = m.copyTo(filepath.Join(t.TempDir(), "cut")) }
	if _, err := n.Rewrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, s := range []step{stepRewrapped, stepReplaced} {
		cut := at[s]
		if cut == nil {
			t.Fatalf("step %q was not reached", s)
		}
		// It opens, with the key under either name, and rewrap goes on where it was.
		cut.runOK()
		cut.reboot()
		if _, err := cut.rewrap(to); err != nil {
			t.Errorf("%s: %v", s, err)
		}
		cut.agree(to)
		m.kms.SetState(old, kmstest.Disabled)
		cut.runOK()
		if len(cut.mounts) != 1 {
			t.Errorf("%s: mounted %v", s, cut.mounts)
		}
		m.kms.SetState(old, kmstest.Enabled)
	}
}

// Where KMS does not give the same data key for the new record, or the header is not what the record's key made, everything stays.
func TestRewrapProvesBeforeItReplaces(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(m *machine, to string)
		want  error
	}{
		"another data key": {func(m *machine, to string) {
			m.kms.Fail(kmstest.Fault{Op: "Decrypt", Rewrite: func(a map[string]any) {
				if a["KeyId"] == to {
					a["Plaintext"] = bytes.Repeat([]byte{1}, 32)
				}
			}})
		}, keycache.ErrOtherKey},
		"no Decrypt":             {func(m *machine, to string) { m.kms.SetState(m.kms.ARN(), kmstest.Disabled) }, nil},
		"no ReEncrypt":           {func(m *machine, to string) { m.kms.Deny("ReEncrypt") }, nil},
		"the target is disabled": {func(m *machine, to string) { m.kms.SetState(to, kmstest.Disabled) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.disk(volumes.ClassEBS, "vol-1")
			m.runOK()
			to := m.kms.NewKey(kmstest.KeySpec{})
			c.spoil(m, to)
			records, sums := m.records(), m.sums()
			if _, err := m.rewrap(to); err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%v", err)
			}
			m.untouched(sums)
			for id, k := range m.records().Keys {
				if !bytes.Equal(k.WrappedKey, records.Keys[id].WrappedKey) {
					t.Error("the record was replaced")
				}
			}
		})
	}
}

// A volume whose token cannot be replaced is reported, and the others are done.
func TestRewrapReportsEachVolume(t *testing.T) {
	m := newMachine(t)
	gone := m.disk(volumes.ClassEBS, "vol-1")
	torn := m.disk(volumes.ClassEBS, "vol-2")
	good := m.disk(volumes.ClassEBS, "vol-3")
	m.runOK()
	m.reboot()
	m.write(torn, 5000, []byte{0xff})
	m.devices = m.devices[1:]
	to := m.kms.NewKey(kmstest.KeySpec{})
	done, err := m.rewrap(to)
	var header *luks.HeaderError
	var refused *RefusedError
	if !errors.As(err, &header) || !errors.As(err, &refused) || refused.Refusal != RefusedDevice {
		t.Errorf("%v", err)
	}
	results := map[string]string{}
	for _, r := range done {
		results[r.Volume.Identity] = r.From
	}
	if results[good.Identity] == "" || results[gone.Identity] != "" || results[torn.Identity] != "" {
		t.Errorf("%v", results)
	}
	// Attached and restored, they are done too.
	m.devices = append(m.devices, gone)
	m.cfg.KMSKey = to
	m.runOK()
	if _, err := m.rewrap(to); err != nil {
		t.Error(err)
	}
	m.agree(to)
}
