package agent

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// Facts is all that a decision rests on. It holds no handles: equal facts give
// equal plans.
type Facts struct {
	Config     Config
	InstanceID string
	Devices    []DeviceFacts     // in natural order of kernel name
	Missing    []volumes.Missing // named in the configuration, not found
	Gone       []volumes.Mapping // whose disk was taken away from under them
	Records    keycache.Records
}

// DeviceFacts is what was seen of one disk. Header and Content are nil where
// they were not looked at, because the disk is in use or none of ours.
type DeviceFacts struct {
	volumes.Device
	Header  *luks.Inspection
	Content *volumes.Content // looked at only where Header is luks.KindNone
	Err     error            // why the disk could not be read
}

// Verb is what is done with a device.
type Verb string

// The verbs of a plan.
const (
	Format  Verb = "format"  // make it a LUKS volume with a filesystem, and mount it
	Unlock  Verb = "unlock"  // open it with the key of its record, and mount it
	Adopt   Verb = "adopt"   // open it with the key of its token, write the record, and mount it
	Stripe  Verb = "stripe"  // make it part of a stripe, which is to be formatted then; a run does not do that
	Mount   Verb = "mount"   // it is open already: mount it
	Nothing Verb = "nothing" // it is open and mounted
	Leave   Verb = "leave"   // none of ours
	Refuse  Verb = "refuse"  // ours or wanted, but not to be touched as it is
)

// Refusal says of what kind a refusal is.
type Refusal string

// The kinds of refusal.
const (
	RefusedContent Refusal = "content" // foreign, unknown or unwanted content or state
	RefusedHeader  Refusal = "header"  // a LUKS header that is tampered or damaged
	RefusedDevice  Refusal = "device"  // missing, unreadable, read-only
	RefusedRecord  Refusal = "record"  // a record cannot be read
	RefusedShared  Refusal = "shared"  // other instances may write to it
	RefusedInUse   Refusal = "in use"  // open, mounted or held, where it must not be
	RefusedBackup  Refusal = "backup"  // a header backup that is not this disk's
	RefusedWiping  Refusal = "wiping"  // a wipe was begun and has to be finished
	RefusedStripe  Refusal = "stripe"  // a stripe is not made, not assembled or not whole
)

// Action is what is to be done with one device, and why.
type Action struct {
	Verb    Verb
	Refusal Refusal // of Refuse
	Device  DeviceFacts
	Reason  string

	// Volume is the record as it is (Unlock, Mount, Nothing) or as it is to be
	// written (Format, Adopt). Format of a new volume leaves UUID empty, and
	// KeyID too where a new data key is to be made.
	Volume keycache.VolumeRecord
	// Key is the key record of Adopt, taken from the header's token.
	Key keycache.KeyRecord
	// Resume says that Format takes up an earlier one that was cut: the record
	// exists, and so may the mapping OpenAs.
	Resume bool
	OpenAs string // the mapping that is open, of Format with Resume, Mount and Nothing
	// Missing is a refusal because no disk is there; it may yet come.
	Missing bool
	// told says that the audit log has the event of this action.
	told bool
	// Replaces names the records of volumes that a stop/start took away and whose
	// place this Format takes; they are archived first.
	Replaces []string
}

// Plan is what is to be done with a node.
type Plan struct {
	Actions []Action
	// QuarantineKeys and QuarantineVolumes are ids of records of another
	// instance, to be moved aside before anything else.
	QuarantineKeys, QuarantineVolumes []string
}

// Changes says whether carrying out the plan would change anything.
func (p Plan) Changes() bool {
	return len(p.QuarantineVolumes)+len(p.QuarantineKeys) > 0 ||
		slices.ContainsFunc(p.Actions, func(a Action) bool { return a.Verb.acts() || a.Verb == Stripe })
}

// Unrelated says that the device is none that anybody would expect the agent to
// care for, so that only a plan needs to name it.
func (a Action) Unrelated() bool { return a.Verb == Leave && a.Device.Class == "" }

func (v Verb) acts() bool {
	return v == Format || v == Unlock || v == Adopt || v == Mount
}

// opens says whether the verb ends with the volume open that was not.
func (v Verb) opens() bool { return v == Format || v == Unlock || v == Adopt }

