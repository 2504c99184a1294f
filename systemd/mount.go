package systemd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"syscall"

	sdbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/unit"
	"github.com/godbus/dbus/v5"
)

const (
	target       = "luks-kms-agent.target"
	umountTarget = "umount.target" // systemd.special(7): every mount that is to go at shutdown conflicts with it

	// Mode of a mount point that systemd has to create. Only root may write there, so that nothing lands on the boot
	// volume while the volume is not mounted.
	directoryMode uint32 = 0o755

	// Where systemd runs as init, sd_booted(3) says, this directory exists.
	bootedDir = "/run/systemd/system"
)

// ErrNoSystemd says that systemd is not the init of this machine, or that its bus cannot be reached.
var ErrNoSystemd = errors.New("systemd is not running")

// Mount is one mount to be made.
type Mount struct {
	What        string   // the device, absolute: /dev/mapper/luks-…
	Where       string   // the mount point, absolute and clean; systemd creates it (0755) where it is missing
	Type        string   // filesystem type as in fstab: xfs, ext4
	Options     []string // mount options, one each, as in fstab; none = defaults
	Description string   // for systemctl; "" = "Encrypted volume on <Where>"
}

// MountError is why a mount or unmount failed.
type MountError struct {
	What, Where string // What is empty for an unmount
	// Result is systemd's job result ("failed", "timeout", "canceled", "dependency", "skipped", "assert", …), or one of
	// this package's: "mounted" (something else is mounted at Where), "unit" (Where already has a unit: an fstab line, a
	// unit file or a mask), "invalid" (the Mount itself), "interrupted" (the context ended), "bus" (systemd did not
	// take the request), "kernel" (mount(2) or umount(2) failed).
	Result string
	Err    error // the fact behind Result; never nil
}

// Results that this package adds to systemd's job results.
const (
	resultMounted     = "mounted"
	resultUnit        = "unit"
	resultInvalid     = "invalid"
	resultInterrupted = "interrupted"
	resultBus         = "bus"
	resultKernel      = "kernel"
)

func (e *MountError) Error() string {
	if e.What == "" {
		return fmt.Sprintf("cannot unmount %s: %v", e.Where, e.Err)
	}
	return fmt.Sprintf("cannot mount %s on %s: %v", e.What, e.Where, e.Err)
}

func (e *MountError) Unwrap() error { return e.Err }

// conn is what the manager needs of a D-Bus connection to systemd.
type conn interface {
	GetManagerProperty(property string) (string, error)
	ListUnitsByPatternsContext(ctx context.Context, states, patterns []string) ([]sdbus.UnitStatus, error)
	GetAllPropertiesContext(ctx context.Context, unit string) (map[string]any, error)
	StartTransientUnitContext(ctx context.Context, name, mode string, properties []sdbus.Property, ch chan<- string) (int, error)
	StartUnitContext(ctx context.Context, name, mode string, ch chan<- string) (int, error)
	StopUnitContext(ctx context.Context, name, mode string, ch chan<- string) (int, error)
	ResetFailedUnitContext(ctx context.Context, name string) error
	ReloadContext(ctx context.Context) error
	Close()
}

// Manager is a connection to systemd. It may be used by several goroutines at once.
type Manager struct {
	conn   conn
	end    context.CancelFunc
	direct *direct // nil: every mount is a job of systemd's
	units  string  // where unit files for this boot go
}

// Connect connects to systemd. ctx bounds the connecting only; Close ends the connection. The error is ErrNoSystemd
// (wrapped) where systemd is not init or does not answer.
func Connect(ctx context.Context) (*Manager, error) {
	return connect(ctx, bootedDir, func(ctx context.Context) (conn, error) {
		// systemd's own socket first, as systemctl does for root: it is there before, and without, a bus daemon.
		c, err := sdbus.NewSystemdConnectionContext(ctx)
		if err == nil {
			return c, nil
		}
		bus, busErr := sdbus.NewSystemConnectionContext(ctx)
		if busErr != nil {
			return nil, errors.Join(err, busErr)
		}
		return bus, nil
	})
}

func connect(ctx context.Context, booted string, dial func(context.Context) (conn, error)) (*Manager, error) {
	if _, err := os.Lstat(booted); err != nil {
		return nil, fmt.Errorf("cannot connect to systemd: %w: %w", ErrNoSystemd, err)
	}
	// The context given to dial governs the connection for its whole life, so it is one of the manager's own, tied to
	// the caller's only until the connection stands.
	live, end := context.WithCancel(context.WithoutCancel(ctx))
	untie := context.AfterFunc(ctx, end)
	c, err := dial(live)
	if err == nil && !untie() {
		c.Close()
		err = ctx.Err()
	}
	if err != nil {
		end()
		if cause := ctx.Err(); cause != nil {
			return nil, fmt.Errorf("cannot connect to systemd: %w", cause)
		}
		return nil, fmt.Errorf("cannot connect to systemd: %w: %w", ErrNoSystemd, err)
	}
	m := &Manager{conn: c, end: end, direct: newDirect(c), units: runtimeDir}
	if m.direct != nil {
		go func() { _, _ = m.direct.loaded() }() // the first mount will want to know
	}
	return m, nil
}

