package agent

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// backUp backs the headers of all volumes up and returns the files by identity.
func (m *machine) backUp(names ...string) (map[string]string, error) {
	m.t.Helper()
	dir := m.t.TempDir()
	done, err := m.node().BackUpHeaders(m.t.Context(), names, func(v keycache.VolumeRecord, at time.Time) string {
		return filepath.Join(dir, BackupName(v, at))
	})
	files := map[string]string{}
	for _, b := range done {
		err = errors.Join(err, b.Err)
		files[b.Volume.Identity] = b.Path
	}
	return files, err
}

func (m *machine) restore(file, name string) (Restore, error) {
	m.t.Helper()
	return m.node().RestoreHeader(m.t.Context(), file, name, func(Restore) error { return nil })
}

// backedUp is a machine with one locked volume, whose header is in a file.
func backedUp(t *testing.T) (m *machine, d volumes.Device, file string) {
	t.Helper()
	m = newMachine(t)
	d = m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	files, err := m.backUp()
	if err != nil {
		t.Fatal(err)
	}
	m.reboot()
	return m, d, files["vol-1"]
}

// headerBytes is the size of a header that Format makes.
const headerBytes = 2<<20 + 32<<10

// destroy overwrites the whole header of a disk.
func (m *machine) destroy(d volumes.Device) {
	m.t.Helper()
	m.write(d, 0, bytes.Repeat([]byte{0xa5}, headerBytes))
}

