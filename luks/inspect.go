package luks

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Subsystem is what a header of ours carries in its subsystem field.
const Subsystem = "luks-kms-agent"

// A Key is a data key or a recovery key that the caller owns. Both slices are borrowed: this package neither changes nor keeps them.
type Key interface {
	Bytes() []byte      // 32 bytes of a data key, 20 of a recovery key
	Passphrase() []byte // of a data key its standard base64, 44 bytes, no newline; of a recovery key its text, 47 bytes
}

// A Kind says what is on a device, as far as LUKS goes.
type Kind string

// The kinds.
const (
	KindNone  Kind = "none"  // no LUKS magic at the start, nor at any place where a second copy could be; and not torn
	KindLUKS1 Kind = "luks1" // a LUKS1 header; never trusted
	KindTorn  Kind = "torn"  // a magic, or the text of a header that a cut left alone, but no valid copy of a header
	KindEmpty Kind = "empty" // a valid LUKS2 header, no valid copy of which has a keyslot: nothing was ever readable under it
	KindLUKS2 Kind = "luks2" // a valid LUKS2 header: its checksum holds. Whether it is trusted is another question
)

// A Token is our token as a header carries it. It is untrusted until [Inspection.Verify] returned nil, and its key ARN and
// wrapped key even then are only hints (see the package comment).
type Token struct {
	ID         int
	KeyARN     string
	WrappedKey []byte
	Keyslot    int // the slot that the data key opens
	MAC        []byte
	Version    int
}

// A RecoveryToken is a token that names the slot of a recovery key. It is untrusted until [Inspection.VerifyRecovery] returned nil.
type RecoveryToken struct {
	ID      int
	Keyslot int // -1: none, as its removal was cut
	Created time.Time
	MAC     []byte
	Version int
	Problem string // why its slot cannot be opened by us, "" if it can
}

// A Keyslot is a slot as a header describes it.
type Keyslot struct {
	ID         int
	KeySize    int      // of the volume key in it, bits
	Cipher     string   // of its area
	KDF        string   // "pbkdf2", "argon2i", "argon2id"
	Hash       string   // of pbkdf2, "" for argon2
	Iterations int      // of pbkdf2; of argon2 its time cost
	Tokens     []string `json:",omitempty"` // types of the tokens that list it, in order of their ids
}

// A Header is a header's facts. They are facts of an untrusted disk: texts have unprintable runes replaced, nothing else is
// promised unless the inspection passed.
type Header struct {
	UUID       string // canonical lower case, "" where it is not a UUID
	Label      string
	Subsystem  string
	Version    int    // 1 or 2
	Cipher     string // of segment 0
	KeySize    int    // of the volume key, bits
	SectorSize int    // bytes
	Offset     int64  // of the encrypted data, bytes
	SeqID      uint64
	Keyslots   []Keyslot // in order of their ids
	Tokens     []string  // types of all tokens, in order of their ids
	Token      *Token    // ours; nil if there is none, if it is malformed, or if there are several
	Recovery   []RecoveryToken
	Unnamed    []int // ids of the keyslots that no token names: passphrases, and what a cut left
}

// An Inspection is what one look at a device found.
type Inspection struct {
	Path string
	Size int64 // of the device, bytes
	Kind Kind

	Ours             bool     // the subsystem is ours, or there is a token of ours
	Reasons          []string // why the strict check refuses the header; none and KindLUKS2 is a pass
	PrimaryDamaged   bool     // the primary copy is damaged, the secondary passes every check; Header is the secondary's
	SecondaryDamaged bool     // the secondary copy is damaged or older than the primary, which is used
	PrimaryForeign   bool     // something that is not LUKS, nor zeros, stands before a valid secondary copy; one of the Reasons
	Header           *Header  // nil where there is no valid header

	device  string   // "major:minor" of a block device, else the path
	checked *checked // what unsealing needs; nil where the header in use was refused
	area    *os.File // in memory, what was read of the area of the token's keyslot, at its offset; nil without a token, or without a pass
	read    []extent // what else was read
}

