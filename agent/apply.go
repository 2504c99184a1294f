package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// maxLabel is the size of a LUKS2 label without its NUL byte.
const maxLabel = 47

// RefusedError is an action that the plan refused.
type RefusedError struct {
	Refusal Refusal
	Device  string // path, "" where there is no device
	Reason  string
}

func (e *RefusedError) Error() string {
	if e.Device == "" {
		return e.Reason
	}
	return fmt.Sprintf("cannot use %s: %s", e.Device, e.Reason)
}

// applier carries out one plan.
type applier struct {
	*Node
	store   *keycache.Store
	records keycache.Records
	keys    *keyring
	mounter func() (mounter, error) // connects once, on first use

	formatReady error // why nothing can be formatted: a program is missing
	mapReady    error // why nothing can be mapped: the kernel cannot
	places      map[string]place
	phases      map[string]*phases // by device path

	mu      sync.Mutex
	newKeys map[string]*newKey // by scope: "" for the node, or a device path
	adopted map[string]string  // wrapped key -> key record id
}

// newKey is a data key that several volumes may wait for.
type newKey struct {
	once sync.Once
	key  *keycache.Key
	rec  keycache.KeyRecord
	err  error
}

// apply carries out the plan, all volumes at the same time, and returns an outcome
// for each action, in the plan's order. One failure never stops the others.
func (n *Node) apply(ctx context.Context, store *keycache.Store, f Facts, p Plan, keys *keyring) []Outcome {
	connect, disconnect := n.connectOnce(ctx)
	defer disconnect()
	a := &applier{
		Node: n, store: store, records: f.Records, keys: keys,
		mounter: connect, places: places(p),
		newKeys: map[string]*newKey{}, adopted: map[string]string{}, phases: map[string]*phases{},
	}
	a.checkMeans(ctx, p)
	outcomes := make([]Outcome, len(p.Actions))
	for i := range p.Actions {
		act := &p.Actions[i]
		a.phases[act.Device.Path] = n.spans.phases(&act.Device.Device, act.Volume.MountPoint)
	}
	if err := a.quarantine(p); err != nil {
		// The records could not be moved aside: nothing may rest on them.
		for i, act := range p.Actions {
			outcomes[i] = Outcome{Action: act, Err: err}
		}
		return outcomes
	}
	var wg sync.WaitGroup
	if slices.ContainsFunc(p.Actions, func(act Action) bool { return act.Verb.acts() }) {
		wg.Go(func() { _, _ = connect() }) // it stands when the first volume is open
	}
	for i := range p.Actions {
		wg.Go(func() {
			start := n.now()
			act := p.Actions[i]
			err := a.do(ctx, &act)
			outcomes[i] = Outcome{Action: act, Err: err, Took: n.now().Sub(start)}
			if act.Verb.opens() && n.maps.IsOpen(act.Volume.Mapping) {
				outcomes[i].Opened = n.now()
			}
			if !act.Missing {
				n.auditOutcome(outcomes[i])
			}
		})
	}
	wg.Wait()
	return outcomes
}

// connectOnce defers the connection to systemd until something is mounted, and
// gives all who mount the same one.
func (n *Node) connectOnce(ctx context.Context) (connect func() (mounter, error), disconnect func()) {
	var connected mounter
	connect = sync.OnceValues(func() (m mounter, err error) {
		end := n.spans.begin(SpanMount, "connect to systemd", nil)
		m, err = n.mounts(ctx)
		if end(err); err == nil {
			connected = m
		}
		return m, err
	})
	return connect, func() {
		if connected != nil {
			connected.Close()
		}
	}
}

// checkMeans finds out before a disk is touched whether what the plan needs is
// on the machine, each thing once.
func (a *applier) checkMeans(ctx context.Context, p Plan) {
	end := a.spans.begin(SpanScan, "programs, kernel", nil)
	defer end(nil)
	toMap, toMake := false, map[string]bool{} // filesystem types
	for _, act := range p.Actions {
		switch act.Verb {
		case Format:
			toMake[act.Volume.Filesystem] = true
			toMap = true
		case Unlock, Adopt:
			toMap = true
		}
	}
	if toMap {
		a.mapReady = a.maps.Ready()
	}
	if len(toMake) == 0 {
		return
	}
	errs := []error{luks.CheckCryptsetup(ctx)}
	for _, fstype := range sortedKeys(toMake) {
		errs = append(errs, volumes.CheckMakeFilesystem(fstype))
	}
	a.formatReady = errors.Join(errs...)
}

