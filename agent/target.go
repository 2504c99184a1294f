package agent

import (
	"context"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// work is what a command on recorded volumes has while it holds the records.
type work struct {
	*Node
	store *keycache.Store
	facts Facts
	keys  *keyring
}

// beginWork locks the records and looks at the machine; end wipes the keys and unlocks.
func (n *Node) beginWork(ctx context.Context) (w *work, end func(), err error) {
	store, release, err := n.lockRecords(ctx)
	if err != nil {
		return nil, nil, err
	}
	facts, err := n.observe(ctx, store, nil)
	if err != nil {
		release()
		return nil, nil, err
	}
	w = &work{Node: n, store: store, facts: facts, keys: newKeyring(ctx, n.cloud)}
	return w, func() { n.wipeKeyring(w.keys); release() }, nil
}

// beginOn is beginWork on the volumes that the names mean, as [Facts.targets] has them.
func (n *Node) beginOn(ctx context.Context, names []string) (w *work, targets []target, end func(), err error) {
	if w, end, err = n.beginWork(ctx); err != nil {
		return nil, nil, nil, err
	}
	if targets, err = w.facts.targets(names); err != nil {
		end()
		return nil, nil, nil, err
	}
	return w, targets, end, nil
}

func (n *Node) wipeKeyring(keys *keyring) {
	if err := n.wipeKeys(keys.take()...); err != nil {
		n.log.Warn("keys may be in memory until the process ends", zap.Error(err))
	}
}

// target is a recorded volume that a command is about, and the disk that it is on.
type target struct {
	Volume keycache.VolumeRecord
	// Device has no Path where the volume is not attached.
	Device volumes.Device
	// Mapping has no Name where the volume is not open.
	Mapping volumes.Mapping
	// err is why the volume cannot be worked on: it is not attached, or there are two of it.
	err error
}

// targets finds the ready volumes of this instance that the names mean, in order of UUID; no name means all. A volume is named
// as for [Node.Lock]. A name that none of them has is an *[UnknownVolumeError].
func (f Facts) targets(names []string) ([]target, error) {
	chosen, unknown := f.recorded(names, func(v keycache.VolumeRecord) bool { return v.InstanceID == f.InstanceID })
	if len(unknown) > 0 {
		return nil, &UnknownVolumeError{Name: unknown[0]}
	}
	return chosen, nil
}

// anyTargets is targets for volumes of whatever instance, and for disks without a record, which have to be named, by device or LUKS UUID.
func (f Facts) anyTargets(names []string) ([]target, error) {
	chosen, unknown := f.recorded(names, func(keycache.VolumeRecord) bool { return true })
	for _, name := range unknown {
		i := slices.IndexFunc(f.Devices, func(d DeviceFacts) bool {
			return d.Is(name) || d.Header != nil && d.Header.Header != nil && d.Header.Header.UUID == name
		})
		if i < 0 {
			return nil, &UnknownVolumeError{Name: name}
		}
		t := target{Device: f.Devices[i].Device}
		if len(t.Device.Uses) > 0 {
			t.err = &RefusedError{Refusal: RefusedContent, Device: t.Device.Path, Reason: "it is in use: " + t.Device.Uses[0].Evidence}
		}
		chosen = append(chosen, t)
	}
	return chosen, nil
}

// recorded finds ready volumes by their records, and which names mean none of them.
func (f Facts) recorded(names []string, may func(keycache.VolumeRecord) bool) (chosen []target, unknown []string) {
	found := map[string]bool{}
	for _, uuid := range sortedKeys(f.Records.Volumes) {
		v := f.Records.Volumes[uuid]
		if !may(v) || v.State != keycache.StateReady {
			continue
		}
		t := f.locate(v)
		meant := Action{Volume: v, Device: DeviceFacts{Device: t.Device}}
		named := len(names) == 0
		for _, name := range names {
			if meant.is(name) {
				found[name], named = true, true
			}
		}
		if named {
			chosen = append(chosen, t)
		}
	}
	return chosen, slices.DeleteFunc(slices.Clone(names), func(name string) bool { return found[name] })
}

// locate finds the disk of a volume: by its open mapping, or by the header on it.
func (f Facts) locate(v keycache.VolumeRecord) target {
	t := target{Volume: v, err: &RefusedError{Refusal: RefusedDevice,
		Reason: fmt.Sprintf("volume %s (%s) is not attached", v.UUID, v.Identity)}}
	for _, d := range f.Devices {
		m, open := ourMapping(d.Device, v)
		if !open && (d.Header == nil || d.Header.Header == nil || d.Header.Header.UUID != v.UUID) {
			continue
		}
		if t.Device.Path != "" {
			t.err = &RefusedError{Refusal: RefusedContent, Device: d.Path,
				Reason: fmt.Sprintf("LUKS volume %s is on %s too", v.UUID, t.Device.Path)}
			return t
		}
		t.Device, t.Mapping, t.err = d.Device, m, nil
	}
	return t
}

// inspectTarget reads the header of a target again and wants it to pass the check, to have a token and to be that of the volume,
// if that is recorded.
func (n *Node) inspectTarget(t target) (*luks.Inspection, error) {
	if t.err != nil {
		return nil, t.err
	}
	if err := n.disks.Check(t.Device); err != nil {
		return nil, err
	}
	header, err := luks.Inspect(t.Device.Path)
	if err != nil {
		return nil, err
	}
	reasons := slices.Clone(header.Reasons)
	switch {
	case header.Header == nil || t.Volume.UUID != "" && header.Header.UUID != t.Volume.UUID:
		reasons = append(reasons, "it is not the header of volume "+t.Volume.UUID)
	case header.Header.Token == nil:
		reasons = append(reasons, "it has no luks-kms-agent token")
	}
	if len(reasons) > 0 || !header.Pass() {
		return nil, &luks.HeaderError{Path: t.Device.Path, Reasons: reasons}
	}
	return header, nil
}

// keyOf is the key record of a volume.
func (f Facts) keyOf(v keycache.VolumeRecord) (keycache.KeyRecord, error) {
	d := decision{Facts: f}
	if p := d.keyProblem(v.KeyID); p != "" {
		return keycache.KeyRecord{}, &RefusedError{Refusal: RefusedRecord, Reason: fmt.Sprintf("cannot use volume %s: %s", v.UUID, p)}
	}
	return f.Records.Keys[v.KeyID], nil
}
