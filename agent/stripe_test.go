package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// machineArrays stands in for md: a superblock is a line of text where the real one would be, and the array a disk of its own.
type machineArrays struct{ m *machine }

const (
	arrayOffset = 4096
	arrayLine   = "array %s of %d disks\n"
)

// disksAndArrays are the disks as a scan shows them, with the stripes that run.
func (m *machine) disksAndArrays() []volumes.Device {
	var all []volumes.Device
	for _, d := range m.devices {
		d.Member = memberOf(d.Path)
		if a, ok := m.arrays[d.Member.Stripe]; ok {
			d.Member.Array = a.Name
			d.Uses = append(d.Uses, volumes.Use{Kind: volumes.UseHeld, What: a.Name, Evidence: a.Name + " is built on " + d.Name})
		}
		all = append(all, d)
	}
	for _, id := range sortedKeys(m.arrays) {
		all = append(all, m.arrays[id])
	}
	return all
}

func memberOf(path string) (member volumes.Member) {
	f, err := os.Open(path)
	if err != nil {
		return member
	}
	defer f.Close()
	line := make([]byte, 80)
	_, _ = f.ReadAt(line, arrayOffset)
	if n, _ := fmt.Sscanf(string(line), arrayLine, &member.Stripe, &member.Disks); n != 2 {
		return volumes.Member{}
	}
	return member
}

func (a machineArrays) Ready() error { return a.m.fail("mdadm", "") }

func (a machineArrays) Make(ctx context.Context, id string, members []volumes.Device) error {
	for _, d := range members {
		if err := a.m.fail("superblock", d.Identity); err != nil {
			return err
		}
		if !a.m.held[d.Path] {
			return fmt.Errorf("%s is not held", d.Path)
		}
		a.m.write(d, arrayOffset, fmt.Appendf(nil, arrayLine, id, len(members)))
	}
	path := filepath.Join(a.m.dir, id+".img")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, int64(len(members))*40<<20)); err != nil {
		return err
	}
	return a.Assemble(ctx, id, members)
}

func (a machineArrays) Assemble(_ context.Context, id string, members []volumes.Device) error {
	if err := a.m.fail("assemble", id); err != nil {
		return err
	}
	array := volumes.Device{
		Name: "md-" + id, Path: filepath.Join(a.m.dir, id+".img"), Size: int64(len(members)) * 40 << 20, LogicalSectorSize: 512,
		Class: volumes.ClassInstanceStore, Identity: id,
	}
	for _, d := range members {
		if memberOf(d.Path) != (volumes.Member{Stripe: id, Disks: len(members)}) {
			return fmt.Errorf("%s is not part of %s", d.Path, id)
		}
		array.Members = append(array.Members, d.Name)
	}
	a.m.arrays[id] = array
	return nil
}

func (a machineArrays) Release(context.Context, volumes.Device) error { return nil }

func (a machineArrays) Clear(ctx context.Context, d volumes.Device, id string) error {
	if !a.m.held[d.Path] || memberOf(d.Path).Stripe != id {
		return fmt.Errorf("%s is not held, or not part of %s", d.Path, id)
	}
	return volumes.MakeBlank(ctx, d.Path)
}

// striped is a machine with two blank instance-store disks that are to become one, and an EBS volume.
func striped(t *testing.T) (m *machine, disks []volumes.Device) {
	t.Helper()
	m = newMachine(t)
	m.cfg.Stripe = On
	disks = []volumes.Device{m.disk(volumes.ClassInstanceStore, "ssd1"), m.disk(volumes.ClassInstanceStore, "ssd2")}
	m.disk(volumes.ClassEBS, "vol-1")
	return m, disks
}

