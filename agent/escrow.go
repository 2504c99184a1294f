package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
)

// ErrNoEscrow says that the configuration has no place for copies of headers.
var ErrNoEscrow = errors.New("cannot use the escrow: the configuration has none")

// escrowTimeout is how long S3 is asked about one copy, with all that is tried again.
const escrowTimeout = 2 * time.Minute

// startTimeout is how long systemd may take to queue a start.
const startTimeout = 5 * time.Second

// headsAtOnce is how many objects S3 is asked about at a time.
const headsAtOnce = 16

// escrowsAtOnce bounds the memory: each has a header in it, three times in mode cse-kms.
const escrowsAtOnce = 4

// vault is where the copies go; *archive.Client is one.
type vault interface {
	Put(ctx context.Context, name string, data []byte, metadata map[string]string) (archive.Object, error)
	Get(ctx context.Context, name string) ([]byte, archive.Object, error)
	Head(ctx context.Context, name string) (archive.Object, error)
	List(ctx context.Context, prefix string) ([]archive.Object, error)
	// CheckBucket tells why a prefix cannot be listed: there is no such bucket, or the role may not.
	CheckBucket(ctx context.Context, prefix string) error
	// Check tells why an object is not encrypted as it has to be.
	Check(archive.Object) error
	URL(name string) string
}

// What the metadata of an escrow tells, so that one can be found whose disk has no header any more.
const (
	metaClass    = "class"
	metaIdentity = "identity"
	metaInstance = "instance-id"
)

// Escrowed is what Escrow did with one volume.
type Escrowed struct {
	Volume keycache.VolumeRecord
	Device string // path, "" where the volume is not attached
	URL    string // of the object
	Time   time.Time
	// Sent says that this call sent it; else it was confirmed already.
	Sent bool
	Err  error
}

// openVault returns the vault of the configuration.
func (n *Node) openVault(ctx context.Context) (vault, error) {
	if n.cfg.Escrow.Bucket == "" {
		return nil, ErrNoEscrow
	}
	return n.vault(ctx, n.cfg.Escrow.options())
}

// escrowChanges has what changed sent at once, where the timer is on: it comes every few minutes only. Nobody waits for it.
func (n *Node) escrowChanges() {
	if n.cfg.Escrow.Bucket == "" || !n.changed.Swap(false) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := n.sendEscrow(ctx); err != nil && !errors.Is(err, systemd.ErrNoSystemd) {
		n.log.Warn("what changed is escrowed when the timer comes", zap.Error(err))
	}
}

// pending is an escrow that is to be put.
type pending struct {
	Escrowed
	note   keycache.EscrowNote
	backup keycache.Backup
}

// Escrow sends the header of each volume, with the records that open it, to the escrow, unless what is there already is confirmed
// to be the same. A volume is named as for [Node.Lock] and may be open; none means all. What is sent opens under the data key that
// KMS gives for the record, and counts when S3 has told its properties. The volumes are not written to.
//
// A failure of one volume never stops the others.
func (n *Node) Escrow(ctx context.Context, names []string) ([]Escrowed, error) {
	v, err := n.openVault(ctx)
	if err != nil {
		return nil, err
	}
	copies, err := n.sendPending(ctx, v, names, escrowsAtOnce)
	if err != nil {
		return nil, err
	}
	n.tellMetrics(ctx, n.lastRun(), false)
	done := make([]Escrowed, len(copies))
	for i, p := range copies {
		done[i] = p.Escrowed
		if p.note.Object != "" {
			done[i].URL, done[i].Time = v.URL(p.note.Object), p.note.Time
		}
	}
	return done, ctx.Err()
}

// sendPending sends what is not safe yet, so many at a time.
func (n *Node) sendPending(ctx context.Context, v vault, names []string, atOnce int) ([]pending, error) {
	copies, err := n.pendingEscrows(ctx, names)
	if err != nil {
		return nil, err
	}
	// The records are not locked while S3 is asked: a disk that is attached meanwhile must not wait for it.
	eachOf(copies, atOnce, func(p *pending) {
		if p.Sent {
			n.step("Sending the header of %s to %s", p.Volume.Identity, v.URL(p.note.Object))
			p.Err = send(ctx, v, p.note.Object, p.backup)
		}
	})
	return copies, n.confirmEscrows(ctx, copies)
}

