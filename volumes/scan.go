package volumes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Class says how a device came to be a data volume; "" means that it is none.
type Class string

const (
	ClassInstanceStore Class = "instance-store" // local disk of the EC2 host, blank after stop/start
	ClassEBS           Class = "ebs"            // Elastic Block Store volume
	ClassExplicit      Class = "explicit"       // named in the configuration, and neither of the above
)

// UseKind groups what depends on a device.
type UseKind string

const (
	UseSystem      UseKind = "system"      // holds /, /boot, /boot/efi, /usr, /var or the state directory
	UseSwap        UseKind = "swap"        // holds active swap, as a device or in a file
	UseMounted     UseKind = "mounted"     // holds any other mounted filesystem
	UseHeld        UseKind = "held"        // another block device is built on it
	UsePartitioned UseKind = "partitioned" // the kernel shows partitions on it
)

// Use is one thing that depends on a device.
type Use struct {
	Kind     UseKind
	What     string // "/boot", "/data", "dm-3", "nvme0n1p1"
	Evidence string // "/ is on /dev/nvme0n1p1 (259:2), a partition of nvme0n1"
}

// Mapping is a device-mapper device directly on a device.
type Mapping struct {
	Name   string   // as in /dev/mapper
	UUID   string   // of device mapper; a LUKS2 mapping's begins with "CRYPT-LUKS2-"
	Kernel string   // "dm-3"
	Mounts []string // mount points of it; [SwapPoint] where it is active swap
}

// SwapPoint stands where a mount point would for active swap, as in lsblk's output.
const SwapPoint = "[SWAP]"

// Device is a whole disk, a stripe of ours over some, or a loop device that the configuration names.
type Device struct {
	Name, Path        string // "nvme1n1", "/dev/nvme1n1"
	Major, Minor      uint32
	DiskSeq           uint64 // unique per attached disk and boot; 0 where the kernel has none (before 5.15)
	Size              int64  // bytes
	LogicalSectorSize int    // bytes
	Rotational        bool
	ReadOnly          bool
	Model, Serial     string // as sysfs shows, trimmed

	Class Class
	// Identity names the volume across boots, as far as anything does: the volume id (vol-…) of
	// EBS, the serial of NVMe instance store, the block device mapping's name on Xen, the UUID of a stripe, and for explicit
	// devices the serial or, without one, the configured name.
	Identity string
	// EC2Name is the block device mapping's name ("sdf") that the NVMe controller tells, or "".
	EC2Name string
	// Shared says that the NVMe namespace may be attached to several controllers, as a Multi-Attach EBS volume is. It is a
	// hint: targets other than EC2's may say it of any namespace.
	Shared bool
	// Named is the configured name that this device matched. A named EC2 volume keeps its EC2 class.
	Named string
	Links []string // links in /dev and /dev/disk/by-* that resolve to it
	// Unannounced says that udev was not done with it, so that there may be links that are not in Links.
	Unannounced bool

	Member  Member   // of an instance-store disk: the stripe that it is part of
	Members []string // of a stripe: the kernel names of its disks

	Uses     []Use // everything found; none means free
	Mappings []Mapping

	root string // the Scanner's, for Hold
}

// Is reports whether name means this device: its path or kernel name, a link to it, its
// serial, its volume id, or the configured name that Scan resolved to it. Matches are exact.
func (d Device) Is(name string) bool {
	if name == "" {
		return false
	}
	if filepath.IsAbs(name) {
		clean := filepath.Clean(name)
		return clean == d.Path || slices.Contains(d.Links, clean) || name == d.Named
	}
	return name == d.Name || name == d.Serial || name == d.Named ||
		strings.HasPrefix(name, "vol-") && name == d.Identity
}

// Missing is a configured name for which there is no usable device.
type Missing struct{ Name, Reason string }

// Scan is a picture of the machine's disks at one moment.
type Scan struct {
	Devices []Device // in natural order of the kernel name: nvme2n1 before nvme10n1
	Missing []Missing
	// Gone are the mappings whose disk was taken away from under them.
	Gone []Mapping
}

// Scanner says where to look and what the configuration adds. The zero value scans the machine.
type Scanner struct {
	Root      string   // prefix of /sys, /proc and /dev; "" is the machine itself
	StateDir  string   // its disk counts as UseSystem; need not exist yet
	Named     []string // configured paths, links, kernel names, serials and volume ids
	Ephemeral []string // values of ephemeralN in IMDS's block-device-mapping ("sdb"); needed on Xen only
}

// Scan lists the disks with everything that uses them. It reads only. Any failure that could hide
// a use of a disk is returned as an error: then nothing is known to be free.
//
// Left out: hidden NVMe path nodes, loop and nbd devices unless named, zram, ram, device-mapper, md but for stripes of
// ours, CD and floppy devices, and whatever has no size.
func (s Scanner) Scan(ctx context.Context) (Scan, error) {
	root := filepath.Clean("/" + s.Root)
	if root == "/" {
		root = ""
	}
	t, err := s.read(ctx, root)
	if err != nil {
		return Scan{}, fmt.Errorf("cannot scan block devices: %w", err)
	}
	var disks []*node
	for _, n := range t.nodes {
		if n.listed() {
			disks = append(disks, n)
		}
	}
	slices.SortFunc(disks, func(a, b *node) int { return naturalCompare(a.name, b.name) })

	var scan Scan
	scan.Devices = make([]Device, len(disks))
	errs := make([]error, len(disks))
	inParallel(len(disks), func(i int) {
		if errs[i] = ctx.Err(); errs[i] == nil {
			scan.Devices[i], errs[i] = t.device(disks[i], s.Ephemeral)
		}
	})
	for _, err := range errs {
		if err != nil {
			return Scan{}, fmt.Errorf("cannot scan block devices: %w", err)
		}
	}
	if scan.Devices, err = t.stripes(scan.Devices); err != nil {
		return Scan{}, fmt.Errorf("cannot scan block devices: %w", err)
	}
	if scan.Missing, err = t.name(scan.Devices, s.Named); err != nil {
		return Scan{}, fmt.Errorf("cannot scan block devices: %w", err)
	}
	scan.Devices = slices.DeleteFunc(scan.Devices, func(d Device) bool {
		return d.Named == "" && onlyNamed(d.Name)
	})
	for _, n := range t.sorted() {
		if n.gone && n.dm {
			scan.Gone = append(scan.Gone, t.mapping(n))
		}
	}
	return scan, nil
}

