package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// machine is a node whose disks are image files and whose KMS and IMDS are
// servers that behave. cryptsetup, blkid and mkfs are the real ones, and so are
// records, headers and keys. Only what needs a kernel of one's own is stood in
// for: mappings, mounts, and the lock on a device node.
type machine struct {
	t       testing.TB
	dir     string
	kms     *kmstest.KMS
	imds    *kmstest.IMDS
	cfg     Config
	devices []volumes.Device
	missing []volumes.Missing
	errScan error
	held    map[string]bool
	// unannounced are disks, by name, that udev is not done with.
	unannounced map[string]bool
	arrays      map[string]volumes.Device // stripes that run, by UUID
	inactive    bool                      // the agent's service is
	seq         uint64                    // of the disk that was attached last

	mu         sync.Mutex
	open       map[string]string // mapping name -> device path
	unfinished map[string]bool   // of these, those without a table in use
	gone       map[string]bool   // of these, those whose disk was taken away
	mounts     map[string]string // mount point -> mapping path
	swaps      map[string]bool   // mapping path
	journal    []systemd.Entry
	taken      int // lines of the audit log that a test has looked at
	sends      int // how often the escrow's service was to be started
	// last is what the last sector of a new mapping begins with; the rest of both its
	// ends is noise without a signature.
	last string
	// fail is asked before each mapping, hold and mount; tests cut there.
	fail func(step, what string) error
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	if t, ok := t.(*testing.T); ok { // a benchmark is alone
		t.Parallel()
	}
	m := &machine{
		t: t, dir: t.TempDir(), kms: kmstest.NewKMS(t), imds: kmstest.NewIMDS(t),
		open: map[string]string{}, unfinished: map[string]bool{}, gone: map[string]bool{}, mounts: map[string]string{}, held: map[string]bool{}, swaps: map[string]bool{},
		arrays: map[string]volumes.Device{},
		fail:   func(string, string) error { return nil },
	}
	m.cfg = defaultConfig("config.yaml")
	m.cfg.KMSKey, m.cfg.KMSEndpoint, m.cfg.IMDSEndpoint = m.kms.ARN(), m.kms.URL(), m.imds.URL()
	m.cfg.Filesystem, m.cfg.StateDir = "ext4", filepath.Join(m.dir, "state")
	m.cfg.AuditLog, m.cfg.Logs.Spool = filepath.Join(m.dir, "log", "audit.jsonl"), filepath.Join(m.dir, "spool")
	m.cfg.RetryLimit, m.cfg.CallTimeout, m.cfg.DeviceWait = 20*time.Second, 20*time.Second, 0
	if err := os.Mkdir(filepath.Join(m.dir, "mapper"), 0o700); err != nil {
		t.Fatal(err)
	}
	return m
}

// impatient is for machines whose KMS or IMDS does not answer. A busy machine
// needs most of this for the calls that do succeed.
func (m *machine) impatient() { m.cfg.RetryLimit, m.cfg.CallTimeout = 2*time.Second, 2*time.Second }

// disk adds a blank disk of 40 MiB.
func (m *machine) disk(class volumes.Class, identity string) volumes.Device {
	m.t.Helper()
	path := filepath.Join(m.dir, identity+".img")
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(f.Truncate(40<<20), f.Close())
	}
	if err != nil {
		m.t.Fatal(err)
	}
	d := volumes.Device{Name: identity, Path: path, Size: 40 << 20, LogicalSectorSize: 512, Class: class, Identity: identity, Serial: identity}
	m.devices = append(m.devices, d)
	return d
}

