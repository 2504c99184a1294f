package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// direct mounts with mount(2), where systemd learns of it from the kernel and orders the mount by a drop-in that lies there before. A
// job of systemd's would wait for udev, fork and run mount(8): with many volumes that takes longer than to open them.
type direct struct {
	dropIns string   // where drop-ins of the runtime go
	units   []string // where unit files lie
	mount   func(source, target, fstype string) error
	unmount func(target string) error
	// mounted tells whether path is a mount point.
	mounted func(path string) (bool, error)
	// loaded are the mount units that systemd has in memory, stubs for what does not exist included. The error says that systemd is
	// too old for this.
	loaded func() (map[string]bool, error)
}

const (
	// runtimeDir is the administrator's directory of units for this boot (systemd.unit(5)).
	runtimeDir = "/run/systemd/system"
	dropInName = "50-luks-kms-agent.conf"

	// leastVersion is the first systemd that sees new files in its directories without a reload (its NEWS, version 246; the units are
	// those of 245).
	leastVersion = 246
)

// unitDirs is systemd.unit(5)'s "System Unit Search Path".
var unitDirs = []string{
	"/etc/systemd/system.control", "/run/systemd/system.control", "/run/systemd/transient", "/run/systemd/generator.early",
	"/etc/systemd/system", "/etc/systemd/system.attached", runtimeDir, "/run/systemd/system.attached", "/run/systemd/generator",
	"/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system", "/run/systemd/generator.late",
}

// newDirect returns nil where a mount of ours would not be the host's: in another mount namespace.
func newDirect(c conn) *direct {
	ours, err := os.Readlink("/proc/self/ns/mnt")
	hosts, hostErr := os.Readlink("/proc/1/ns/mnt")
	if err != nil || hostErr != nil || ours != hosts {
		return nil
	}
	return &direct{
		dropIns: runtimeDir,
		units:   unitDirs,
		mount: func(source, target, fstype string) error {
			return os.NewSyscallError("mount", unix.Mount(source, target, fstype, 0, ""))
		},
		unmount: func(target string) error {
			return os.NewSyscallError("umount", unix.Unmount(target, unix.UMOUNT_NOFOLLOW))
		},
		mounted: isMountPoint,
		loaded:  sync.OnceValues(func() (map[string]bool, error) { return loadedMounts(c) }),
	}
}

// loadedMounts asks systemd once for all mount units that it knows: they are few, and a volume's is not among them.
func loadedMounts(c conn) (map[string]bool, error) {
	text, err := c.GetManagerProperty("Version") // "252 (252.39-1)", as a quoted string
	if err != nil {
		return nil, err
	}
	if version, err := majorVersion(text); err != nil || version < leastVersion {
		return nil, fmt.Errorf("systemd %s does not see new drop-ins", text)
	}
	units, err := c.ListUnitsByPatternsContext(context.Background(), nil, []string{"*.mount"})
	if err != nil {
		return nil, err
	}
	known := map[string]bool{}
	for _, u := range units {
		known[u.Name] = true
	}
	return known, nil
}

// try mounts mnt, whose unit has a name, if nothing speaks against doing it this way; then taken is true, and the error is the mount's.
func (d *direct) try(name string, mnt Mount) (taken bool, err error) {
	if d == nil || len(mnt.Options) > 0 {
		return false, nil
	}
	// A unit that is defined, or waited for by a consumer (RequiresMountsFor=), is a matter for systemd.
	if known, err := d.loaded(); err != nil || known[name] {
		return false, nil
	}
	for _, dir := range d.units {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
	}
	if err := makeMountPoint(mnt.Where); err != nil {
		return false, nil // systemd's words for it are known
	}
	// systemd mounts on no symbolic link, nor beneath one.
	if real, err := filepath.EvalSymlinks(mnt.Where); err != nil || real != mnt.Where {
		return false, nil
	}
	if mounted, err := d.mounted(mnt.Where); err != nil || mounted {
		return false, nil
	}
	if err := d.writeDropIn(name, mnt); err != nil {
		return false, nil
	}
	if err := d.mount(mnt.What, mnt.Where, mnt.Type); err != nil {
		d.removeDropIn(name)
		return true, err
	}
	return true, nil
}

// writeDropIn gives the unit that systemd will make the order that [Mount.properties] has.
func (d *direct) writeDropIn(name string, mnt Mount) error {
	dir := filepath.Join(d.dropIns, name+".d")
	if err := makeDirectory(dir); err != nil {
		return err
	}
	text := fmt.Sprintf("# By luks-kms-agent, until the volume is locked.\n[Unit]\nDescription=%s\nDefaultDependencies=no\nBefore=%s %s\nConflicts=%s\n",
		escape(mnt.description()), target, umountTarget, umountTarget)
	file := filepath.Join(dir, dropInName)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Chmod(file, 0o644) // whatever the umask
}

func (d *direct) removeDropIn(name string) {
	dir := filepath.Join(d.dropIns, name+".d")
	_ = os.Remove(filepath.Join(dir, dropInName))
	_ = os.Remove(dir) // unless somebody else has files there
}

// stop unmounts what systemd, which hears of mounts a moment later, does not know to be mounted yet.
func (d *direct) stop(where, name string) error {
	if d == nil {
		return nil
	}
	mounted, err := d.mounted(where)
	if err == nil && mounted {
		err = d.unmount(where)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err == nil {
		d.removeDropIn(name)
	}
	return err
}

// makeMountPoint makes a directory and those above it, with the mode that systemd gives them.
func makeMountPoint(path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if parent := filepath.Dir(path); parent != path {
		if err := makeMountPoint(parent); err != nil {
			return err
		}
	}
	return makeDirectory(path)
}

// makeDirectory makes a directory of mode 0755 whatever the umask, or leaves the one that is there.
func makeDirectory(path string) error {
	err := os.Mkdir(path, os.FileMode(directoryMode))
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Chmod(path, os.FileMode(directoryMode))
}

// isMountPoint tells whether a filesystem of its own begins at path.
func isMountPoint(path string) (bool, error) {
	var here, above unix.Stat_t
	if err := unix.Lstat(path, &here); err != nil {
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if err := unix.Lstat(filepath.Dir(path), &above); err != nil {
		return false, &os.PathError{Op: "lstat", Path: filepath.Dir(path), Err: err}
	}
	return here.Dev != above.Dev, nil
}
