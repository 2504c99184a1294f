package harness

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// logged is one entry of a log of writes.
type logged struct {
	sector uint64
	flags  uint64
	data   string // whole sectors
}

func (e logged) bytes() []byte {
	b := make([]byte, logSector)
	binary.LittleEndian.PutUint64(b, e.sector)
	binary.LittleEndian.PutUint64(b[8:], uint64(len(e.data)/logSector))
	binary.LittleEndian.PutUint64(b[16:], e.flags)
	return append(b, e.data...)
}

// sectors returns n sectors full of a letter.
func sectors(letter string, n int) string { return strings.Repeat(letter, n*logSector) }

// openLog returns a log with a superblock that counts nothing, and these parts.
func openLog(t *testing.T, parts ...[]byte) *os.File {
	t.Helper()
	file := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(file, append(make([]byte, logSector), bytes.Join(parts, nil)...), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// flushed is an entry without data: everything before it is durable.
var flushed = logged{flags: logFlush}.bytes()

// TestReadWriteLog: pieces are told as "disk+size", in sectors, with a "!" where they are durable.
func TestReadWriteLog(t *testing.T) {
	gap := make([]byte, 3*logSector)
	for name, test := range map[string]struct {
		parts [][]byte
		want  string
	}{
		"nothing":            {nil, ""},
		"no flush":           {[][]byte{logged{8, 0, sectors("a", 1)}.bytes()}, "8+1"},
		"flushed":            {[][]byte{logged{8, 0, sectors("a", 1)}.bytes(), flushed, logged{9, 0, sectors("b", 2)}.bytes()}, "8+1! 9+2"},
		"written through":    {[][]byte{logged{8, 0, sectors("a", 1)}.bytes(), logged{9, logFUA, sectors("b", 1)}.bytes()}, "8+1 9+1!"},
		"flush with data":    {[][]byte{logged{8, 0, sectors("a", 1)}.bytes(), logged{9, logFlush, sectors("b", 1)}.bytes()}, "8+1! 9+1"},
		"in pieces of 4 KiB": {[][]byte{logged{6, 0, sectors("a", 11)}.bytes()}, "6+2 8+8 16+1"},
		"flush behind a gap": {[][]byte{logged{8, 0, sectors("a", 1)}.bytes(), gap, flushed}, "8+1!"},
		"write behind a gap": {[][]byte{flushed, gap, logged{8, 0, sectors("a", 1)}.bytes()}, "8+1"},
		"torn data":          {[][]byte{logged{8, 0, sectors("a", 1)}.bytes(), logged{9, 0, sectors("b", 2)}.bytes()[:2*logSector]}, "8+1"},
		"torn entry":         {[][]byte{logged{8, 0, sectors("a", 1)}.bytes(), flushed[:100]}, "8+1"},
	} {
		pieces, err := readWriteLog(openLog(t, test.parts...), 64*logSector)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var got []string
		for _, p := range pieces {
			mark := ""
			if p.durable {
				mark = "!"
			}
			got = append(got, fmt.Sprintf("%d+%d%s", p.disk/logSector, p.size/logSector, mark))
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
}

func TestReadWriteLogRefusesWhatIsNoEntry(t *testing.T) {
	noise := bytes.Repeat([]byte("x"), logSector)
	for name, part := range map[string][]byte{
		"noise":                noise,
		"behind the disk":      logged{64, 0, sectors("a", 1)}.bytes(),
		"an end far behind it": binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, 1), 1<<63),
		"a discard":            logged{8, 1 << 2, ""}.bytes(),
	} {
		if pieces, err := readWriteLog(openLog(t, append(part, make([]byte, logSector)...)), 64*logSector); err == nil {
			t.Errorf("%s: %v", name, pieces)
		}
	}
}

// TestReplay: a later write wins, as on the disk.
func TestReplay(t *testing.T) {
	log := openLog(t, logged{8, 0, sectors("a", 2)}.bytes(), logged{9, 0, sectors("b", 2)}.bytes())
	pieces, err := readWriteLog(log, 64*logSector)
	if err != nil {
		t.Fatal(err)
	}
	for want, kept := range map[string][]loggedPiece{"abb.": pieces, ".bb.": pieces[1:], "aa..": pieces[:1], "....": nil} {
		image := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(image, []byte(sectors(".", 64)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := replay(image, log, kept); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(b); got != sectors(".", 8)+sectors(want[:1], 1)+sectors(want[1:2], 1)+sectors(want[2:3], 1)+sectors(".", 53) {
			t.Errorf("kept %v: %d bytes that do not read %s", kept, len(got), want)
		}
	}
}

// TestSurvivors: what is durable always survives; of the rest sometimes all, sometimes nothing, mostly a part that the seed decides.
func TestSurvivors(t *testing.T) {
	var pieces []loggedPiece
	for i := range int64(100) {
		pieces = append(pieces, loggedPiece{disk: i, durable: i%2 == 0})
	}
	seen := map[int]bool{} // how many that are not durable survived
	for seed := range uint64(40) {
		unflushed, kept := survivors(pieces, rand.New(rand.NewPCG(seed, 0)))
		_, again := survivors(pieces, rand.New(rand.NewPCG(seed, 0)))
		if unflushed != 50 || fmt.Sprint(kept) != fmt.Sprint(again) {
			t.Errorf("seed %d: %d unflushed; %v, then %v", seed, unflushed, kept, again)
		}
		durable := 0
		for _, p := range kept {
			if p.durable {
				durable++
			}
		}
		if durable != 50 {
			t.Errorf("seed %d: %d of 50 durable pieces survived", seed, durable)
		}
		seen[len(kept)-durable] = true
	}
	if !seen[0] || !seen[50] || len(seen) < 5 {
		t.Errorf("survivors: %v", seen)
	}
}