// Close ends the connection. Mounts stay.
func (m *Manager) Close() {
	m.conn.Close()
	m.end()
}

// StartWhere starts a unit where another one is active, and does not wait for it.
func (m *Manager) StartWhere(ctx context.Context, name, active string) error {
	f, err := m.unit(ctx, active)
	if err != nil || f.Active != "active" {
		return err
	}
	if _, err := m.conn.StartUnitContext(ctx, name, "replace", nil); err != nil {
		return fmt.Errorf("cannot start %s: %w", name, err)
	}
	return nil
}

// StartMount makes the mount and returns when it stands, or ctx ends: with mount(2) where systemd knows nothing of the mount
// point, else by a job of systemd's. The same device already mounted
// there with the same type is success, whoever mounted it; options are not compared, because the kernel reports more than
// were asked for. Every other error is a *MountError.
func (m *Manager) StartMount(ctx context.Context, mnt Mount) error {
	fail := func(result string, err error) error {
		return &MountError{What: mnt.What, Where: mnt.Where, Result: result, Err: err}
	}
	if err := mnt.check(); err != nil {
		return fail(resultInvalid, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(resultInterrupted, err)
	}
	name := unitName(mnt.Where)
	if taken, err := m.direct.try(name, mnt); err != nil {
		return fail(resultKernel, err)
	} else if taken {
		return nil
	}
	u, err := m.load(ctx, name)
	if err != nil {
		return fail(requestResult(ctx), err)
	}

	switch {
	case u.active == "active":
		if !sameDevice(u.what, mnt.What) || u.fstype != mnt.Type {
			return fail(resultMounted, fmt.Errorf("%s (%s) is mounted there", u.what, u.fstype))
		}
		return nil
	case u.load == "masked":
		return fail(resultUnit, fmt.Errorf("%s is masked", name))
	case u.load != "not-found" && !u.transient:
		return fail(resultUnit, fmt.Errorf("%s is already defined by %s", name, u.origin()))
	}

	done := make(chan string, 1) // buffered: the connection's dispatcher must never wait for us
	switch {
	case u.load != "not-found" && u.active == "failed":
		// What an earlier run left. systemd lets go of a transient unit as soon as it is no longer failed.
		if err := m.conn.ResetFailedUnitContext(ctx, name); err != nil && !isBusError(err, "NoSuchUnit") {
			return fail(requestResult(ctx), err)
		}
		fallthrough
	case u.load == "not-found":
		// Mode "fail": a mount may wait behind other jobs, but never push one out, least of all a shutdown's.
		_, err = m.conn.StartTransientUnitContext(ctx, name, "fail", mnt.properties(), done)
	default:
		// A transient unit that is on its way up or down, as after an agent that was killed while it mounted.
		if u.what != mnt.What || u.fstype != mnt.Type {
			return fail(resultUnit, fmt.Errorf("%s is already defined for %s (%s)", name, u.what, u.fstype))
		}
		_, err = m.conn.StartUnitContext(ctx, name, "fail", done)
	}
	if err != nil {
		return fail(requestResult(ctx), err)
	}
	if result, err := m.wait(ctx, name, done); err != nil {
		return fail(result, err)
	}
	return nil
}

// StopMount unmounts where and waits for it, or for ctx. systemd stops first what requires the mount. Not mounted is
// success. Every other error is a *MountError: Result "failed" is what a busy filesystem gives.
func (m *Manager) StopMount(ctx context.Context, where string) error {
	fail := func(result string, err error) error {
		return &MountError{Where: where, Result: result, Err: err}
	}
	if err := checkPath(where); err != nil {
		return fail(resultInvalid, fmt.Errorf("mount point %w", err))
	}
	name := unitName(where)
	u, err := m.load(ctx, name)
	if err != nil {
		return fail(requestResult(ctx), err)
	}
	stopped := func() error {
		if err := m.direct.stop(where, name); err != nil {
			return fail(resultKernel, err)
		}
		return nil
	}
	if u.active == "inactive" || u.active == "failed" {
		return stopped()
	}
	done := make(chan string, 1)
	// Mode "replace", as systemctl stop: the one who asks to unmount means it. A shutdown's jobs cannot be replaced.
	if _, err := m.conn.StopUnitContext(ctx, name, "replace", done); err != nil {
		if isBusError(err, "NoSuchUnit") { // unmounted since we looked
			return stopped()
		}
		return fail(requestResult(ctx), err)
	}
	if result, err := m.wait(ctx, name, done); err != nil {
		return fail(result, err)
	}
	return stopped()
}

// wait waits for the end of a job: nil where it is done, else the result and the fact behind it.
func (m *Manager) wait(ctx context.Context, name string, done <-chan string) (string, error) {
	select {
	case result := <-done:
		if result == "done" {
			return "", nil
		}
		err := fmt.Errorf("job of %s: %s", name, result)
		// A failed transient unit stays loaded and knows why: "exit-code" (mount said no), "timeout", …
		if u, loadErr := m.load(ctx, name); loadErr == nil && u.result != "" && u.result != "success" {
			err = fmt.Errorf("job of %s: %s (%s)", name, result, u.result)
		}
		return result, err
	case <-ctx.Done():
		// The job goes on without us. A mount that comes up later is found standing by the next run.
		return resultInterrupted, fmt.Errorf("job of %s: %w", name, ctx.Err())
	}
}

// state is what systemd knows of a mount unit.
type state struct {
	load, active  string // LoadState, ActiveState
	what, fstype  string
	result        string // of the last start or stop: "success", "exit-code", "timeout", …
	fragment, src string // unit file; what a generator made it from (/etc/fstab)
	transient     bool
}

// origin says where the unit comes from, for a person.
func (s state) origin() string {
	switch {
	case s.src != "":
		return s.src
	case s.fragment != "":
		return s.fragment
	}
	return "systemd"
}

// load asks systemd for a unit, which it loads where it has to. A unit that does not exist is not an error.
func (m *Manager) load(ctx context.Context, name string) (state, error) {
	p, err := m.conn.GetAllPropertiesContext(ctx, name)
	if err != nil {
		return state{}, fmt.Errorf("cannot ask systemd for %s: %w", name, err)
	}
	text := func(key string) string { s, _ := p[key].(string); return s }
	s := state{
		load: text("LoadState"), active: text("ActiveState"),
		what: text("What"), fstype: text("Type"), result: text("Result"),
		fragment: text("FragmentPath"), src: text("SourcePath"),
	}
	s.transient, _ = p["Transient"].(bool)
	if s.load == "" || s.active == "" {
		return state{}, fmt.Errorf("cannot ask systemd for %s: the answer has no state", name)
	}
	return s, nil
}

// requestResult is the result of a request that systemd did not take.
func requestResult(ctx context.Context) string {
	if ctx.Err() != nil {
		return resultInterrupted
	}
	return resultBus
}

func (mnt Mount) check() error {
	if err := checkPath(mnt.What); err != nil {
		return fmt.Errorf("device %w", err)
	}
	if err := checkPath(mnt.Where); err != nil {
		return fmt.Errorf("mount point %w", err)
	}
	if mnt.Type == "" {
		return errors.New("no filesystem type")
	}
	for _, o := range mnt.Options {
		// A comma would make two options of one, a control character ends the line of the unit that systemd writes.
		if o == "" || strings.ContainsFunc(o, func(r rune) bool { return r == ',' || r <= ' ' || r == 0x7f }) {
			return fmt.Errorf("mount option %q is malformed", o)
		}
	}
	return nil
}

// checkPath refuses what systemd would refuse, or would read as another path than we mean.
func checkPath(p string) error {
	switch {
	case !path.IsAbs(p) || path.Clean(p) != p:
		return fmt.Errorf("%q is not an absolute, clean path", p)
	case p == "/":
		return errors.New(`"/" is the root filesystem`)
	case strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("%q has control characters", p)
	}
	return nil
}

// unitName is the name that systemd gives the mount unit of a mount point.
func unitName(where string) string { return unit.UnitNamePathEscape(where) + ".mount" }

func (mnt Mount) description() string {
	return oneLine(cmp.Or(mnt.Description, "Encrypted volume on "+mnt.Where))
}

// oneLine makes one line of a unit file of text, whatever a disk calls itself: a backslash at the end would continue it.
func oneLine(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\\' {
			return '?'
		}
		return r
	}, text)
}

