// Package logs collects what is new in log files and in the journal into pieces: compressed files that stay in a spool until somebody
// has them elsewhere. A kill at any point loses and repeats nothing: positions move in the same durable write that makes a piece known.
package logs

import (
	"bytes"
	"context"
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
	// PieceSize is how much a piece holds at most before it is compressed, in bytes, whole lines; 0 is 8 MiB. A line that is
	// longer is a piece by itself, up to four times that; what is longer still is cut.
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
	longestLine  = 4 // pieces

	stateFile = "positions.json"
	spoolDir  = "spool"
	lockFile  = "lock"

	stateVersion = 1
	headSize     = 1024 // bytes of position.Head
)

// Piece is a part of a source that waits in the spool.
type Piece struct {
	// Name says where it is from and where it belongs: SOURCE/POSITION.gz. No two pieces ever have the same.
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
	Version   int        `json:"version"`
	Positions []position `json:"positions"`
	Pieces    []Piece    `json:"pieces"` // the oldest first
	Lost      []Lost     `json:"lost,omitempty"`
	// Generations counts the files that were at each path: names of pieces have it.
	Generations map[string]int `json:"generations,omitempty"`
	Next        int            `json:"next"` // number of the next file in the spool
}

// Spool is a directory with positions and pieces. It is for one goroutine.
type Spool struct {
	options Options
	state   state
	lock    *os.File
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
	s := &Spool{options: o, now: time.Now, state: state{Version: stateVersion, Next: 1}}
	if err := os.MkdirAll(filepath.Join(o.Dir, spoolDir), 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the spool: %w", err)
	}
	var err error
	if s.lock, err = os.OpenFile(filepath.Join(o.Dir, lockFile), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600); err != nil {
		return nil, fmt.Errorf("cannot lock the spool: %w", err)
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		s.lock.Close()
		return nil, fmt.Errorf("cannot lock the spool %s: %w", o.Dir, ErrLocked)
	}
	if err := s.load(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Close lets others use the directory. A child that has not executed its program yet has the file too, so to close it is not enough.
func (s *Spool) Close() error {
	return errors.Join(unix.Flock(int(s.lock.Fd()), unix.LOCK_UN), s.lock.Close())
}

func (s *Spool) load() error {
	path := filepath.Join(s.options.Dir, stateFile)
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("cannot read positions: %w", err)
	default:
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&s.state); err != nil || s.state.Version != stateVersion {
			return fmt.Errorf("cannot read positions %s: version %d, %w", path, s.state.Version, cmpErr(err))
		}
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

func cmpErr(err error) error {
	if err == nil {
		return errors.New("which this version does not know")
	}
	return err
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
func (s *Spool) Waiting() (n int64) {
	for _, p := range s.state.Pieces {
		n += p.Size
	}
	return n
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
