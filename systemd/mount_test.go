package systemd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	sdbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// manager is a systemd that keeps mount units as the real one does: it loads what it is asked for, refuses a transient
// unit whose name is taken, ends jobs with a result and remembers failed units until they are reset.
type manager struct {
	units  map[string]map[string]any
	result string // how the next jobs end; "" = they never end
	err    error  // answer to everything
	sent   map[string]any
	modes  []string
	closed bool

	files string // where unit files are; "" = nowhere
	blind bool   // new ones are seen only after a reload
	known map[string]bool

	version string // as over D-Bus: with quotes
}

func newManager() *manager { return &manager{units: map[string]map[string]any{}, result: "done"} }

func (m *manager) GetManagerProperty(property string) (string, error) {
	if m.version == "" || property != "Version" {
		return "", errors.Join(errors.New("no such property"), m.err)
	}
	return m.version, m.err
}

func (m *manager) ListUnitsByPatternsContext(_ context.Context, _, patterns []string) ([]sdbus.UnitStatus, error) {
	var units []sdbus.UnitStatus
	for name := range m.units {
		if ok, _ := filepath.Match(patterns[0], name); ok {
			units = append(units, sdbus.UnitStatus{Name: name})
		}
	}
	return units, m.err
}

func (m *manager) GetAllPropertiesContext(ctx context.Context, name string) (map[string]any, error) {
	if err := errors.Join(ctx.Err(), m.err); err != nil {
		return nil, err
	}
	if u, ok := m.units[name]; ok {
		return maps.Clone(u), nil
	}
	if m.files != "" && (!m.blind || m.known[name]) {
		file := filepath.Join(m.files, name)
		if text, err := os.ReadFile(file); err == nil {
			_, what, _ := strings.Cut(string(text), "What=")
			m.units[name] = map[string]any{"LoadState": "loaded", "ActiveState": "inactive", "FragmentPath": file, "What": strings.TrimSpace(what)}
			return maps.Clone(m.units[name]), nil
		}
	}
	return map[string]any{"LoadState": "not-found", "ActiveState": "inactive", "Transient": false}, nil
}

func (m *manager) StartTransientUnitContext(_ context.Context, name, mode string, properties []sdbus.Property, ch chan<- string) (int, error) {
	if _, taken := m.units[name]; taken {
		return 0, dbus.Error{Name: "org.freedesktop.systemd1.UnitExists", Body: []any{"Unit " + name + " was already loaded"}}
	}
	m.sent = map[string]any{}
	for _, p := range properties {
		m.sent[p.Name] = p.Value.Value()
	}
	m.units[name] = map[string]any{
		"LoadState": "loaded", "Transient": true, "FragmentPath": "/run/systemd/transient/" + name,
		"What": m.sent["What"], "Type": m.sent["Type"],
	}
	return m.start(name, mode, ch)
}

func (m *manager) StartUnitContext(ctx context.Context, name, mode string, ch chan<- string) (int, error) {
	if _, err := m.GetAllPropertiesContext(ctx, name); err != nil || m.units[name] == nil {
		return 0, errors.Join(err, errors.New("no such unit"))
	}
	return m.start(name, mode, ch)
}

func (m *manager) start(name, mode string, ch chan<- string) (int, error) {
	m.modes = append(m.modes, mode)
	u := m.units[name]
	switch m.result {
	case "":
		u["ActiveState"] = "activating"
		return 1, nil
	case "done":
		u["ActiveState"], u["Result"] = "active", "success"
	case "failed":
		u["ActiveState"], u["Result"] = "failed", "exit-code"
	default:
		u["ActiveState"] = "inactive"
	}
	if ch != nil {
		ch <- m.result
	}
	return 1, nil
}

func (m *manager) StopUnitContext(_ context.Context, name, mode string, ch chan<- string) (int, error) {
	m.modes = append(m.modes, mode)
	u, ok := m.units[name]
	if !ok || u["ActiveState"] == "gone" {
		return 0, dbus.Error{Name: "org.freedesktop.systemd1.NoSuchUnit"}
	}
	switch m.result {
	case "":
		return 1, nil
	case "done":
		delete(m.units, name)
	default:
		u["Result"] = "exit-code" // a busy filesystem: the unit stays active
	}
	ch <- m.result
	return 1, nil
}

