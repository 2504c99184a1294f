package volumes

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// systemPaths are what a node cannot live without; their disks are never data volumes.
func systemPaths(stateDir string) []string {
	paths := []string{"/", "/boot", "/boot/efi", "/usr", "/var"}
	if stateDir != "" {
		paths = append(paths, filepath.Clean("/"+stateDir))
	}
	return paths
}

// origin is a block device that a filesystem stores its data on.
type origin struct {
	node *node
	via  string // how the filesystem comes to be there, where that is not plain
}

// findUses fills in who uses which device.
func (t *table) findUses(stateDir string) error {
	// Paths first, mounts after: walking a path lets automounts happen.
	paths := systemPaths(stateDir)
	resolved := make([]string, len(paths))
	for i, path := range paths {
		var err error
		if resolved[i], err = t.resolve(path); err != nil {
			return fmt.Errorf("cannot resolve %s: %w", path, err)
		}
	}
	var err error
	if t.mounts, err = readMounts(t.root + "/proc/self/mountinfo"); err != nil {
		return err
	}
	if t.swaps, err = readSwaps(t.root + "/proc/swaps"); err != nil {
		return err
	}
	system := map[int]bool{} // mounts that are accounted for as system
	for i, path := range paths {
		mounts := t.mountsOf(resolved[i])
		if len(mounts) == 0 {
			return fmt.Errorf("cannot tell which disk holds %s: no mount for it in mountinfo", path)
		}
		for _, m := range mounts {
			if system[m.id] {
				continue
			}
			system[m.id] = true
			if err := t.markMount(m, UseSystem, path); err != nil {
				return err
			}
		}
	}
	if err := t.findSwap(); err != nil {
		return err
	}
	for _, m := range t.mounts {
		if err := t.findMounted(m, system[m.id]); err != nil {
			return err
		}
	}
	for id, members := range t.btrfs {
		for _, n := range members {
			// Mounted where we cannot see it, or named by mountinfo through another member.
			if !slices.ContainsFunc(t.uses[n.name], func(u Use) bool { return u.Kind != UseSwap }) {
				t.mark(n, Use{UseMounted, "btrfs " + id, fmt.Sprintf("the mounted btrfs %s is on %s", id, n.describe())})
			}
		}
	}
	t.findHolders()
	return nil
}

func (t *table) findSwap() error {
	for _, s := range t.swaps {
		fail := func(err error) error { return fmt.Errorf("cannot tell which disk holds swap %s: %w", s.path, err) }
		if s.file {
			path, err := t.resolve(s.path)
			if err != nil {
				return fail(err)
			}
			mounts := t.mountsOf(path)
			if len(mounts) == 0 {
				return fail(fmt.Errorf("no mount for it in mountinfo"))
			}
			for _, m := range mounts {
				if err := t.markMount(m, UseSwap, s.path); err != nil {
					return err
				}
			}
			continue
		}
		n, err := t.nodeAt(s.path)
		if err != nil {
			return fail(err)
		}
		if n == nil {
			return fail(errUnsettled)
		}
		if err := t.mark(n, Use{UseSwap, s.path, "swap is on " + n.describe()}); err != nil {
			return fail(err)
		}
		t.pointsOf[n.name] = append(t.pointsOf[n.name], SwapPoint)
	}
	return nil
}

// findMounted records any mount; done is true for those that already count as system.
func (t *table) findMounted(m mount, done bool) error {
	if m.fstype == "overlay" {
		return nil // stores nothing itself; the mounts of its layers are listed too
	}
	origins, err := t.under(m, nil)
	if err != nil {
		if m.fstype == "btrfs" || m.fstype == "bcachefs" {
			return err // on a disk for certain, and no device number that would tell which
		}
		// Any other without a disk's number: not a filesystem of the disks here. A disk's number that no
		// device has: a mount that outlived its disk. A log or realtime section that is not found: the disk of the
		// filesystem is in use all the same.
	}
	for _, o := range origins {
		if !slices.Contains(t.pointsOf[o.node.name], m.point) {
			t.pointsOf[o.node.name] = append(t.pointsOf[o.node.name], m.point)
		}
	}
	if done {
		return nil
	}
	for _, o := range origins {
		use := Use{UseMounted, m.point, fmt.Sprintf("%s is%s on %s", m.point, o.via, o.node.describe())}
		// The error is of a loop device whose file cannot be traced; the disk of that file is mounted and
		// so is found by its own mount.
		_ = t.mark(o.node, use)
	}
	return nil
}

