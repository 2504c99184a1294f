package keycache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// WipeAll wipes keys and, before, every copy of them that is left in the memory
// of this process: what the SDK decoded, the connection's buffers, the states of
// hashes, dead stacks. Few of these can be reached any more, so memory is searched
// for them; it takes milliseconds. A copy of which a part was overwritten is found
// too.
//
// It is for the end of the work with keys, when nothing else runs: memory that
// another goroutine takes into use between being found and being overwritten would
// be overwritten all the same. The keys are wiped also where the search fails.
func WipeAll(keys ...*Key) error {
	// What is not in use any more goes back to the kernel, which gives it to nobody before it is zeroed: less is left to search.
	debug.FreeOSMemory()
	err := wipeCopies(keys)
	for _, k := range keys {
		k.Wipe()
	}
	if err != nil {
		return fmt.Errorf("cannot wipe what copies of keys are left in memory: %w", err)
	}
	return nil
}

const (
	// pieceLen is how many bytes of a key are looked for at once.
	pieceLen = 16
	// windowLen is the size of the smallest piece: the last of a passphrase.
	windowLen = passphraseLen % pieceLen
	// minDistinct is how many different bytes a piece must have to be looked for.
	// Of 12 random ones fewer differ about once in 10^9 times; what has fewer is a
	// test's, and stands in memory that is no copy.
	minDistinct = 6
	// blockLen is how much memory is looked at at once, in bytes.
	blockLen = 64 << 10
	// formsLen is the room that the forms of one key take, in bytes; a recovery key's take less.
	formsLen = keyLen + 3*passphraseLen
	// pairs is how many pairs of bytes there are.
	pairs = 1 << 16

	// The constants of HMAC (RFC 2104): PBKDF2 leaves the passphrase xored with
	// each of them.
	innerPad, outerPad = 0x36, 0x5c

	// Bits of an entry of pagemap (Documentation/admin-guide/mm/pagemap.rst).
	pagePresent, pageSwapped = 1 << 63, 1 << 62
	// entryLen is the size of such an entry, in bytes.
	entryLen = 8
)

// span is a range of addresses of this process.
type span struct{ from, to int64 }

func spanOf(b []byte) span {
	from := int64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
	return span{from, from + int64(len(b))}
}

// copies is one search.
type copies struct {
	mem, pagemap *os.File
	pieces       [256][][]byte // what is looked for, by its last byte
	spare        []span        // where it is meant to be: the keys, and scratch
	block        []byte        // in scratch
	// steps says how far a window of windowLen bytes that ends in a pair can go on without missing a piece; 0: one may
	// end here. (Wu and Manber, A fast algorithm for multi-pattern searching, 1994.) In scratch: it tells of the keys.
	steps []byte
	zeros [pieceLen]byte
}

