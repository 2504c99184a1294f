// Package logs collects what is new in log files and in the journal into pieces: compressed files that stay in a spool until somebody
// has them elsewhere. A kill at any point loses and repeats nothing: positions move in the same durable write that makes a piece known.
package logs

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options say what is collected, and where it waits.
type Options struct {
	// Dir has the positions and the spool. It is made where it is not there; only one process uses it at a time.
	Dir string
	// Files are globs of log files, absolute.
	Files []string
	// Units are those whose journal is collected.
	Units []string
	// PieceSize is how much a piece holds at most before it is compressed, in bytes, whole lines; 0 is 8 MiB. A line that is longer is
	// cut into several.
	PieceSize int64
	// MaxSpool is how many bytes of pieces may wait; 0 is 1 GiB. When it is full nothing more is read: the sources keep their lines.
	MaxSpool int64
	// Settle is how long nobody has to have written to a file that was rotated before a last line without its end is taken; 0 is 1 min.
	Settle time.Duration
	// Rate bounds how many bytes are read in a second; 0 is no bound.
	Rate int64
	// Journal runs journalctl; nil is the one of the machine.
	Journal func(ctx context.Context, args ...string) (io.ReadCloser, error)
}

const (
	defaultPiece = 8 << 20
	defaultSpool = 1 << 30

	stateFile = "positions.json"
	spoolDir  = "spool"
	lockFile  = "lock"

	stateVersion = 1
	headSize     = 1024 // bytes of position.Head
)

// Piece is a part of a source that waits in the spool.
type Piece struct {
	// Name says where it is from and where it belongs: SOURCE/SPOOL-POSITION.gz. No two pieces ever have the same, not even of two spools that the
	// same node had one after the other.
	Name  string `json:"name"`
	File  string `json:"file"` // in the spool
	Size  int64  `json:"size"` // of File, bytes
	Lines int    `json:"lines"`
	Bytes int64  `json:"bytes"` // before compression
}

// position is how far a source was read.
type position struct {
	// Of a file.
	Path   string `json:"path,omitempty"`
	Inode  uint64 `json:"inode,omitempty"`
	Offset int64  `json:"offset,omitempty"`
	// Generation counts the files that were at this path.
	Generation int    `json:"generation,omitempty"`
	Head       []byte `json:"head,omitempty"` // the first bytes, by which it is known again
	// Ended says that the file was rotated, and read to its end.
	Ended bool `json:"ended,omitempty"`

	// Of a unit's journal.
	Unit   string `json:"unit,omitempty"`
	Cursor string `json:"cursor,omitempty"`
	Number int    `json:"number,omitempty"` // of pieces so far
}

// Lost is what a source had, and no piece has.
type Lost struct {
	Source string    `json:"source"`
	Bytes  int64     `json:"bytes"` // 0: not known
	Reason string    `json:"reason"`
	Time   time.Time `json:"time"`
}

// state is the file of positions.
type state struct {
	Version int `json:"version"`
	// Spool is when the spool was made, and a random part: names of pieces have it, and sort by it.
	Spool     string     `json:"spool"`
	Positions []position `json:"positions"`
	Pieces    []Piece    `json:"pieces"` // the oldest first
	Lost      []Lost     `json:"lost,omitempty"`
	// Generations counts the files that were at each path: names of pieces have it.
	Generations map[string]int `json:"generations,omitempty"`
	Next        int            `json:"next"` // number of the next file in the spool

	Success time.Time `json:"success,omitzero"` // Summary.Success
	Losses  int       `json:"losses,omitempty"` // Summary.Losses
}

// Summary is how the archive is doing.
type Summary struct {
	Waiting int64     // bytes of pieces that wait
	Success time.Time // when last all there was had been brought away; zero: never
	Losses  int       // how many times a source lost something, since the spool was made
}

func (s state) summary() Summary {
	sum := Summary{Success: s.Success, Losses: s.Losses}
	for _, p := range s.Pieces {
		sum.Waiting += p.Size
	}
	return sum
}

// Spool is a directory with positions and pieces. It is for one goroutine.
type Spool struct {
	options Options
	state   state
	release func()
	now     func() time.Time
}

// ErrLocked says that another process uses the directory.
var ErrLocked = errors.New("another process archives logs")

// Open opens the spool, and takes away what a kill left of a piece that never counted.
func Open(o Options) (*Spool, error) {
	if o.PieceSize == 0 {
		o.PieceSize = defaultPiece
	}
	if o.MaxSpool == 0 {
		o.MaxSpool = defaultSpool
	}
	if o.Settle == 0 {
		o.Settle = time.Minute
	}
	if o.Journal == nil {
		o.Journal = journalctl
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, spoolDir), 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the spool: %w", err)
	}
	release, err := Lock(o.Dir)
	if err != nil {
		return nil, err
	}
	s := &Spool{options: o, now: time.Now, release: release}
	if err := s.load(); err != nil {
		release()
		return nil, err
	}
	return s, nil
}

