package luks

import (
	"context"
	"crypto/hmac"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"time"

	luksgo "github.com/anatol/luks.go"
)

// RecoveryTokenType is the type of the token that names the slot of a recovery key.
const RecoveryTokenType = "luks-kms-agent-recovery"

const (
	recoveryVersion = 1
	recoveryInfo    = "luks-kms-agent recovery token mac v1"
	// maxTried is how many slots are tried where no MAC holds: more cost only time.
	maxTried = 2

	recoveryKeyBytes  = 20
	recoveryTextBytes = 47
)

// Sentinels of recovery keys, for errors.Is.
var (
	ErrNoRecoveryKey    = errors.New("the volume has no recovery key")
	ErrWrongRecoveryKey = errors.New("it is not the recovery key of this volume")
)

// jsonRecoveryToken is a recovery token as it stands in the header. The package comment specifies it.
type jsonRecoveryToken struct {
	Type     string   `json:"type"`
	Keyslots []string `json:"keyslots"`
	Version  int      `json:"version"`
	Created  string   `json:"created"`
	MAC      string   `json:"mac"`
}

// parseRecoveryToken parses a recovery token; what is wrong with it is its Problem.
func parseRecoveryToken(id int, raw json.RawMessage) RecoveryToken {
	r, err := readRecoveryToken(raw)
	r.ID = id
	if err != nil {
		r.Problem = printable([]byte(cut(err.Error(), maxReason)))
	}
	return r
}

func readRecoveryToken(raw json.RawMessage) (RecoveryToken, error) {
	r := RecoveryToken{Keyslot: -1}
	var t jsonRecoveryToken
	if err := walkOwn(raw); err != nil {
		return r, err
	}
	if err := decodeStrict(raw, &t); err != nil {
		return r, fmt.Errorf("it does not have the shape of a %s token: %w", RecoveryTokenType, err)
	}
	if r.Version = t.Version; t.Version != recoveryVersion {
		return r, fmt.Errorf("its version is %d, known is %d", t.Version, recoveryVersion)
	}
	if len(t.Keyslots) > 1 {
		return r, fmt.Errorf("it lists %d keyslots instead of one", len(t.Keyslots))
	}
	if len(t.Keyslots) == 1 {
		slot, ok := number(t.Keyslots[0])
		if !ok || slot >= maxKeyslots {
			return r, fmt.Errorf("its keyslot %q is not an id", cut(t.Keyslots[0], maxQuoted))
		}
		r.Keyslot = int(slot)
	}
	created, err := time.Parse(time.RFC3339, t.Created)
	if err != nil || created.UTC().Format(time.RFC3339) != t.Created {
		return r, errors.New("the time of its creation is not one of RFC 3339 in UTC")
	}
	r.Created = created.UTC()
	mac, ok := base64Bytes(t.MAC)
	if !ok || len(mac) != macBytes {
		return r, fmt.Errorf("its MAC is not %d bytes long", macBytes)
	}
	r.MAC = mac
	return r, nil
}

// encode makes the JSON that readRecoveryToken reads.
func (r RecoveryToken) encode() ([]byte, error) {
	return json.Marshal(jsonRecoveryToken{
		Type:     RecoveryTokenType,
		Keyslots: []string{strconv.Itoa(r.Keyslot)},
		Version:  r.Version,
		Created:  r.Created.Format(time.RFC3339),
		MAC:      base64.StdEncoding.EncodeToString(r.MAC),
	})
}

// checkRecoveryKey is checkKey for a recovery key.
func checkRecoveryKey(r Key) error {
	if len(r.Bytes()) != recoveryKeyBytes || len(r.Passphrase()) != recoveryTextBytes {
		return fmt.Errorf("the recovery key is not %d bytes with a text of %d", recoveryKeyBytes, recoveryTextBytes)
	}
	return nil
}