// eachOf does something with each, several at a time.
func eachOf[T any](all []T, atOnce int, do func(*T)) {
	room := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i := range all {
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			do(&all[i])
		})
	}
	wg.Wait()
}

// pendingEscrows finds out, with the records locked, which volumes are not safe yet, and notes what is going to be sent.
func (n *Node) pendingEscrows(ctx context.Context, names []string) ([]pending, error) {
	w, targets, end, err := n.beginOn(ctx, names)
	if err != nil {
		return nil, err
	}
	defer end()
	var copies []pending
	for _, t := range targets {
		p := pending{Escrowed: Escrowed{Volume: t.Volume, Device: t.Device.Path}}
		p.Err = w.preparePending(t, &p)
		copies = append(copies, p)
	}
	for _, problem := range w.facts.Records.Problems {
		copies = append(copies, pending{Escrowed: Escrowed{Err: &problem}})
	}
	return copies, nil
}

func (w *work) preparePending(t target, p *pending) error {
	if t.Device.Path == "" {
		// Its header cannot change while it is away, and its records were in the last copy or are on this disk.
		if last, err := w.store.Escrow(t.Volume.UUID); err == nil && !last.Confirmed.IsZero() && last.Bucket == w.cfg.Escrow.Bucket {
			p.note = last
			return nil
		}
	}
	rec, bytes, header, err := w.readHeader(t)
	if err != nil {
		return err
	}
	note, backup, err := w.escrowOf(w.store, rec, t.Volume, bytes, header)
	if err != nil {
		return err
	}
	p.note = note
	if !note.Confirmed.IsZero() {
		return nil
	}
	key, err := w.keys.get(rec)
	if err != nil {
		return err
	}
	if err := header.Verify(key); err != nil {
		return err
	}
	if err := w.store.PutEscrow(note); err != nil {
		return err
	}
	w.reached(stepEscrowNoted)
	p.backup, p.Sent = backup, true
	return nil
}

// escrowOf returns what has to be in the escrow for a volume, and the note of it: the one that is there, where it is of the same, or a new one.
func (n *Node) escrowOf(store *keycache.Store, rec keycache.KeyRecord, v keycache.VolumeRecord, bytes []byte, header *luks.Inspection) (keycache.EscrowNote, keycache.Backup, error) {
	content, err := json.Marshal([]any{rec, v, keycache.Sum(bytes), n.program.Version})
	if err != nil {
		return keycache.EscrowNote{}, keycache.Backup{}, err
	}
	e := n.cfg.Escrow
	at := n.now().UTC().Truncate(time.Second)
	note := keycache.EscrowNote{UUID: v.UUID, Time: at, Bucket: e.Bucket, Mode: e.Mode, KeyARN: e.KMSKey, Digest: keycache.Sum(content), SeqID: header.Header.SeqID}
	// Two of one second differ in what is in them, or in how they are encrypted.
	name := keycache.Sum([]byte(note.Digest + note.Mode + note.KeyARN))
	note.Object = fmt.Sprintf("%s%s/%s-%s.header.tar", e.Prefix, v.UUID, at.Format("20060102T150405Z"), name[:8])
	if known, err := store.Escrow(v.UUID); err == nil && known.Same(note) && strings.HasPrefix(known.Object, e.Prefix+v.UUID+"/") {
		note = known
	}
	return note, keycache.NewBackup(rec, v, bytes, note.Time, n.program.Version), nil
}

// send puts one escrow. Its bytes are the same each time, so that one whose answer was lost is found to be there.
func send(ctx context.Context, v vault, name string, b keycache.Backup) error {
	data, err := b.Encode()
	if err != nil {
		return err
	}
	_, err = v.Put(ctx, name, data, map[string]string{metaClass: b.Manifest.Class, metaIdentity: b.Manifest.Identity, metaInstance: b.Volume.InstanceID})
	return err
}

// confirmEscrows notes what S3 has confirmed, unless something else was noted meanwhile.
func (n *Node) confirmEscrows(ctx context.Context, copies []pending) error {
	if !slices.ContainsFunc(copies, func(p pending) bool { return p.Sent }) {
		return nil
	}
	store, release, err := n.lockRecords(ctx)
	if err != nil {
		return err
	}
	defer release()
	for i := range copies {
		p := &copies[i]
		if !p.Sent {
			continue
		}
		if p.Err == nil {
			p.Err = n.confirm(store, p.note)
		}
		n.tellEscrow(*p)
	}
	return nil
}

