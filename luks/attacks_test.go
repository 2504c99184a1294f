package luks

import (
	"bytes"
	"crypto/hmac"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The attacks that luks.go, cryptsetup or both fall for, each against the strict check alone and against the MAC alone. Attackers
// fix all checksums.
//
// Where the strict check stands alone, the MAC is disabled by making it hold: it is computed anew over what the attacker wrote.
// Where the MAC stands alone, the strict check is disabled by letting everything through that it would refuse. What only one of
// the two catches says why.
func TestEachCheckAlone(t *testing.T) {
	t.Parallel()

	type catcher string
	const (
		both       catcher = "both"
		onlyStrict catcher = "strict"
		onlyMAC    catcher = "MAC"
	)
	const (
		slotsOpen = "keyslots are not under the MAC: operators may change them with cryptsetup"
		inTheWay  = "the MAC does not hold, but only after luks.go has worked on the value: without the key's slot opened, a wrong key and a tampered header look the same"
		shape     = "it is not content, but its wrapping: what the MAC covers is the same"
		allowed   = "the value is one that Format or an operator could have written, only not for this volume"
	)
	seg := func(m tree) tree { return m.at("segments", "0") }
	slot := func(m tree) tree { return m.at("keyslots", "0") }
	dig := func(m tree) tree { return m.at("digests", "0") }
	for _, c := range []struct {
		name string
		by   catcher
		why  string // where it is not both
		want string // in the strict check's reason
		edit func(tree)
		raw  func(copy []byte) // instead of edit
	}{
		{"empty digest, which any passphrase opens", both, "", "not 32 bytes long", func(m tree) { dig(m)["digest"] = "" }, nil},
		{"null cipher, which maps plaintext", both, "", `cipher "cipher_null-ecb"`, func(m tree) { seg(m)["encryption"] = "cipher_null-ecb" }, nil},
		{"another cipher", both, "", `cipher "aes-xts-plain"`, func(m tree) { seg(m)["encryption"] = "aes-xts-plain" }, nil},
		{"iv_tweak", both, "", `iv_tweak "8"`, func(m tree) { seg(m)["iv_tweak"] = "8" }, nil},
		{"data over the key slots", both, "", "inside the header", func(m tree) { seg(m)["offset"] = "32768" }, nil},
		{"another type of segment", both, "", `type "linear"`, func(m tree) { seg(m)["type"] = "linear" }, nil},

		{"sector size 0, a panic", onlyStrict, inTheWay, "sector size 0", func(m tree) { seg(m)["sector_size"] = 0 }, nil},
		{"hash of the digest too short, a panic", onlyStrict, inTheWay, `hash "sha1"`, func(m tree) { dig(m)["hash"] = "sha1" }, nil},
		{"endless digest", onlyStrict, inTheWay, "4294967295 iterations", func(m tree) { dig(m)["iterations"] = 1<<32 - 1 }, nil},

		{"JSON without an end, a panic", onlyStrict, shape, "has no end", nil, func(b []byte) {
			for i := len(trimNUL(b[binarySize:])) + binarySize; i < len(b); i++ {
				b[i] = ' '
			}
		}},
		{"requirements", onlyStrict, shape, "online-reencrypt", func(m tree) {
			m.at("config")["requirements"] = map[string]any{"mandatory": []any{"online-reencrypt-v2"}}
		}, nil},
		{"endless slot", onlyStrict, slotsOpen, "4294967295 iterations", func(m tree) { slot(m).at("kdf")["iterations"] = 1<<32 - 1 }, nil},
		{"argon2 of 4 TiB", onlyStrict, slotsOpen, "memory 4294967295", func(m tree) { argon(m, 4, 1<<32-1, 4) }, nil},
		{"argon2 time 0, a panic", onlyStrict, slotsOpen, "time 0", func(m tree) { argon(m, 0, 65536, 4) }, nil},
		{"argon2 cpus 0, a panic", onlyStrict, slotsOpen, "cpus 0", func(m tree) { argon(m, 4, 65536, 0) }, nil},
		{"argon2 cpus 256, a panic", onlyStrict, slotsOpen, "cpus 256", func(m tree) { argon(m, 4, 65536, 256) }, nil},
		{"key size 0, a panic", onlyStrict, slotsOpen, "key size 0", func(m tree) { slot(m)["key_size"] = 0 }, nil},
		{"key size of 1 TiB", onlyStrict, slotsOpen, "key size 1099511627776", func(m tree) { slot(m)["key_size"] = 1 << 40 }, nil},
		{"area of 8 EiB", onlyStrict, slotsOpen, "not in the keyslots area", func(m tree) { slot(m).at("area")["size"] = fmt.Sprint(1<<63 - 4096) }, nil},
		{"null cipher of the area", onlyStrict, slotsOpen, `cipher "cipher_null-ecb"`, func(m tree) { slot(m).at("area")["encryption"] = "cipher_null-ecb" }, nil},

		{"data moved", onlyMAC, allowed, "", func(m tree) { seg(m)["offset"] = fmt.Sprint(dataOffset + 4096) }, nil},
		{"data cut short", onlyMAC, allowed, "", func(m tree) { seg(m)["size"] = "8192" }, nil},
		{"other sectors", onlyMAC, allowed, "", func(m tree) { seg(m)["sector_size"] = 512 }, nil},
		{"another UUID", onlyMAC, allowed, "", nil, func(b []byte) { copy(b[offUUID:], strings.Replace(testUUID, "1", "2", 1)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if (c.why == "") != (c.by == both) {
				t.Fatal("the table has to say why")
			}
			path := volume(t)
			if c.edit != nil {
				edit(t, path, c.edit)
			} else {
				rewrite(t, path, primaryAt, c.raw)
				rewrite(t, path, secondaryAt, c.raw)
			}

			// The MAC alone.
			i := unjudged(t, path)
			mac, err := i.checked.mac(rightKey(), tokenVersion)
			if err != nil {
				t.Fatal(err)
			}
			covered := !hmac.Equal(mac, i.checked.token.MAC)
			if covered != (c.by != onlyStrict || c.why == inTheWay) {
				t.Errorf("under the MAC: %v", covered)
			}
			if c.by != onlyStrict {
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
			if c.by != onlyMAC {
				refused(t, path, c.want)
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
	c.offset, _ = number(c.segment.Offset)
	c.length = imageSize - c.offset
	if n, ok := number(c.segment.Size); ok {
		c.length = n
	}
	return &Inspection{Path: path, Size: imageSize, Kind: KindLUKS2, Ours: true, Header: &Header{Token: token},
		device: path, checked: c, area: b[KeyslotsOffset : KeyslotsOffset+areaBytes]}
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
	if err := i.open(t.Context(), rightKey(), OpenOptions{Name: "luks-" + testUUID}, dm); err != nil || mapped == nil || mapped.StorageOffset != dataOffset {
		t.Errorf("%v %+v", err, mapped)
	}
	if i.Verify(keyOf(1)) == nil {
		t.Error("it opens with another key")
	}
	mustRun(t, []byte("recovery"), "cryptsetup", "open", "--test-passphrase", "--batch-mode", "--key-slot", "2", "--key-file=-", path)

	// Our own slot removed: the volume is still ours, and says that its key has no slot.
	mustRun(t, []byte("recovery"), "cryptsetup", "luksKillSlot", "--key-file=-", path, "0")
	if i := inspected(t, path); i.Pass() || !i.Ours || i.Kind != KindLUKS2 || i.Verify(rightKey()) == nil {
		t.Errorf("without our slot: %+v", i)
	}
}
