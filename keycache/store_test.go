package keycache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

func TestOpenStoreMakesAPrivateDirectory(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := filepath.Join(t.TempDir(), "lib", "state")
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	k := goodKey()
	if err := errors.Join(s.PutKey(k), s.PutVolume(goodVolume(k))); err != nil {
		t.Fatal(err)
	}
	release, err := s.Lock(t.Context(), unheard)
	if err != nil {
		t.Fatal(err)
	}
	release()
	release()
	unix.Umask(0o277) // a service's umask must not change a record's mode
	if err := s.PutKey(goodKey()); err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o", path, info.Mode().Perm())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(dir); err != nil {
		t.Errorf("the second time: %v", err)
	}
}

func TestUnsafeDirectoriesAreRefused(t *testing.T) {
	cases := map[string]struct {
		make func(dir string) error
		want string
	}{
		"symlink": {func(dir string) error {
			return errors.Join(os.Mkdir(dir+"-real", 0o700), os.Symlink(dir+"-real", dir))
		}, "symbolic link"},
		"file":         {func(dir string) error { return os.WriteFile(dir, nil, 0o600) }, "not a directory"},
		"group enters": {func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o750)) }, "mode 0750"},
		"others write": {func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o702)) }, "mode 0702"},
		"keys symlink": {func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Symlink("/etc", dir+"/keys")) }, "symbolic link"},
		"volumes shared": {func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(dir+"/volumes", 0o700), os.Chmod(dir+"/volumes", 0o777))
		}, "mode 0777"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			if err := c.make(dir); err != nil {
				t.Fatal(err)
			}
			for what, open := range map[string]func(string) (*Store, error){"OpenStore": OpenStore, "ViewStore": ViewStore} {
				_, err := open(dir)
				var se *StoreError
				if !errors.As(err, &se) || !strings.HasPrefix(se.Path, dir) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%s: %v, want %q", what, err, c.want)
				}
			}
		})
	}
}

func TestViewStoreWritesNothing(t *testing.T) {
	parent := t.TempDir()
	s, err := ViewStore(filepath.Join(parent, "absent"))
	if err != nil {
		t.Fatal(err)
	}
	r := load(t, s)
	if r.Keys == nil || r.Volumes == nil || len(r.Keys)+len(r.Volumes)+len(r.Problems) != 0 {
		t.Errorf("an absent directory has records: %+v", r)
	}
	full, k, v := storeWith(t)
	view, err := ViewStore(full.dir)
	if err != nil {
		t.Fatal(err)
	}
	before := tree(t, full.dir)
	if r := load(t, view); len(r.Keys) != 1 || len(r.Volumes) != 1 {
		t.Errorf("the view shows %+v", r)
	}
	for _, s := range []*Store{s, view} {
		_, lockErr := s.Lock(t.Context(), unheard)
		for what, err := range map[string]error{
			"PutKey": s.PutKey(goodKey()), "PutVolume": s.PutVolume(v), "Lock": lockErr,
			"ArchiveVolume": s.ArchiveVolume(v.UUID, "x"), "Quarantine": s.Quarantine([]string{k.ID}, []string{v.UUID}, "x"),
			"Quarantine of nothing": s.Quarantine(nil, nil, "x"),
		} {
			if !errors.Is(err, errViewOnly) {
				t.Errorf("%s through a view: %v", what, err)
			}
		}
	}
	if !maps.Equal(before, tree(t, full.dir)) || len(tree(t, parent)) != 0 {
		t.Error("a view wrote")
	}
}

// tree is every file under dir with its content.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
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

func TestPutKeyNeverOverwrites(t *testing.T) {
	s, k, _ := storeWith(t)
	before := tree(t, s.dir)
	other := k
	other.WrappedKey = []byte("another")
	for _, r := range []KeyRecord{other, k} {
		var se *StoreError
		if err := s.PutKey(r); !errors.Is(err, fs.ErrExist) || !errors.As(err, &se) || se.Path != s.keyPath(k.ID) {
			t.Errorf("PutKey again: %v", err)
		}
	}
	if after := tree(t, s.dir); !maps.Equal(before, after) {
		t.Errorf("it left %v", after)
	}
}

