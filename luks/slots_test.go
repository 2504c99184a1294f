package luks

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
)

// slotIDs are the numbers of a header's key slots.
func slotIDs(i *Inspection) []int {
	var ids []int
	for _, k := range i.Header.Keyslots {
		ids = append(ids, k.ID)
	}
	return ids
}

// TestKeySlots goes the way of a rotation: add, move, remove. What others have in the header stays.
func TestKeySlots(t *testing.T) {
	t.Parallel()
	path := volume(t)
	mustRun(t, []byte(`{"type":"clevis","keyslots":[],"jwe":{"Protected":null}}`), "cryptsetup", "token", "import", "--json-file=-", path)
	if err := AddKeySlot(t.Context(), path, 1, rightKey(), keyOf(7)); err != nil { // somebody's
		t.Fatal(err)
	}
	data := content(t, path)[DataOffset:]
	next := keyOf(9)
	slot, err := inspected(t, path).FreeKeySlot()
	if err != nil || slot != 2 {
		t.Errorf("free: %d %v", slot, err)
	}
	if err := AddKeySlot(t.Context(), path, slot, rightKey(), next); err != nil {
		t.Fatal(err)
	}
	i := inspected(t, path)
	if !i.Pass() || !slices.Equal(slotIDs(i), []int{0, 1, 2}) || i.Header.Token.Keyslot != 0 || i.Verify(rightKey()) != nil {
		t.Errorf("%+v", i.Header)
	}
	if err := OpensKeySlot(t.Context(), path, slot, rightKey()); !errors.Is(err, ErrWrongKey) {
		t.Errorf("the old key opens the new slot: %v", err)
	}
	if err := MoveToken(t.Context(), path, otherARN, []byte("the next"), slot, rightKey(), next); err != nil {
		t.Fatal(err)
	}
	i = inspected(t, path)
	if token := i.Header.Token; token.Keyslot != 2 || token.KeyARN != otherARN || string(token.WrappedKey) != "the next" || i.Verify(next) != nil {
		t.Errorf("%+v %v", token, i.Verify(next))
	}
	if !errors.Is(i.Verify(rightKey()), ErrWrongKey) {
		t.Errorf("the old key: %v", i.Verify(rightKey()))
	}
	if err := RemoveKeySlot(t.Context(), path, 0, next); err != nil {
		t.Fatal(err)
	}
	i = inspected(t, path)
	if !i.Pass() || !slices.Equal(slotIDs(i), []int{1, 2}) || i.Verify(next) != nil || len(i.Header.Tokens) != 2 || i.SecondaryDamaged {
		t.Errorf("%+v", i.Header)
	}
	if err := errors.Join(RemoveKeySlot(t.Context(), path, 0, next), OpensKeySlot(t.Context(), path, 1, keyOf(7))); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(content(t, path)[DataOffset:], data) {
		t.Error("the data area was written")
	}
}

// Nothing is written where the key, the header or the slot is not what it has to be.
func TestKeySlotsRefuse(t *testing.T) {
	t.Parallel()
	add := func(t *testing.T, path string, k testKey) error { return AddKeySlot(t.Context(), path, 2, k, keyOf(9)) }
	for name, c := range map[string]struct {
		do    func(t *testing.T, path string) error
		spoil func(t *testing.T, path string)
		want  string
	}{
		"add: another key": {do: func(t *testing.T, path string) error { return add(t, path, keyOf(3)) }, want: "does not open"},
		"add: damaged copy": {spoil: func(t *testing.T, path string) { flip(t, path, 5000) },
			do: func(t *testing.T, path string) error { return add(t, path, rightKey()) }, want: "the primary header copy is damaged"},
		"add: taken":    {do: func(t *testing.T, path string) error { return AddKeySlot(t.Context(), path, 1, rightKey(), keyOf(9)) }, want: "taken"},
		"add: too high": {do: func(t *testing.T, path string) error { return AddKeySlot(t.Context(), path, 32, rightKey(), keyOf(9)) }, want: "taken"},
		"move: not opened": {do: func(t *testing.T, path string) error {
			return MoveToken(t.Context(), path, otherARN, []byte("x"), 1, rightKey(), keyOf(9))
		}, want: "does not open"},
		"move: no slot": {do: func(t *testing.T, path string) error {
			return MoveToken(t.Context(), path, otherARN, []byte("x"), 5, rightKey(), keyOf(9))
		}, want: "cannot run cryptsetup open"},
		"move: another key": {do: func(t *testing.T, path string) error {
			return MoveToken(t.Context(), path, otherARN, []byte("x"), 1, keyOf(3), keyOf(7))
		}, want: "does not open"},
		"remove: the token's": {do: func(t *testing.T, path string) error { return RemoveKeySlot(t.Context(), path, 0, rightKey()) }, want: ErrOwnSlot.Error()},
		"remove: another key": {do: func(t *testing.T, path string) error { return RemoveKeySlot(t.Context(), path, 1, keyOf(7)) }, want: "does not open"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := volume(t)
			if err := AddKeySlot(t.Context(), path, 1, rightKey(), keyOf(7)); err != nil {
				t.Fatal(err)
			}
			if c.spoil != nil {
				c.spoil(t, path)
			}
			before := content(t, path)
			if err := c.do(t, path); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
			if !bytes.Equal(content(t, path), before) {
				t.Error("something was written")
			}
		})
	}
}

// What cryptsetup did is not believed.
func TestKeySlotsCheckTheResult(t *testing.T) {
	run := func(action, script string) string {
		return `case "$*" in *` + action + `*) ` + script + ` ;; *) exec "$REAL" "$@" ;; esac`
	}
	for name, c := range map[string]struct {
		script string
		do     func(path string) error
	}{
		"no slot is added": {run("luksAddKey", "cat >/dev/null"), func(path string) error { return AddKeySlot(t.Context(), path, 2, rightKey(), keyOf(9)) }},
		"one copy is torn": {run("luksAddKey", `"$REAL" "$@"; for p; do case $p in /proc/*) ;; /*) dd if=/dev/zero of="$p" bs=4096 seek=4 count=1 conv=notrunc status=none ;; esac; done`),
			func(path string) error { return AddKeySlot(t.Context(), path, 2, rightKey(), keyOf(9)) }},
		"no slot is removed": {run("luksKillSlot", "cat >/dev/null"), func(path string) error { return RemoveKeySlot(t.Context(), path, 1, rightKey()) }},
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			if err := AddKeySlot(t.Context(), path, 1, rightKey(), keyOf(7)); err != nil {
				t.Fatal(err)
			}
			stub(t, c.script)
			var header *HeaderError
			if err := c.do(path); !errors.As(err, &header) {
				t.Errorf("%v", err)
			}
		})
	}
}
