package keycache

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of what is read of a backup, in bytes. A header that this program makes has 2 MiB.
const (
	maxBackupHeader = 32 << 20
	maxBackup       = maxBackupHeader + 1<<20
)

// The members of a backup, in their order.
const (
	memberManifest = "manifest.json"
	memberKey      = "key.json"
	memberVolume   = "volume.json"
	memberHeader   = "header.luks"
	memberSums     = "SHA256SUMS"
)

// Manifest says what a backup is of.
type Manifest struct {
	Version      int       `json:"version"` // RecordVersion
	Time         time.Time `json:"time"`    // UTC
	AgentVersion string    `json:"agent_version"`
	UUID         string    `json:"uuid"`
	Class        string    `json:"class"`
	Identity     string    `json:"identity"`
	Size         int64     `json:"size"` // of the disk, bytes
	KeyARN       string    `json:"key_arn"`
	HeaderSize   int64     `json:"header_size"` // bytes
	HeaderSHA256 string    `json:"header_sha256"`
}

// Backup is a volume's LUKS header with the records that open it. What the header means is not this package's matter: to it
// they are bytes.
type Backup struct {
	Manifest Manifest
	Key      KeyRecord
	Volume   VolumeRecord
	Header   []byte
}

// NewBackup makes the backup of a volume.
func NewBackup(k KeyRecord, v VolumeRecord, header []byte, at time.Time, agentVersion string) Backup {
	return Backup{
		Manifest: Manifest{
			Version: RecordVersion, Time: at.UTC(), AgentVersion: agentVersion,
			UUID: v.UUID, Class: v.Class, Identity: v.Identity, Size: v.Size, KeyARN: k.KeyARN,
			HeaderSize: int64(len(header)), HeaderSHA256: Sum(header),
		},
		Key: k, Volume: v, Header: header,
	}
}

// Sum is the SHA-256 of b in hexadecimal, as sha256sum(1) prints it.
func Sum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// BackupError is a backup file that cannot be written, read or accepted.
type BackupError struct {
	Path string
	Err  error
	verb string
}

// Error names the file and the cause.
func (e *BackupError) Error() string {
	return fmt.Sprintf("cannot %s backup %s: %v", e.verb, e.Path, e.Err)
}

// Unwrap returns the cause.
func (e *BackupError) Unwrap() error { return e.Err }

// validate refuses a backup whose parts do not belong together.
func (b *Backup) validate() error {
	m := b.Manifest
	if err := errors.Join(b.Key.validate(), b.Volume.validate(), checkTime("time", m.Time)); err != nil {
		return err
	}
	switch {
	case m.Version != RecordVersion:
		return versionError(m.Version, &m)
	case m.AgentVersion == "":
		return errors.New("agent_version is empty")
	case len(b.Header) == 0 || len(b.Header) > maxBackupHeader:
		return fmt.Errorf("its header has %d bytes, allowed are 1 to %d", len(b.Header), maxBackupHeader)
	case m.HeaderSize != int64(len(b.Header)) || m.HeaderSHA256 != Sum(b.Header):
		return errors.New("its manifest is not of its header")
	case m.KeyARN != b.Key.KeyARN || b.Volume.KeyID != b.Key.ID:
		return errors.New("its key record is not the volume's")
	case m.UUID != b.Volume.UUID || m.Class != b.Volume.Class || m.Identity != b.Volume.Identity || m.Size != b.Volume.Size:
		return errors.New("its manifest is not of its volume record")
	case b.Volume.Rotation != nil:
		return errors.New("the data key of its volume is being replaced")
	case b.Volume.State != StateReady:
		return fmt.Errorf("its volume is %s, not %s", b.Volume.State, StateReady)
	}
	return nil
}

