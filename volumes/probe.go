package volumes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNoProgram marks a missing blkid or mkfs; it comes with exec.ErrNotFound.
var ErrNoProgram = errors.New("program is not installed")

// proofLength is how much of each end must be zero: more than any format's first superblock, a whole LUKS2
// header (16 MiB by default), and the backup structures that GPT, md and ZFS keep at the end.
const proofLength = 16 << 20

// Content is what is on a device.
type Content struct {
	// Blank says that nothing was found: by Probe, that the device is proven to be blank; by
	// Filesystem, only that it carries no signature.
	Blank bool
	Type  string // blkid's TYPE, else its PTTYPE, "" where it knows none
	UUID  string // of the filesystem, "" where it has none
	// Detail says why the device is not blank: "ext4 filesystem (label data)", "byte 0x4f at offset 1234567 is not zero".
	Detail string
	// NoiseFrom is where the bytes other than zero begin, if they carry no signature; 0 otherwise, and where they
	// begin at the first byte. Only Probe sets it.
	NoiseFrom int64
	// Noise says that there are bytes other than zero, and none of them a signature. Only Probe sets it.
	Noise bool
}

// Probe tells whether a block device or image file is blank: blkid finds no signature, and the first and last
// 16 MiB are all zero. Random bytes carry no signature either, so the first does not do without the second.
//
// A size in bytes other than 0 must be that of path, else the error is ErrChanged. Probe reads only. An
// error says nothing about the content: it never means blank.
func Probe(ctx context.Context, path string, size int64) (Content, error) {
	return probe(ctx, path, size, provenZero)
}

// Filesystem tells what blkid finds on path and does without the proof by zeros: fresh dm-crypt mappings read as
// noise.
func Filesystem(ctx context.Context, path string) (Content, error) {
	return probe(ctx, path, 0, readable)
}

// depth is how far a probe goes beyond blkid's word.
type depth int

const (
	head       depth = iota // what MakeFilesystem makes has its superblock there
	readable                // both ends can be read, so that blkid's silence means something
	provenZero              // and are all zero
)

func probe(ctx context.Context, path string, size int64, deep depth) (Content, error) {
	fail := func(err error) (Content, error) { return Content{}, fmt.Errorf("cannot probe %s: %w", path, err) }
	// O_NONBLOCK: a path that turns out to be a FIFO must not hang us.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	actual, err := f.Seek(0, io.SeekEnd)
	switch {
	case err != nil:
		return fail(err)
	case actual <= 0:
		return fail(errors.New("it has no size"))
	case size != 0 && size != actual:
		return fail(fmt.Errorf("%w: it has %d bytes, not %d", ErrChanged, actual, size))
	}
	content, err := signature(ctx, path)
	if err != nil {
		return fail(err)
	}
	if !content.Blank {
		return content, nil
	}
	if deep >= readable {
		// For what it could not open or read, blkid says "nothing found" too, without a word: see for ourselves.
		offset, value, err := firstNonZero(ctx, f, actual)
		if err != nil {
			return fail(err)
		}
		if deep == provenZero && offset >= 0 {
			return Content{Detail: fmt.Sprintf("byte %#02x at offset %d is not zero", value, offset), NoiseFrom: offset, Noise: true}, nil
		}
	}
	if fstype, err := superblock(f, actual); err != nil || fstype != "" {
		return fail(cmp.Or(err, fmt.Errorf("blkid finds nothing, but there is a superblock of %s", fstype)))
	}
	return content, nil
}

// superblock recognises what MakeFilesystem makes, as a check on blkid. For ext4 the revision (0 or 1) counts
// besides the short magic, which one noise in 65536 has. Offsets: fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h.
func superblock(f *os.File, size int64) (string, error) {
	const end = 1024 + 80
	if size < end {
		return "", nil
	}
	head := make([]byte, end)
	if _, err := f.ReadAt(head, 0); err != nil {
		return "", err
	}
	switch le := binary.LittleEndian; {
	case string(head[:4]) == "XFSB":
		return "xfs", nil
	case le.Uint16(head[1024+56:]) == 0xef53 && le.Uint32(head[1024+76:]) <= 1:
		return "ext4", nil
	}
	return "", nil
}

// zeros are read only.
var zeros [512 << 10]byte

// directAlign is the alignment of memory that is read into directly, bytes: the largest sector that the kernel has.
const directAlign = 4096

