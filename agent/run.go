package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// lookingAround is told while facts are collected.
const lookingAround = "Looking at disks, records and identity"

// Plan observes the node and decides, and changes nothing. Records are read
// without a lock: a plan made beside a running command may be out of date.
func (n *Node) Plan(ctx context.Context) (Plan, error) {
	n.step(lookingAround)
	if err := n.checkStateDir(); err != nil {
		return Plan{}, err
	}
	store, err := keycache.ViewStore(n.cfg.StateDir)
	if err != nil {
		return Plan{}, err
	}
	facts, err := n.observe(ctx, store, nil)
	if err != nil {
		return Plan{}, err
	}
	return Decide(facts), nil
}

// Run brings the node to where its configuration wants it: blank volumes
// formatted, ours open and mounted. The report has an outcome for each device; the
// error is for what stopped the run as a whole.
//
// Volumes that somebody counts on and that are not there are waited for, up to
// DeviceWait: a disk may be attached while the node boots. The others do not wait.
func (n *Node) Run(ctx context.Context) (Report, error) {
	return n.carryOut(ctx, errand{command: "run", wait: n.cfg.DeviceWait, choose: n.untilAnnounced})
}

// Unlock opens and mounts volumes and never formats. The names are those of
// [Node.Lock]; none means all.
func (n *Node) Unlock(ctx context.Context, names []string) (Report, error) {
	return n.carryOut(ctx, errand{command: "unlock", choose: func(p Plan) (Plan, error) {
		var kept []Action
		for _, a := range p.Actions {
			if len(names) == 0 && a.Verb != Format || slices.ContainsFunc(names, a.is) {
				kept = append(kept, a)
			}
		}
		for _, name := range names {
			if !slices.ContainsFunc(kept, func(a Action) bool { return a.is(name) }) {
				return p, &UnknownVolumeError{Name: name}
			}
		}
		for i := range kept {
			if a := &kept[i]; a.Verb == Format {
				a.Verb, a.Refusal = Refuse, RefusedContent
				a.Reason = "it is not a volume of ours yet: " + a.Reason
			}
		}
		p.Actions = kept
		return p, nil
	}})
}

// untilAnnounced has disks wait that udev is not done with, while the configuration has a path that no disk has: it may be a link to one of
// them that is still to be made, and exclude it.
func (n *Node) untilAnnounced(p Plan) (Plan, error) {
	names := slices.Clone(n.cfg.Exclude)
	for _, v := range n.cfg.Volumes {
		names = append(names, v.Name)
	}
	open := slices.IndexFunc(names, func(name string) bool {
		return filepath.IsAbs(name) && !slices.ContainsFunc(p.Actions, func(a Action) bool { return a.Device.Path != "" && a.Device.Is(name) })
	})
	for i := range p.Actions {
		if a := &p.Actions[i]; open >= 0 && a.Verb.acts() && a.Device.Unannounced {
			a.Verb, a.Refusal, a.Missing, a.Replaces = Refuse, RefusedDevice, true, nil
			a.Reason = fmt.Sprintf("udev is not done with %s, which may be %s of the configuration", a.Device.Path, names[open])
		}
	}
	return p, nil
}

// errand is what carryOut is to do.
type errand struct {
	command  string
	choose   func(Plan) (Plan, error) // nil: all of it
	wait     time.Duration            // for volumes that are missing
	attached *Attached                // the disk that it is for; nil: the whole node
}

// carryOut is observe, decide, apply and write down; for volumes that come late it
// is done again.
func (n *Node) carryOut(ctx context.Context, e errand) (report Report, err error) {
	report = Report{Started: n.now()}
	n.spans.reset(report.Started)
	defer func() {
		if nothing := (*nothingNew)(nil); errors.As(err, &nothing) {
			return
		}
		if errors.Is(err, keycache.ErrLocked) {
			return // the status is the other command's to write
		}
		report.Finished = n.now()
		report.Calls = n.cloud.Calls()
		report.AuditProblem = n.auditLog.problem()
		n.writeDown(ctx, e.command, report, err)
	}()
	store, release, err := n.lockRecords(ctx)
	if err != nil {
		return report, err
	}
	defer release()
	if e.attached != nil {
		if err := n.wants(ctx, *e.attached); err != nil {
			return report, err
		}
	}
	keys := newKeyring(ctx, n.cloud)
	keys.onDemand = e.attached != nil
	defer func() {
		defer n.spans.begin(SpanWipe, "keys", nil)(nil)
		if werr := n.wipeKeys(keys.take()...); werr != nil {
			n.log.Warn("keys may be in memory until the process ends", zap.Error(werr))
		}
		n.reached(stepWiped)
	}()
	n.tell(lookingAround)
	seen, err := n.pass(ctx, store, keys, e.choose, &report)
	deadline := n.now().Add(e.wait)
	for err == nil && n.awaitDisk(ctx, report, seen, deadline) {
		seen, err = n.pass(ctx, store, keys, e.choose, &report)
	}
	if err == nil && ctx.Err() == nil {
		err = n.dealt(ctx, e, store, keys, seen, &report)
	}
	if err != nil {
		return report, err
	}
	n.logOutcomes(report.missing())
	for _, o := range report.missing() {
		n.auditOutcome(o)
	}
	return report, ctx.Err()
}