// An extent is bytes of a device and where they are.
type extent struct {
	at   int64
	data []byte
}

// A recorder keeps what is read through it, without a copy: who reads does not write into it.
type recorder struct {
	io.ReaderAt
	read []extent
}

func (r *recorder) ReadAt(b []byte, at int64) (int, error) {
	n, err := r.ReaderAt.ReadAt(b, at)
	r.read = append(r.read, extent{at, b[:n]})
	return n, err
}

// Pass reports whether the strict check has nothing against the header. It says nothing of whose header it is.
func (i *Inspection) Pass() bool {
	return i.Kind == KindLUKS2 && len(i.Reasons) == 0 && i.checked != nil
}

// A HeaderError says that a header is not trusted, and why: it was tampered with, it is damaged, or it is none of ours.
type HeaderError struct {
	Path    string
	Reasons []string
}

func (e *HeaderError) Error() string {
	return fmt.Sprintf("cannot trust the LUKS header of %s: %s", e.Path, strings.Join(e.Reasons, "; "))
}

// refusal is the error for a header that cannot be used, or nil.
func (i *Inspection) refusal() error {
	switch {
	case i.Kind != KindLUKS2:
		return &HeaderError{i.Path, append([]string{fmt.Sprintf("there is no usable LUKS2 header (found: %s)", i.Kind)}, i.Reasons...)}
	case !i.Pass():
		return &HeaderError{i.Path, i.Reasons}
	case i.checked.token == nil:
		return &HeaderError{i.Path, []string{reasonNoToken}}
	}
	return nil
}

// Inspect reads and judges the header of a block device or an image file. It opens the path read-only, takes no lock and writes
// nothing. Whatever it reads, it does not panic, allocates at most 64 MiB, garbage included, and answers within a second of the last
// byte read. An error means that the path could not be read, never that something is wrong with what is on it.
func Inspect(path string) (*Inspection, error) {
	i, err := inspectPath(path)
	if err != nil {
		return nil, fmt.Errorf("cannot inspect %s: %w", path, err)
	}
	return i, nil
}

func inspectPath(path string) (*Inspection, error) {
	f, device, size, err := openPath(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	i, err := inspect(f, size)
	if err != nil {
		return nil, pathCause(err)
	}
	i.Path, i.device = path, device
	return i, nil
}

// openPath opens a device or image file for reading what is on it now, and tells which device it is, as "major:minor", and its
// size in bytes. An image file is its path.
func openPath(path string) (f *os.File, device string, size int64, err error) {
	// O_NONBLOCK: a fifo would make open wait for a writer, before it could be refused.
	f, err = os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", 0, pathCause(err)
	}
	defer func() {
		if err != nil {
			f.Close()
			err = pathCause(err)
		}
	}()
	// Another machine or another layer below may have written to the disk: what the page cache kept is not what is on it.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	info, err := f.Stat()
	if err != nil {
		return nil, "", 0, err
	}
	device = path
	switch mode := info.Mode(); {
	case mode.IsRegular():
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		rdev := info.Sys().(*syscall.Stat_t).Rdev
		device = fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
	default:
		return nil, "", 0, errors.New("it is neither a block device nor a regular file")
	}
	size, err = f.Seek(0, io.SeekEnd) // also the size of a block device
	return f, device, size, err
}

// pathCause drops the path that the os package repeats.
func pathCause(err error) error {
	var p *os.PathError
	if errors.As(err, &p) && err == error(p) {
		return p.Err
	}
	return err
}

// inspect is Inspect without the opening.
func inspect(disk io.ReaderAt, size int64) (*Inspection, error) {
	r := &recorder{ReaderAt: disk}
	i, err := inspectHeader(r, size)
	if err != nil {
		return nil, err
	}
	i.read = r.read
	if i.Pass() && i.checked.token != nil {
		// Read now, by the same open file: unsealing touches the disk no more.
		if i.area, err = copyArea(disk, i.checked.areaOffset); err != nil {
			return nil, err
		}
	}
	return i, nil
}

