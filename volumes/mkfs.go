package volumes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// maxLabel is the longest label in bytes (xfs(5), ext4's s_volume_name). mkfs.ext4 would cut a longer one off silently.
var maxLabel = map[string]int{"xfs": 12, "ext4": 16}

// ErrNotEmpty marks a device that carries a signature where it must not.
var ErrNotEmpty = errors.New("it is not empty")

// How much of each end [ZeroEnds] clears, in bytes: more than how far from it blkid looks for a signature that noise can have. The furthest of
// libblkid/src/superblocks are VMFS, 2 MiB from the start, and ZFS, 512 KiB from the end; the second header of LUKS2 is further, with a magic of 6 bytes.
// Not more: all of it goes through dm-crypt.
const (
	headLength = 3 << 20
	tailLength = 1 << 20
)

// ZeroEnds overwrites the first 3 MiB and the last MiB of a device or image file with zeros and returns when they are on stable storage. It is for
// a mapping under a new key: what that shows is noise, and in noise blkid finds a signature about once in 65,536 volumes (two
// bytes make a JMicron RAID). mkfs would refuse it, and one that is left at the end would hide the filesystem from blkid for good.
func ZeroEnds(ctx context.Context, path string) error {
	return zeroEnds(ctx, path, headLength, tailLength)
}

// MakeBlank overwrites as much of both ends of a disk or image file with zeros as [Probe] wants to see, and returns when they are on stable
// storage and Probe finds the disk blank: ErrNotEmpty if it does not.
func MakeBlank(ctx context.Context, path string) error {
	if err := zeroEnds(ctx, path, proofLength, proofLength); err != nil {
		return err
	}
	content, err := Probe(ctx, path, 0)
	if err == nil && !content.Blank {
		err = fmt.Errorf("cannot make %s blank: %w: %s", path, ErrNotEmpty, content.Detail)
	}
	return err
}

func zeroEnds(ctx context.Context, path string, head, tail int64) error {
	if err := writeZeros(ctx, path, head, tail); err != nil {
		return fmt.Errorf("cannot clear both ends of %s: %w", path, err)
	}
	return nil
}

func writeZeros(ctx context.Context, path string, head, tail int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	for offset := int64(0); err == nil && offset < size; {
		if offset >= head && offset < size-tail {
			offset = size - tail
		}
		if err = ctx.Err(); err == nil {
			var n int
			n, err = f.WriteAt(zeros[:min(int64(len(zeros)), size-offset)], offset)
			offset += int64(n)
		}
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// MakeFilesystem makes an xfs or ext4 filesystem, or swap, on a device or image file that carries no signature, and
// returns when it is on stable storage. It never forces: anything that blkid finds is an error (mkfs.xfs refuses too, mkfs.ext4
// without a terminal does not). An empty
// label or uuid leaves that to mkfs. Errors: ErrNoProgram where mkfs or blkid is missing, ErrNotEmpty.
func MakeFilesystem(ctx context.Context, path, fstype, label, uuid string) error {
	fail := func(err error) error {
		return fmt.Errorf("cannot make filesystem %q on %s: %w", fstype, path, err)
	}
	var args []string
	switch fstype { // no discards: they would show through dm-crypt which blocks are in use
	case "xfs":
		args = []string{"-q", "-K"}
		if uuid != "" {
			args = append(args, "-m", "uuid="+uuid)
		}
	case "ext4":
		args = []string{"-q", "-E", "nodiscard"}
		if uuid != "" {
			args = append(args, "-U", uuid)
		}
	case "swap":
		if uuid != "" {
			args = []string{"-U", uuid}
		}
	default:
		return fail(fmt.Errorf("only xfs, ext4 and swap are known"))
	}
	if len(label) > maxLabel[fstype] {
		return fail(fmt.Errorf("label %q is longer than %d bytes", label, maxLabel[fstype]))
	}
	if label != "" {
		args = append(args, "-L", label)
	}
	cmd, err := program(ctx, MakeProgram(fstype), slices.Concat(args, []string{"--", path})...)
	if err != nil {
		return fail(err)
	}
	found, err := probe(ctx, path, 0, head)
	if err != nil {
		return fail(err)
	}
	if !found.Blank {
		return fail(fmt.Errorf("%w: %s", ErrNotEmpty, found.Detail))
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fail(commandError(MakeProgram(fstype), err, stderr.Bytes()))
	}
	if err := flush(path); err != nil {
		return fail(err)
	}
	if found, err = probe(ctx, path, 0, head); err != nil {
		return fail(err)
	}
	if found.Type != fstype {
		return fail(fmt.Errorf("%s succeeded, but blkid finds type %q", MakeProgram(fstype), found.Type))
	}
	return nil
}

// MakeProgram is the program by which [MakeFilesystem] makes a filesystem.
func MakeProgram(fstype string) string {
	if fstype == "swap" {
		return "mkswap"
	}
	return "mkfs." + fstype
}

// LeastSize is the smallest device, in bytes, that [MakeFilesystem] can make a filesystem on: mkfs.xfs refuses less than
// 300 MiB since xfsprogs 5.19, and mkfs.ext4 makes no journal on less than 2 MiB.
func LeastSize(fstype string) int64 {
	if fstype == "xfs" {
		return 300 << 20
	}
	return 2 << 20
}

// CheckMakeFilesystem tells whether [MakeFilesystem] has the programs it needs, by ErrNoProgram if not.
func CheckMakeFilesystem(fstype string) error {
	for _, name := range []string{"blkid", MakeProgram(fstype)} {
		if _, err := program(context.Background(), name); err != nil {
			return fmt.Errorf("cannot make filesystem %q: %w", fstype, err)
		}
	}
	return nil
}

// flush writes out the page cache of path and the disk's own cache.
func flush(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
