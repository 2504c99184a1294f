package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// errUnsettled marks a picture whose parts do not fit: a device came or went meanwhile.
var errUnsettled = errors.New("block devices change while they are read")

// sectorSize is the unit of "size" in sysfs, whatever the device's own sectors are
// (Documentation/ABI/stable/sysfs-block).
const sectorSize = 512

// node is one block device of /sys/class/block: a disk, a partition, or something virtual.
type node struct {
	name         string
	dir          string // its directory in sysfs, with the root
	major, minor uint32
	size         int64
	parent       string   // whole disk of a partition, else ""
	slaves       []string // devices that it is built on
	unannounced  bool     // udev was not done with it when it was read
	gone         bool     // one that it was built on was taken away from under it
	file         string   // backing file of a bound loop device, unless that is a block device (then a slave)
	dm           bool
	dmName       string
	dmUUID       string
}

// table is the picture that a scan works on.
type table struct {
	root   string
	nodes  map[string]*node
	byDev  map[[2]uint32]*node
	above  map[string][]string // device -> devices built directly on it
	links  map[string][]string // device -> links to it
	btrfs  map[string][]*node  // filesystem id of each mounted btrfs -> its member devices
	mounts []mount
	swaps  []swap

	uses     map[string][]Use
	pointsOf map[string][]string // device -> mount points of the filesystem directly on it
}

func readTable(root string) (*table, error) {
	t := &table{
		root: root, nodes: map[string]*node{}, byDev: map[[2]uint32]*node{},
		above: map[string][]string{}, links: map[string][]string{}, btrfs: map[string][]*node{},
		uses: map[string][]Use{}, pointsOf: map[string][]string{},
	}
	for _, read := range []func() error{t.readNodes, t.readLoops, t.readAbove, t.readBtrfs, t.readLinks} {
		if err := read(); err != nil {
			return nil, err
		}
	}
	return t, nil
}

func (t *table) readNodes() error {
	dir := t.root + "/sys/class/block"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	nodes, errs := make([]*node, len(entries)), make([]error, len(entries))
	inParallel(len(entries), func(i int) { nodes[i], errs[i] = readNode(filepath.Join(dir, entries[i].Name())) })
	for i, e := range entries {
		if err := errs[i]; err != nil {
			if _, gone := os.Stat(filepath.Join(dir, e.Name())); errors.Is(gone, fs.ErrNotExist) {
				continue // unplugged since the directory was read: no device, no use
			}
			return fmt.Errorf("cannot read device %s: %w", e.Name(), err)
		}
		if n := nodes[i]; n != nil {
			n.unannounced = t.unannounced(n) // before the links are read
			t.nodes[n.name] = n
			t.byDev[[2]uint32{n.major, n.minor}] = n
		}
	}
	return nil
}

// unannounced says whether udev is not done with a device. It keeps a file for each with which it is; where it does not run, no links will come.
func (t *table) unannounced(n *node) bool {
	if _, err := os.Lstat(t.root + "/run/udev/control"); err != nil {
		return false
	}
	_, err := os.Lstat(fmt.Sprintf("%s/run/udev/data/b%d:%d", t.root, n.major, n.minor))
	return err != nil
}

// inParallel does something for each of n, on all processors.
func inParallel(n int, do func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				do(i)
			}
		})
	}
	wg.Wait()
}