// openDirect opens what f is for reading without the page cache, which costs less, and which does not see what was written to a disk through a
// mapping. A filesystem that cannot do that, such as tmpfs, reads through it.
func openDirect(f *os.File) (*os.File, error) {
	path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	disk, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		disk, err = os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	return disk, err
}

// firstNonZero reads both ends and returns where the first byte other than zero is, -1 for none.
func firstNonZero(ctx context.Context, f *os.File, size int64) (first int64, value byte, err error) {
	disk, err := openDirect(f)
	if err != nil {
		return 0, 0, err
	}
	defer disk.Close()
	buffer := make([]byte, len(zeros)+directAlign)
	buffer = buffer[-uintptr(unsafe.Pointer(&buffer[0]))%directAlign:][:len(zeros)]
	first = -1
	for offset := int64(0); offset < size; {
		if offset >= proofLength && offset < size-proofLength {
			offset = size - proofLength
		}
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
		n := min(int64(len(buffer)), size-offset)
		_, err := disk.ReadAt(buffer[:n], offset)
		if errors.Is(err, unix.EINVAL) { // a file whose length is no multiple of what can be read directly
			_, err = f.ReadAt(buffer[:n], offset)
		}
		if err != nil {
			return 0, 0, err
		}
		if first < 0 && !bytes.Equal(buffer[:n], zeros[:n]) {
			for i, b := range buffer[:n] {
				if b != 0 {
					first, value = offset+int64(i), b
					break
				}
			}
		}
		offset += n
	}
	return first, value, nil
}

// signature asks blkid. Exit codes of blkid(8): 0 found, 2 nothing found, 8 ambivalent, anything else an error.
func signature(ctx context.Context, path string) (Content, error) {
	cmd, err := program(ctx, "blkid", "-p", "-o", "export", "--", path)
	if err != nil {
		return Content{}, err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	if ctx.Err() != nil {
		return Content{}, ctx.Err()
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return describe(stdout.String()), nil
	case !errors.As(err, &exit):
		return Content{}, err
	case exit.ExitCode() == 8:
		return Content{Detail: "signatures of more than one format"}, nil
	case exit.ExitCode() == 2 && stderr.Len() == 0 && stdout.Len() == 0:
		return Content{Blank: true}, nil
	}
	// Exit code 2 with a complaint: blkid could not open or read it.
	return Content{}, commandError("blkid", err, stderr.Bytes())
}

// describe puts blkid's export format (NAME=value lines) into words. Labels come from the disk: they are quoted
// unless plain.
func describe(export string) Content {
	tags := map[string]string{}
	for line := range strings.Lines(export) {
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			tags[name] = value
		}
	}
	var words []string
	if format := tags["TYPE"]; format != "" {
		kind := map[string]string{"filesystem": "filesystem", "raid": "member", "crypto": "encrypted volume"}[tags["USAGE"]]
		if kind == "" {
			kind = "signature"
		}
		if label := strings.ReplaceAll(tags["LABEL"], `\`, ""); label != "" { // blkid escapes for the shell
			if strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" {
				label = strconv.Quote(label)
			}
			kind += " (label " + label + ")"
		}
		words = append(words, format+" "+kind)
	}
	if table := tags["PTTYPE"]; table != "" {
		words = append(words, table+" partition table")
	}
	if len(words) == 0 {
		words = []string{"a signature that blkid does not name"}
	}
	content := Content{Type: tags["TYPE"], UUID: tags["UUID"], Detail: strings.Join(words, ", ")}
	if content.Type == "" {
		content.Type = tags["PTTYPE"]
	}
	return content
}

// program finds a system program also where PATH lacks the sbin directories, and gives it an environment in
// which its messages are C's and nothing can redirect it.
func program(ctx context.Context, name string, args ...string) (*exec.Cmd, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err == nil {
			break
		}
		path, err = exec.LookPath(filepath.Join(dir, name))
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrNoProgram, name, exec.ErrNotFound)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	return cmd, nil
}

// commandError adds what the program complained of, on one line.
func commandError(name string, err error, stderr []byte) error {
	text := strings.Join(strings.Fields(string(stderr)), " ")
	if text == "" {
		return fmt.Errorf("%s: %w", name, err)
	}
	return fmt.Errorf("%s: %w: %s", name, err, text)
}