func (a *applier) quarantine(p Plan) error {
	if len(p.QuarantineKeys)+len(p.QuarantineVolumes) == 0 {
		return nil
	}
	a.log.Warn("records of another instance are moved to quarantine",
		zap.Strings("keys", p.QuarantineKeys), zap.Strings("volumes", p.QuarantineVolumes))
	defer a.spans.begin(SpanRecords, "quarantine", nil)(nil)
	const why = "another instance-id"
	moved := Event{Kind: EventRecordsQuarantined, Reason: why}
	for _, id := range p.QuarantineKeys {
		moved.Records = append(moved.Records, "keys/"+id)
	}
	for _, id := range p.QuarantineVolumes {
		moved.Records = append(moved.Records, "volumes/"+id)
	}
	moved.Err = a.store.Quarantine(p.QuarantineKeys, p.QuarantineVolumes, why)
	a.audit(moved)
	if moved.Err != nil {
		return moved.Err
	}
	a.reached(stepQuarantined)
	return nil
}

// phase says what the time of a volume goes to from now on.
func (a *applier) phase(act Action, kind SpanKind, name string) {
	a.phases[act.Device.Path].next(kind, name)
	a.step("%s", doing(kind, name, act.Device.Path))
}

// doing says to whoever waits what is being done with a volume.
func doing(kind SpanKind, name, device string) string {
	verb := ""
	switch kind {
	case SpanWait:
		return fmt.Sprintf("%s waits %s", device, name)
	case SpanFormat:
		verb = "Formatting"
	case SpanMkfs:
		verb = "Making the filesystem of"
	case SpanMount:
		verb = "Mounting"
	case SpanMap, SpanUnseal:
		verb = "Opening"
	default:
		verb = "Looking at"
	}
	return fmt.Sprintf("%s %s (%s)", verb, device, name)
}

func (a *applier) do(ctx context.Context, act *Action) (err error) {
	defer func() { a.phases[act.Device.Path].end(err) }()
	switch act.Verb {
	case Format:
		return a.format(ctx, act)
	case Unlock:
		return a.unlock(ctx, act)
	case Adopt:
		return a.adopt(ctx, act)
	case Mount:
		if err := a.maps.Announce(act.OpenAs); err != nil {
			return err
		}
		return a.use(ctx, *act, act.OpenAs, func() (*keycache.Key, error) {
			key, _, err := a.opener(act.Volume, act.Device.Header)
			return key, err
		})
	case Stripe:
		return &RefusedError{Refusal: RefusedStripe, Device: act.Device.Path, Reason: "the stripe that it is to be part of is not made"}
	case Refuse:
		return &RefusedError{Refusal: act.Refusal, Device: act.Device.Path, Reason: act.Reason}
	}
	return nil
}

// format makes a volume. The order is what keeps it safe against a cut at any
// point: key proven and recorded, then the intent, then the disk, then `ready`,
// and only then is it mounted.
func (a *applier) format(ctx context.Context, act *Action) error {
	if err := errors.Join(a.formatReady, a.mapReady); err != nil {
		return err
	}
	a.phase(*act, SpanWait, "for the data key")
	key, keyRecord, err := a.keyFor(ctx, *act)
	if err != nil {
		return err
	}
	a.phase(*act, SpanInspect, "look again")
	hold, err := a.disks.Hold(ctx, act.Device.Device)
	if err != nil {
		return err
	}
	defer hold.Close()
	if err := a.stillMayFormat(ctx, *act, key); err != nil {
		return err
	}
	a.phase(*act, SpanRecords, "the intent")
	for _, old := range act.Replaces {
		const why = "the disk went with a stop of the instance"
		err := a.store.ArchiveVolume(old, why)
		a.audit(Event{Kind: EventRecordArchived, Volume: a.records.Volumes[old], Reason: why, Err: err})
		if err != nil {
			return err
		}
		a.reached(stepArchived)
	}

	v := &act.Volume
	if v.UUID == "" {
		v.UUID = uuid.NewString()
	}
	v.KeyID, v.Mapping = keyRecord.ID, "luks-"+v.UUID
	if err := a.putVolume(v); err != nil {
		return err
	}
	a.reached(stepIntent)
	label := v.Identity
	if len(label) > maxLabel {
		label = label[:maxLabel]
	}
	a.phase(*act, SpanFormat, "header, token")
	err = luks.Format(ctx, act.Device.Path, luks.FormatOptions{
		UUID: v.UUID, Label: label, KeyARN: keyRecord.KeyARN, WrappedKey: keyRecord.WrappedKey,
	}, key)
	if err != nil {
		return err
	}
	a.reached(stepFormatted)
	a.phase(*act, SpanInspect, "header")
	header, err := luks.Inspect(act.Device.Path)
	if err != nil {
		return err
	}
	if err := a.maps.Open(ctx, header, key, a.openOptions(*act)); err != nil {
		return err
	}
	a.opened(*act, keyRecord, key, "to make its filesystem")
	a.reached(stepOpened)
	if err := a.finish(ctx, act); err != nil {
		return errors.Join(err, a.maps.Close(context.WithoutCancel(ctx), v.Mapping))
	}
	a.audit(Event{Kind: EventVolumeFormatted, Volume: *v, Device: act.Device.Device, Key: keyRecord, RequestID: key.RequestID(), Reason: act.Reason})
	act.told = true
	return a.use(ctx, *act, v.Mapping, given(key))
}

