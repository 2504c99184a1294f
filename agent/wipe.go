package agent

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// Wipe is a volume that is to be wiped, or was.
type Wipe struct {
	Volume keycache.VolumeRecord
	Device string
	// Found is what the disk shows where the header belongs.
	Found string
	// Backup is the last header backup, nil where none is known.
	Backup *keycache.BackupNote
	// Formats says that the configuration has the next run format the disk.
	Formats bool
}

// Wipe erases the key slots and the header of a recorded volume, and both ends of its disk, proves that the disk is blank, and archives the
// record. Without the header nothing opens what is left between, but a header that was saved before. confirm is told what there is, and
// nothing is written unless it returns nil.
//
// Before the first write the record says `wiping`: from then on nothing but another Wipe touches the disk, which completes what was cut. The record goes last, when the disk
// is blank: no cut leaves a disk that a run could take for one that lost its volume by itself.
func (n *Node) Wipe(ctx context.Context, name string, confirm func(Wipe) error) (out Wipe, err error) {
	w, end, err := n.beginWork(ctx)
	if err != nil {
		return out, err
	}
	defer end()
	rec, d, err := w.facts.toWipe(name)
	if err != nil {
		return out, err
	}
	out.Volume, out.Device = rec, d.Path
	if err := d.free(); err != nil {
		return out, err
	}
	hold, err := n.disks.Hold(ctx, d.Device)
	if err != nil {
		return out, err
	}
	defer hold.Close()
	if err := holds(ctx, d.Device, rec.UUID); err != nil {
		return out, err
	}
	if out.Found, err = describe(d.Path); err != nil {
		return out, err
	}
	if note, err := w.store.Backup(rec.UUID); err == nil {
		out.Backup = &note
	}
	plan := decision{Facts: w.facts}
	_, excluded := plan.excluded(d.Device)
	out.Formats = !excluded && plan.policy(d.Device) == PolicyFormat
	if err := confirm(out); err != nil {
		return out, err
	}

	if rec.State != keycache.StateWiping {
		rec.State, rec.Rotation, rec.Changed = keycache.StateWiping, nil, n.now()
		if err := w.store.PutVolume(rec); err != nil {
			return out, err
		}
		n.reached(stepWipeIntent)
	}
	wiped := Event{Kind: EventVolumeWiped, Volume: rec, Device: d.Device, Begun: true}
	n.audit(wiped)
	defer func() { wiped.Begun, wiped.Err = false, err; n.audit(wiped) }()
	if err := luks.Wipe(d.Path, func(p luks.Part) { n.reached(wipeSteps[p]) }); err != nil {
		return out, err
	}
	if err := volumes.MakeBlank(ctx, d.Path); err != nil {
		return out, err
	}
	n.reached(stepBlank)
	if err := w.store.ArchiveVolume(rec.UUID, "wiped"); err != nil {
		return out, err
	}
	n.reached(stepWipeArchived)
	n.log.Info("volume wiped", zap.String("device", d.Path), zap.String("volume", rec.UUID), zap.String("identity", rec.Identity))
	return out, nil
}

var wipeSteps = map[luks.Part]step{luks.PartKeyslots: stepSlotsWiped, luks.PartCopies: stepHeaderWiped}

// toWipe finds the one volume that a name means, also where its wipe was cut, and its disk: by the header, or, where there is none any more, by
// the identity. Both have to be the record's.
func (f Facts) toWipe(name string) (keycache.VolumeRecord, DeviceFacts, error) {
	var rec keycache.VolumeRecord
	var disk DeviceFacts
	for _, uuid := range sortedKeys(f.Records.Volumes) {
		v := f.Records.Volumes[uuid]
		if v.InstanceID != f.InstanceID || v.State == keycache.StateFormatting {
			continue
		}
		d, err := f.diskToWipe(v)
		if !(Action{Volume: v, Device: d}).is(name) {
			continue
		}
		if err != nil {
			return v, d, err
		}
		if rec.UUID != "" {
			return v, d, &RefusedError{Refusal: RefusedRecord, Device: d.Path, Reason: fmt.Sprintf("%q means volume %s and volume %s", name, rec.UUID, uuid)}
		}
		rec, disk = v, d
	}
	if rec.UUID == "" {
		return rec, disk, &UnknownVolumeError{Name: name}
	}
	return rec, disk, nil
}

func (f Facts) diskToWipe(v keycache.VolumeRecord) (found DeviceFacts, err error) {
	err = f.locate(v).err
	for _, d := range f.Devices {
		_, open := ourMapping(d.Device, v)
		shows := open || d.Header != nil && d.Header.Header != nil && d.Header.Header.UUID == v.UUID
		switch same := sameDisk(v, d.Device) && v.Size == d.Size; {
		case shows && !same:
			return d, &RefusedError{Refusal: RefusedRecord, Device: d.Path, Reason: fmt.Sprintf("the record of volume %s says %s with %d bytes, and it is on %s with %d", v.UUID, v.Identity, v.Size, d.Identity, d.Size)}
		case same && found.Path != "":
			return d, &RefusedError{Refusal: RefusedContent, Device: d.Path, Reason: fmt.Sprintf("%s is %s too", found.Path, v.Identity)}
		case same:
			found = d
		}
	}
	if found.Path != "" {
		err = nil
	}
	return found, err
}