func (m *manager) ResetFailedUnitContext(_ context.Context, name string) error {
	if u := m.units[name]; u["ActiveState"] == "failed" {
		delete(m.units, name)
		return nil
	}
	return dbus.Error{Name: "org.freedesktop.systemd1.NoSuchUnit"}
}

func (m *manager) ReloadContext(context.Context) error {
	entries, err := os.ReadDir(m.files)
	m.known = map[string]bool{}
	for _, e := range entries {
		m.known[e.Name()] = true
	}
	return errors.Join(err, m.err)
}

func (m *manager) Close() { m.closed = true }

func open(m *manager) *Manager { return &Manager{conn: m, end: func() {}} }

var data = Mount{What: "/dev/mapper/luks-1", Where: "/mnt/my-data", Type: "xfs", Options: []string{"nodev", "noatime"}}

// dataUnit is what systemd-escape --path --suffix=mount prints for /mnt/my-data.
const dataUnit = `mnt-my\x2ddata.mount`

func TestStartMountMakesATransientUnit(t *testing.T) {
	m := newManager()
	if err := open(m).StartMount(t.Context(), data); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"Description":         "Encrypted volume on /mnt/my-data",
		"DefaultDependencies": false,
		"Before":              []string{"luks-kms-agent.target", "umount.target"},
		"Conflicts":           []string{"umount.target"},
		"What":                "/dev/mapper/luks-1",
		"Where":               "/mnt/my-data",
		"Type":                "xfs",
		"DirectoryMode":       uint32(0o755),
		"Options":             "nodev,noatime",
	}
	if !reflect.DeepEqual(m.sent, want) {
		t.Errorf("properties\n%v, want\n%v", m.sent, want)
	}
	if _, ok := m.units[dataUnit]; !ok {
		t.Errorf("the unit's name is none of systemd-escape's: %v", m.units)
	}
	if m.modes[0] != "fail" {
		t.Errorf("job mode %q: only \"fail\" never pushes another job out", m.modes[0])
	}

	// The second time nothing is left to do.
	m.modes = nil
	if err := open(m).StartMount(t.Context(), data); err != nil || len(m.modes) != 0 {
		t.Errorf("mounting again: error %v, jobs %v", err, m.modes)
	}
}

func TestPropertiesNeverWaitForTheAgent(t *testing.T) {
	// The agent waits for the mount's job: a mount ordered After= the agent's own service, which is "starting" for as
	// long as the agent runs, would hang both.
	for _, p := range data.properties() {
		if p.Name == "After" || p.Name == "Requires" || p.Name == "BindsTo" {
			t.Errorf("the mount unit has %s=%v", p.Name, p.Value)
		}
	}
	plain := Mount{What: "/dev/x", Where: "/x", Type: "ext4", Description: "mine"}
	for _, p := range plain.properties() {
		if p.Name == "Options" {
			t.Errorf("no options were asked for, sent %v", p.Value)
		}
		if p.Name == "Description" && p.Value.Value() != "mine" {
			t.Errorf("description %v", p.Value)
		}
	}
}

