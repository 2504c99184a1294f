package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
)

// Rotated is what Rotate did with one volume.
type Rotated struct {
	Volume keycache.VolumeRecord // as it is now
	Device string                // path; "" where the volume is not attached
	// From is the data key that the volume had, "" where it had the new one already.
	From string
	// Left says that the volume was left for the next Rotate, as this one goes on with what an earlier one began.
	Left bool
	Err  error
	Took time.Duration
}

// Rotate gives volumes a new data key. Each gets a key slot for it, then the token names
// that, and only then the slot of the old data key goes. The volumes are named as for
// [Node.Lock]; no name means all of this instance. They may be open and in use. At key scope "node" they get one data
// key together. Key slots of others are not touched.
//
// It may be cut at any point: at each the record names a data key that opens the volume. Run again, it goes
// on with what the run that was cut had begun. A failure of one volume never stops the others.
func (n *Node) Rotate(ctx context.Context, names []string) (done []Rotated, err error) {
	w, targets, end, err := n.beginOn(ctx, names)
	if err != nil {
		return nil, err
	}
	defer end()
	r := rotation{work: w}
	done = make([]Rotated, len(targets))
	for i, t := range targets {
		done[i] = Rotated{Volume: t.Volume, Device: t.Device.Path}
		if t.Volume.Rotation != nil {
			r.resumes, r.next = true, t.Volume.Rotation.KeyID
		}
	}
	// All intents before the first disk: a cut then leaves no doubt which volumes were meant.
	for i, t := range targets {
		// With a data key for each volume nothing tells one that is done from one that was not begun.
		if done[i].Left = r.resumes && n.cfg.KeyScope == ScopeVolume && t.Volume.Rotation == nil; !done[i].Left {
			done[i].Err = r.intend(ctx, t, &done[i].Volume)
		}
	}
	for i, t := range targets {
		if done[i].Err != nil || done[i].Volume.Rotation == nil {
			continue
		}
		old, start := done[i].Volume.KeyID, n.now()
		t.Volume = done[i].Volume
		if done[i].Err = r.rotate(ctx, t, &done[i].Volume); done[i].Err == nil {
			done[i].From = old
		}
		done[i].Took = n.now().Sub(start)
	}
	for i, t := range targets {
		if done[i].Err != nil {
			n.audit(Event{Kind: EventDataKeyRotated, Volume: done[i].Volume, Device: t.Device, Err: done[i].Err})
		}
	}
	for _, p := range w.facts.Records.Problems {
		done = append(done, Rotated{Err: &p})
	}
	return done, errors.Join(ctx.Err(), r.archiveUnused(done))
}

// rotation is one run of Rotate.
type rotation struct {
	*work
	resumes bool   // an earlier run was cut
	next    string // id of the data key that all volumes get, "" where it is not made yet
}

// intend writes into the record of a volume which data key and key slot it will have. A volume that has the data key
// already, by an earlier run, is left alone, as is the intent of one.
func (r *rotation) intend(ctx context.Context, t target, v *keycache.VolumeRecord) error {
	if v.Rotation != nil || v.KeyID == r.next {
		return nil
	}
	header, err := r.inspectTarget(t)
	if err != nil {
		return err
	}
	rec, err := r.facts.keyOf(*v)
	if err != nil {
		return err
	}
	key, err := r.keys.get(rec)
	if err != nil {
		return err
	}
	if err := header.Verify(key); err != nil {
		return err
	}
	slot, err := header.FreeKeySlot()
	if err != nil {
		return fmt.Errorf("cannot rotate the data key of %s: %w", t.Device.Path, err)
	}
	next, err := r.newKey(ctx)
	if err != nil {
		return err
	}
	v.Rotation = &keycache.Rotation{KeyID: next, KeySlot: slot, OldKeySlot: header.Header.Token.Keyslot}
	if err := r.putVolume(r.store, v); err != nil {
		v.Rotation = nil
		return err
	}
	r.reached(stepRotating)
	return nil
}

// ErrRotating refuses what has to wait until a rotation has ended.
var ErrRotating = errors.New("its data key is being replaced")

// newKey gives the data key that a volume will have: one for all at key scope "node".
func (r *rotation) newKey(ctx context.Context) (string, error) {
	if r.next != "" && r.cfg.KeyScope == ScopeNode {
		return r.next, nil
	}
	_, rec, err := r.makeKey(ctx, r.store, r.keys)
	if err != nil {
		return "", err
	}
	r.facts.Records.Keys[rec.ID], r.next = rec, rec.ID
	return rec.ID, nil
}

