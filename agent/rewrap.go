package agent

import (
	"bytes"
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
)

// Rewrapped is what Rewrap did with one key record, or with the token of one
// volume.
type Rewrapped struct {
	Key    keycache.KeyRecord // as it is now
	Volume keycache.VolumeRecord
	Device string // path; "" for a key record, and where the volume is not attached
	// From is the key ARN that stood there before, "" where nothing was changed.
	From string
	Err  error
}

// IsToken tells a token from a key record.
func (r Rewrapped) IsToken() bool { return r.Volume.UUID != "" }

// Rewrap brings the data keys of this instance under the configured KMS key: KMS
// wraps each anew without giving it out, the record is replaced, and then the token
// of each volume that it opens. Data keys, key slots and the volumes' content stay as they are;
// volumes may be open and in use.
//
// It may be cut at any point, and repeated: what is done is not done again. A
// record is replaced only when KMS has given the same data key for the old and the
// new one, and the old one is archived. A failure of one key or token never stops the others.
func (n *Node) Rewrap(ctx context.Context) (done []Rewrapped, err error) {
	n.tell(lookingAround)
	w, end, err := n.beginWork(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	under, err := n.cloud.CheckKey(ctx)
	if err != nil {
		return nil, err
	}
	targets, err := w.facts.targets(nil)
	if err != nil {
		return nil, err
	}
	for _, id := range sortedKeys(w.facts.Records.Keys) {
		rec := w.facts.Records.Keys[id]
		if rec.InstanceID != w.facts.InstanceID {
			continue
		}
		key, rewrapped := w.rewrapKey(ctx, rec, under)
		done = append(done, rewrapped)
		if rewrapped.Err != nil {
			continue
		}
		for _, t := range targets {
			if t.Volume.KeyID == id {
				done = append(done, w.rewrapToken(ctx, t, rewrapped.Key, key))
			}
		}
	}
	for _, p := range w.facts.Records.Problems {
		done = append(done, Rewrapped{Err: &p})
	}
	return done, ctx.Err()
}

// rewrapKey replaces a key record, if it is not under that KMS key already, and
// returns its data key, which stays the keyring's.
func (w *work) rewrapKey(ctx context.Context, rec keycache.KeyRecord, under keycache.KeyFacts) (*keycache.Key, Rewrapped) {
	w.step("Rewrapping data key %s", rec.ID)
	r := Rewrapped{Key: rec}
	fail := func(err error) (*keycache.Key, Rewrapped) { r.Err = err; return nil, r }
	key, err := w.keys.get(rec)
	if err != nil {
		return fail(err)
	}
	if rec.KeyARN == under.ARN {
		return key, r
	}
	event := Event{Kind: EventDataKeyRewrapped, Key: rec, From: rec}
	fail = func(err error) (*keycache.Key, Rewrapped) {
		r.Err, event.Err = err, err
		w.audit(event)
		return nil, r
	}
	rewrapped, err := w.cloud.ReEncrypt(ctx, rec)
	if err != nil {
		return fail(err)
	}
	if rewrapped.KeyARN == rec.KeyARN {
		return key, r // the role may not ask which key an alias is
	}
	event.Key, event.RequestID = rewrapped, rewrapped.RequestID
	proven, err := w.cloud.Decrypt(ctx, rewrapped)
	if err != nil {
		return fail(fmt.Errorf("cannot prove the rewrapped data key before it replaces the old: %w", err))
	}
	defer proven.Wipe()
	if !proven.Equal(key) {
		return fail(fmt.Errorf("cannot use the rewrapped data key %s: %w", rec.ID, keycache.ErrOtherKey))
	}
	why := fmt.Sprintf("rewrapped under %s", rewrapped.KeyARN)
	if err := w.store.ReplaceKey(rewrapped, why); err != nil {
		return fail(err)
	}
	w.audit(Event{Kind: EventRecordArchived, Key: rec, Reason: why})
	w.audit(event)
	w.reached(stepRewrapped)
	w.log.Info("data key rewrapped", zap.String("key", rec.ID), zap.String("from", rec.KeyARN), zap.String("to", rewrapped.KeyARN),
		zap.String("request", rewrapped.RequestID))
	r.Key, r.From = rewrapped, rec.KeyARN
	return key, r
}

// rewrapToken makes the token of a volume say what its key record says.
func (w *work) rewrapToken(ctx context.Context, t target, rec keycache.KeyRecord, key *keycache.Key) Rewrapped {
	w.step("Replacing the token of %s", t.Device.Path)
	r := Rewrapped{Key: rec, Volume: t.Volume, Device: t.Device.Path}
	if t.Volume.Rotation != nil {
		r.Err = fmt.Errorf("cannot rewrap the token of volume %s: %w", t.Volume.UUID, ErrRotating)
		return r
	}
	header, err := w.inspectTarget(t)
	if err != nil {
		r.Err = err
		return r
	}
	token := header.Header.Token
	if token.KeyARN == rec.KeyARN && bytes.Equal(token.WrappedKey, rec.WrappedKey) {
		return r
	}
	r.Err = luks.ReplaceToken(ctx, t.Device.Path, rec.KeyARN, rec.WrappedKey, key)
	w.audit(Event{Kind: EventDataKeyRewrapped, Volume: t.Volume, Device: t.Device, Key: rec, RequestID: rec.RequestID,
		From: keycache.KeyRecord{KeyARN: token.KeyARN}, Err: r.Err})
	if r.Err != nil {
		return r
	}
	w.reached(stepReplaced)
	r.From = token.KeyARN
	return r
}