// Decide makes the plan: one action with its reason for each device, each
// missing volume and each record that cannot be read. It reads nothing but f.
func Decide(f Facts) Plan {
	d := decision{Facts: f, live: map[string]keycache.VolumeRecord{}}
	d.sortRecords()
	devices := slices.Clone(f.Devices)
	slices.SortStableFunc(devices, byPlace)
	for _, dev := range devices {
		d.plan.Actions = append(d.plan.Actions, d.device(dev))
	}
	d.refuseTwins()
	d.refuseDoubles()
	d.stripe()
	d.missing()
	d.replaceLost()
	d.assignMountPoints()
	d.assignKeys()
	return d.plan
}

// decision is the work space of Decide.
type decision struct {
	Facts
	plan Plan
	live map[string]keycache.VolumeRecord // volume records of this instance, by UUID
}

// byPlace orders devices as their mount points are to be given out: instance
// store first, then EBS, then the rest; within a class by the name that EC2 gave
// the mapping, then by kernel name (the order in which they come).
func byPlace(a, b DeviceFacts) int {
	rank := func(d DeviceFacts) int {
		return 1 + slices.Index([]volumes.Class{volumes.ClassInstanceStore, volumes.ClassEBS, volumes.ClassExplicit}, d.Class)
	}
	// Class "" comes last in the list and must not come first in the order.
	ra, rb := (rank(a)+3)%4, (rank(b)+3)%4
	if c := cmp.Compare(ra, rb); c != 0 {
		return c
	}
	if a.EC2Name == "" || b.EC2Name == "" {
		return 0
	}
	return cmp.Compare(a.EC2Name, b.EC2Name)
}

// sortRecords tells this instance's volume records from those that came with an
// image or a boot volume of another instance.
func (d *decision) sortRecords() {
	for _, id := range sortedKeys(d.Records.Volumes) {
		if v := d.Records.Volumes[id]; v.InstanceID == d.InstanceID {
			d.live[id] = v
		} else {
			d.plan.QuarantineVolumes = append(d.plan.QuarantineVolumes, id)
		}
	}
	for _, id := range sortedKeys(d.Records.Keys) {
		if d.Records.Keys[id].InstanceID != d.InstanceID {
			d.plan.QuarantineKeys = append(d.plan.QuarantineKeys, id)
		}
	}
	for _, p := range d.Records.Problems {
		d.plan.Actions = append(d.plan.Actions, Action{Verb: Refuse, Refusal: RefusedRecord, Reason: p.Error()})
	}
}

// device is the decision table, one row after the other.
func (d *decision) device(dev DeviceFacts) Action {
	a := Action{Device: dev}
	rec, recorded := d.record(dev)
	a.Volume = rec
	wanted := recorded || dev.Named != ""

	leave := func(format string, args ...any) Action {
		a.Verb, a.Reason = Leave, fmt.Sprintf(format, args...)
		return a
	}
	refuse := func(kind Refusal, format string, args ...any) Action {
		a.Verb, a.Refusal, a.Reason = Refuse, kind, fmt.Sprintf(format, args...)
		return a
	}
	// What is left alone in general is refused where somebody counts on it.
	pass := func(kind Refusal, format string, args ...any) Action {
		if wanted {
			return refuse(kind, format, args...)
		}
		return leave(format, args...)
	}

	if name, ok := d.excluded(dev.Device); ok {
		return leave("excluded by the configuration (%s)", name)
	}
	if dev.Class == "" {
		return leave("neither an instance-store nor an EBS volume, and not named in the configuration")
	}
	if d.policy(dev.Device) == PolicyIgnore {
		return leave("the configuration says %s: ignore", policyField(dev.Class))
	}
	if d.assembled(dev.Member.Stripe) {
		a.Volume = keycache.VolumeRecord{} // what was on the disk went before it became part of the stripe
		return leave("part of the stripe %s (%s)", dev.Member.Stripe, dev.Member.Array)
	}
	if m, ok := ourMapping(dev.Device, rec); ok && recorded {
		return d.mapped(a, m)
	}
	if m, ok := stillOpen(d.Gone, rec); ok && recorded {
		return refuse(RefusedInUse, "volume %s was not locked before the disk came back: %s", rec.UUID, describeGone(m))
	}
	if len(dev.Uses) > 0 {
		evidence := make([]string, len(dev.Uses))
		for i, u := range dev.Uses {
			evidence[i] = u.Evidence
		}
		return pass(RefusedContent, "in use: %s", strings.Join(evidence, "; "))
	}
	if dev.Shared && dev.Class == volumes.ClassEBS && d.Config.MultiAttach == MultiAttachRefuse {
		return refuse(RefusedShared, "it may be attached to several instances at once (Multi-Attach), which no filesystem of ours survives")
	}
	if dev.ReadOnly {
		return pass(RefusedDevice, "read-only")
	}
	if dev.Err != nil {
		return refuse(RefusedDevice, "%v", dev.Err)
	}
	if dev.Header == nil {
		return refuse(RefusedDevice, "its content was not read")
	}

	switch h := dev.Header; {
	case recorded && rec.State == keycache.StateReady:
		return d.ready(a, rec)
	case recorded && rec.State == keycache.StateWiping:
		return d.wiping(a)
	case recorded:
		return d.formatting(a, rec)
	case h.Kind == luks.KindNone:
		return d.unknown(a)
	case h.Kind == luks.KindLUKS2 && h.Ours && !h.Pass():
		return refuse(RefusedHeader, "no record, and its LUKS header cannot be trusted: %s", strings.Join(h.Reasons, "; "))
	case h.Kind == luks.KindLUKS2 && h.Ours:
		return d.adopt(a)
	case h.Kind == luks.KindLUKS2:
		return refuse(RefusedContent, "no record, and it holds a LUKS2 volume that is not ours (UUID %s)", h.Header.UUID)
	default:
		return refuse(RefusedContent, "no record, and it holds %s", describeKind(h.Kind))
	}
}