// rotate does what the rotation of the record says, from wherever an earlier run left it.
func (r *rotation) rotate(ctx context.Context, t target, v *keycache.VolumeRecord) error {
	header, err := r.inspectTarget(t)
	if err != nil {
		return err
	}
	rec, ok := r.facts.Records.Keys[v.Rotation.KeyID]
	if !ok {
		return &RefusedError{Refusal: RefusedRecord, Device: t.Device.Path,
			Reason: fmt.Sprintf("key record %s, of the data key to come, is missing", v.Rotation.KeyID)}
	}
	next, err := r.keys.get(rec)
	if err != nil {
		return err
	}
	oldRecord, err := r.facts.keyOf(*v)
	if err != nil {
		return err
	}
	old, err := r.keys.get(oldRecord)
	if err != nil {
		return err
	}
	if header.Header.Token.Keyslot != v.Rotation.KeySlot || header.Verify(next) != nil {
		if err := r.move(ctx, t, v, header, rec, old, next); err != nil {
			return err
		}
	}
	if err := r.removeOld(ctx, t, v.Rotation.OldKeySlot, old, next); err != nil {
		return err
	}
	r.reached(stepSlotRemoved)
	rotated := *v
	rotated.KeyID, rotated.Rotation = rec.ID, nil
	if err := r.putVolume(r.store, &rotated); err != nil {
		return err
	}
	*v = rotated
	r.audit(Event{Kind: EventDataKeyRotated, Volume: *v, Device: t.Device, Key: rec, RequestID: next.RequestID(), From: oldRecord})
	r.reached(stepRotated)
	r.log.Info("data key rotated", zap.String("volume", v.UUID), zap.String("from", oldRecord.ID), zap.String("to", rec.ID))
	return nil
}

// move gives the new data key its slot and lets the token name it.
func (r *rotation) move(ctx context.Context, t target, v *keycache.VolumeRecord, header *luks.Inspection, rec keycache.KeyRecord, old, next *keycache.Key) error {
	if err := header.Verify(old); err != nil {
		return err
	}
	path := t.Device.Path
	added := false
	if header.HasKeySlot(v.Rotation.KeySlot) {
		err := luks.OpensKeySlot(ctx, path, v.Rotation.KeySlot, next)
		if err != nil && !errors.Is(err, luks.ErrWrongKey) {
			return err
		}
		if added = err == nil; !added {
			// Somebody took the number since: it is his.
			slot, err := header.FreeKeySlot()
			if err != nil {
				return fmt.Errorf("cannot rotate the data key of %s: %w", path, err)
			}
			moved := *v.Rotation
			moved.KeySlot = slot
			v.Rotation = &moved
			if err := r.putVolume(r.store, v); err != nil {
				return err
			}
		}
	}
	if !added {
		if err := luks.AddKeySlot(ctx, path, v.Rotation.KeySlot, old, next); err != nil {
			return err
		}
	}
	r.reached(stepSlotAdded)
	if err := luks.MoveToken(ctx, path, rec.KeyARN, rec.WrappedKey, v.Rotation.KeySlot, old, next); err != nil {
		return err
	}
	r.reached(stepTokenMoved)
	return nil
}

// removeOld removes the key slot of the old data key, if it still is that: a slot of that number which the old data key does not open
// is somebody else's.
func (r *rotation) removeOld(ctx context.Context, t target, slot int, old, next *keycache.Key) error {
	header, err := r.inspectTarget(t)
	if err != nil {
		return err
	}
	if !header.HasKeySlot(slot) {
		return nil
	}
	err = luks.OpensKeySlot(ctx, t.Device.Path, slot, old)
	if errors.Is(err, luks.ErrWrongKey) {
		r.log.Warn("a key slot is not the old data key's any more and stays", zap.String("device", t.Device.Path), zap.Int("key_slot", slot))
		return nil
	}
	if err != nil {
		return err
	}
	err = luks.RemoveKeySlot(ctx, t.Device.Path, slot, next)
	r.audit(Event{Kind: EventKeySlotRemoved, Volume: t.Volume, Device: t.Device, KeySlot: &slot, RequestID: next.RequestID(),
		Reason: "it was the old data key's", Err: err})
	return err
}

// archiveUnused archives the key records of this instance that no volume needs: those that were replaced, by this run or by one that
// was cut before it came to this.
func (r *rotation) archiveUnused(done []Rotated) error {
	for _, d := range done {
		if d.Volume.UUID != "" {
			r.facts.Records.Volumes[d.Volume.UUID] = d.Volume
		}
	}
	needed := map[string]bool{}
	for _, v := range r.facts.Records.Volumes {
		for _, id := range keyIDs(v) {
			needed[id] = true
		}
	}
	var errs []error
	for _, id := range sortedKeys(r.facts.Records.Keys) {
		if needed[id] || r.facts.Records.Keys[id].InstanceID != r.facts.InstanceID {
			continue
		}
		const why = "no volume needs it since rotate"
		err := r.store.ArchiveKey(id, why)
		r.audit(Event{Kind: EventRecordArchived, Key: r.facts.Records.Keys[id], Reason: why, Err: err})
		if err != nil {
			errs = append(errs, err)
			continue
		}
		r.reached(stepKeyArchived)
	}
	return errors.Join(errs...)
}
