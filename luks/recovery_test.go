package luks

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// recoveryKey is a recovery key without the care that real ones get; its text is not one that is checked.
type recoveryKey byte

func (k recoveryKey) Bytes() []byte { return bytes.Repeat([]byte{byte(k)}, recoveryKeyBytes) }
func (k recoveryKey) Passphrase() []byte {
	return bytes.Repeat([]byte{'A' + byte(k)}, recoveryTextBytes)
}

var created = time.Date(2026, 1, 31, 8, 15, 30, 0, time.UTC)

// addRecovery adds a recovery key to a volume and returns its slot.
func addRecovery(t testing.TB, path string, r Key) int {
	t.Helper()
	slot, err := AddRecoverySlot(t.Context(), path, rightKey(), r)
	if err != nil {
		t.Fatal(err)
	}
	if err := AddRecoveryToken(t.Context(), path, slot, rightKey(), r, created); err != nil {
		t.Fatal(err)
	}
	return slot
}

func TestRecoveryKey(t *testing.T) {
	t.Parallel()
	path := volume(t)
	// Others' slots and tokens are not ours to touch.
	mustRun(t, []byte(`{"type":"clevis","keyslots":[],"jwe":{"Protected":null}}`), "cryptsetup", "token", "import", "--json-file=-", path)
	before := inspected(t, path)
	if err := before.VerifyRecovery(recoveryKey(1)); !errors.Is(err, ErrNoRecoveryKey) {
		t.Errorf("without a recovery key: %v", err)
	}
	data := content(t, path)[DataOffset:]

	if slot := addRecovery(t, path, recoveryKey(1)); slot != 1 {
		t.Errorf("the slot is %d", slot)
	}
	i := inspected(t, path)
	want := RecoveryToken{ID: 2, Keyslot: 1, Created: created, Version: 1}
	if got := i.Header.Recovery; len(got) != 1 || got[0].ID != want.ID || got[0].Keyslot != want.Keyslot || !got[0].Created.Equal(created) || got[0].Problem != "" {
		t.Fatalf("%+v", got)
	}
	if k := i.Header.Keyslots[1]; k.KDF != "pbkdf2" || k.Hash != "sha256" || k.Iterations != minIterations {
		t.Errorf("%+v", k)
	}
	if err := i.Verify(rightKey()); err != nil {
		t.Error(err)
	}
	if err := i.VerifyRecovery(recoveryKey(1)); err != nil {
		t.Error(err)
	}
	for name, wrong := range map[string]Key{"another": recoveryKey(2), "the data key": rightKey()} {
		if err := i.VerifyRecovery(wrong); err == nil || name == "another" && !errors.Is(err, ErrWrongRecoveryKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := i.Verify(recoveryKey(1)); err == nil {
		t.Error("it is taken for the data key")
	}
	var mapped *volumeType
	dm := fakeMapper(t)
	create := dm.create
	dm.create = func(v *volumeType, name string) error { mapped = v; return create(v, name) }
	if err := i.openRecovery(t.Context(), recoveryKey(1), OpenOptions{Name: "luks-" + testUUID}, dm); err != nil || mapped == nil || mapped.StorageOffset != DataOffset {
		t.Errorf("%v %+v", err, mapped)
	}
	// The text is all that cryptsetup needs.
	mustRun(t, recoveryKey(1).Passphrase(), "cryptsetup", "open", "--test-passphrase", "--batch-mode", "--key-file=-", path)

	// A second one, as while the first is being replaced: both open. Then the first goes.
	addRecovery(t, path, recoveryKey(2))
	for _, r := range []Key{recoveryKey(1), recoveryKey(2)} {
		if err := inspected(t, path).VerifyRecovery(r); err != nil {
			t.Error(err)
		}
	}
	if err := RemoveRecoveryToken(t.Context(), path, 2, rightKey()); err == nil {
		t.Error("a token went before its slot")
	}
	if err := RemoveRecoverySlot(t.Context(), path, 2, rightKey()); err != nil {
		t.Fatal(err)
	}
	// A cut here leaves a token without a slot; neither the data key nor the other recovery key minds.
	i = inspected(t, path)
	if r := i.Header.Recovery; len(r) != 2 || r[0].Keyslot != -1 || !strings.Contains(r[0].Problem, "removal") || r[1].Problem != "" || !i.Pass() {
		t.Errorf("%+v, %q", r, i.Reasons)
	}
	if err := errors.Join(i.Verify(rightKey()), i.VerifyRecovery(recoveryKey(2))); err != nil {
		t.Error(err)
	}
	if err := i.VerifyRecovery(recoveryKey(1)); !errors.Is(err, ErrWrongRecoveryKey) {
		t.Errorf("the removed key: %v", err)
	}
	if err := RemoveRecoverySlot(t.Context(), path, 2, rightKey()); err != nil {
		t.Errorf("again: %v", err)
	}
	for _, id := range []int{2, 3} {
		if err := errors.Join(RemoveRecoverySlot(t.Context(), path, id, rightKey()), RemoveRecoveryToken(t.Context(), path, id, rightKey())); err != nil {
			t.Error(err)
		}
	}
	i = inspected(t, path)
	before.Header.SeqID = i.Header.SeqID
	if !equalHeaders(before, i) || len(i.Header.Recovery) != 0 {
		t.Errorf("%+v, was %+v", i.Header, before.Header)
	}
	if !bytes.Equal(content(t, path)[DataOffset:], data) {
		t.Error("the data was written to")
	}
}

// What a cut leaves after each write is found, opens by what it should, and adding or removing can be repeated.
func TestRecoverySlotWithoutToken(t *testing.T) {
	t.Parallel()
	path := volume(t)
	slot, err := AddRecoverySlot(t.Context(), path, rightKey(), recoveryKey(1))
	if err != nil {
		t.Fatal(err)
	}
	i := inspected(t, path)
	if !slices.Equal(i.Header.Unnamed, []int{slot}) || i.Verify(rightKey()) != nil {
		t.Errorf("%+v", i.Header)
	}
	if err := i.VerifyRecovery(recoveryKey(1)); !errors.Is(err, ErrNoRecoveryKey) {
		t.Errorf("without token: %v", err)
	}
	if again := addRecovery(t, path, recoveryKey(2)); again != 2 {
		t.Errorf("again, slot %d", again)
	}
	for _, s := range []int{0, 2, 5} {
		if err := RemoveUnnamedSlot(t.Context(), path, s, rightKey()); err == nil {
			t.Errorf("slot %d was removed", s)
		}
	}
	if err := RemoveUnnamedSlot(t.Context(), path, slot, rightKey()); err != nil {
		t.Error(err)
	}
	if i := inspected(t, path); len(i.Header.Unnamed) != 0 || i.VerifyRecovery(recoveryKey(2)) != nil {
		t.Errorf("%+v", i.Header)
	}
}

// Each header copy is the old one, the new one, or torn, as a cut leaves them in each of the writes: the data key always opens.
func TestRecoveryIsCut(t *testing.T) {
	t.Parallel()
	path := volume(t)
	states := [][]byte{content(t, path)}
	done := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, content(t, path))
	}
	_, err := AddRecoverySlot(t.Context(), path, rightKey(), recoveryKey(1))
	done(err)
	done(AddRecoveryToken(t.Context(), path, 1, rightKey(), recoveryKey(1), created))
	done(RemoveRecoverySlot(t.Context(), path, 1, rightKey()))
	done(RemoveRecoveryToken(t.Context(), path, 1, rightKey()))
	const size = 0x4000
	for n := 1; n < len(states); n++ {
		old, new := states[n-1], states[n]
		for _, at := range []int{0, 512, 4096, 8192, size, size + 512, size + 4096, 2 * size} {
			// The slot's area is written before the headers, and wiped before them.
			state := append(bytes.Clone(new[:at]), old[at:2*size]...)
			state = append(state, new[2*size:]...)
			write(t, path, 0, state)
			i := inspected(t, path)
			if err := i.Verify(rightKey()); err != nil {
				t.Errorf("write %d, cut at %d: %v", n, at, err)
			}
			err := i.VerifyRecovery(recoveryKey(1))
			var header *HeaderError
			if opens := len(i.Header.Recovery) == 1 && i.Header.Recovery[0].Keyslot == 1 && n == 2; opens != (err == nil) {
				t.Errorf("write %d, cut at %d: %+v opens: %v", n, at, i.Header.Recovery, err)
			} else if err != nil && !errors.Is(err, ErrNoRecoveryKey) && !errors.As(err, &header) {
				t.Errorf("write %d, cut at %d: %v", n, at, err)
			}
			// It can be done again; where the primary is torn, after a run has restored it.
			if i.PrimaryDamaged {
				state := content(t, path)
				if _, err := AddRecoverySlot(t.Context(), path, rightKey(), recoveryKey(9)); err == nil || !bytes.Equal(content(t, path), state) {
					t.Errorf("write %d, cut at %d: written to a header of which the primary is torn", n, at)
				}
				continue
			}
			slot, err := AddRecoverySlot(t.Context(), path, rightKey(), recoveryKey(9))
			if err == nil {
				err = AddRecoveryToken(t.Context(), path, slot, rightKey(), recoveryKey(9), created)
			}
			if err == nil {
				err = inspected(t, path).VerifyRecovery(recoveryKey(9))
			}
			if err != nil {
				t.Errorf("write %d, cut at %d, again: %v", n, at, err)
			}
		}
	}
}