// finish makes the filesystem of a volume that was just formatted and opened, and
// so shows noise, and records it ready. The filesystem carries the volume's UUID,
// so that a later run can tell one that this step made from one that somebody else
// put there.
func (a *applier) finish(ctx context.Context, act *Action) error {
	v := &act.Volume
	a.phase(*act, SpanFormat, "zero both ends")
	if err := volumes.ZeroEnds(ctx, a.maps.Path(v.Mapping)); err != nil {
		return err
	}
	a.reached(stepCleared)
	a.phase(*act, SpanMkfs, volumes.MakeProgram(v.Filesystem))
	if err := volumes.MakeFilesystem(ctx, a.maps.Path(v.Mapping), v.Filesystem, "", v.UUID); err != nil {
		return err
	}
	a.reached(stepFilesystem)
	a.phase(*act, SpanRecords, "ready")
	v.State = keycache.StateReady
	if err := a.putVolume(v); err != nil {
		return err
	}
	a.reached(stepReady)
	return nil
}

func (a *applier) putVolume(v *keycache.VolumeRecord) error { return a.Node.putVolume(a.store, v) }

func (n *Node) putVolume(store *keycache.Store, v *keycache.VolumeRecord) error {
	now := n.now().UTC().Truncate(time.Second)
	if v.Created.IsZero() {
		v.Created = now
	}
	v.Changed = now
	return store.PutVolume(*v)
}

// stillMayFormat looks again, now that nobody else has the disk: what was planned
// on must still be what is there.
func (a *applier) stillMayFormat(ctx context.Context, act Action, key *keycache.Key) error {
	changed := func(what string) error {
		return &RefusedError{Refusal: RefusedContent, Device: act.Device.Path, Reason: "it changed after it was planned on: " + what}
	}
	if act.OpenAs != "" {
		if err := a.formattedByUs(ctx, act, act.OpenAs); err != nil {
			return err
		}
		if err := a.maps.Close(ctx, act.OpenAs); err != nil {
			return err
		}
	}
	header, content, err := look(ctx, act.Device.Device)
	if err != nil {
		return err
	}
	if act.OpenAs == "" && header.Kind != act.Device.Header.Kind {
		return changed(fmt.Sprintf("LUKS state is %s, was %s", header.Kind, act.Device.Header.Kind))
	}
	switch {
	case content != nil && !content.Blank && !(act.Resume && headless(*content)):
		return changed(content.Detail)
	case header.Kind == luks.KindNone:
		return nil
	case !act.Resume:
		return changed("it holds " + describeKind(header.Kind))
	case header.Header != nil && header.Header.UUID != act.Volume.UUID:
		return changed("it holds LUKS volume " + header.Header.UUID)
	case header.Kind == luks.KindLUKS2 && finished(*header) && !header.Pass():
		return changed("its LUKS header cannot be trusted: " + strings.Join(header.Reasons, "; "))
	case header.Kind != luks.KindLUKS2 || !header.Pass() || act.OpenAs != "":
		// Torn, without key slots or without token: luksFormat was cut. Nothing
		// can have been written into a volume that never opened.
		return nil
	}
	// The token is there, so luksFormat was finished. It may be formatted again only
	// where the key opens it and nothing but our own mkfs wrote into it.
	if err := a.maps.Open(ctx, header, key, a.openOptions(act)); err != nil {
		return err
	}
	a.opened(act, a.records.Keys[act.Volume.KeyID], key, "to see whether its format was cut")
	return errors.Join(a.formattedByUs(ctx, act, act.Volume.Mapping), a.maps.Close(ctx, act.Volume.Mapping))
}

