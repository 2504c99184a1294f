package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// ErrNoFilesystem says that a restored header opens its volume, and that there is no filesystem of ours in that.
var ErrNoFilesystem = fmt.Errorf("there is no filesystem of %v", contents)

// Restore is a header that is to be restored, or was.
type Restore struct {
	Manifest keycache.Manifest
	Device   string
	// Found is what the disk shows where the header belongs.
	Found string
	// Same says that the very header is there already.
	Same bool
	// Saved is the file that has what was overwritten, "" where that was nothing but zeros.
	Saved string
	// Records are the kinds of records that were lost and are written again.
	Records []string
}

// RestoreHeader puts the header in a backup back onto the disk that it was read from. Before anything is written, the header passes the strict check and opens under
// the data key that KMS gives, MAC included; the disk is free, and holds nothing but the volume or what is left of it; and confirm,
// which is told what there is, returns nil. What is overwritten is saved beside the backup. At last the volume is opened, a filesystem looked for, and
// the volume closed.
//
// name, if not "", has to name the volume. It may be cut at any point, and repeated.
func (n *Node) RestoreHeader(ctx context.Context, path, name string, confirm func(Restore) error) (r Restore, err error) {
	b, err := keycache.ReadBackup(path)
	if err != nil {
		return r, err
	}
	r.Manifest = b.Manifest
	w, end, err := n.beginWork(ctx)
	if err != nil {
		return r, err
	}
	defer end()
	d, err := w.diskOf(b, name)
	if err != nil {
		return r, err
	}
	r.Device = d.Path
	rec, keyRecord, err := w.recordsFor(b)
	if err != nil {
		return r, err
	}
	header, err := luks.InspectHeader(path, b.Header, d.Size)
	if err != nil {
		return r, err
	}
	if header.Header.UUID != b.Volume.UUID {
		return r, &RefusedError{Refusal: RefusedBackup, Device: path, Reason: "its header is of volume " + header.Header.UUID + ", not of " + b.Volume.UUID}
	}
	key, err := w.keys.get(keyRecord)
	if err != nil {
		return r, err
	}
	if err := header.Verify(key); err != nil {
		return r, err
	}

	hold, err := n.disks.Hold(ctx, d.Device)
	if err != nil {
		return r, err
	}
	defer hold.Close()
	if err := holds(ctx, d.Device, b.Volume.UUID); err != nil {
		return r, err
	}
	present, err := luks.ReadStart(d.Path, int64(len(b.Header)))
	if err != nil {
		return r, err
	}
	r.Same = bytes.Equal(present, b.Header)
	if r.Found, err = describe(d.Path); err != nil {
		return r, err
	}
	_, haveKey := w.facts.Records.Keys[keyRecord.ID]
	_, haveVolume := w.facts.Records.Volumes[rec.UUID]
	if !haveKey {
		r.Records = append(r.Records, "key")
	}
	if !haveVolume {
		r.Records = append(r.Records, "volume")
	}
	if err := confirm(r); err != nil {
		return r, err
	}
	if err := w.restoreRecords(keyRecord, rec, haveKey, haveVolume); err != nil {
		return r, err
	}
	if !r.Same {
		if len(bytes.Trim(present, "\x00")) > 0 {
			saved := path + ".before-" + n.now().UTC().Format("20060102T150405.000Z")
			if err := keycache.WriteNew(saved, present); err != nil {
				return r, fmt.Errorf("cannot save what the header replaces: %w", err)
			}
			r.Saved = saved
			n.reached(stepHeaderSaved)
		}
		restored := Event{Kind: EventHeaderRestoredFromBackup, Volume: rec, Device: d.Device, Key: keyRecord, RequestID: key.RequestID(), Reason: path, Begun: true}
		n.audit(restored)
		defer func() { restored.Begun, restored.Err = false, err; n.audit(restored) }()
		if err := luks.RestoreHeader(d.Path, b.Header, key, func(p luks.Part) { n.reached(restoreSteps[p]) }); err != nil {
			return r, err
		}
		n.log.Info("LUKS header restored", zap.String("device", d.Path), zap.String("volume", rec.UUID), zap.String("backup", path), zap.String("saved", r.Saved))
	}
	return r, w.proveOpens(ctx, d, rec, key)
}

// restoreSteps are the parts of a header that is restored.
var restoreSteps = map[luks.Part]step{
	luks.PartTorn: stepTorn, luks.PartKeyslots: stepSlotsBack, luks.PartSecondary: stepSecondaryBack, luks.PartPrimary: stepHeaderBack,
}

// describe says what is on a disk where its header would be.
func describe(path string) (string, error) {
	i, err := luks.Inspect(path)
	switch {
	case err != nil:
		return "", err
	case i.Kind == luks.KindNone:
		return "no LUKS header", nil
	case i.Pass():
		return fmt.Sprintf("LUKS2 volume %s, whose header passes the check (sequence id %d)", i.Header.UUID, i.Header.SeqID), nil
	case i.Kind == luks.KindLUKS2:
		return fmt.Sprintf("LUKS2 volume %s, whose header is refused: %s", i.Header.UUID, i.Reasons[0]), nil
	}
	return describeKind(i.Kind), nil
}

