package luks

import (
	"context"
	"errors"
	"fmt"
	"reflect"
)

// RestorePrimary writes the primary header copy of a volume of ours again, from a secondary that passes every check, and proves that
// the header says the same afterwards. cryptsetup does the writing. It touches nothing else, and nothing at all where
// the primary is sound: that is no error.
//
// *[HeaderError]: the header does not pass, is not ours, or is not the same afterwards. Callers that have the key should call
// [Inspection.Verify] first: it authenticates the secondary.
func RestorePrimary(ctx context.Context, path string) error {
	if err := restorePrimary(ctx, path); err != nil {
		return fmt.Errorf("cannot restore the primary header of %s: %w", path, err)
	}
	return nil
}

func restorePrimary(ctx context.Context, path string) error {
	before, err := inspectPath(path)
	if err != nil {
		return err
	}
	if err := before.refusal(); err != nil {
		return err
	}
	if !before.PrimaryDamaged {
		return nil
	}
	if err := repair(ctx, path); err != nil {
		return err
	}
	after, err := inspectPath(path)
	if err != nil {
		return err
	}
	if err := after.refusal(); err != nil {
		return err
	}
	if err := sameHeader(before, after); err != nil {
		return &HeaderError{path, []string{err.Error()}}
	}
	return flush(path)
}

// sameHeader says why a header is not what it was before its primary copy was restored.
func sameHeader(before, after *Inspection) error {
	if after.PrimaryDamaged || after.SecondaryDamaged {
		return errors.New("a header copy still is damaged")
	}
	if !equalHeaders(before, after) {
		return errors.New("the header is another one than before the restore")
	}
	return nil
}

// equalHeaders compares the facts and everything that opening depends on.
func equalHeaders(a, b *Inspection) bool {
	if !reflect.DeepEqual(a.Header, b.Header) || !reflect.DeepEqual(a.checked, b.checked) || (a.area == nil) != (b.area == nil) {
		return false
	}
	if a.area == nil {
		return true
	}
	same, err := sameArea(a.area, b.area, a.checked.areaOffset)
	return err == nil && same
}