func wipeCopies(keys []*Key) (err error) {
	// What is looked for and what is read are secrets too, so both are in a mapping
	// of their own and not on the heap.
	scratch, err := unix.Mmap(-1, 0, blockLen+pairs+len(keys)*formsLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer func() {
		clear(scratch)
		err = errors.Join(err, unix.Munmap(scratch))
	}()
	if err := errors.Join(unix.Mlock(scratch), unix.Madvise(scratch, unix.MADV_DONTDUMP)); err != nil {
		return err
	}

	c := &copies{block: scratch[:blockLen], steps: scratch[blockLen:][:pairs], spare: []span{spanOf(scratch)}}
	for pair := range c.steps {
		c.steps[pair] = windowLen - 1
	}
	room := scratch[blockLen+pairs:]
	for _, k := range keys {
		if k.Bytes() == nil {
			continue
		}
		c.spare = append(c.spare, spanOf(*k.m.page.Load()))
		room = c.lookFor(k.Bytes(), 0, room)
		for _, pad := range []byte{0, innerPad, outerPad} {
			room = c.lookFor(k.Passphrase(), pad, room)
		}
	}
	if len(c.spare) == 1 {
		return nil // no key was left
	}
	if c.mem, err = os.OpenFile("/proc/self/mem", os.O_RDWR, 0); err != nil {
		return err
	}
	defer c.mem.Close()
	if c.pagemap, err = os.Open("/proc/self/pagemap"); err != nil {
		return err
	}
	defer c.pagemap.Close()
	return c.searchAll()
}

// lookFor adds the pieces of a secret, xored with pad, which it keeps in room. It
// returns the room that is left.
func (c *copies) lookFor(secret []byte, pad byte, room []byte) []byte {
	form, room := room[:len(secret)], room[len(secret):]
	for i, b := range secret {
		form[i] = b ^ pad
	}
	for piece := range slices.Chunk(form, pieceLen) {
		var seen [256]bool
		distinct := 0
		for _, b := range piece {
			if !seen[b] {
				seen[b] = true
				distinct++
			}
		}
		if distinct < minDistinct || len(piece) < windowLen { // the last 4 bytes of a recovery key
			continue
		}
		last := piece[len(piece)-1]
		c.pieces[last] = append(c.pieces[last], piece)
		window := piece[len(piece)-windowLen:]
		for end := 2; end <= windowLen; end++ {
			step := &c.steps[pairAt(window, end)]
			*step = min(*step, byte(windowLen-end))
		}
	}
	return room
}

// pairAt is the pair of bytes before end.
func pairAt(b []byte, end int) uint16 { return binary.NativeEndian.Uint16(b[end-2:]) }

// searchAll goes through what this process can write and shares with nobody.
func (c *copies) searchAll() error {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		// c000000000-c000400000 rw-p 00000000 00:00 0
		var s span
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &s.from, &s.to, &mode); err != nil {
			if strings.Contains(line, "[vsyscall]") {
				continue // its address is no int64
			}
			return fmt.Errorf("/proc/self/maps has a line %q: %w", line, err)
		}
		if !strings.HasPrefix(mode, "rw") || !strings.HasSuffix(mode, "p") {
			continue
		}
		if err := c.searchMapping(s); err != nil {
			return err
		}
	}
	return nil
}

// searchMapping goes through those pages of a mapping that were ever used: of Go's
// heap most were not, and reading them would take memory for them.
func (c *copies) searchMapping(s span) error {
	page := int64(os.Getpagesize())
	entries := make([]byte, 4096*entryLen)
	used := span{s.from, s.from}
	for s.from < s.to {
		n := min(int64(len(entries)), (s.to-s.from)/page*entryLen)
		if _, err := c.pagemap.ReadAt(entries[:n], s.from/page*entryLen); err != nil {
			return err
		}
		for entry := range slices.Chunk(entries[:n], entryLen) {
			if binary.NativeEndian.Uint64(entry)&(pagePresent|pageSwapped) == 0 {
				if err := c.search(used); err != nil {
					return err
				}
				used = span{s.from + page, s.from + page}
			} else {
				used.to += page
			}
			s.from += page
		}
	}
	return c.search(used)
}

// search goes through a range, in blocks that overlap: a piece may lie across two.
func (c *copies) search(s span) error {
	for at := s.from; at < s.to; at += blockLen - pieceLen {
		n, err := c.mem.ReadAt(c.block[:min(blockLen, s.to-at)], at)
		if err != nil && !errors.Is(err, unix.EIO) { // EIO: it was unmapped meanwhile
			return err
		}
		if err := c.wipeIn(c.block[:n], at); err != nil {
			return err
		}
	}
	return nil
}

// wipeIn overwrites the pieces in a block that was read from address at.
func (c *copies) wipeIn(block []byte, at int64) error {
	for end, step := windowLen, 0; end <= len(block); end += max(1, step) {
		if step = int(c.steps[pairAt(block, end)]); step > 0 {
			continue
		}
		for _, piece := range c.pieces[block[end-1]] {
			from := at + int64(end-len(piece))
			if !bytes.HasSuffix(block[:end], piece) || c.isSpared(from) {
				continue
			}
			if _, err := c.mem.WriteAt(c.zeros[:len(piece)], from); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *copies) isSpared(at int64) bool {
	return slices.ContainsFunc(c.spare, func(s span) bool { return at >= s.from && at < s.to })
}
