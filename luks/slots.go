package luks

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Sentinels of key slots, for errors.Is.
var (
	// ErrOwnSlot refuses to remove the key slot that the token names.
	ErrOwnSlot = errors.New("it is the key slot of the token")
	// ErrNoKeySlot: all numbers of key slots are taken.
	ErrNoKeySlot = errors.New("no key slot is free")
)

// HasKeySlot reports whether the header has a key slot.
func (i *Inspection) HasKeySlot(slot int) bool {
	return i.Header != nil && slices.ContainsFunc(i.Header.Keyslots, func(k Keyslot) bool { return k.ID == slot })
}

// FreeKeySlot returns the lowest number that no key slot has, or [ErrNoKeySlot]. Whether the key slots' area has room for it only
// cryptsetup finds out.
func (i *Inspection) FreeKeySlot() (int, error) {
	for slot := range maxKeyslots {
		if !i.HasKeySlot(slot) {
			return slot, nil
		}
	}
	return 0, ErrNoKeySlot
}

// OpensKeySlot reports whether a data key opens one key slot, by [ErrWrongKey] if not.
func OpensKeySlot(ctx context.Context, path string, slot int, k Key) error {
	err := checkKey(k)
	if err == nil {
		err = testPassphrase(ctx, path, slot, k.Passphrase())
	}
	if err != nil {
		return fmt.Errorf("cannot open key slot %d of %s: %w", slot, path, err)
	}
	return nil
}

// AddKeySlot gives a volume that k opens a key slot that next opens, and proves that it does and that the header says the same as
// before in everything else. The volume may be open. The token goes on naming the slot of k: see [MoveToken].
//
// A cut leaves the header with or without the slot, and a slot that is there is whole: cryptsetup writes its area first.
//
// Errors: *[HeaderError] (the header does not pass, has a damaged copy, or is not what it has to be afterwards), [ErrWrongKey],
// [ErrNoCryptsetup].
func AddKeySlot(ctx context.Context, path string, slot int, k, next Key) error {
	if err := addKeySlot(ctx, path, slot, k, next); err != nil {
		return fmt.Errorf("cannot add key slot %d to %s: %w", slot, path, err)
	}
	return nil
}

func addKeySlot(ctx context.Context, path string, slot int, k, next Key) error {
	before, err := inspectToWrite(path, k)
	if err != nil {
		return err
	}
	if err := checkKey(next); err != nil {
		return err
	}
	if slot < 0 || slot >= maxKeyslots || before.HasKeySlot(slot) {
		return errors.New("that key slot is taken, or there can be none of that number")
	}
	if err := before.unchanged(); err != nil {
		return err
	}
	if err := luksAddKey(ctx, path, slot, k, next.Passphrase()); err != nil {
		return err
	}
	after, err := inspectWhole(path, k)
	if err != nil {
		return err
	}
	if !after.HasKeySlot(slot) || !sameBut(slot, after, before) {
		return &HeaderError{path, []string{reasonOther}}
	}
	if err := testPassphrase(ctx, path, slot, next.Passphrase()); err != nil {
		return err
	}
	return flush(path)
}

// RemoveKeySlot removes a key slot that is not the token's from a volume that k opens, and proves that the header says the same as
// before in everything else. A slot that is not there is no error. The volume may be open.
//
// Errors: [ErrOwnSlot] and those of [AddKeySlot].
func RemoveKeySlot(ctx context.Context, path string, slot int, k Key) error {
	err := removeSlot(ctx, path, k, sameBut, func(i *Inspection) (int, error) {
		switch {
		case slot == i.Header.Token.Keyslot:
			return 0, ErrOwnSlot
		case !i.HasKeySlot(slot):
			return -1, nil
		}
		return slot, nil
	})
	if err != nil {
		return fmt.Errorf("cannot remove key slot %d of %s: %w", slot, path, err)
	}
	return nil
}

// removeSlot removes the slot that choose returns, -1 for none, from a volume that k opens, and proves that it is gone and that the header
// is the same as before in all that same compares.
func removeSlot(ctx context.Context, path string, k Key, same func(slot int, before, after *Inspection) bool, choose func(*Inspection) (int, error)) error {
	before, err := inspectToWrite(path, k)
	if err != nil {
		return err
	}
	slot, err := choose(before)
	if err != nil || slot < 0 {
		return err
	}
	// cryptsetup would remove the last slot without a word.
	if slot == before.Header.Token.Keyslot {
		return &HeaderError{path, []string{fmt.Sprintf("key slot %d is the data key's", slot)}}
	}
	if err := before.unchanged(); err != nil {
		return err
	}
	if err := luksKillSlot(ctx, path, slot, k); err != nil {
		return err
	}
	after, err := inspectWhole(path, k)
	if err != nil {
		return err
	}
	if after.HasKeySlot(slot) || !same(slot, before, after) {
		return &HeaderError{path, []string{reasonOther}}
	}
	return flush(path)
}

// sameBut compares a header that has a key slot with one that has not, in everything else.
func sameBut(slot int, with, without *Inspection) bool {
	want := *with
	header, checked := *with.Header, *with.checked
	header.SeqID = without.Header.SeqID
	header.Keyslots = slices.DeleteFunc(slices.Clone(header.Keyslots), func(k Keyslot) bool { return k.ID == slot })
	checked.digest.Keyslots = slices.DeleteFunc(slices.Clone(checked.digest.Keyslots), func(id string) bool { return id == fmt.Sprint(slot) })
	header.Unnamed = slices.DeleteFunc(slices.Clone(header.Unnamed), func(id int) bool { return id == slot })
	if len(header.Unnamed) == 0 {
		header.Unnamed = nil // as of a header that never had one
	}
	want.Header, want.checked = &header, &checked
	slices.Sort(want.checked.digest.Keyslots)
	rest := *without
	sorted := *without.checked
	sorted.digest.Keyslots = slices.Sorted(slices.Values(sorted.digest.Keyslots))
	rest.checked = &sorted
	return equalHeaders(&want, &rest)
}

// inspectToWrite inspects a volume that is to be written to, and wants the data key to open it and the primary header copy to be sound. A
// secondary that is damaged or older is what a cut leaves; cryptsetup writes it again before anything else.
func inspectToWrite(path string, k Key) (*Inspection, error) {
	i, err := inspectPath(path)
	if err != nil {
		return nil, err
	}
	if err := i.verify(k); err != nil {
		return nil, err
	}
	if i.PrimaryDamaged {
		return nil, &HeaderError{path, []string{"the primary header copy is damaged"}}
	}
	return i, nil
}

// inspectWhole is inspectToWrite of what was written: both header copies have to be sound.
func inspectWhole(path string, k Key) (*Inspection, error) {
	i, err := inspectToWrite(path, k)
	if err == nil && i.SecondaryDamaged {
		return nil, &HeaderError{path, []string{"a header copy is damaged"}}
	}
	return i, err
}