// record finds the live record of a device: by the LUKS UUID that it shows, or
// that its mapping has, or else by its identity.
func (d *decision) record(dev DeviceFacts) (keycache.VolumeRecord, bool) {
	if dev.Header != nil && dev.Header.Header != nil {
		if rec, ok := d.live[dev.Header.Header.UUID]; ok {
			return rec, true
		}
	}
	for _, id := range sortedKeys(d.live) {
		if _, ok := ourMapping(dev.Device, d.live[id]); ok {
			return d.live[id], true
		}
	}
	var found keycache.VolumeRecord
	for _, id := range sortedKeys(d.live) {
		rec := d.live[id]
		if sameDisk(rec, dev.Device) && !d.shown(id) && (found.UUID == "" || rec.State == keycache.StateReady) {
			found = rec
		}
	}
	return found, found.UUID != ""
}

// shown says whether a disk shows a LUKS UUID: then that disk is the one that its
// record speaks of, and no other that has the same serial.
func (d *decision) shown(uuid string) bool {
	return slices.ContainsFunc(d.Devices, func(dev DeviceFacts) bool {
		if dev.Header != nil && dev.Header.Header != nil && dev.Header.Header.UUID == uuid {
			return true
		}
		_, open := ourMapping(dev.Device, keycache.VolumeRecord{UUID: uuid})
		return open
	})
}

// sameDisk says whether a record was made for this very disk.
func sameDisk(rec keycache.VolumeRecord, dev volumes.Device) bool {
	return rec.Identity != "" && rec.Identity == dev.Identity && rec.Class == string(dev.Class)
}

// ourMapping finds the open mapping of a record on a device.
func ourMapping(dev volumes.Device, rec keycache.VolumeRecord) (volumes.Mapping, bool) {
	for _, m := range dev.Mappings {
		if uuid, ok := mappedUUID(m); ok && uuid == compactUUID(rec.UUID) {
			return m, true
		}
	}
	return volumes.Mapping{}, false
}

// mappedUUID returns the compact UUID of the LUKS2 volume that a mapping shows.
// cryptsetup and luks.go call it CRYPT-LUKS2-<uuid without dashes>-<name>.
func mappedUUID(m volumes.Mapping) (string, bool) {
	rest, ok := strings.CutPrefix(m.UUID, "CRYPT-LUKS2-")
	uuid, _, ended := strings.Cut(rest, "-")
	return uuid, ok && ended && uuid != ""
}

func compactUUID(uuid string) string { return strings.ReplaceAll(uuid, "-", "") }

// mapped decides on a device whose volume is open already.
func (d *decision) mapped(a Action, m volumes.Mapping) Action {
	a.OpenAs = m.Name
	switch {
	case a.Volume.State == keycache.StateWiping:
		return d.wiping(a)
	case a.Volume.State == keycache.StateFormatting && len(m.Mounts) > 0:
		a.Verb, a.Refusal = Refuse, RefusedContent
		a.Reason = fmt.Sprintf("its record says formatting, but it is mounted on %s", strings.Join(m.Mounts, ", "))
	case a.Volume.State == keycache.StateFormatting && a.Device.ReadOnly:
		a.Verb, a.Refusal, a.Reason = Refuse, RefusedDevice, "an earlier format was cut, and the disk is read-only"
	case a.Volume.State == keycache.StateFormatting:
		return d.resume(a, "an earlier format was cut after it was opened")
	case slices.Contains(m.Mounts, a.Volume.MountPoint):
		a.Verb, a.Reason = Nothing, fmt.Sprintf("open as %s and mounted on %s", m.Name, a.Volume.MountPoint)
	default:
		a.Verb, a.Reason = Mount, fmt.Sprintf("open as %s, not mounted", m.Name)
	}
	return a
}