// confirm notes that an escrow is where it has to be.
func (n *Node) confirm(store *keycache.Store, note keycache.EscrowNote) error {
	if now, err := store.Escrow(note.UUID); err != nil || !now.Same(note) {
		return err // the volume changed meanwhile: what was sent is one of its past
	}
	note.Confirmed = n.now().UTC().Truncate(time.Second)
	err := store.PutEscrow(note)
	if err == nil {
		n.reached(stepEscrowConfirmed)
	}
	return err
}

// tellEscrow puts it into the audit log and the log. What S3 did not take is tried every few minutes, and no event; what it took in the clear is one.
func (n *Node) tellEscrow(p pending) {
	if e := (*archive.Error)(nil); p.Err != nil && !(errors.As(p.Err, &e) && e.Reason == archive.ReasonEncryption) {
		return
	}
	n.audit(Event{Kind: EventHeaderEscrowed, Volume: p.Volume, Key: p.backup.Key, Reason: "s3://" + p.note.Bucket + "/" + p.note.Object, Err: p.Err})
	if p.Err == nil {
		n.log.Info("header escrowed", zap.String("volume", p.Volume.UUID), zap.String("object", p.note.Object))
	}
}

// opening gives the data key of a volume.
type opening func() (*keycache.Key, error)

// holdBack has a volume wait until its escrow is confirmed, where the configuration wants that. open gives its data key.
func (a *applier) holdBack(ctx context.Context, act Action, open opening) error {
	if !a.cfg.Escrow.Required {
		return nil
	}
	err := a.escrowFirst(ctx, act, open)
	if err != nil {
		return &EscrowRequiredError{UUID: act.Volume.UUID, Err: err}
	}
	return nil
}

// EscrowRequiredError is a volume that is not mounted because its escrow is not confirmed.
type EscrowRequiredError struct {
	UUID string
	Err  error
}

func (e *EscrowRequiredError) Error() string {
	return fmt.Sprintf("cannot use volume %s before its escrow is confirmed: %v", e.UUID, e.Err)
}

// Unwrap returns the cause.
func (e *EscrowRequiredError) Unwrap() error { return e.Err }

func (a *applier) escrowFirst(ctx context.Context, act Action, open opening) error {
	a.phase(act, SpanRecords, "escrow")
	// As they are on the disk: what this run has written is there only.
	records, err := a.store.Load()
	if err != nil {
		return err
	}
	volume := records.Volumes[act.Volume.UUID]
	if volume.Rotation != nil {
		// The header is between two data keys. What was confirmed before opens by the old one, until rotate is done.
		if last, err := a.store.Escrow(volume.UUID); err == nil && !last.Confirmed.IsZero() && last.Bucket == a.cfg.Escrow.Bucket {
			return nil
		}
		return ErrRotating
	}
	rec := records.Keys[volume.KeyID]
	bytes, header, err := luks.ReadHeader(act.Device.Path)
	if err != nil {
		return err
	}
	note, backup, err := a.escrowOf(a.store, rec, volume, bytes, header)
	if err != nil || !note.Confirmed.IsZero() {
		return err // what is confirmed needs no key, and neither KMS nor S3
	}
	key, err := open()
	if err != nil {
		return err
	}
	if err := header.Verify(key); err != nil {
		return err
	}
	v, err := a.openVault(ctx)
	if err != nil {
		return err
	}
	if err := a.store.PutEscrow(note); err != nil {
		return err
	}
	a.reached(stepEscrowNoted)
	a.tell(fmt.Sprintf("Sending the header of %s to %s", act.Volume.Identity, v.URL(note.Object)))
	systemd.ExtendTimeout(escrowTimeout + time.Minute)
	p := pending{Escrowed: Escrowed{Volume: volume, Sent: true}, note: note, backup: backup}
	if p.Err = send(ctx, v, note.Object, backup); p.Err == nil {
		p.Err = a.confirm(a.store, note)
	}
	a.tellEscrow(p)
	return p.Err
}

// EscrowObject is an escrow in the bucket.
type EscrowObject struct {
	archive.Object
	URL      string
	UUID     string // of the volume
	Class    string
	Identity string
	Instance string // that sent it
	// Err is why it is none that counts: it is not encrypted as it has to be, or S3 does not tell.
	Err error
}

