package logs

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Collected is what Collect did.
type Collected struct {
	Pieces int
	Lines  int
	Bytes  int64
	Full   bool // the spool is full: there is more
}

// errFull ends a collection when the spool is full.
var errFull = errors.New("the spool is full")

// Collect makes pieces of what is new in all sources, until there is nothing more, the spool is full, or ctx ends. At the end of a file that is still
// written to, a line without its end waits. A source that fails does not stop the others.
func (s *Spool) Collect(ctx context.Context) (c Collected, err error) {
	var errs []error
	for _, collect := range []func(context.Context, *Collected) error{s.collectFiles, s.collectJournal} {
		err := collect(ctx, &c)
		if errors.Is(err, errFull) {
			c.Full = true
			break
		}
		errs = append(errs, err)
	}
	return c, errors.Join(append(errs, ctx.Err())...)
}

// found is a file that is there.
type found struct {
	path string
	file *os.File
	stat unix.Stat_t
}

func open(path string) (*found, error) {
	// O_NONBLOCK: a FIFO must not hang us.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	it := &found{path: path, file: f}
	err = unix.Fstat(int(f.Fd()), &it.stat)
	if err == nil && it.stat.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return it, nil
}

// is tells whether a file may be that of a position. The device's number says nothing: it is another one after a reboot.
func (f *found) is(p position) bool {
	if f.stat.Ino != p.Inode || filepath.Dir(f.path) != filepath.Dir(p.Path) {
		return false
	}
	begins, err := p.begins(f)
	return f.path == p.Path || err == nil && begins && f.stat.Size >= p.Offset
}