// VerifyRecovery is [Inspection.Verify] by a recovery key: one of the recovery tokens has to have a MAC that holds under r, and its slot has
// to open. Neither the data key nor our own token's slot is needed. It reads the area of that slot.
//
// [ErrNoRecoveryKey], [ErrWrongRecoveryKey]; *[HeaderError] as for Verify.
func (i *Inspection) VerifyRecovery(r Key) error {
	v, err := i.unsealRecovery(r)
	if err != nil {
		return fmt.Errorf("cannot verify %s by recovery key: %w", i.Path, err)
	}
	wipe(v)
	return nil
}

// OpenRecovery is [Inspection.Open] by a recovery key. Errors are those of VerifyRecovery, and Open's of mapping.
func (i *Inspection) OpenRecovery(ctx context.Context, r Key, o OpenOptions) error {
	if err := i.openRecovery(ctx, r, o, kernelMapper()); err != nil {
		return fmt.Errorf("cannot open %s as %s by recovery key: %w", i.Path, o.Name, err)
	}
	return nil
}

func (i *Inspection) openRecovery(ctx context.Context, r Key, o OpenOptions, dm mapper) error {
	return i.openBy(ctx, func() (*luksgo.Volume, error) { return i.unsealRecovery(r) }, o, dm)
}

// unsealRecovery is unseal by a recovery key.
func (i *Inspection) unsealRecovery(r Key) (*luksgo.Volume, error) {
	if err := i.refusal(); err != nil {
		return nil, err
	}
	if err := checkRecoveryKey(r); err != nil {
		return nil, err
	}
	c, tokens := i.checked, i.Header.Recovery
	switch {
	case len(c.recovery) == 0 && len(tokens) > 0:
		return nil, &HeaderError{i.Path, []string{fmt.Sprintf("token %d: %s", tokens[0].ID, tokens[0].Problem)}}
	case len(tokens) == 0:
		return nil, ErrNoRecoveryKey
	}
	mac, err := c.macFor(recoveryInfo, r, recoveryVersion)
	if err != nil {
		return nil, err
	}
	// The one that the key is for, as its MAC tells; replacements that were cut leave several. Where no MAC holds, a key that opens a
	// slot all the same tells a tampered header from a wrong key.
	places := c.recovery[:min(len(c.recovery), maxTried)]
	if n := slices.IndexFunc(c.recovery, func(p place) bool { return hmac.Equal(mac, p.mac) }); n >= 0 {
		places = c.recovery[n : n+1]
	}
	for _, p := range places {
		v, err := i.unsealRecoverySlot(p, r, mac)
		if !errors.Is(err, ErrWrongKey) {
			return v, err
		}
	}
	return nil, ErrWrongRecoveryKey
}

