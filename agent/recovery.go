package agent

import (
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

// RecoveryResult is what was done with, or found on, one volume that recovery keys
// are about.
type RecoveryResult struct {
	Volume keycache.VolumeRecord // only the UUID is known of a volume without record
	Device string                // path; "" where the volume is not attached
	Slot   int                   // of AddRecovery: the new key slot
	Keys   []luks.RecoveryToken  // of ListRecovery
	Other  []int                 // of ListRecovery: key slots that no token names
	Err    error
}

// RecoveryKeyThereError is a volume that has a recovery key already.
type RecoveryKeyThereError struct{ Device string }

func (e *RecoveryKeyThereError) Error() string {
	return fmt.Sprintf("cannot add a recovery key to %s: it has one", e.Device)
}

// AddRecovery makes one recovery key, gives each named volume a key slot for it,
// and hands it to show, which must not keep it, to be written down. It needs KMS, for
// the data keys; volumes may be open and in use.
//
// The order is what keeps a cut from leaving a key that counts and that nobody has:
// the slot is written and proven, then the key is shown, and only then does a token
// say that there is a recovery key. A slot without token is found by ListRecovery.
// With replace a volume may have a recovery key already, which is removed last.
func (n *Node) AddRecovery(ctx context.Context, names []string, replace bool, show func(*keycache.Key) error) (results []RecoveryResult, err error) {
	recovery, err := keycache.NewRecoveryKey()
	if err != nil {
		return nil, err
	}
	defer n.wipeRecovery(recovery)
	err = n.withDataKeys(ctx, names, func(open []opener) error {
		var added []int // of open and results
		for i, o := range open {
			slot, err := n.addRecoverySlot(ctx, o, recovery, replace)
			results = append(results, RecoveryResult{Volume: o.Volume, Device: o.Device.Path, Slot: slot, Err: err})
			if err == nil {
				added = append(added, i)
			}
		}
		if len(added) == 0 {
			return nil
		}
		n.reached(stepRecoverySlot)
		if err := show(recovery); err != nil {
			// Nobody has it: the slots go again.
			errs := []error{fmt.Errorf("cannot show the recovery key: %w", err)}
			for _, i := range added {
				errs = append(errs, luks.RemoveUnnamedSlot(context.WithoutCancel(ctx), open[i].Device.Path, results[i].Slot, open[i].key))
			}
			return errors.Join(errs...)
		}
		n.reached(stepRecoveryShown)
		// Somebody has the key now: that is written down also where the command was interrupted meanwhile.
		ctx := context.WithoutCancel(ctx)
		for _, i := range added {
			results[i].Err = n.finishRecovery(ctx, open[i], results[i].Slot, recovery)
		}
		return nil
	})
	return results, err
}

func (n *Node) addRecoverySlot(ctx context.Context, o opener, recovery *keycache.Key, replace bool) (int, error) {
	if o.err != nil {
		return 0, o.err
	}
	if len(o.header.Header.Recovery) > 0 && !replace {
		return 0, &RecoveryKeyThereError{Device: o.Device.Path}
	}
	return luks.AddRecoverySlot(ctx, o.Device.Path, o.key, recovery)
}

// finishRecovery writes the token of a recovery key that was shown, and removes the
// keys that it replaces.
func (n *Node) finishRecovery(ctx context.Context, o opener, slot int, recovery *keycache.Key) error {
	if err := luks.AddRecoveryToken(ctx, o.Device.Path, slot, o.key, recovery, n.now()); err != nil {
		return err
	}
	n.reached(stepRecoveryToken)
	n.audit(Event{Kind: EventRecoveryKeyAdded, Volume: o.Volume, Device: o.Device, RequestID: o.key.RequestID(), KeySlot: &slot})
	n.log.Info("recovery key added", zap.String("volume", o.Volume.UUID), zap.String("device", o.Device.Path), zap.Int("key_slot", slot))
	return n.removeRecovery(ctx, o)
}

// RemoveRecovery takes the recovery keys of the named volumes away, after KMS has
// shown that the data key opens them. The slot goes first: from then on the key opens
// nothing, and what a cut leaves is a token, by which it can be found and removed.
func (n *Node) RemoveRecovery(ctx context.Context, names []string) (results []RecoveryResult, err error) {
	err = n.withDataKeys(ctx, names, func(open []opener) error {
		for _, o := range open {
			err := o.err
			if err == nil && len(o.header.Header.Recovery) == 0 {
				err = fmt.Errorf("cannot remove the recovery key of %s: %w", o.Device.Path, luks.ErrNoRecoveryKey)
			}
			if err == nil {
				err = n.removeRecovery(ctx, o)
			}
			results = append(results, RecoveryResult{Volume: o.Volume, Device: o.Device.Path, Err: err})
		}
		return nil
	})
	return results, err
}

// removeRecovery removes the recovery keys that a volume had when it was inspected.
func (n *Node) removeRecovery(ctx context.Context, o opener) error {
	for _, old := range o.header.Header.Recovery {
		if err := luks.RemoveRecoverySlot(ctx, o.Device.Path, old.ID, o.key); err != nil {
			return err
		}
		n.reached(stepRecoverySlotGone)
		if err := luks.RemoveRecoveryToken(ctx, o.Device.Path, old.ID, o.key); err != nil {
			return err
		}
		n.reached(stepRecoveryTokenGone)
		n.audit(Event{Kind: EventRecoveryKeyRemoved, Volume: o.Volume, Device: o.Device, RequestID: o.key.RequestID(), KeySlot: &old.Keyslot})
		n.log.Info("recovery key removed", zap.String("volume", o.Volume.UUID), zap.String("device", o.Device.Path), zap.Int("key_slot", old.Keyslot))
	}
	return nil
}

// opener is a volume, its header, and the data key that opens it; or err, why not.
type opener struct {
	target
	header *luks.Inspection
	key    *keycache.Key // the keyring's
}

// withDataKeys gives do the named volumes of this instance with their data keys.
func (n *Node) withDataKeys(ctx context.Context, names []string, do func([]opener) error) error {
	w, targets, end, err := n.beginOn(ctx, names)
	if err != nil {
		return err
	}
	defer end()
	var open []opener
	for _, t := range targets {
		o := opener{target: t}
		if o.header, o.err = n.inspectTarget(t); o.err == nil {
			rec, ok := w.facts.Records.Keys[t.Volume.KeyID]
			if t.Volume.Rotation != nil {
				o.err = fmt.Errorf("cannot change the recovery key of volume %s: %w", t.Volume.UUID, ErrRotating)
			} else if !ok || rec.InstanceID != w.facts.InstanceID {
				o.err = &RefusedError{Refusal: RefusedRecord, Device: t.Device.Path, Reason: fmt.Sprintf("its key record %s is missing", t.Volume.KeyID)}
			} else {
				o.key, o.err = w.keys.get(rec)
			}
		}
		open = append(open, o)
	}
	return errors.Join(do(open), ctx.Err())
}

func (n *Node) wipeRecovery(k *keycache.Key) {
	if err := n.wipeKeys(k); err != nil {
		n.log.Warn("the recovery key may be in memory until the process ends", zap.Error(err))
	}
}

// ListRecovery tells which of the named volumes, or of all that are recorded and
// attached, have a recovery key. It asks neither KMS nor IMDS.
func (n *Node) ListRecovery(ctx context.Context, names []string) (results []RecoveryResult, err error) {
	targets, err := n.withoutKMS(ctx, names)
	if err != nil {
		return nil, err
	}
	for _, t := range targets {
		r := RecoveryResult{Volume: t.Volume, Device: t.Device.Path}
		header, err := n.inspectTarget(t)
		if r.Err = err; err == nil {
			r.Volume.UUID, r.Keys, r.Other = header.Header.UUID, header.Header.Recovery, header.Header.Unnamed
		}
		results = append(results, r)
	}
	return results, nil
}

// TestRecovery tells which volumes a recovery key would open. It asks neither KMS nor
// IMDS, maps nothing, and wipes the key.
func (n *Node) TestRecovery(ctx context.Context, k *keycache.Key, names []string) (results []RecoveryResult, err error) {
	defer n.wipeRecovery(k)
	targets, err := n.withoutKMS(ctx, names)
	if err != nil {
		return nil, err
	}
	for _, t := range targets {
		r := RecoveryResult{Volume: t.Volume, Device: t.Device.Path}
		header, err := n.inspectTarget(t)
		if err == nil {
			r.Volume.UUID = header.Header.UUID
			err = header.VerifyRecovery(k)
		}
		r.Err = err
		results = append(results, r)
	}
	return results, nil
}

// withoutKMS finds volumes while neither KMS nor IMDS is there: those that are
// recorded, of whatever instance, and, if they are named, those on disks that no
// record speaks of.
func (n *Node) withoutKMS(ctx context.Context, names []string) ([]target, error) {
	store, err := keycache.ViewStore(n.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	f := Facts{Config: n.cfg}
	if f.Records, err = store.Load(); err != nil {
		return nil, err
	}
	scan, err := n.disks.Scan(ctx, nil)
	if err != nil {
		return nil, err
	}
	f.Devices = n.inspect(ctx, scan.Devices)
	return f.anyTargets(names)
}

// UnlockRecovery opens and mounts volumes by a recovery key, which it wipes. It asks
// neither KMS nor IMDS and writes no record. A record's mapping and mount point are
// used whichever instance it is of: a person is there. A volume without record has to be
// named, and is mounted only where the configuration says where. No name means all
// volumes that the key opens; the error is for what stopped the whole.
func (n *Node) UnlockRecovery(ctx context.Context, k *keycache.Key, names []string) (Report, error) {
	defer n.wipeRecovery(k)
	report := Report{Started: n.now()}
	_, release, err := n.lockRecords(ctx)
	if err != nil {
		return report, err
	}
	defer release()
	if err := n.maps.Ready(); err != nil {
		return report, err
	}
	targets, err := n.withoutKMS(ctx, names)
	if err != nil {
		return report, err
	}
	connect, disconnect := n.connectOnce(ctx)
	defer disconnect()
	a := &applier{Node: n, mounter: connect}
	opened := false
	for _, t := range targets {
		start := n.now()
		o := Outcome{Action: Action{Verb: Unlock, Device: DeviceFacts{Device: t.Device}, Volume: t.Volume, Reason: "by recovery key"}}
		o.Err = a.unlockRecovery(ctx, t, k, &o.Action)
		o.Took = n.now().Sub(start)
		opened = opened || o.Err == nil
		report.Outcomes = append(report.Outcomes, o)
	}
	for i := range report.Outcomes {
		o := &report.Outcomes[i]
		if len(names) == 0 && opened && (errors.Is(o.Err, luks.ErrWrongRecoveryKey) || errors.Is(o.Err, luks.ErrNoRecoveryKey)) {
			o.Action.Verb, o.Action.Reason, o.Err = Leave, "not a volume of this recovery key", nil
		}
	}
	report.Finished = n.now()
	n.logOutcomes(report.Outcomes)
	return report, ctx.Err()
}

func (a *applier) unlockRecovery(ctx context.Context, t target, k *keycache.Key, act *Action) error {
	v := &act.Volume
	if t.Mapping.Name != "" {
		if slices.Contains(t.Mapping.Mounts, v.MountPoint) {
			act.Verb, act.Reason = Nothing, fmt.Sprintf("open as %s and mounted on %s", t.Mapping.Name, v.MountPoint)
			return nil
		}
		act.Verb = Mount
		return errors.Join(a.maps.Announce(t.Mapping.Name), a.mount(ctx, *act, t.Mapping.Name))
	}
	header, err := a.inspectTarget(t)
	if err != nil {
		return err
	}
	d := decision{Facts: Facts{Config: a.cfg}}
	if v.UUID == "" {
		configured, _ := d.volumeConfig(t.Device)
		v.UUID, v.Mapping, v.Identity, v.MountPoint = header.Header.UUID, "luks-"+header.Header.UUID, t.Device.Identity, configured.MountPoint
		if configured.Filesystem == swapType {
			v.MountPoint = volumes.SwapPoint
		}
	}
	limited, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := a.maps.CloseUnfinished(limited, v.Mapping); err != nil {
		return err
	}
	err = a.maps.OpenRecovery(ctx, header, k, a.openOptions(*act))
	a.audit(Event{Kind: EventRecoveryKeyUsed, Volume: *v, Device: t.Device, Err: err})
	if err != nil {
		return err
	}
	a.log.Warn("opened by recovery key", zap.String("volume", v.UUID), zap.String("device", t.Device.Path), zap.String("mapping", v.Mapping))
	if v.MountPoint == "" {
		act.Reason = "open as " + v.Mapping + ", not mounted: neither a record nor the configuration says where"
		return nil
	}
	if v.Filesystem == "" {
		if v.Filesystem, err = a.filesystemOf(ctx, *act); err != nil {
			return errors.Join(err, a.maps.Close(context.WithoutCancel(ctx), v.Mapping))
		}
	}
	return a.mount(ctx, *act, v.Mapping)
}