func TestHeaderBackupAndRestore(t *testing.T) {
	m := newMachine(t)
	ssd := m.disk(volumes.ClassInstanceStore, "ssd1")
	ebs := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	sums := m.sums()
	files, err := m.backUp() // while both are mounted
	if err != nil || len(files) != 2 {
		t.Fatalf("%v, %v", files, err)
	}
	m.untouched(sums)
	store, err := keycache.ViewStore(m.cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range m.records().Volumes {
		note, current, err := lastBackup(store, v.UUID, map[string]string{"ssd1": ssd.Path, "vol-1": ebs.Path}[v.Identity])
		if err != nil || !current || note.Path != files[v.Identity] {
			t.Errorf("%s: %+v, %v, %v", v.Identity, note, current, err)
		}
	}
	// Open volumes are not restored.
	var refused *RefusedError
	if _, err := m.restore(files["vol-1"], ""); !errors.As(err, &refused) || refused.Refusal != RefusedInUse {
		t.Errorf("%v", err)
	}
	m.reboot()
	for _, d := range []volumes.Device{ssd, ebs} {
		m.destroy(d)
	}
	r, err := m.restore(files["vol-1"], "vol-1")
	if err != nil || r.Same || r.Saved == "" || len(r.Records) != 0 || len(m.open) != 0 {
		t.Errorf("%+v, open %v: %v", r, m.open, err)
	}
	saved, err := os.ReadFile(r.Saved)
	if err != nil || !bytes.Equal(saved, bytes.Repeat([]byte{0xa5}, len(saved))) || len(saved) != headerBytes {
		t.Errorf("saved: %d bytes, %v", len(saved), err)
	}
	// Without records, and by another instance: they come from the backup.
	m.cfg.StateDir += "-lost"
	m.imds.SetIdentity("instanceId", "i-0fedcba9876543210")
	if r, err = m.restore(files["ssd1"], ""); err != nil || !slices.Equal(r.Records, []string{"key", "volume"}) {
		t.Errorf("%+v, %v", r, err)
	}
	m.untouched(sums)
	for _, v := range m.records().Volumes {
		if v.State != keycache.StateReady || v.InstanceID != "i-0fedcba9876543210" || v.MountPoint != "/mnt" {
			t.Errorf("%+v", v)
		}
	}
	m.runOK()
	if len(m.mounts) != 2 || m.kms.Count("GenerateDataKey") != 1 {
		t.Errorf("mounted: %v", m.mounts)
	}
	// Again: there is nothing to do, and nothing is saved.
	m.reboot()
	if r, err = m.restore(files["vol-1"], ""); err != nil || !r.Same || r.Saved != "" {
		t.Errorf("%+v, %v", r, err)
	}
}

// Where the backup was made before rewrap, the record of now opens it, and rewrap mends its token.
func TestRestoreOfAHeaderFromBeforeRewrap(t *testing.T) {
	m, d, file := backedUp(t)
	old, to := m.kms.ARN(), m.kms.NewKey(kmstest.KeySpec{})
	if _, err := m.rewrap(to); err != nil {
		t.Fatal(err)
	}
	m.cfg.KMSKey = to
	m.kms.SetState(old, kmstest.Disabled)
	m.destroy(d)
	if _, err := m.restore(file, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := m.rewrap(to); err != nil {
		t.Error(err)
	}
	m.agree(to)
}

// Nothing is written where it is not sure that the header is this disk's, and that nothing else is on it.
func TestRestoreRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(m *machine, d *volumes.Device, file *string) (volume string)
		says  string
	}{
		"another disk is named": {func(m *machine, d *volumes.Device, _ *string) string {
			m.disk(volumes.ClassEBS, "vol-2")
			return "vol-2"
		}, "the backup is of ebs vol-1, and this is ebs vol-2"},
		"the disk is away": {func(m *machine, d *volumes.Device, _ *string) string { m.devices = nil; return "" }, "is not attached"},
		"another size": {func(m *machine, d *volumes.Device, _ *string) string {
			m.devices[0].Size += 4096
			if err := os.Truncate(d.Path, m.devices[0].Size); err != nil {
				m.t.Fatal(err)
			}
			return ""
		}, "and the backup is of a disk with"},
		"it is in use": {func(m *machine, d *volumes.Device, _ *string) string {
			m.devices[0].Uses = []volumes.Use{{Kind: volumes.UseHeld, Evidence: "somebody has it"}}
			return ""
		}, "in use: somebody has it"},
		"the volume shows on another disk": {func(m *machine, d *volumes.Device, _ *string) string {
			twin := m.disk(volumes.ClassEBS, "vol-2")
			b, err := os.ReadFile(d.Path)
			if err != nil {
				m.t.Fatal(err)
			}
			m.write(twin, 0, b)
			return ""
		}, "it shows volume"},
		"a filesystem": {func(m *machine, d *volumes.Device, _ *string) string {
			m.destroy(*d)
			m.write(*d, 0, make([]byte, 4<<20))
			if err := volumes.MakeFilesystem(m.t.Context(), d.Path, "ext4", "theirs", ""); err != nil {
				m.t.Fatal(err)
			}
			return ""
		}, "it holds ext4 filesystem"},
		"a filesystem in front of a secondary header": {func(m *machine, d *volumes.Device, _ *string) string {
			theirs := m.disk(volumes.ClassEBS, "vol-2")
			if err := volumes.MakeFilesystem(m.t.Context(), theirs.Path, "ext4", "theirs", ""); err != nil {
				m.t.Fatal(err)
			}
			b, err := os.ReadFile(theirs.Path)
			if err != nil {
				m.t.Fatal(err)
			}
			m.write(*d, 0, b[:4096])
			return ""
		}, "something that is not LUKS stands at its start"},
		"another LUKS volume": {func(m *machine, d *volumes.Device, _ *string) string {
			m.write(*d, 0, make([]byte, 4<<20))
			key, err := keycache.NewKey(bytes.Repeat([]byte{1}, 32))
			if err != nil {
				m.t.Fatal(err)
			}
			defer key.Wipe()
			err = luks.Format(m.t.Context(), d.Path, luks.FormatOptions{UUID: "0a1b2c3d-0000-4000-8000-000000000001", KeyARN: m.kms.ARN(), WrappedKey: []byte("w")}, key)
			if err != nil {
				m.t.Fatal(err)
			}
			return ""
		}, "it holds LUKS volume"},
		"a truncated file": {func(m *machine, d *volumes.Device, file *string) string {
			*file = m.edited(*file, func(b []byte) []byte { return b[:1<<20] })
			return ""
		}, "truncated"},
		"a file with a changed byte": {func(m *machine, d *volumes.Device, file *string) string {
			*file = m.edited(*file, func(b []byte) []byte { b[1<<20] ^= 1; return b })
			return ""
		}, "a checksum does not hold"},
		"a header that was tampered with": {func(m *machine, d *volumes.Device, file *string) string {
			*file = m.forged(*file, func(b *keycache.Backup) {
				head := filepath.Join(m.t.TempDir(), "head")
				if err := errors.Join(os.WriteFile(head, b.Header, 0o600), os.Truncate(head, d.Size)); err != nil {
					m.t.Fatal(err)
				}
				for _, a := range lukstest.Attacks() {
					if a.Name == "data moved" { // only the MAC sees it
						if err := a.Do(head); err != nil {
							m.t.Fatal(err)
						}
					}
				}
				data, err := os.ReadFile(head)
				if err != nil {
					m.t.Fatal(err)
				}
				b.Header = data[:len(b.Header)]
			})
			return ""
		}, "the token's MAC does not hold"},
		"a header of another volume under the same key": {func(m *machine, d *volumes.Device, file *string) string {
			other := m.disk(volumes.ClassEBS, "vol-2")
			m.runOK()
			m.reboot()
			theirs, _, err := luks.ReadHeader(other.Path)
			if err != nil {
				m.t.Fatal(err)
			}
			m.devices = m.devices[:1]
			*file = m.forged(*file, func(b *keycache.Backup) { b.Header = theirs })
			return ""
		}, "its header is of volume"},
		"a KMS key that is not allowed": {func(m *machine, d *volumes.Device, file *string) string {
			m.cfg.StateDir += "-lost"
			m.cfg.KMSKey = m.kms.NewKey(kmstest.KeySpec{})
			return ""
		}, "which the configuration does not allow"},
		"another volume is recorded on the disk": {func(m *machine, d *volumes.Device, file *string) string {
			store, release := m.store()
			defer release()
			for _, v := range m.records().Volumes {
				v.UUID = "0a1b2c3d-0000-4000-8000-000000000001"
				if err := store.PutVolume(v); err != nil {
					m.t.Fatal(err)
				}
			}
			return ""
		}, "is recorded ready on the same disk"},
		"its wipe was begun": {func(m *machine, d *volumes.Device, file *string) string {
			store, release := m.store()
			defer release()
			for _, v := range m.records().Volumes {
				v.State = keycache.StateWiping
				if err := store.PutVolume(v); err != nil {
					m.t.Fatal(err)
				}
			}
			return ""
		}, "it is recorded wiping"},
		"no KMS": {func(m *machine, d *volumes.Device, file *string) string {
			m.kms.SetState(m.kms.ARN(), kmstest.Disabled)
			return ""
		}, "DisabledException"},
	} {
		t.Run(name, func(t *testing.T) {
			m, d, file := backedUp(t)
			volume := c.spoil(m, &d, &file)
			sums := m.sums()
			if _, err := m.restore(file, volume); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
			m.untouched(sums)
		})
	}
}

