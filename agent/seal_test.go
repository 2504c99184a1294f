package agent

import (
	"archive/tar"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// seal seals the machine as a new process would; confirm says yes.
func (m *machine) seal(opts SealOptions) (Seal, error) {
	m.t.Helper()
	return m.node().SealImage(m.t.Context(), opts, func(Seal) error { return nil })
}

// elsewhere is a folder on another filesystem than the machine's.
func elsewhere(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "seal-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// below are the files below a folder, with what is in them.
func below(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == "lock" {
			return err
		}
		data, err := os.ReadFile(path)
		files[strings.TrimPrefix(path, dir+"/")] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// members are the files in an archive.
func members(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := map[string]string{}
	for r := tar.NewReader(f); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		data, errRead := io.ReadAll(r)
		if err := errors.Join(err, errRead); err != nil {
			t.Fatal(err)
		}
		files[header.Name] = string(data)
	}
}

func verbs(s Seal) map[SealVerb]int {
	count := map[SealVerb]int{}
	for _, a := range s.Acts {
		count[a.Verb]++
	}
	return count
}

// builder is a machine that made volumes of two data keys, of which the one on vol-2 was detached.
func builder(t *testing.T) *machine {
	m := newMachine(t)
	m.cfg.KeyScope = ScopeVolume
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	m.reboot()
	m.devices = m.devices[:1]
	return m
}

func TestSealKeepsWhatIsAttachedAndSavesTheRest(t *testing.T) {
	m := builder(t)
	for _, rotated := range []string{".1", ".2.gz", "-20260131"} {
		if err := os.WriteFile(m.cfg.AuditLog+rotated, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	note := filepath.Join(m.dir, "log", "audit.jsonlines")
	if err := os.WriteFile(note, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	before, sums, calls := below(t, m.cfg.StateDir), m.sums(), m.kms.Count("Decrypt")
	file := filepath.Join(elsewhere(t), "records.tar")
	s, err := m.seal(SealOptions{SaveTo: file})
	if err != nil || len(s.Refused) > 0 {
		t.Fatalf("%v, %v", s.Refused, err)
	}
	want := map[SealVerb]int{SealRemove: 2, SealQuarantine: 2, SealClear: 7}
	if got := verbs(s); !maps.Equal(got, want) || s.Discards != 0 || !s.InMemory {
		t.Errorf("%v, want %v: %+v", got, want, s)
	}
	m.untouched(sums)
	if m.kms.Count("Decrypt") != calls {
		t.Error("KMS was asked for a key")
	}
	if r := m.records(); len(r.Keys)+len(r.Volumes) != 0 {
		t.Errorf("records stay: %+v", r)
	}
	// Every record is in the file or in quarantine, as it was.
	kept := map[string]string{}
	for name, data := range members(t, file) {
		kept[name] = data
	}
	for name, data := range below(t, filepath.Join(m.cfg.StateDir, "quarantine")) {
		_, name, _ = strings.Cut(name, "/")
		kept[name] = data
	}
	if len(before) != 4 {
		t.Fatalf("records: %v", before)
	}
	for name, data := range before {
		if kept[name] != data {
			t.Errorf("%s is lost", name)
		}
	}
	if left, err := filepath.Glob(filepath.Join(m.dir, "log", "*")); err != nil || !slices.Equal(left, []string{note}) {
		t.Errorf("logs: %v (%v)", left, err)
	}
	if left := below(t, filepath.Join(m.dir, "run")); len(left) > 0 {
		t.Errorf("the last run is told: %v", left)
	}

	again, err := m.seal(SealOptions{})
	if err != nil || len(again.Refused) > 0 || again.Changes() {
		t.Errorf("again: %+v, %v", again, err)
	}
	// The builder boots once more: its volume is adopted, under the data key that its token has.
	generated := m.kms.Count("GenerateDataKey")
	r := m.runOK()
	if len(r.Outcomes) != 1 || r.Outcomes[0].Action.Verb != Adopt || m.kms.Count("GenerateDataKey") != generated {
		t.Errorf("%+v", r.Outcomes)
	}
}

// What may be the last copy of a key goes only where that was said.
func TestSealRemovesNoKeyUnasked(t *testing.T) {
	m := builder(t)
	before := below(t, m.dir)
	for name, c := range map[string]struct {
		opts SealOptions
		want error
	}{
		"nothing said":               {SealOptions{}, ErrUnsaved},
		"into the image":             {SealOptions{SaveTo: filepath.Join(m.dir, "records.tar")}, ErrInImage},
		"into the image, and let go": {SealOptions{SaveTo: filepath.Join(m.dir, "records.tar"), Discard: true}, ErrInImage},
	} {
		s, err := m.seal(c.opts)
		if err != nil || len(s.Refused) != 1 || !errors.Is(s.Refused[0], c.want) || !s.Changes() {
			t.Errorf("%s: %v, %v", name, s.Refused, err)
		}
	}
	no := errors.New("no")
	if _, err := m.node().SealImage(t.Context(), SealOptions{Discard: true}, func(s Seal) error {
		if s.Discards != 2 {
			t.Errorf("%d records would go", s.Discards)
		}
		return no
	}); !errors.Is(err, no) {
		t.Error(err)
	}
	// A file that is there and has other content is not written to.
	file := filepath.Join(elsewhere(t), "records.tar")
	if err := os.WriteFile(file, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.seal(SealOptions{SaveTo: file}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over another file: %v", err)
	}
	if _, err := m.seal(SealOptions{SaveTo: filepath.Join(filepath.Dir(file), "none", "records.tar")}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a folder: %v", err)
	}
	if after := below(t, m.dir); !maps.Equal(before, after) {
		t.Error("a refused seal changed something")
	}
	if s, err := m.seal(SealOptions{Discard: true}); err != nil || len(s.Refused) > 0 || len(m.records().Keys) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

// The archive may have keys too.
func TestSealSavesTheArchive(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	store, err := keycache.OpenStore(m.cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	for id := range m.records().Volumes {
		if err := store.ArchiveVolume(id, "of the test"); err != nil {
			t.Fatal(err)
		}
	}
	for id := range m.records().Keys {
		if err := store.ArchiveKey(id, "of the test"); err != nil {
			t.Fatal(err)
		}
	}
	before := below(t, m.cfg.StateDir)
	if s, err := m.seal(SealOptions{}); err != nil || len(s.Refused) != 1 || !errors.Is(s.Refused[0], ErrUnsaved) {
		t.Errorf("%+v, %v", s, err)
	}
	file := filepath.Join(elsewhere(t), "records.tar")
	if s, err := m.seal(SealOptions{SaveTo: file}); err != nil || len(s.Refused) > 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	saved := members(t, file)
	delete(saved, "SHA256SUMS")
	if left := below(t, m.cfg.StateDir); !maps.Equal(saved, before) || len(left) > 0 {
		t.Errorf("saved %d of %d, left %v", len(saved), len(before), left)
	}
}

// A key record without a volume record is kept where a disk has a token of it, and a note of a header backup alone needs no leave.
func TestSealKnowsAKeyByTheToken(t *testing.T) {
	m, _, files := backedUp(t)
	store, err := keycache.OpenStore(m.cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	for id := range m.records().Volumes {
		if err := store.ArchiveVolume(id, "of the test"); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(m.cfg.StateDir, "archive", "volumes")); err != nil {
		t.Fatal(err)
	}
	s, err := m.seal(SealOptions{})
	if err != nil || len(s.Refused) > 0 || verbs(s)[SealQuarantine] != 1 || verbs(s)[SealRemove] != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	if !slices.ContainsFunc(s.Acts, func(a SealAct) bool { return a.Verb == SealKeep && a.Path == files }) {
		t.Errorf("the header backup %s is not told of: %+v", files, s.Acts)
	}
	if _, err := os.Stat(files); err != nil {
		t.Error(err)
	}
}

// A volume that is away and has its data key from one that is attached goes to quarantine with it.
func TestSealPartsNoKey(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	m.reboot()
	m.devices = m.devices[1:]
	s, err := m.seal(SealOptions{})
	if err != nil || len(s.Refused) > 0 || verbs(s)[SealQuarantine] != 3 || verbs(s)[SealRemove] != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestSealRefuses(t *testing.T) {
	record := func(m *machine, change func(*keycache.VolumeRecord)) {
		store, err := keycache.OpenStore(m.cfg.StateDir)
		if err != nil {
			m.t.Fatal(err)
		}
		for _, v := range m.records().Volumes {
			change(&v)
			if err := store.PutVolume(v); err != nil {
				m.t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		spoil func(m *machine, d volumes.Device)
		kind  Refusal
		says  []string
	}{
		"mounted": {func(m *machine, d volumes.Device) { m.runOK() }, RefusedInUse, []string{"(vol-1) is open as luks-", "and mounted on /mnt"}},
		"open":    {func(m *machine, d volumes.Device) { m.runOK(); clear(m.mounts) }, RefusedInUse, []string{"(vol-1) is open as luks-"}},
		"open, and its disk is gone": {func(m *machine, d volumes.Device) {
			m.runOK()
			clear(m.mounts)
			m.devices = nil
		}, RefusedInUse, []string{"(vol-1) is open as luks-", "its disk is gone"}},
		"in use by somebody": {func(m *machine, d volumes.Device) {
			m.devices[0].Uses = []volumes.Use{{Kind: volumes.UseHeld, Evidence: "somebody has it"}}
		}, RefusedInUse, []string{"somebody has it"}},
		"no header": {func(m *machine, d volumes.Device) { m.destroy(d) }, RefusedHeader, []string{"recorded ready on it, and its header is not there"}},
		"unreadable disk": {func(m *machine, d volumes.Device) {
			if err := os.Remove(d.Path); err != nil {
				m.t.Fatal(err)
			}
		}, RefusedDevice, []string{"cannot be read"}},
		"unreadable record": {func(m *machine, d volumes.Device) {
			for id := range m.records().Volumes {
				if err := os.WriteFile(filepath.Join(m.cfg.StateDir, "volumes", id+".json"), []byte("{"), 0o600); err != nil {
					m.t.Fatal(err)
				}
			}
		}, "", []string{"cannot read volume record"}},
		"wiping": {func(m *machine, d volumes.Device) {
			record(m, func(v *keycache.VolumeRecord) { v.State = keycache.StateWiping })
		}, RefusedWiping, []string{"was begun and not finished"}},
		"rotating": {func(m *machine, d volumes.Device) {
			record(m, func(v *keycache.VolumeRecord) {
				to := m.records().Keys[v.KeyID]
				to.ID = "0b9e6d3c-5b1f-4d0a-9a8e-3f6f2c1d7e55"
				store, err := keycache.OpenStore(m.cfg.StateDir)
				if err := errors.Join(err, store.PutKey(to)); err != nil {
					m.t.Fatal(err)
				}
				v.Rotation = &keycache.Rotation{KeyID: to.ID, KeySlot: 1, OldKeySlot: 0}
			})
		}, "", []string{"data key is being replaced"}},
	} {
		t.Run(name, func(t *testing.T) {
			m, d, _ := backedUp(t)
			c.spoil(m, d)
			before, sums := below(t, m.cfg.StateDir), map[string][32]byte(nil)
			if name != "unreadable disk" {
				sums = m.sums()
			}
			s, err := m.seal(SealOptions{Discard: true})
			if err != nil || len(s.Refused) != 1 {
				t.Fatalf("%v, %v", s.Refused, err)
			}
			var refused *RefusedError
			if errors.As(s.Refused[0], &refused); c.kind != "" && (refused == nil || refused.Refusal != c.kind) {
				t.Errorf("%v is not %s", s.Refused[0], c.kind)
			}
			for _, says := range c.says {
				if !strings.Contains(s.Refused[0].Error(), says) {
					t.Errorf("%v, want %q", s.Refused[0], says)
				}
			}
			if after := below(t, m.cfg.StateDir); !maps.Equal(before, after) {
				t.Error("a refused seal changed records")
			}
			if _, err := os.Stat(m.cfg.AuditLog); err != nil {
				t.Errorf("the audit log: %v", err)
			}
			if sums != nil {
				m.untouched(sums)
			}
		})
	}
}

// Each volume that is open is named.
func TestSealNamesEachOpenVolume(t *testing.T) {
	m := newMachine(t)
	for _, identity := range []string{"vol-1", "vol-2", "vol-3"} {
		m.disk(volumes.ClassEBS, identity)
	}
	m.runOK()
	if _, err := m.node().Lock(t.Context(), []string{"vol-2"}); err != nil {
		t.Fatal(err)
	}
	s, err := m.seal(SealOptions{})
	text := errors.Join(s.Refused...).Error()
	if err != nil || len(s.Refused) != 2 || !strings.Contains(text, "(vol-1) is open") || !strings.Contains(text, "(vol-3) is open") {
		t.Errorf("%v, %v", s.Refused, err)
	}
}

// A disk that a run leaves alone cannot be formatted for want of its record.
func TestSealOfAnExcludedVolume(t *testing.T) {
	m, d, _ := backedUp(t)
	m.destroy(d)
	m.cfg.Exclude = []string{"vol-1"}
	if s, err := m.seal(SealOptions{Discard: true}); err != nil || len(s.Refused) > 0 || verbs(s)[SealQuarantine] != 2 {
		t.Errorf("%+v, %v", s, err)
	}
}

// Wherever it is cut, no record is lost, and the same command completes it.
func TestSealIsCutAtEveryStep(t *testing.T) {
	m := builder(t)
	file := filepath.Join(elsewhere(t), "records.tar")
	before := below(t, m.cfg.StateDir)
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) {
		if at[s] == nil { // the first log, of several
			at[s] = m.copyTo(filepath.Join(t.TempDir(), "cut"))
		}
	}
	if _, err := n.SealImage(t.Context(), SealOptions{SaveTo: file}, func(Seal) error { return nil }); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, at, stepSealRemoved, stepSealQuarantined, stepSealCleared)
	saved := members(t, file)
	for s, cut := range at {
		check := func(when string) {
			kept := maps.Clone(saved)
			for name, data := range below(t, cut.cfg.StateDir) {
				if parts := strings.SplitN(name, "/", 3); parts[0] == "quarantine" {
					name = parts[2]
				}
				kept[name] = data
			}
			for name, data := range before {
				if kept[name] != data {
					t.Errorf("%s, %s: %s is lost", s, when, name)
				}
			}
		}
		check("after the cut")
		if again, err := cut.seal(SealOptions{SaveTo: file}); err != nil || len(again.Refused) > 0 {
			t.Errorf("%s: %+v, %v", s, again, err)
		}
		check("at the end")
		if r := cut.records(); len(r.Keys)+len(r.Volumes) > 0 {
			t.Errorf("%s: %+v", s, r)
		}
		if left, _ := filepath.Glob(cut.cfg.AuditLog + "*"); len(left) > 0 {
			t.Errorf("%s: %v", s, left)
		}
	}
}

// A clone of a sealed image makes a key of its own; one of an image that was not sealed does too, and uses none of the builder's.
func TestClonesOfAnImage(t *testing.T) {
	for name, sealed := range map[string]bool{"sealed": true, "not sealed": false} {
		t.Run(name, func(t *testing.T) {
			m := builder(t)
			m.devices = nil
			if sealed {
				if s, err := m.seal(SealOptions{Discard: true}); err != nil || len(s.Refused) > 0 {
					t.Fatalf("%+v, %v", s, err)
				}
			}
			decrypts := m.kms.Count("Decrypt")
			m.imds.SetIdentity("instanceId", "i-0fedcba9876543210")
			m.disk(volumes.ClassEBS, "vol-3")
			m.runOK()
			r := m.records()
			if len(r.Keys) != 1 || len(r.Volumes) != 1 || m.kms.Count("Decrypt") != decrypts+1 {
				t.Errorf("%+v, %d times Decrypt", r, m.kms.Count("Decrypt")-decrypts)
			}
			if quarantined, _ := filepath.Glob(filepath.Join(m.cfg.StateDir, "quarantine", "*", "*", "*.json")); (len(quarantined) == 0) != sealed {
				t.Errorf("in quarantine: %v", quarantined)
			}
		})
	}
}
