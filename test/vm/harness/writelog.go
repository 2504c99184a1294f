package harness

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
)

// Cut is what a power cut took from the data disks of a node that loses unflushed writes.
type Cut struct {
	Unflushed int      // pieces of writes that no flush had made durable
	Lost      int      // those of them that are gone
	Unlogged  []string // disks that QEMU left otherwise than their logs say: a cut may fall between a write and its logging
}

// LoseUnflushed makes every later power cut take writes to the data disks that were not flushed: none of them, all or any, as
// random numbers from seed say. The boot disk is as ever. The node must be switched off: QEMU logs all writes of a boot or none.
func (n *Node) LoseUnflushed(seed uint64) {
	n.tb.Helper()
	if n.vm != nil {
		n.tb.Fatalf("the node is on, and its writes are not logged")
	}
	n.tb.Logf("unflushed writes are lost as seed %d says", seed)
	n.losing = rand.New(rand.NewPCG(seed, 0))
}

// LastCut tells what the last power cut took.
func (n *Node) LastCut() Cut { return n.cut }

// beforeBoot and writeLog are where a disk's content before the boot and the log of its writes since then are kept.
func (n *Node) beforeBoot(name string) string { return n.Image(name) + ".before" }
func (n *Node) writeLog(name string) string   { return n.Image(name) + ".log" }

// keepLog gets ready to log what a boot writes to a disk.
func (n *Node) keepLog(name string) error {
	return errors.Join(copySparse(n.Image(name), n.beforeBoot(name)), os.WriteFile(n.writeLog(name), nil, 0o600))
}

func copySparse(from, to string) error {
	return command(context.Background(), "/", "cp", "--sparse=always", from, to)
}

// loseUnflushed makes a disk's image what a power cut leaves of the disk.
func (n *Node) loseUnflushed(name string) error {
	log, err := os.Open(n.writeLog(name))
	if err != nil {
		return err
	}
	defer log.Close()
	pieces, err := readWriteLog(log, n.disk(name).size())
	if err != nil {
		return err
	}
	same, err := n.logIsWhole(name, log, pieces)
	if err != nil {
		return err
	}
	if !same {
		n.cut.Unlogged = append(n.cut.Unlogged, name)
	}
	unflushed, kept := survivors(pieces, n.losing)
	n.cut.Unflushed += unflushed
	n.cut.Lost += len(pieces) - len(kept)
	if err := replay(n.beforeBoot(name), log, kept); err != nil {
		return err
	}
	return os.Rename(n.beforeBoot(name), n.Image(name))
}

// logIsWhole says whether the whole log makes of the disk before the boot the one that QEMU left.
func (n *Node) logIsWhole(name string, log io.ReaderAt, pieces []loggedPiece) (bool, error) {
	all := n.Image(name) + ".all"
	defer os.Remove(all)
	if err := copySparse(n.beforeBoot(name), all); err != nil {
		return false, err
	}
	if err := replay(all, log, pieces); err != nil {
		return false, err
	}
	var digests [2]string
	for i, file := range []string{n.Image(name), all} {
		f, err := os.Open(file)
		if err != nil {
			return false, err
		}
		digests[i], err = digestData(f, n.disk(name).size())
		if err := errors.Join(err, f.Close()); err != nil {
			return false, err
		}
	}
	return digests[0] == digests[1], nil
}

// QEMU's blklogwrites driver logs as the kernel's dm-log-writes does: a superblock, then for each write one sector that
// describes it (its first sector, how many, flags, and a length that is used for marks alone; little endian) and its data.
const (
	logSector = 512
	logFlush  = 1 << 0 // what was written before is durable
	logFUA    = 1 << 1 // this write is durable when it is done
)

// pieceSize is what a disk writes at once or not at all, in bytes. A larger write can be torn.
const pieceSize = 4096

// loggedPiece is a piece of a write.
type loggedPiece struct {
	disk, log int64 // where its bytes belong, and where they are in the log
	size      int64
	durable   bool // flushed later, or written through
}

// readWriteLog returns what a log says was written, in that order. The superblock is of no use: what it counts is out of date
// when QEMU is killed. Entries were allotted their places before they were written, so the killed QEMU may have left a gap of zeros
// between two, and an end that is not whole.
func readWriteLog(log *os.File, diskSize int64) ([]loggedPiece, error) {
	info, err := log.Stat()
	if err != nil {
		return nil, err
	}
	var pieces []loggedPiece
	flushed := 0 // how many of the pieces are
	header := make([]byte, logSector)
	for at := int64(logSector); at+logSector <= info.Size(); {
		if _, err := log.ReadAt(header, at); err != nil {
			return nil, err
		}
		var fields [logSector / 8]uint64
		if _, err := binary.Decode(header, binary.LittleEndian, &fields); err != nil {
			return nil, err
		}
		at += logSector
		if fields == [logSector / 8]uint64{} {
			continue // a gap
		}
		first, sectors, flags := fields[0], fields[1], fields[2]
		limit := uint64(diskSize / logSector)
		if [len(fields) - 3]uint64(fields[3:]) != [len(fields) - 3]uint64{} || flags&^(logFlush|logFUA) != 0 || first > limit || sectors > limit-first {
			return nil, fmt.Errorf("cannot read the log of writes: no entry at %d: %x", at-logSector, header[:64])
		}
		if flags&logFlush != 0 {
			flushed = len(pieces)
		}
		end := at + int64(sectors)*logSector
		if end > info.Size() {
			break
		}
		for disk := int64(first) * logSector; at < end; {
			size := min(end-at, pieceSize-disk%pieceSize)
			pieces = append(pieces, loggedPiece{disk: disk, log: at, size: size, durable: flags&logFUA != 0})
			disk, at = disk+size, at+size
		}
	}
	for i := range flushed {
		pieces[i].durable = true
	}
	return pieces, nil
}

// survivors counts the pieces that are not durable, and returns those pieces that a power cut leaves.
func survivors(pieces []loggedPiece, random *rand.Rand) (unflushed int, kept []loggedPiece) {
	none, all := false, false
	switch random.IntN(4) {
	case 0:
		none = true
	case 1:
		all = true
	}
	for _, p := range pieces {
		if !p.durable {
			unflushed++
		}
		if p.durable || all || !none && random.IntN(2) == 0 {
			kept = append(kept, p)
		}
	}
	return unflushed, kept
}

// replay writes pieces to an image, in their order.
func replay(image string, log io.ReaderAt, pieces []loggedPiece) error {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := make([]byte, pieceSize)
	for _, p := range pieces {
		_, err = log.ReadAt(b[:p.size], p.log)
		if err == nil {
			_, err = f.WriteAt(b[:p.size], p.disk)
		}
		if err != nil {
			break
		}
	}
	return errors.Join(err, f.Close())
}