// escape is for text in a unit file: a percent sign begins a specifier.
func escape(text string) string { return strings.ReplaceAll(text, "%", "%%") }

// properties are those of the transient unit. Names and types: org.freedesktop.systemd1(5), Mount Unit Objects and
// Unit Objects; the package doc says why the order is what it is.
func (mnt Mount) properties() []sdbus.Property {
	property := func(name string, value any) sdbus.Property {
		return sdbus.Property{Name: name, Value: dbus.MakeVariant(value)}
	}
	p := []sdbus.Property{
		sdbus.PropDescription(mnt.description()),
		property("DefaultDependencies", false),
		sdbus.PropBefore(target, umountTarget),
		sdbus.PropConflicts(umountTarget),
		property("What", mnt.What),
		property("Where", mnt.Where),
		property("Type", mnt.Type),
		property("DirectoryMode", directoryMode),
	}
	if len(mnt.Options) > 0 {
		p = append(p, property("Options", strings.Join(mnt.Options, ",")))
	}
	return p
}

// sameDevice compares two device paths: by name, else by the device numbers behind them, because the kernel may report
// /dev/dm-3 for what was mounted as /dev/mapper/….
func sameDevice(a, b string) bool {
	if a == b {
		return true
	}
	x, okX := deviceNumber(a)
	y, okY := deviceNumber(b)
	return okX && okY && x == y
}

func deviceNumber(p string) (uint64, bool) {
	info, err := os.Stat(p)
	if err != nil || info.Mode()&os.ModeDevice == 0 {
		return 0, false
	}
	sys, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return uint64(sys.Rdev), true
}

// isBusError reports whether err is the named error of systemd's (org.freedesktop.systemd1.NAME).
func isBusError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == "org.freedesktop.systemd1."+name
}