// EscrowObjects lists what the escrow has of the volumes of these LUKS UUIDs, none meaning all, the newest of each volume first.
func (n *Node) EscrowObjects(ctx context.Context, uuids []string) ([]EscrowObject, error) {
	v, err := n.openVault(ctx)
	if err != nil {
		return nil, err
	}
	prefixes := []string{n.cfg.Escrow.Prefix}
	if len(uuids) > 0 {
		prefixes = nil
		for _, uuid := range uuids {
			prefixes = append(prefixes, n.cfg.Escrow.Prefix+uuid+"/")
		}
	}
	var found []EscrowObject
	for _, prefix := range prefixes {
		objects, err := v.List(ctx, prefix)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			if e, ok := n.escrowObject(v, o); ok {
				found = append(found, e)
			}
		}
	}
	eachOf(found, headsAtOnce, func(o *EscrowObject) { o.look(ctx, v) })
	slices.SortStableFunc(found, func(a, b EscrowObject) int {
		return cmp.Or(strings.Compare(a.UUID, b.UUID), strings.Compare(b.Name, a.Name))
	})
	return found, nil
}

// look asks S3 about an object.
func (o *EscrowObject) look(ctx context.Context, v vault) {
	o.Object, o.Err = properties(ctx, v, o.Object)
	o.Class, o.Identity, o.Instance = o.Metadata[metaClass], o.Metadata[metaIdentity], o.Metadata[metaInstance]
}

// properties asks S3 about an object that was listed, and tells why it does not count: it is not encrypted as it has to be, or S3 does not tell.
func properties(ctx context.Context, v vault, listed archive.Object) (archive.Object, error) {
	o, err := v.Head(ctx, listed.Name)
	if err != nil {
		return listed, err
	}
	return o, v.Check(o)
}

// escrowObject names an object of the escrow; ok is false for something else that lies there.
func (n *Node) escrowObject(v vault, o archive.Object) (e EscrowObject, ok bool) {
	rest, below := strings.CutPrefix(o.Name, n.cfg.Escrow.Prefix)
	uuid, file, ok := strings.Cut(rest, "/")
	if !below || !ok || !strings.HasSuffix(file, ".header.tar") || strings.Contains(file, "/") {
		return e, false
	}
	return EscrowObject{Object: o, URL: v.URL(o.Name), UUID: uuid}, true
}

// GetEscrow returns an escrow, whole, decrypted, and with all that a backup has to have. Whether its header opens its volume, only
// [Node.RestoreHeader] and [Node.VerifyEscrow] tell.
func (n *Node) GetEscrow(ctx context.Context, name string) (*keycache.Backup, error) {
	v, err := n.openVault(ctx)
	if err != nil {
		return nil, err
	}
	data, _, err := v.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	return keycache.DecodeBackup(v.URL(name), data)
}

// FetchEscrow writes an escrow to a new file, for [Node.RestoreHeader]. A file of that name with the same in it is left as it is.
func (n *Node) FetchEscrow(ctx context.Context, name, path string) error {
	b, err := n.GetEscrow(ctx, name)
	if err != nil {
		return err
	}
	err = b.Write(path)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	there, rerr := keycache.ReadBackup(path)
	if rerr != nil || there.Manifest != b.Manifest {
		return err
	}
	return nil
}

// VerifiedEscrow is what VerifyEscrow found of one volume.
type VerifiedEscrow struct {
	Volume keycache.VolumeRecord
	URL    string
	Time   time.Time
	// Current says that the escrow has the very header and records that the volume has now.
	Current bool
	Err     error
}

// VerifyEscrow reads the escrow of each volume back, and has the header in it open under the data key that KMS gives for the key record in it.
func (n *Node) VerifyEscrow(ctx context.Context, names []string) (verified []VerifiedEscrow, err error) {
	v, err := n.openVault(ctx)
	if err != nil {
		return nil, err
	}
	w, targets, end, err := n.beginOn(ctx, names)
	if err != nil {
		return nil, err
	}
	defer end()
	for _, t := range targets {
		n.step("Verifying the escrow of %s", t.Volume.Identity)
		f := VerifiedEscrow{Volume: t.Volume}
		f.Err = w.verifyEscrow(ctx, v, t, &f)
		verified = append(verified, f)
	}
	return verified, ctx.Err()
}

