package keycache

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestRemove(t *testing.T) {
	s, k, v := storeWith(t)
	other := goodKey()
	gone := goodVolume(other)
	if err := errors.Join(s.PutKey(other), s.PutVolume(gone), s.ArchiveVolume(gone.UUID, "x")); err != nil {
		t.Fatal(err)
	}
	leftovers, err := s.Leftovers()
	if err != nil || len(leftovers) != 2 {
		t.Fatalf("%v, %v", leftovers, err)
	}
	before := tree(t, s.dir)
	file := filepath.Join(t.TempDir(), "saved.tar")
	var se *StoreError
	for name, r := range map[string]Removal{
		"a key that a volume needs": {Keys: []string{k.ID}},
		"a key that is not there":   {Keys: []string{other.ID, goodKey().ID}},
		"a leftover not there":      {Leftovers: []string{"archive/volumes/none.json"}},
	} {
		if err := s.Remove(r, file); !errors.As(err, &se) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(s.volumePath(goodVolume(k).UUID), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(Removal{Keys: []string{other.ID}}, file); !errors.As(err, &se) {
		t.Errorf("beside a record that cannot be read: %v", err)
	}
	if err := os.Remove(se.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) || !maps.Equal(before, tree(t, s.dir)) {
		t.Fatalf("a refused removal changed something (%v)", err)
	}

	all := Removal{Keys: []string{k.ID, other.ID}, Volumes: []string{v.UUID}, Leftovers: leftovers}
	if err := s.Remove(all, file); err != nil {
		t.Fatal(err)
	}
	saved, err := readArchive(file)
	if err != nil || len(saved) != len(before)+1 {
		t.Fatalf("%d files, %v", len(saved), err)
	}
	for name, data := range before {
		if string(saved[name]) != data {
			t.Errorf("%s is not as it was", name)
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if left := tree(t, s.dir); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestRemoveSavesFirst: wherever it fails, each record is in the store or in the file, and the same call completes it.
func TestRemoveSavesFirst(t *testing.T) {
	for at := 1; ; at++ {
		s, k, v := storeWith(t)
		before := tree(t, s.dir)
		file := filepath.Join(t.TempDir(), "saved.tar")
		cut, steps := errors.New("cut"), 0
		s.step = func(string) error {
			if steps++; steps == at {
				return cut
			}
			return nil
		}
		r := Removal{Keys: []string{k.ID}, Volumes: []string{v.UUID}}
		err := s.Remove(r, file)
		saved, _ := readArchive(file)
		for name, data := range before {
			if tree(t, s.dir)[name] != data && string(saved[name]) != data {
				t.Errorf("step %d: %s is lost", at, name)
			}
		}
		if err == nil {
			if at < 4 {
				t.Errorf("only %d steps", at)
			}
			return
		}
		if !errors.Is(err, cut) {
			t.Fatal(err)
		}
		s.step = func(string) error { return nil }
		records := load(t, s)
		r = Removal{Keys: slices.Collect(maps.Keys(records.Keys)), Volumes: slices.Collect(maps.Keys(records.Volumes))}
		if err := s.Remove(r, file); err != nil || len(tree(t, s.dir)) != 0 {
			t.Errorf("step %d: again: %v", at, err)
		}
	}
}

func TestRemoveOverwritesNoFile(t *testing.T) {
	s, k, v := storeWith(t)
	file := filepath.Join(t.TempDir(), "saved.tar")
	if err := s.Remove(Removal{Volumes: []string{v.UUID}}, file); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(Removal{Keys: []string{k.ID}}, file); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file that lacks the key: %v", err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(before), v.MountPoint, "/other", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.PutVolume(v); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(Removal{Volumes: []string{v.UUID}}, file); !errors.Is(err, fs.ErrExist) || len(load(t, s).Volumes) != 1 {
		t.Errorf("a file that has it otherwise: %v", err)
	}
}

func TestLeftoversAreFiles(t *testing.T) {
	s, _, _ := storeWith(t)
	if err := os.Symlink("/etc/passwd", filepath.Join(s.dir, archiveDir, "link.json")); err != nil {
		t.Fatal(err)
	}
	if files, err := s.Leftovers(); err == nil {
		t.Errorf("%v", files)
	}
}