func (s *Spool) collectFiles(ctx context.Context, c *Collected) error {
	var errs []error
	here := map[string]*found{}
	defer func() {
		for _, f := range here {
			f.file.Close()
		}
	}()
	var paths []string
	for _, glob := range s.options.Files {
		matches, err := filepath.Glob(glob)
		if err != nil {
			return fmt.Errorf("cannot look for log files %q: %w", glob, err)
		}
		for _, path := range matches {
			if here[path] != nil {
				continue
			}
			f, err := open(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue // rotated just now
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("cannot read log file: %w", err))
				continue
			}
			here[path] = f
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	claimed := map[string]bool{} // files that have a position
	// What was begun before what is new: a rotated file's end comes before the new file's beginning.
	for i := 0; i < len(s.state.Positions); i++ {
		p := s.state.Positions[i]
		if p.Unit != "" {
			continue
		}
		f, rotated := s.find(p, here, claimed)
		if f != nil && (rotated || p.Ended) {
			// The number of a file that is gone may have been given to another.
			if same, err := p.knows(f); err == nil && !same {
				if here[f.path] != f {
					f.file.Close()
				}
				f = nil
			}
		}
		if f == nil {
			s.gone(i)
			i--
			continue
		}
		claimed[f.path] = true
		err := s.follow(ctx, i, f, rotated && s.now().Sub(time.Unix(f.stat.Mtim.Unix())) > s.options.Settle, c)
		if rotated && here[f.path] != f {
			f.file.Close()
		}
		if err != nil {
			if errors.Is(err, errFull) || ctx.Err() != nil {
				return err
			}
			errs = append(errs, err)
		}
	}
	for _, path := range paths {
		f := here[path]
		// One that was renamed while this looked around has two names here.
		if claimed[path] || slices.ContainsFunc(s.state.Positions, func(p position) bool { return p.Unit == "" && f.is(p) }) {
			continue
		}
		s.state.Positions = append(s.state.Positions, position{Path: path, Inode: f.stat.Ino, Generation: s.generation(path)})
		err := s.follow(ctx, len(s.state.Positions)-1, f, false, c)
		if errors.Is(err, errFull) || ctx.Err() != nil {
			return err
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// generation is the next one of a path.
func (s *Spool) generation(path string) int {
	n := s.state.Generations[path] + 1
	if s.state.Generations == nil {
		s.state.Generations = map[string]int{}
	}
	s.state.Generations[path] = n
	return n
}

// find finds the file of a position: where it was, or under the name that a rotation gave it in the same directory.
func (s *Spool) find(p position, here map[string]*found, claimed map[string]bool) (f *found, rotated bool) {
	if f := here[p.Path]; f != nil && !claimed[f.path] && f.is(p) {
		return f, false
	}
	dir := filepath.Dir(p.Path)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, false
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if claimed[path] {
			continue
		}
		f := here[path]
		if f == nil {
			if f, err = open(path); err != nil {
				continue
			}
		}
		if f.is(p) {
			return f, path != p.Path
		}
		if here[path] != f {
			f.file.Close()
		}
	}
	return nil, false
}

// gone drops a position whose file is nowhere. Where its end was read, nothing is lost by that.
func (s *Spool) gone(i int) {
	p := s.state.Positions[i]
	s.state.Positions = slices.Delete(s.state.Positions, i, i+1)
	if !p.Ended {
		s.lose(p.Path, 0, "it was removed or compressed before its end was read")
	}
}

func (s *Spool) lose(source string, bytes int64, reason string) {
	s.state.Losses++
	s.state.Lost = append(s.state.Lost, Lost{Source: source, Bytes: bytes, Reason: reason, Time: s.now().UTC()})
}

// follow makes pieces of a file from its position on. final says that nobody writes to it any more.
func (s *Spool) follow(ctx context.Context, i int, f *found, final bool, c *Collected) error {
	same, err := s.state.Positions[i].knows(f)
	if err != nil {
		return fmt.Errorf("cannot read log file: %w", err)
	}
	if !same {
		// Emptied and written anew (copytruncate), or the number of a file that is gone was given to another.
		if err := s.truncated(ctx, i, f, c); err != nil {
			return err
		}
	}
	for ctx.Err() == nil {
		more, err := s.piece(ctx, i, f, final, c)
		if err != nil || !more {
			return err
		}
	}
	return ctx.Err()
}

// knows reports whether a file still is the one that was read up to the position.
func (p *position) knows(f *found) (bool, error) {
	if f.stat.Size < p.Offset {
		return false, nil
	}
	return p.begins(f)
}

// begins reports whether a file begins as that of the position did, as far as it goes.
func (p *position) begins(f *found) (bool, error) {
	head, err := headOf(f.file, int64(len(p.Head)))
	return bytes.HasPrefix(p.Head, head), err
}

// headOf is the first bytes of a file, or all of it.
func headOf(f *os.File, size int64) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, 0, size))
}

// truncated reads the end of what was at a position from the copy that copytruncate left beside it, and begins anew.
func (s *Spool) truncated(ctx context.Context, i int, f *found, c *Collected) error {
	p := s.state.Positions[i]
	copied := s.copyOf(p, f)
	head, err := headOf(f.file, int64(len(p.Head)))
	written := bytes.TrimRight(head, "\x00")
	switch {
	case err != nil:
		return err
	case copied == nil && len(written) > 0 && bytes.HasPrefix(p.Head, written):
		// It lost its end: a power cut took what was read before the kernel had written it. Zeros may stand there instead.
		s.state.Positions[i].Offset, s.state.Positions[i].Head = f.stat.Size, written
		return s.save()
	case copied == nil:
		s.lose(p.Path, 0, "it was truncated, and no copy of it is there")
	default:
		defer copied.file.Close()
		for more := true; more; {
			if more, err = s.piece(ctx, i, copied, true, c); err != nil {
				return err
			}
		}
	}
	s.state.Positions[i] = position{Path: p.Path, Inode: p.Inode, Generation: s.generation(p.Path)}
	// The copy is not to be read again, should a glob match it.
	if copied != nil {
		s.state.Positions = append(s.state.Positions, position{
			Path: copied.path, Inode: copied.stat.Ino, Offset: copied.stat.Size,
			Generation: s.generation(copied.path), Head: p.Head, Ended: true,
		})
	}
	return s.save()
}

