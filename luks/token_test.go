package luks

import (
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
)

// The MAC as the package comment specifies it, computed once by another program (Python's hmac and hashlib, with HKDF written out).
func TestMACIsAsSpecified(t *testing.T) {
	c := &checked{
		uuid: testUUID,
		segment: jsonSegment{Type: "crypt", Offset: "16777216", Size: "dynamic", IVTweak: "0",
			Encryption: "aes-xts-plain64", SectorSize: 4096},
		digestID: "0",
		digest: jsonDigest{Type: "pbkdf2", Keyslots: []string{"0", "1"}, Segments: []string{"0"}, Hash: "sha256", Iterations: 1000,
			Digest: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", Salt: "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="},
	}
	const document = `{"digests":{"0":{"digest":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","hash":"sha256","iterations":1000,` +
		`"salt":"ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=","segments":["0"],"type":"pbkdf2"}},` +
		`"segments":{"0":{"encryption":"aes-xts-plain64","iv_tweak":"0","offset":"16777216","sector_size":4096,"size":"dynamic","type":"crypt"}},` +
		`"uuid":"0a1b2c3d-0000-4000-8000-000000000001","version":1}`
	if doc, err := c.document(1); err != nil || string(doc) != document {
		t.Errorf("%v\n%s", err, doc)
	}
	mac, err := c.mac(rightKey(), 1)
	if err != nil || hex.EncodeToString(mac) != "6da673319e58628a18f587da62cd75f4b7366dae139b8f2ebc2e464595fb8fae" {
		t.Errorf("%x %v", mac, err)
	}
}

// What the MAC binds. All of these pass the strict check: only the MAC stands against them.
func TestMACBindsTheHeader(t *testing.T) {
	t.Parallel()

	otherVolume := func(t *testing.T) (tree, []byte) {
		path := blank(t, imageSize)
		o := testOptions()
		o.UUID = "0a1b2c3d-0000-4000-8000-000000000002"
		if err := Format(t.Context(), path, o, rightKey()); err != nil {
			t.Fatal(err)
		}
		b := read(t, path, primaryAt, 0x4000)
		var m tree
		if err := json.Unmarshal(trimNUL(b[binarySize:]), &m); err != nil {
			t.Fatal(err)
		}
		return m, read(t, path, 32768, areaBytes)
	}
	for name, change := range map[string]func(t *testing.T, path string){
		"sector size": func(t *testing.T, path string) {
			edit(t, path, func(m tree) { m.At("segments", "0")["sector_size"] = 512 })
		},
		"offset": func(t *testing.T, path string) {
			edit(t, path, func(m tree) { m.At("segments", "0")["offset"] = "16781312" })
		},
		"size": func(t *testing.T, path string) {
			edit(t, path, func(m tree) { m.At("segments", "0")["size"] = "4096" })
		},
		"UUID": func(t *testing.T, path string) {
			for _, at := range []int64{primaryAt, secondaryAt} {
				rewrite(t, path, at, func(b []byte) { b[offUUID] = 'f' })
			}
		},
		"name of the digest": func(t *testing.T, path string) {
			edit(t, path, func(m tree) { m["digests"] = tree{"1": m.At("digests", "0")} })
		},
		"MAC itself": func(t *testing.T, path string) {
			edit(t, path, func(m tree) { m.At("tokens", "0")["mac"] = strings.Repeat("A", 43) + "=" })
		},
		"the token of another volume of the same key": func(t *testing.T, path string) {
			other, _ := otherVolume(t)
			edit(t, path, func(m tree) { m["tokens"] = other["tokens"] })
		},
		// A volume key that the attacker knows the sectors of: its slot, digest and area are real, and the passphrase opens it.
		"the volume key of another volume of the same key": func(t *testing.T, path string) {
			other, area := otherVolume(t)
			edit(t, path, func(m tree) { m["keyslots"], m["digests"] = other["keyslots"], other["digests"] })
			write(t, path, 32768, area)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			change(t, path)
			i := inspected(t, path)
			if !i.Pass() {
				t.Fatalf("the strict check should not see it: %q", i.Reasons)
			}
			if r := reasons(t, i.Verify(rightKey())); !strings.Contains(r, "MAC does not hold") {
				t.Error(r)
			}
			opened := false
			dm := fakeMapper(t)
			dm.create = func(*volumeType, string) error { opened = true; return nil }
			if err := i.open(t.Context(), rightKey(), OpenOptions{Name: "x"}, dm); err == nil || opened {
				t.Errorf("opened: %v", err)
			}
		})
	}
}

// What the MAC leaves out on purpose: see the package comment.
func TestMACLeavesOut(t *testing.T) {
	path := volume(t)
	edit(t, path, func(m tree) {
		m.At("tokens", "0")["key_arn"] = "arn:aws:kms:us-east-1:111122223333:key/another"
		m.At("tokens", "0")["wrapped_key"] = "AAAA"
		m.At("config")["flags"] = []any{"allow-discards"}
	})
	if i := inspected(t, path); i.Verify(rightKey()) != nil || i.Header.Token.KeyARN != "arn:aws:kms:us-east-1:111122223333:key/another" {
		t.Errorf("%v", i.Verify(rightKey()))
	}
}

// The right key, but the slot does not open: not "wrong key", which would send people looking for another one.
func TestDamagedKeyslot(t *testing.T) {
	t.Parallel()

	for name, change := range map[string]func(t *testing.T, path string){
		"area": func(t *testing.T, path string) { flip(t, path, 32768+1000) },
		"salt": func(t *testing.T, path string) {
			edit(t, path, func(m tree) {
				m.At("keyslots", "0", "kdf")["salt"] = m.At("digests", "0")["salt"]
			})
		},
	} {
		path := volume(t)
		change(t, path)
		if r := reasons(t, inspected(t, path).Verify(rightKey())); !strings.Contains(r, "keyslot is damaged") {
			t.Errorf("%s: %s", name, r)
		}
	}
}

func TestTokenGoesRoundAndIsBounded(t *testing.T) {
	t.Parallel()

	token := &Token{KeyARN: testARN, WrappedKey: make([]byte, maxWrappedKey), Keyslot: 31, MAC: make([]byte, 32), Version: 1}
	b, err := token.encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := parseToken(7, b)
	if err != nil || back.ID != 7 || back.KeyARN != testARN || len(back.WrappedKey) != maxWrappedKey || back.Keyslot != 31 {
		t.Errorf("%v %+v", err, back)
	}
	// The largest wrapped key still fits into the header.
	o := testOptions()
	o.WrappedKey = make([]byte, maxWrappedKey)
	if err := Format(t.Context(), blank(t, imageSize), o, rightKey()); err != nil {
		t.Error(err)
	}
}