func (w *work) verifyEscrow(ctx context.Context, v vault, t target, f *VerifiedEscrow) error {
	note, err := w.store.Escrow(t.Volume.UUID)
	if err != nil {
		return fmt.Errorf("cannot verify the escrow of volume %s: nothing was sent yet: %w", t.Volume.UUID, err)
	}
	f.URL, f.Time = v.URL(note.Object), note.Time
	b, err := w.GetEscrow(ctx, note.Object)
	if err != nil {
		return err
	}
	there, err := luks.InspectHeader(f.URL, b.Header, b.Manifest.Size)
	if err != nil {
		return err
	}
	key, err := w.keys.get(b.Key)
	if err != nil {
		return err
	}
	if err := there.Verify(key); err != nil {
		return err
	}
	rec, bytes, header, err := w.readHeader(t)
	if err != nil {
		return nil // the volume is away or damaged: this is what the escrow is for
	}
	now, _, err := w.escrowOf(w.store, rec, t.Volume, bytes, header)
	f.Current = err == nil && now.Same(note)
	return err
}

// EscrowFor finds the newest escrow of each disk that a name means, by the LUKS UUID that the disk shows or, where it shows none, by its
// identity. A disk is named by device, link, serial or EBS volume id; no name means all that the records know nothing of. A name may also be
// the URL of an object. Objects that are not encrypted as they have to be are passed over.
func (n *Node) EscrowFor(ctx context.Context, names []string) (chosen []EscrowObject, err error) {
	v, err := n.openVault(ctx)
	if err != nil {
		return nil, err
	}
	ofDisks := slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		object, isURL := strings.CutPrefix(name, v.URL(""))
		if e, ok := n.escrowObject(v, archive.Object{Name: object}); isURL && ok {
			e.look(ctx, v)
			chosen = append(chosen, e)
			return true
		}
		return false
	})
	for _, o := range chosen {
		if o.Err != nil {
			return nil, o.Err
		}
	}
	if len(ofDisks) == 0 && len(names) > 0 {
		return chosen, nil
	}
	disks, err := n.disksToRestore(ctx, ofDisks)
	if err != nil {
		return nil, err
	}
	var uuids []string // none means that all objects have to be looked at
	for _, d := range disks {
		if d.Header == nil || d.Header.Header == nil {
			uuids = nil
			break
		}
		uuids = append(uuids, d.Header.Header.UUID)
	}
	if len(disks) == 0 {
		return chosen, nil
	}
	all, err := n.EscrowObjects(ctx, uuids)
	if err != nil {
		return nil, err
	}
	var inTheClear *archive.Error
	for _, o := range all {
		// One that S3 does not tell of may be the one that is wanted.
		if o.Err != nil && !(errors.As(o.Err, &inTheClear) && inTheClear.Reason == archive.ReasonEncryption) {
			return nil, o.Err
		}
	}
	for _, d := range disks {
		// The newest of a volume comes first.
		i := slices.IndexFunc(all, func(o EscrowObject) bool {
			if d.Header != nil && d.Header.Header != nil {
				return o.Err == nil && o.UUID == d.Header.Header.UUID
			}
			return o.Err == nil && d.Identity != "" && o.Class == string(d.Class) && o.Identity == d.Identity
		})
		switch {
		case i >= 0:
			chosen = append(chosen, all[i])
		case len(ofDisks) > 0:
			return nil, &RefusedError{Refusal: RefusedBackup, Device: d.Path, Reason: "the escrow has nothing of it"}
		}
	}
	return chosen, nil
}

// disksToRestore are the disks that the names mean, none meaning all that the records know nothing of.
func (n *Node) disksToRestore(ctx context.Context, names []string) (disks []DeviceFacts, err error) {
	w, end, err := n.beginWork(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	met := map[string]bool{}
	for _, d := range w.facts.Devices {
		named := false
		for _, name := range names {
			if d.Is(name) {
				met[name], named = true, true
			}
		}
		if named || len(names) == 0 && !w.knows(d) {
			disks = append(disks, d)
		}
	}
	for _, name := range names {
		if !met[name] {
			return nil, &UnknownVolumeError{Name: name}
		}
	}
	return disks, nil
}

// knows reports whether a ready volume of this instance is recorded on a disk, and shows there.
func (w *work) knows(d DeviceFacts) bool {
	for _, v := range w.facts.Records.Volumes {
		_, open := ourMapping(d.Device, v)
		shows := d.Header != nil && d.Header.Pass() && d.Header.Header.UUID == v.UUID
		if v.State == keycache.StateReady && v.InstanceID == w.facts.InstanceID && (open || shows) {
			return true
		}
	}
	return false
}