// wiping decides on a device whose wipe a person began: only a person goes on with it, whatever it holds by now.
func (d *decision) wiping(a Action) Action {
	a.Verb, a.Refusal = Refuse, RefusedWiping
	a.Reason = fmt.Sprintf("a wipe of volume %s was begun and not finished", a.Volume.UUID)
	return a
}

// ready decides on a device that a ready record speaks of: it is unlocked or
// refused, and only an instance-store volume that a stop/start replaced is
// formatted anew.
func (d *decision) ready(a Action, rec keycache.VolumeRecord) Action {
	h := a.Device.Header
	refuse := func(kind Refusal, format string, args ...any) Action {
		a.Verb, a.Refusal = Refuse, kind
		a.Reason = fmt.Sprintf("volume %s is recorded ready, but ", rec.UUID) + fmt.Sprintf(format, args...)
		return a
	}
	switch {
	case h.Kind == luks.KindLUKS2 && h.Header.UUID != rec.UUID:
		return refuse(RefusedContent, "the disk holds LUKS volume %s", h.Header.UUID)
	case h.Kind == luks.KindLUKS2 && !h.Pass():
		return refuse(RefusedHeader, "its LUKS header cannot be trusted: %s", strings.Join(h.Reasons, "; "))
	case h.Kind == luks.KindLUKS2:
		if p := d.keyProblem(rec.KeyID); p != "" {
			return refuse(RefusedRecord, "%s", p)
		}
		a.Verb, a.Reason = Unlock, "recorded ready"
		if rec.Rotation != nil {
			a.Reason += "; its data key is being replaced: `rotate` goes on with that"
		}
		if h.PrimaryDamaged {
			a.Reason += "; the primary LUKS header is damaged, the secondary passes every check and restores it"
		}
		if rec.Identity != a.Device.Identity {
			a.Reason += fmt.Sprintf("; it was %s and is now on %s", rec.Identity, a.Device.Identity)
		}
		return a
	case h.Kind != luks.KindNone:
		return refuse(RefusedHeader, "the disk holds %s", describeKind(h.Kind))
	case a.Device.Content == nil:
		return refuse(RefusedDevice, "its content was not read")
	case !a.Device.Content.Blank:
		return refuse(RefusedContent, "the disk holds %s", a.Device.Content.Detail)
	case a.Device.Class == volumes.ClassInstanceStore && d.policy(a.Device.Device) == PolicyFormat:
		a.Replaces = []string{rec.UUID}
		a.Volume = keycache.VolumeRecord{MountPoint: rec.MountPoint}
		return d.format(a, fmt.Sprintf("proven blank: the volume %s went with a stop of the instance", rec.UUID))
	default:
		return refuse(RefusedContent, "the disk is blank")
	}
}

// formatting decides on a device whose format was begun and not finished. Such
// a volume was never mounted, so it holds nothing; but only this very disk, and
// only in a state that our own format leaves, is written again.
func (d *decision) formatting(a Action, rec keycache.VolumeRecord) Action {
	h := a.Device.Header
	refuseAs := func(kind Refusal, what string) Action {
		a.Verb, a.Refusal = Refuse, kind
		a.Reason = fmt.Sprintf("volume %s is recorded as being formatted, but %s", rec.UUID, what)
		return a
	}
	refuse := func(what string) Action { return refuseAs(RefusedContent, what) }
	if !sameDisk(rec, a.Device.Device) || rec.Size != a.Device.Size {
		return refuse(fmt.Sprintf("on %s with %d bytes, and this is %s with %d bytes", rec.Identity, rec.Size, a.Device.Identity, a.Device.Size))
	}
	switch {
	case h.Header != nil && h.Header.UUID != rec.UUID:
		return refuse(fmt.Sprintf("the disk holds LUKS volume %s", h.Header.UUID))
	case h.Kind == luks.KindLUKS1:
		return refuse("the disk holds a LUKS1 volume")
	case h.Kind == luks.KindLUKS2 && finished(*h) && !h.Pass():
		return refuseAs(RefusedHeader, "its LUKS header cannot be trusted: "+strings.Join(h.Reasons, "; "))
	case h.Kind == luks.KindNone && (a.Device.Content == nil || !a.Device.Content.Blank && !headless(*a.Device.Content)):
		detail := "its content was not read"
		if a.Device.Content != nil {
			detail = "the disk holds " + a.Device.Content.Detail
		}
		return refuse(detail)
	}
	return d.resume(a, "an earlier format was cut before it was finished")
}