// formattedByUs refuses an opened volume, recorded as being formatted, that holds
// anything but what our own mkfs leaves.
func (a *applier) formattedByUs(ctx context.Context, act Action, mapping string) error {
	content, err := volumes.Filesystem(ctx, a.maps.Path(mapping))
	if err != nil {
		return err
	}
	if content.Blank {
		return nil
	}
	if content.UUID == act.Volume.UUID {
		mounted, err := volumes.EverMounted(a.maps.Path(mapping), content.Type)
		if err != nil || !mounted {
			return err
		}
		return &RefusedError{Refusal: RefusedRecord, Device: act.Device.Path,
			Reason: fmt.Sprintf("volume %s is recorded as being formatted, but its filesystem was mounted since: the record is older than the volume", act.Volume.UUID)}
	}
	return &RefusedError{Refusal: RefusedContent, Device: act.Device.Path,
		Reason: fmt.Sprintf("volume %s is recorded as being formatted, but it holds %s", act.Volume.UUID, content.Detail)}
}

// unlock opens a ready volume and mounts it. It writes to the disk only where the
// primary header is damaged and has to be restored.
func (a *applier) unlock(ctx context.Context, act *Action) error {
	place := a.places[act.Volume.UUID]
	defer place.leave()
	if a.mapReady != nil {
		return a.mapReady
	}
	a.phase(*act, SpanWait, "for the data key")
	key, keyRecord, err := a.opener(act.Volume, act.Device.Header)
	if err != nil {
		return err
	}
	options := a.openOptions(*act)
	options.Loaded = func() {
		a.phase(*act, SpanWait, "for the other volumes")
		place.wait(longestWait)
		a.phase(*act, SpanMap, "show it")
	}
	if err := a.open(ctx, *act, key, options); err != nil {
		return err
	}
	a.opened(*act, keyRecord, key, act.Reason)
	act.told = true
	v := &act.Volume
	if old := a.records.Volumes[v.UUID]; v.Identity != act.Device.Identity || v.MountPoint != old.MountPoint {
		v.Identity, v.Class = act.Device.Identity, string(act.Device.Class)
		a.phase(*act, SpanRecords, "where it is")
		if err := a.putVolume(v); err != nil {
			return err
		}
	}
	return a.use(ctx, *act, v.Mapping, given(key))
}

// given is a data key that is at hand.
func given(key *keycache.Key) opening {
	return func() (*keycache.Key, error) { return key, nil }
}

// opener gives the data key that opens a ready volume. While the key is being replaced that
// is the new one or the old one, whatever a cut left.
func (a *applier) opener(v keycache.VolumeRecord, header *luks.Inspection) (*keycache.Key, keycache.KeyRecord, error) {
	if v.Rotation != nil {
		if rec, ok := a.records.Keys[v.Rotation.KeyID]; ok && header.Header.Token.Keyslot == v.Rotation.KeySlot {
			if key, err := a.keys.get(rec); err == nil && header.Verify(key) == nil {
				return key, rec, nil
			}
		}
	}
	rec := a.records.Keys[v.KeyID]
	key, err := a.keys.get(rec)
	return key, rec, err
}

// open maps a volume that was inspected, if it still is on the disk that was seen.
func (a *applier) open(ctx context.Context, act Action, key *keycache.Key, options luks.OpenOptions) (err error) {
	header := act.Device.Header
	if header.PrimaryDamaged {
		a.phase(act, SpanFormat, "restore the primary header")
		if header, err = a.restoreHeader(ctx, act, key); err != nil {
			return err
		}
	}
	a.phase(act, SpanWait, "for a processor")
	if err := a.disks.Check(act.Device.Device); err != nil {
		return err
	}
	return a.maps.Open(ctx, header, key, options)
}

// opened writes down that a volume is open, before anybody can use it.
func (a *applier) opened(act Action, rec keycache.KeyRecord, key *keycache.Key, why string) {
	a.audit(Event{Kind: EventVolumeOpened, Volume: act.Volume, Device: act.Device.Device, Key: rec, RequestID: key.RequestID(), Reason: why})
}