func TestStartMountWhereSomethingIs(t *testing.T) {
	unit := func(active string, transient bool, more map[string]any) map[string]any {
		u := map[string]any{"LoadState": "loaded", "ActiveState": active, "Transient": transient, "What": data.What, "Type": data.Type}
		maps.Copy(u, more)
		return u
	}
	for _, c := range []struct {
		name   string
		unit   map[string]any
		result string // "" = mounted
		says   string
	}{
		{"mounted by hand", unit("active", false, nil), "", ""},
		{"mounted from fstab", unit("active", false, map[string]any{"SourcePath": "/etc/fstab"}), "", ""},
		{"another device", unit("active", false, map[string]any{"What": "/dev/nvme9n1"}), "mounted", "/dev/nvme9n1 (xfs) is mounted there"},
		{"another type", unit("active", true, map[string]any{"Type": "ext4"}), "mounted", "(ext4) is mounted there"},
		{"fstab line", unit("inactive", false, map[string]any{"SourcePath": "/etc/fstab", "FragmentPath": "/run/systemd/generator/x"}), "unit", "is already defined by /etc/fstab"},
		{"failed fstab line", unit("failed", false, map[string]any{"SourcePath": "/etc/fstab"}), "unit", "/etc/fstab"},
		{"unit file", unit("inactive", false, map[string]any{"FragmentPath": "/etc/systemd/system/x.mount"}), "unit", "is already defined by /etc/systemd/system/x.mount"},
		{"masked", map[string]any{"LoadState": "masked", "ActiveState": "inactive"}, "unit", "is masked"},
		{"transient, failed before", unit("failed", true, nil), "", ""},
		{"transient, on its way", unit("activating", true, nil), "", ""},
		{"transient, going", unit("deactivating", true, nil), "", ""},
		{"transient, on its way for another", unit("activating", true, map[string]any{"What": "/dev/mapper/luks-2"}), "unit", "is already defined for /dev/mapper/luks-2"},
		{"no state", map[string]any{"What": data.What}, "bus", "the answer has no state"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newManager()
			m.units[dataUnit] = c.unit
			err := open(m).StartMount(t.Context(), data)
			if c.result == "" {
				if err != nil || m.units[dataUnit]["ActiveState"] != "active" {
					t.Errorf("error %v, unit %v", err, m.units[dataUnit])
				}
				if slices.ContainsFunc(m.modes, func(mode string) bool { return mode != "fail" }) {
					t.Errorf("job modes %q: only \"fail\" never pushes another job out", m.modes)
				}
				return
			}
			var e *MountError
			if !errors.As(err, &e) || e.Result != c.result || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v (%+v), want result %q and %q", err, e, c.result, c.says)
			}
			if !strings.HasPrefix(err.Error(), "cannot mount /dev/mapper/luks-1 on /mnt/my-data: ") {
				t.Errorf("message %q does not name the mount", err)
			}
			if len(m.modes) != 0 {
				t.Errorf("jobs were started: %v", m.modes)
			}
		})
	}
}

func TestStartMountReportsTheJob(t *testing.T) {
	for result, says := range map[string]string{
		"failed":     "failed (exit-code)",
		"timeout":    "timeout",
		"dependency": "dependency",
		"canceled":   "canceled",
		"skipped":    "skipped",
	} {
		m := newManager()
		m.result = result
		err := open(m).StartMount(t.Context(), data)
		var e *MountError
		if !errors.As(err, &e) || e.Result != result || e.What != data.What || e.Where != data.Where || !strings.HasSuffix(err.Error(), says) {
			t.Errorf("%s: got %v (%+v)", result, err, e)
		}
	}
}

func TestStartMountEndsWithItsContext(t *testing.T) {
	m := newManager()
	m.result = ""
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- open(m).StartMount(ctx, data) }()
	var err error
	select {
	case err = <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("it waits on")
	}
	var e *MountError
	if !errors.As(err, &e) || e.Result != "interrupted" || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v (%+v)", err, e)
	}
	if err := open(m).StartMount(ctx, data); !errors.As(err, &e) || e.Result != "interrupted" {
		t.Errorf("with a context that is over: %v", err)
	}
}

func TestStartMountReportsTheBus(t *testing.T) {
	m := newManager()
	m.err = errors.New("connection closed")
	err := open(m).StartMount(t.Context(), data)
	var e *MountError
	if !errors.As(err, &e) || e.Result != "bus" || !errors.Is(err, m.err) {
		t.Errorf("got %v (%+v)", err, e)
	}
}

func TestMountIsChecked(t *testing.T) {
	for name, change := range map[string]func(*Mount){
		"root":              func(m *Mount) { m.Where = "/" },
		"relative":          func(m *Mount) { m.Where = "mnt" },
		"not clean":         func(m *Mount) { m.Where = "/mnt/../etc" },
		"trailing slash":    func(m *Mount) { m.Where = "/mnt/" },
		"empty":             func(m *Mount) { m.Where = "" },
		"line break":        func(m *Mount) { m.Where = "/mnt\nWhat=/dev/sda" },
		"no device":         func(m *Mount) { m.What = "" },
		"relative device":   func(m *Mount) { m.What = "sda" },
		"no type":           func(m *Mount) { m.Type = "" },
		"empty option":      func(m *Mount) { m.Options = []string{""} },
		"two in one option": func(m *Mount) { m.Options = []string{"ro,suid"} },
		"option break":      func(m *Mount) { m.Options = []string{"ro\nLazyUnmount=yes"} },
	} {
		mnt, m := data, newManager()
		change(&mnt)
		err := open(m).StartMount(t.Context(), mnt)
		var e *MountError
		if !errors.As(err, &e) || e.Result != "invalid" || len(m.units) != 0 {
			t.Errorf("%s: got %v, units %v", name, err, m.units)
		}
	}
}

