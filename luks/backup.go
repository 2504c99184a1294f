package luks

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// A Part is what a call that writes a header by hand has done; the disk is flushed, and what was written was read back.
type Part string

// The parts, in the order of [RestoreHeader], and of [Wipe].
const (
	PartTorn      Part = "both copies are torn"
	PartKeyslots  Part = "the key slots"
	PartSecondary Part = "the secondary copy"
	PartPrimary   Part = "the primary copy"
	PartCopies    Part = "both copies"
)

const reasonOneCopy = "a header copy is damaged"

// ReadHeader reads the header of a volume of ours, byte for byte what `cryptsetup luksHeaderBackup` writes: both copies and the room for key slots. The
// header has to pass, with both copies sound, and to be what the bytes say; the inspection is that of the bytes. The volume may be open.
func ReadHeader(path string) ([]byte, *Inspection, error) {
	header, i, err := readHeader(path)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the header of %s: %w", path, err)
	}
	return header, i, nil
}

func readHeader(path string) ([]byte, *Inspection, error) {
	before, err := inspectPath(path)
	if err != nil {
		return nil, nil, err
	}
	if err := before.refusal(); err != nil {
		return nil, nil, err
	}
	f, device, size, err := openPath(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	header := make([]byte, before.checked.end)
	if err := readFull(f, header, 0); err != nil {
		return nil, nil, pathCause(err)
	}
	i, err := inspectBytes(path, header, size)
	if err != nil {
		return nil, nil, err
	}
	switch {
	case device != before.device, i.refusal() != nil, !equalHeaders(before, i):
		return nil, nil, &HeaderError{path, []string{"the header changed while it was read"}}
	case i.PrimaryDamaged, i.SecondaryDamaged:
		return nil, nil, &HeaderError{path, []string{reasonOneCopy}}
	}
	return header, i, nil
}

// ReadStart reads the first n bytes of a device or image file from the disk, whatever they are.
func ReadStart(path string, n int64) ([]byte, error) {
	b := make([]byte, n)
	f, _, _, err := openPath(path)
	if err == nil {
		defer f.Close()
		err = readFull(f, b, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", path, pathCause(err))
	}
	return b, nil
}

// InspectHeader judges the bytes of a header as if they stood at the start of a device of size bytes. It wants all of a header and nothing
// more, and both copies sound: what is not is an error, a *[HeaderError]. The name is for errors.
func InspectHeader(name string, header []byte, size int64) (*Inspection, error) {
	i, err := inspectBytes(name, header, size)
	if err == nil {
		err = i.refusal()
	}
	switch {
	case err != nil:
	case i.PrimaryDamaged, i.SecondaryDamaged:
		err = &HeaderError{name, []string{reasonOneCopy}}
	case i.checked.end != int64(len(header)):
		err = &HeaderError{name, []string{fmt.Sprintf("it has %d bytes, and the header in it %d", len(header), i.checked.end)}}
	}
	if err != nil {
		return nil, fmt.Errorf("cannot use the header in %s: %w", name, err)
	}
	return i, nil
}

func inspectBytes(name string, header []byte, size int64) (*Inspection, error) {
	i, err := inspect(headOf(header), size)
	if err != nil {
		return nil, err
	}
	i.Path = name
	return i, nil
}

// headOf is a device of which only the start is known; the rest reads as zeros.
type headOf []byte

func (h headOf) ReadAt(b []byte, at int64) (int, error) {
	clear(b)
	if at < int64(len(h)) {
		copy(b, h[at:])
	}
	return len(b), nil
}

// RestoreHeader writes a header that [ReadHeader] gave onto the volume it was read from, after it was found to pass and to open under k, MAC
// included, and proves that the device then says the same. Whether that is the device is the caller's question, who holds it; one that is mapped or mounted is [ErrBusy].
//
// First both copies on the device are made torn, and a copy is whole again only when the key slots are: a cut leaves [KindTorn], or a volume
// of which the secondary copy is whole. Doing it again completes it. wrote, which may be nil, is told of each part.
//
// cryptsetup would write front to back, so that a cut could leave copies that are whole in front of key slots that are not.
func RestoreHeader(path string, header []byte, k Key, wrote func(Part)) error {
	if err := restoreHeader(path, header, k, wrote); err != nil {
		return fmt.Errorf("cannot restore the header of %s: %w", path, err)
	}
	return nil
}

func restoreHeader(path string, header []byte, k Key, wrote func(Part)) error {
	w, err := openWriter(path, wrote)
	if err != nil {
		return err
	}
	defer w.Close()
	want, err := InspectHeader("the backup", header, w.size)
	if err != nil {
		return err
	}
	if err := want.verify(k); err != nil {
		return err
	}
	copySize := want.checked.copySize
	torn := func(magic string) []byte { return append([]byte(magic), make([]byte, binarySize-len(magic))...) }
	if err := errors.Join(w.write(torn(magicPrimary), 0), w.write(torn(magicSecondary), copySize), w.wrote(PartTorn)); err != nil {
		return err
	}
	if err := errors.Join(w.write(header[2*copySize:], 2*copySize), w.wrote(PartKeyslots)); err != nil {
		return err
	}
	if err := errors.Join(w.write(header[copySize:2*copySize], copySize), w.wrote(PartSecondary)); err != nil {
		return err
	}
	if err := errors.Join(w.write(header[:copySize], 0), w.wrote(PartPrimary)); err != nil {
		return err
	}
	is, err := inspectPath(path)
	if err != nil {
		return err
	}
	if err := is.verify(k); err != nil {
		return err
	}
	if err := sameHeader(want, is); err != nil {
		return &HeaderError{path, []string{err.Error()}}
	}
	return nil
}

// Wipe overwrites everything in front of the data with zeros, the key slots first, then both copies of the header, and reads it back: no LUKS
// magic and no byte of a key slot is left. Where the device can, it is told before that what was there is not needed any more.
// What is encrypted stays where it is, and nothing opens it but a header that was saved before.
//
// Whether that may be is the caller's decision, who holds the device; one that is mapped or mounted is [ErrBusy]. A cut leaves a header whose key
// slots no key opens, [KindTorn] or [KindNone]. wrote, which may be nil, is told of each part.
func Wipe(path string, wrote func(Part)) error {
	if err := wipeHeader(path, wrote); err != nil {
		return fmt.Errorf("cannot wipe the header of %s: %w", path, err)
	}
	return nil
}

func wipeHeader(path string, wrote func(Part)) error {
	i, err := inspectPath(path)
	if err != nil {
		return err
	}
	end := int64(DataOffset)
	if i.checked != nil {
		end = i.checked.offset
	}
	w, err := openWriter(path, wrote)
	if err != nil {
		return err
	}
	defer w.Close()
	end = min(end, w.size)
	if err := errors.Join(w.zero(KeyslotsOffset, end), w.wrote(PartKeyslots)); err != nil {
		return err
	}
	if err := errors.Join(w.zero(0, min(KeyslotsOffset, end)), w.wrote(PartCopies)); err != nil {
		return err
	}
	after, err := inspectPath(path)
	if err != nil {
		return err
	}
	if after.Kind != KindNone {
		return fmt.Errorf("%w: the disk still shows a header (%s)", unix.EIO, after.Kind)
	}
	return nil
}

// A writer writes to a device that nobody else uses, and reads back what it wrote.
type writer struct {
	*os.File
	size    int64
	told    func(Part)
	written []extent // since the last part
}

func openWriter(path string, told func(Part)) (*writer, error) {
	// O_EXCL: the kernel refuses a block device that is mounted, mapped or held otherwise.
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, ErrBusy
	}
	if err != nil {
		return nil, pathCause(err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, pathCause(err)
	}
	return &writer{File: f, size: size, told: told}, nil
}

func (w *writer) write(b []byte, at int64) error {
	w.written = append(w.written, extent{at, b})
	if _, err := w.WriteAt(b, at); err != nil {
		return pathCause(err)
	}
	return nil
}

// zero overwrites the bytes from start to end.
func (w *writer) zero(start, end int64) error {
	if start >= end {
		return nil
	}
	// Best effort, and before the zeros: what a device returns of discarded blocks is its own affair.
	_ = discard(w.File, start, end-start)
	zeros := make([]byte, 1<<20)
	for at := start; at < end; at += int64(len(zeros)) {
		if err := w.write(zeros[:min(int64(len(zeros)), end-at)], at); err != nil {
			return err
		}
	}
	return nil
}

// wrote flushes what was written, and reads it from the disk, not from the page cache.
func (w *writer) wrote(part Part) error {
	if err := w.Sync(); err != nil {
		return pathCause(err)
	}
	_ = unix.Fadvise(int(w.Fd()), 0, 0, unix.FADV_DONTNEED)
	for _, e := range w.written {
		now := make([]byte, len(e.data))
		if err := readFull(w, now, e.at); err != nil {
			return pathCause(err)
		}
		if !bytes.Equal(now, e.data) {
			return fmt.Errorf("%w: the disk does not hold what was written at byte %d", unix.EIO, e.at)
		}
	}
	w.written = nil
	if w.told != nil {
		w.told(part)
	}
	return nil
}