// restoreHeader writes the secondary header over a damaged primary one, after the
// secondary has shown its MAC: an attacker must not have us copy his.
func (a *applier) restoreHeader(ctx context.Context, act Action, key *keycache.Key) (*luks.Inspection, error) {
	if err := act.Device.Header.Verify(key); err != nil {
		return nil, err
	}
	hold, err := a.disks.Hold(ctx, act.Device.Device)
	if err != nil {
		return nil, err
	}
	defer hold.Close()
	if err := luks.CheckCryptsetup(ctx); err != nil {
		return nil, err
	}
	// Afterwards nothing on the disk tells what was in the primary.
	restored := Event{Kind: EventHeaderRestored, Volume: act.Volume, Device: act.Device.Device, RequestID: key.RequestID(),
		Reason: "the primary is damaged, the secondary passes every check", Begun: true}
	a.audit(restored)
	restored.Begun, restored.Err = false, luks.RestorePrimary(ctx, act.Device.Path)
	a.audit(restored)
	if restored.Err != nil {
		return nil, restored.Err
	}
	a.reached(stepRestored)
	a.log.Warn("the damaged primary LUKS header was restored from the secondary", zap.String("device", act.Device.Path))
	return luks.Inspect(act.Device.Path)
}

// adopt opens a volume by the key in its token. The records are written before
// anybody can use it.
func (a *applier) adopt(ctx context.Context, act *Action) error {
	if a.mapReady != nil {
		return a.mapReady
	}
	a.phase(*act, SpanWait, "for the data key")
	rec := a.adoptedKey(act.Key)
	key, err := a.keys.get(rec)
	if err != nil {
		return err
	}
	v := &act.Volume
	v.KeyID, v.Mapping = rec.ID, "luks-"+v.UUID
	if err := a.open(ctx, *act, key, a.openOptions(*act)); err != nil {
		return err
	}
	a.phase(*act, SpanInspect, "filesystem")
	a.opened(*act, rec, key, act.Reason)
	if v.Filesystem, err = a.filesystemOf(ctx, *act); err == nil {
		err = act.settleSwap()
	}
	if err == nil {
		a.phase(*act, SpanRecords, "adopted")
		err = a.recordAdopted(rec, v)
	}
	if err == nil {
		a.audit(Event{Kind: EventVolumeAdopted, Volume: *v, Device: act.Device.Device, Key: rec, RequestID: key.RequestID(), Reason: act.Reason})
		act.told = true
	}
	if err != nil {
		return errors.Join(err, a.maps.Close(context.WithoutCancel(ctx), v.Mapping))
	}
	return a.use(ctx, *act, v.Mapping, given(key))
}

// filesystemOf finds out which filesystem an open volume has of which no record tells.
func (a *applier) filesystemOf(ctx context.Context, act Action) (string, error) {
	content, err := volumes.Filesystem(ctx, a.maps.Path(act.Volume.Mapping))
	if err != nil {
		return "", err
	}
	if !slices.Contains(contents, content.Type) {
		return "", &RefusedError{Refusal: RefusedContent, Device: act.Device.Path,
			Reason: fmt.Sprintf("volume %s opens, but holds no %v filesystem (%s)", act.Volume.UUID, contents, content.Detail)}
	}
	return content.Type, nil
}

// settleSwap corrects the mount point of an adopted volume by what is in it, which the plan could not know.
func (a *Action) settleSwap() error {
	v := &a.Volume
	switch {
	case v.Filesystem == swapType:
		v.MountPoint = volumes.SwapPoint
	case v.MountPoint == volumes.SwapPoint:
		return &RefusedError{Refusal: RefusedContent, Device: a.Device.Path,
			Reason: fmt.Sprintf("the configuration says that it is swap, but volume %s holds a filesystem, %s", v.UUID, v.Filesystem)}
	}
	return nil
}

