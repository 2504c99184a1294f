package logs

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// desk is a spool with log files, and what came out of it.
type desk struct {
	t   *testing.T
	dir string // of the logs
	o   Options
}

func newDesk(t *testing.T) *desk {
	d := &desk{t: t, dir: t.TempDir()}
	d.o = Options{Dir: filepath.Join(t.TempDir(), "spool"), Files: []string{filepath.Join(d.dir, "*.log")}, Settle: time.Nanosecond}
	return d
}

func (d *desk) path(name string) string { return filepath.Join(d.dir, name) }

// write appends to a log.
func (d *desk) write(name string, lines ...string) {
	d.t.Helper()
	f, err := os.OpenFile(d.path(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err == nil {
		_, err = f.WriteString(strings.Join(lines, ""))
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

func (d *desk) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// collect is a run as a new process would make it; it returns what all pieces have that wait, by source, and takes them away.
func (d *desk) collect() (text map[string]string, lost []Lost) {
	d.t.Helper()
	s, err := Open(d.o)
	d.must(err)
	defer s.Close()
	_, err = s.Collect(d.t.Context())
	d.must(err)
	text = map[string]string{}
	for _, p := range s.Pieces() {
		source := filepath.Dir(p.Name)
		text[filepath.Base(source)] += d.read(s, p)
		d.must(s.Done(p))
	}
	return text, s.Lost()
}

func (d *desk) read(s *Spool, p Piece) string {
	d.t.Helper()
	f, err := s.OpenPiece(p)
	d.must(err)
	defer f.Close()
	zip, err := gzip.NewReader(f)
	d.must(err)
	text, err := io.ReadAll(zip)
	d.must(err)
	if int64(len(text)) != p.Bytes || strings.Count(string(text), "\n") != p.Lines && strings.HasSuffix(string(text), "\n") {
		d.t.Errorf("%s has %d bytes and %d lines, and says %+v", p.Name, len(text), strings.Count(string(text), "\n"), p)
	}
	return string(text)
}

func (d *desk) want(when string, want map[string]string, lost int) {
	d.t.Helper()
	got, l := d.collect()
	if fmt.Sprint(got) != fmt.Sprint(want) || len(l) != lost {
		d.t.Errorf("%s: %q, lost %v; want %q", when, got, l, want)
	}
}

func TestFollow(t *testing.T) {
	d := newDesk(t)
	d.want("nothing there", map[string]string{}, 0)
	d.write("a.log", "1\n", "2\n")
	d.write("b.log", "x\n")
	d.write("other", "not asked for\n")
	d.want("new files", map[string]string{"a.log": "1\n2\n", "b.log": "x\n"}, 0)
	d.want("nothing new", map[string]string{}, 0)
	d.write("a.log", "3\n", "half a li")
	d.want("a line without its end waits", map[string]string{"a.log": "3\n"}, 0)
	d.write("a.log", "ne\n")
	d.want("its end", map[string]string{"a.log": "half a line\n"}, 0)
}

func TestRotation(t *testing.T) {
	d := newDesk(t)
	d.write("a.log", "1\n")
	d.want("first", map[string]string{"a.log": "1\n"}, 0)
	// Renamed, with lines that were not read yet, and a last one without its end.
	d.write("a.log", "2\n", "3")
	d.must(os.Rename(d.path("a.log"), d.path("a.log.1")))
	d.write("a.log", "4\n")
	d.want("renamed", map[string]string{"a.log": "2\n34\n"}, 0)
	// Twice between two looks.
	d.write("a.log", "5\n")
	d.must(os.Rename(d.path("a.log.1"), d.path("a.log.2")))
	d.must(os.Rename(d.path("a.log"), d.path("a.log.1")))
	d.write("a.log", "6\n")
	d.want("renamed again", map[string]string{"a.log": "5\n6\n"}, 0)
	// Into what a glob matches too: nothing is read a second time.
	d.o.Files = append(d.o.Files, d.path("*.log.*"))
	d.want("matched by another glob", map[string]string{}, 0)
	d.must(os.Remove(d.path("a.log.2")))
	d.want("an old one is removed", map[string]string{}, 0)
	// Removed unread: what is lost is told, once.
	d.write("a.log", "7\n")
	d.must(os.Remove(d.path("a.log")))
	d.want("removed", map[string]string{}, 1)
	d.want("removed, again", map[string]string{}, 1)
}

func TestCopyTruncate(t *testing.T) {
	d := newDesk(t)
	d.write("a.log", "1\n")
	d.want("first", map[string]string{"a.log": "1\n"}, 0)
	d.write("a.log", "2\n")
	text, err := os.ReadFile(d.path("a.log"))
	d.must(err)
	d.must(os.WriteFile(d.path("a.log.1"), text, 0o600))
	d.must(os.Truncate(d.path("a.log"), 0))
	d.write("a.log", "3\n")
	d.want("copied and truncated", map[string]string{"a.log": "2\n3\n"}, 0)
	// Grown beyond where it was: only its beginning tells.
	text, err = os.ReadFile(d.path("a.log"))
	d.must(err)
	d.must(os.Rename(d.path("a.log.1"), d.path("a.log.2")))
	d.must(os.WriteFile(d.path("a.log.1"), text, 0o600))
	d.must(os.Truncate(d.path("a.log"), 0))
	d.write("a.log", "4, and much more than there was before\n")
	d.want("and grown", map[string]string{"a.log": "4, and much more than there was before\n"}, 0)
	d.must(os.Truncate(d.path("a.log"), 0))
	d.write("a.log", "5\n")
	d.want("truncated without a copy", map[string]string{"a.log": "5\n"}, 1)
}

// TestPowerCut: the end of a file that was read and sent is gone after a power cut. The rest is not read again.
func TestPowerCut(t *testing.T) {
	d := newDesk(t)
	d.write("a.log", "1\n", "2\n")
	d.want("first", map[string]string{"a.log": "1\n2\n"}, 0)
	d.must(os.Truncate(d.path("a.log"), 2))
	d.want("its end is gone", map[string]string{}, 0)
	d.write("a.log", "3\n")
	d.want("it goes on", map[string]string{"a.log": "3\n"}, 0)
	d.must(os.Truncate(d.path("a.log"), 2))
	d.must(os.Truncate(d.path("a.log"), 3))
	d.want("zeros are in the place of its end", map[string]string{}, 0)
	d.write("a.log", "4\n")
	d.want("and it goes on", map[string]string{"a.log": "4\n"}, 0)
	d.must(os.Truncate(d.path("a.log"), 2))
	d.write("a.log", "4444444\n")
	d.want("its end is gone, and it grew beyond", map[string]string{"a.log": "1\n4444444\n"}, 1) // nobody can tell that from a new file
}

func TestPiecesAndLongLines(t *testing.T) {
	d := newDesk(t)
	d.o.PieceSize = 100
	var all strings.Builder
	for i := range 50 {
		line := fmt.Sprintf("%03d %s\n", i, strings.Repeat("x", i))
		all.WriteString(line)
		d.write("a.log", line)
	}
	long := strings.Repeat("y", 1000) + "\n" // ten pieces
	all.WriteString(long)
	d.write("a.log", long)
	s, err := Open(d.o)
	d.must(err)
	_, err = s.Collect(t.Context())
	d.must(err)
	pieces := s.Pieces()
	text, names := "", map[string]bool{}
	for _, p := range pieces {
		got := d.read(s, p)
		if int64(len(got)) > d.o.PieceSize || names[p.Name] {
			t.Errorf("%s: %d bytes", p.Name, len(got))
		}
		names[p.Name] = true
		text += got
	}
	if text != all.String() || len(pieces) < 15 {
		t.Errorf("%d pieces, %d bytes of %d", len(pieces), len(text), all.Len())
	}
	s.Close()
}

// TestHugeFile: a file of more than 4 GiB, of which the most was read, and whose next line is longer than most. Neither is ever in memory as a whole.
func TestHugeFile(t *testing.T) {
	d := newDesk(t)
	d.write("a.log", "1\n")
	d.want("first", map[string]string{"a.log": "1\n"}, 0)
	const behind = 5 << 30
	d.must(os.Truncate(d.path("a.log"), behind)) // a line that has no end yet
	path := filepath.Join(d.o.Dir, stateFile)
	text, err := os.ReadFile(path)
	d.must(err)
	d.must(os.WriteFile(path, []byte(strings.Replace(string(text), `"offset": 2`, fmt.Sprintf(`"offset": %d`, behind-100<<20), 1)), 0o600))
	d.write("a.log", "\n", "2\n")
	var zeros, rest int64
	peak := uint64(0)
	for more := true; more; {
		d.o.MaxSpool = 1 // one piece at a time
		s, err := Open(d.o)
		d.must(err)
		c, err := s.Collect(t.Context())
		d.must(err)
		more = c.Full
		for _, p := range s.Pieces() {
			if p.Bytes > defaultPiece {
				t.Errorf("a piece of %d bytes", p.Bytes)
			}
			got := d.read(s, p)
			zeros += int64(strings.Count(got, "\x00"))
			rest += int64(len(strings.ReplaceAll(got, "\x00", "")))
			if !strings.HasSuffix(p.Name, fmt.Sprintf("-%020d.gz", behind-100<<20+zeros+rest-int64(len(got)))) {
				t.Errorf("a piece is named %s", p.Name)
			}
			d.must(s.Done(p))
		}
		s.Close()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapSys)
	}
	if zeros != 100<<20 || rest != 3 {
		t.Errorf("%d zeros and %d bytes", zeros, rest)
	}
	t.Logf("the heap had %d MiB at most, that of the test included", peak>>20)
}

// TestEndsWhileSomebodyWrites: what comes while it is at work is for the next time.
func TestEndsWhileSomebodyWrites(t *testing.T) {
	d := newDesk(t)
	stop, written := make(chan struct{}), make(chan string)
	go func() {
		var all strings.Builder
		for i := 0; ; i++ {
			select {
			case <-stop:
				written <- all.String()
				return
			default:
			}
			line := fmt.Sprintf("line %d\n", i)
			all.WriteString(line)
			d.write("a.log", line)
		}
	}()
	got := ""
	for strings.Count(got, "\n") < 2000 {
		text, lost := d.collect()
		if got += text["a.log"]; len(lost) > 0 {
			t.Errorf("lost: %v", lost)
		}
	}
	close(stop)
	want := <-written
	text, _ := d.collect()
	if got+text["a.log"] != want {
		t.Errorf("%d bytes of %d", len(got)+len(text["a.log"]), len(want))
	}
}

// TestRate: a bound of the rate is held, and does not keep anybody from ending it.
func TestRate(t *testing.T) {
	d := newDesk(t)
	d.o.PieceSize, d.o.Rate = 1000, 50_000
	d.write("a.log", strings.Repeat("123456789\n", 1000))
	begun := time.Now()
	if text, _ := d.collect(); len(text["a.log"]) != 10_000 {
		t.Errorf("%d bytes", len(text["a.log"]))
	}
	if took := time.Since(begun); took < 200*time.Millisecond {
		t.Errorf("10 kB at 50 kB/s took %v", took)
	}
	d.o.Rate = 1
	d.write("a.log", "more\n")
	s, err := Open(d.o)
	d.must(err)
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Collect(ctx); !errors.Is(err, context.DeadlineExceeded) || len(s.Pieces()) != 1 {
		t.Errorf("%v, %v", s.Pieces(), err)
	}
}

// TestFullSpool: nothing more is read, and nothing is lost by that.
func TestFullSpool(t *testing.T) {
	d := newDesk(t)
	d.o.PieceSize, d.o.MaxSpool = 1000, 500
	want := ""
	for i := range 400 {
		line := fmt.Sprintf("%d %d\n", i, rand.Uint64())
		want += line
		d.write("a.log", line)
	}
	got := ""
	for range 100 {
		s, err := Open(d.o)
		d.must(err)
		c, err := s.Collect(t.Context())
		d.must(err)
		if w := s.Waiting(); w > 500+1000 {
			t.Fatalf("%d bytes wait", w)
		}
		for _, p := range s.Pieces() {
			got += d.read(s, p)
			d.must(s.Done(p))
		}
		s.Close()
		if !c.Full && c.Pieces == 0 {
			break
		}
	}
	if got != want {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
}

func TestJournal(t *testing.T) {
	d := newDesk(t)
	d.o.Units = []string{"a.service"}
	entries := []string{}
	for i := range 5 {
		entries = append(entries, fmt.Sprintf(`{"__CURSOR":"c%d","MESSAGE":"%d"}`, i, i))
	}
	d.o.Journal = func(_ context.Context, args ...string) (io.ReadCloser, error) {
		from := 0
		for _, a := range args {
			if cursor, ok := strings.CutPrefix(a, "--after-cursor="); ok {
				from = slices.IndexFunc(entries, func(e string) bool { return strings.Contains(e, `"`+cursor+`"`) }) + 1
			}
		}
		if !slices.Contains(args, "--unit=a.service") {
			return nil, fmt.Errorf("arguments %q", args)
		}
		text := ""
		for _, e := range entries[from:] {
			text += e + "\n"
		}
		return io.NopCloser(strings.NewReader(text)), nil
	}
	d.o.PieceSize = 80
	d.want("all", map[string]string{"a.service": strings.Join(entries, "\n") + "\n"}, 0)
	d.want("nothing new", map[string]string{}, 0)
	entries = append(entries, `{"__CURSOR":"c9","MESSAGE":"new"}`)
	d.want("one more", map[string]string{"a.service": entries[5] + "\n"}, 0)
}

// TestClosedIsUnlocked: between fork and exec a child of another goroutine has the lock's file as well.
func TestClosedIsUnlocked(t *testing.T) {
	d := newDesk(t)
	s, err := Open(d.o)
	d.must(err)
	fds, err := filepath.Glob("/proc/self/fd/*")
	d.must(err)
	fds = slices.DeleteFunc(fds, func(fd string) bool {
		to, err := os.Readlink(fd)
		return err != nil || to != filepath.Join(d.o.Dir, lockFile)
	})
	if len(fds) != 1 {
		t.Fatalf("the lock is open as %q", fds)
	}
	fd, err := strconv.Atoi(filepath.Base(fds[0]))
	d.must(err)
	childs, err := unix.Dup(fd)
	d.must(err)
	defer unix.Close(childs)
	s.Close()
	s, err = Open(d.o)
	d.must(err)
	s.Close()
}

// TestFiles: who removes them one after the other may be cut anywhere; a spool that is used after that begins anew.
func TestFiles(t *testing.T) {
	for cut := range 3 {
		d := newDesk(t)
		d.write("a.log", "1\n")
		s, err := Open(d.o)
		d.must(err)
		_, err = s.Collect(t.Context())
		d.must(err)
		s.Close()
		files, err := Files(d.o.Dir)
		d.must(err)
		if len(files) != 2 {
			t.Fatalf("%q", files)
		}
		for _, f := range files[:cut] {
			d.must(os.Remove(f))
		}
		d.want(fmt.Sprintf("cut after %d", cut), map[string]string{"a.log": "1\n"}, 0)
	}
}

func TestBadSpool(t *testing.T) {
	d := newDesk(t)
	d.write("a.log", "1\n")
	s, err := Open(d.o)
	d.must(err)
	if _, err := Open(d.o); !errors.Is(err, ErrLocked) {
		t.Errorf("a second one: %v", err)
	}
	_, err = s.Collect(t.Context())
	d.must(err)
	s.Close()
	d.must(os.WriteFile(filepath.Join(d.o.Dir, "spool", "999999999999.gz"), []byte("of a kill"), 0o600))
	s, err = Open(d.o)
	d.must(err)
	if left, _ := os.ReadDir(filepath.Join(d.o.Dir, "spool")); len(left) != 1 {
		t.Errorf("%v", left)
	}
	s.Close()
	d.must(os.WriteFile(filepath.Join(d.o.Dir, stateFile), []byte(`{"version":2}`), 0o600))
	if _, err := Open(d.o); err == nil || !strings.Contains(err.Error(), "does not know version 2") {
		t.Errorf("%v", err)
	}
}

// TestKilled: a writer writes and rotates while what archives is killed a hundred times, wherever that hits.
func TestKilled(t *testing.T) {
	if os.Getenv("LOGS_CHILD") != "" {
		archive(t, os.Getenv("LOGS_CHILD"), os.Getenv("LOGS_OF"), os.Getenv("LOGS_TO"))
		return
	}
	const kills = 100
	d := newDesk(t)
	d.o.Files = []string{d.path("*.log*")} // also what was rotated before anybody looked
	to := t.TempDir()
	stop, written := make(chan struct{}), make(chan int)
	go func() {
		n, since := 0, 0
		for {
			select {
			case <-stop:
				written <- n
				return
			default:
			}
			d.write("a.log", fmt.Sprintf("line %d\n", n))
			if n++; n%20 == 0 {
				time.Sleep(time.Millisecond)
			}
			if since++; since > 500 {
				since = 0
				_ = os.Rename(d.path("a.log"), d.path(fmt.Sprintf("a.log.%d", n))) // none is removed: that would be another story
			}
		}
	}()
	child := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), "LOGS_CHILD="+d.o.Dir, "LOGS_OF="+d.o.Files[0], "LOGS_TO="+to)
		cmd.Stderr, cmd.Stdout = os.Stderr, os.Stderr
		d.must(cmd.Start())
		return cmd
	}
	for range kills {
		cmd := child()
		time.Sleep(time.Duration(5+rand.IntN(40)) * time.Millisecond)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	close(stop)
	n := <-written
	cmd := child() // ends by itself
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	order := []string{}
	d.must(filepath.WalkDir(to, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		f, err := os.Open(path)
		d.must(err)
		defer f.Close()
		zip, err := gzip.NewReader(f)
		d.must(err)
		text, err := io.ReadAll(zip)
		d.must(err)
		for line := range strings.Lines(string(text)) {
			seen[line]++
			order = append(order, line)
		}
		return nil
	}))
	lost, twice := 0, 0
	for i := range n {
		switch seen[fmt.Sprintf("line %d\n", i)] {
		case 0:
			lost++
		case 1:
		default:
			twice++
		}
	}
	t.Logf("%d kills, %d lines written, %d archived, %d lost, %d twice", kills, n, len(order), lost, twice)
	if lost > 0 || twice > 0 || len(order) != n {
		t.Error("lines are lost, or there twice")
	}
}

// archive is what the child does: collect and bring away, again and again, or to the end.
func archive(t *testing.T, dir, of, to string) {
	for {
		s, err := Open(Options{Dir: dir, Files: []string{of}, PieceSize: 2000, Settle: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		c, err := s.Collect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range s.Pieces() {
			target := filepath.Join(to, p.Name)
			f, err := s.OpenPiece(p)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(f)
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
			// As a conditional PUT: one that is there is the same.
			there, err := os.ReadFile(target)
			switch {
			case errors.Is(err, fs.ErrNotExist):
				tmp := filepath.Join(to, "..", filepath.Base(to)+".tmp")
				if err := errors.Join(os.MkdirAll(filepath.Dir(target), 0o700), os.WriteFile(tmp, text, 0o600), os.Rename(tmp, target)); err != nil {
					t.Fatal(err)
				}
			case err != nil || string(there) != string(text):
				t.Fatalf("%s is there with other content: %v", p.Name, err)
			}
			if err := s.Done(p); err != nil {
				t.Fatal(err)
			}
		}
		s.Close()
		if c.Pieces == 0 {
			return
		}
	}
}
