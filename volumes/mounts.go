package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// mount is a line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
type mount struct {
	id           int
	major, minor uint32 // major 0: the filesystem has a device number of its own, not that of a disk
	point        string
	fstype       string
	source       string
	options      []string // of the superblock, still escaped
}

// swap is a line of /proc/swaps.
type swap struct {
	path string
	file bool
}

func readMounts(path string) ([]mount, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var mounts []mount
	for line := range strings.Lines(string(b)) {
		m, err := parseMount(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return nil, fmt.Errorf("cannot understand %s: %w", path, err)
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// parseMount splits on single blanks: the kernel escapes those inside of fields, and a source may be empty.
func parseMount(line string) (mount, error) {
	bad := fmt.Errorf("line %q", line)
	f := strings.Split(line, " ")
	end := slices.Index(f, "-") // ends the optional fields
	if end < 6 || len(f) < end+4 {
		return mount{}, bad
	}
	id, err := strconv.Atoi(f[0])
	if err != nil {
		return mount{}, bad
	}
	major, minor, err := parseDev(f[2])
	if err != nil {
		return mount{}, bad
	}
	return mount{
		id: id, major: major, minor: minor, point: unescape(f[4]), fstype: f[end+1],
		source: unescape(f[end+2]), options: strings.Split(f[end+3], ","),
	}, nil
}

// option returns the values of the superblock options with that name, unescaped.
func (m mount) option(name string) []string {
	var values []string
	for _, o := range m.options {
		if v, ok := strings.CutPrefix(o, name+"="); ok {
			values = append(values, unescape(v))
		}
	}
	return values
}

func readSwaps(path string) ([]swap, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a kernel without swap
	}
	if err != nil {
		return nil, err
	}
	var swaps []swap
	first := true
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if first || len(f) == 0 {
			first = false
			continue
		}
		if len(f) < 2 || f[1] != "partition" && f[1] != "file" {
			return nil, fmt.Errorf("cannot understand %s: line %q", path, line)
		}
		swaps = append(swaps, swap{strings.TrimSuffix(unescape(f[0]), " (deleted)"), f[1] == "file"})
	}
	return swaps, nil
}

// unescape undoes the kernel's octal escapes (\040 is a blank).
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// splitEscaped splits at colons; a backslash keeps the character after it, as overlayfs writes lowerdir.
func splitEscaped(s string) []string {
	parts := []string{""}
	for i := 0; i < len(s); i++ {
		last := &parts[len(parts)-1]
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
			*last += string(s[i])
		case s[i] == ':':
			parts = append(parts, "")
		default:
			*last += string(s[i])
		}
	}
	return slices.DeleteFunc(parts, func(p string) bool { return p == "" })
}