// The attacks that the data key withstands, the recovery key withstands alone. Those on slot 0 only are no matter of its own.
func TestRecoveryAttacks(t *testing.T) {
	t.Parallel()
	path := volume(t)
	addRecovery(t, path, recoveryKey(1))
	head := read(t, path, 0, headBytes)
	attack := func(name string, do func(path string) error, want string) {
		t.Run(name, func(t *testing.T) {
			path := blank(t, imageSize)
			write(t, path, 0, head)
			if err := do(path); err != nil {
				t.Fatal(err)
			}
			dm := fakeMapper(t)
			dm.create = func(*volumeType, string) error { t.Error("it was mapped"); return nil }
			err := inspected(t, path).openRecovery(t.Context(), recoveryKey(1), OpenOptions{Name: "x"}, dm)
			if r := reasons(t, err); !strings.Contains(r, want) {
				t.Errorf("%s, want %s", r, want)
			}
		})
	}
	edited := func(change func(tree)) func(string) error {
		return func(path string) error { return lukstest.Edit(path, change) }
	}
	for _, a := range lukstest.Attacks() {
		want := a.Reason
		if want == "" {
			want = "MAC does not hold"
		}
		attack(a.Name, a.Do, want)
	}
	slot := func(m tree) tree { return m.At("keyslots", "1") }
	token := func(m tree) tree { return m.At("tokens", "1") }
	for name, c := range map[string]struct {
		change func(tree)
		want   string
	}{
		"endless slot of its own":   {func(m tree) { slot(m).At("kdf")["iterations"] = maxOwnIterations + 1 }, "1000001 iterations"},
		"slot of argon2":            {func(m tree) { lukstest.Argon2(slot(m), 4, 65536, 4) }, `kdf "argon2id"`},
		"slot of another hash":      {func(m tree) { slot(m).At("kdf")["hash"] = "sha512" }, `hashes "sha512"`},
		"splitter of another hash":  {func(m tree) { slot(m).At("af")["hash"] = "sha512" }, `and "sha512"`},
		"slot of no digest":         {func(m tree) { m.At("digests", "0")["keyslots"] = []any{"0"} }, "does not list keyslot 1"},
		"the data key's slot":       {func(m tree) { token(m)["keyslots"] = []any{"0"} }, "another token's too"},
		"two slots":                 {func(m tree) { token(m)["keyslots"] = []any{"0", "1"} }, "2 keyslots instead of one"},
		"another MAC":               {func(m tree) { token(m)["mac"] = strings.Repeat("A", 43) + "=" }, "MAC does not hold"},
		"the MAC of the data key's": {func(m tree) { token(m)["mac"] = m.At("tokens", "0")["mac"] }, "MAC does not hold"},
		"a short MAC":               {func(m tree) { token(m)["mac"] = "" }, "its MAC is not 32 bytes long"},
		"another version":           {func(m tree) { token(m)["version"] = 2 }, "its version is 2"},
		"one more field":            {func(m tree) { token(m)["more"] = 1 }, "does not have the shape"},
		"no time":                   {func(m tree) { token(m)["created"] = "today" }, "RFC 3339"},
		"a folded key":              {func(m tree) { token(m)["MAC"] = token(m)["mac"] }, "not acceptable"},
		"another salt": {func(m tree) {
			slot(m).At("kdf")["salt"] = base64.StdEncoding.EncodeToString(make([]byte, 32))
		}, "does not open keyslot 1"},
	} {
		attack(name, edited(c.change), c.want)
	}
	attack("copies that differ", func(path string) error {
		rewrite(t, path, primaryAt, func(b []byte) { b[offLabel] = 'x' })
		return nil
	}, "the two header copies differ")
	attack("another area", func(path string) error { flip(t, path, KeyslotsOffset+areaBytes+8192); return nil }, "does not open keyslot 1")

	// The slot and token of another volume, which the same key opens, and its data.
	other := blank(t, imageSize)
	o := testOptions()
	o.UUID = "0a1b2c3d-0000-4000-8000-000000000002"
	if err := Format(t.Context(), other, o, rightKey()); err != nil {
		t.Fatal(err)
	}
	addRecovery(t, other, recoveryKey(1))
	attack("the volume key of another volume of the same recovery key", func(path string) error {
		var theirs tree
		if err := json.Unmarshal(trimNUL(read(t, other, binarySize, 0x4000-binarySize)), &theirs); err != nil {
			return err
		}
		write(t, path, KeyslotsOffset, read(t, other, KeyslotsOffset, headBytes-KeyslotsOffset))
		return lukstest.Edit(path, func(m tree) {
			m["keyslots"], m["digests"], m["tokens"] = theirs["keyslots"], theirs["digests"], theirs["tokens"]
		})
	}, "MAC does not hold")
}