// finished says whether a header is one that a format of ours came to the end of: the
// token comes last. A cut leaves none that fails the check, so there may be data behind
// one that does, and a record that is older than that.
func finished(h luks.Inspection) bool { return h.Header != nil && len(h.Header.Tokens) > 0 }

// headless says whether a disk without a header looks as luksFormat leaves it when
// it is cut before it writes one: zeros where the headers will be, then noise. The
// noise may reach the end of the disk, where an earlier mkfs of ours wrote.
func headless(c volumes.Content) bool { return c.NoiseFrom >= luks.KeyslotsOffset }

func (d *decision) resume(a Action, why string) Action {
	if p := d.keyProblem(a.Volume.KeyID); p != "" {
		a.Verb, a.Refusal, a.Reason = Refuse, RefusedRecord, why+", but "+p
		return a
	}
	a.Resume = true
	return d.format(a, why)
}

// unknown decides on a device without LUKS and without a record.
func (d *decision) unknown(a Action) Action {
	c, policy := a.Device.Content, d.policy(a.Device.Device)
	switch {
	case c == nil:
		a.Verb, a.Refusal, a.Reason = Refuse, RefusedDevice, "its content was not read"
	case !c.Blank && a.Device.Member.Stripe != "":
		a.Verb, a.Refusal, a.Missing = Refuse, RefusedStripe, true
		a.Reason = "part of a stripe that is not assembled: " + d.describeStripe(a.Device.Member.Stripe)
	case !c.Blank:
		a.Verb, a.Refusal, a.Reason = Refuse, RefusedContent, "no record, and not blank: "+c.Detail
	case policy != PolicyFormat:
		a.Verb, a.Reason = Leave, fmt.Sprintf("blank, and the configuration says %s: %s", policyField(a.Device.Class), policy)
	default:
		return d.format(a, "proven blank: no signature, no partitions, first and last 16 MiB zero")
	}
	return a
}

// format fills in the record that is to be written. While any record cannot be
// read nothing is formatted: it may be the one that speaks of this disk.
func (d *decision) format(a Action, why string) Action {
	if n := len(d.Records.Problems); n > 0 {
		a.Verb, a.Refusal = Refuse, RefusedRecord
		a.Reason = fmt.Sprintf("%s, but nothing is formatted while %d record(s) cannot be read", why, n)
		return a
	}
	for _, id := range sortedKeys(d.live) {
		rec := d.live[id]
		if rec.State != keycache.StateFormatting && sameDisk(rec, a.Device.Device) && !slices.Contains(a.Replaces, id) {
			a.Verb, a.Refusal = Refuse, RefusedContent
			a.Reason = fmt.Sprintf("%s, but volume %s is recorded %s on the same disk", why, id, rec.State)
			return a
		}
	}
	// The intent says that its disks may be cleared, so nothing is made on them.
	if s := d.Records.Stripe; s != nil && a.Device.Class == volumes.ClassInstanceStore && slices.Contains(append(slices.Clone(s.Members), s.UUID), a.Device.Identity) {
		a.Verb, a.Refusal = Refuse, RefusedStripe
		a.Reason = fmt.Sprintf("%s, but stripe %s is recorded as being made", why, s.UUID)
		return a
	}
	v := &a.Volume
	if v.Filesystem == "" {
		v.Filesystem = d.Config.Filesystem
		if c, ok := d.volumeConfig(a.Device.Device); ok && c.Filesystem != "" {
			v.Filesystem = c.Filesystem
		}
	}
	if least := luks.DataOffset + volumes.LeastSize(v.Filesystem); a.Device.Size < least {
		a.Verb, a.Refusal = Refuse, RefusedDevice
		a.Reason = fmt.Sprintf("it has %d bytes, too few: a LUKS header and %s want at least %d", a.Device.Size, v.Filesystem, least)
		return a
	}
	a.Verb, a.Reason = Format, why
	v.Class, v.Identity, v.Size = string(a.Device.Class), a.Device.Identity, a.Device.Size
	v.State, v.InstanceID = keycache.StateFormatting, d.InstanceID
	return a
}