func (m *machine) stripe() []Striped {
	m.t.Helper()
	done, err := m.node().Stripe(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	return done
}

// wantOneStripe wants the stripe to be one ready volume, beside that of EBS.
func (m *machine) wantOneStripe() {
	m.t.Helper()
	r := m.records()
	var sizes []int64
	for _, v := range r.Volumes {
		sizes = append(sizes, v.Size>>20)
		if v.State != keycache.StateReady {
			m.t.Errorf("volume %+v is not ready", v)
		}
	}
	slices.Sort(sizes)
	if !slices.Equal(sizes, []int64{40, 80}) || r.Stripe != nil {
		m.t.Errorf("records: volumes %v, stripe %+v", sizes, r.Stripe)
	}
}

func TestStripeThenReboot(t *testing.T) {
	m, disks := striped(t)
	if r := m.run(); len(r.Failures()) != 2 || len(m.records().Volumes) != 1 {
		t.Errorf("before the stripe is made: %v, %d volumes", r.Failures(), len(m.records().Volumes))
	}
	if done := m.stripe(); len(done) != 1 || !done[0].Made || !slices.Equal(done[0].Disks, []string{disks[0].Path, disks[1].Path}) {
		t.Errorf("made: %+v", done)
	}
	m.runOK()
	m.cfg.Stripe = Off // what was made is assembled all the same
	m.reboot()
	before := m.sums()
	if done := m.stripe(); len(done) != 1 || done[0].Made {
		t.Errorf("assembled: %+v", done)
	}
	m.untouched(before)
	r := m.runOK()
	if i := slices.IndexFunc(r.Outcomes, func(o Outcome) bool { return o.Action.Verb == Unlock && len(o.Action.Device.Members) == 2 }); i < 0 {
		t.Errorf("the stripe was not unlocked: %+v", r.Outcomes)
	}
	if done := m.stripe(); len(done) != 0 {
		t.Errorf("again: %+v", done)
	}
}

// After a stop of the instance other disks are there, with or without the option.
func TestStripeIsMadeAnewAfterAStop(t *testing.T) {
	for _, again := range []Switch{On, Off} {
		t.Run(string(again), func(t *testing.T) {
			m, _ := striped(t)
			m.stripe()
			m.runOK()
			m.reboot()
			m.devices = m.devices[2:]
			m.disk(volumes.ClassInstanceStore, "ssd3")
			m.disk(volumes.ClassInstanceStore, "ssd4")
			m.cfg.Stripe = again
			m.stripe()
			m.runOK()
			want := map[Switch]int{On: 2, Off: 3}[again]
			if r := m.records(); len(r.Volumes) != want {
				t.Errorf("%d volumes, want %d", len(r.Volumes), want)
			}
			m.runOK() // nobody misses the old one
		})
	}
}

// Single volumes of earlier give way to the stripe of the disks that come after a stop, all of them.
func TestStripeTakesThePlaceOfSingleVolumes(t *testing.T) {
	m, _ := striped(t)
	m.cfg.Stripe = Off
	m.runOK()
	m.reboot()
	ebs := m.devices[2]
	m.devices = nil
	m.disk(volumes.ClassInstanceStore, "ssd1") // one with the serial of an old one
	m.disk(volumes.ClassInstanceStore, "ssd4")
	m.devices = append(m.devices, ebs)
	m.cfg.Stripe = On
	m.stripe()
	m.runOK()
	r := m.records()
	if len(r.Volumes) != 2 {
		t.Errorf("volumes: %+v", r.Volumes)
	}
	m.runOK()
}

// TestCutStripe: wherever the making of a stripe is cut, the next call makes one of the same disks.
func TestCutStripe(t *testing.T) {
	cut := errors.New("cut")
	for what, fail := range map[string]func(step, what string) error{
		"before the first disk":        failing("superblock", "ssd1"),
		"between the disks":            failing("superblock", "ssd2"),
		"before the stripe is running": func(step, _ string) error { return map[bool]error{true: cut}[step == "assemble"] },
	} {
		t.Run(what, func(t *testing.T) {
			m, _ := striped(t)
			m.fail = fail
			if _, err := m.node().Stripe(t.Context()); err == nil {
				t.Fatal("it was not cut")
			}
			if m.records().Stripe == nil {
				t.Error("there is no intent")
			}
			m.fail = func(string, string) error { return nil }
			if r := m.run(); len(r.Failures()) == 0 { // a run before it formats neither disk
				t.Error("a run before the stripe is whole succeeded")
			}
			m.stripe()
			m.runOK()
			m.wantOneStripe()
		})
	}
}

// TestStripeIsAudited: each write to a disk for a stripe has its event, also one that failed.
func TestStripeIsAudited(t *testing.T) {
	m, disks := striped(t)
	m.fail = failing("superblock", "ssd2")
	if _, err := m.node().Stripe(t.Context()); err == nil {
		t.Fatal("it was not cut")
	}
	lines := m.wantEvents("stripe-made failed")
	id := m.records().Stripe.UUID
	if lines[0].Reason != "stripe "+id+" of ssd1, ssd2" || lines[0].Error == "" {
		t.Errorf("%+v", lines[0])
	}
	m.fail = func(string, string) error { return nil }
	again := m.stripe()
	lines = m.wantEvents("stripe-cleared ok", "stripe-made ok")
	if lines[0].Reason != "of stripe "+id || lines[0].Identity != "ssd1" || lines[0].Device != disks[0].Path || !strings.Contains(lines[1].Reason, again[0].UUID) {
		t.Errorf("%+v", lines)
	}
	m.reboot()
	m.stripe()
	m.wantEvents() // to assemble it writes nothing
}

// TestCutStripeIsClearedOnlyWhereItWasBegun: what is not beyond doubt the rest of a stripe that was never whole stays as it is.
func TestCutStripeIsClearedOnlyWhereItWasBegun(t *testing.T) {
	for what, test := range map[string]struct {
		change func(m *machine, disks []volumes.Device)
		says   string
	}{
		"without its intent": {func(m *machine, _ []volumes.Device) {
			if err := os.Remove(filepath.Join(m.cfg.StateDir, "stripe.json")); err != nil {
				m.t.Fatal(err)
			}
		}, "1 of the 2 disks of"},
		"the other disk has something else": {func(m *machine, disks []volumes.Device) {
			m.write(disks[1], 0, []byte("somebody's"))
		}, "the disk holds something else"},
		"the other disk is away": {func(m *machine, disks []volumes.Device) {
			m.devices = slices.DeleteFunc(m.devices, func(d volumes.Device) bool { return d.Identity == "ssd2" })
		}, "only 1 of its 2 disks are there"},
		"the intent is another's": {func(m *machine, disks []volumes.Device) {
			m.write(disks[0], arrayOffset, fmt.Appendf(nil, arrayLine, "11111111-2222-3333-4444-555555555555", 2))
		}, "1 of the 2 disks of"},
		"the intent cannot be read": {func(m *machine, _ []volumes.Device) {
			if err := os.WriteFile(filepath.Join(m.cfg.StateDir, "stripe.json"), []byte("{"), 0o600); err != nil {
				m.t.Fatal(err)
			}
		}, "1 of the 2 disks of"},
	} {
		t.Run(what, func(t *testing.T) {
			m, disks := striped(t)
			m.fail = failing("superblock", "ssd2")
			if _, err := m.node().Stripe(t.Context()); err == nil {
				t.Fatal("it was not cut")
			}
			m.fail = func(string, string) error { return nil }
			test.change(m, disks)
			before := m.sums()
			if _, err := m.node().Stripe(t.Context()); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("error %v does not tell %q", err, test.says)
			}
			m.untouched(before)
		})
	}
}

