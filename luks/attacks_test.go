package luks

import (
	"bytes"
	"crypto/hmac"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// Each attack against the strict check alone and against the MAC alone. Attackers fix all checksums.
//
// Where the strict check stands alone, the MAC is disabled by making it hold: it is computed anew over what the attacker wrote.
// Where the MAC stands alone, the strict check is disabled by letting everything through that it would refuse. What only one of
// the two catches says why (lukstest.Blind).
func TestEachCheckAlone(t *testing.T) {
	t.Parallel()

	for _, a := range lukstest.Attacks() {
		t.Run(a.Name, func(t *testing.T) {
			t.Parallel()
			path := volume(t)
			if err := a.Do(path); err != nil {
				t.Fatal(err)
			}

			// The MAC alone.
			i := unjudged(t, path)
			mac, err := i.checked.mac(rightKey(), tokenVersion)
			if err != nil {
				t.Fatal(err)
			}
			if covered := !hmac.Equal(mac, i.checked.token.MAC); covered != (a.MAC || a.Why == lukstest.InTheWay) {
				t.Errorf("under the MAC: %v", covered)
			}
			if a.MAC {
				if r := reasons(t, i.Verify(rightKey())); !strings.Contains(r, "MAC does not hold") {
					t.Errorf("the MAC alone: %s", r)
				}
			}

			// The strict check alone.
			i.checked.token.MAC = mac
			text, err := i.checked.token.encode()
			if err != nil {
				t.Fatal(err)
			}
			for _, at := range []int64{primaryAt, secondaryAt} {
				rewrite(t, path, at, func(b []byte) { replaceMAC(t, b, text) })
			}
			forged := inspected(t, path)
			if a.Reason != "" {
				refused(t, path, a.Reason)
				return
			}
			if !forged.Pass() {
				t.Errorf("the strict check alone: %q", forged.Reasons)
			}
			if err := forged.Verify(rightKey()); err != nil {
				t.Errorf("it is not only the MAC that refuses it: %v", err)
			}
		})
	}
}

// replaceMAC puts the MAC of a token's text into the JSON of a copy. It has one length, so nothing else moves.
func replaceMAC(t *testing.T, b, text []byte) {
	t.Helper()
	mark := []byte(`"mac":"`)
	to, from := bytes.Index(b, mark), bytes.Index(text, mark)
	if to < 0 || from < 0 {
		t.Fatal("no MAC to replace")
	}
	copy(b[to:to+len(mark)+base64.StdEncoding.EncodedLen(macBytes)], text[from:])
}

// unjudged is an inspection that let everything pass: the strict check disabled.
func unjudged(t *testing.T, path string) *Inspection {
	t.Helper()
	b := read(t, path, 0, headBytes)
	var m metadata
	if err := json.Unmarshal(bytes.TrimSpace(trimNUL(b[binarySize:secondaryAt])), &m); err != nil {
		t.Fatal(err)
	}
	token, err := parseToken(0, m.Tokens["0"])
	if err != nil {
		t.Fatal(err)
	}
	c := &checked{uuid: string(trimNUL(b[offUUID : offUUID+lenUUID])), segment: m.Segments["0"], digestID: "0", digest: m.Digests["0"],
		token: token, slot: m.Keyslots["0"], areaOffset: KeyslotsOffset}
	area, err := copyArea(bytes.NewReader(b), KeyslotsOffset)
	if err != nil {
		t.Fatal(err)
	}
	c.offset, _ = number(c.segment.Offset)
	c.length = imageSize - c.offset
	if n, ok := number(c.segment.Size); ok {
		c.length = n
	}
	return &Inspection{Path: path, Size: imageSize, Kind: KindLUKS2, Ours: true, Header: &Header{Token: token},
		device: path, checked: c, area: area}
}

// A person adds slots, removes one of them, and changes priorities and names, all with cryptsetup. The volume still opens.
func TestKeyslotsChangedByAPerson(t *testing.T) {
	t.Parallel()

	path := volume(t)
	ours := filepath.Join(t.TempDir(), "ours")
	if err := os.WriteFile(ours, rightKey().Passphrase(), 0o600); err != nil {
		t.Fatal(err)
	}
	for slot, passphrase := range map[string]string{"1": "temporary", "2": "recovery"} {
		mustRun(t, []byte(passphrase), "cryptsetup", "luksAddKey", "--batch-mode", "--pbkdf", "argon2id", "--pbkdf-force-iterations", "4",
			"--pbkdf-memory", "64", "--pbkdf-parallel", "1", "--key-slot", slot, "--key-file", ours, path, "-")
	}
	mustRun(t, nil, "cryptsetup", "luksKillSlot", "--batch-mode", path, "1")
	mustRun(t, nil, "cryptsetup", "config", "--priority", "prefer", "--key-slot", "2", path)
	mustRun(t, nil, "cryptsetup", "config", "--priority", "ignore", "--key-slot", "0", path)
	mustRun(t, nil, "cryptsetup", "config", "--label", "renamed", "--subsystem", "other", path)

	i := inspected(t, path)
	if !i.Pass() || !i.Ours || i.Header.Label != "renamed" || i.Header.Subsystem != "other" {
		t.Fatalf("%+v %+v", i, i.Header)
	}
	if k := i.Header.Keyslots; len(k) != 2 || k[0].ID != 0 || k[1].ID != 2 || k[1].KDF != "argon2id" {
		t.Errorf("keyslots %+v", k)
	}
	var mapped *volumeType
	dm := fakeMapper(t)
	create := dm.create
	dm.create = func(v *volumeType, name string) error { mapped = v; return create(v, name) }
	if err := i.open(t.Context(), rightKey(), OpenOptions{Name: "luks-" + testUUID}, dm); err != nil || mapped == nil || mapped.StorageOffset != DataOffset {
		t.Errorf("%v %+v", err, mapped)
	}
	if i.Verify(keyOf(1)) == nil {
		t.Error("it opens with another key")
	}
	mustRun(t, []byte("recovery"), "cryptsetup", "open", "--test-passphrase", "--batch-mode", "--key-slot", "2", "--key-file=-", path)
}

// What else a person does with cryptsetup. The volume opens, or is refused for what was done.
func TestHeaderChangedByAPerson(t *testing.T) {
	t.Parallel()

	dir := t.TempDir()
	ours := filepath.Join(dir, "ours")
	if err := os.WriteFile(ours, rightKey().Passphrase(), 0o600); err != nil {
		t.Fatal(err)
	}
	cheap := []string{"--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "64", "--pbkdf-parallel", "1"}
	pbkdf2 := []string{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"}
	cryptsetup := func(t *testing.T, input string, args ...string) {
		t.Helper()
		mustRun(t, []byte(input), "cryptsetup", append([]string{"--batch-mode"}, args...)...)
	}
	add := func(t *testing.T, path, passphrase string, more ...string) {
		t.Helper()
		cryptsetup(t, passphrase, append(append([]string{"luksAddKey", "--key-file", ours}, more...), path, "-")...)
	}
	for _, c := range []struct {
		name   string
		change func(t *testing.T, path string)
		want   string // in a reason; "" opens
	}{
		{"the passphrase of an added slot", func(t *testing.T, path string) {
			add(t, path, "old", cheap...)
			old := filepath.Join(t.TempDir(), "old")
			if err := os.WriteFile(old, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			cryptsetup(t, "new", append([]string{"luksChangeKey", "--key-file", old, path, "-"}, cheap...)...)
			cryptsetup(t, "new", "open", "--test-passphrase", "--key-file=-", path)
		}, ""},
		{"the kdf of an added slot", func(t *testing.T, path string) {
			add(t, path, "recovery", pbkdf2...)
			cryptsetup(t, "recovery", append([]string{"luksConvertKey", "--key-slot", "1", "--key-file=-", path}, cheap...)...)
			if k := inspected(t, path).Header.Keyslots; len(k) != 2 || k[1].KDF != "argon2id" {
				t.Errorf("%+v", k)
			}
		}, ""},
		{"an added slot with cryptsetup's own kdf", func(t *testing.T, path string) {
			add(t, path, "recovery", "--iter-time", "1")
		}, ""},
		{"an unbound slot", func(t *testing.T, path string) {
			cryptsetup(t, "other", append([]string{"luksAddKey", "--unbound", "--key-size", "512", path, "-"}, pbkdf2...)...)
		}, ""},
		{"an unbound slot with a shorter key", func(t *testing.T, path string) {
			cryptsetup(t, "other", append([]string{"luksAddKey", "--unbound", "--key-size", "256", path, "-"}, pbkdf2...)...)
		}, "keyslot 1: key size 32"},
		{"a keyring token, added and removed again", func(t *testing.T, path string) {
			add(t, path, "recovery", cheap...)
			cryptsetup(t, "", "token", "add", "--key-description", "here", "--key-slot", "1", path)
			if i := inspected(t, path); !i.Pass() || len(i.Header.Tokens) != 2 {
				t.Errorf("%+v", i)
			}
			cryptsetup(t, "", "token", "remove", "--token-id", "1", path)
		}, ""},
		{"the header of a backup", func(t *testing.T, path string) {
			backup := filepath.Join(t.TempDir(), "backup")
			cryptsetup(t, "", "luksHeaderBackup", "--header-backup-file", backup, path)
			add(t, path, "recovery", cheap...)
			cryptsetup(t, "recovery", "luksKillSlot", "--key-file=-", path, "0")
			cryptsetup(t, "", "luksHeaderRestore", "--header-backup-file", backup, path)
			if k := inspected(t, path).Header.Keyslots; len(k) != 1 {
				t.Errorf("%+v", k)
			}
		}, ""},
		{"the header of a backup, over damage in both copies", func(t *testing.T, path string) {
			backup := filepath.Join(t.TempDir(), "backup")
			cryptsetup(t, "", "luksHeaderBackup", "--header-backup-file", backup, path)
			flip(t, path, 5000)
			flip(t, path, secondaryAt+5000)
			cryptsetup(t, "", "luksHeaderRestore", "--header-backup-file", backup, path)
		}, ""},

		{"the passphrase of our slot", func(t *testing.T, path string) {
			cryptsetup(t, "new", append([]string{"luksChangeKey", "--key-slot", "0", "--key-file", ours, path, "-"}, pbkdf2...)...)
		}, "does not open keyslot 0: the keyslot is damaged or was changed"},
		{"the kdf of our slot", func(t *testing.T, path string) {
			cryptsetup(t, "", append([]string{"luksConvertKey", "--key-slot", "0", "--key-file", ours, path}, cheap...)...)
		}, `keyslot 0 has kdf "argon2id"`},
		{"our slot removed", func(t *testing.T, path string) {
			add(t, path, "recovery", cheap...)
			cryptsetup(t, "recovery", "luksKillSlot", "--key-file=-", path, "0")
		}, "lists 0 keyslots instead of one"},
		{"our token removed", func(t *testing.T, path string) {
			cryptsetup(t, "", "token", "remove", "--token-id", "0", path)
		}, reasonNoToken},
		{"a reencryption begun", func(t *testing.T, path string) {
			cryptsetup(t, "", append([]string{"reencrypt", "--init-only", "--key-file", ours, "--key-slot", "0", path}, pbkdf2...)...)
		}, "online-reencrypt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := volume(t)
			c.change(t, path)
			i := inspected(t, path)
			if !i.Ours || i.Kind != KindLUKS2 || i.Header.UUID != testUUID || i.PrimaryDamaged || i.SecondaryDamaged {
				t.Errorf("%+v", i)
			}
			err := i.Verify(rightKey())
			if c.want == "" {
				if err != nil || !i.Pass() || i.Verify(keyOf(1)) == nil {
					t.Errorf("%v, or it opens with another key", err)
				}
				return
			}
			if r := reasons(t, err); !strings.Contains(r, c.want) {
				t.Error(r)
			}
		})
	}
}