// adopt decides on a volume of ours without a record, as after a restored boot
// volume or on a new instance.
func (d *decision) adopt(a Action) Action {
	h := a.Device.Header.Header
	if d.unreadable("volume", h.UUID) {
		a.Verb, a.Refusal, a.Reason = Refuse, RefusedRecord, "its record cannot be read"
		return a
	}
	if !d.keyAllowed(h.Token.KeyARN) {
		a.Verb, a.Refusal = Refuse, RefusedContent
		a.Reason = fmt.Sprintf("no record, and its token names key %s, which the configuration does not allow", h.Token.KeyARN)
		return a
	}
	a.Verb, a.Reason = Adopt, "no record; its header carries our token, under an allowed key"
	a.Key = keycache.KeyRecord{KeyARN: h.Token.KeyARN, WrappedKey: h.Token.WrappedKey, InstanceID: d.InstanceID}
	a.Volume = keycache.VolumeRecord{
		UUID: h.UUID, Class: string(a.Device.Class), Identity: a.Device.Identity, Size: a.Device.Size,
		State: keycache.StateReady, InstanceID: d.InstanceID,
	}
	return a
}

// refuseTwins refuses devices that show the same LUKS UUID, such as an EBS volume
// beside a copy made from its snapshot: which of the two is meant is not known.
// One of them may be open, by us or by a person; that one stays as it is.
func (d *decision) refuseTwins() {
	byUUID := map[string][]int{}
	for i, a := range d.plan.Actions {
		switch {
		case a.Device.Header != nil && a.Device.Header.Header != nil && a.Verb != Leave:
			uuid := compactUUID(a.Device.Header.Header.UUID)
			byUUID[uuid] = append(byUUID[uuid], i)
		case a.Device.Header == nil:
			// A disk that is in use was not inspected; the mapping on it tells.
			for _, m := range a.Device.Mappings {
				if uuid, ok := mappedUUID(m); ok {
					byUUID[uuid] = append(byUUID[uuid], i)
				}
			}
		}
	}
	for _, twins := range byUUID {
		if len(twins) < 2 {
			continue
		}
		names, uuid := make([]string, len(twins)), ""
		for n, i := range twins {
			a := d.plan.Actions[i]
			names[n] = a.Device.Path + " (" + a.Device.Identity + ")"
			if a.Device.Header != nil {
				uuid = a.Device.Header.Header.UUID
			}
		}
		slices.Sort(names)
		for _, i := range twins {
			a := &d.plan.Actions[i]
			if a.Verb == Nothing || a.Verb == Leave {
				continue
			}
			a.Verb, a.Refusal = Refuse, RefusedContent
			a.Reason = fmt.Sprintf("%s show the same LUKS UUID %s", strings.Join(names, " and "), cmp.Or(uuid, a.Volume.UUID))
		}
	}
}

// refuseDoubles formats no disk whose identity another one has too: the record
// of the one would be taken for that of the other.
func (d *decision) refuseDoubles() {
	for i := range d.plan.Actions {
		a := &d.plan.Actions[i]
		if a.Verb != Format {
			continue
		}
		for _, other := range d.Devices {
			if other.Path != a.Device.Path && other.Class == a.Device.Class && other.Identity == a.Device.Identity {
				a.Verb, a.Refusal, a.Replaces = Refuse, RefusedContent, nil
				a.Reason = fmt.Sprintf("it has the same identity as %s: %s", other.Path, a.Device.Identity)
			}
		}
	}
}

// missing names volumes that somebody counts on and that are not there.
func (d *decision) missing() {
	for _, m := range d.Missing {
		d.plan.Actions = append(d.plan.Actions, Action{
			Verb: Refuse, Refusal: RefusedDevice, Missing: true,
			Reason: fmt.Sprintf("%s is named in the configuration, but %s", m.Name, m.Reason),
		})
	}
	seen := map[string]bool{}
	for _, a := range d.plan.Actions {
		seen[a.Volume.UUID] = true
		for _, uuid := range a.Replaces {
			seen[uuid] = true
		}
	}
	for _, id := range sortedKeys(d.live) {
		if rec := d.live[id]; !seen[id] && rec.State == keycache.StateReady {
			d.plan.Actions = append(d.plan.Actions, Action{
				Verb: Refuse, Refusal: RefusedDevice, Missing: true, Volume: rec,
				Reason: fmt.Sprintf("volume %s (%s %s) is recorded ready, but no disk shows it", rec.UUID, rec.Class, rec.Identity),
			})
			a := &d.plan.Actions[len(d.plan.Actions)-1]
			if m, ok := stillOpen(d.Gone, rec); ok {
				a.Reason += ": " + describeGone(m)
			} else if d.showsMember(rec.Identity) {
				a.Refusal = RefusedStripe
				a.Reason += ": its stripe is not assembled, " + d.describeStripe(rec.Identity)
			}
		}
	}
}