// dealt notes which disks were dealt with. From the first time on, disks that are attached get a run of their own; before that they get none,
// so that the first run of a boot then looks whether one came while it was at work.
func (n *Node) dealt(ctx context.Context, e errand, store *keycache.Store, keys *keyring, seen []volumes.Device, report *Report) error {
	first := n.dealtWith() == nil
	if first && e.command != "run" {
		return nil
	}
	n.noteDisks(seen, report.Outcomes)
	for first {
		came, err := n.cameMeanwhile(ctx, *report)
		if err != nil || !came {
			return err
		}
		if seen, err = n.pass(ctx, store, keys, onlyAnnounced, report); err != nil {
			return err
		}
		n.noteDisks(seen, report.Outcomes)
	}
	return nil
}

// pass observes, decides and applies what no earlier pass did, and adds its
// outcomes to the report. It returns the disks that it saw.
func (n *Node) pass(ctx context.Context, store *keycache.Store, keys *keyring, choose func(Plan) (Plan, error), report *Report) (seen []volumes.Device, err error) {
	facts, err := n.observe(ctx, store, keys)
	if err != nil {
		return nil, err
	}
	report.InstanceID = facts.InstanceID
	plan := Decide(facts)
	if choose != nil {
		if plan, err = choose(plan); err != nil {
			return nil, err
		}
	}
	earlier := slices.DeleteFunc(report.Outcomes, func(o Outcome) bool { return o.Action.Missing || facts.attachedAnew(o) })
	plan.Actions = slices.DeleteFunc(plan.Actions, func(a Action) bool {
		return slices.ContainsFunc(earlier, func(o Outcome) bool { return o.Action.sameSubject(a) })
	})
	n.logPlan(plan)
	n.tell(fmt.Sprintf("Carrying out the plan for %d devices", len(plan.Actions)))
	outcomes := n.apply(ctx, store, facts, plan, keys)
	n.logOutcomes(slices.DeleteFunc(slices.Clone(outcomes), func(o Outcome) bool { return o.Action.Missing }))
	// What udev is not done with may yet turn out to be named in the configuration.
	outcomes = slices.DeleteFunc(outcomes, func(o Outcome) bool {
		return o.Action.Verb == Leave && o.Action.Device.Unannounced
	})
	report.Outcomes = append(earlier, outcomes...)

	return facts.disks(), nil
}

// disks are the devices alone.
func (f Facts) disks() []volumes.Device {
	all := make([]volumes.Device, len(f.Devices))
	for i, d := range f.Devices {
		all[i] = d.Device
	}
	return all
}

// attachedAnew says whether what failed was about a disk that went and has come again.
func (f Facts) attachedAnew(o Outcome) bool {
	was, there, again := o.Action.Device, false, false
	for _, d := range f.Devices {
		there = there || d.Path == was.Path && d.DiskSeq == was.DiskSeq
		again = again || d.Class == was.Class && d.Identity == was.Identity
	}
	return o.Err != nil && was.Identity != "" && again && !there
}

// sameSubject says whether two actions of one run are about the same disk, or the
// same record that cannot be read.
func (a Action) sameSubject(b Action) bool {
	return a.Device.Path == b.Device.Path && a.Device.DiskSeq == b.Device.DiskSeq && (a.Device.Path != "" || a.Reason == b.Reason)
}

// missing are the outcomes of volumes that are not there.
func (r Report) missing() []Outcome {
	return slices.DeleteFunc(slices.Clone(r.Outcomes), func(o Outcome) bool { return !o.Action.Missing })
}

// devicePoll is how often a run looks whether a missing volume came.
const devicePoll = 500 * time.Millisecond

// awaitDisk waits while volumes are missing until the disks or the links to them
// are others than those that were seen, or until the deadline, when nothing came.
func (n *Node) awaitDisk(ctx context.Context, report Report, seen []volumes.Device, deadline time.Time) (came bool) {
	missing := report.missing()
	left := deadline.Sub(n.now())
	if len(missing) == 0 || left <= 0 {
		return false
	}
	for _, o := range missing {
		n.log.Warn("waiting for a disk", zap.String("missing", o.Action.Reason), zap.Duration("given_up_after", left))
	}
	n.tell("Waiting for a disk: " + missing[0].Action.Reason)
	systemd.ExtendTimeout(left + time.Minute)
	end := n.spans.begin(SpanWait, "for a disk", nil)
	defer end(nil)
	before := fingerprint(seen)
	for ; n.now().Before(deadline) && ctx.Err() == nil; time.Sleep(min(devicePoll, max(0, deadline.Sub(n.now())))) {
		// A scan that fails now is one of a moment at which disks come and go.
		if now, err := n.disks.Scan(ctx, nil); err == nil && fingerprint(now.Devices) != before {
			return true
		}
	}
	return false
}