// store opens the records of the machine for writing.
func (m *machine) store() (*keycache.Store, func()) {
	m.t.Helper()
	store, err := keycache.OpenStore(m.cfg.StateDir)
	if err != nil {
		m.t.Fatal(err)
	}
	release, err := store.Lock(m.t.Context(), func(string) {})
	if err != nil {
		m.t.Fatal(err)
	}
	return store, release
}

// edited is a changed copy of a file.
func (m *machine) edited(file string, edit func([]byte) []byte) string {
	m.t.Helper()
	b, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file+".edited", edit(b), 0o600)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return file + ".edited"
}

// forged is a backup that somebody made of a changed one: its checksums hold.
func (m *machine) forged(file string, edit func(*keycache.Backup)) string {
	m.t.Helper()
	b, err := keycache.ReadBackup(file)
	if err != nil {
		m.t.Fatal(err)
	}
	edit(b)
	forged := keycache.NewBackup(b.Key, b.Volume, b.Header, b.Manifest.Time, "forged")
	if err := forged.Write(file + ".forged"); err != nil {
		m.t.Fatal(err)
	}
	return file + ".forged"
}

// A cut of a backup leaves it or none; where it is there it is whole.
func TestBackupIsCutAtEveryStep(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) { at[s] = m.copyTo(filepath.Join(t.TempDir(), "cut")) }
	if _, err := n.BackUpHeaders(t.Context(), nil, func(keycache.VolumeRecord, time.Time) string { return filepath.Join(m.dir, "b.tar") }); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, at, stepBackedUp, stepBackupNoted)
	for s, cut := range at {
		b, err := keycache.ReadBackup(filepath.Join(cut.dir, "b.tar"))
		if err != nil || b.Volume.Identity != "vol-1" {
			t.Errorf("%s: %v", s, err)
		}
		if _, err := cut.backUp(); err != nil {
			t.Errorf("%s: %v", s, err)
		}
		cut.runOK()
	}
}