func (t *table) findHolders() {
	for _, n := range t.sorted() {
		disk, suffix := n.name, ""
		if n.parent != "" {
			disk, suffix = n.parent, ", a partition of "+n.parent
			t.addUse(disk, Use{UsePartitioned, n.name, n.name + " is a partition of " + disk})
		}
		for _, above := range t.above[n.name] {
			words := above
			if h := t.nodes[above]; h != nil && h.dm {
				words += " (" + h.dmName + ")"
			}
			t.addUse(disk, Use{UseHeld, above, words + " is built on " + n.name + suffix})
		}
	}
}

// markMount records that the filesystem of m holds what, down to the disks. Here an unknown is an error.
func (t *table) markMount(m mount, kind UseKind, what string) error {
	origins, err := t.under(m, nil)
	if err != nil {
		return fmt.Errorf("cannot tell which disk holds %s: %w", what, err)
	}
	subject := what
	if what != m.point {
		subject += " (in the filesystem mounted on " + m.point + ")"
	}
	if kind == UseSwap {
		subject = "swap file " + subject
	}
	for _, o := range origins {
		use := Use{kind, what, fmt.Sprintf("%s is%s on %s", subject, o.via, o.node.describe())}
		if err := t.mark(o.node, use); err != nil {
			return fmt.Errorf("cannot tell which disk holds %s: %w", what, err)
		}
	}
	return nil
}

// mark adds the use to a device and to everything below it, with the chain as evidence. It marks
// all it can reach even if it returns an error.
func (t *table) mark(n *node, use Use) error {
	return t.markDown(n, use, nil)
}

func (t *table) markDown(n *node, use Use, path []*node) error {
	if slices.Contains(path, n) {
		return fmt.Errorf("%s lies on itself", n.name)
	}
	path = append(path, n)
	t.addUse(n.name, use)

	var failed error
	down := func(below *node, words string) {
		next := use
		next.Evidence += words
		if err := t.markDown(below, next, path); err != nil {
			failed = err
		}
	}
	if n.parent != "" {
		down(t.nodes[n.parent], ", a partition of "+n.parent)
	}
	for _, s := range n.slaves {
		down(t.nodes[s], ", built on "+s)
	}
	if n.file != "" {
		mounts := t.mountsOf(n.file)
		if len(mounts) == 0 {
			failed = fmt.Errorf("no mount in mountinfo for %s, the file of %s", n.file, n.name)
		}
		for _, m := range mounts {
			origins, err := t.under(m, nil)
			if err != nil {
				failed = err
			}
			for _, o := range origins {
				down(o.node, fmt.Sprintf(", a loop over the file %s on %s", n.file, o.node.name))
			}
		}
	}
	return failed
}

// addUse keeps the first evidence for each kind and object.
func (t *table) addUse(device string, use Use) {
	same := func(u Use) bool { return u.Kind == use.Kind && u.What == use.What }
	if !slices.ContainsFunc(t.uses[device], same) {
		t.uses[device] = append(t.uses[device], use)
	}
}

// mountsOf returns the mounts at the longest mount point that path lies in. One point can carry several
// mounts, one over the other: all of them count.
func (t *table) mountsOf(path string) []mount {
	var found []mount
	for _, m := range t.mounts {
		inside := m.point == "/" || path == m.point || strings.HasPrefix(path, m.point+"/")
		if !inside || len(found) > 0 && len(m.point) < len(found[0].point) {
			continue
		}
		if len(found) > 0 && len(m.point) > len(found[0].point) {
			found = nil
		}
		found = append(found, m)
	}
	return found
}

// diskless are the filesystems that store nothing on a block device of this machine.
func diskless(fstype string) bool {
	switch fstype {
	case "tmpfs", "ramfs", "rootfs", "devtmpfs", "autofs", // memory, or a trigger
		"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "9p", "virtiofs": // somewhere else
		return true
	}
	return false
}