// While the intent stands nothing is made on the stripe: it is what says that the disks may be cleared.
func TestStripeIsFormattedOnlyWhenItIsWhole(t *testing.T) {
	m, _ := striped(t)
	n := m.node()
	n.atStep = func(s step) {
		if s == stepStripeMade {
			panic("cut")
		}
	}
	func() {
		defer func() { _ = recover() }()
		_, _ = n.Stripe(t.Context())
	}()
	if len(m.arrays) != 1 || m.records().Stripe == nil {
		t.Fatalf("%d arrays, intent %+v", len(m.arrays), m.records().Stripe)
	}
	if r := m.run(); len(r.Failures()) != 1 || !strings.Contains(r.Failures()[0].Error(), "is recorded as being made") {
		t.Errorf("failures: %v", r.Failures())
	}
	m.stripe()
	m.runOK()
	m.wantOneStripe()
}

// A disk of the stripe that is away keeps its volume's record and its other disk from everything.
func TestStripeWithoutADisk(t *testing.T) {
	m, _ := striped(t)
	m.stripe()
	m.runOK()
	m.reboot()
	away := m.devices[1]
	m.devices = slices.Delete(m.devices, 1, 2)
	m.disk(volumes.ClassInstanceStore, "ssd3") // blank: it becomes a volume by itself, in nobody's place
	if _, err := m.node().Stripe(t.Context()); err == nil || !strings.Contains(err.Error(), "1 of the 2 disks of") {
		t.Errorf("error: %v", err)
	}
	ssd1 := m.sums()["ssd1"]
	m.run()
	if m.sums()["ssd1"] != ssd1 || len(m.records().Volumes) != 3 {
		t.Errorf("the other disk was written to, or a record lost: %+v", m.records().Volumes)
	}
	m.reboot()
	m.devices = append(m.devices, away)
	m.stripe()
	m.runOK()
}

