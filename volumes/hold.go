package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrChanged marks a device that is not, or not any more, the one that was scanned.
var ErrChanged = errors.New("it is not the device that was scanned")

// Hold is an open device under an exclusive lock. udev takes a shared lock on a disk before it
// looks at it and leaves alone what is locked (systemd, "Locking Block Device Access"), as do
// other tools that follow that rule, and another run of this one.
type Hold struct {
	file   *os.File
	device Device
	facts  func(*os.File) (openFacts, error)
}

// openFacts identify an open device.
type openFacts struct {
	major, minor uint32
	diskSeq      uint64
	size         int64
	serial       string
}

// lockPoll is how long Hold waits between attempts; udev needs some tens of milliseconds.
const lockPoll = 20 * time.Millisecond

// Hold opens the device for writing, waits for its lock until ctx ends, and verifies that device
// number, disk sequence number, size and serial still are those that were scanned. Errors: ErrChanged; the cause of ctx
// if another program keeps the lock; those of open(2).
func (d Device) Hold(ctx context.Context) (*Hold, error) {
	return d.hold(ctx, func(f *os.File) (openFacts, error) { return readOpenFacts(f, d.root) })
}

func (d Device) hold(ctx context.Context, facts func(*os.File) (openFacts, error)) (*Hold, error) {
	f, err := os.OpenFile(d.root+d.Path, os.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot hold %s: %w", d.Path, err)
	}
	h := &Hold{file: f, device: d, facts: facts}
	if err := h.lock(ctx); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot hold %s: %w", d.Path, err)
	}
	if err := h.Recheck(); err != nil { // under the lock: what is found stays true
		f.Close()
		return nil, err
	}
	return h, nil
}

func (h *Hold) lock(ctx context.Context) error {
	for {
		err := unix.Flock(int(h.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("another program has locked it: %w", ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// Recheck verifies the identity again; ErrChanged if it is another.
func (h *Hold) Recheck() error {
	d := h.device
	now, err := h.facts(h.file)
	if err != nil {
		return fmt.Errorf("cannot identify %s: %w", d.Path, err)
	}
	changed := func(what string, was, is any) error {
		return fmt.Errorf("cannot trust %s: %w: %s was %v and is %v", d.Path, ErrChanged, what, was, is)
	}
	switch {
	case now.major != d.Major || now.minor != d.Minor:
		return changed("device number", fmt.Sprintf("%d:%d", d.Major, d.Minor), fmt.Sprintf("%d:%d", now.major, now.minor))
	case now.diskSeq != d.DiskSeq:
		return changed("disk sequence number", d.DiskSeq, now.diskSeq)
	case now.size != d.Size:
		return changed("size", d.Size, now.size)
	case now.serial != d.Serial:
		return changed("serial", fmt.Sprintf("%q", d.Serial), fmt.Sprintf("%q", now.serial))
	}
	return nil
}

// Close gives up the lock and the device.
func (h *Hold) Close() error { return h.file.Close() }

// Check verifies, without a lock and without opening the device for writing, that it still is the one that was
// scanned: ErrChanged if not.
func (d Device) Check() error {
	return d.check(func(f *os.File) (openFacts, error) { return readOpenFacts(f, d.root) })
}

func (d Device) check(facts func(*os.File) (openFacts, error)) error {
	f, err := os.OpenFile(d.root+d.Path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("cannot check %s: %w", d.Path, err)
	}
	h := &Hold{file: f, device: d, facts: facts}
	defer h.Close()
	return h.Recheck()
}

const blkGetDiskSeq = 0x80081280 // BLKGETDISKSEQ, _IOR(0x12, 128, u64), linux/fs.h

// readOpenFacts asks the open device itself where it can: its path, and its number too, may meanwhile belong to another.
func readOpenFacts(f *os.File, root string) (openFacts, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return openFacts{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return openFacts{}, fmt.Errorf("%w: it is not a block device", ErrChanged)
	}
	facts := openFacts{major: unix.Major(st.Rdev), minor: unix.Minor(st.Rdev)}
	size, err := ioctlUint64(f, unix.BLKGETSIZE64)
	if err != nil {
		return openFacts{}, fmt.Errorf("cannot read its size: %w", err)
	}
	facts.size = int64(size)
	facts.diskSeq, err = ioctlUint64(f, blkGetDiskSeq)
	if err != nil && !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EINVAL) { // kernels before 5.15 have none
		return openFacts{}, fmt.Errorf("cannot read its disk sequence number: %w", err)
	}
	dir := filepath.Join(root, "/sys/dev/block", fmt.Sprintf("%d:%d", facts.major, facts.minor))
	if facts.serial, err = readSerial(dir); err != nil {
		return openFacts{}, fmt.Errorf("cannot read its serial: %w", err)
	}
	return facts, nil
}

func ioctlUint64(f *os.File, request uintptr) (uint64, error) {
	var v uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&v))); errno != 0 {
		return 0, errno
	}
	return v, nil
}