func TestStopMount(t *testing.T) {
	m := newManager()
	s := open(m)
	if err := s.StopMount(t.Context(), data.Where); err != nil || len(m.modes) != 0 {
		t.Errorf("not mounted: error %v, jobs %v", err, m.modes)
	}
	if err := s.StartMount(t.Context(), data); err != nil {
		t.Fatal(err)
	}

	m.result = "failed" // busy
	err := s.StopMount(t.Context(), data.Where)
	var e *MountError
	if !errors.As(err, &e) || e.Result != "failed" || e.What != "" || !strings.HasPrefix(err.Error(), "cannot unmount /mnt/my-data: ") {
		t.Errorf("busy: got %v (%+v)", err, e)
	}

	m.result = ""
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.StopMount(ctx, data.Where); !errors.As(err, &e) || e.Result != "interrupted" {
		t.Errorf("hanging: got %v (%+v)", err, e)
	}

	m.result = "done"
	if err := s.StopMount(t.Context(), data.Where); err != nil || len(m.units) != 0 {
		t.Errorf("error %v, units %v", err, m.units)
	}
	m.units[dataUnit] = map[string]any{"LoadState": "loaded", "ActiveState": "gone"}
	if err := s.StopMount(t.Context(), data.Where); err != nil {
		t.Errorf("unmounted by another meanwhile: %v", err)
	}
	if err := s.StopMount(t.Context(), "/"); !errors.As(err, &e) || e.Result != "invalid" {
		t.Errorf("unmounting /: %v", err)
	}
}

func TestConnect(t *testing.T) {
	here := t.TempDir()
	m := newManager()
	var live context.Context
	dial := func(ctx context.Context) (conn, error) { live = ctx; return m, nil }

	if _, err := connect(t.Context(), filepath.Join(here, "absent"), dial); !errors.Is(err, ErrNoSystemd) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no systemd: %v", err)
	}
	refused := func(context.Context) (conn, error) { return nil, os.ErrPermission }
	if _, err := connect(t.Context(), here, refused); !errors.Is(err, ErrNoSystemd) || !errors.Is(err, os.ErrPermission) {
		t.Errorf("no bus: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	s, err := connect(ctx, here, dial)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if live.Err() != nil {
		t.Error("the end of Connect's context ended the connection")
	}
	s.Close()
	if !m.closed || live.Err() == nil {
		t.Error("Close left the connection open")
	}

	hangs := func(ctx context.Context) (conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := connect(ctx, here, hangs); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrNoSystemd) {
		t.Errorf("a systemd that hangs: %v", err)
	}
}

func TestSameDevice(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "null")
	if err := os.Symlink("/dev/null", link); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"/dev/a", "/dev/a", true},
		{"/dev/null", link, true},
		{"/dev/zero", link, false},
		{"/dev/null", "/dev/absent", false},
		{file, "/dev/null", false},
		{file, other, false}, // no devices: both numbers are 0
	} {
		if got := sameDevice(c.a, c.b); got != c.want {
			t.Errorf("sameDevice(%s, %s) = %v", c.a, c.b, got)
		}
	}
}

// TestStartWhere: a unit is started, without a wait, where the other one is active, and only there.
func TestStartWhere(t *testing.T) {
	loaded := func(active string) map[string]any {
		return map[string]any{"LoadState": "loaded", "ActiveState": active}
	}
	for name, c := range map[string]struct {
		timer   map[string]any
		service bool // is there
		started bool
		says    string
	}{
		"on":         {loaded("active"), true, true, ""},
		"off":        {loaded("inactive"), true, false, ""},
		"no timer":   {nil, true, false, ""},
		"no service": {loaded("active"), false, false, "cannot start a.service: no such unit"},
	} {
		t.Run(name, func(t *testing.T) {
			it := newManager()
			it.result = "" // the job does not end
			if c.timer != nil {
				it.units["a.timer"] = c.timer
			}
			if c.service {
				it.units["a.service"] = loaded("inactive")
			}
			err := (&Manager{conn: it}).StartWhere(t.Context(), "a.service", "a.timer")
			if text := fmt.Sprint(err); (err == nil) != (c.says == "") || !strings.Contains(text, c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
			if started := len(it.modes) == 1 && it.units["a.service"]["ActiveState"] == "activating"; started != c.started {
				t.Errorf("%v, %v", it.modes, it.units)
			}
		})
	}
}
