package systemd

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// service is the agent's own.
const service = "luks-kms-agent.service"

// OldestVersion is the first systemd that the units work with (its NEWS for 244: a oneshot service may have Restart=).
const OldestVersion = 244

// UnitFacts is what systemd knows of a unit file.
type UnitFacts struct {
	Name        string // "luks-kms-agent.service"
	Load        string // LoadState: "loaded", "not-found", "masked", "bad-setting", "error"
	File        string // UnitFileState: "enabled", "disabled", "static", "masked", …
	Fragment    string // path of the unit file
	Active      string // ActiveState: "active", "inactive", "failed", "activating", …
	NeedsReload bool   // the file is newer than what systemd has read
	// LockedMemory is LimitMEMLOCK= of a service, bytes; the largest number is no limit, and 0 is none given.
	LockedMemory uint64
}

// Facts is what systemd knows of the agent.
type Facts struct {
	Version         int    // 252
	VersionText     string // "252 (252.39-1~deb12u1)"
	Service, Target UnitFacts
}

// Look asks systemd for its version and for the agent's own units, and changes nothing. The error is ErrNoSystemd (wrapped) where
// systemd is not init or does not answer.
func Look(ctx context.Context) (Facts, error) {
	m, err := Connect(ctx)
	if err != nil {
		return Facts{}, err
	}
	defer m.Close()
	return m.look(ctx)
}

func (m *Manager) look(ctx context.Context) (f Facts, err error) {
	if f.Version, f.VersionText, err = m.version(); err != nil {
		return f, err
	}
	if f.Service, err = m.unit(ctx, service); err != nil {
		return f, err
	}
	f.Target, err = m.unit(ctx, target)
	return f, err
}

// version returns systemd's version, as 252, and as it writes it.
func (m *Manager) version() (int, string, error) {
	text, err := m.conn.GetManagerProperty("Version")
	if err != nil {
		return 0, "", fmt.Errorf("cannot ask systemd for its version: %w", err)
	}
	text = strings.Trim(text, `"`)
	version, err := majorVersion(text)
	if err != nil {
		return 0, text, fmt.Errorf("cannot understand systemd's version %q", text)
	}
	return version, text, nil
}

// majorVersion reads "252 (252.39-1)" or "v252", as a quoted string or not.
func majorVersion(text string) (int, error) {
	digits := strings.TrimLeft(text, `"v`)
	return strconv.Atoi(digits[:len(digits)-len(strings.TrimLeft(digits, "0123456789"))])
}

// unit returns what systemd knows of a unit. One that does not exist is no error.
func (m *Manager) unit(ctx context.Context, name string) (UnitFacts, error) {
	p, err := m.conn.GetAllPropertiesContext(ctx, name)
	if err != nil {
		return UnitFacts{}, fmt.Errorf("cannot ask systemd for %s: %w", name, err)
	}
	text := func(key string) string { s, _ := p[key].(string); return s }
	f := UnitFacts{Name: name, Load: text("LoadState"), File: text("UnitFileState"), Fragment: text("FragmentPath"), Active: text("ActiveState")}
	f.NeedsReload, _ = p["NeedDaemonReload"].(bool)
	f.LockedMemory, _ = p["LimitMEMLOCK"].(uint64)
	if f.Load == "" {
		return UnitFacts{}, fmt.Errorf("cannot ask systemd for %s: the answer has no state", name)
	}
	return f, nil
}