// Wherever a restore is cut the volume is refused or opens, nothing formats it, and the restore, again, completes.
func TestRestoreIsCutAtEveryStep(t *testing.T) {
	m, d, file := backedUp(t)
	plain := m.sums()
	m.destroy(d)
	m.cfg.StateDir += "-lost"
	at := map[step]*machine{}
	n := m.node()
	n.atStep = func(s step) { at[s] = m.copyTo(filepath.Join(t.TempDir(), "cut")) }
	if _, err := n.RestoreHeader(t.Context(), file, "", func(Restore) error { return nil }); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, at, stepBackupKey, stepBackupRecord, stepHeaderSaved, stepTorn, stepSlotsBack, stepSecondaryBack, stepHeaderBack)
	for s, cut := range at {
		cut.cfg.StateDir = filepath.Join(cut.dir, filepath.Base(m.cfg.StateDir))
		sums := cut.sums()
		cut.run()
		if whole := s == stepSecondaryBack || s == stepHeaderBack; whole != (len(cut.mounts) == 1) {
			t.Errorf("%s: mounted %v", s, cut.mounts)
		} else if !whole {
			cut.untouched(sums)
		}
		cut.reboot()
		if _, err := cut.restore(file, ""); err != nil {
			t.Errorf("%s: %v", s, err)
		}
		cut.untouched(plain)
		cut.runOK()
		if len(cut.mounts) != 1 || len(cut.records().Volumes) != 1 {
			t.Errorf("%s: mounted %v", s, cut.mounts)
		}
	}
}

// What the data key, or the disk, does not prove is no backup.
func TestBackupProvesItself(t *testing.T) {
	for name, spoil := range map[string]func(m *machine, d volumes.Device){
		"another data key": func(m *machine, d volumes.Device) {
			m.kms.Fail(kmstest.Fault{Op: "Decrypt", Rewrite: func(a map[string]any) { a["Plaintext"] = bytes.Repeat([]byte{1}, 32) }})
		},
		"a damaged slot": func(m *machine, d volumes.Device) { m.write(d, 40<<10, []byte("damage")) },
		"a damaged copy": func(m *machine, d volumes.Device) { m.write(d, 5000+16<<10, []byte{0xff}) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			spoil0 := m.disk(volumes.ClassEBS, "vol-1")
			m.runOK()
			m.reboot()
			spoil(m, spoil0)
			files, err := m.backUp()
			if err == nil {
				t.Error("it was backed up")
			}
			if _, err := os.Stat(files["vol-1"]); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a file is left: %v", err)
			}
		})
	}
}

func TestBackupIsNotPutOnAVolume(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	where := t.TempDir()
	m.mounts = map[string]string{where: m.mounts["/mnt"]}
	done, err := m.node().BackUpHeaders(t.Context(), nil, func(keycache.VolumeRecord, time.Time) string { return filepath.Join(where, "b.tar") })
	if err != nil || len(done) != 1 || !errors.As(done[0].Err, new(*BackupPlaceError)) {
		t.Errorf("%+v, %v", done, err)
	}
}
