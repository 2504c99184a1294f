package luks

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// What a power cut inside Format leaves. The writes were measured, with cryptsetup 2.6.1 on an image of 40 MiB, by
//
//	strace -f -y -xx -s 1100000 -e trace=write,lseek,fsync cryptsetup luksFormat … (the arguments of luksFormat in cryptsetup.go)
//	strace … cryptsetup token import …
//
// and are, with an fsync after each line (offset+length, bytes; "bin0" is the binary header with zeros for its checksum):
//
//	zeros  16 × 1 MiB from 0
//	noise  32768+1048576 … 15761408+1015808     up to the data
//	seq 2  0+4096 bin0, 4096+12288 JSON without keyslots, 0+4096 bin
//	       16384+4096 bin0, 20480+12288 JSON, 16384+4096 bin
//	slot   32768+253952, 286720+4096 (its second half is the noise that was there)
//	seq 3  primary and secondary as above, with keyslot 0
//	seq 4  primary and secondary as above, with the token: token import
//
// The test has no strace. It takes the contents from the image of a Format, and finds out if a release of cryptsetup writes another
// number of headers, or other bytes: what it replays has to end in the very image.
const (
	cutSize    = 40 << 20
	sectorSize = 512
	slotBytes  = 253952 + 4096
)

// A patch is one write(2).
type patch struct {
	at   int64
	data []byte
}

// A disk is an image of 40 MiB with nothing behind 16 MiB. Disks share what they do not change.
type disk struct {
	front []byte // both header copies
	rest  []byte // up to the data
}

func blankDisk() disk {
	return disk{make([]byte, KeyslotsOffset), make([]byte, DataOffset-KeyslotsOffset)}
}

