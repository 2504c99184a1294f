package systemd

import (
	"errors"
	"math"
	"testing"
)

func TestFacts(t *testing.T) {
	m := newManager()
	m.version = `"v252 (252.39-1~deb12u1)"`
	m.units[service] = map[string]any{
		"LoadState": "loaded", "UnitFileState": "enabled", "FragmentPath": "/usr/lib/systemd/system/" + service, "ActiveState": "active",
		"NeedDaemonReload": true, "LimitMEMLOCK": uint64(math.MaxUint64),
	}
	f, err := open(m).look(t.Context())
	want := Facts{
		Version: 252, VersionText: "v252 (252.39-1~deb12u1)",
		Service: UnitFacts{Name: service, Load: "loaded", File: "enabled", Fragment: "/usr/lib/systemd/system/" + service, Active: "active",
			NeedsReload: true, LockedMemory: math.MaxUint64},
		Target: UnitFacts{Name: target, Load: "not-found", Active: "inactive"},
	}
	if err != nil || f != want {
		t.Errorf("got %+v (%v), want %+v", f, err, want)
	}
	if m.sent != nil || len(m.modes) != 0 {
		t.Errorf("it asked for jobs: %v", m.modes)
	}
	m.version = `"devel"`
	if _, err := open(m).look(t.Context()); err == nil {
		t.Error("an odd version was understood")
	}
	m.err = errors.New("x")
	if _, err := open(m).look(t.Context()); !errors.Is(err, m.err) {
		t.Error(err)
	}
}
