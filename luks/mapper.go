package luks

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
	"unsafe"

	"github.com/anatol/devmapper.go"
	luksgo "github.com/anatol/luks.go"
	"golang.org/x/sys/unix"
)

// Where udev makes the nodes of mappings, and device-mapper's own node, which devmapper.go has built in too.
const (
	nodeDir     = "/dev/mapper"
	controlNode = nodeDir + "/control"
)

// A mapper is the few things of the kernel and udev that opening and closing need. Tests bring their own, everything else has kernelMapper.
type mapper struct {
	create  func(v *luksgo.Volume, name string) error // with its table loaded, and not in use yet
	resume  func(name string) error                   // now there is a volume to be seen, and udev is told
	remove  func(name string) error
	info    func(name string) (*devmapper.DeviceInfo, error)
	targets func() ([]string, error) // known to the kernel now
	node    func(name string) (devno uint64, ok bool)
	link    func(name string, devno uint64) error // makes the node
	unlink  func(name string)                     // removes the node if nothing is behind it
}

func kernelMapper() mapper {
	return mapper{
		create:  createMapping,
		resume:  devmapper.Resume,
		remove:  luksgo.Lock,
		info:    devmapper.InfoByName,
		targets: kernelTargets,
		node:    func(name string) (uint64, bool) { return blockNumber(filepath.Join(nodeDir, name)) },
		link:    func(name string, devno uint64) error { return linkNode(nodeDir, name, devno, blockNumber) },
		unlink:  func(name string) { unlinkNode(nodeDir, name) },
	}
}

// linkNode makes dir/NAME, dir being /dev/mapper, a link to the kernel's node of the mapping with a number. One that is there already stays.
func linkNode(dir, name string, devno uint64, numberOf func(path string) (uint64, bool)) error {
	path := filepath.Join(dir, name)
	if number, ok := numberOf(path); ok && number == devno {
		return nil
	}
	target := fmt.Sprintf("../dm-%d", unix.Minor(devno))
	if number, ok := numberOf(filepath.Join(dir, target)); !ok || number != devno {
		return fmt.Errorf("cannot make the node of %s: the kernel's own, %s, is not there", name, target)
	}
	// Over a stale one, which is there at no moment in between. udev works the same way, and may do so now.
	temporary := filepath.Join(dir, ".#luks-kms-agent-"+name)
	_ = os.Remove(temporary) // of a run that was killed
	if err := os.Symlink(target, temporary); err != nil {
		return fmt.Errorf("cannot make the node of %s: %w", name, err)
	}
	if err := os.Rename(temporary, path); err != nil {
		return fmt.Errorf("cannot make the node of %s: %w", name, err)
	}
	return nil
}

// unlinkNode removes dir/NAME if it is a link that leads nowhere: udev does not know of a mapping that was removed before it
// came to it.
func unlinkNode(dir, name string) {
	path := filepath.Join(dir, name)
	if target, err := os.Readlink(path); err != nil || !strings.HasPrefix(target, "../dm-") {
		return
	}
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		_ = os.Remove(path) // udev may have been quicker
	}
}

// blockNumber is the number of the block device that path leads to.
func blockNumber(path string) (uint64, bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, false
	}
	return st.Rdev, true
}

// IsOpen tells whether there is a mapping NAME, whoever made it.
func IsOpen(name string) bool {
	_, err := kernelMapper().info(name)
	return err == nil
}

// Announce lets udev look at a mapping again. Where the disk could not be read when the mapping was made, udev knows of no filesystem
// on it, and systemd does not take it for a device that can be mounted, also when the disk is well again.
func Announce(name string) error {
	number, ok := blockNumber(filepath.Join(nodeDir, name))
	if !ok {
		return fmt.Errorf("cannot announce %s: %w", name, ErrNotOpen)
	}
	event := fmt.Sprintf("/sys/dev/block/%d:%d/uevent", unix.Major(number), unix.Minor(number))
	if err := os.WriteFile(event, []byte("change"), 0); err != nil {
		return fmt.Errorf("cannot announce %s: %w", name, err)
	}
	return nil
}