// copyArea reads the area of a keyslot into a file in memory that nobody else can write, at its offset. There luks.go finds it, and
// with many volumes it does not count as memory of the process, which is locked.
func copyArea(disk io.ReaderAt, offset int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("luks-header", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	area := os.NewFile(uintptr(fd), "luks-header") // closed when it is garbage
	piece := make([]byte, areaPiece)
	for at := offset; at < offset+areaBytes; at += areaPiece {
		err := readFull(disk, piece, at)
		if err == nil {
			_, err = area.WriteAt(piece, at)
		}
		if err != nil {
			area.Close()
			return nil, err
		}
	}
	return area, nil
}

// areaPiece divides the bytes of an area.
const areaPiece = areaBytes / 8

// sameArea tells whether two disks, or copies of one, have the same bytes in the area at an offset.
func sameArea(a, b io.ReaderAt, offset int64) (bool, error) {
	pieceA, pieceB := make([]byte, areaPiece), make([]byte, areaPiece)
	for at := offset; at < offset+areaBytes; at += areaPiece {
		if err := errors.Join(readFull(a, pieceA, at), readFull(b, pieceB, at)); err != nil || !bytes.Equal(pieceA, pieceB) {
			return false, err
		}
	}
	return true, nil
}

// inspectHeader is inspect but for the area of the keyslot.
func inspectHeader(r io.ReaderAt, size int64) (*Inspection, error) {
	i := &Inspection{Size: size, Kind: KindNone}

	primary, magic, why, err := readCopy(r, size, 0)
	if err != nil {
		return nil, err
	}
	if primary == nil && magic {
		if h, err := readLUKS1(r, size); err != nil {
			return nil, err
		} else if h != nil {
			i.Kind, i.Header, i.Reasons = KindLUKS1, h, []string{"it is LUKS1, which has no place for a token"}
			return i, nil
		}
	}

	var current *headerCopy
	var copies []*headerCopy
	var reasons []string
	if primary != nil {
		secondary, _, _, err := readCopy(r, size, primary.size)
		if err != nil {
			return nil, err
		}
		current, copies = primary, []*headerCopy{primary}
		if secondary != nil {
			copies = append(copies, secondary)
		}
		switch {
		case secondary == nil, secondary.seqID < primary.seqID:
			i.SecondaryDamaged = true
		case secondary.seqID > primary.seqID:
			reasons = append(reasons, fmt.Sprintf("the secondary header copy is newer (sequence id %d) than the primary (%d)", secondary.seqID, primary.seqID))
		case !primary.same(secondary):
			reasons = append(reasons, "the two header copies differ")
		}
	} else {
		for _, offset := range headerSizes {
			secondary, found, _, err := readCopy(r, size, offset)
			if err != nil {
				return nil, err
			}
			magic = magic || found
			if secondary != nil {
				copies = append(copies, secondary)
			}
		}
		if len(copies) == 0 {
			text := false
			if !magic {
				if text, err = looseText(r, size); err != nil {
					return nil, err
				}
			}
			if magic || text {
				i.Kind = KindTorn
				i.Reasons = []string{fmt.Sprintf("no copy of the LUKS2 header is valid (the primary: %s)", why)}
			}
			return i, nil
		}
		current = copies[0]
		if len(copies) > 1 {
			reasons = append(reasons, "there are several secondary header copies, and no valid primary")
		}
		overwritten, err := foreignHead(r)
		if err != nil {
			return nil, err
		}
		if overwritten {
			i.PrimaryForeign = true
			reasons = append(reasons, "the primary header copy is overwritten by something that is not LUKS")
		}
	}

	header, ck, judged := judge(current, size)
	i.Kind, i.Header, i.checked = KindLUKS2, header, ck
	reasons = append(reasons, judged...)
	i.Ours = header.Subsystem == Subsystem || hasType(header.Tokens, tokenType)
	if i.Ours && !hasType(header.Tokens, tokenType) {
		reasons = append(reasons, reasonNoToken)
	}

	if empty(copies) {
		i.Kind = KindEmpty
	}
	if primary == nil {
		if len(reasons) == 0 && i.Kind == KindLUKS2 {
			i.PrimaryDamaged = true
		} else {
			reasons = append(reasons, fmt.Sprintf("the primary header copy is damaged (%s)", why))
		}
	}
	i.Reasons = reasons
	return i, nil
}

// foreignHead reports whether the place of the primary copy holds something else than a header that was damaged or wiped. Only
// called where a valid secondary exists, so the device has that many bytes.
func foreignHead(r io.ReaderAt) (bool, error) {
	head := make([]byte, binarySize)
	if err := readFull(r, head, 0); err != nil {
		return false, err
	}
	if string(head[:len(magicPrimary)]) == magicPrimary {
		return false, nil
	}
	return len(bytes.Trim(head, "\x00")) != 0, nil
}

// looseText reports whether the place of the two copies that Format writes holds parts of their JSON text and otherwise only zeros.
// A cut leaves that: the sector with the magic and those with the text are one flush when a header is written, and one write
// when the next luksFormat wipes it, so a disk may have done the one and not the other. (See TestPowerCutsInFormat.)
//
// It is narrow on purpose, as a caller may take what is torn for its own: both binary headers are zeros, the rest is sectors
// of JSON as cryptsetup writes it, without a space, cut by nothing but zeros, and what begins an area begins the text.
func looseText(r io.ReaderAt, size int64) (bool, error) {
	if size < KeyslotsOffset {
		return false, nil
	}
	const sector = 512
	head := make([]byte, KeyslotsOffset)
	if err := readFull(r, head, 0); err != nil {
		return false, err
	}
	found := false
	for at := 0; at < len(head); at += sector {
		b := bytes.Trim(head[at:at+sector], "\x00")
		if len(b) == 0 {
			continue
		}
		within := at % (KeyslotsOffset / 2)
		if within < binarySize || within == binarySize && head[at] != 0 && !bytes.HasPrefix([]byte(textStart), b[:min(len(b), len(textStart))]) {
			return false, nil
		}
		for _, c := range b {
			if c <= ' ' || c > '~' {
				return false, nil
			}
		}
		found = true
	}
	return found, nil
}

// textStart is what the JSON text of cryptsetup begins with.
const textStart = `{"keyslots":{`

// readLUKS1 returns the facts of a LUKS1 header, nil if the version says that it is none. Offsets from the LUKS1 On-Disk Format
// Specification 1.2.3, figure 1. Only called where the magic is there.
func readLUKS1(r io.ReaderAt, size int64) (*Header, error) {
	b := make([]byte, 208)
	if size < int64(len(b)) {
		return nil, nil
	}
	if err := readFull(r, b, 0); err != nil {
		return nil, err
	}
	if b[offVersion] != 0 || b[offVersion+1] != 1 {
		return nil, nil
	}
	be32 := func(at int) int64 {
		return int64(b[at])<<24 | int64(b[at+1])<<16 | int64(b[at+2])<<8 | int64(b[at+3])
	}
	h := &Header{
		Version:    1,
		Cipher:     printable(trimNUL(b[8:40])) + "-" + printable(trimNUL(b[40:72])),
		Offset:     be32(104) * 512,
		KeySize:    int(be32(108)) * 8,
		SectorSize: 512,
	}
	if u := string(trimNUL(b[168:208])); canonicalUUID(u) {
		h.UUID = u
	}
	return h, nil
}

func hasType(types []string, want string) bool {
	for _, t := range types {
		if t == want {
			return true
		}
	}
	return false
}