// under returns the block devices that the filesystem of m is on, none if it needs none; it is an error if
// that cannot be told, and then those that can be come with it. over are the overlays that led here.
func (t *table) under(m mount, over []int) ([]origin, error) {
	unknown := fmt.Errorf("cannot find the devices of %s (%s on %q, %d:%d)", m.point, m.fstype, m.source, m.major, m.minor)
	if m.major != 0 {
		n := t.byDev[[2]uint32{m.major, m.minor}]
		if n == nil {
			return nil, fmt.Errorf("%w: %w", unknown, errUnsettled)
		}
		origins := []origin{{node: n}}
		for _, external := range append(m.option("logdev"), m.option("rtdev")...) { // of xfs
			n, err := t.nodeAt(external)
			if err != nil || n == nil {
				return origins, fmt.Errorf("%w: %s: %w", unknown, external, orUnsettled(err))
			}
			origins = append(origins, origin{n, " with a log or realtime section"})
		}
		return origins, nil
	}
	switch {
	case diskless(m.fstype):
		return nil, nil
	case m.fstype == "overlay":
		return t.underOverlay(m, append(over, m.id))
	case m.fstype == "btrfs":
		return t.underBtrfs(m, unknown)
	}
	var origins []origin
	for _, source := range strings.Split(m.source, ":") { // bcachefs names all its members so
		if !strings.HasPrefix(source, "/dev/") {
			return nil, unknown
		}
		n, err := t.nodeAt(source)
		if err != nil || n == nil {
			return nil, fmt.Errorf("%w: %w", unknown, orUnsettled(err))
		}
		origins = append(origins, origin{node: n})
	}
	return origins, nil
}

func orUnsettled(err error) error {
	if err == nil {
		return errUnsettled
	}
	return err
}

// underBtrfs finds the filesystem by the member that mountinfo names. Where it names none that exists
// (/dev/root), the members of every mounted btrfs count: one of them it is.
func (t *table) underBtrfs(m mount, unknown error) ([]origin, error) {
	named, err := t.nodeAt(m.source)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", unknown, err)
	}
	var origins []origin
	for _, members := range t.btrfs {
		if named == nil || slices.Contains(members, named) {
			for _, n := range members {
				origins = append(origins, origin{node: n})
			}
		}
	}
	if len(origins) == 0 && named != nil {
		origins = []origin{{node: named}}
	}
	if len(origins) == 0 {
		return nil, unknown
	}
	return origins, nil
}

// underOverlay finds the mounts of all layers. A layer that was mounted before the root was switched
// may not be visible any more, and then nobody can say which disk it is on.
func (t *table) underOverlay(m mount, over []int) ([]origin, error) {
	layers := append(m.option("upperdir"), m.option("workdir")...)
	for _, lower := range m.option("lowerdir") {
		layers = append(layers, splitEscaped(lower)...)
	}
	layers = append(layers, append(m.option("lowerdir+"), m.option("datadir+")...)...)
	if len(layers) == 0 {
		return nil, fmt.Errorf("cannot find the layers of the overlay on %s", m.point)
	}
	var origins []origin
	for _, layer := range layers {
		hidden := fmt.Errorf("cannot find layer %s of the overlay on %s", layer, m.point)
		if !filepath.IsAbs(layer) || !t.exists(layer) {
			return nil, hidden
		}
		path, err := t.resolve(layer)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", hidden, err)
		}
		mounts := slices.DeleteFunc(t.mountsOf(path), func(m mount) bool { return slices.Contains(over, m.id) })
		if len(mounts) == 0 {
			return nil, hidden
		}
		for _, below := range mounts {
			found, err := t.under(below, over)
			if err != nil {
				return nil, err
			}
			for _, o := range found {
				o.via = ", through its overlay layer " + layer + ","
				origins = append(origins, o)
			}
		}
	}
	return origins, nil
}

// describe names a device as evidence does.
func (n *node) describe() string {
	if n.dm {
		return fmt.Sprintf("/dev/mapper/%s (%s, %d:%d)", n.dmName, n.name, n.major, n.minor)
	}
	return fmt.Sprintf("%s (%d:%d)", n.path(), n.major, n.minor)
}

// sorted gives the nodes in natural order, so that uses come out the same every time.
func (t *table) sorted() []*node {
	nodes := make([]*node, 0, len(t.nodes))
	for _, n := range t.nodes {
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b *node) int { return naturalCompare(a.name, b.name) })
	return nodes
}
