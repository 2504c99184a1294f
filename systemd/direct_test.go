package systemd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// kernel is one whose mounts are names in a map.
type kernel struct {
	mounts map[string]string // mount point -> source and type
	fails  error
}

// directly is a manager whose mounts are made in a kernel of its own, with unit files in a directory of its own.
func directly(t *testing.T, m *manager) (*Manager, *kernel, *direct) {
	k := &kernel{mounts: map[string]string{}}
	d := &direct{
		dropIns: t.TempDir(),
		mount: func(source, target, fstype string) error {
			if k.fails == nil {
				k.mounts[target] = source + " " + fstype
			}
			return k.fails
		},
		unmount: func(target string) error {
			if k.fails == nil {
				delete(k.mounts, target)
			}
			return k.fails
		},
		mounted: func(path string) (bool, error) { return k.mounts[path] != "", nil },
		loaded:  sync.OnceValues(func() (map[string]bool, error) { return loadedMounts(m) }),
	}
	d.units = []string{filepath.Join(d.dropIns, "none"), d.dropIns}
	s := open(m)
	s.direct = d
	return s, k, d
}

func newModern() *manager {
	m := newManager()
	m.version = `"252 (252.39-1~deb12u1)"`
	return m
}

func TestMountWithoutAJob(t *testing.T) {
	m := newModern()
	s, k, d := directly(t, m)
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	mnt := Mount{What: "/dev/mapper/luks-1", Where: filepath.Join(t.TempDir(), "a", "b"), Type: "xfs", Description: "100% of \n[Unit] b\\"}
	if err := s.StartMount(t.Context(), mnt); err != nil {
		t.Fatal(err)
	}
	if k.mounts[mnt.Where] != "/dev/mapper/luks-1 xfs" || len(m.modes) != 0 {
		t.Errorf("mounts %v, jobs %v", k.mounts, m.modes)
	}
	dir := filepath.Join(d.dropIns, unitName(mnt.Where)+".d")
	for path, mode := range map[string]os.FileMode{
		mnt.Where: 0o755, filepath.Dir(mnt.Where): 0o755, dir: 0o755, filepath.Join(dir, dropInName): 0o644,
	} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v (%v), want mode %o", path, info, err, mode)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, dropInName))
	if err != nil {
		t.Fatal(err)
	}
	// The same order as that of a transient unit.
	want := "[Unit]\nDescription=100%% of ?[Unit] b?\nDefaultDependencies=no\nBefore=luks-kms-agent.target umount.target\nConflicts=umount.target\n"
	if _, unit, _ := strings.Cut(string(text), "\n"); unit != want {
		t.Errorf("the drop-in says\n%s\nwant\n%s", unit, want)
	}

	// systemd has not heard of it yet.
	if err := s.StopMount(t.Context(), mnt.Where); err != nil || len(k.mounts) != 0 {
		t.Errorf("unmounting: %v, mounts %v", err, k.mounts)
	}
	if left, _ := os.ReadDir(d.dropIns); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
	if err := s.StopMount(t.Context(), mnt.Where); err != nil {
		t.Errorf("unmounting what is not mounted: %v", err)
	}
}

func TestWhatTheKernelRefuses(t *testing.T) {
	s, k, d := directly(t, newModern())
	mnt := Mount{What: "/dev/mapper/luks-1", Where: t.TempDir(), Type: "xfs"}
	k.fails = os.NewSyscallError("mount", unix.EUCLEAN)
	err := s.StartMount(t.Context(), mnt)
	var e *MountError
	if !errors.As(err, &e) || e.Result != "kernel" || !errors.Is(err, unix.EUCLEAN) {
		t.Errorf("got %v (%+v)", err, e)
	}
	if left, _ := os.ReadDir(d.dropIns); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
	k.mounts[mnt.Where] = "busy"
	if err := s.StopMount(t.Context(), mnt.Where); !errors.As(err, &e) || e.Result != "kernel" || e.What != "" || !errors.Is(err, unix.EUCLEAN) {
		t.Errorf("unmounting: got %v (%+v)", err, e)
	}
}

// TestSystemdMountsWhatItKnows: where there is anything about the mount point that systemd may know better, it is asked.
func TestSystemdMountsWhatItKnows(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, m *manager, s *Manager, k *kernel, mnt *Mount){
		"old systemd":     func(_ *testing.T, m *manager, _ *Manager, _ *kernel, _ *Mount) { m.version = `"245.4-4ubuntu3"` },
		"odd version":     func(_ *testing.T, m *manager, _ *Manager, _ *kernel, _ *Mount) { m.version = `"devel"` },
		"no version":      func(_ *testing.T, m *manager, _ *Manager, _ *kernel, _ *Mount) { m.version = "" },
		"other namespace": func(_ *testing.T, _ *manager, s *Manager, _ *kernel, _ *Mount) { s.direct = nil },
		"options":         func(_ *testing.T, _ *manager, _ *Manager, _ *kernel, mnt *Mount) { mnt.Options = []string{"nodev"} },
		"a unit in memory": func(_ *testing.T, m *manager, _ *Manager, _ *kernel, mnt *Mount) {
			m.units[unitName(mnt.Where)] = map[string]any{"LoadState": "loaded", "ActiveState": "inactive", "FragmentPath": "/etc/fstab"}
		},
		"a unit file": func(t *testing.T, _ *manager, s *Manager, _ *kernel, mnt *Mount) {
			if err := os.WriteFile(filepath.Join(s.direct.dropIns, unitName(mnt.Where)), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"a mask": func(t *testing.T, _ *manager, s *Manager, _ *kernel, mnt *Mount) {
			if err := os.Symlink("/dev/null", filepath.Join(s.direct.dropIns, unitName(mnt.Where))); err != nil {
				t.Fatal(err)
			}
		},
		"something mounted": func(_ *testing.T, _ *manager, _ *Manager, k *kernel, mnt *Mount) {
			k.mounts[mnt.Where] = "/dev/sda ext4"
		},
		"a symbolic link": func(t *testing.T, _ *manager, _ *Manager, _ *kernel, mnt *Mount) {
			link := filepath.Join(t.TempDir(), "link")
			if err := os.Symlink(mnt.Where, link); err != nil {
				t.Fatal(err)
			}
			mnt.Where = link
		},
		"a file": func(t *testing.T, _ *manager, _ *Manager, _ *kernel, mnt *Mount) {
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			mnt.Where = filepath.Join(file, "x")
		},
		"no room for a drop-in": func(_ *testing.T, _ *manager, s *Manager, _ *kernel, _ *Mount) { s.direct.dropIns = "/dev/null/x" },
	} {
		t.Run(name, func(t *testing.T) {
			m := newModern()
			s, k, _ := directly(t, m)
			mnt := Mount{What: "/dev/mapper/luks-1", Where: t.TempDir(), Type: "xfs"}
			change(t, m, s, k, &mnt)
			before := len(k.mounts)
			err := s.StartMount(t.Context(), mnt)
			if len(k.mounts) != before {
				t.Errorf("it was mounted: %v", k.mounts)
			}
			if err == nil && len(m.modes) != 1 {
				t.Error("nobody mounted it")
			}
		})
	}
}

func TestIsMountPoint(t *testing.T) {
	for path, want := range map[string]bool{"/proc": true, t.TempDir(): false} {
		if got, err := isMountPoint(path); err != nil || got != want {
			t.Errorf("%s: %v (%v)", path, got, err)
		}
	}
	if _, err := isMountPoint("/none"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