// fingerprint is a text that differs where other disks or links are there.
func fingerprint(devices []volumes.Device) string {
	var b strings.Builder
	for _, d := range devices {
		fmt.Fprintln(&b, d.Name, d.DiskSeq, d.Size, d.Links, d.Unannounced)
	}
	return b.String()
}

func (n *Node) logPlan(p Plan) {
	for _, a := range p.Actions {
		level := zap.InfoLevel
		if a.Unrelated() {
			level = zap.DebugLevel
		}
		n.log.Log(level, "plan", zap.String("action", string(a.Verb)), zap.String("device", a.Device.Path),
			zap.String("class", string(a.Device.Class)), zap.String("identity", a.Device.Identity),
			zap.String("mount_point", a.Volume.MountPoint), zap.String("reason", a.Reason))
	}
}

func (n *Node) logOutcomes(outcomes []Outcome) {
	for _, o := range outcomes {
		if !o.Action.Verb.acts() && o.Err == nil {
			continue
		}
		fields := []zap.Field{
			zap.String("action", string(o.Action.Verb)), zap.String("device", o.Action.Device.Path),
			zap.String("volume", o.Action.Volume.UUID), zap.String("mount_point", o.Action.Volume.MountPoint),
			zap.Duration("took", o.Took),
		}
		if o.Err != nil {
			n.log.Error("failed", append(fields, zap.Error(o.Err))...)
		} else {
			n.log.Info("done", fields...)
		}
	}
}

// UnknownVolumeError is a volume that was named and is not there.
type UnknownVolumeError struct{ Name string }

func (e *UnknownVolumeError) Error() string {
	return fmt.Sprintf("cannot find volume %q: no device, LUKS UUID, mapping, mount point, serial or volume id has that name", e.Name)
}

// is says whether a person means this action's volume by name.
func (a Action) is(name string) bool {
	if a.Device.Path != "" && a.Device.Is(name) {
		return true
	}
	v := a.Volume
	return name != "" && (name == v.UUID || name == v.Mapping || name == "/dev/mapper/"+v.Mapping || name == v.MountPoint || name == v.Identity)
}

// Locked is what Lock did with one volume.
type Locked struct {
	Volume keycache.VolumeRecord
	Device string
	Err    error
}

// Lock unmounts and closes volumes. A volume is named by device, link, serial, EBS
// volume id, LUKS UUID, mapping or mount point; none means all that are open.
// Volumes in use are an error of theirs and the others are locked all the same.
func (n *Node) Lock(ctx context.Context, names []string) ([]Locked, error) {
	store, release, err := n.lockRecords(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	records, err := store.Load()
	if err != nil {
		return nil, err
	}
	scan, err := n.disks.Scan(ctx, nil)
	if err != nil {
		return nil, err
	}
	type target struct {
		Action
		mapping volumes.Mapping
	}
	var targets []target
	found := map[string]bool{}
	for _, id := range sortedKeys(records.Volumes) {
		rec := records.Volumes[id]
		t := target{Action: Action{Volume: rec}}
		t.mapping, _ = stillOpen(scan.Gone, rec)
		for _, d := range scan.Devices {
			if m, ok := ourMapping(d, rec); ok {
				t.Device.Device, t.mapping = d, m
			} else if t.Device.Path == "" && sameDisk(rec, d) {
				t.Device.Device = d
			}
		}
		named := slices.ContainsFunc(names, func(name string) bool {
			found[name] = found[name] || t.is(name)
			return t.is(name)
		})
		if t.mapping.Name != "" && (named || len(names) == 0) {
			targets = append(targets, t)
		}
	}
	for _, name := range names {
		if !found[name] {
			return nil, &UnknownVolumeError{Name: name}
		}
	}
	defer func() { n.tellMetrics(ctx, n.lastRun(), false) }()
	connect, disconnect := n.connectOnce(ctx)
	defer disconnect()
	locked := make([]Locked, len(targets))
	for i, t := range targets {
		n.step("Locking %s", t.Volume.MountPoint)
		locked[i] = Locked{Volume: t.Volume, Device: t.Device.Path, Err: n.lockOne(ctx, connect, t.mapping)}
		n.audit(Event{Kind: EventVolumeLocked, Volume: t.Volume, Device: t.Device.Device, Err: locked[i].Err})
	}
	n.noteLocked(locked, scan.Devices)
	return locked, nil
}

func (n *Node) lockOne(ctx context.Context, connect func() (mounter, error), m volumes.Mapping) error {
	if len(m.Mounts) > 0 {
		mounts, err := connect()
		if err != nil {
			return err
		}
		// The innermost mount last found is unmounted first.
		for _, where := range slices.Backward(m.Mounts) {
			if where == volumes.SwapPoint {
				if err := mounts.StopSwap(ctx, n.maps.Path(m.Name)); err != nil {
					return err
				}
				continue
			}
			if err := mounts.StopMount(ctx, where); err != nil {
				return err
			}
		}
	}
	if err := n.maps.Close(ctx, m.Name); err != nil && !errors.Is(err, luks.ErrNotOpen) {
		return err
	}
	return nil
}