func (d disk) ReadAt(b []byte, at int64) (int, error) {
	n := int(min(int64(len(b)), max(0, cutSize-at)))
	clear(b[:n])
	for _, p := range []patch{{0, d.front}, {KeyslotsOffset, d.rest}} {
		if from, to := max(at, p.at), min(at+int64(n), p.at+int64(len(p.data))); from < to {
			copy(b[from-at:], p.data[from-p.at:to-p.at])
		}
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// with is the disk after some writes, in their order.
func (d disk) with(patches ...patch) disk {
	put := func(part []byte, start int64) []byte {
		var changed []byte
		for _, p := range patches {
			from, to := max(p.at, start), min(p.at+int64(len(p.data)), start+int64(len(part)))
			if from >= to {
				continue
			}
			if changed == nil {
				changed = bytes.Clone(part)
			}
			copy(changed[from-start:], p.data[from-p.at:to-p.at])
		}
		if changed == nil {
			return part
		}
		return changed
	}
	return disk{put(d.front, 0), put(d.rest, KeyslotsOffset)}
}

// file is the disk as an image. Of the noise it has a part: what follows is of no account to Inspect and Format.
func (d disk) file(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cut")
	if err := makeImage(path, slices.Concat(d.front, d.rest[:1<<20]), cutSize); err != nil {
		t.Fatal(err)
	}
	return path
}

// A flushed is what cryptsetup writes between two fsyncs: of it, any sector may be on the disk and any other not.
type flushed struct {
	name   string
	writes []patch
}

// copyWrites are the three writes of one header copy.
func copyWrites(b []byte, at int64) []patch {
	bare := bytes.Clone(b[:binarySize])
	clear(bare[offChecksum : offChecksum+lenChecksum])
	return []patch{{at, bare}, {at + binarySize, b[binarySize:]}, {at, b[:binarySize]}}
}

// formatWrites are the writes of a Format, and the disk that it left.
func formatWrites(t *testing.T) ([]flushed, disk) {
	t.Helper()
	dir := t.TempDir()
	bareFile, log := filepath.Join(dir, "bare"), filepath.Join(dir, "log")
	path := blank(t, cutSize)
	stub(t, `"$REAL" "$@" || exit; echo "$1" >> `+log+`; [ "$1" != luksFormat ] || head -c 16777216 `+path+` > `+bareFile)
	if err := Format(t.Context(), path, testOptions(), rightKey()); err != nil {
		t.Fatal(err)
	}
	if verbs := string(content(t, log)); verbs != "luksFormat\ntoken\n" {
		t.Fatalf("Format ran cryptsetup %q: measure its writes again", verbs)
	}
	bare, whole := content(t, bareFile), content(t, path)
	if len(bytes.Trim(whole[DataOffset:], "\x00")) != 0 {
		t.Fatal("Format wrote behind 16 MiB: measure its writes again")
	}
	done := disk{whole[:KeyslotsOffset], whole[KeyslotsOffset:DataOffset]}

	// Noise like the rest, where the key slot now is.
	noise := bytes.Clone(done.rest)
	copy(noise, noise[1<<20:1<<20+areaBytes])

	flushes := []flushed{{name: "zeros"}, {name: "noise"}}
	for at := int64(0); at < DataOffset; at += 1 << 20 {
		flushes[0].writes = append(flushes[0].writes, patch{at, make([]byte, 1<<20)})
	}
	for at := int64(KeyslotsOffset); at < DataOffset; at += 1 << 20 {
		flushes[1].writes = append(flushes[1].writes, patch{at, noise[at-KeyslotsOffset : min(at+1<<20, DataOffset)-KeyslotsOffset]})
	}
	copies := func(name string, image []byte, change func([]byte)) {
		for n, at := range []int64{primaryAt, secondaryAt} {
			b := bytes.Clone(image[at : at+0x4000])
			change(b)
			flushes = append(flushes, flushed{fmt.Sprintf("%s copy %d", name, n), copyWrites(b, at)})
		}
	}
	copies("seq 2", bare, func(b []byte) {
		text := string(trimNUL(b[binarySize:]))
		_, rest, found := strings.Cut(text, `"tokens":`)
		text = `{"keyslots":{},"tokens":` + strings.Replace(rest, `"keyslots":["0"]`, `"keyslots":[]`, 1)
		if !found {
			t.Fatalf("the order of the JSON is another: %s", text)
		}
		lukstest.SetText(b, []byte(text))
		setSeqID(b, 2)
		lukstest.Seal(b)
	})
	flushes = append(flushes, flushed{"slot", []patch{{KeyslotsOffset, done.rest[:253952]}, {KeyslotsOffset + 253952, done.rest[253952:slotBytes]}}})
	copies("seq 3", bare, func([]byte) {})
	copies("seq 4", whole, func([]byte) {})

	d := blankDisk()
	for _, f := range flushes {
		d = d.with(f.writes...)
	}
	if !bytes.Equal(d.front, done.front) || !bytes.Equal(d.rest, done.rest) {
		t.Fatal("the replay does not end in the image: measure the writes again")
	}
	for _, seq := range []struct {
		image []byte
		want  uint64
	}{{bare, 3}, {whole, 4}} {
		c, _, why, err := readCopy(bytes.NewReader(seq.image), cutSize, 0)
		if err != nil || c == nil || c.seqID != seq.want {
			t.Fatalf("%v, %s: another number of headers was written, measure the writes again", err, why)
		}
	}
	return flushes, done
}

// headerStates yields each state of a header copy's three writes: all combinations of sectors that are on the disk or not, and
// sectors torn at a byte. All prefixes of the writes are among the first. No tear is within the magic: a sector is written whole or not at
// all by every disk that says so (NVMe's AWUPF is at least one block); the bytes show that nothing rests on it beyond the first six.
func headerStates(d disk, w []patch, yield func(string, disk)) {
	type choice struct {
		at     int64
		values [][]byte
	}
	at := w[0].at
	choices := []choice{{at, [][]byte{d.front[at : at+sectorSize], w[0].data[:sectorSize], w[2].data[:sectorSize]}}}
	for n := int64(0); n < int64(len(w[1].data)); n += sectorSize {
		old, now := d.front[w[1].at+n:w[1].at+n+sectorSize], w[1].data[n:n+sectorSize]
		if !bytes.Equal(old, now) {
			choices = append(choices, choice{w[1].at + n, [][]byte{old, now}})
		}
	}
	var all func(n int, name string, d disk)
	all = func(n int, name string, d disk) {
		if n == len(choices) {
			yield(name, d)
			return
		}
		for i, v := range choices[n].values {
			all(n+1, name+fmt.Sprint(i), d.with(patch{choices[n].at, v}))
		}
	}
	all(0, "sectors ", d)

	for n := range w {
		before := d.with(w[:n]...)
		for cut := 7; cut < 3*sectorSize; cut += 61 {
			yield(fmt.Sprintf("write %d torn at byte %d", n, cut), before.with(patch{w[n].at, w[n].data[:cut]}))
			// Torn and out of order: the JSON goes first.
			if n == 1 {
				yield(fmt.Sprintf("JSON alone, torn at byte %d", cut), d.with(patch{w[n].at, w[n].data[:cut]}))
			}
		}
	}
}

// bulkStates yields some states of large writes: their prefixes, tears, and random choices of writes and of sectors.
func bulkStates(d disk, w []patch, yield func(string, disk)) {
	for n, p := range w {
		before := d.with(w[:n]...)
		if n < 2 || n == len(w)-1 {
			for _, cut := range []int{1, sectorSize - 1, sectorSize, 7 * sectorSize, len(p.data)/2 + 1, len(p.data)} {
				yield(fmt.Sprintf("write %d cut at %d", n, cut), before.with(patch{p.at, p.data[:cut]}))
			}
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for n := range 12 {
		s := d
		var some []patch
		for _, p := range w {
			for at := 0; at < len(p.data); at += 64 << 10 {
				if random.IntN(n+2) == 0 {
					k := at + min(sectorSize*random.IntN(64), len(p.data)-at)
					some = append(some, patch{p.at + int64(k), p.data[k:min(at+64<<10, len(p.data))]})
				}
			}
		}
		yield(fmt.Sprintf("choice %d", n), s.with(some...))
	}
}

// wipeStates yields states of the first write of zeros over headers that an earlier cut left.
func wipeStates(d disk, yield func(string, disk)) {
	var full []int64
	for at := int64(0); at < KeyslotsOffset; at += sectorSize {
		if len(bytes.Trim(d.front[at:at+sectorSize], "\x00")) > 0 {
			full = append(full, at)
		}
	}
	for chosen := range 1 << len(full) {
		var zeros []patch
		for n, at := range full {
			if chosen>>n&1 == 1 {
				zeros = append(zeros, patch{at, make([]byte, sectorSize)})
			}
		}
		s := d.with(zeros...)
		yield(fmt.Sprintf("wiped %b", chosen), s)
		if chosen%16 == 0 { // with the key slot half gone
			yield(fmt.Sprintf("wiped %b and slot", chosen), s.with(patch{KeyslotsOffset, make([]byte, 100*sectorSize)}))
		}
	}
	for cut := 6; cut < KeyslotsOffset+100; cut += 97 {
		if cut%0x4000 < sectorSize {
			continue // within the sector of a magic
		}
		yield(fmt.Sprintf("wiped %d bytes", cut), d.with(patch{0, make([]byte, cut)}))
	}
}

// taken says whether the agent takes a disk up again whose record says "formatting": agent/plan.go (formatting, headless) and
// agent/apply.go (stillMayFormat). "" is yes. The packages may not import each other this way round.
func taken(i *Inspection, d disk) string {
	switch {
	case i.Header != nil && i.Header.UUID != testUUID:
		return "it shows another UUID"
	case i.Kind == KindLUKS1:
		return "it is LUKS1"
	case i.Kind == KindLUKS2 && len(i.Header.Tokens) > 0 && !i.Pass():
		return fmt.Sprintf("it has a token and fails the check: %q", i.Reasons)
	case i.Kind == KindNone && len(bytes.Trim(d.front, "\x00")) != 0:
		return fmt.Sprintf("no header, and bytes before the key slots: %q", bytes.Trim(d.front, "\x00"))
	}
	return ""
}

func TestPowerCutsInFormat(t *testing.T) {
	begin := time.Now()
	flushes, done := formatWrites(t)

	examples := map[string]disk{} // by what Inspect says
	kinds := map[string]int{}
	// Different cuts often leave the same.
	type seen struct {
		front [sha256.Size]byte
		rest  *byte
	}
	checked := map[seen]bool{}
	// A state may pass without opening only where a wipe has taken the key slot.
	check := func(t *testing.T, flush, name string, d disk, wiped bool) {
		t.Helper()
		state := seen{sha256.Sum256(d.front), &d.rest[0]}
		if checked[state] {
			return
		}
		checked[state] = true
		i, err := inspect(d, cutSize)
		if err != nil {
			t.Errorf("%s, %s: %v", flush, name, err)
			return
		}
		if why := taken(i, d); why != "" {
			t.Errorf("%s, %s: kind %s is not taken up again: %s", flush, name, i.Kind, why)
		}
		if i.Header != nil && !i.Ours {
			t.Errorf("%s, %s: a header that is not ours", flush, name)
		}
		what := string(i.Kind)
		var damaged *HeaderError
		switch err := i.Verify(rightKey()); {
		case i.Pass() && err == nil:
			what += " opens"
			if i.Verify(keyOf(1)) == nil {
				t.Errorf("%s, %s: it opens with another key", flush, name)
			}
		case i.Pass() && !(wiped && errors.As(err, &damaged)):
			t.Errorf("%s, %s: it passes and does not open: %v", flush, name, err)
		case !i.Pass() && !errors.As(err, &damaged):
			t.Errorf("%s, %s: it does not pass: %v", flush, name, err)
		case i.Pass():
			what += " passes, slot gone"
		}
		if i.PrimaryDamaged {
			what += ", primary damaged"
		}
		kinds[what]++
		if _, ok := examples[what]; !ok {
			examples[what] = d
		}
	}

	// One cut.
	d := blankDisk()
	after := map[string]disk{}
	for _, f := range flushes {
		states := bulkStates
		if strings.Contains(f.name, "copy") {
			states = headerStates
		}
		states(d, f.writes, func(name string, s disk) { check(t, f.name, name, s, false) })
		d = d.with(f.writes...)
		after[f.name] = d
	}

	// A second one, while the next Format wipes what the first cut left.
	for _, name := range []string{"noise", "seq 2 copy 0", "seq 2 copy 1", "slot", "seq 3 copy 0", "seq 3 copy 1", "seq 4 copy 0", "seq 4 copy 1"} {
		wipeStates(after[name], func(state string, s disk) { check(t, "zeros over "+name, state, s, true) })
	}
	for _, want := range []string{"none", "torn", "empty", "luks2", "luks2 opens", "luks2 passes, slot gone"} {
		if kinds[want] == 0 {
			t.Errorf("no state is %q", want)
		}
	}
	took := time.Since(begin)
	t.Logf("different states: %v, after %v; formatted again: %d", kinds, took, len(examples))
	if _, ok := kinds["luks1"]; ok || !bytes.Equal(d.front, done.front) {
		t.Error("a LUKS1 header, or not the end of the format")
	}

	// And Format mends an example of each, on a file. Two at a time: each writes 32 MiB through to the disk.
	var wait sync.WaitGroup
	slots := make(chan struct{}, 2)
	for c, d := range examples {
		path := d.file(t)
		wait.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots; os.Remove(path) }()
			if i, err := Inspect(path); err != nil || !strings.HasPrefix(c, string(i.Kind)) {
				t.Errorf("%s: as a file: %v %+v", c, err, i)
			}
			if err := Format(t.Context(), path, testOptions(), rightKey()); err != nil {
				t.Errorf("%s: %v", c, err)
				return
			}
			if i, err := Inspect(path); err != nil || !i.Pass() || !i.Ours || i.Verify(rightKey()) != nil || i.Verify(keyOf(1)) == nil {
				t.Errorf("%s: after Format: %v %+v", c, err, i)
			}
		})
	}
	wait.Wait()
}