// write changes a disk behind the agent's back.
func (m *machine) write(d volumes.Device, offset int64, data []byte) {
	m.t.Helper()
	f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(data, offset)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// node is the agent as a new process would find the machine.
func (m *machine) node() *Node {
	m.t.Helper()
	n, err := New(m.cfg, zap.NewNop(), Program{Version: "test", Command: "run"})
	if err != nil {
		m.t.Fatal(err)
	}
	n.disks, n.maps, n.stripes, n.statusPath = m, m, machineArrays{m}, filepath.Join(m.dir, "run", "status.json")
	n.auditLog.journal = m.hear
	n.service = func(context.Context) (systemd.UnitFacts, error) {
		if m.inactive {
			return systemd.UnitFacts{Active: "inactive"}, nil
		}
		return systemd.UnitFacts{Active: "active"}, nil
	}
	n.sendEscrow = func(context.Context) error { m.sends++; return m.fail("send", "") }
	n.mounts = func(context.Context) (mounter, error) { return m.mounter(), nil }
	// Other tests use the memory of this process at the same time; it must not be searched for copies.
	n.wipeKeys = func(keys ...*keycache.Key) error {
		for _, k := range keys {
			k.Wipe()
		}
		return nil
	}
	return n
}

func (m *machine) run() Report {
	m.t.Helper()
	r, err := m.node().Run(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	return r
}

// runOK runs and wants every action to have gone well.
func (m *machine) runOK() Report {
	m.t.Helper()
	r := m.run()
	for _, o := range r.Outcomes {
		if o.Err != nil {
			m.t.Errorf("%s %s: %v", o.Action.Verb, o.Action.Device.Path, o.Err)
		}
	}
	return r
}

// reboot is what the kernel forgets.
func (m *machine) reboot() {
	m.t.Helper()
	for name := range m.open {
		if err := os.Remove(m.Path(name)); err != nil {
			m.t.Fatal(err)
		}
	}
	clear(m.open)
	clear(m.mounts)
	clear(m.swaps)
	clear(m.arrays)
	if err := os.RemoveAll(filepath.Join(m.dir, "run", filepath.Base(DefaultDisksPath))); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) Scan(context.Context, []string) (volumes.Scan, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := volumes.Scan{Missing: m.missing}
	for name := range m.gone {
		out.Gone = append(out.Gone, m.mapping(name))
	}
	for _, d := range m.disksAndArrays() {
		d.Unannounced = m.unannounced[d.Name]
		for name, path := range m.open {
			if path != d.Path || m.gone[name] {
				continue
			}
			d.Mappings = append(d.Mappings, m.mapping(name))
			d.Uses = append(d.Uses, volumes.Use{Kind: volumes.UseHeld, What: name, Evidence: name + " is on it"})
		}
		out.Devices = append(out.Devices, d)
	}
	return out, m.errScan
}

func (m *machine) mapping(name string) volumes.Mapping {
	uuid := strings.TrimPrefix(name, "luks-")
	mapping := volumes.Mapping{Name: name, UUID: "CRYPT-LUKS2-" + strings.ReplaceAll(uuid, "-", "") + "-" + name}
	for where, what := range m.mounts {
		if what == m.Path(name) {
			mapping.Mounts = append(mapping.Mounts, where)
		}
	}
	if m.swaps[m.Path(name)] {
		mapping.Mounts = append(mapping.Mounts, volumes.SwapPoint)
	}
	return mapping
}

func (m *machine) Hold(_ context.Context, d volumes.Device) (io.Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("hold", d.Identity); err != nil {
		return nil, err
	}
	if m.held[d.Path] {
		return nil, fmt.Errorf("cannot hold %s: held already", d.Path)
	}
	m.held[d.Path] = true
	return release(func() { m.mu.Lock(); delete(m.held, d.Path); m.mu.Unlock() }), nil
}

type release func()

func (r release) Close() error { r(); return nil }

func (m *machine) Check(d volumes.Device) error { return m.fail("check", d.Identity) }

func (m *machine) Ready() error { return m.fail("kernel", "") }

func (m *machine) CloseUnfinished(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.unfinished[name] {
		delete(m.unfinished, name)
		delete(m.open, name)
	}
	return nil
}

func (m *machine) IsOpen(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.open[name] != ""
}

func (m *machine) Announce(name string) error { return m.fail("announce", name) }

func (m *machine) Path(name string) string { return filepath.Join(m.dir, "mapper", name) }

// volumeKeyDigest is in a header what tells one volume key from another: every format makes a new one, and no change of key slots does.
var volumeKeyDigest = regexp.MustCompile(`"digest":"[^"]*"`)

// Open really verifies; what it then shows is a file that belongs to this very
// volume key, so that a volume that was formatted again is another volume.
func (m *machine) Open(_ context.Context, i *luks.Inspection, k luks.Key, o luks.OpenOptions) error {
	return m.openBy(i, i.Verify, k, o)
}

func (m *machine) OpenRecovery(_ context.Context, i *luks.Inspection, k luks.Key, o luks.OpenOptions) error {
	return m.openBy(i, i.VerifyRecovery, k, o)
}

func (m *machine) openBy(i *luks.Inspection, verify func(luks.Key) error, k luks.Key, o luks.OpenOptions) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("open", i.Path); err != nil {
		return err
	}
	for _, hook := range []*func(){&o.Unsealing, &o.Unsealed} {
		if *hook == nil {
			*hook = func() {}
		}
	}
	o.Unsealing()
	if err := verify(k); err != nil {
		return err
	}
	o.Unsealed()
	if m.open[o.Name] != "" {
		return fmt.Errorf("cannot map %s: it exists", o.Name)
	}
	head := make([]byte, 32<<10)
	f, err := os.Open(i.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.ReadAt(head, 0); err != nil {
		return err
	}
	digest := volumeKeyDigest.Find(head)
	if digest == nil {
		return fmt.Errorf("cannot find the digest in the header of %s", i.Path)
	}
	plain := fmt.Sprintf("%s.%x", i.Path, sha256.Sum256(digest))
	if _, err := os.Stat(plain); errors.Is(err, fs.ErrNotExist) {
		if err := m.noise(plain); err != nil {
			return err
		}
	}
	m.open[o.Name], m.unfinished[o.Name] = i.Path, true
	if o.Loaded != nil {
		m.mu.Unlock()
		o.Loaded()
		m.mu.Lock()
	}
	delete(m.unfinished, o.Name)
	return os.Symlink(plain, m.Path(o.Name))
}

// noise makes what a mapping under a new key shows: no zeros.
func (m *machine) noise(plain string) error {
	const size = 24 << 20
	noise := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{4}).Read(noise)
	f, err := os.Create(plain)
	if err != nil {
		return err
	}
	_, head := f.WriteAt(noise, 0)
	_, tail := f.WriteAt(noise, size-int64(len(noise)))
	_, last := f.WriteAt([]byte(m.last), size-512)
	return errors.Join(head, tail, last, f.Close())
}

// plain is what the newest header of a disk shows when it is open.
func (m *machine) plain(identity string) string {
	m.t.Helper()
	files, err := filepath.Glob(filepath.Join(m.dir, identity+".img.*"))
	if err != nil || len(files) == 0 {
		m.t.Fatalf("%s was never opened (%v)", identity, err)
	}
	return slices.MaxFunc(files, func(a, b string) int {
		sa, _ := os.Stat(a)
		sb, _ := os.Stat(b)
		return sa.ModTime().Compare(sb.ModTime())
	})
}

func (m *machine) Close(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open[name] == "" {
		return fmt.Errorf("cannot close %s: %w", name, luks.ErrNotOpen)
	}
	for _, what := range m.mounts {
		if what == m.Path(name) {
			return fmt.Errorf("cannot close %s: %w", name, luks.ErrBusy)
		}
	}
	if m.swaps[m.Path(name)] {
		return fmt.Errorf("cannot close %s: %w", name, luks.ErrBusy)
	}
	delete(m.gone, name)
	delete(m.open, name)
	return os.Remove(m.Path(name))
}

func (m *machine) mounter() mounter { return machineMounts{m} }

type machineMounts struct{ *machine }

func (m machineMounts) StartMount(_ context.Context, u systemd.Mount) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("mount", u.Where); err != nil {
		return err
	}
	if other := m.mounts[u.Where]; other != "" && other != u.What {
		return &systemd.MountError{What: u.What, Where: u.Where, Result: "already mounted"}
	}
	found, err := volumes.Filesystem(context.Background(), u.What)
	if err != nil {
		return err
	}
	if found.Type != u.Type {
		return &systemd.MountError{What: u.What, Where: u.Where, Err: fmt.Errorf("it holds %q, want %s", found.Type, u.Type)}
	}
	m.mounts[u.Where] = u.What
	return nil
}

