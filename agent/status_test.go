package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// status is the status as a new process tells it. It may ask nobody.
func (m *machine) status() Status {
	m.t.Helper()
	n := m.node()
	n.usage = func(string) (volumes.Space, error) { return volumes.Space{Used: 5, Total: 24}, nil }
	kms, imds := len(m.kms.Calls()), len(m.imds.Requests())
	s, err := n.Status(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	if len(m.kms.Calls()) != kms || len(m.imds.Requests()) != imds {
		m.t.Error("status asked KMS or IMDS")
	}
	return s
}

// of is what the status says of a disk's volume.
func (s *Status) of(t *testing.T, identity string) VolumeStatus {
	t.Helper()
	i := slices.IndexFunc(s.Volumes, func(v VolumeStatus) bool { return v.Identity == identity })
	if i < 0 {
		t.Fatalf("the status has no %s: %+v", identity, s.Volumes)
	}
	return s.Volumes[i]
}

// wantProblem wants a volume, and so the node, not to be well, for one reason.
func wantProblem(t *testing.T, s Status, identity, state, words string) {
	t.Helper()
	v := s.of(t, identity)
	if *s.Well || v.State != state || len(v.Problems) != 1 || !strings.Contains(v.Problems[0], words) {
		t.Errorf("well %v, %s, problems %q, want %s and %q", *s.Well, v.State, v.Problems, state, words)
	}
}

// passphrase writes the file that cryptsetup takes the data key's passphrase from.
func (m *machine) passphrase() string {
	m.t.Helper()
	for _, rec := range m.records().Keys {
		key, err := m.node().cloud.Decrypt(m.t.Context(), rec)
		if err != nil {
			m.t.Fatal(err)
		}
		defer key.Wipe()
		path := filepath.Join(m.dir, "passphrase")
		if err := os.WriteFile(path, key.Passphrase(), 0o600); err != nil {
			m.t.Fatal(err)
		}
		return path
	}
	m.t.Fatal("there is no key")
	return ""
}

func TestStatusOfAWellNode(t *testing.T) {
	m := newMachine(t)
	if s := m.status(); *s.Well || s.Result != "none" || len(s.Volumes)+len(s.Problems) != 0 {
		t.Errorf("before all: %+v", s)
	}
	d := m.disk(volumes.ClassInstanceStore, "ssd1")
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	s := m.status()
	if !*s.Well || s.KMSKey != m.cfg.KMSKey || s.Quarantined != 0 || len(s.Problems) != 0 || len(s.Volumes) != 2 {
		t.Errorf("%+v", s)
	}
	v := s.of(t, "ssd1")
	rec := m.records().Volumes[v.UUID]
	key := m.records().Keys[rec.KeyID]
	if v.State != "mounted" || v.Device != d.Path || v.Size != d.Size || v.FilesystemUsed != 5 || v.FilesystemSize != 24 ||
		v.KeyARN != key.KeyARN || !v.KeyCreated.Equal(key.Created) || v.RewrapPending || *v.RecoveryKey || *v.OtherKeySlots != 0 ||
		v.LastUnlock.Before(s.Started) || v.LastUnlock.After(s.Finished) || !v.HeaderBackup.IsZero() || len(v.Problems) != 0 {
		t.Errorf("%+v", v)
	}
	// Another process holds the records.
	_, release, err := m.node().lockRecords(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	sums := m.sums()
	if s := m.status(); !*s.Well {
		t.Errorf("under a lock: %+v", s)
	}
	m.untouched(sums)
}

func TestStatusCountsKeySlots(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	ours := m.passphrase()
	for range 3 {
		tool(t, "someone's", "cryptsetup", "luksAddKey", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", ours, d.Path, "-")
	}
	tool(t, `{"type":"`+luks.RecoveryTokenType+`","keyslots":["2"]}`, "cryptsetup", "token", "import", "--json-file=-", d.Path)
	tool(t, `{"type":"clevis","keyslots":["3"]}`, "cryptsetup", "token", "import", "--json-file=-", d.Path)
	for _, state := range []string{"mounted", "locked"} {
		s := m.status()
		if v := s.of(t, "vol-1"); v.State != state || v.RecoveryKey == nil || !*v.RecoveryKey || *v.OtherKeySlots != 2 || len(v.Problems) != 0 {
			t.Errorf("%s: %+v", state, v)
		}
		m.reboot()
	}
}

func TestLastUnlockIsKept(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	first := m.status()
	m.runOK() // finds them open
	if s := m.status(); !s.of(t, "vol-1").LastUnlock.Equal(first.of(t, "vol-1").LastUnlock) {
		t.Error("a run that opened nothing changed when it was opened")
	}
	if _, err := m.node().Lock(t.Context(), []string{"vol-1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.node().Unlock(t.Context(), []string{"vol-1"}); err != nil { // is not about the other
		t.Fatal(err)
	}
	s := m.status()
	if !s.of(t, "vol-1").LastUnlock.After(first.of(t, "vol-1").LastUnlock) || !s.of(t, "vol-2").LastUnlock.Equal(first.of(t, "vol-2").LastUnlock) {
		t.Errorf("%+v, was %+v", s.Volumes, first.Volumes)
	}
	if !*s.Well || len(s.Volumes) != 2 {
		t.Errorf("%+v", s)
	}
	// A volume without a record is not told of for ever.
	if err := os.RemoveAll(m.cfg.StateDir); err != nil {
		t.Fatal(err)
	}
	if s := m.status(); len(s.Volumes) != 1 || s.Volumes[0].Action == "" {
		t.Errorf("without records: %+v", s.Volumes)
	}
}

// TestUnlockTimeOfAVolumeThatDoesNotMount: it is open all the same.
func TestUnlockTimeOfAVolumeThatDoesNotMount(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.fail = func(step, _ string) error {
		if step == "mount" {
			return errors.New("it is cut")
		}
		return nil
	}
	m.run()
	s := m.status()
	wantProblem(t, s, "vol-1", "open", "it is cut")
	if s.of(t, "vol-1").LastUnlock.IsZero() {
		t.Error("nothing tells when it was opened")
	}
	// A person mounts it: what the run could not do is done.
	m.fail = func(string, string) error { return nil }
	v := s.of(t, "vol-1")
	m.mounts[v.MountPoint] = m.Path(v.Mapping)
	if s := m.status(); !*s.Well {
		t.Errorf("mounted by hand: %+v", s)
	}
	m.mounts["/elsewhere"] = m.Path(v.Mapping)
	delete(m.mounts, v.MountPoint)
	wantProblem(t, m.status(), "vol-1", "mounted", "it is mounted on /elsewhere, not on /mnt")
}

func TestStatusOfTrouble(t *testing.T) {
	made := newMachine(t)
	made.disk(volumes.ClassEBS, "vol-1")
	made.disk(volumes.ClassEBS, "vol-2")
	made.runOK()
	uuid := ""
	for _, rec := range made.records().Volumes {
		if rec.Identity == "vol-1" {
			uuid = rec.UUID
		}
	}
	for _, tc := range []struct {
		name, state, words string
		do                 func(m *machine, d volumes.Device)
	}{
		{"locked, which is no problem", "locked", "", func(m *machine, _ volumes.Device) {}},
		{"missing", "missing", "no disk shows it", func(m *machine, _ volumes.Device) { m.devices = m.devices[1:] }},
		{"missing in a run", "missing", "is recorded ready, but no disk shows it", func(m *machine, _ volumes.Device) {
			m.devices = m.devices[1:]
			m.run()
		}},
		{"secondary header damaged", "locked", "the secondary LUKS header is damaged", func(m *machine, d volumes.Device) { m.write(d, 16<<10+4200, []byte{255}) }},
		{"primary header damaged", "locked", "the primary LUKS header is damaged", func(m *machine, d volumes.Device) { m.write(d, 4200, []byte{255}) }},
		{"both headers damaged", "locked", "its disk does not show its LUKS header", func(m *machine, d volumes.Device) {
			m.write(d, 4200, []byte{255})
			m.write(d, 16<<10+4200, []byte{255})
		}},
		{"a header that is not trusted", "locked", "its LUKS header cannot be trusted: ", func(m *machine, d volumes.Device) {
			tool(m.t, "", "cryptsetup", "token", "remove", "-q", "--token-id", "0", d.Path)
		}},
		{"a disk that cannot be read", "locked", "cannot inspect /dev/null", func(m *machine, _ volumes.Device) { m.devices[0].Path = "/dev/null" }},
		{"a disk that is in use", "locked", "its header was not read", func(m *machine, _ volumes.Device) {
			m.devices[0].Uses = []volumes.Use{{Kind: volumes.UseHeld, Evidence: "md0 is on it"}}
		}},
		{"a copy of the disk", "locked", "copy.img shows the same LUKS UUID", func(m *machine, d volumes.Device) {
			copied := m.disk(volumes.ClassEBS, "copy")
			data, err := os.ReadFile(d.Path)
			if err == nil {
				err = os.WriteFile(copied.Path, data, 0o600)
			}
			if err != nil {
				m.t.Fatal(err)
			}
		}},
		{"another KMS key is configured", "locked", "rewrap is pending", func(m *machine, _ volumes.Device) { m.cfg.KMSKey = m.kms.NewKey(kmstest.KeySpec{}) }},
		{"no key record", "locked", " is missing", func(m *machine, _ volumes.Device) {
			if err := os.RemoveAll(filepath.Join(m.cfg.StateDir, "keys")); err != nil {
				m.t.Fatal(err)
			}
		}},
		{"a format that was cut", "locked", "its format was not finished", func(m *machine, _ volumes.Device) {
			m.editRecord(uuid, `"state": "ready"`, `"state": "formatting"`)
		}},
		{"a record of another instance", "locked", "its record is of instance i-0aaaaaaaaaaaaaaaa", func(m *machine, _ volumes.Device) {
			m.editRecord(uuid, m.status().InstanceID, "i-0aaaaaaaaaaaaaaaa")
		}},
		{"KMS said no", "locked", "AccessDenied", func(m *machine, _ volumes.Device) {
			m.kms.Deny("Decrypt")
			m.run()
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := made.copyTo(filepath.Join(t.TempDir(), "copy"))
			m.t = t
			m.reboot()
			tc.do(m, m.devices[0])
			s := m.status()
			if tc.words != "" {
				wantProblem(t, s, "vol-1", tc.state, tc.words)
			} else if v := s.of(t, "vol-1"); *s.Well || v.State != tc.state || len(v.Problems) != 0 {
				t.Errorf("well %v, %+v", *s.Well, v)
			}
			// The other one is not missed because of the first.
			if v := s.of(t, "vol-2"); v.State == "missing" || v.Size == 0 {
				t.Errorf("the other: %+v", v)
			}
		})
	}
}

// editRecord changes a volume record as a person might.
func (m *machine) editRecord(uuid, from, to string) {
	m.t.Helper()
	path := filepath.Join(m.cfg.StateDir, "volumes", uuid+".json")
	text, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(text), from) {
		m.t.Fatalf("%v: no %s in %s", err, from, text)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), from, to, 1)), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// TestAllowedKeyIsWell: a volume that was adopted under an allowed key is as somebody wants it.
func TestAllowedKeyIsWell(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.cfg.AllowedKeys = []string{m.kms.ARN()}
	m.cfg.KMSKey = m.kms.NewKey(kmstest.KeySpec{})
	if s := m.status(); !*s.Well || !s.Volumes[0].RewrapPending {
		t.Errorf("%+v", s)
	}
}

func TestStatusWithBadFiles(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	bad := filepath.Join(m.cfg.StateDir, "volumes", "not-a-record.json")
	aside := filepath.Join(m.cfg.StateDir, "quarantine", "20260131T081530.000000000Z", "volumes")
	err := errors.Join(os.WriteFile(bad, []byte("{"), 0o600), os.WriteFile(m.node().statusPath, []byte("half"), 0o600),
		os.MkdirAll(aside, 0o700), os.WriteFile(filepath.Join(aside, "x.json"), nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	m.missing = []volumes.Missing{{Name: "/dev/sdf", Reason: "there is no such device"}}
	s := m.status()
	if *s.Well || len(s.Problems) != 3 || s.Quarantined != 1 || s.Result != "none" || s.of(t, "vol-1").State != "mounted" {
		t.Errorf("%+v", s)
	}
	for i, words := range []string{"cannot read how the last run went", bad, "/dev/sdf is named in the configuration, but there is no such device"} {
		if !strings.Contains(s.Problems[i], words) {
			t.Errorf("%q does not say %q", s.Problems[i], words)
		}
	}
}

// TestProgressIsTold: whoever waits hears of each volume's steps.
func TestProgressIsTold(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	var mu sync.Mutex
	var told []string
	n := m.node()
	n.Progress = func(text string) { mu.Lock(); told = append(told, text); mu.Unlock() }
	if _, err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Lock(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{lookingAround, "Carrying out the plan for 1 devices", d.Path + " waits for the data key", "Formatting " + d.Path + " (header, token)",
		"Making the filesystem of " + d.Path + " (mkfs.ext4)", "Mounting " + d.Path + " (mount)", "Locking /mnt"} {
		i := slices.Index(told, want)
		if i < 0 {
			t.Fatalf("told %q, want %q, in this order", told, want)
		}
		told = told[i+1:]
	}
}

// TestStatusOfTwins: a run refused both disks, and status tells of both, whichever comes first.
func TestStatusOfTwins(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	twin := m.copyTo(filepath.Join(t.TempDir(), "copy"))
	twin.devices[0].Identity, twin.devices[0].Serial, twin.devices[0].Name = "vol-1", "vol-1", "vol-1"
	m.devices = append([]volumes.Device{twin.devices[0]}, m.devices...)
	m.devices[0].EC2Name, m.devices[1].EC2Name = "sdg", "sdf"
	m.reboot()
	m.run()
	s := m.status()
	for _, identity := range []string{"vol-1", "vol-2"} {
		if v := s.of(t, identity); v.Error == "" || len(v.Problems) != 1 || (v.Device == d.Path) != (identity == "vol-2") {
			t.Errorf("%s: %+v", identity, v)
		}
	}
}

// TestStatusOfADiskThatWasRefused: it is told of while it is there.
func TestStatusOfADiskThatWasRefused(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.write(m.disk(volumes.ClassEBS, "vol-2"), 0, []byte("somebody's"))
	m.missing = []volumes.Missing{{Name: "/dev/sdf", Reason: "there is no such device"}}
	m.run()
	wantProblem(t, m.status(), "vol-2", "", "cannot use ")
	if s := m.status(); len(s.Problems) != 1 {
		t.Errorf("%q", s.Problems)
	}
	m.devices, m.missing = m.devices[:1], nil
	if s := m.status(); !*s.Well {
		t.Errorf("it is gone, and what was missing came: %+v", s)
	}
}
