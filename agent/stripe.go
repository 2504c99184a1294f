package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// stripe has the blank instance-store volumes, where there are several, become one instead of one volume each. What the configuration names is
// a volume by itself, and so is what was begun as one.
func (d *decision) stripe() {
	if d.Config.Stripe != On {
		return
	}
	var disks []*Action
	for i := range d.plan.Actions {
		a := &d.plan.Actions[i]
		if a.Verb == Format && !a.Resume && a.Device.Class == volumes.ClassInstanceStore && a.Device.Named == "" && len(a.Device.Members) == 0 {
			disks = append(disks, a)
		}
	}
	if len(disks) < 2 {
		return
	}
	for _, a := range disks {
		a.Verb, a.Replaces, a.Volume = Stripe, nil, keycache.VolumeRecord{}
		a.Reason += fmt.Sprintf("; it becomes part of a stripe of %d disks", len(disks))
	}
}

// isStripe says whether a device is the stripe of that UUID, assembled.
func isStripe(d volumes.Device, id string) bool { return len(d.Members) > 0 && d.Identity == id }

// assembled says whether the stripe of that UUID is there.
func (f Facts) assembled(id string) bool {
	return slices.ContainsFunc(f.Devices, func(d DeviceFacts) bool { return isStripe(d.Device, id) })
}

// showsMember says whether a disk shows that it is part of the stripe of that UUID.
func (f Facts) showsMember(id string) bool {
	return slices.ContainsFunc(f.Devices, func(d DeviceFacts) bool { return d.Member.Stripe == id && id != "" })
}

// describeStripe says of a stripe that is not assembled what there is of it.
func (f Facts) describeStripe(id string) string {
	return describeMembers(id, membersOf(f.disks())[id])
}

func describeMembers(id string, members []volumes.Device) string {
	return fmt.Sprintf("%d of the %d disks of %s are there", len(members), members[0].Member.Disks, id)
}

// membersOf are the disks of each stripe, by its UUID.
func membersOf(disks []volumes.Device) map[string][]volumes.Device {
	members := map[string][]volumes.Device{}
	for _, d := range disks {
		if d.Member.Stripe != "" {
			members[d.Member.Stripe] = append(members[d.Member.Stripe], d)
		}
	}
	return members
}

// Striped is a stripe that was made or assembled.
type Striped struct {
	UUID  string
	Disks []string // paths
	Made  bool     // of blank disks; otherwise it was made before
}