func (m machineMounts) StopMount(_ context.Context, where string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.mounts, where)
	return nil
}

func (m machineMounts) Close() {}

// StartSwap is swapon(8): it takes nothing but swap.
func (m machineMounts) StartSwap(_ context.Context, device, _ string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, err := volumes.Filesystem(context.Background(), device)
	if err == nil && found.Type != "swap" {
		err = fmt.Errorf("%s holds %q, want swap", device, found.Type)
	}
	if err != nil {
		return err
	}
	m.swaps[device] = true
	return nil
}

func (m machineMounts) StopSwap(_ context.Context, device string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("swapoff", device); err != nil {
		return err
	}
	delete(m.swaps, device)
	return nil
}

// sums are the checksums of the disks that exist now.
func (m *machine) sums() map[string][32]byte {
	m.t.Helper()
	out := map[string][32]byte{}
	for _, d := range m.devices {
		data, err := os.ReadFile(d.Path)
		if err != nil {
			m.t.Fatal(err)
		}
		out[d.Identity] = sha256.Sum256(data)
	}
	return out
}

// untouched wants the disks to be as they were.
func (m *machine) untouched(before map[string][32]byte) {
	m.t.Helper()
	for identity, sum := range m.sums() {
		if sum != before[identity] {
			m.t.Errorf("disk %s was written to", identity)
		}
	}
}

func (m *machine) records() keycache.Records {
	m.t.Helper()
	s, err := keycache.ViewStore(m.cfg.StateDir)
	if err != nil {
		m.t.Fatal(err)
	}
	r, err := s.Load()
	if err != nil {
		m.t.Fatal(err)
	}
	return r
}

func (m *machine) calls(want map[string]int) {
	m.t.Helper()
	for _, op := range []string{"GenerateDataKey", "Decrypt"} {
		if got := m.kms.Count(op); got != want[op] {
			m.t.Errorf("%s was called %d times, want %d", op, got, want[op])
		}
	}
}

func TestFirstBootThenReboot(t *testing.T) {
	m := newMachine(t)
	for i, class := range []volumes.Class{volumes.ClassInstanceStore, volumes.ClassInstanceStore, volumes.ClassEBS, volumes.ClassExplicit} {
		m.disk(class, fmt.Sprintf("disk%d", i))
	}
	m.runOK()
	m.calls(map[string]int{"GenerateDataKey": 1, "Decrypt": 1})
	for _, where := range []string{"/mnt", "/mnt1", "/mnt2", "/mnt3"} {
		if m.mounts[where] == "" {
			t.Errorf("nothing is mounted on %s", where)
		}
	}
	if r := m.records(); len(r.Keys) != 1 || len(r.Volumes) != 4 {
		t.Fatalf("got %d key and %d volume records, want 1 and 4", len(r.Keys), len(r.Volumes))
	} else {
		for _, v := range r.Volumes {
			if v.State != keycache.StateReady {
				t.Errorf("volume %s is %s", v.UUID, v.State)
			}
		}
	}
	mounts := fmt.Sprint(m.mounts)
	before := m.sums()

	r := m.runOK()
	if slices.ContainsFunc(r.Outcomes, func(o Outcome) bool { return o.Action.Verb != Nothing }) {
		t.Error("a second run found something to do")
	}
	m.calls(map[string]int{"GenerateDataKey": 1, "Decrypt": 1})

	m.reboot()
	r = m.runOK()
	m.calls(map[string]int{"GenerateDataKey": 1, "Decrypt": 2})
	if got := fmt.Sprint(m.mounts); got != mounts {
		t.Errorf("mounts after the reboot: %s, before: %s", got, mounts)
	}
	for _, o := range r.Outcomes {
		if o.Action.Verb != Unlock {
			t.Errorf("%s %s after a reboot", o.Action.Verb, o.Action.Device.Path)
		}
	}
	m.untouched(before)
}

// Noise can look like a signature: two bytes at the end make a JMicron RAID. It is seen neither before mkfs nor at a later boot.
func TestNoiseThatLooksLikeASignature(t *testing.T) {
	m := newMachine(t)
	m.last = "JM"
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassInstanceStore, "AWS1")
	m.runOK()
	for _, identity := range []string{"vol-1", "AWS1"} {
		if c, err := volumes.Filesystem(t.Context(), m.plain(identity)); err != nil || c.Type != "ext4" {
			t.Errorf("%s: blkid finds %+v, %v", identity, c, err)
		}
	}
}

