package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// CloudInitFacts is what cloud-init does with the first instance-store disk, which it calls ephemeral0 and mounts on /mnt
// unless it is told not to.
type CloudInitFacts struct {
	Installed bool
	Disabled  bool   // by /etc/cloud/cloud-init.disabled
	LeftAlone string // the file that keeps ephemeral0 free; "" where none does
	Mounts    string // the file that has it mounted; "" where none does
	// Line is the line of /etc/fstab by which cloud-init mounts a disk; "" where there is none.
	Line string
}

// CloudInit reads cloud-init's configuration and /etc/fstab below root ("/"). User data may say otherwise at a boot.
func CloudInit(root string) (CloudInitFacts, error) {
	f, err := cloudInit(root)
	if err != nil {
		return f, fmt.Errorf("cannot tell what cloud-init does with disks: %w", err)
	}
	return f, nil
}

func cloudInit(root string) (f CloudInitFacts, err error) {
	fstab, err := os.ReadFile(filepath.Join(root, "etc/fstab"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	f.Line = cloudInitLine(string(fstab))
	main := filepath.Join(root, "etc/cloud/cloud.cfg")
	if _, err := os.Stat(main); errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	f.Installed = true
	if _, err := os.Stat(filepath.Join(root, "etc/cloud/cloud-init.disabled")); err == nil {
		f.Disabled = true
	}
	parts, err := filepath.Glob(filepath.Join(root, "etc/cloud/cloud.cfg.d/*.cfg"))
	if err != nil {
		return f, err
	}
	slices.Sort(parts)
	for _, path := range append([]string{main}, parts...) {
		text, err := os.ReadFile(path)
		if err != nil {
			return f, err
		}
		var config struct {
			Mounts [][]any `yaml:"mounts"`
		}
		if err := yaml.Unmarshal(text, &config); err != nil || config.Mounts == nil {
			continue // cloud-init too passes over what it cannot read
		}
		// Of a list, the last file's counts, and as a whole.
		f.LeftAlone, f.Mounts = "", ""
		for _, m := range config.Mounts {
			switch name := fmt.Sprint(append(m, "")[0]); {
			case name != "ephemeral0" && name != "/dev/ephemeral0":
			case len(m) < 2 || m[1] == nil:
				f.LeftAlone = path
			default:
				f.Mounts = path
			}
		}
	}
	return f, nil
}

// cloudInitLine finds the line of an fstab that cloud-init wrote for a disk; it marks those.
func cloudInitLine(fstab string) string {
	for line := range strings.Lines(fstab) {
		fields := strings.Fields(line)
		if len(fields) < 4 || strings.HasPrefix(fields[0], "#") || fields[2] == "swap" {
			continue
		}
		isDisk := slices.ContainsFunc([]string{"/dev/", "UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="},
			func(prefix string) bool { return strings.HasPrefix(fields[0], prefix) })
		if isDisk && slices.Contains(strings.Split(fields[3], ","), "comment=cloudconfig") {
			return strings.Join(fields, " ")
		}
	}
	return ""
}