// A hostile recovery token does not keep the data key from opening the volume, and removing it never costs another's slot.
func TestRemoveRecoveryRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(tree)
		key    Key
		want   string
	}{
		"the data key's slot": {func(m tree) { m.At("tokens", "1")["keyslots"] = []any{"0"} }, rightKey(), "another token's too"},
		"a person's slot":     {func(m tree) { m.At("tokens", "1")["keyslots"] = []any{"2"} }, rightKey(), `kdf "argon2id"`},
		"malformed":           {func(m tree) { m.At("tokens", "1")["version"] = 7 }, rightKey(), "version is 7"},
		"tampered":            {func(m tree) { m.At("segments", "0")["sector_size"] = 512 }, rightKey(), "MAC does not hold"},
		"another key":         {func(tree) {}, keyOf(1), ErrWrongKey.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			addRecovery(t, path, recoveryKey(1))
			mustRun(t, append([]byte(string(rightKey().Passphrase())+"\n"), "person\n"...), "cryptsetup", "luksAddKey", "--batch-mode", "--key-slot", "2",
				"--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "64", "--pbkdf-parallel", "1", path)
			edit(t, path, c.change)
			before := content(t, path)
			if c.key == rightKey() && name != "tampered" {
				if err := inspected(t, path).Verify(rightKey()); err != nil {
					t.Errorf("it does not open: %v", err)
				}
			}
			if err := RemoveRecoverySlot(t.Context(), path, 1, c.key); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %s", err, c.want)
			}
			if !bytes.Equal(content(t, path), before) {
				t.Error("something was written")
			}
		})
	}
}

