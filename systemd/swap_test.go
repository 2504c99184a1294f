package systemd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const swapUnit = `dev-mapper-luks\x2d1.swap` // as systemd-escape --path --suffix=swap prints it

// swapping is a manager of which unit files are in a directory of the test's.
func swapping(t *testing.T) (*Manager, *manager) {
	m := newManager()
	m.files = t.TempDir()
	s := open(m)
	s.units = m.files
	return s, m
}

func TestSwap(t *testing.T) {
	for name, blind := range map[string]bool{"systemd 246 and newer": false, "older": true} {
		t.Run(name, func(t *testing.T) {
			old := unix.Umask(0o077)
			defer unix.Umask(old)
			s, m := swapping(t)
			m.blind = blind
			start := func() error { return s.StartSwap(t.Context(), "/dev/mapper/luks-1", "100% of \n[Unit] b\\") }
			if err := start(); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(m.files, swapUnit)
			text, err := os.ReadFile(file)
			want := "[Unit]\nDescription=100%% of ?[Unit] b?\nDefaultDependencies=no\nBefore=luks-kms-agent.target umount.target\nConflicts=umount.target\n\n[Swap]\nWhat=/dev/mapper/luks-1\n"
			if _, unit, _ := strings.Cut(string(text), "\n"); err != nil || unit != want {
				t.Errorf("the unit says\n%s(%v), want\n%s", unit, err, want)
			}
			if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o644 {
				t.Errorf("%v, %v", info, err)
			}
			if err := start(); err != nil || len(m.modes) != 1 {
				t.Errorf("again: %v, jobs %v", err, m.modes)
			}
			if err := s.StopSwap(t.Context(), "/dev/mapper/luks-1"); err != nil {
				t.Error(err)
			}
			if left, _ := os.ReadDir(m.files); len(left) != 0 || len(m.units) != 0 {
				t.Errorf("%v is left, and %v", left, m.units)
			}
			if err := s.StopSwap(t.Context(), "/dev/mapper/luks-1"); err != nil {
				t.Errorf("what is no swap: %v", err)
			}
		})
	}
}

func TestSwapFails(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Manager, *manager)
		result string
		says   string
	}{
		"its job":    {func(_ *Manager, m *manager) { m.result = "failed" }, "failed", "cannot use /dev/mapper/luks-1 as swap: job of "},
		"no systemd": {func(_ *Manager, m *manager) { m.err = errors.New("gone") }, "bus", "gone"},
		"no place":   {func(s *Manager, _ *manager) { s.units = "/dev/null/x" }, "unit", "not a directory"},
		"somebody else": {func(_ *Manager, m *manager) {
			m.units[swapUnit] = map[string]any{"LoadState": "loaded", "ActiveState": "inactive", "FragmentPath": "/etc/systemd/system/x", "SourcePath": "/etc/fstab"}
		}, "unit", "is already defined by /etc/fstab"},
	} {
		t.Run(name, func(t *testing.T) {
			s, m := swapping(t)
			c.change(s, m)
			var e *SwapError
			if err := s.StartSwap(t.Context(), "/dev/mapper/luks-1", "x"); !errors.As(err, &e) || e.Result != c.result || e.Off || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v (%+v), want %q: …%s…", err, e, c.result, c.says)
			}
		})
	}
	s, m := swapping(t)
	if err := s.StartSwap(t.Context(), "/dev/mapper/luks-1", "x"); err != nil {
		t.Fatal(err)
	}
	m.result = "failed"
	var e *SwapError
	if err := s.StopSwap(t.Context(), "/dev/mapper/luks-1"); !errors.As(err, &e) || !e.Off || !strings.Contains(err.Error(), "cannot take /dev/mapper/luks-1 back from swap: job of ") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(m.files, swapUnit)); err != nil {
		t.Errorf("the unit of what still is swap: %v", err)
	}
	for _, device := range []string{"relative", "/dev/../x", "/a\nb"} {
		if err := s.StartSwap(t.Context(), device, "x"); !errors.As(err, &e) || e.Result != "invalid" {
			t.Errorf("%q: %v", device, err)
		}
	}
}