// adoptedKey gives a token's wrapped key its record: one that this instance has
// already, or a new one that all volumes under the same wrapped key share.
func (a *applier) adoptedKey(rec keycache.KeyRecord) keycache.KeyRecord {
	for _, id := range sortedKeys(a.records.Keys) {
		k := a.records.Keys[id]
		if k.InstanceID == rec.InstanceID && k.KeyARN == rec.KeyARN && string(k.WrappedKey) == string(rec.WrappedKey) {
			return k
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	wrapped := rec.KeyARN + " " + string(rec.WrappedKey)
	if a.adopted[wrapped] == "" {
		a.adopted[wrapped] = uuid.NewString()
	}
	rec.Version, rec.ID = keycache.RecordVersion, a.adopted[wrapped]
	return rec
}

// recordAdopted writes the records of an adopted volume, key first.
func (a *applier) recordAdopted(rec keycache.KeyRecord, v *keycache.VolumeRecord) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.records.Keys[rec.ID]; !ok {
		rec.Region, rec.Created = regionOf(rec.KeyARN), a.now().UTC().Truncate(time.Second)
		if err := a.store.PutKey(rec); err != nil {
			return err
		}
		a.records.Keys[rec.ID] = rec
		a.reached(stepAdoptedKey)
	}
	if err := a.putVolume(v); err != nil {
		return err
	}
	a.reached(stepAdopted)
	return nil
}

// keyFor gives a volume to be formatted its data key: that of its record, proven
// by Decrypt, or a new one that is made, recorded and then proven by Decrypt.
func (a *applier) keyFor(ctx context.Context, act Action) (*keycache.Key, keycache.KeyRecord, error) {
	if id := act.Volume.KeyID; id != "" {
		rec := a.records.Keys[id]
		key, err := a.keys.get(rec)
		return key, rec, err
	}
	scope := ""
	if a.cfg.KeyScope == ScopeVolume {
		scope = act.Device.Path
	}
	a.mu.Lock()
	k := a.newKeys[scope]
	if k == nil {
		k = &newKey{}
		a.newKeys[scope] = k
	}
	a.mu.Unlock()
	k.once.Do(func() { k.key, k.rec, k.err = a.makeKey(ctx, a.store, a.keys) })
	return k.key, k.rec, k.err
}

// makeKey makes a data key. What it returns is the key that KMS gave back for the
// record that is durable on the boot volume: the one a reboot will have.
func (n *Node) makeKey(ctx context.Context, store *keycache.Store, keys *keyring) (*keycache.Key, keycache.KeyRecord, error) {
	checked := make(chan error, 1)
	go func() {
		_, err := n.cloud.CheckKey(ctx)
		checked <- err
	}()
	made, rec, err := n.cloud.Generate(ctx)
	if made != nil {
		defer made.Wipe()
	}
	// What DescribeKey says of the key tells more than why it gave no data key.
	if checkErr := <-checked; checkErr != nil {
		err = checkErr
	}
	if err != nil {
		return nil, rec, err
	}
	n.reached(stepKeyMade)
	end := n.spans.begin(SpanRecords, "the data key's", nil)
	if err := store.PutKey(rec); err != nil {
		return nil, rec, err
	}
	n.reached(stepKeyRecorded)
	end(nil)
	proven, err := keys.get(rec)
	if err != nil {
		return nil, rec, fmt.Errorf("cannot prove the new data key before it locks a disk: %w", err)
	}
	if !proven.Equal(made) {
		return nil, rec, fmt.Errorf("cannot use the new data key %s: %w", rec.ID, keycache.ErrOtherKey)
	}
	n.reached(stepKeyProven)
	return proven, rec, nil
}

func (a *applier) openOptions(act Action) luks.OpenOptions {
	off := a.cfg.Workqueues == "off"
	return luks.OpenOptions{
		Name: act.Volume.Mapping, NoReadWorkqueue: off, NoWriteWorkqueue: off || a.cfg.Workqueues == "auto" && !act.Device.Rotational,
		Unsealing: func() { a.phase(act, SpanUnseal, "key slot, MAC") },
		Unsealed:  func() { a.phase(act, SpanMap, "map it") },
	}
}

// use mounts an open volume once nothing holds it back; else it closes it.
func (a *applier) use(ctx context.Context, act Action, mapping string, open opening) error {
	if err := a.holdBack(ctx, act, open); err != nil {
		return errors.Join(err, a.maps.Close(context.WithoutCancel(ctx), mapping))
	}
	return a.mount(ctx, act, mapping)
}

func (a *applier) mount(ctx context.Context, act Action, mapping string) error {
	what, description := a.maps.Path(mapping), fmt.Sprintf("Encrypted volume %s (%s)", act.Volume.Identity, act.Volume.UUID)
	swap := act.Volume.MountPoint == volumes.SwapPoint
	a.phase(act, SpanMount, map[bool]string{false: "mount", true: "swapon"}[swap])
	m, err := a.mounter()
	if err != nil {
		return err
	}
	if swap {
		return m.StartSwap(ctx, what, description)
	}
	return m.StartMount(ctx, systemd.Mount{What: what, Where: act.Volume.MountPoint, Type: act.Volume.Filesystem, Description: description})
}

// regionOf is the region in a key ARN, arn:PARTITION:kms:REGION:ACCOUNT:key/ID.
func regionOf(arn string) string {
	parts := strings.SplitN(arn, ":", 5)
	if len(parts) < 5 {
		return ""
	}
	return parts[3]
}