// explain turns the kernel's answer to a creation or a resume into one of our errors.
func (dm mapper) explain(err error) error {
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case noControl(err):
		return fmt.Errorf("%w: %w", ErrNoDMCrypt, err)
	case errors.Is(err, unix.EINVAL):
		// An unknown target is EINVAL, like everything else that a table can be wrong in.
		if names, e := dm.targets(); e == nil && !hasType(names, "crypt") {
			return fmt.Errorf("%w: %w", ErrNoDMCrypt, err)
		}
	}
	return fmt.Errorf("cannot map it: %w", err)
}

// noControl: the control node is missing, or nothing is behind it.
func noControl(err error) bool {
	var p *os.PathError
	return errors.As(err, &p) && p.Path == controlNode &&
		(errors.Is(p.Err, unix.ENOENT) || errors.Is(p.Err, unix.ENODEV) || errors.Is(p.Err, unix.ENXIO))
}

// undo removes a mapping that was just made. udev may be looking at it.
func (dm mapper) undo(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return dm.close(ctx, name)
}

// Check reports whether the kernel can map volumes, by [ErrNoDMCrypt] if not. It loads the module dm_crypt, by modprobe, if the kernel
// does not have the target yet. It needs root.
func Check() error {
	if err := checkCrypt(kernelTargets, modprobe); err != nil {
		return fmt.Errorf("cannot find dm-crypt: %w", err)
	}
	return nil
}

func checkCrypt(targets func() ([]string, error), load func() error) error {
	names, err := targets()
	if err == nil && hasType(names, "crypt") {
		return nil
	}
	if err != nil && !noControl(err) {
		return err
	}
	loadErr := load()
	names, err = targets()
	switch {
	case err == nil && hasType(names, "crypt"):
		return nil // whatever modprobe said: the kernel is what counts
	case err != nil && !noControl(err):
		return err
	}
	if err == nil {
		err = errors.New("device-mapper has no target \"crypt\"")
	}
	if loadErr != nil {
		return fmt.Errorf("%w: %w; %w", ErrNoDMCrypt, err, loadErr)
	}
	return fmt.Errorf("%w: %w", ErrNoDMCrypt, err)
}

func modprobe() error {
	program, err := findProgram("modprobe")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "dm_crypt")
	cmd.Env = []string{"LC_ALL=C", "PATH=" + searchPath()}
	var out limited
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("modprobe dm_crypt: %w (%s)", err, out.line())
	}
	return nil
}

// kernelTargets asks device-mapper for the targets that are loaded (DM_LIST_VERSIONS, include/uapi/linux/dm-ioctl.h).
func kernelTargets() ([]string, error) {
	f, err := os.Open(controlNode)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for size := 16 << 10; ; size *= 4 {
		data := make([]byte, size)
		h := (*unix.DmIoctl)(unsafe.Pointer(&data[0]))
		h.Version = [3]uint32{4, 0, 0}
		h.Data_size = uint32(size)
		h.Data_start = unix.SizeofDmIoctl
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.DM_LIST_VERSIONS, uintptr(unsafe.Pointer(&data[0])))
		runtime.KeepAlive(f)
		if errno != 0 {
			return nil, os.NewSyscallError("ioctl(DM_LIST_VERSIONS)", errno)
		}
		if h.Flags&unix.DM_BUFFER_FULL_FLAG != 0 && size < 1<<20 {
			continue
		}
		return targetNames(data[min(h.Data_start, uint32(size)):min(h.Data_size, uint32(size))]), nil
	}
}

// targetNames parses a list of struct dm_target_versions: next (offset from this entry, 0 in the last), version[3], name with NUL.
func targetNames(b []byte) []string {
	const head = 16
	var names []string
	for len(b) > head {
		next := binary.NativeEndian.Uint32(b)
		name := b[head:]
		if end := bytes.IndexByte(name, 0); end >= 0 {
			name = name[:end]
		}
		if len(name) > 0 {
			names = append(names, strings.Clone(string(name)))
		}
		if next <= head || uint64(next) > uint64(len(b)) {
			break
		}
		b = b[next:]
	}
	return names
}
