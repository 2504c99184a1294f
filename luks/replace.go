package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
)

// ReplaceToken puts wrapped, the data key k as the KMS key keyARN wrapped it, into the token of a volume that k opens, and proves that
// the header says the same as before in everything else. Key slots and data are not touched, and the volume may be open. A token
// that says so already is not written again. That wrapped holds k only KMS can tell: it is for the caller to prove.
//
// A cut leaves the old token or the new one: cryptsetup writes one header copy after the other.
//
// Errors: *[HeaderError] (the header does not pass, has a damaged copy, or is not what it has to be afterwards), [ErrWrongKey],
// [ErrNoCryptsetup].
func ReplaceToken(ctx context.Context, path, keyARN string, wrapped []byte, k Key) error {
	err := replaceToken(ctx, path, k, k, func(t *Token) { t.KeyARN, t.WrappedKey = keyARN, wrapped })
	if err != nil {
		return fmt.Errorf("cannot replace the token of %s: %w", path, err)
	}
	return nil
}

// MoveToken makes the token of a volume that k opens name another data key, next, and the key slot that next opens, which it proves
// first. Everything else is as for [ReplaceToken].
func MoveToken(ctx context.Context, path, keyARN string, wrapped []byte, slot int, k, next Key) error {
	err := testPassphrase(ctx, path, slot, next.Passphrase())
	if err == nil {
		err = replaceToken(ctx, path, k, next, func(t *Token) { t.KeyARN, t.WrappedKey, t.Keyslot = keyARN, wrapped, slot })
	}
	if err != nil {
		return fmt.Errorf("cannot move the token of %s to key slot %d: %w", path, slot, err)
	}
	return nil
}

// replaceToken changes the token of a volume that k opens to one that next opens.
func replaceToken(ctx context.Context, path string, k, next Key, change func(*Token)) error {
	before, err := inspectToWrite(path, k)
	if err != nil {
		return err
	}
	was, token := before.Header.Token, *before.Header.Token
	change(&token)
	if err := errors.Join(checkARN(token.KeyARN), checkWrapped(token.WrappedKey), checkKey(next)); err != nil {
		return fmt.Errorf("the token would be refused: %w", err)
	}
	if token.KeyARN == was.KeyARN && bytes.Equal(token.WrappedKey, was.WrappedKey) && token.Keyslot == was.Keyslot {
		return nil
	}
	if token.MAC, err = before.checked.mac(next, token.Version); err != nil {
		return err
	}
	text, err := token.encode()
	if err != nil {
		return err
	}
	if err := CheckReplacesTokens(ctx); err != nil {
		return err
	}
	if err := before.unchanged(); err != nil {
		return err
	}
	if err := importOverToken(ctx, path, token.ID, text); err != nil {
		return err
	}

	after, err := inspectWhole(path, next)
	if err != nil {
		return err
	}
	want := *before
	header, checked := *before.Header, *before.checked
	header.Token, header.SeqID, checked.token = &token, after.Header.SeqID, &token
	if token.Keyslot != was.Keyslot {
		// Another slot is the token's now, and next opens it.
		checked.slot, checked.areaOffset, want.area = after.checked.slot, after.checked.areaOffset, after.area
		header.Unnamed = after.Header.Unnamed
		if slices.EqualFunc(header.Keyslots, after.Header.Keyslots, sameButTokens) {
			header.Keyslots = after.Header.Keyslots
		}
	}
	want.Header, want.checked = &header, &checked
	if !equalHeaders(&want, after) {
		return &HeaderError{path, []string{reasonOther}}
	}
	return flush(path)
}

// sameButTokens compares two key slots in all but which tokens list them.
func sameButTokens(a, b Keyslot) bool {
	a.Tokens, b.Tokens = nil, nil
	return reflect.DeepEqual(a, b)
}