// read takes the picture. Devices come and go while a node boots, so a picture that does not fit
// together is taken again before it counts as an error.
func (s Scanner) read(ctx context.Context, root string) (*table, error) {
	for try := 1; ; try++ {
		t, err := readTable(root)
		if err == nil {
			err = t.findUses(s.StateDir)
		}
		if err == nil {
			return t, nil
		}
		if try == 10 || !errors.Is(err, errUnsettled) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// device gathers the facts of one disk.
func (t *table) device(n *node, ephemeral []string) (Device, error) {
	d := Device{
		Name: n.name, Path: n.path(), Major: n.major, Minor: n.minor, Size: n.size,
		Links: t.links[n.name], Unannounced: n.unannounced, Uses: t.uses[n.name], root: t.root,
	}
	if err := n.readDiskFacts(&d); err != nil {
		return Device{}, err
	}
	classify(&d, ephemeral)
	if d.Class != "" && strings.HasPrefix(d.Name, "nvme") {
		d.EC2Name, d.Shared = askNVMe(t.root + d.Path)
	}
	for _, above := range t.above[n.name] {
		if dm := t.nodes[above]; dm != nil && dm.dm {
			d.Mappings = append(d.Mappings, t.mapping(dm))
		}
	}
	return d, nil
}

func (t *table) mapping(dm *node) Mapping {
	return Mapping{Name: dm.dmName, UUID: dm.dmUUID, Kernel: dm.name, Mounts: t.pointsOf[dm.name]}
}

// name matches the configured names to devices. A name that could mean two devices, or a device
// with two names, is a mistake in the configuration and is not guessed at.
func (t *table) name(devices []Device, names []string) ([]Missing, error) {
	var missing []Missing
	for _, name := range names {
		i, reason, err := t.match(devices, name)
		switch {
		case err != nil:
			return nil, err
		case reason == "" && devices[i].Named != "":
			reason = fmt.Sprintf("is %s, which is named already as %s", devices[i].Name, devices[i].Named)
			fallthrough
		case reason != "":
			missing = append(missing, Missing{Name: name, Reason: reason})
			continue
		}
		d := &devices[i]
		d.Named = name
		if d.Class == "" {
			d.Class = ClassExplicit
			d.Identity = cmp.Or(d.Serial, name)
		}
	}
	return missing, nil
}

// match returns the index of the one device that name means, or why there is none.
func (t *table) match(devices []Device, name string) (int, string, error) {
	var n *node
	if filepath.IsAbs(name) {
		var err error
		if n, err = t.nodeAt(name); err != nil {
			return 0, "", err
		}
		if n == nil {
			if t.exists(name) {
				return 0, "is not a block device", nil
			}
			return 0, "does not exist", nil
		}
	} else {
		var found []int
		for i, d := range devices {
			if d.Is(name) {
				found = append(found, i)
			}
		}
		switch len(found) {
		case 1:
			return found[0], "", nil
		case 0:
			if n = t.nodes[name]; n == nil {
				return 0, "is no kernel name, serial or volume id of a device here", nil
			}
		default:
			return 0, fmt.Sprintf("means both %s and %s", devices[found[0]].Name, devices[found[1]].Name), nil
		}
	}
	i := slices.IndexFunc(devices, func(d Device) bool { return d.Name == n.name })
	if i < 0 {
		return 0, n.whyNotListed(), nil
	}
	return i, "", nil
}

// naturalCompare orders kernel names as people do: numbers by value, and sdz before sdaa.
func naturalCompare(a, b string) int {
	for _, prefix := range []string{"xvd", "sd", "vd", "hd"} {
		x, okA := strings.CutPrefix(a, prefix)
		y, okB := strings.CutPrefix(b, prefix)
		if okA && okB {
			if c := len(letters(x)) - len(letters(y)); c != 0 {
				return c
			}
		}
	}
	for a != "" && b != "" {
		x, y := digits(a), digits(b)
		if x == "" || y == "" {
			if a[0] != b[0] {
				return cmp.Compare(a[0], b[0])
			}
			a, b = a[1:], b[1:]
			continue
		}
		a, b = a[len(x):], b[len(y):]
		x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
		if c := cmp.Or(len(x)-len(y), strings.Compare(x, y)); c != 0 {
			return c
		}
	}
	return len(a) - len(b)
}

func digits(s string) string { return s[:len(s)-len(strings.TrimLeft(s, "0123456789"))] }
func letters(s string) string {
	return s[:len(s)-len(strings.TrimLeft(s, "abcdefghijklmnopqrstuvwxyz"))]
}
