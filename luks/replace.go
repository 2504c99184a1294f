package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	if err := replaceToken(ctx, path, keyARN, wrapped, k); err != nil {
		return fmt.Errorf("cannot replace the token of %s: %w", path, err)
	}
	return nil
}

func replaceToken(ctx context.Context, path, keyARN string, wrapped []byte, k Key) error {
	if err := errors.Join(checkARN(keyARN), checkWrapped(wrapped)); err != nil {
		return fmt.Errorf("the token would be refused: %w", err)
	}
	before, err := inspectPath(path)
	if err != nil {
		return err
	}
	if err := before.verify(k); err != nil {
		return err
	}
	if before.PrimaryDamaged || before.SecondaryDamaged {
		return &HeaderError{path, []string{reasonOneCopy}}
	}
	token := *before.Header.Token
	if token.KeyARN == keyARN && bytes.Equal(token.WrappedKey, wrapped) {
		return nil
	}
	token.KeyARN, token.WrappedKey = keyARN, wrapped
	text, err := token.encode()
	if err != nil {
		return err
	}
	if err := checkReplacesTokens(ctx); err != nil {
		return err
	}
	if err := before.unchanged(); err != nil {
		return err
	}
	if err := importOverToken(ctx, path, token.ID, text); err != nil {
		return err
	}

	after, err := inspectPath(path)
	if err != nil {
		return err
	}
	if err := after.verify(k); err != nil {
		return err
	}
	want := *before
	header, checked := *before.Header, *before.checked
	header.Token, header.SeqID, checked.token = &token, after.Header.SeqID, &token
	want.Header, want.checked = &header, &checked
	if after.PrimaryDamaged || after.SecondaryDamaged || !equalHeaders(&want, after) {
		return &HeaderError{path, []string{reasonOther}}
	}
	return flush(path)
}
