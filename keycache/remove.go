package keycache

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Removal names records that a store is to be without.
type Removal struct {
	Keys, Volumes []string // ids
	// Leftovers are what [Store.Leftovers] returned, or some of it.
	Leftovers []string
}

// Files are the paths of the records below the store, in the order in which they go: a key after the volumes that need it.
func (r Removal) Files() []string {
	var files []string
	for _, id := range r.Volumes {
		files = append(files, filepath.Join(volumesDir, id+".json"))
	}
	files = append(files, r.Leftovers...)
	for _, id := range r.Keys {
		files = append(files, filepath.Join(keysDir, id+".json"))
	}
	return files
}

// Leftovers returns the archived records, the notes of header backups and escrows, and the intent to make a stripe, as paths below the store, in order. It is a
// *StoreError if something else than files and folders is there.
func (s *Store) Leftovers() ([]string, error) {
	var files []string
	for _, dir := range []string{archiveDir, backupsDir, escrowDir} {
		err := filepath.WalkDir(filepath.Join(s.dir, dir), func(path string, e fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return storeError("read", path, err)
			case e.IsDir():
				return nil
			case !e.Type().IsRegular():
				return storeError("read", path, errors.New("it is not a regular file"))
			}
			below, err := filepath.Rel(s.dir, path)
			files = append(files, below)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	if _, err := os.Lstat(filepath.Join(s.dir, stripeFile)); err == nil {
		files = append(files, stripeFile)
	}
	return files, nil
}

// QuarantineFolders returns the folders of quarantine, as paths below the store, in order.
func (s *Store) QuarantineFolders() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, quarantineDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, storeError("read", filepath.Join(s.dir, quarantineDir), err)
	}
	var folders []string
	for _, e := range entries {
		folders = append(folders, filepath.Join(quarantineDir, e.Name()))
	}
	return folders, nil
}

// Remove deletes records, for a store that goes into an image; nothing else ever does. Where saveTo is not "" they are in that file
// first: a tar archive of the files below the store, with their checksums, as [WriteNew] writes it. A file of that name is accepted only if it
// has all of them, as a call that was cut leaves it.
//
// It deletes nothing and returns a *StoreError if a record is not there or cannot be read, or if a volume record that stays needs a key
// that goes or cannot be read. It can be cut, and repeated for what is left.
func (s *Store) Remove(r Removal, saveTo string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	contents := map[string][]byte{}
	files := r.Files()
	for _, file := range files {
		data, err := s.readFile(filepath.Join(s.dir, file))
		if err != nil {
			return storeError("remove", filepath.Join(s.dir, file), err)
		}
		contents[file] = data
	}
	if err := errors.Join(s.checkUnused(r.Keys, r.Volumes), s.checkReadable()); err != nil {
		return err
	}
	if saveTo != "" {
		if err := s.save(saveTo, files, contents); err != nil {
			return err
		}
	}
	for _, file := range files {
		if err := s.unlink(filepath.Join(s.dir, file)); err != nil {
			return err
		}
	}
	return nil
}

// checkReadable refuses a store with a volume record that cannot be read: it may need any key.
func (s *Store) checkReadable() error {
	var unknown error
	err := s.each(volumesDir, func(path, id string) {
		if _, err := s.readVolume(path, id); err != nil {
			unknown = storeError("read", path, err)
		}
	})
	return errors.Join(err, unknown)
}

// save makes sure that a file has the contents, durably.
func (s *Store) save(path string, files []string, contents map[string][]byte) error {
	data, err := archive(files, contents, s.now())
	if err == nil {
		err = WriteNew(path, data)
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	saved, errRead := readArchive(path)
	if errRead != nil {
		return err
	}
	for _, file := range files {
		if !bytes.Equal(saved[file], contents[file]) {
			return err
		}
	}
	return nil
}

// archive makes a tar archive whose last member is what `sha256sum -c` takes.
func archive(files []string, contents map[string][]byte, at time.Time) ([]byte, error) {
	var out, sums bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(name string, data []byte) error {
		header := tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(data)), ModTime: at.Truncate(time.Second)}
		if err := w.WriteHeader(&header); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}
	for _, file := range files {
		if err := add(file, contents[file]); err != nil {
			return nil, err
		}
		fmt.Fprintf(&sums, "%s  %s\n", Sum(contents[file]), file)
	}
	err := errors.Join(add(memberSums, sums.Bytes()), w.Close())
	return out.Bytes(), err
}

// readArchive reads what [Store.Remove] saved.
func readArchive(path string) (map[string][]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	contents := map[string][]byte{}
	for r := tar.NewReader(f); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(io.LimitReader(r, maxRecord+1))
		if err != nil {
			return nil, err
		}
		contents[header.Name] = data
	}
	for line := range strings.Lines(string(contents[memberSums])) {
		sum, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
		if Sum(contents[name]) != sum {
			return nil, fmt.Errorf("the checksum of %s does not hold", name)
		}
	}
	return contents, nil
}