func TestReadyIsAOneWayDoor(t *testing.T) {
	s, _, v := storeWith(t)
	v.State = StateFormatting
	if err := s.PutVolume(v); !errors.Is(err, ErrReady) {
		t.Errorf("ready back to formatting: %v", err)
	}
	if got := load(t, s).Volumes[v.UUID]; got.State != StateReady {
		t.Errorf("the record is %s", got.State)
	}
	v.State, v.MountPoint, v.Changed = StateReady, "/data", someTime.Add(time.Hour)
	if err := s.PutVolume(v); err != nil {
		t.Errorf("ready to ready: %v", err)
	}
	if got := load(t, s).Volumes[v.UUID]; !reflect.DeepEqual(got, v) {
		t.Errorf("got %+v", got)
	}
	// A record that cannot be read may be a ready one.
	if err := os.WriteFile(s.volumePath(v.UUID), []byte(`{"version": 3, "state": "ready"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	before := tree(t, s.dir)
	for _, state := range []VolumeState{StateFormatting, StateReady} {
		v.State = state
		if err := s.PutVolume(v); err == nil || !strings.Contains(err.Error(), "version 3") {
			t.Errorf("PutVolume %s over an unreadable record: %v", state, err)
		}
	}
	if !maps.Equal(before, tree(t, s.dir)) {
		t.Error("the unreadable record was changed")
	}
}

func TestNoVolumeRecordWithoutItsKey(t *testing.T) {
	s, k, _ := storeWith(t)
	v := goodVolume(goodKey())
	if err := s.PutVolume(v); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), v.KeyID) {
		t.Errorf("PutVolume without a key record: %v", err)
	}
	v.KeyID = k.ID
	if err := os.WriteFile(s.keyPath(k.ID), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.PutVolume(v); err == nil {
		t.Error("PutVolume with a corrupt key record")
	}
	if r := load(t, s); len(r.Volumes) != 1 {
		t.Errorf("stored: %+v", r.Volumes)
	}
}

func TestInvalidRecordsAreNotWritten(t *testing.T) {
	s, k, v := storeWith(t)
	before := tree(t, s.dir)
	badKey, strayKey, badVolume := goodKey(), goodKey(), goodVolume(k)
	badKey.WrappedKey = nil
	strayKey.ID, badVolume.UUID = "../x", "../x"
	future := goodVolume(k)
	future.Version = 3
	for name, err := range map[string]error{
		"empty wrapped key": s.PutKey(badKey), "path as id": s.PutKey(strayKey), "path as uuid": s.PutVolume(badVolume), "future": s.PutVolume(future),
		"archive path": s.ArchiveVolume("../keys/"+k.ID, "x"), "quarantine path": s.Quarantine([]string{"../lock"}, nil, "x"),
		"volume as a key": s.Quarantine([]string{"../volumes/" + v.UUID}, nil, "x"),
	} {
		var se *StoreError
		if !errors.As(err, &se) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if after := tree(t, s.dir); !maps.Equal(before, after) {
		t.Errorf("written: %v", after)
	}
	// Version 0 and a local time are made what the file has.
	v = goodVolume(k)
	v.Version, v.Created = 0, someTime.In(time.FixedZone("x", 3600))
	if err := s.PutVolume(v); err != nil {
		t.Fatal(err)
	}
	if got := load(t, s).Volumes[v.UUID]; got.Version != RecordVersion || !got.Created.Equal(someTime) || got.Created.Location() != time.UTC {
		t.Errorf("got %+v", got)
	}
}

// TestEveryFailureKeepsTheOldRecord makes each step on disk fail in turn, as a
// full or read-only disk would, and wants the old records whole, or the new
// one, and no temporary files.
func TestEveryFailureKeepsTheOldRecord(t *testing.T) {
	steps := map[string]error{"create": unix.EROFS, "write": unix.ENOSPC, "sync": unix.EIO, "place": unix.ENOSPC, "syncdir": unix.EIO}
	for step, cause := range steps {
		t.Run(step, func(t *testing.T) {
			s, k, _ := storeWith(t)
			old := goodVolume(k)
			if err := s.PutVolume(old); err != nil {
				t.Fatal(err)
			}
			s.step = func(name string) error {
				if name == step {
					return cause
				}
				return nil
			}
			newKey, changed := goodKey(), old
			changed.State = StateReady
			for what, err := range map[string]error{"PutKey": s.PutKey(newKey), "PutVolume": s.PutVolume(changed), "create": s.create()} {
				if what == "create" && (step == "place" || step == "syncdir") {
					continue // the probe needs neither
				}
				var se *StoreError
				if !errors.As(err, &se) || !errors.Is(err, cause) {
					t.Errorf("%s: %v", what, err)
				}
			}
			s.step = func(string) error { return nil }
			r := load(t, s)
			got := r.Volumes[old.UUID]
			if len(r.Problems) != 0 || !(reflect.DeepEqual(got, old) || (step == "syncdir" && reflect.DeepEqual(got, changed))) {
				t.Errorf("problems %v, volume %+v", r.Problems, got)
			}
			for name := range tree(t, s.dir) {
				if strings.Contains(name, tmpPrefix) {
					t.Errorf("%s was left", name)
				}
			}
		})
	}
}

func TestOpenStoreOnReadOnlyDisk(t *testing.T) {
	// /proc takes no directories, from root neither.
	var se *StoreError
	if _, err := OpenStore("/proc/self/state"); !errors.As(err, &se) {
		t.Errorf("OpenStore in /proc: %v", err)
	}
	s := newStore(filepath.Join(t.TempDir(), "state"))
	s.step = func(string) error { return unix.EROFS }
	if err := s.create(); !errors.Is(err, unix.EROFS) {
		t.Errorf("create: %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	if out, err := child(t, "full", t.TempDir()+"/state").Output(); err != nil {
		t.Errorf("%v %s", err, out)
	}
}

// A write that lies is found by reading back.
func TestReadBack(t *testing.T) {
	s, k, v := storeWith(t)
	for what, damage := range map[string]string{"garbage": "x", "a valid record of another state": "formatting"} {
		s.step = func(name string) error {
			if name != "syncdir" {
				return nil
			}
			// Between rename and read back.
			for _, path := range []string{s.volumePath(v.UUID)} {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				if damage != "x" {
					data = bytes.Replace(data, []byte(`"ready"`), []byte(`"formatting"`), 1)
				} else {
					data = []byte("x")
				}
				if err := os.WriteFile(path, data, 0o600); err != nil {
					return err
				}
			}
			return nil
		}
		v = goodVolume(k)
		v.State = StateReady
		if err := s.PutVolume(v); err == nil || !strings.Contains(err.Error(), "cannot read back") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestConcurrentWrites(t *testing.T) {
	s, k, v := storeWith(t)
	v.UUID, v.State = uuid.NewString(), StateFormatting
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if err := s.PutKey(goodKey()); err != nil {
				t.Error(err)
			}
			mine := goodVolume(k)
			mine.MountPoint = fmt.Sprintf("/mnt%d", i)
			if err := s.PutVolume(mine); err != nil {
				t.Error(err)
			}
			// Of the same volume ready always wins.
			w := v
			if i%2 == 0 {
				w.State = StateReady
			}
			if err := s.PutVolume(w); err != nil && !errors.Is(err, ErrReady) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	r := load(t, s)
	if len(r.Keys) != 9 || len(r.Volumes) != 10 || len(r.Problems) != 0 || r.Volumes[v.UUID].State != StateReady {
		t.Errorf("%d keys, %d volumes, %v, %s", len(r.Keys), len(r.Volumes), r.Problems, r.Volumes[v.UUID].State)
	}
}

// A writer that looked before another one put ready must not write after it.
func TestReadyIsNotLostBetweenTwoWriters(t *testing.T) {
	s, k, _ := storeWith(t)
	v := goodVolume(k)
	ready := v
	ready.State = StateReady
	done := make(chan error, 1)
	var once sync.Once
	s.step = func(string) error {
		once.Do(func() { // in the midst of the first write
			go func() { done <- s.PutVolume(ready) }()
			select {
			case err := <-done:
				done <- err
			case <-time.After(time.Second): // it waits for this one; else it is done in milliseconds, or more on a busy disk
			}
		})
		return nil
	}
	if err := errors.Join(s.PutVolume(v), <-done); err != nil {
		t.Fatal(err)
	}
	if got := load(t, s).Volumes[v.UUID].State; got != StateReady {
		t.Errorf("the record is %s", got)
	}
}

func TestUnreadableFolderIsNotEmpty(t *testing.T) {
	s, _, _ := storeWith(t)
	if err := os.WriteFile(filepath.Join(s.dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Root may read any folder; what is none fails for everybody.
	var se *StoreError
	if err := s.each("file", func(string, string) {}); !errors.As(err, &se) {
		t.Errorf("no folder: %v", err)
	}
}

// TestEveryStepIsDurableBeforeTheNext: what stands on another change on disk comes after that one's fsync.
func TestEveryStepIsDurableBeforeTheNext(t *testing.T) {
	const put, move, gone = "create write sync place syncdir ", "link syncdir ", "unlink syncdir "
	s, k, v := storeWith(t)
	other, otherVolume := goodKey(), goodVolume(k)
	for _, c := range []struct {
		what, want string
		do         func() error
	}{
		{"a new directory", "mkdir syncdir ", func() error { return s.makeDir(filepath.Join(s.dir, "new")) }},
		{"a key", put, func() error { return s.PutKey(other) }},
		{"a volume", put, func() error { return s.PutVolume(otherVolume) }},
		{"archive", put + move + gone, func() error { return s.ArchiveVolume(otherVolume.UUID, "x") }},
		{"quarantine", strings.Repeat("mkdir syncdir ", 3) + put + move + move + gone + gone,
			func() error { return s.Quarantine([]string{k.ID}, []string{v.UUID}, "x") }},
	} {
		steps := ""
		s.step = func(name string) error { steps += name + " "; return nil }
		if err := c.do(); err != nil || steps != c.want {
			t.Errorf("%s: %q, want %q (%v)", c.what, steps, c.want, err)
		}
	}
}

// TestWhatCannotMoveStays: the old name goes only once the new one is on the disk.
func TestWhatCannotMoveStays(t *testing.T) {
	for at := 1; at <= 2; at++ { // the key's link, the volume's
		s, k, v := storeWith(t)
		links := 0
		s.step = func(name string) error {
			if name == "link" {
				if links++; links == at {
					return unix.ENOSPC
				}
			}
			return nil
		}
		if err := s.Quarantine([]string{k.ID}, []string{v.UUID}, "x"); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("quarantine, link %d: %v", at, err)
		}
		if r := load(t, s); len(r.Keys) != 1 || len(r.Volumes) != 1 {
			t.Errorf("quarantine, link %d, left %+v", at, r)
		}
	}
	for _, step := range []string{"link", "syncdir"} {
		s, _, v := storeWith(t)
		linked := step == "link"
		s.step = func(name string) error {
			if name == step && linked {
				return unix.EIO
			}
			linked = linked || name == "link"
			return nil
		}
		if err := s.ArchiveVolume(v.UUID, "x"); !errors.Is(err, unix.EIO) {
			t.Errorf("archive, %s: %v", step, err)
		}
		if r := load(t, s); len(r.Volumes) != 1 {
			t.Errorf("archive, %s: the record is gone", step)
		}
	}
}

func TestSweepTakesOnlyTemporaryFiles(t *testing.T) {
	s, k, v := storeWith(t)
	if err := s.ArchiveVolume(v.UUID, "x"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.PutVolume(goodVolume(k)), os.WriteFile(filepath.Join(s.dir, "notes"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	want := tree(t, s.dir)
	for _, dir := range []string{"", keysDir, volumesDir, archiveDir + "/" + volumesDir} {
		if err := os.WriteFile(filepath.Join(s.dir, dir, tmpPrefix+"x"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.sweep()
	if got := tree(t, s.dir); !maps.Equal(got, want) {
		t.Errorf("it left %v, want %v", got, want)
	}
}

// A process that opens the directory has no lock yet, and one that has it sweeps meanwhile.
func TestOpenBesideASweep(t *testing.T) {
	s, _, _ := storeWith(t)
	swept := false
	s.step = func(step string) error {
		if step == "sync" {
			s.sweep()
			swept = true
		}
		return nil
	}
	if err := s.probe(); err != nil || !swept {
		t.Errorf("swept %v: %v", swept, err)
	}
}

func TestArchiveKeepsBytes(t *testing.T) {
	s, _, v := storeWith(t)
	s.now = func() time.Time { return someTime }
	for _, content := range []string{"", "{ corrupt"} {
		path := s.volumePath(v.UUID)
		if content != "" {
			s.now = func() time.Time { return someTime.Add(time.Second) }
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.ArchiveVolume(v.UUID, "the disk was replaced"); err != nil {
			t.Fatal(err)
		}
		base := filepath.Join(s.dir, "archive/volumes", v.UUID+"."+s.now().Format(timeName))
		got, err := os.ReadFile(base + ".json")
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("archived %q (%v), want %q", got, err, want)
		}
		if why, err := os.ReadFile(base + ".why.json"); err != nil || !strings.Contains(string(why), "the disk was replaced") {
			t.Errorf("why: %s %v", why, err)
		}
		if r := load(t, s); len(r.Volumes) != 0 || len(r.Problems) != 0 || len(r.Keys) != 1 {
			t.Errorf("left: %+v", r)
		}
	}
	if err := s.ArchiveVolume(v.UUID, "again"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing to archive: %v", err)
	}
	// Nothing in the archive is overwritten, and what cannot move stays.
	if err := s.PutVolume(v); err != nil {
		t.Fatal(err)
	}
	before := tree(t, s.dir)
	if err := s.ArchiveVolume(v.UUID, "same instant"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("archived over another: %v", err)
	}
	if !maps.Equal(before, tree(t, s.dir)) {
		t.Error("the archive was changed")
	}
}

func TestReplaceKeyArchivesTheOldOne(t *testing.T) {
	s, k, _ := storeWith(t)
	s.now = func() time.Time { return someTime }
	old, err := os.ReadFile(s.keyPath(k.ID))
	if err != nil {
		t.Fatal(err)
	}
	rewrapped := k
	rewrapped.WrappedKey, rewrapped.RequestID = []byte("wrapped anew"), "req-2"
	if err := s.ReplaceKey(rewrapped, "rewrapped"); err != nil {
		t.Fatal(err)
	}
	if r := load(t, s); !reflect.DeepEqual(r.Keys[k.ID], rewrapped) || len(r.Volumes) != 1 || len(r.Problems) != 0 {
		t.Errorf("%+v", r)
	}
	base := filepath.Join(s.dir, "archive/keys", k.ID+"."+someTime.Format(timeName))
	if got, err := os.ReadFile(base + ".json"); err != nil || !bytes.Equal(got, old) {
		t.Errorf("archived %q (%v), want %q", got, err, old)
	}
	if why, err := os.ReadFile(base + ".why.json"); err != nil || !strings.Contains(string(why), "rewrapped") {
		t.Errorf("why: %s %v", why, err)
	}
	// Nothing in the archive is overwritten; nothing is replaced that is not there, or cannot be read.
	before := tree(t, s.dir)
	again := rewrapped
	again.WrappedKey = []byte("once more")
	if err := s.ReplaceKey(again, "same instant"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("archived over another: %v", err)
	}
	if err := s.ReplaceKey(goodKey(), "none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("replaced nothing: %v", err)
	}
	bad := rewrapped
	bad.WrappedKey = nil
	if err := s.ReplaceKey(bad, "invalid"); err == nil {
		t.Error("an invalid record was written")
	}
	if !maps.Equal(before, tree(t, s.dir)) {
		t.Error("something was changed")
	}
	if err := os.WriteFile(s.keyPath(k.ID), []byte("{ corrupt"), 0o600); err != nil {
		t.Fatal(err)
	}
	before = tree(t, s.dir)
	if err := s.ReplaceKey(rewrapped, "corrupt"); err == nil {
		t.Error("an unreadable record was replaced")
	}
	if !maps.Equal(before, tree(t, s.dir)) {
		t.Error("something was changed")
	}
}

func TestQuarantineKeepsBytes(t *testing.T) {
	s, k, v := storeWith(t)
	v2 := goodVolume(k)
	k2 := goodKey()
	if err := errors.Join(s.PutVolume(v2), s.PutKey(k2)); err != nil {
		t.Fatal(err)
	}
	corrupt := uuid.NewString()
	if err := os.WriteFile(s.volumePath(corrupt), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := tree(t, s.dir)

	for name, err := range map[string]error{
		"missing key":    s.Quarantine([]string{k.ID, uuid.NewString()}, []string{v.UUID, v2.UUID}, "x"),
		"missing volume": s.Quarantine([]string{k.ID}, []string{v.UUID, v2.UUID, uuid.NewString()}, "x"),
		"stranded":       s.Quarantine([]string{k.ID}, []string{v.UUID}, "x"),
	} {
		var se *StoreError
		if !errors.As(err, &se) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !maps.Equal(before, tree(t, s.dir)) {
		t.Fatal("a refused quarantine moved something")
	}

	if err := s.Quarantine([]string{k.ID}, []string{v.UUID, v2.UUID, corrupt}, "another instance"); err != nil {
		t.Fatal(err)
	}
	r := load(t, s)
	if len(r.Keys) != 1 || len(r.Volumes) != 0 || len(r.Problems) != 0 {
		t.Errorf("left: %+v", r)
	}
	moved := map[string]string{}
	why := false
	for path, data := range tree(t, s.dir) {
		parts := strings.SplitN(path, "/", 3)
		switch {
		case parts[0] == "quarantine" && parts[2] == "why.json":
			why = strings.Contains(data, "another instance")
		case parts[0] == "quarantine":
			moved[parts[2]] = data
		default:
			moved[path] = data
		}
	}
	if !maps.Equal(before, moved) || !why {
		t.Errorf("moved %v, had %v, why %v", moved, before, why)
	}
}

// cutJobs are what a power cut interrupts. Their stores have what storeWith has.
func cutJobs() map[string]func(*Store) error {
	first := func(s *Store) (key, volume string, err error) {
		r, err := s.Load()
		for key = range r.Keys {
		}
		for volume = range r.Volumes {
		}
		return key, volume, err
	}
	return map[string]func(*Store) error{
		"put": func(s *Store) error {
			k := goodKey()
			return errors.Join(s.PutKey(k), s.PutVolume(goodVolume(k)))
		},
		"replace": func(s *Store) error {
			_, volume, err := first(s)
			if err != nil {
				return err
			}
			v, err := s.readVolume(s.volumePath(volume), volume)
			v.MountPoint = "/changed"
			return errors.Join(err, s.PutVolume(v))
		},
		"rewrap": func(s *Store) error {
			key, _, err := first(s)
			if err != nil {
				return err
			}
			k, err := s.readKey(s.keyPath(key), key)
			k.WrappedKey = []byte("wrapped anew")
			return errors.Join(err, s.ReplaceKey(k, "cut"))
		},
		"archive": func(s *Store) error {
			_, volume, err := first(s)
			return errors.Join(err, s.ArchiveVolume(volume, "cut"))
		},
		"quarantine": func(s *Store) error {
			key, volume, err := first(s)
			return errors.Join(err, s.Quarantine([]string{key}, []string{volume}, "cut"))
		},
	}
}

// TestPowerCuts kills a process at every step of every job. After each cut all
// records are whole, the old key and volume are still somewhere, a live volume
// record has its key, and the job can be done again.
func TestPowerCuts(t *testing.T) {
	t.Parallel()
	for name, job := range cutJobs() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cuts := 0
			for at := 1; ; at++ {
				s, k, v := storeWith(t)
				err := child(t, "cut", fmt.Sprintf("%s %d %s", name, at, s.dir)).Run()
				if err == nil {
					break // past the last step
				}
				cuts++
				r := load(t, s)
				if len(r.Problems) != 0 {
					t.Errorf("cut %d: %v", at, r.Problems)
				}
				for _, v := range r.Volumes {
					if _, ok := r.Keys[v.KeyID]; !ok {
						t.Errorf("cut %d: volume %s is stranded", at, v.UUID)
					}
				}
				keyFound, volumeFound := false, false
				for path := range tree(t, s.dir) {
					// Keys beside quarantined volumes too.
					if dir, ok := strings.CutSuffix(path, "volumes/"+v.UUID+".json"); ok && strings.HasPrefix(path, "quarantine") {
						if _, err := os.Lstat(filepath.Join(s.dir, dir, "keys", k.ID+".json")); err != nil {
							t.Errorf("cut %d: a quarantined volume is without its key: %v", at, err)
						}
					}
					keyFound = keyFound || strings.HasSuffix(path, "/"+k.ID+".json") || path == "keys/"+k.ID+".json"
					volumeFound = volumeFound || (strings.Contains(path, v.UUID) && !strings.Contains(path, "why"))
				}
				if !keyFound || !volumeFound {
					t.Errorf("cut %d: a record is lost: %v", at, tree(t, s.dir))
				}
				if _, live := r.Volumes[v.UUID]; live || name == "put" {
					if err := job(s); err != nil {
						t.Errorf("cut %d: again: %v", at, err)
					}
				}
				release, err := s.Lock(t.Context(), unheard)
				if err != nil {
					t.Fatal(err)
				}
				release()
				for path := range tree(t, s.dir) {
					if strings.Contains(path, tmpPrefix) {
						t.Errorf("cut %d: %s stays for ever", at, path)
					}
				}
			}
			if want := 5; cuts < want {
				t.Errorf("only %d cuts", cuts)
			}
		})
	}
}

func TestLockBetweenProcesses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	other := child(t, "lock", dir)
	in, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Wait() }()
	defer in.Close()
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}

	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	var waitedFor []string
	_, err = s.Lock(ctx, func(process string) { waitedFor = append(waitedFor, process) })
	if !errors.Is(err, ErrLocked) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", other.Process.Pid)) {
		t.Errorf("Lock of a taken store: %v", err)
	}
	if want := fmt.Sprint(other.Process.Pid); !slices.Equal(waitedFor, []string{want}) {
		t.Errorf("it told of waiting for %q, want %s once", waitedFor, want)
	}
	if d := time.Since(start); d < 100*time.Millisecond {
		t.Errorf("it did not wait: %s", d)
	}

	// Waiting ends with the other process, even with its death.
	go func() {
		time.Sleep(50 * time.Millisecond)
		_ = other.Process.Signal(syscall.SIGKILL)
	}()
	ctx, cancel = context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	release, err := s.Lock(ctx, unheard)
	if err != nil {
		t.Fatal(err)
	}
	again, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := s.Lock(again, unheard); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("the same process twice: %v", err)
	}
	release()
	release2, err := s.Lock(t.Context(), unheard)
	if err != nil {
		t.Fatal(err)
	}
	release2()
}

func TestLockFollowsNoSymlink(t *testing.T) {
	s, _, _ := storeWith(t)
	victim := filepath.Join(t.TempDir(), "victim")
	if err := errors.Join(os.WriteFile(victim, []byte("data"), 0o600), os.Symlink(victim, filepath.Join(s.dir, lockFile))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Lock(t.Context(), unheard); !errors.Is(err, unix.ELOOP) {
		t.Errorf("Lock: %v", err)
	}
	if data, err := os.ReadFile(victim); err != nil || string(data) != "data" {
		t.Errorf("%q %v", data, err)
	}
}

func BenchmarkRecordWrite(b *testing.B) {
	s, err := OpenStore(filepath.Join(b.TempDir(), "state"))
	if err != nil {
		b.Fatal(err)
	}
	k := goodKey()
	if err := s.PutKey(k); err != nil {
		b.Fatal(err)
	}
	v := goodVolume(k)
	for b.Loop() {
		if err := s.PutVolume(v); err != nil {
			b.Fatal(err)
		}
	}
}
