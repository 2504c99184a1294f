package keycache

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

func testBackup(t *testing.T) Backup {
	t.Helper()
	at := time.Date(2026, 1, 31, 8, 15, 30, 5, time.UTC)
	k := KeyRecord{
		Version: 1, ID: "0b9e6d3c-5b1f-4d0a-9a8e-3f6f2c1d7e55", KeyARN: "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		WrappedKey: []byte("wrapped"), InstanceID: "i-1", Region: "us-east-1", Created: at,
	}
	v := VolumeRecord{
		Version: 1, UUID: "5f1c2a9e-7d34-4b8e-8c55-2e9f0a6b1c3d", KeyID: k.ID, Class: "ebs", Identity: "vol-1", Size: 1 << 30, State: StateReady,
		InstanceID: "i-1", Created: at, Changed: at,
	}
	return NewBackup(k, v, bytes.Repeat([]byte("header"), 1000), at, "test")
}

func TestBackupFile(t *testing.T) {
	b := testBackup(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "backup.tar")
	if err := b.Write(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, mode %v", err, info.Mode())
	}
	got, err := ReadBackup(path)
	if err != nil || !bytes.Equal(got.Header, b.Header) || got.Manifest != b.Manifest || got.Volume != b.Volume {
		t.Errorf("%+v, %v", got, err)
	}
	before, _ := os.ReadFile(path)
	if err := b.Write(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("written over another: %v", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("the first backup was changed")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	// By hand, as docs/records.md says.
	out, err := exec.Command("sh", "-c", "cd "+dir+" && tar -xf backup.tar && sha256sum --quiet -c SHA256SUMS").CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if header, _ := os.ReadFile(filepath.Join(dir, "header.luks")); !bytes.Equal(header, b.Header) {
		t.Error("tar takes another header out of it")
	}
}

// Wherever a byte of content is changed, or the file is cut, it is refused, or says the same.
func TestDamagedBackupIsRefused(t *testing.T) {
	b := testBackup(t)
	whole, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	another := func(data []byte) bool {
		got, err := decodeBackup(data)
		return err == nil && !reflect.DeepEqual(*got, b)
	}
	if another(whole) {
		t.Fatal("the whole backup reads as another")
	}
	for at := range whole {
		damaged := bytes.Clone(whole)
		damaged[at] ^= 1
		if another(damaged) {
			t.Errorf("byte %d: another backup was accepted", at)
		}
	}
	path := filepath.Join(t.TempDir(), "backup.tar")
	for at := 0; at < len(whole)-1024; at += 512 {
		if err := os.WriteFile(path, whole[:at], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadBackup(path); err == nil {
			t.Errorf("cut at byte %d it was accepted", at)
		}
	}
	if _, err := decodeBackup(append(bytes.Clone(whole), "more"...)); err == nil {
		t.Error("what follows the backup was not seen")
	}
	if f, err := os.Create(path); err != nil || errors.Join(f.Truncate(1<<40), f.Close()) != nil {
		t.Fatal(err)
	}
	if _, err := ReadBackup(path); !errors.As(err, new(*BackupError)) {
		t.Errorf("1 TiB: %v", err)
	}
}

// Parts that do not belong together, each with its checksum right.
func TestBackupOfSeveralVolumesIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(*Backup){
		"another header":    func(b *Backup) { b.Header = []byte("another") },
		"another identity":  func(b *Backup) { b.Manifest.Identity = "vol-2" },
		"another size":      func(b *Backup) { b.Volume.Size++ },
		"another UUID":      func(b *Backup) { b.Volume.UUID = "5f1c2a9e-7d34-4b8e-8c55-2e9f0a6b1c3e" },
		"another key":       func(b *Backup) { b.Key.ID = b.Volume.UUID },
		"another ARN":       func(b *Backup) { b.Key.KeyARN += "f" },
		"not ready":         func(b *Backup) { b.Volume.State = StateFormatting },
		"a newer version":   func(b *Backup) { b.Manifest.Version = 2 },
		"a time in no zone": func(b *Backup) { b.Manifest.Time = time.Time{} },
	} {
		b := testBackup(t)
		spoil(&b)
		if err := b.validate(); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestBackupNote(t *testing.T) {
	s, err := OpenStore(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	b := testBackup(t)
	uuid := b.Volume.UUID
	if _, err := s.Backup(uuid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	n := BackupNote{UUID: uuid, Time: b.Manifest.Time, Path: "/root/x.tar", HeaderSHA256: b.Manifest.HeaderSHA256, SeqID: 4}
	for range 2 {
		n.SeqID++
		if err := s.PutBackup(n); err != nil {
			t.Fatal(err)
		}
		n.Version = RecordVersion
		if got, err := s.Backup(uuid); err != nil || got != n {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if err := os.WriteFile(s.backupPath(uuid), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Backup(uuid); !errors.As(err, new(*RecordError)) {
		t.Errorf("%v", err)
	}
	if r, err := s.Load(); err != nil || len(r.Problems) != 0 {
		t.Errorf("a note that cannot be read stands in the way: %+v, %v", r.Problems, err)
	}
}

func TestWipingIsAOneWayDoor(t *testing.T) {
	s, err := OpenStore(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	b := testBackup(t)
	if err := errors.Join(s.PutKey(b.Key), s.PutVolume(b.Volume)); err != nil {
		t.Fatal(err)
	}
	b.Volume.State = StateWiping
	if err := errors.Join(s.PutVolume(b.Volume), s.PutVolume(b.Volume)); err != nil {
		t.Fatal(err)
	}
	for _, state := range []VolumeState{StateReady, StateFormatting} {
		b.Volume.State = state
		if err := s.PutVolume(b.Volume); !errors.Is(err, ErrWiping) {
			t.Errorf("%s: %v", state, err)
		}
	}
}