// diskOf finds the disk that a backup is of, and wants it to be free.
func (w *work) diskOf(b *keycache.Backup, name string) (DeviceFacts, error) {
	v := b.Volume
	var found []DeviceFacts
	for _, d := range w.facts.Devices {
		same := sameDisk(v, d.Device)
		if same {
			found = append(found, d)
		}
		_, open := ourMapping(d.Device, v)
		shows := open || d.Header != nil && d.Header.Header != nil && d.Header.Header.UUID == v.UUID
		switch {
		case !same && name != "" && d.Is(name):
			return d, &RefusedError{Refusal: RefusedBackup, Device: d.Path, Reason: fmt.Sprintf("the backup is of %s %s, and this is %s %s", v.Class, v.Identity, d.Class, d.Identity)}
		case !same && shows:
			return d, &RefusedError{Refusal: RefusedBackup, Device: d.Path, Reason: fmt.Sprintf("it shows volume %s, and the backup of that is of %s", v.UUID, v.Identity)}
		}
	}
	switch {
	case len(found) == 0:
		return DeviceFacts{}, &RefusedError{Refusal: RefusedDevice, Reason: fmt.Sprintf("the disk of the backup, %s %s, is not attached", v.Class, v.Identity)}
	case len(found) > 1:
		return found[0], &RefusedError{Refusal: RefusedContent, Device: found[0].Path, Reason: fmt.Sprintf("%s is %s too", found[1].Path, v.Identity)}
	}
	d := found[0]
	if name != "" && !(Action{Volume: v, Device: d}).is(name) {
		return d, &UnknownVolumeError{Name: name}
	}
	if d.Size != v.Size {
		return d, &RefusedError{Refusal: RefusedBackup, Device: d.Path, Reason: fmt.Sprintf("it has %d bytes, and the backup is of a disk with %d", d.Size, v.Size)}
	}
	return d, d.free()
}

// recordsFor are the records under which a backup's header is restored: those of this instance, or where they are lost those in the backup.
func (w *work) recordsFor(b *keycache.Backup) (keycache.VolumeRecord, keycache.KeyRecord, error) {
	refuse := func(format string, args ...any) (keycache.VolumeRecord, keycache.KeyRecord, error) {
		return b.Volume, b.Key, &RefusedError{Refusal: RefusedRecord, Reason: fmt.Sprintf("cannot restore the header of volume %s: ", b.Volume.UUID) + fmt.Sprintf(format, args...)}
	}
	records, d := w.facts.Records, decision{Facts: w.facts}
	for _, id := range sortedKeys(records.Volumes) {
		if rec := records.Volumes[id]; id != b.Volume.UUID && rec.State != keycache.StateFormatting && sameDisk(rec, volumes.Device{Class: volumes.Class(b.Volume.Class), Identity: b.Volume.Identity}) {
			return refuse("volume %s is recorded %s on the same disk", id, rec.State)
		}
	}
	rec, recorded := records.Volumes[b.Volume.UUID]
	switch {
	case !recorded && d.unreadable("volume", b.Volume.UUID):
		return refuse("its record cannot be read")
	case !recorded:
		rec = b.Volume
		rec.InstanceID = w.facts.InstanceID
	case rec.InstanceID != w.facts.InstanceID:
		return refuse("its record is of instance %s", rec.InstanceID)
	case rec.State != keycache.StateReady:
		return refuse("it is recorded %s", rec.State)
	case rec.Rotation != nil:
		return rec, b.Key, fmt.Errorf("cannot restore the header of volume %s: %w", rec.UUID, ErrRotating)
	case rec.Identity != b.Volume.Identity || rec.Class != b.Volume.Class || rec.Size != b.Volume.Size:
		return refuse("its record says %s %s with %d bytes, and the backup %s %s with %d", rec.Class, rec.Identity, rec.Size, b.Volume.Class, b.Volume.Identity, b.Volume.Size)
	}
	key, haveKey := records.Keys[rec.KeyID]
	switch {
	case haveKey && key.InstanceID != w.facts.InstanceID:
		return refuse("key record %s is of instance %s", key.ID, key.InstanceID)
	case haveKey:
		return rec, key, nil // that it is the header's the header shows
	case rec.KeyID != b.Key.ID || d.unreadable("key", rec.KeyID):
		return refuse("%s", d.keyProblem(rec.KeyID))
	case !d.keyAllowed(b.Key.KeyARN):
		return refuse("the backup names key %s, which the configuration does not allow", b.Key.KeyARN)
	}
	key = b.Key
	key.InstanceID = w.facts.InstanceID
	return rec, key, nil
}

// restoreRecords writes the records that are lost, key first.
func (w *work) restoreRecords(key keycache.KeyRecord, rec keycache.VolumeRecord, haveKey, haveVolume bool) error {
	if !haveKey {
		if err := w.store.PutKey(key); err != nil {
			return err
		}
		w.reached(stepBackupKey)
	}
	if haveVolume {
		return nil
	}
	for _, other := range w.facts.Records.Volumes {
		if other.MountPoint == rec.MountPoint && rec.MountPoint != volumes.SwapPoint {
			return nil // its place was given to another since: the next run adopts it and gives it a new one
		}
	}
	rec.Changed = w.now().UTC().Truncate(time.Second)
	if err := w.store.PutVolume(rec); err != nil {
		return err
	}
	w.reached(stepBackupRecord)
	return nil
}

// proveOpens opens the volume, looks for its filesystem, and closes it.
func (w *work) proveOpens(ctx context.Context, d DeviceFacts, rec keycache.VolumeRecord, key *keycache.Key) error {
	header, err := luks.Inspect(d.Path)
	if err != nil {
		return err
	}
	if err := w.maps.Ready(); err != nil {
		return err
	}
	if err := w.maps.Open(ctx, header, key, luks.OpenOptions{Name: rec.Mapping}); err != nil {
		return err
	}
	content, err := volumes.Filesystem(ctx, w.maps.Path(rec.Mapping))
	if err == nil && !slices.Contains(contents, content.Type) {
		err = fmt.Errorf("the header of %s is restored and opens volume %s, but: %w (%s)", d.Path, rec.UUID, ErrNoFilesystem, content.Detail)
	}
	return errors.Join(err, w.maps.Close(context.WithoutCancel(ctx), rec.Mapping))
}