// A cryptsetup that does not do what it was asked for is found out, and the data key's slot is not offered to one that removes.
func TestRecoveryChecksTheResult(t *testing.T) {
	add := func(path string) error {
		_, err := AddRecoverySlot(t.Context(), path, rightKey(), recoveryKey(1))
		return err
	}
	token := func(path string) error {
		return AddRecoveryToken(t.Context(), path, 1, rightKey(), recoveryKey(1), created)
	}
	for name, c := range map[string]struct {
		script  string
		prepare func(path string) error
		do      func(path string) error
		want    string
	}{
		"no slot":         {`if [ "$1" = luksAddKey ]; then exit 0; fi; exec "$REAL" "$@"`, nil, add, "cannot prove the new key slot 1"},
		"two slots":       {`"$REAL" "$@" || exit; if [ "$1" = open ]; then for p; do :; done; echo other | "$REAL" luksAddKey --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --unbound --key-size 512 "$p" -; fi`, nil, add, reasonOther},
		"no token":        {`if [ "$1" = token ]; then exit 0; fi; exec "$REAL" "$@"`, add, token, reasonOther},
		"another token":   {`if [ "$1" = token ]; then sed 's/"mac":"...../"mac":"AAAAA/' | "$REAL" "$@"; else exec "$REAL" "$@"; fi`, add, token, reasonOther},
		"slot not gone":   {`if [ "$1" = luksKillSlot ]; then exit 0; fi; exec "$REAL" "$@"`, func(path string) error { return errors.Join(add(path), token(path)) }, func(path string) error { return RemoveRecoverySlot(t.Context(), path, 1, rightKey()) }, reasonOther},
		"one header copy": {`"$REAL" "$@" || exit; if [ "$1" = token ]; then for p; do :; done; dd if=/dev/zero of="$p" bs=4096 seek=4 count=1 conv=notrunc status=none; fi`, add, token, "a header copy is damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			if c.prepare != nil {
				if err := c.prepare(path); err != nil {
					t.Fatal(err)
				}
			}
			stub(t, c.script)
			if err := c.do(path); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
}

// The MAC as the package comment specifies it, computed once by another program.
func TestRecoveryMACIsAsSpecified(t *testing.T) {
	c := &checked{
		uuid: testUUID,
		segment: jsonSegment{Type: "crypt", Offset: "16777216", Size: "dynamic", IVTweak: "0",
			Encryption: "aes-xts-plain64", SectorSize: 4096},
		digestID: "0",
		digest: jsonDigest{Type: "pbkdf2", Keyslots: []string{"0", "1"}, Segments: []string{"0"}, Hash: "sha256", Iterations: 1000,
			Digest: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", Salt: "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="},
	}
	mac, err := c.macFor(recoveryInfo, recoveryKey(7), recoveryVersion)
	if err != nil || hex.EncodeToString(mac) != "c3feb92f2887a73237b2de4e08bcb85585ca4674935179c03f98f929f7ed6986" {
		t.Errorf("%x %v", mac, err)
	}
}

// FuzzRecoveryToken: whatever stands there, the parser answers, says nothing unprintable, and takes only what it would write.
func FuzzRecoveryToken(f *testing.F) {
	good, err := RecoveryToken{Keyslot: 1, Created: created, Version: 1, MAC: make([]byte, macBytes)}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`["1"]`), []byte(`[]`), 1))
	f.Add(bytes.Replace(good, []byte(`"version":1`), []byte(`"version":null`), 1))
	f.Add([]byte(`{"type":"luks-kms-agent-recovery"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r := parseRecoveryToken(3, raw)
		if r.Problem != "" {
			if printable([]byte(r.Problem)) != r.Problem || len(r.Problem) > 4*maxReason {
				t.Errorf("%q", r.Problem)
			}
			return
		}
		if r.Keyslot < -1 || r.Keyslot >= maxKeyslots || len(r.MAC) != macBytes || r.Version != recoveryVersion {
			t.Fatalf("%+v", r)
		}
		if r.Keyslot < 0 {
			return
		}
		text, err := r.encode()
		again := parseRecoveryToken(3, text)
		if err != nil || fmt.Sprint(again) != fmt.Sprint(r) {
			t.Errorf("%+v became %+v (%v)", r, again, err)
		}
	})
}