func TestKeyScopeVolume(t *testing.T) {
	m := newMachine(t)
	m.cfg.KeyScope = ScopeVolume
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	m.calls(map[string]int{"GenerateDataKey": 2, "Decrypt": 2})
	if r := m.records(); len(r.Keys) != 2 {
		t.Errorf("got %d key records, want 2", len(r.Keys))
	}
	m.reboot()
	m.runOK()
	m.calls(map[string]int{"GenerateDataKey": 2, "Decrypt": 4})
}

// What KMS, IMDS or the machine refuse ends before a disk is touched.
func TestNothingIsTouchedWithoutAKey(t *testing.T) {
	for name, tc := range map[string]struct {
		set    func(*machine)
		reason keycache.Reason
	}{
		"denied":              {func(m *machine) { m.kms.Deny("GenerateDataKey") }, keycache.ReasonDenied},
		"decrypt denied":      {func(m *machine) { m.kms.Deny("Decrypt") }, keycache.ReasonDenied},
		"disabled":            {func(m *machine) { m.kms.SetState(m.kms.ARN(), kmstest.Disabled) }, keycache.ReasonKeyState},
		"pending deletion":    {func(m *machine) { m.kms.SetState(m.kms.ARN(), kmstest.PendingDeletion) }, keycache.ReasonKeyState},
		"unknown key":         {func(m *machine) { m.cfg.KMSKey = m.kms.ARN()[:len(m.kms.ARN())-4] + "0000" }, keycache.ReasonNotFound},
		"AWS managed":         {func(m *machine) { m.cfg.KMSKey = m.kms.NewKey(kmstest.KeySpec{Manager: "AWS"}) }, keycache.ReasonAWSManaged},
		"asymmetric":          {func(m *machine) { m.cfg.KMSKey = m.kms.NewKey(kmstest.KeySpec{Spec: "RSA_2048"}) }, keycache.ReasonAsymmetric},
		"no role":             {func(m *machine) { m.impatient(); m.imds.Set(kmstest.NoRole) }, keycache.ReasonNoCredentials},
		"KMS down":            {func(m *machine) { m.impatient(); m.kms.Fail(kmstest.Fault{Cut: true}) }, keycache.ReasonUnavailable},
		"KMS hangs":           {func(m *machine) { m.impatient(); m.kms.Fail(kmstest.Fault{Hang: true}) }, keycache.ReasonUnavailable},
		"another key comes":   {func(m *machine) { m.kms.Fail(kmstest.Fault{Op: "Decrypt", Rewrite: otherPlaintext}) }, ""},
		"no such kernel":      {func(m *machine) { m.fail = failing("kernel", "") }, ""},
		"device is taken":     {func(m *machine) { m.fail = failing("hold", "") }, ""},
		"state dir read-only": {func(m *machine) { m.readOnlyState() }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.disk(volumes.ClassEBS, "vol-1")
			m.disk(volumes.ClassInstanceStore, "AWS1")
			tc.set(m)
			before := m.sums()
			r, err := m.node().Run(t.Context())
			errs := r.Failures()
			if err != nil {
				errs = []error{err}
			} else if len(errs) != 2 {
				t.Errorf("%d volumes failed, want 2: %v", len(errs), errs)
			}
			for _, err := range errs {
				var ke *keycache.Error
				if tc.reason != "" && (!errors.As(err, &ke) || ke.Reason != tc.reason) {
					t.Errorf("got %v, want reason %s", err, tc.reason)
				}
			}
			m.untouched(before)
			recorded, _ := filepath.Glob(filepath.Join(m.cfg.StateDir, "volumes", "*"))
			if len(recorded) > 0 || len(m.open) > 0 {
				t.Error("a volume was recorded or opened")
			}
		})
	}
}

func failing(step, what string) func(string, string) error {
	return func(s, w string) error {
		if s == step && (what == "" || what == w) {
			return errors.New("broken on purpose")
		}
		return nil
	}
}

func otherPlaintext(answer map[string]any) {
	answer["Plaintext"] = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
}

// readOnlyState makes the state directory one that cannot be written, for root
// too: its keys directory is a file.
func (m *machine) readOnlyState() {
	if err := os.MkdirAll(m.cfg.StateDir, 0o700); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.cfg.StateDir, "keys"), nil, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// IMDS says who we are; without it nothing may rest on the records.
func TestWithoutIdentityNothingIsDone(t *testing.T) {
	for _, mode := range []kmstest.Mode{kmstest.Off, kmstest.HopLimit, kmstest.Down} {
		t.Run(string(mode), func(t *testing.T) {
			m := newMachine(t)
			m.disk(volumes.ClassEBS, "vol-1")
			m.impatient()
			m.imds.Set(mode)
			before := m.sums()
			_, err := m.node().Run(t.Context())
			var ke *keycache.Error
			if !errors.As(err, &ke) || ke.Reason != keycache.ReasonIMDS || !ke.Retryable() {
				t.Errorf("got %v, want a retryable IMDS error", err)
			}
			m.untouched(before)
		})
	}
}

func TestForeignDiskIsRefusedAndTheOthersGoOn(t *testing.T) {
	m := newMachine(t)
	foreign := m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	if err := volumes.MakeFilesystem(t.Context(), foreign.Path, "ext4", "data", ""); err != nil {
		t.Fatal(err)
	}
	before := m.sums()["vol-1"]
	r := m.run()
	var refused *RefusedError
	if !errors.As(r.Outcomes[0].Err, &refused) || refused.Refusal != RefusedContent || !strings.Contains(refused.Reason, "ext4") {
		t.Errorf("got %v, want a refusal that names ext4", r.Outcomes[0].Err)
	}
	if r.Outcomes[1].Err != nil || len(m.mounts) != 1 {
		t.Errorf("the other volume was not made: %v", r.Outcomes[1].Err)
	}
	if m.sums()["vol-1"] != before {
		t.Error("the foreign disk was written to")
	}
}

