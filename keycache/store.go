package keycache

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	keysDir       = "keys"
	volumesDir    = "volumes"
	backupsDir    = "backups"
	escrowDir     = "escrow"
	archiveDir    = "archive"
	quarantineDir = "quarantine"
	lockFile      = "lock"
	tmpPrefix     = ".tmp-"

	// maxRecord is far above any record (6 KiB of wrapped key in base64 is 8)
	// and keeps a file put there by mistake from being read into locked memory.
	maxRecord = 64 << 10
	// lockPoll is how often a taken lock is tried again.
	lockPoll = 25 * time.Millisecond
	// timeName is a time in a file name: sorts, and has no colon.
	timeName = "20060102T150405.000000000Z"
)

// Sentinels of the store.
var (
	// ErrReady refuses to move a ready volume back to formatting.
	ErrReady = errors.New("the volume is ready: its record cannot go back to formatting")
	// ErrWiping refuses to bring back a volume whose keys may be gone.
	ErrWiping = errors.New("the volume is being wiped: its record can only be archived")
	// ErrLocked reports that another process holds the store; the error that
	// wraps it names the process.
	ErrLocked = errors.New("the state directory is in use")

	errViewOnly = errors.New("the state directory was opened for reading only")
)

// StoreError is a failure of the state directory or of a file in it.
type StoreError struct {
	Path string
	Err  error // ENOSPC, EROFS, EACCES, fs.ErrExist, ErrReady, …: use errors.Is
	verb string
}

// Error names the path and the cause.
func (e *StoreError) Error() string {
	return fmt.Sprintf("cannot %s %s: %v", e.verb, e.Path, e.Err)
}

// Unwrap returns the cause.
func (e *StoreError) Unwrap() error { return e.Err }

// storeError wraps err without the path that os put into it a second time.
func storeError(verb, path string, err error) error {
	return &StoreError{Path: path, Err: bare(err), verb: verb}
}

// bare is the cause inside an error of package os, whose path is known already.
func bare(err error) error {
	switch e := err.(type) {
	case *fs.PathError:
		return e.Err
	case *os.LinkError:
		return e.Err
	}
	return err
}

// Store is the records under one state directory. Its methods may be called
// from several goroutines; between processes the caller holds [Store.Lock]
// while it writes.
type Store struct {
	dir      string
	viewOnly bool
	uid      int
	mu       sync.Mutex // one write at a time: PutVolume reads before it replaces

	now func() time.Time
	// step is called before each change on disk; an error stands for that
	// step's failure. For tests of full and read-only disks and of cuts.
	step func(name string) error
}

// OpenStore opens dir for reading and writing. It creates what is missing of
// dir (0700) and its folders, and proves by a small file that records can be
// written. It refuses, with a *StoreError, a symbolic link, a directory that
// another user owns or that group or others may enter, and a disk that is full
// or read-only.
func OpenStore(dir string) (*Store, error) {
	s := newStore(dir)
	if err := s.create(); err != nil {
		return nil, err
	}
	return s, nil
}

// ViewStore opens dir for [Store.Load] only: it creates and writes nothing. A
// dir that does not exist has no records. It refuses what OpenStore refuses,
// but for the disk's state.
func ViewStore(dir string) (*Store, error) {
	s := newStore(dir)
	s.viewOnly = true
	if err := s.checkDirs(); err != nil {
		return nil, err
	}
	return s, nil
}

func newStore(dir string) *Store {
	return &Store{
		dir:  filepath.Clean(dir),
		uid:  os.Geteuid(),
		now:  time.Now,
		step: func(string) error { return nil },
	}
}

// DirFacts is what can be seen of a state directory without writing.
type DirFacts struct {
	Exists bool
	Free   int64 // bytes that its filesystem has free
}

// leastFree is what a state directory's filesystem has to have free, bytes: room for a hundred records, which have up to 8 KiB.
const leastFree = 1 << 20