// copyOf finds the file beside a position's that begins as it did and is as long at least.
func (s *Spool) copyOf(p position, not *found) *found {
	if len(p.Head) == 0 {
		return nil
	}
	dir := filepath.Dir(p.Path)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		f, err := open(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		begins, err := p.begins(f)
		if err == nil && begins && f.stat.Size >= p.Offset && f.stat.Ino != not.stat.Ino {
			return f
		}
		f.file.Close()
	}
	return nil
}

// piece makes the next piece of a file; more is false at its end. final takes a last line without its end too.
func (s *Spool) piece(ctx context.Context, i int, f *found, final bool, c *Collected) (more bool, err error) {
	p := s.state.Positions[i]
	if err := s.room(); err != nil {
		return false, err
	}
	name := fmt.Sprintf("%s/%s-%06d-%020d.gz", sourceName("files", p.Path), s.state.Spool, p.Generation, p.Offset)
	rest := io.NewSectionReader(f.file, p.Offset, max(0, f.stat.Size-p.Offset)) // what there was when it was opened
	made, end, err := s.compress(ctx, name, rest, final, nil)
	if err != nil {
		return false, fmt.Errorf("cannot collect %s: %w", f.path, err)
	}
	// Who has the file open may write on for a while after a rotation: a line of which the end is to come waits.
	if final && made.Bytes == 0 && !p.Ended {
		s.state.Positions[i].Ended = true
		return false, s.save()
	}
	if made.Bytes == 0 {
		return false, nil
	}
	p.Offset += made.Bytes
	p.Ended = p.Ended || final && end
	if p.Head, err = headOf(f.file, min(p.Offset, headSize)); err != nil {
		return false, err
	}
	return !end, s.add(ctx, made, i, p, c)
}

// room says whether another piece may be made.
func (s *Spool) room() error {
	if s.Waiting() >= s.options.MaxSpool {
		return errFull
	}
	return nil
}

// add makes a piece known, together with the position behind it.
func (s *Spool) add(ctx context.Context, made Piece, i int, behind position, c *Collected) error {
	before := s.state.Positions[i]
	s.state.Positions[i] = behind
	s.state.Pieces = append(s.state.Pieces, made)
	if err := s.save(); err != nil {
		// The next try reads it again: what is not durable does not count.
		s.state.Positions[i], s.state.Pieces = before, s.state.Pieces[:len(s.state.Pieces)-1]
		_ = os.Remove(s.path(made.File))
		return err
	}
	c.Pieces++
	c.Lines += made.Lines
	c.Bytes += made.Bytes
	if s.options.Rate <= 0 {
		return nil
	}
	select {
	case <-time.After(time.Duration(float64(made.Bytes) / float64(s.options.Rate) * float64(time.Second))):
	case <-ctx.Done():
	}
	return nil
}

// compress writes whole lines of r into a file of the spool, up to the size of a piece. Where nothing is there it leaves no file. each, if not nil,
// sees every line. end says that there is nothing more: who writes on is not waited for.
func (s *Spool) compress(ctx context.Context, name string, r io.Reader, final bool, each func(line []byte) error) (made Piece, end bool, err error) {
	made = Piece{Name: name, File: fmt.Sprintf("%012d.gz", s.state.Next)}
	path := s.path(made.File)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return made, false, err
	}
	defer func() {
		f.Close()
		if err != nil || made.Bytes == 0 {
			_ = os.Remove(path)
		}
	}()
	counted := &counter{w: f}
	zip := gzip.NewWriter(counted)
	lines := bufio.NewReaderSize(r, 64<<10)
	var line []byte
	for made.Bytes < s.options.PieceSize && ctx.Err() == nil {
		var whole bool
		if line, whole, err = readLine(lines, line, s.options.PieceSize); err != nil {
			return made, false, err
		}
		if len(line) == 0 || !whole && !final && int64(len(line)) < s.options.PieceSize {
			end = true
			break
		}
		if made.Bytes > 0 && made.Bytes+int64(len(line)) > s.options.PieceSize {
			break // it is the next piece's first
		}
		if each != nil {
			if err := each(line); err != nil {
				return made, false, err
			}
		}
		if _, err := zip.Write(line); err != nil {
			return made, false, err
		}
		made.Bytes += int64(len(line))
		made.Lines++
	}
	if made.Bytes == 0 {
		return made, true, nil
	}
	if err := errors.Join(zip.Close(), f.Sync()); err != nil {
		return made, false, err
	}
	made.Size = counted.n
	s.state.Next++
	return made, end, syncDir(filepath.Dir(path))
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