// replaceLost lets a blank instance-store volume take the place of a recorded one
// that no disk shows any more: a stop/start gives other disks with other serials.
func (d *decision) replaceLost() {
	var lost []int
	for i, a := range d.plan.Actions {
		_, open := stillOpen(d.Gone, a.Volume)
		if a.Device.Path == "" && a.Volume.UUID != "" && a.Volume.Class == string(volumes.ClassInstanceStore) && !open && !d.showsMember(a.Volume.Identity) {
			lost = append(lost, i)
		}
	}
	gone := map[int]bool{}
	for i := range d.plan.Actions {
		a := &d.plan.Actions[i]
		if len(lost) == 0 {
			break
		}
		if a.Verb != Format || a.Resume || len(a.Replaces) > 0 || a.Device.Class != volumes.ClassInstanceStore {
			continue
		}
		// What becomes swap takes the place of swap, and a filesystem that of one, while there is such a place.
		next := max(0, slices.IndexFunc(lost, func(i int) bool {
			return (d.plan.Actions[i].Volume.Filesystem == swapType) == (a.Volume.Filesystem == swapType)
		}))
		a.Volume.MountPoint = d.plan.Actions[lost[next]].Volume.MountPoint
		taken := []int{lost[next]}
		if len(a.Device.Members) > 0 {
			taken = slices.Clone(lost) // it is all the disks that there are
		}
		for _, i := range taken {
			a.Replaces = append(a.Replaces, d.plan.Actions[i].Volume.UUID)
			gone[i] = true
		}
		a.Reason += fmt.Sprintf("; it takes the place of %s, which went with a stop of the instance", strings.Join(a.Replaces, ", "))
		lost = slices.DeleteFunc(lost, func(i int) bool { return gone[i] })
	}
	kept := d.plan.Actions[:0]
	for i, a := range d.plan.Actions {
		if !gone[i] {
			kept = append(kept, a)
		}
	}
	d.plan.Actions = kept
}

// assignMountPoints gives every volume to be formatted or adopted its mount point:
// the configured one, that of the record it continues, or the next of /mnt, /mnt1, …
func (d *decision) assignMountPoints() {
	taken := map[string]bool{}
	for _, v := range d.Config.Volumes {
		taken[v.MountPoint] = true
	}
	for _, a := range d.plan.Actions {
		taken[a.Volume.MountPoint] = true
	}
	next := 0
	for i := range d.plan.Actions {
		a := &d.plan.Actions[i]
		switch v := &a.Volume; {
		case v.Filesystem == swapType:
			v.MountPoint = volumes.SwapPoint
			continue
		case v.MountPoint == volumes.SwapPoint:
			v.MountPoint = "" // the place of one that was swap
		}
		c, _ := d.volumeConfig(a.Device.Device)
		if a.Verb == Adopt && c.Filesystem == swapType {
			a.Volume.MountPoint = volumes.SwapPoint
			continue
		}
		if c.MountPoint != "" && a.Verb.acts() {
			a.Volume.MountPoint = c.MountPoint
			continue
		}
		if a.Volume.MountPoint != "" || a.Verb != Format && a.Verb != Adopt {
			continue
		}
		for a.Volume.MountPoint == "" || taken[a.Volume.MountPoint] {
			a.Volume.MountPoint = automaticName(next)
			next++
		}
		taken[a.Volume.MountPoint] = true
	}
}

func automaticName(n int) string {
	if n == 0 {
		return "/mnt"
	}
	return "/mnt" + strconv.Itoa(n)
}