// A disk that stops being blank between plan and apply is not formatted.
func TestDiskThatChangesAfterThePlanIsNotFormatted(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.fail = func(step, what string) error {
		if step != "hold" {
			return nil
		}
		return os.WriteFile(d.Path, append([]byte("precious"), make([]byte, 40<<20-8)...), 0o600)
	}
	r := m.run()
	var refused *RefusedError
	if !errors.As(r.Outcomes[0].Err, &refused) || !strings.Contains(refused.Reason, "changed after it was planned") {
		t.Errorf("got %v, want a refusal", r.Outcomes[0].Err)
	}
	if data, err := os.ReadFile(d.Path); err != nil || !strings.HasPrefix(string(data), "precious") {
		t.Error("the disk was written to")
	}
}

// A format that is cut at any step is taken up by the next run, with the same
// key and UUID, and `ready` is only written at the end.
func TestCutFormatIsTakenUp(t *testing.T) {
	for _, step := range []string{"open", "mount"} {
		t.Run(step, func(t *testing.T) {
			m := newMachine(t)
			m.disk(volumes.ClassEBS, "vol-1")
			m.fail = failing(step, "")
			if r := m.run(); len(r.Failures()) != 1 {
				t.Fatalf("the cut did not happen: %v", r.Failures())
			}
			first := m.records()
			m.reboot()
			m.fail = func(string, string) error { return nil }
			m.runOK()
			second := m.records()
			if len(second.Keys) != 1 || len(second.Volumes) != 1 {
				t.Fatalf("got %d keys and %d volumes, want one of each", len(second.Keys), len(second.Volumes))
			}
			for uuid, v := range second.Volumes {
				if v.State != keycache.StateReady || first.Volumes[uuid].KeyID != v.KeyID {
					t.Errorf("volume %s is %s under %s, was under %q", uuid, v.State, v.KeyID, first.Volumes[uuid].KeyID)
				}
			}
		})
	}
}

// luksFormat fills the key slots with noise before it writes a header.
func TestFormatCutBeforeTheHeaderIsTakenUp(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.fail = failing("open", "")
	m.run()
	m.fail = func(string, string) error { return nil }
	m.write(d, 0, make([]byte, luks.KeyslotsOffset))
	m.write(d, d.Size-4096, []byte("what mkfs of an earlier try wrote, encrypted"))
	m.runOK()
	if len(m.mounts) != 1 || len(m.records().Volumes) != 1 {
		t.Errorf("mounts %v, records %v", m.mounts, m.records().Volumes)
	}
}

// A header that was finished, and that fails the check once KMS has answered, is not formatted over: what is behind it may be data.
func TestFinishedHeaderThatFailsIsNotFormatted(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.fail = failing("open", "")
	m.run()
	var before map[string][32]byte
	m.fail = func(step, _ string) error {
		if step != "hold" {
			return nil
		}
		err := lukstest.Attacks()[0].Do(d.Path)
		before = m.sums()
		return err
	}
	if errs := m.run().Failures(); len(errs) != 1 || !strings.Contains(errs[0].Error(), "its LUKS header cannot be trusted") {
		t.Errorf("got %v, want a refusal", errs)
	}
	m.untouched(before)
}