// Encode makes the file: a tar archive, whose last member is what `sha256sum -c` takes. The same backup makes the same bytes.
func (b *Backup) Encode() ([]byte, error) {
	if err := b.validate(); err != nil {
		return nil, err
	}
	var out, sums bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(name string, data []byte) error {
		header := tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(data)), ModTime: b.Manifest.Time.Truncate(time.Second), Format: tar.FormatUSTAR}
		if err := w.WriteHeader(&header); err != nil {
			return err
		}
		fmt.Fprintf(&sums, "%s  %s\n", Sum(data), name)
		_, err := w.Write(data)
		return err
	}
	for _, member := range []struct {
		name   string
		record any
	}{{memberManifest, b.Manifest}, {memberKey, b.Key}, {memberVolume, b.Volume}} {
		data, err := encode(member.record)
		if err == nil {
			err = add(member.name, data)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := errors.Join(add(memberHeader, b.Header), add(memberSums, bytes.Clone(sums.Bytes())), w.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// Write stores the backup in a new file (0600), durably, and reads it back. It never overwrites: a *BackupError with fs.ErrExist. A cut
// leaves the file, or none of that name.
func (b *Backup) Write(path string) error {
	data, err := b.Encode()
	if err != nil {
		return &BackupError{Path: path, Err: err, verb: "write"}
	}
	if err := WriteNew(path, data); err != nil {
		return err
	}
	_, err = ReadBackup(path)
	return err
}

// WriteNew stores data as [Backup.Write] stores a backup.
func WriteNew(path string, data []byte) error {
	err := writeNew(path, data)
	if err == nil {
		return nil
	}
	var store *StoreError
	if errors.As(err, &store) {
		err = store.Err
	}
	return &BackupError{Path: path, Err: bare(err), verb: "write"}
}

func writeNew(path string, data []byte) error {
	s := newStore(filepath.Dir(path))
	tmp, err := s.writeTemp(s.dir, data)
	if err != nil {
		return err
	}
	if err := linkNew(tmp, path); err != nil {
		_ = os.Remove(tmp)
		return err
	}
	if err := s.syncDir(s.dir); err != nil {
		return err
	}
	got, err := os.ReadFile(path)
	if err == nil && !bytes.Equal(got, data) {
		err = errors.New("it does not hold what was written")
	}
	return err
}

// ReadBackup reads a backup file and wants everything in it to be as [Backup.Write] makes it: the members, their order, their checksums,
// fields, and that they belong together. It reads at most 33 MiB. That nobody made another one in its place only the data key can
// tell: the caller has the header prove itself.
func ReadBackup(path string) (*Backup, error) {
	data, err := readBounded(path, maxBackup)
	if err != nil {
		return nil, &BackupError{Path: path, Err: bare(err), verb: "read"}
	}
	return DecodeBackup(path, data)
}

// DecodeBackup is [ReadBackup] of bytes that came from elsewhere: path names the place for errors.
func DecodeBackup(path string, data []byte) (*Backup, error) {
	b, err := decodeBackup(data)
	if err != nil {
		return nil, &BackupError{Path: path, Err: err, verb: "accept"}
	}
	return b, nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0) // a FIFO must not hang us
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case info.Size() > limit:
		return nil, fmt.Errorf("it has %d bytes, more than %d", info.Size(), limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

func decodeBackup(data []byte) (*Backup, error) {
	rest := bytes.NewReader(data)
	r := tar.NewReader(rest)
	var sums strings.Builder
	members := map[string][]byte{}
	for _, name := range []string{memberManifest, memberKey, memberVolume, memberHeader, memberSums} {
		header, err := r.Next()
		if err != nil {
			return nil, fmt.Errorf("it is damaged or truncated: cannot find %s: %w", name, err)
		}
		limit := int64(maxRecord)
		if name == memberHeader {
			limit = maxBackupHeader
		}
		switch {
		case header.Name != name || header.Typeflag != tar.TypeReg || header.Format != tar.FormatUSTAR:
			return nil, fmt.Errorf("it is not a backup of luks-kms-agent: its member %q is not the file %s", header.Name, name)
		case header.Size > limit:
			return nil, fmt.Errorf("its %s has %d bytes, more than %d", name, header.Size, limit)
		}
		member, err := io.ReadAll(r)
		if err != nil {
			return nil, fmt.Errorf("it is damaged or truncated: cannot read %s: %w", name, err)
		}
		members[name] = member
		if name != memberSums {
			fmt.Fprintf(&sums, "%s  %s\n", Sum(member), name)
		}
	}
	if string(members[memberSums]) != sums.String() {
		return nil, errors.New("it is damaged: a checksum does not hold")
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is something after the backup")
	}
	if tail, err := io.ReadAll(rest); err != nil || len(bytes.Trim(tail, "\x00")) != 0 {
		return nil, errors.New("there is something after the backup")
	}
	b := &Backup{Header: members[memberHeader]}
	for name, into := range map[string]any{memberManifest: &b.Manifest, memberKey: &b.Key, memberVolume: &b.Volume} {
		if err := decode(members[name], into); err != nil {
			return nil, fmt.Errorf("its %s: %w", name, err)
		}
	}
	return b, b.validate()
}

// BackupNote is what is remembered of the last backup of a volume: backups/<UUID>.json.
type BackupNote struct {
	Version      int       `json:"version"` // RecordVersion
	UUID         string    `json:"uuid"`    // names the file
	Time         time.Time `json:"time"`    // UTC
	Path         string    `json:"path"`    // absolute, as it was then
	HeaderSHA256 string    `json:"header_sha256"`
	SeqID        uint64    `json:"seq_id"` // of the header
}

func (n *BackupNote) validate() error {
	switch sum, err := hex.DecodeString(n.HeaderSHA256); {
	case n.Version != RecordVersion:
		return versionError(n.Version, n)
	case !isUUID(n.UUID):
		return fmt.Errorf("uuid %q is not a UUID", n.UUID)
	case !filepath.IsAbs(n.Path):
		return fmt.Errorf("path %q is not absolute", n.Path)
	case err != nil || len(sum) != sha256.Size:
		return errors.New("header_sha256 is not a SHA-256")
	}
	return checkTime("time", n.Time)
}

// PutBackup remembers a backup, in place of an earlier one.
func (s *Store) PutBackup(n BackupNote) error {
	path := s.backupPath(n.UUID)
	n.Version, n.Time = RecordVersion, n.Time.UTC()
	return s.putNote(path, &n)
}

// putNote stores what is remembered of a volume beside its record, in place of what was there.
func (s *Store) putNote(path string, n record) error {
	data, err := fileOf(path, n)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	if err := s.makeDir(filepath.Dir(path)); err != nil {
		return err
	}
	return s.put(path, data, os.Rename)
}

// Backup returns what is remembered of the last backup of a volume: fs.ErrNotExist if there is nothing. A note that cannot be trusted is a
// *RecordError, and no reason not to use the volume.
func (s *Store) Backup(uuid string) (BackupNote, error) {
	return loadNote(s, s.backupPath(uuid), "backup", uuid, func(n BackupNote) string { return n.UUID })
}

// loadNote reads what is remembered of a volume beside its record.
func loadNote[T any, P interface {
	*T
	record
}](s *Store, path, kind, uuid string, of func(T) string) (n T, err error) {
	err = s.read(path, P(&n))
	if err == nil && of(n) != uuid {
		err = fmt.Errorf("its name is not its uuid %s", of(n))
	}
	var none T
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return none, fs.ErrNotExist
	case err != nil:
		return none, &RecordError{Path: path, ID: uuid, Kind: kind, Err: err}
	}
	return n, nil
}

func (s *Store) backupPath(uuid string) string {
	return filepath.Join(s.dir, backupsDir, uuid+".json")
}