// CheckDir tells whether [OpenStore] could open dir for writing, and creates and writes nothing. Errors are those of OpenStore.
func CheckDir(dir string) (DirFacts, error) {
	s := newStore(dir)
	for _, d := range append([]string{""}, s.folders()...) {
		if err := s.checkDir(filepath.Join(s.dir, d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return DirFacts{}, err
		}
	}
	f := DirFacts{}
	existing := s.dir
	for {
		_, err := os.Lstat(existing)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || existing == "/" {
			return f, storeError("use", s.dir, err)
		}
		existing = filepath.Dir(existing)
	}
	f.Exists = existing == s.dir
	if err := unix.Access(existing, unix.W_OK|unix.X_OK); err != nil {
		return f, storeError("write to", existing, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(existing, &st); err != nil {
		return f, storeError("use", existing, err)
	}
	f.Free = int64(st.Bavail) * st.Bsize
	if f.Free < leastFree || st.Files > 0 && st.Ffree == 0 {
		return f, storeError("write to", existing, unix.ENOSPC)
	}
	return f, nil
}

// folders are the directories below the store's own.
func (s *Store) folders() []string {
	return []string{keysDir, volumesDir, archiveDir, filepath.Join(archiveDir, volumesDir), quarantineDir}
}

func (s *Store) create() error {
	if err := s.makeDir(s.dir); err != nil {
		return err
	}
	for _, d := range s.folders() {
		if err := s.makeDir(filepath.Join(s.dir, d)); err != nil {
			return err
		}
	}
	return s.probe()
}

// makeDir makes one directory of the store, durably, or checks the one there.
func (s *Store) makeDir(dir string) error {
	if err := s.step("mkdir"); err != nil {
		return storeError("create", dir, err)
	}
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		// The parents are not ours to close to others.
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return storeError("create", dir, err)
		}
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return storeError("create", dir, err)
	}
	if err == nil {
		// Without this a cut could take the directory with every record in it.
		if err := s.syncDir(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	return s.checkDir(dir)
}

// Quarantined counts the volume records in quarantine; what cannot be read has none.
func (s *Store) Quarantined() int {
	files, _ := filepath.Glob(filepath.Join(s.dir, quarantineDir, "*", volumesDir, "*.json"))
	return len(files)
}

func (s *Store) checkDirs() error {
	for _, d := range []string{"", keysDir, volumesDir} {
		if err := s.checkDir(filepath.Join(s.dir, d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (s *Store) checkDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return storeError("use", dir, err)
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		return storeError("use", dir, errors.New("it is a symbolic link"))
	case !info.IsDir():
		return storeError("use", dir, errors.New("it is not a directory"))
	}
	if err := s.checkOwner(info); err != nil {
		return storeError("use", dir, err)
	}
	return nil
}

func (s *Store) checkOwner(info fs.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("its owner is unknown")
	}
	if int64(st.Uid) != int64(s.uid) {
		return fmt.Errorf("it is owned by user %d, not by %d", st.Uid, s.uid)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("its mode %04o lets group or others in", perm)
	}
	return nil
}

// probe finds out now, before anything depends on it, that a record could be
// written: it writes about as much as a record has.
func (s *Store) probe() error {
	tmp, err := s.writeTemp(s.dir, bytes.Repeat([]byte{' '}, 4096))
	if err != nil {
		return err
	}
	// Nobody has the lock yet, so whoever took it may have swept this away.
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return storeError("write to", s.dir, err)
	}
	return nil
}

// Load reads all records. A file that cannot be trusted is in Problems: one
// that is truncated or has unknown or repeated fields, a future version, a
// value no record can have, a name other than its ID, an owner or mode that is
// not ours, or that is no regular file. The error is a *StoreError: the
// directory itself cannot be read.
func (s *Store) Load() (Records, error) {
	r := Records{Keys: map[string]KeyRecord{}, Volumes: map[string]VolumeRecord{}}
	if err := s.checkDirs(); err != nil {
		return Records{}, err
	}
	err := s.each(keysDir, func(path, id string) {
		k, err := s.readKey(path, id)
		if err != nil {
			r.Problems = append(r.Problems, RecordError{Path: path, ID: id, Kind: "key", Err: err})
			return
		}
		r.Keys[id] = k
	})
	if err != nil {
		return Records{}, err
	}
	err = s.each(volumesDir, func(path, id string) {
		v, err := s.readVolume(path, id)
		if err != nil {
			r.Problems = append(r.Problems, RecordError{Path: path, ID: id, Kind: "volume", Err: err})
			return
		}
		r.Volumes[id] = v
	})
	if err != nil {
		return Records{}, err
	}
	s.loadStripe(&r)
	return r, nil
}

// each calls f for every entry of a folder, in order of name, with the UUID in
// the name or "".
func (s *Store) each(folder string, f func(path, id string)) error {
	dir := filepath.Join(s.dir, folder)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return storeError("read", dir, err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !isUUID(id) {
			id = ""
		}
		f(filepath.Join(dir, e.Name()), id)
	}
	return nil
}

func (s *Store) readKey(path, id string) (KeyRecord, error) {
	var r KeyRecord
	err := s.read(path, &r)
	if err == nil && r.ID != id {
		err = fmt.Errorf("its name is not its id %s", r.ID)
	}
	return r, err
}

func (s *Store) readVolume(path, id string) (VolumeRecord, error) {
	var r VolumeRecord
	err := s.read(path, &r)
	if err == nil && r.UUID != id {
		err = fmt.Errorf("its name is not its uuid %s", r.UUID)
	}
	return r, err
}

// record is what the store's files hold.
type record interface{ validate() error }

// read reads a record and judges what is in it; whether it has the right name is the caller's to see.
func (s *Store) read(path string, into record) error {
	data, err := s.readFile(path)
	if err == nil {
		err = decode(data, into)
	}
	if err == nil {
		err = into.validate()
	}
	return err
}

// readFile reads a file of the store; fs.ErrNotExist is passed on.
func (s *Store) readFile(path string) ([]byte, error) {
	// O_NONBLOCK: a FIFO must not hang the boot.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, errors.New("it is a symbolic link")
	}
	if err != nil {
		return nil, bare(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, bare(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	if err := s.checkOwner(info); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return nil, bare(err)
	}
	if len(data) > maxRecord {
		return nil, fmt.Errorf("it is larger than %d bytes", maxRecord)
	}
	return data, nil
}

// fileOf is what is to be written of a record: a *StoreError where it could not be read again.
func fileOf(path string, r record) ([]byte, error) {
	err := r.validate()
	var data []byte
	if err == nil {
		data, err = encode(r)
	}
	if err != nil {
		return nil, storeError("write", path, err)
	}
	return data, nil
}

// PutKey stores a new key record and reads it back. Version 0 is taken as
// RecordVersion. It never overwrites: a record of that ID, readable or not, is
// a *StoreError with fs.ErrExist. On any other error the record may be there
// or not; it is not to be relied on.
func (s *Store) PutKey(r KeyRecord) error {
	path := s.keyPath(r.ID)
	if r.Version == 0 {
		r.Version = RecordVersion
	}
	r.Created = r.Created.UTC()
	data, err := fileOf(path, &r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	if err := s.put(path, data, linkNew); err != nil {
		return err
	}
	if _, err := s.readKey(path, r.ID); err != nil {
		return storeError("read back", path, err)
	}
	return nil
}

// ReplaceKey stores a record in place of the one with the same ID, atomically, and
// reads it back: the same data key, wrapped anew, which the caller has proven. The
// old record is first copied to archive/keys/<id>.<time>.json, with why and when
// beside it. A cut leaves the old record, with or without its copy, or the new
// one. A record that is not there or cannot be read is a *StoreError.
func (s *Store) ReplaceKey(r KeyRecord, why string) error {
	path := s.keyPath(r.ID)
	r.Created = r.Created.UTC()
	data, err := fileOf(path, &r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	if _, err := s.readKey(path, r.ID); err != nil {
		return storeError("replace", path, err)
	}
	if err := s.archiveKey(path, r.ID, why); err != nil {
		return err
	}
	if err := s.put(path, data, os.Rename); err != nil {
		return err
	}
	if _, err := s.readKey(path, r.ID); err != nil {
		return storeError("read back", path, err)
	}
	return nil
}

// PutVolume stores or replaces a volume record, atomically, and reads it back.
// It gives the record the version that its fields ask for. It refuses with a *StoreError: ErrReady
// where a ready record would go back to formatting; ErrWiping where one that is
// being wiped would get another state; a record that is there but
// cannot be read, since it could be a ready one; and fs.ErrNotExist where the
// key record that it names is not stored, since the intent to lock a volume
// must not be durable before its key is.
func (s *Store) PutVolume(r VolumeRecord) error {
	path := s.volumePath(r.UUID)
	if r.Version >= 0 && r.Version <= rotationVersion {
		r.Version = r.version()
	}
	r.Created, r.Changed = r.Created.UTC(), r.Changed.UTC()
	data, err := fileOf(path, &r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	old, err := s.readVolume(path, r.UUID)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return storeError("replace", path, err)
	case old.State == StateReady && r.State == StateFormatting:
		return storeError("replace", path, ErrReady)
	case old.State == StateWiping && r.State != StateWiping:
		return storeError("replace", path, ErrWiping)
	}
	needed := []string{r.KeyID}
	if r.Rotation != nil {
		needed = append(needed, r.Rotation.KeyID)
	}
	for _, id := range needed {
		if _, err := s.readKey(s.keyPath(id), id); err != nil {
			return storeError("write", path, fmt.Errorf("its key record %s: %w", id, err))
		}
	}
	if err := s.put(path, data, os.Rename); err != nil {
		return err
	}
	if _, err := s.readVolume(path, r.UUID); err != nil {
		return storeError("read back", path, err)
	}
	return nil
}

// ArchiveVolume moves a volume record, readable or not, to
// archive/volumes/<uuid>.<time>.json, with why and when beside it. Its key
// record stays. A cut leaves the record where it was or in both places.
// A record that is not there is a *StoreError with fs.ErrNotExist.
func (s *Store) ArchiveVolume(uuid, why string) error {
	path := s.volumePath(uuid)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	if err := s.movable(path, uuid); err != nil {
		return err
	}
	at := s.now().UTC()
	base := filepath.Join(s.dir, archiveDir, volumesDir, uuid+"."+at.Format(timeName))
	if err := s.putWhy(base+".why.json", why, at); err != nil {
		return err
	}
	if err := s.linkTo(path, base+".json"); err != nil {
		return err
	}
	return s.unlink(path)
}

// ArchiveKey moves a key record that no volume needs any more to
// archive/keys/<id>.<time>.json, with why and when beside it. A cut leaves it
// where it was or in both places. It is a *StoreError if a volume record needs it or
// cannot be read, as it could need it, and with fs.ErrNotExist if it is not there.
func (s *Store) ArchiveKey(id, why string) error {
	path := s.keyPath(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	if err := s.movable(path, id); err != nil {
		return err
	}
	if err := s.checkUnused([]string{id}, nil); err != nil {
		return err
	}
	var unknown error
	err := s.each(volumesDir, func(file, id string) {
		if _, err := s.readVolume(file, id); err != nil {
			unknown = storeError("move", path, fmt.Errorf("volume record %s, which may need it, cannot be read: %w", file, err))
		}
	})
	if err := errors.Join(err, unknown); err != nil {
		return err
	}
	if err := s.archiveKey(path, id, why); err != nil {
		return err
	}
	return s.unlink(path)
}

// archiveKey gives a key record a second name in the archive, with why and when beside it.
func (s *Store) archiveKey(path, id, why string) error {
	archive := filepath.Join(s.dir, archiveDir, keysDir)
	if err := s.makeDir(archive); err != nil {
		return err
	}
	at := s.now().UTC()
	base := filepath.Join(archive, id+"."+at.Format(timeName))
	if err := s.putWhy(base+".why.json", why, at); err != nil {
		return err
	}
	return s.linkTo(path, base+".json")
}

// Quarantine moves records, readable or not, to quarantine/<time>/keys and
// quarantine/<time>/volumes, with why and when in why.json there. Keys are
// copied first, then volumes moved, then keys removed: wherever a cut leaves a
// volume record, its key record is beside it, and the call can be repeated.
//
// It moves nothing and returns a *StoreError if a record is not there
// (fs.ErrNotExist) or if a readable volume record that is not listed needs a
// listed key.
func (s *Store) Quarantine(keys, volumes []string, why string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	for _, id := range keys {
		if err := s.movable(s.keyPath(id), id); err != nil {
			return err
		}
	}
	for _, id := range volumes {
		if err := s.movable(s.volumePath(id), id); err != nil {
			return err
		}
	}
	if err := s.checkUnused(keys, volumes); err != nil {
		return err
	}

	at := s.now().UTC()
	to := filepath.Join(s.dir, quarantineDir, at.Format(timeName))
	for _, dir := range []string{to, filepath.Join(to, keysDir), filepath.Join(to, volumesDir)} {
		if err := s.makeDir(dir); err != nil {
			return err
		}
	}
	if err := s.putWhy(filepath.Join(to, "why.json"), why, at); err != nil {
		return err
	}
	for _, id := range keys {
		if err := s.linkTo(s.keyPath(id), filepath.Join(to, keysDir, id+".json")); err != nil {
			return err
		}
	}
	for _, id := range volumes {
		if err := s.linkTo(s.volumePath(id), filepath.Join(to, volumesDir, id+".json")); err != nil {
			return err
		}
		if err := s.unlink(s.volumePath(id)); err != nil {
			return err
		}
	}
	for _, id := range keys {
		if err := s.unlink(s.keyPath(id)); err != nil {
			return err
		}
	}
	return nil
}

// checkUnused refuses to part a volume record that stays from a key that goes.
func (s *Store) checkUnused(keys, volumes []string) error {
	var stranded error
	err := s.each(volumesDir, func(path, id string) {
		v, err := s.readVolume(path, id)
		if i := slices.IndexFunc(keys, v.needs); err == nil && i >= 0 && !slices.Contains(volumes, id) {
			stranded = storeError("move", s.keyPath(keys[i]), fmt.Errorf("volume record %s needs it", id))
		}
	})
	return errors.Join(err, stranded)
}

// movable checks that a record file, in whatever state, is there.
func (s *Store) movable(path, id string) error {
	if !isUUID(id) {
		return storeError("move", path, fmt.Errorf("%q is not a UUID", id))
	}
	if _, err := os.Lstat(path); err != nil {
		return storeError("move", path, err)
	}
	return nil
}

func (s *Store) writable() error {
	if s.viewOnly {
		return storeError("write to", s.dir, errViewOnly)
	}
	return nil
}

func (s *Store) keyPath(id string) string {
	return filepath.Join(s.dir, keysDir, id+".json")
}

func (s *Store) volumePath(uuid string) string {
	return filepath.Join(s.dir, volumesDir, uuid+".json")
}

// putWhy writes the note that goes with records that were moved.
func (s *Store) putWhy(path, why string, at time.Time) error {
	data, err := encode(struct {
		Why  string    `json:"why"`
		Time time.Time `json:"time"`
	}{why, at})
	if err != nil {
		return storeError("write", path, err)
	}
	return s.put(path, data, linkNew)
}

// put makes path hold data, durably, and reads it back. A failure leaves path
// as it was, or, if only the fsync of the directory failed, with data.
func (s *Store) put(path string, data []byte, place func(tmp, path string) error) error {
	dir := filepath.Dir(path)
	tmp, err := s.writeTemp(dir, data)
	if err != nil {
		return err
	}
	err = s.step("place")
	if err == nil {
		err = place(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return storeError("write", path, err)
	}
	if err := s.syncDir(dir); err != nil {
		return err
	}
	got, err := s.readFile(path)
	if err == nil && !bytes.Equal(got, data) {
		err = errors.New("it does not hold what was written")
	}
	if err != nil {
		return storeError("read back", path, err)
	}
	return nil
}

// linkNew gives a temporary file its name, unless something has that name.
func linkNew(tmp, path string) error {
	if err := os.Link(tmp, path); err != nil {
		return err
	}
	return os.Remove(tmp)
}

// writeTemp writes data to a new file in dir, to the disk, and returns its path.
func (s *Store) writeTemp(dir string, data []byte) (string, error) {
	path := filepath.Join(dir, tmpPrefix+rand.Text())
	if err := s.step("create"); err != nil {
		return "", storeError("create", path, err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", storeError("create", path, err)
	}
	if err := s.fill(f, data); err != nil {
		_ = f.Close()
		_ = os.Remove(path)
		return "", storeError("write", path, err)
	}
	if err := f.Close(); err != nil {
		_ = os.Remove(path)
		return "", storeError("write", path, err)
	}
	return path, nil
}

func (s *Store) fill(f *os.File, data []byte) error {
	// The umask may have taken bits that we need to read it again.
	if err := f.Chmod(0o600); err != nil {
		return err
	}
	if err := s.step("write"); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := s.step("sync"); err != nil {
		return err
	}
	return f.Sync()
}

// linkTo gives a record a second name, durably; nothing is overwritten. A link
// keeps the bytes whatever they are, and also links, without following them.
func (s *Store) linkTo(from, to string) error {
	err := s.step("link")
	if err == nil {
		err = os.Link(from, to)
	}
	if err != nil {
		return storeError("move", from, err)
	}
	return s.syncDir(filepath.Dir(to))
}

// unlink takes a record's first name away once the second is durable.
func (s *Store) unlink(path string) error {
	err := s.step("unlink")
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil {
		return storeError("move", path, err)
	}
	return s.syncDir(filepath.Dir(path))
}

func (s *Store) syncDir(dir string) error {
	if err := s.step("syncdir"); err != nil {
		return storeError("sync", dir, err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return storeError("sync", dir, err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return storeError("sync", dir, err)
	}
	return nil
}

// Lock waits until this is the only agent that works with the store, or until
// ctx ends: then the error wraps ErrLocked and ctx's error and names the
// process that holds it. waiting is told that process once, where there is one to
// wait for. The kernel drops the lock if the process dies. release may be called
// more than once.
func (s *Store) Lock(ctx context.Context, waiting func(process string)) (release func(), err error) {
	path := filepath.Join(s.dir, lockFile)
	if err := s.writable(); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, storeError("lock", path, err)
	}
	for told := false; ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, storeError("lock", path, err)
		}
		if !told {
			waiting(lockHolder(f))
			told = true
		}
		select {
		case <-ctx.Done():
			holder := lockHolder(f)
			_ = f.Close()
			return nil, storeError("lock", path, fmt.Errorf("%w by process %s: %w", ErrLocked, holder, ctx.Err()))
		case <-time.After(lockPoll):
		}
	}
	// Only a courtesy to those who wait: a full disk must not stop us here.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	s.sweep()
	var once sync.Once
	return func() { once.Do(func() { _ = f.Close() }) }, nil
}

func lockHolder(f *os.File) string {
	buf := make([]byte, 32)
	n, _ := f.ReadAt(buf, 0)
	if pid, err := strconv.Atoi(strings.TrimSpace(string(buf[:n]))); err == nil {
		return strconv.Itoa(pid)
	}
	return "unknown"
}

// sweep removes temporary files that a cut left. They never were records: no
// disk is touched before PutKey or PutVolume has returned. With the lock held
// nobody else is writing one; failures do no harm.
func (s *Store) sweep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	dirs := []string{s.dir, filepath.Join(s.dir, keysDir), filepath.Join(s.dir, volumesDir), filepath.Join(s.dir, backupsDir), filepath.Join(s.dir, escrowDir), filepath.Join(s.dir, archiveDir, keysDir), filepath.Join(s.dir, archiveDir, volumesDir)}
	events, _ := os.ReadDir(filepath.Join(s.dir, quarantineDir))
	for _, e := range events {
		dirs = append(dirs, filepath.Join(s.dir, quarantineDir, e.Name()))
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), tmpPrefix) {
				_ = os.Remove(filepath.Join(dir, e.Name()))
			}
		}
	}
}