// Lock keeps others from using a directory that is there.
func Lock(dir string) (release func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock the spool: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, fmt.Errorf("cannot lock the spool %s: %w", dir, err)
	}
	return func() {
		// Not by closing it alone: a child that was forked and has not yet called exec holds it for a while longer.
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
		f.Close()
	}, nil
}

// Close lets others use the directory.
func (s *Spool) Close() { s.release() }

// read reads the state of the spool in a directory; the error is fs.ErrNotExist where there is none yet.
func read(dir string) (st state, err error) {
	path := filepath.Join(dir, stateFile)
	text, err := os.ReadFile(path)
	if err != nil {
		return st, fmt.Errorf("cannot read positions: %w", err)
	}
	var known struct{ Version int }
	if err := json.Unmarshal(text, &known); err != nil {
		return st, fmt.Errorf("cannot read positions %s: %w", path, err)
	}
	if known.Version != stateVersion {
		return st, fmt.Errorf("cannot read positions %s: this program does not know version %d", path, known.Version)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&st); err != nil {
		return st, fmt.Errorf("cannot read positions %s: %w", path, err)
	}
	return st, nil
}

// ReadSummary reads the summary of the spool in a directory; another process may use it meanwhile. The error is fs.ErrNotExist where there is none yet.
func ReadSummary(dir string) (Summary, error) {
	st, err := read(dir)
	return st.summary(), err
}

// Files are all files of the spool in a directory, but the lock, in the order in which they may be removed: without positions no piece counts.
func Files(dir string) (files []string, err error) {
	for _, d := range []string{dir, filepath.Join(dir, spoolDir)} {
		entries, err := os.ReadDir(d)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read the spool: %w", err)
		}
		for _, e := range entries {
			if !e.IsDir() && e.Name() != lockFile {
				files = append(files, filepath.Join(d, e.Name()))
			}
		}
	}
	return files, nil
}

func (s *Spool) load() (err error) {
	s.state, err = read(s.options.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		var part [4]byte
		_, _ = rand.Read(part[:]) // it never fails
		s.state = state{Version: stateVersion, Spool: fmt.Sprintf("%s-%x", s.now().UTC().Format("20060102T150405Z"), part), Next: 1}
	} else if err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(s.options.Dir, spoolDir))
	if err != nil {
		return fmt.Errorf("cannot read the spool: %w", err)
	}
	for _, e := range entries {
		if !slices.ContainsFunc(s.state.Pieces, func(p Piece) bool { return p.File == e.Name() }) {
			if err := os.Remove(s.path(e.Name())); err != nil {
				return fmt.Errorf("cannot remove what a kill left: %w", err)
			}
		}
	}
	return nil
}

func (s *Spool) path(file string) string { return filepath.Join(s.options.Dir, spoolDir, file) }

// save makes the state durable.
func (s *Spool) save() error {
	text, err := json.MarshalIndent(s.state, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(s.options.Dir, stateFile)
	if err := writeDurably(path, append(text, '\n')); err != nil {
		return fmt.Errorf("cannot write positions: %w", err)
	}
	return nil
}

func writeDurably(path string, text []byte) error {
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Pieces are those that wait, the oldest first.
func (s *Spool) Pieces() []Piece { return slices.Clone(s.state.Pieces) }

// Lost is what was lost, and nobody was told of yet.
func (s *Spool) Lost() []Lost { return slices.Clone(s.state.Lost) }

// TellLost is Lost for who tells it: it is not there the next time.
func (s *Spool) TellLost() ([]Lost, error) {
	lost := s.state.Lost
	if len(lost) == 0 {
		return nil, nil
	}
	s.state.Lost = nil
	return lost, s.save()
}

// Waiting is how many bytes of pieces wait.
func (s *Spool) Waiting() int64 { return s.state.summary().Waiting }

// Summary is how the archive is doing.
func (s *Spool) Summary() Summary { return s.state.summary() }

// Succeeded notes that all there was has been brought away.
func (s *Spool) Succeeded() error {
	s.state.Success = s.now().UTC()
	return s.save()
}

// OpenPiece opens a piece.
func (s *Spool) OpenPiece(p Piece) (*os.File, error) { return os.Open(s.path(p.File)) }

// Done takes a piece away that is elsewhere now.
func (s *Spool) Done(p Piece) error {
	i := slices.IndexFunc(s.state.Pieces, func(q Piece) bool { return q.Name == p.Name })
	if i < 0 {
		return fmt.Errorf("cannot take %s from the spool: it is not there", p.Name)
	}
	s.state.Pieces = slices.Delete(s.state.Pieces, i, i+1)
	if err := s.save(); err != nil {
		return err
	}
	if err := os.Remove(s.path(p.File)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// sourceName is a path, or a unit, as part of a name.
func sourceName(kind, source string) string {
	plain := strings.Map(func(r rune) rune {
		if r == '/' || r == '.' || r == '-' || r == '_' || r == '@' || r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' {
			return r
		}
		return '_'
	}, source)
	return kind + "/" + strings.Trim(plain, "/")
}