// readLine returns the next line with its end, or what there is of it at the end of r, or its first bytes where it has more than most. It uses the memory of
// the one before.
func readLine(r *bufio.Reader, before []byte, most int64) (line []byte, whole bool, err error) {
	line = before[:0]
	for {
		part, err := r.ReadSlice('\n')
		if room := most - int64(len(line)); int64(len(part)) > room {
			return append(line, part[:room]...), false, nil
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line, true, nil
		case errors.Is(err, io.EOF):
			return line, false, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return line, false, err
		}
	}
}

// collectJournal makes pieces of what is new in the journal of each unit, an entry of `journalctl -o json` a line.
func (s *Spool) collectJournal(ctx context.Context, c *Collected) error {
	var errs []error
	for _, unit := range s.options.Units {
		i := slices.IndexFunc(s.state.Positions, func(p position) bool { return p.Unit == unit })
		if i < 0 {
			s.state.Positions = append(s.state.Positions, position{Unit: unit})
			i = len(s.state.Positions) - 1
		}
		for more := true; more && ctx.Err() == nil; {
			var err error
			if more, err = s.journalPiece(ctx, i, c); err != nil {
				if errors.Is(err, errFull) {
					return err
				}
				errs = append(errs, err)
				break
			}
		}
	}
	return errors.Join(errs...)
}

func (s *Spool) journalPiece(ctx context.Context, i int, c *Collected) (more bool, err error) {
	p := s.state.Positions[i]
	if err := s.room(); err != nil {
		return false, err
	}
	args := []string{"--no-pager", "--quiet", "--output=json", "--unit=" + p.Unit}
	if p.Cursor != "" {
		args = append(args, "--after-cursor="+p.Cursor)
	}
	journal, err := s.options.Journal(ctx, args...)
	if err != nil {
		return false, fmt.Errorf("cannot read the journal of %s: %w", p.Unit, err)
	}
	made, end, err := s.compress(ctx, fmt.Sprintf("%s/%s-%012d.gz", sourceName("journal", p.Unit), s.state.Spool, p.Number+1), journal, false, func(line []byte) error {
		var entry struct {
			Cursor string `json:"__CURSOR"`
		}
		if err := json.Unmarshal(line, &entry); err != nil || entry.Cursor == "" {
			return fmt.Errorf("an entry has no cursor: %w", err)
		}
		p.Cursor = entry.Cursor
		return nil
	})
	if err = errors.Join(err, journal.Close()); err != nil {
		return false, fmt.Errorf("cannot read the journal of %s: %w", p.Unit, err)
	}
	if made.Bytes == 0 {
		return false, nil
	}
	p.Number++
	return !end, s.add(ctx, made, i, p, c)
}

// journalctl runs the machine's. Who has read enough closes it; that it is then ended by a signal is no error.
func journalctl(ctx context.Context, args ...string) (io.ReadCloser, error) {
	cmd := exec.CommandContext(ctx, "journalctl", args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &process{ReadCloser: out, cmd: cmd}, nil
}

type process struct {
	io.ReadCloser
	cmd   *exec.Cmd
	ended bool
}

func (p *process) Read(b []byte) (int, error) {
	n, err := p.ReadCloser.Read(b)
	p.ended = p.ended || errors.Is(err, io.EOF)
	return n, err
}

func (p *process) Close() error {
	if !p.ended {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		return nil
	}
	return p.cmd.Wait()
}