// Stripe assembles the stripes of which the disks are there, whatever the configuration says, and makes one of blank instance-store volumes
// if it says so. The stripe is then a disk as any other: a run formats or opens it. Disks of a stripe that are missing are waited for, up to
// DeviceWait.
//
// Where instance store is to be ignored it does nothing. It never writes to a disk that is not proven blank; what an earlier call left
// that was cut is cleared only from the disks that its intent names, and only while one of them shows nothing of the stripe, so that nobody can have used it.
func (n *Node) Stripe(ctx context.Context) (done []Striped, err error) {
	if n.cfg.InstanceStore == PolicyIgnore {
		return nil, nil
	}
	store, release, err := n.lockRecords(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	records, err := store.Load()
	if err != nil {
		return nil, err
	}
	done, scan, err := n.assemble(ctx, records.Stripe)
	if err != nil || records.Stripe == nil && (n.cfg.Stripe != On || !mayStripe(scan)) {
		return done, err // IMDS is not asked, nor the disks read, at a boot that has nothing to make
	}
	facts, err := n.observe(ctx, store, nil)
	if err != nil {
		return done, err
	}
	if facts.Records.Stripe != nil {
		if err := n.settleIntent(ctx, store, facts); err != nil {
			return done, err
		}
		if facts, err = n.observe(ctx, store, nil); err != nil {
			return done, err
		}
	}
	made, err := n.makeStripe(ctx, store, Decide(facts))
	if made != nil {
		done = append(done, *made)
	}
	return done, err
}

// assemble starts every stripe that does not run and whose disks are all there. Those of one that was never whole are not waited for. It returns
// what it saw last.
func (n *Node) assemble(ctx context.Context, cut *keycache.StripeRecord) (done []Striped, scan volumes.Scan, err error) {
	deadline := n.now().Add(n.cfg.DeviceWait)
	for {
		if scan, err = n.scan(ctx); err != nil {
			return done, scan, err
		}
		var missing error
		unannounced := false
		for _, d := range scan.Devices {
			unannounced = unannounced || d.Unannounced && d.Class == volumes.ClassInstanceStore
		}
		all := membersOf(scan.Devices)
		for _, id := range sortedKeys(all) {
			members := all[id]
			if runs(scan, id) || slices.ContainsFunc(done, func(s Striped) bool { return s.UUID == id }) || slices.ContainsFunc(members, n.isExcluded) {
				continue
			}
			if len(members) < members[0].Member.Disks {
				if cut == nil || cut.UUID != id {
					missing = errors.Join(missing, &RefusedError{Refusal: RefusedStripe, Device: members[0].Path, Reason: "its stripe cannot be assembled: " + describeMembers(id, members)})
				}
				continue
			}
			n.tell("Assembling stripe " + id)
			if err := n.stripes.Assemble(ctx, id, members); err != nil {
				if now, errScan := n.scan(ctx); errScan == nil && runs(now, id) {
					continue // udev was quicker
				}
				return done, scan, err
			}
			n.log.Info("stripe assembled", zap.String("stripe", id), zap.Int("disks", len(members)))
			done = append(done, Striped{UUID: id, Disks: volumes.Paths(members)})
		}
		if missing == nil && !unannounced || !n.now().Before(deadline) || ctx.Err() != nil {
			if missing != nil {
				n.log.Warn("a stripe is not whole", zap.Error(missing))
			}
			return done, scan, errors.Join(missing, ctx.Err())
		}
		systemd.ExtendTimeout(time.Minute)
		time.Sleep(devicePoll)
	}
}

// mayStripe says whether there are disks of which a stripe could be made, as far as a scan tells.
func mayStripe(scan volumes.Scan) bool {
	free := 0
	for _, d := range scan.Devices {
		if d.Class == volumes.ClassInstanceStore && len(d.Uses) == 0 && d.Member.Stripe == "" && len(d.Members) == 0 {
			free++
		}
	}
	return free >= 2
}

// runs says whether the stripe of that UUID is assembled.
func runs(scan volumes.Scan, id string) bool {
	return slices.ContainsFunc(scan.Devices, func(d volumes.Device) bool { return isStripe(d, id) })
}

// settleIntent ends what an earlier call began: the stripe is whole, or its disks are made blank again.
func (n *Node) settleIntent(ctx context.Context, store *keycache.Store, f Facts) error {
	intent := *f.Records.Stripe
	if f.assembled(intent.UUID) {
		return store.RemoveStripe()
	}
	refuse := func(d DeviceFacts, format string, args ...any) error {
		return &RefusedError{Refusal: RefusedStripe, Device: d.Path,
			Reason: fmt.Sprintf("the making of stripe %s was cut, and ", intent.UUID) + fmt.Sprintf(format, args...)}
	}
	var there, begun []DeviceFacts
	for _, d := range f.Devices {
		if d.Class != volumes.ClassInstanceStore || !slices.Contains(intent.Members, d.Identity) {
			continue
		}
		there = append(there, d)
		switch {
		case d.Member.Stripe == intent.UUID:
			begun = append(begun, d)
		case d.Content == nil || !d.Content.Blank:
			return refuse(d, "the disk holds something else")
		}
	}
	switch {
	case len(begun) == 0: // not one was written, or other disks came with a stop of the instance
		return store.RemoveStripe()
	case len(there) < len(intent.Members):
		return refuse(begun[0], "only %d of its %d disks are there", len(there), len(intent.Members))
	case len(begun) == len(there):
		return refuse(begun[0], "it cannot be assembled, though every disk is part of it")
	}
	for _, d := range begun {
		if err := n.clearMember(ctx, d, intent.UUID); err != nil {
			return err
		}
		n.reached(stepMemberCleared)
	}
	return store.RemoveStripe()
}

// clearMember makes a disk blank that is part of a stripe that never was whole.
func (n *Node) clearMember(ctx context.Context, d DeviceFacts, id string) error {
	if err := n.stripes.Release(ctx, d.Device); err != nil {
		return err
	}
	hold, err := n.disks.Hold(ctx, d.Device)
	if err != nil {
		return err
	}
	defer hold.Close()
	err = n.stripes.Clear(ctx, d.Device, id)
	n.audit(Event{Kind: EventStripeCleared, Device: d.Device, Reason: "of stripe " + id, Err: err})
	return err
}

// makeStripe makes the stripe that the plan speaks of; nil where it speaks of none.
func (n *Node) makeStripe(ctx context.Context, store *keycache.Store, p Plan) (*Striped, error) {
	var members []volumes.Device
	for _, a := range p.Actions {
		if a.Verb == Stripe {
			members = append(members, a.Device.Device)
		}
	}
	if len(members) == 0 {
		return nil, nil
	}
	if err := n.stripes.Ready(); err != nil {
		return nil, err
	}
	var holds []io.Closer
	defer func() {
		for _, h := range holds {
			h.Close()
		}
	}()
	intent := keycache.StripeRecord{UUID: uuid.NewString(), Created: n.now().Truncate(time.Second)}
	for _, d := range members {
		hold, err := n.disks.Hold(ctx, d)
		if err != nil {
			return nil, err
		}
		holds = append(holds, hold)
		_, content, err := look(ctx, d)
		if err != nil {
			return nil, err
		}
		if content == nil || !content.Blank {
			return nil, &RefusedError{Refusal: RefusedContent, Device: d.Path, Reason: "it changed after it was planned on: it is not blank any more"}
		}
		intent.Members = append(intent.Members, d.Identity)
	}
	n.tell(fmt.Sprintf("Making a stripe of %d disks", len(members)))
	if err := store.PutStripe(intent); err != nil {
		return nil, err
	}
	n.reached(stepStripeIntent)
	err := n.stripes.Make(ctx, intent.UUID, members)
	n.audit(Event{Kind: EventStripeMade, Reason: fmt.Sprintf("stripe %s of %s", intent.UUID, strings.Join(intent.Members, ", ")), Err: err})
	if err != nil {
		return nil, err
	}
	n.reached(stepStripeMade)
	n.log.Info("stripe made", zap.String("stripe", intent.UUID), zap.String("disks", strings.Join(intent.Members, ", ")))
	made := &Striped{UUID: intent.UUID, Disks: volumes.Paths(members), Made: true}
	return made, store.RemoveStripe()
}

// stripes is what the agent asks of md.
type stripes interface {
	// Ready tells whether the program for it is there.
	Ready() error
	// Make makes a stripe of disks that are held and blank.
	Make(ctx context.Context, id string, members []volumes.Device) error
	// Assemble starts a stripe that was made before.
	Assemble(ctx context.Context, id string, members []volumes.Device) error
	// Release takes a disk out of an array that does not run.
	Release(context.Context, volumes.Device) error
	// Clear makes a disk blank, if it still is part of that stripe.
	Clear(ctx context.Context, d volumes.Device, id string) error
}

// machineStripes are the stripes of this machine.
type machineStripes struct{}

func (machineStripes) Ready() error { return volumes.CheckStripe() }

func (machineStripes) Make(ctx context.Context, id string, members []volumes.Device) error {
	return volumes.MakeStripe(ctx, id, members)
}

func (machineStripes) Assemble(ctx context.Context, id string, members []volumes.Device) error {
	return volumes.AssembleStripe(ctx, id, members)
}

func (machineStripes) Release(ctx context.Context, d volumes.Device) error {
	return volumes.StopArray(ctx, d)
}

func (machineStripes) Clear(ctx context.Context, d volumes.Device, id string) error {
	return volumes.ClearMember(ctx, d, id)
}