// readNode returns nil for a hidden device: an NVMe path node has no device number and cannot be
// opened; the namespace it leads to is listed by itself.
func readNode(dir string) (*node, error) {
	n := &node{name: filepath.Base(dir), dir: dir}
	if hidden, err := readOptional(dir + "/hidden"); err != nil || hidden == "1" {
		return nil, err
	}
	dev, err := readTrimmed(dir + "/dev")
	if err != nil {
		return nil, err
	}
	if n.major, n.minor, err = parseDev(dev); err != nil {
		return nil, err
	}
	sectors, err := readNumber(dir + "/size")
	if err != nil {
		return nil, err
	}
	n.size = int64(sectors) * sectorSize

	// A partition's directory lies in that of its disk; only partitions have the file "partition".
	if _, err := os.Stat(dir + "/partition"); err == nil {
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return nil, err
		}
		n.parent = filepath.Base(filepath.Dir(real))
		return n, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if n.slaves, err = readNames(dir + "/slaves"); err != nil {
		return nil, err
	}
	if n.dm = strings.HasPrefix(n.name, "dm-"); n.dm {
		if n.dmName, err = readTrimmed(dir + "/dm/name"); err != nil {
			return nil, err
		}
		if n.dmUUID, err = readTrimmed(dir + "/dm/uuid"); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// readLoops finds what loop devices, and zram devices with write-back, lie on. The kernel keeps no
// slaves or holders for either.
func (t *table) readLoops() error {
	for _, n := range t.nodes {
		var file string
		var err error
		switch {
		case n.parent != "":
		case strings.HasPrefix(n.name, "loop"):
			file, err = readOptional(n.dir + "/loop/backing_file")
		case strings.HasPrefix(n.name, "zram"):
			if file, err = readOptional(n.dir + "/backing_dev"); file == "none" {
				file = ""
			}
		}
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			err = nil // unbound since
		}
		if err != nil {
			return fmt.Errorf("cannot read what %s is backed by: %w", n.name, err)
		}
		if file == "" {
			continue
		}
		under, err := t.nodeAt(file)
		if err != nil {
			return fmt.Errorf("cannot tell what %s is backed by: %w", n.name, err)
		}
		if under != nil {
			n.slaves = append(n.slaves, under.name)
		} else {
			n.file = strings.TrimSuffix(file, " (deleted)")
		}
	}
	return nil
}

// readAbove joins slaves and holders, which say the same from both ends, so that either suffices.
func (t *table) readAbove() error {
	for _, n := range t.nodes {
		if n.parent != "" && t.nodes[n.parent] == nil {
			return fmt.Errorf("cannot find the disk %s of partition %s: %w", n.parent, n.name, errUnsettled)
		}
		holders, err := readNames(n.dir + "/holders")
		if errors.Is(err, fs.ErrNotExist) {
			if _, gone := os.Stat(n.dir); gone != nil {
				err = fmt.Errorf("%w: %w", errUnsettled, err)
			}
		}
		if err != nil {
			return fmt.Errorf("cannot read what is built on %s: %w", n.name, err)
		}
		for _, above := range holders {
			t.addAbove(n.name, above) // counts even where the holder itself is unknown
			if h := t.nodes[above]; h != nil && !slices.Contains(h.slaves, n.name) {
				h.slaves = append(h.slaves, n.name)
			}
		}
		n.slaves = slices.DeleteFunc(n.slaves, func(under string) bool {
			gone := (n.dm || n.isArray()) && t.nodes[under] == nil && dangling(n.dir+"/slaves/"+under)
			n.gone = n.gone || gone
			return gone
		})
		for _, under := range n.slaves {
			if t.nodes[under] == nil {
				return fmt.Errorf("cannot find %s, which %s is built on: %w", under, n.name, errUnsettled)
			}
			t.addAbove(under, n.name)
		}
	}
	for _, names := range t.above {
		slices.SortFunc(names, naturalCompare)
	}
	// What is on a stripe is gone with one of its disks.
	for _, n := range t.nodes {
		for _, above := range t.above[n.name] {
			if up := t.nodes[above]; n.isArray() && n.gone && up != nil && up.dm {
				up.gone = true
			}
		}
	}
	return nil
}

// dangling says whether a link leads nowhere. device-mapper and md keep a disk open that was taken away, and the link to it: the
// kernel gives neither its name nor its number to another disk before the mapping is removed.
func dangling(link string) bool {
	info, err := os.Lstat(link)
	if err != nil || info.Mode()&fs.ModeSymlink == 0 {
		return false
	}
	_, err = os.Stat(link)
	return errors.Is(err, fs.ErrNotExist)
}

func (t *table) addAbove(under, above string) {
	if !slices.Contains(t.above[under], above) {
		t.above[under] = append(t.above[under], above)
	}
}

// readBtrfs reads the members of mounted btrfs filesystems: mountinfo names only one of them.
func (t *table) readBtrfs() error {
	dir := t.root + "/sys/fs/btrfs"
	ids, err := readNames(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, id := range ids {
		members, err := readNames(filepath.Join(dir, id, "devices"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			continue // "features", or unmounted since
		}
		if err != nil {
			return err
		}
		for _, name := range members {
			n := t.nodes[name]
			if n == nil {
				return fmt.Errorf("cannot find %s, a member of btrfs %s: %w", name, id, errUnsettled)
			}
			t.btrfs[id] = append(t.btrfs[id], n)
		}
	}
	return nil
}

// readLinks resolves the links in /dev and /dev/disk/by-*. It must not lose one: the
// configuration may exclude a disk by it.
func (t *table) readLinks() error {
	dirs := []string{"/dev"}
	kinds, err := readNames(t.root + "/dev/disk")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, kind := range kinds {
		dirs = append(dirs, "/dev/disk/"+kind)
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(t.root + dir)
		if errors.Is(err, fs.ErrNotExist) && dir != "/dev" {
			continue // udev took the last link out
		}
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.Type()&fs.ModeSymlink == 0 {
				continue
			}
			link := dir + "/" + e.Name()
			n, err := t.nodeAt(link)
			if errors.Is(err, unix.ELOOP) {
				continue // leads nowhere
			}
			if err != nil {
				return err
			}
			if n != nil {
				t.links[n.name] = append(t.links[n.name], link)
			}
		}
	}
	return nil
}

// nodeAt returns the block device that a path leads to, nil where it leads to none. In /dev the kernel
// name and the device-mapper name count too, so that a missing node or link does not hide a device.
func (t *table) nodeAt(path string) (*node, error) {
	real, err := t.resolve(path)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	switch err := unix.Stat(t.root+real, &st); {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK:
		return t.byDev[[2]uint32{unix.Major(st.Rdev), unix.Minor(st.Rdev)}], nil
	case err == nil && t.root == "":
		return nil, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR):
		return nil, &fs.PathError{Op: "stat", Path: real, Err: err}
	}
	if name, ok := strings.CutPrefix(real, "/dev/mapper/"); ok {
		for _, n := range t.nodes {
			if n.dm && n.dmName == name {
				return n, nil
			}
		}
	}
	if name, ok := strings.CutPrefix(real, "/dev/"); ok {
		return t.nodes[strings.ReplaceAll(name, "/", "!")], nil
	}
	return nil, nil
}

// resolve follows symbolic links within the root and keeps a tail that does not exist.
func (t *table) resolve(path string) (string, error) {
	done, rest := "/", strings.Split(path, "/")
	for hops := 0; len(rest) > 0; {
		next := filepath.Join(done, rest[0]) // cleans "", "." and ".."
		rest = rest[1:]
		info, err := os.Lstat(t.root + next)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return filepath.Join(append([]string{next}, rest...)...), nil
		}
		if err != nil {
			return "", err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			done = next
			continue
		}
		if hops++; hops > 40 { // the kernel's own limit, MAXSYMLINKS
			return "", &fs.PathError{Op: "resolve", Path: path, Err: unix.ELOOP}
		}
		target, err := os.Readlink(t.root + next)
		if err != nil {
			return "", err
		}
		if filepath.IsAbs(target) {
			done = "/"
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return done, nil
}

func (t *table) exists(path string) bool {
	real, err := t.resolve(path)
	if err != nil {
		return false
	}
	_, err = os.Lstat(t.root + real)
	return err == nil
}

// path is the device's node; a "!" in sysfs stands for "/" (cciss!c0d0).
func (n *node) path() string { return "/dev/" + strings.ReplaceAll(n.name, "!", "/") }

// hasPrefix reports whether the name is one of the prefixes followed by a number.
func (n *node) hasPrefix(prefixes ...string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool {
		rest, ok := strings.CutPrefix(n.name, p)
		return ok && digits(rest) != ""
	})
}

func onlyNamed(name string) bool {
	n := node{name: name}
	return n.hasPrefix("loop", "nbd")
}

// whyNotListed says why a node is not a device that this package offers, "" if it is one.
func (n *node) whyNotListed() string {
	switch {
	case n.parent != "":
		return "is a partition of " + n.parent + ", not a whole disk"
	case n.dm:
		return "is a device-mapper device (" + n.dmName + "), not a disk"
	case n.isArray():
		return "is an md array, not a disk"
	case n.hasPrefix("zram", "ram"):
		return "is a memory device, not a disk"
	case n.hasPrefix("sr", "fd"):
		return "is a CD or floppy drive"
	case n.size == 0:
		return "has no size: nothing is attached to it"
	}
	return ""
}

func (n *node) listed() bool { return n.whyNotListed() == "" }

// readDiskFacts fills in what only whole disks have.
func (n *node) readDiskFacts(d *Device) error {
	var err error
	fail := func(what string, err error) error {
		return fmt.Errorf("cannot read %s of %s: %w", what, n.name, err)
	}
	ro, err := readTrimmed(n.dir + "/ro")
	if err != nil {
		return fail("the write protection", err)
	}
	d.ReadOnly = ro != "0"
	if d.DiskSeq, err = optionalNumber(n.dir+"/diskseq", 0); err != nil {
		return fail("the disk sequence number", err)
	}
	sector, err := optionalNumber(n.dir+"/queue/logical_block_size", sectorSize)
	if err != nil {
		return fail("the sector size", err)
	}
	d.LogicalSectorSize = int(sector)
	rotational, err := optionalNumber(n.dir+"/queue/rotational", 0)
	if err != nil {
		return fail("the kind", err)
	}
	d.Rotational = rotational != 0
	if d.Model, err = readOptional(n.dir + "/device/model"); err != nil {
		return fail("the model", err)
	}
	if d.Serial, err = readSerial(n.dir); err != nil {
		return fail("the serial", err)
	}
	return nil
}

// readSerial looks where NVMe, virtio and SCSI disks keep their serial.
func readSerial(dir string) (string, error) {
	for _, file := range []string{"/device/serial", "/serial"} {
		if s, err := readOptional(dir + file); err != nil || s != "" {
			return s, err
		}
	}
	page, err := os.ReadFile(dir + "/device/vpd_pg80") // SPC: unit serial number after a header of 4 bytes
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EINVAL) || err == nil && len(page) < 4 {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return strings.Trim(string(page[4:]), " \x00"), nil
}

// readTrimmed reads a file of sysfs: those end within a page. os.ReadFile needs twice as many system calls, and there are hundreds of files.
func readTrimmed(path string) (string, error) {
	fail := func(op string, err error) (string, error) { return "", &fs.PathError{Op: op, Path: path, Err: err} }
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", err)
	}
	defer unix.Close(fd)
	var page [4096]byte
	n, err := unix.Read(fd, page[:])
	if err != nil {
		return fail("read", err)
	}
	return strings.Trim(string(page[:n]), " \t\r\n\x00"), nil
}

// readOptional gives "" for a file that does not exist, and only for that.
func readOptional(path string) (string, error) {
	s, err := readTrimmed(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return "", nil
	}
	return s, err
}

func readNumber(path string) (uint64, error) {
	s, err := readTrimmed(path)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseUint(s, 10, 54)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

func optionalNumber(path string, absent uint64) (uint64, error) {
	v, err := readNumber(path)
	if errors.Is(err, fs.ErrNotExist) {
		return absent, nil
	}
	return v, err
}

func readNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func parseDev(s string) (major, minor uint32, err error) {
	a, b, ok := strings.Cut(s, ":")
	x, errX := strconv.ParseUint(a, 10, 32)
	y, errY := strconv.ParseUint(b, 10, 32)
	if !ok || errX != nil || errY != nil {
		return 0, 0, fmt.Errorf("%q is not a device number", s)
	}
	return uint32(x), uint32(y), nil
}