// A volume that is recorded as being formatted but holds somebody's filesystem is
// not formatted again; one that holds our own mkfs's is.
func TestResumeLooksInsideFirst(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	var v keycache.VolumeRecord
	for _, v = range m.records().Volumes {
	}
	rewind := func() {
		t.Helper()
		m.reboot()
		v.State = keycache.StateFormatting
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(m.cfg.StateDir, "volumes", v.UUID+".json"), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rewind()
	m.runOK()
	rewind()
	// Somebody opened the volume by hand and made a filesystem of his own.
	plain := m.plain("vol-1")
	if err := os.Truncate(plain, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(plain, 24<<20); err != nil {
		t.Fatal(err)
	}
	if err := volumes.MakeFilesystem(t.Context(), plain, "ext4", "his", ""); err != nil {
		t.Fatal(err)
	}
	refused := func(want string) {
		t.Helper()
		before := m.sums()
		r := m.run()
		if errs := r.Failures(); len(errs) != 1 || !strings.Contains(errs[0].Error(), "recorded as being formatted, but it holds "+want) {
			t.Errorf("got %v, want a refusal with %q", errs, want)
		}
		m.untouched(before)
	}
	refused("ext4 filesystem (label his)")
	// Of two signatures blkid names neither.
	m.write(volumes.Device{Path: plain}, 4086, []byte("SWAP-SPACE"))
	refused("signatures of more than one format")
}

// TestAnotherDiskAtTheSamePathIsNotOpened: a disk that is not the one that was seen any more is neither opened nor recorded.
func TestAnotherDiskAtTheSamePathIsNotOpened(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	m.reboot()
	m.fail = failing("check", "vol-1")
	if errs := m.run().Failures(); len(errs) != 1 || len(m.open) != 1 || len(m.mounts) != 1 {
		t.Errorf("%v; open: %v, mounted: %v", errs, m.open, m.mounts)
	}
}

// TestVolumesGoLiveTogether: no volume is to be seen before the last has its table, so that udev does not look at the first meanwhile.
func TestVolumesGoLiveTogether(t *testing.T) {
	m := newMachine(t)
	for i := range 6 {
		m.disk(volumes.ClassEBS, fmt.Sprint("vol-", i))
	}
	m.runOK()
	m.reboot()
	var mu sync.Mutex
	opening, early := 0, 0
	m.fail = func(step, _ string) error {
		mu.Lock()
		defer mu.Unlock()
		switch step {
		case "open":
			opening++
		case "mount":
			if opening < 6 {
				early++
			}
		}
		return nil
	}
	m.runOK()
	if opening != 6 || early != 0 || len(m.mounts) != 6 {
		t.Errorf("%d opened, %d mounted before the last was, %d mounted", opening, early, len(m.mounts))
	}
}

// TestNobodyWaitsLongForASickDisk: a volume goes live also where another one stays on its way, but not at once.
func TestNobodyWaitsLongForASickDisk(t *testing.T) {
	var r rendezvous
	sick, healthy := r.enter(), r.enter()
	wait := func(limit time.Duration) chan struct{} {
		live := make(chan struct{})
		go func() {
			defer close(live)
			healthy.wait(limit)
		}()
		return live
	}
	select {
	case <-wait(time.Millisecond):
	case <-time.After(10 * time.Second):
		t.Error("it waits for a volume that stays on its way")
	}
	live := wait(time.Hour)
	select {
	case <-live:
		t.Error("it did not wait for a volume on its way")
	case <-time.After(20 * time.Millisecond):
	}
	sick.leave()
	<-live
}

// TestWorkqueues: a read queue is left out only where somebody asks for it, as some kernels corrupt memory without it.
func TestWorkqueues(t *testing.T) {
	for _, c := range []struct {
		setting     string
		rotational  bool
		read, write bool // left out
	}{
		{"auto", false, false, true},
		{"auto", true, false, false},
		{"on", false, false, false},
		{"off", true, true, true},
	} {
		a := &applier{Node: &Node{cfg: Config{Workqueues: c.setting}}}
		got := a.openOptions(Action{Device: DeviceFacts{Device: volumes.Device{Rotational: c.rotational}}})
		if got.NoReadWorkqueue != c.read || got.NoWriteWorkqueue != c.write {
			t.Errorf("%s, rotational %v: %+v", c.setting, c.rotational, got)
		}
	}
}

// TestMappingWithoutATableIsMadeAnew: a run that was killed between loading a table and using it leaves a mapping that shows nothing.
func TestMappingWithoutATableIsMadeAnew(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	n := m.node()
	records := m.records()
	for _, v := range records.Volumes {
		m.open[v.Mapping], m.unfinished[v.Mapping] = m.devices[0].Path, true
	}
	if plan, err := n.Plan(t.Context()); err != nil || len(m.unfinished) != 1 {
		t.Errorf("plan changed something: %v %v", plan, err)
	}
	m.runOK()
	if len(m.mounts) != 1 || len(m.unfinished) != 0 {
		t.Errorf("mounted: %v, unfinished: %v", m.mounts, m.unfinished)
	}
}

// TestOpenVolumeIsMountedLater: where a mount failed, the volume stays open, and the next run lets systemd look at it again
// before it mounts it.
func TestOpenVolumeIsMountedLater(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.fail = failing("mount", "/mnt")
	if errs := m.run().Failures(); len(errs) != 1 || len(m.open) != 1 {
		t.Fatalf("%v; open: %v", errs, m.open)
	}
	var steps []string
	m.fail = func(step, _ string) error {
		steps = append(steps, step)
		return nil
	}
	m.runOK()
	if !slices.Equal(steps, []string{"announce", "mount"}) || len(m.mounts) != 1 {
		t.Errorf("steps %q, mounts %v", steps, m.mounts)
	}
}

// TestRecordOlderThanItsVolume: a boot volume restored to a state before `ready` speaks of a volume as being formatted that has
// been in use since, or that has got another key. Nothing of it is formatted; without the record it is adopted.
func TestRecordOlderThanItsVolume(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	var v keycache.VolumeRecord
	for _, v = range m.records().Volumes {
	}
	record := filepath.Join(m.cfg.StateDir, "volumes", v.UUID+".json")
	rewind := func() {
		t.Helper()
		v.State = keycache.StateFormatting
		data, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(record, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func(want string) {
		t.Helper()
		before := m.sums()
		r := m.run()
		if errs := r.Failures(); len(errs) != 1 || !strings.Contains(errs[0].Error(), want) {
			t.Errorf("got %v, want %q", errs, want)
		}
		m.untouched(before)
	}
	// The kernel notes a mount in the superblock.
	plain := m.plain("vol-1")
	m.write(volumes.Device{Path: plain}, 1024+52, []byte{1})
	m.reboot()
	rewind()
	refused("the record is older than the volume")

	// Its header under another key, all of it well made.
	head := make([]byte, luks.DataOffset)
	if f, err := os.Open(d.Path); err != nil {
		t.Fatal(err)
	} else if _, err = io.ReadFull(f, head); err != nil {
		t.Fatal(err)
	}
	m.write(d, 0, make([]byte, luks.DataOffset))
	var k keycache.KeyRecord
	for _, k = range m.records().Keys {
	}
	if err := luks.Format(t.Context(), d.Path, luks.FormatOptions{UUID: v.UUID, KeyARN: k.KeyARN, WrappedKey: k.WrappedKey}, otherKey{}); err != nil {
		t.Fatal(err)
	}
	refused("the key does not open the volume")
	m.write(d, 0, head)

	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	if r := m.runOK(); len(r.Outcomes) != 1 || r.Outcomes[0].Action.Verb != Adopt {
		t.Errorf("outcomes %v, want an adoption", r.Outcomes)
	}
}

// otherKey is a data key that KMS never made.
type otherKey struct{}

func (otherKey) Bytes() []byte        { return bytes.Repeat([]byte{7}, 32) }
func (k otherKey) Passphrase() []byte { return base64.StdEncoding.AppendEncode(nil, k.Bytes()) }

func TestReadyVolumeIsNeverFormatted(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	if err := os.Truncate(d.Path, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.Path, 40<<20); err != nil {
		t.Fatal(err)
	}
	before := m.sums()
	r := m.run()
	if errs := r.Failures(); len(errs) != 1 || !strings.Contains(errs[0].Error(), "recorded ready, but the disk is blank") {
		t.Errorf("got %v", errs)
	}
	m.untouched(before)
}

func TestStopStartGivesInstanceStoreAnew(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS1")
	m.runOK()
	m.reboot()
	m.devices = nil
	m.disk(volumes.ClassInstanceStore, "AWS2")
	m.runOK()
	if m.mounts["/mnt"] == "" {
		t.Error("the new disk is not mounted on the old one's place")
	}
	if n := len(m.records().Volumes); n != 1 {
		t.Errorf("got %d live volume records, want 1", n)
	}
	archived, err := filepath.Glob(filepath.Join(m.cfg.StateDir, "archive", "*", "*.json"))
	if err != nil || len(archived) == 0 {
		t.Errorf("the old record is not in the archive (%v)", err)
	}
}

func TestTamperedHeaderIsNeverOpened(t *testing.T) {
	m := newMachine(t)
	a, b := m.disk(volumes.ClassEBS, "vol-1"), m.disk(volumes.ClassEBS, "vol-2")
	m.cfg.KeyScope = ScopeVolume
	m.runOK()
	m.reboot()
	// The other volume's header, put on the first disk: it is whole, but not this volume's.
	data, err := os.ReadFile(b.Path)
	if err != nil {
		t.Fatal(err)
	}
	m.write(a, 0, data[:16<<20])
	r := m.run()
	if n := len(r.Failures()); n != 3 { // both twins, and the volume that no disk shows
		t.Errorf("got %v", r.Failures())
	}
	if len(m.open) != 0 {
		t.Error("a volume of two was opened")
	}
}

func TestDamagedPrimaryHeaderIsRestored(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.write(d, 4096+20, []byte("garbage"))
	r := m.runOK()
	if !strings.Contains(r.Outcomes[0].Action.Reason, "primary LUKS header is damaged") {
		t.Errorf("the plan does not say so: %s", r.Outcomes[0].Action.Reason)
	}
	if i, err := luks.Inspect(d.Path); err != nil || i.PrimaryDamaged || !i.Pass() {
		t.Errorf("the header was not restored: %+v, %v", i, err)
	}
}

// The secondary header is put over a damaged primary only when the data key says
// that it is ours: an attacker must not have us copy his.
func TestSecondaryHeaderOfAnotherKeyIsNotCopied(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	good, err := luks.Inspect(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	other, err := keycache.NewKey(make([]byte, 32))
	if err == nil {
		err = luks.Format(t.Context(), d.Path, luks.FormatOptions{UUID: good.Header.UUID, KeyARN: m.kms.ARN(), WrappedKey: good.Header.Token.WrappedKey}, other)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.write(d, 4096+20, []byte("garbage"))
	before := m.sums()
	if errs := m.run().Failures(); len(errs) != 1 || !errors.Is(errs[0], luks.ErrWrongKey) {
		t.Errorf("got %v, want ErrWrongKey", errs)
	}
	m.untouched(before)
	if len(m.open) > 0 {
		t.Error("it was opened")
	}
}

// What tells this node's records from others' must be there.
func TestNodeWithoutInstanceIDUsesNoRecords(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	records := fmt.Sprint(m.records())
	m.impatient()
	m.imds.SetIdentity("instanceId", "")
	if _, err := m.node().Run(t.Context()); err == nil {
		t.Error("it ran")
	}
	if got := fmt.Sprint(m.records()); got != records {
		t.Errorf("records: %s\nbefore: %s", got, records)
	}
}

func TestVolumesAreAdoptedFromTheirTokens(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	m.reboot()
	old := m.records()
	if err := os.RemoveAll(m.cfg.StateDir); err != nil { // the boot volume is lost
		t.Fatal(err)
	}
	m.imds.SetIdentity("instanceId", "i-0fedcba9876543210")
	before := m.sums()
	m.runOK()
	m.calls(map[string]int{"GenerateDataKey": 1, "Decrypt": 2})
	adopted := m.records()
	for uuid, v := range old.Volumes {
		if adopted.Volumes[uuid].State != keycache.StateReady || adopted.Volumes[uuid].Filesystem != v.Filesystem {
			t.Errorf("volume %s was not adopted: %+v", uuid, adopted.Volumes[uuid])
		}
	}
	if len(adopted.Keys) != 1 {
		t.Errorf("got %d key records for one wrapped key", len(adopted.Keys))
	}
	m.untouched(before)
	m.reboot()
	m.runOK()
}

// What opens by our token and holds no filesystem of ours was never in use by us: it is neither recorded nor left open.
func TestVolumeWithoutAFilesystemIsNotAdopted(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	plain := m.plain("vol-1")
	m.reboot()
	if err := errors.Join(os.RemoveAll(m.cfg.StateDir), os.Truncate(plain, 0), os.Truncate(plain, 24<<20)); err != nil {
		t.Fatal(err)
	}
	before := m.sums()
	var refused *RefusedError
	if errs := m.run().Failures(); len(errs) != 1 || !errors.As(errs[0], &refused) || !strings.Contains(refused.Reason, "holds no") {
		t.Errorf("got %v, want a refusal", errs)
	}
	if r := m.records(); len(r.Volumes) > 0 || len(m.open) > 0 {
		t.Errorf("records %v, open %v", r.Volumes, m.open)
	}
	m.untouched(before)
}

// While one run works no other does, and the one that waits in vain says for whom.
func TestSecondRunWaitsForTheFirst(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	first, second := m.node(), m.node()
	var err error
	first.atStep = func(s step) {
		if s == stepIntent {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, err = second.Run(ctx)
		}
	}
	if r, err := first.Run(t.Context()); err != nil || len(r.Failures()) > 0 {
		t.Errorf("the first run: %v, %v", r.Failures(), err)
	}
	if !errors.Is(err, keycache.ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint("process ", os.Getpid())) {
		t.Errorf("the second run: %v", err)
	}
}

func TestKeysAreWipedAtTheEnd(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	n := m.node()
	wipe := n.wipeKeys
	wiped := 0
	n.wipeKeys = func(keys ...*keycache.Key) error {
		wiped += len(keys)
		return wipe(keys...)
	}
	if _, err := n.Run(t.Context()); err != nil || wiped != 1 {
		t.Errorf("%d keys were wiped, want 1 (%v)", wiped, err)
	}
}

func TestRecordsOfAnImageAreNotUsed(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.devices = nil
	m.disk(volumes.ClassEBS, "vol-2")
	m.imds.SetIdentity("instanceId", "i-0fedcba9876543210")
	m.runOK()
	m.calls(map[string]int{"GenerateDataKey": 2, "Decrypt": 2})
	kept, err := filepath.Glob(filepath.Join(m.cfg.StateDir, "quarantine", "*", "*"))
	if err != nil || len(kept) < 2 {
		t.Errorf("the image's records were not kept: %v (%v)", kept, err)
	}
}

func TestUnlockNeverFormats(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.disk(volumes.ClassEBS, "vol-2")
	m.reboot()
	before := m.sums()
	r, err := m.node().Unlock(t.Context(), nil)
	if err != nil || len(r.Failures()) > 0 || len(m.mounts) != 1 {
		t.Errorf("unlock: %v, %v, mounts %v", err, r.Failures(), m.mounts)
	}
	r, err = m.node().Unlock(t.Context(), []string{"vol-2"})
	if err != nil || len(r.Failures()) != 1 {
		t.Errorf("unlock of a blank volume: %v, %v", err, r.Failures())
	}
	m.untouched(before)
	var unknown *UnknownVolumeError
	if _, err = m.node().Unlock(t.Context(), []string{"vol-3"}); !errors.As(err, &unknown) {
		t.Errorf("unlock of an unknown volume: %v", err)
	}
}

func TestLockAndUnlockByEveryName(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	var v keycache.VolumeRecord
	for _, rec := range m.records().Volumes {
		if rec.Identity == "vol-1" {
			v = rec
		}
	}
	for _, name := range []string{"vol-1", d.Path, v.UUID, v.Mapping, v.MountPoint} {
		locked, err := m.node().Lock(t.Context(), []string{name})
		if err != nil || len(locked) != 1 || locked[0].Err != nil || locked[0].Volume.UUID != v.UUID {
			t.Fatalf("lock %s: %+v, %v", name, locked, err)
		}
		s, err := m.node().Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, vs := range s.Volumes {
			if want := map[bool]string{true: "locked", false: "mounted"}[vs.UUID == v.UUID]; vs.State != want {
				t.Errorf("after lock %s, %s is %q, want %q", name, vs.Identity, vs.State, want)
			}
		}
		if r, err := m.node().Unlock(t.Context(), []string{name}); err != nil || len(r.Failures()) > 0 || len(r.Outcomes) != 1 {
			t.Fatalf("unlock %s: %+v, %v", name, r, err)
		}
	}
	if _, err := m.node().Lock(t.Context(), []string{"vol-9"}); err == nil {
		t.Error("an unknown name was locked")
	}
}

func TestStatusFile(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	if _, err := ReadStatus(m.node().statusPath); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before a run: %v", err)
	}
	m.runOK()
	s, err := ReadStatus(m.node().statusPath)
	if err != nil || s.Result != "ok" || s.KMS.GenerateDataKey != 1 || s.KMS.Decrypt != 1 || len(s.Volumes) != 1 || s.Volumes[0].Action != "format" {
		t.Errorf("got %+v, %v", s, err)
	}
	m.reboot()
	m.kms.Deny("Decrypt")
	m.run()
	if s, err = ReadStatus(m.node().statusPath); err != nil || s.Result != "failed" || s.Volumes[0].Error == "" {
		t.Errorf("after a failure: %+v, %v", s, err)
	}
}

func TestPlanTouchesNothing(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	before := m.sums()
	p, err := m.node().Plan(t.Context())
	if err != nil || len(p.Actions) != 1 || p.Actions[0].Verb != Format {
		t.Errorf("got %+v, %v", p, err)
	}
	m.untouched(before)
	if _, err := os.Stat(m.cfg.StateDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("plan made the state directory (%v)", err)
	}
	m.calls(nil)
}

func TestStateDirectoryOnAManagedVolumeIsRefused(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.devices[0].Uses = []volumes.Use{{Kind: volumes.UseSystem, What: m.cfg.StateDir, Evidence: "the state directory is on it"}}
	var ce *ConfigError
	if _, err := m.node().Run(t.Context()); !errors.As(err, &ce) || !strings.Contains(err.Error(), "only its records can open") {
		t.Errorf("got %v", err)
	}
}

func TestStateDirectoryBehindASymlinkIsRefused(t *testing.T) {
	m := newMachine(t)
	real := filepath.Join(m.dir, "elsewhere")
	if err := errors.Join(os.Mkdir(real, 0o700), os.Symlink(real, filepath.Join(m.dir, "link"))); err != nil {
		t.Fatal(err)
	}
	m.cfg.StateDir = filepath.Join(m.dir, "link", "state")
	var ce *ConfigError
	if _, err := m.node().Run(t.Context()); !errors.As(err, &ce) || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("got %v", err)
	}
}