// An image has nothing of a stripe that its builder did not finish.
func TestSealedImageHasNoStripe(t *testing.T) {
	m, _ := striped(t)
	m.fail = failing("superblock", "ssd1")
	if _, err := m.node().Stripe(t.Context()); err == nil || m.records().Stripe == nil {
		t.Fatalf("error %v, no intent", err)
	}
	seal, err := m.node().SealImage(t.Context(), SealOptions{}, func(Seal) error { return nil })
	if err != nil || len(seal.Refused) > 0 || m.records().Stripe != nil {
		t.Errorf("sealed: %v, refused %v, intent %+v", err, seal.Refused, m.records().Stripe)
	}
}

// A boot at which nothing is to be made does not wait for IMDS.
func TestStripeThatWasMadeNeedsNoIMDS(t *testing.T) {
	m, _ := striped(t)
	m.stripe()
	m.runOK()
	m.reboot()
	asked := len(m.imds.Requests())
	if done := m.stripe(); len(done) != 1 || len(m.imds.Requests()) != asked {
		t.Errorf("assembled %+v, and IMDS was asked %v", done, m.imds.Requests()[asked:])
	}
}

// udev may assemble the stripe just before the agent does.
func TestStripeThatUdevAssembles(t *testing.T) {
	m, _ := striped(t)
	made := m.stripe()
	array := m.arrays[made[0].UUID]
	m.reboot()
	m.fail = func(step, _ string) error {
		if step == "assemble" {
			m.arrays[made[0].UUID] = array
			return errors.New("already active")
		}
		return nil
	}
	if done := m.stripe(); len(done) > 0 {
		t.Errorf("assembled: %+v", done)
	}
	m.arrays = map[string]volumes.Device{}
	m.fail = failing("assemble", made[0].UUID)
	if _, err := m.node().Stripe(t.Context()); err == nil {
		t.Error("a stripe that cannot be assembled is no error")
	}
}

// What the configuration has the agent leave alone is not assembled either.
func TestStripeThatIsLeftAlone(t *testing.T) {
	m, _ := striped(t)
	m.stripe()
	m.reboot()
	for what, change := range map[string]func(*Config){
		"ignored":  func(c *Config) { c.InstanceStore = PolicyIgnore },
		"excluded": func(c *Config) { c.Exclude = []string{"ssd2"} },
	} {
		cfg := m.cfg
		change(&m.cfg)
		if done := m.stripe(); len(done) > 0 || len(m.arrays) > 0 {
			t.Errorf("%s: %+v", what, done)
		}
		m.cfg = cfg
	}
}

// A disk that has something on it when its turn comes is not made part of a stripe, and neither are the others.
func TestStripeOfDisksThatChanged(t *testing.T) {
	m, disks := striped(t)
	m.fail = func(step, what string) error {
		if step == "hold" && what == "ssd2" {
			m.write(disks[1], 1<<20, []byte("somebody's"))
		}
		return nil
	}
	var refused *RefusedError
	if _, err := m.node().Stripe(t.Context()); !errors.As(err, &refused) || refused.Device != disks[1].Path {
		t.Errorf("error %v", err)
	}
	if memberOf(disks[0].Path) != (volumes.Member{}) || m.records().Stripe != nil {
		t.Error("it was begun")
	}
}

func TestWhatBecomesPartOfAStripe(t *testing.T) {
	named := store("nvme5n1", "AWS5")
	named.Named = "AWS5"
	for what, test := range map[string]struct {
		disks []volumes.Device
		want  string
	}{
		"one disk":                 {[]volumes.Device{store("nvme1n1", "AWS1")}, "format"},
		"two":                      {[]volumes.Device{store("nvme1n1", "AWS1"), store("nvme2n1", "AWS2")}, "stripe stripe"},
		"EBS is not part of it":    {[]volumes.Device{store("nvme1n1", "AWS1"), ebs("nvme2n1", "vol-2")}, "format format"},
		"a named one is by itself": {[]volumes.Device{store("nvme1n1", "AWS1"), store("nvme2n1", "AWS2"), named}, "stripe stripe format"},
	} {
		w := newWorld()
		w.Config.Stripe = On
		for _, d := range test.disks {
			w.device(d, none(), blank())
		}
		var verbs []string
		for _, a := range Decide(w.Facts).Actions {
			verbs = append(verbs, string(a.Verb))
		}
		if got := strings.Join(verbs, " "); got != test.want {
			t.Errorf("%s: %s, want %s", what, got, test.want)
		}
	}
}
