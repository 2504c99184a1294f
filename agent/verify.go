package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
)

// Result is how a check of Verify ended.
type Result string

// The results, from good to bad.
const (
	ResultOK      Result = "ok"
	ResultWarning Result = "warning"
	ResultFailed  Result = "failed"
)

// Finding is one check of one volume.
type Finding struct {
	Check  string `json:"check"` // device, record, mapping, header, copies, token, key, mac, backup
	Result Result `json:"result"`
	Detail string `json:"detail,omitempty"`
	// Err is why it failed.
	Err error `json:"-"`
}

// Verified is what Verify found of one volume, or of a record that cannot be read.
type Verified struct {
	UUID     string    `json:"uuid,omitempty"`
	Class    string    `json:"class,omitempty"`
	Identity string    `json:"identity,omitempty"`
	Device   string    `json:"device,omitempty"`
	Result   Result    `json:"result"` // the worst of the findings
	Findings []Finding `json:"findings"`
}

func (v *Verified) add(check string, r Result, err error, format string, args ...any) {
	f := Finding{Check: check, Result: r, Err: err, Detail: fmt.Sprintf(format, args...)}
	if err != nil {
		f.Detail = err.Error()
	}
	v.Findings = append(v.Findings, f)
	if r == ResultFailed || r == ResultWarning && v.Result == ResultOK {
		v.Result = r
	}
}

// check adds a finding that is good if err is nil.
func (v *Verified) check(name string, err error) bool {
	if err != nil {
		v.add(name, ResultFailed, err, "")
		return false
	}
	v.add(name, ResultOK, nil, "")
	return true
}

// Verify proves, without a mapping and without a write, that each ready volume would open: that its header passes with both copies sound, and that KMS's
// answer to its key record opens it, MAC included; and that record, token, disk and mapping agree. It also tells whether there is a header
// backup and whether that is current, which is a warning if not. Volumes may be open. Names are those of [Node.Lock].
func (n *Node) Verify(ctx context.Context, names []string) ([]Verified, error) {
	if err := n.checkStateDir(); err != nil {
		return nil, err
	}
	store, err := keycache.ViewStore(n.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	facts, err := n.observe(ctx, store, nil)
	if err != nil {
		return nil, err
	}
	targets, err := facts.targets(names)
	if err != nil {
		return nil, err
	}
	keys := newKeyring(ctx, n.cloud)
	defer n.wipeKeyring(keys)
	verified := []Verified{}
	for _, t := range targets {
		verified = append(verified, n.verify(store, facts, keys, t))
	}
	for _, p := range facts.Records.Problems {
		v := Verified{UUID: p.ID, Result: ResultOK}
		v.check("record", &p)
		verified = append(verified, v)
	}
	return verified, ctx.Err()
}

func (n *Node) verify(store *keycache.Store, facts Facts, keys *keyring, t target) Verified {
	rec := t.Volume
	v := Verified{UUID: rec.UUID, Class: rec.Class, Identity: rec.Identity, Device: t.Device.Path, Result: ResultOK}
	if t.Device.Path == "" {
		for _, d := range facts.Devices {
			if sameDisk(rec, d.Device) && d.Header != nil {
				v.Device = d.Path
				v.check("header", &luks.HeaderError{Path: d.Path, Reasons: []string{fmt.Sprintf("it is not there: the disk of volume %s shows %q", rec.UUID, d.Header.Kind)}})
				return v
			}
		}
	}
	if !v.check("device", t.err) {
		return v
	}
	disagree := func(format string, args ...any) error {
		return &RefusedError{Refusal: RefusedRecord, Device: t.Device.Path, Reason: fmt.Sprintf(format, args...)}
	}
	switch {
	case !sameDisk(rec, t.Device):
		v.check("record", disagree("the record of volume %s says %s %s, and it is on %s %s", rec.UUID, rec.Class, rec.Identity, t.Device.Class, t.Device.Identity))
	case rec.Size != t.Device.Size:
		v.add("record", ResultWarning, nil, "the disk has %d bytes, and had %d when it was recorded", t.Device.Size, rec.Size)
	default:
		v.check("record", nil)
	}
	switch {
	case t.Mapping.Name == "":
		v.add("mapping", ResultOK, nil, "locked")
	case t.Mapping.Name != rec.Mapping:
		v.check("mapping", disagree("volume %s is open as %s, and its record says %s", rec.UUID, t.Mapping.Name, rec.Mapping))
	default:
		v.add("mapping", ResultOK, nil, "open as %s", t.Mapping.Name)
	}

	header, err := n.inspectTarget(t)
	passes := v.check("header", err)
	if passes {
		v.check("copies", copiesProblem(header))
	}
	if rec.Rotation != nil {
		v.add("record", ResultWarning, nil, "%v: rotate goes on with that", ErrRotating)
		// The token names which of the two opens it.
		if next, ok := facts.Records.Keys[rec.Rotation.KeyID]; ok && passes && bytes.Equal(header.Header.Token.WrappedKey, next.WrappedKey) {
			rec.KeyID = next.ID
		}
	}
	keyRecord, err := facts.keyOf(rec)
	var key *keycache.Key
	if err == nil {
		key, err = keys.get(keyRecord)
	}
	haveKey := v.check("key", err)
	if passes && keyRecord.ID != "" {
		err := error(nil)
		if token := header.Header.Token; token.KeyARN != keyRecord.KeyARN || !bytes.Equal(token.WrappedKey, keyRecord.WrappedKey) {
			err = disagree("the token is under %s and is not what key record %s, under %s, says", token.KeyARN, keyRecord.ID, keyRecord.KeyARN)
		}
		v.check("token", err)
	}
	if passes && haveKey {
		v.check("mac", header.Verify(key))
	}
	v.backup(store)
	return v
}

// copiesProblem is why one copy of a header that passes is not whole.
func copiesProblem(i *luks.Inspection) error {
	switch {
	case i.PrimaryDamaged:
		return &luks.HeaderError{Path: i.Path, Reasons: []string{"the primary copy is damaged"}}
	case i.SecondaryDamaged:
		return &luks.HeaderError{Path: i.Path, Reasons: []string{"the secondary copy is damaged, or older than the primary"}}
	}
	return nil
}

func (v *Verified) backup(store *keycache.Store) {
	note, current, err := lastBackup(store, v.UUID, v.Device)
	var header *luks.HeaderError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		v.add("backup", ResultWarning, nil, "there is no header backup")
	case errors.As(err, &header):
		v.add("backup", ResultWarning, nil, "the last header backup is of %s (%s); the header of now cannot be compared", note.Time.Format(time.RFC3339), note.Path)
	case err != nil:
		v.check("backup", err)
	case !current:
		v.add("backup", ResultWarning, nil, "the header changed after the last backup, of %s (%s)", note.Time.Format(time.RFC3339), note.Path)
	default:
		v.add("backup", ResultOK, nil, "of %s (%s)", note.Time.Format(time.RFC3339), note.Path)
	}
}