// assignKeys gives each new volume a key record that exists already: at node
// scope the one that the node has under the configured key, at volume scope one
// that a cut left unused. Where there is none KeyID stays empty: make one.
func (d *decision) assignKeys() {
	used := map[string]bool{}
	for _, v := range d.Records.Volumes {
		for _, id := range keyIDs(v) {
			used[id] = true
		}
	}
	var candidates []string
	for _, id := range sortedKeys(d.Records.Keys) {
		k := d.Records.Keys[id]
		if k.InstanceID == d.InstanceID && d.Config.sameKMSKey(k.KeyARN) && (d.Config.KeyScope == ScopeNode || !used[id]) {
			candidates = append(candidates, id)
		}
	}
	// First the key that the node's other volumes have: not one that was replaced or adopted, which has no request id. Of several the
	// newest, as volumes that were away when it was made have the one before.
	rank := func(id string) int {
		switch {
		case !used[id]:
			return 2
		case d.Records.Keys[id].RequestID == "":
			return 1
		}
		return 0
	}
	slices.SortStableFunc(candidates, func(a, b string) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), d.Records.Keys[b].Created.Compare(d.Records.Keys[a].Created))
	})
	for i := range d.plan.Actions {
		a := &d.plan.Actions[i]
		if a.Verb != Format || a.Volume.KeyID != "" || len(candidates) == 0 {
			continue
		}
		a.Volume.KeyID = candidates[0]
		if d.Config.KeyScope == ScopeVolume {
			candidates = candidates[1:]
		}
	}
}

// keyIDs are the key records that may open a volume.
func keyIDs(v keycache.VolumeRecord) []string {
	if v.Rotation == nil {
		return []string{v.KeyID}
	}
	return []string{v.KeyID, v.Rotation.KeyID}
}

// sameKMSKey says whether a record's ARN may be that of the configured key. An
// alias does not tell; the key that the node has then stays in use.
func (c Config) sameKMSKey(arn string) bool {
	switch key := c.KMSKey; {
	case strings.HasPrefix(key, "alias/"), strings.Contains(key, ":alias/"):
		return true
	case strings.HasPrefix(key, "arn:"):
		return arn == key
	default:
		return strings.HasSuffix(arn, ":key/"+key)
	}
}

// keyAllowed says whether a token's ARN, which anyone with access to the disk may
// have written, is one that KMS may be asked about.
func (d *decision) keyAllowed(arn string) bool {
	if slices.Contains(d.Config.AllowedKeys, arn) {
		return true
	}
	if key := d.Config.KMSKey; strings.HasPrefix(key, "alias/") || strings.Contains(key, ":alias/") {
		// What the alias stands for is known from the keys that it gave this node.
		for _, k := range d.Records.Keys {
			if k.KeyARN == arn && k.InstanceID == d.InstanceID {
				return true
			}
		}
		return false
	}
	return d.Config.sameKMSKey(arn)
}

// keyProblem says why the key record of a volume cannot be used, "" if it can.
func (d *decision) keyProblem(id string) string {
	if k, ok := d.Records.Keys[id]; ok && k.InstanceID == d.InstanceID {
		return ""
	}
	if d.unreadable("key", id) {
		return fmt.Sprintf("its key record %s cannot be read", id)
	}
	return fmt.Sprintf("its key record %s is missing", id)
}

// unreadable says whether there is a record of that kind and id that cannot be read.
func (d *decision) unreadable(kind, id string) bool {
	return slices.ContainsFunc(d.Records.Problems, func(p keycache.RecordError) bool { return p.Kind == kind && p.ID == id })
}

func (d *decision) excluded(dev volumes.Device) (string, bool) {
	for _, name := range d.Config.Exclude {
		if dev.Is(name) {
			return name, true
		}
	}
	return "", false
}

func (d *decision) volumeConfig(dev volumes.Device) (VolumeConfig, bool) {
	for _, v := range d.Config.Volumes {
		if dev.Is(v.Name) {
			return v, true
		}
	}
	return VolumeConfig{}, false
}

// policy is what the configuration says of a device's class. Naming a volume asks
// for it, whatever its class is told.
func (d *decision) policy(dev volumes.Device) Policy {
	switch {
	case dev.Named != "":
		return PolicyFormat
	case dev.Class == volumes.ClassInstanceStore:
		return d.Config.InstanceStore
	case dev.Class == volumes.ClassEBS:
		return d.Config.EBS
	}
	return PolicyFormat
}

func policyField(c volumes.Class) string { return strings.ReplaceAll(string(c), "-", "_") }

func describeKind(k luks.Kind) string {
	switch k {
	case luks.KindLUKS1:
		return "a LUKS1 volume"
	case luks.KindTorn:
		return "the remains of a LUKS header"
	case luks.KindEmpty:
		return "a LUKS2 header without key slots"
	}
	return string(k)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