func (i *Inspection) unsealRecoverySlot(p place, r Key, mac []byte) (*luksgo.Volume, error) {
	f, device, size, err := openPath(i.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if device != i.device || size != i.Size {
		return nil, &HeaderError{i.Path, []string{"it is not the device that was inspected"}}
	}
	area, err := copyArea(f, p.areaOffset)
	if err != nil {
		return nil, err
	}
	defer area.Close()
	return i.unsealSlot(p, area, r, mac, nil)
}

// AddRecoverySlot gives a volume that the data key k opens one more key slot, which the recovery key r opens, and proves that it does
// and that the header says the same as before in everything else. No token names the slot yet: that is [AddRecoveryToken]'s, once
// somebody has the key. The volume may be open. Where it fails after the slot is written, the slot stays, as a cut would leave it.
//
// Errors as for [ReplaceToken].
func AddRecoverySlot(ctx context.Context, path string, k, r Key) (slot int, err error) {
	if slot, err = addRecoverySlot(ctx, path, k, r); err != nil {
		return 0, fmt.Errorf("cannot add a recovery key to %s: %w", path, err)
	}
	return slot, nil
}

func addRecoverySlot(ctx context.Context, path string, k, r Key) (int, error) {
	if err := checkRecoveryKey(r); err != nil {
		return 0, err
	}
	before, err := inspectToWrite(path, k)
	if err != nil {
		return 0, err
	}
	slot, err := before.FreeKeySlot()
	if err != nil {
		return 0, err
	}
	if err := before.unchanged(); err != nil {
		return 0, err
	}
	if err := luksAddKey(ctx, path, slot, k, r.Passphrase()); err != nil {
		return 0, err
	}
	if err := testPassphrase(ctx, path, slot, r.Passphrase()); err != nil {
		return 0, fmt.Errorf("cannot prove the new key slot %d: %w", slot, err)
	}
	after, err := inspectWhole(path, k)
	if err != nil {
		return 0, err
	}
	want := slices.DeleteFunc(slices.Clone(after.Header.Keyslots), func(s Keyslot) bool { return s.ID == slot })
	if !slices.EqualFunc(want, before.Header.Keyslots, sameButTokens) || !reflect.DeepEqual(after.Header.Recovery, before.Header.Recovery) || !sameButRecovery(before, after) {
		return 0, &HeaderError{path, []string{reasonOther}}
	}
	return slot, flush(path)
}

// AddRecoveryToken writes the token that names a slot of AddRecoverySlot's, and proves that the recovery key now opens the volume as
// [Inspection.OpenRecovery] will.
func AddRecoveryToken(ctx context.Context, path string, slot int, k, r Key, created time.Time) error {
	if err := addRecoveryToken(ctx, path, slot, k, r, created); err != nil {
		return fmt.Errorf("cannot write the recovery token of %s: %w", path, err)
	}
	return nil
}

func addRecoveryToken(ctx context.Context, path string, slot int, k, r Key, created time.Time) error {
	if err := checkRecoveryKey(r); err != nil {
		return err
	}
	before, err := inspectToWrite(path, k)
	if err != nil {
		return err
	}
	if !slices.Contains(before.Header.Unnamed, slot) {
		return &HeaderError{path, []string{fmt.Sprintf("key slot %d is not there, or another token's", slot)}}
	}
	token := RecoveryToken{Keyslot: slot, Created: created.UTC().Truncate(time.Second), Version: recoveryVersion}
	if token.ID, err = freeToken(before); err != nil {
		return err
	}
	if token.MAC, err = before.checked.macFor(recoveryInfo, r, token.Version); err != nil {
		return err
	}
	text, err := token.encode()
	if err != nil {
		return err
	}
	if err := before.unchanged(); err != nil {
		return err
	}
	if err := importToken(ctx, path, token.ID, text); err != nil {
		return err
	}
	after, err := inspectWhole(path, k)
	if err != nil {
		return err
	}
	want := slices.Concat(before.Header.Recovery, []RecoveryToken{token})
	slices.SortFunc(want, func(a, b RecoveryToken) int { return a.ID - b.ID })
	if !reflect.DeepEqual(after.Header.Recovery, want) || !slices.EqualFunc(after.Header.Keyslots, before.Header.Keyslots, sameButTokens) || !sameButRecovery(before, after) {
		return &HeaderError{path, []string{reasonOther}}
	}
	v, err := after.unsealRecovery(r)
	if err != nil {
		return err
	}
	wipe(v)
	return flush(path)
}

// RemoveUnnamedSlot removes a slot that no token names: one of AddRecoverySlot's that is not wanted after all.
func RemoveUnnamedSlot(ctx context.Context, path string, slot int, k Key) error {
	err := removeSlot(ctx, path, k, sameBut, func(i *Inspection) (int, error) {
		if !slices.Contains(i.Header.Unnamed, slot) {
			return 0, &HeaderError{path, []string{fmt.Sprintf("key slot %d is not there, or another token's", slot)}}
		}
		return slot, nil
	})
	if err != nil {
		return fmt.Errorf("cannot remove key slot %d of %s: %w", slot, path, err)
	}
	return nil
}

// RemoveRecoverySlot removes the slot that the recovery token of an id names, after the data key k has opened the volume: from then on the
// recovery key opens it no more. The token stays, and names no slot, until [RemoveRecoveryToken]: a cut in between leaves something
// that can be found. Nothing is done where the slot is gone already.
func RemoveRecoverySlot(ctx context.Context, path string, id int, k Key) error {
	err := removeSlot(ctx, path, k, sameButItsToken, func(i *Inspection) (int, error) {
		token, err := i.recoveryToken(id)
		return token.Keyslot, err
	})
	if err != nil {
		return fmt.Errorf("cannot remove the recovery key of %s: %w", path, err)
	}
	return nil
}

// sameButItsToken compares a header with what it was before the slot of a recovery token was removed: cryptsetup takes it out of the token,
// too.
func sameButItsToken(slot int, before, after *Inspection) bool {
	want := slices.DeleteFunc(slices.Clone(before.Header.Keyslots), func(s Keyslot) bool { return s.ID == slot })
	return slices.EqualFunc(after.Header.Keyslots, want, sameButTokens) && sameButRecovery(before, after)
}

// RemoveRecoveryToken removes a recovery token whose slot is gone.
func RemoveRecoveryToken(ctx context.Context, path string, id int, k Key) error {
	if err := removeRecoveryToken(ctx, path, id, k); err != nil {
		return fmt.Errorf("cannot remove the recovery token of %s: %w", path, err)
	}
	return nil
}

func removeRecoveryToken(ctx context.Context, path string, id int, k Key) error {
	before, err := inspectToWrite(path, k)
	if err != nil {
		return err
	}
	switch token, err := before.recoveryToken(id); {
	case err != nil:
		return err
	case token.Keyslot >= 0:
		return &HeaderError{path, []string{fmt.Sprintf("token %d: its key slot %d is still there", id, token.Keyslot)}}
	}
	if err := before.unchanged(); err != nil {
		return err
	}
	if err := removeToken(ctx, path, id); err != nil {
		return err
	}
	after, err := inspectWhole(path, k)
	if err != nil {
		return err
	}
	want := slices.DeleteFunc(slices.Clone(before.Header.Recovery), func(t RecoveryToken) bool { return t.ID == id })
	if len(after.Header.Recovery) != len(want) || !slices.EqualFunc(after.Header.Keyslots, before.Header.Keyslots, sameButTokens) || !sameButRecovery(before, after) {
		return &HeaderError{path, []string{reasonOther}}
	}
	return flush(path)
}

// recoveryToken finds a recovery token that may be removed by its id: not one that does not say which slot it names, nor one whose slot is
// not a recovery key's.
func (i *Inspection) recoveryToken(id int) (RecoveryToken, error) {
	for _, t := range i.Header.Recovery {
		switch malformed := t.MAC == nil; {
		case t.ID == id && t.Problem != "" && (malformed || t.Keyslot >= 0):
			return t, &HeaderError{i.Path, []string{fmt.Sprintf("token %d: %s", id, t.Problem)}}
		case t.ID == id:
			return t, nil
		}
	}
	return RecoveryToken{}, ErrNoRecoveryKey
}

// sameButRecovery tells whether two headers say the same in everything but key slots and recovery tokens.
func sameButRecovery(a, b *Inspection) bool {
	bare := func(i *Inspection) *Inspection {
		out := *i
		header, checked := *i.Header, *i.checked
		header.SeqID, header.Keyslots, header.Recovery, header.Unnamed = 0, nil, nil, nil
		header.Tokens = slices.DeleteFunc(slices.Clone(header.Tokens), func(kind string) bool { return kind == RecoveryTokenType })
		checked.digest.Keyslots, checked.recovery, checked.tokenIDs = nil, nil, nil
		out.Header, out.checked = &header, &checked
		return &out
	}
	return equalHeaders(bare(a), bare(b))
}

// freeToken returns the lowest id that no token has.
func freeToken(i *Inspection) (int, error) {
	for id := range maxTokens {
		if !slices.Contains(i.checked.tokenIDs, strconv.Itoa(id)) {
			return id, nil
		}
	}
	return 0, errors.New("there is no room for a token")
}
