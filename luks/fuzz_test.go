package luks

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// bounded inspects a disk that a fuzzer made, and holds the bound on memory.
func bounded(t *testing.T, disk holes) *Inspection {
	t.Helper()
	var i *Inspection
	var err error
	if n := allocated(func() { i, err = inspect(disk, disk.size) }); n > maxAllocated {
		t.Errorf("%d MiB allocated", n>>20)
	}
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// seenByCryptsetup: what cryptsetup takes for LUKS is never called none, which could be formatted. It asks for one input in 16: a process
// costs as much as a hundred inspections.
func seenByCryptsetup(t *testing.T, i *Inspection, disk holes) {
	t.Helper()
	if i.Kind != KindNone || sha256.Sum256(disk.head)[0]%16 != 0 {
		return
	}
	path := filepath.Join(t.TempDir(), "image")
	if err := makeImage(path, disk.head, disk.size); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, nil, "cryptsetup", "isLuks", path); err == nil {
		t.Errorf("cryptsetup sees LUKS, Inspect does not, in %q", disk.head[:min(len(disk.head), 600)])
	}
}

// FuzzLUKS1: a LUKS1 header never passes, opens or says anything unprintable, whatever is in it. The input is laid over one that
// cryptsetup made, from byte at on.
func FuzzLUKS1(f *testing.F) {
	path := blank(f, imageSize)
	mustRun(f, rightKey().Passphrase(), "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000",
		"--uuid", testUUID, "--key-file=-", path)
	const size = 592 // LUKS1 On-Disk Format Specification 1.2.3, figure 1
	good := read(f, path, 0, size)

	f.Add(good, uint16(0))
	f.Add([]byte{}, uint16(0))
	f.Add([]byte("LUKS\xba\xbe\x00\x02"), uint16(0))
	f.Add([]byte("SKUL\xba\xbe\x00\x01"), uint16(0))
	f.Add([]byte{0, 0}, uint16(offVersion))
	f.Add([]byte{1, 0}, uint16(offVersion))
	f.Add([]byte{1, 1}, uint16(offVersion))
	f.Add(bytes.Repeat([]byte{0xff}, size-8), uint16(8))
	f.Add(make([]byte, size-8), uint16(8))
	f.Add([]byte("cipher_null\x00"), uint16(8))
	f.Add([]byte("\x1b[2J"), uint16(8))
	f.Add(bytes.Repeat([]byte{0xff}, 8), uint16(104)) // the data's offset and the key's size
	f.Add(make([]byte, 20), uint16(112))              // the digest
	f.Add(bytes.Repeat([]byte{0xff}, 4), uint16(164)) // iterations
	f.Add([]byte(strings.ToUpper(testUUID)), uint16(168))
	f.Add(bytes.Repeat([]byte("a"), 40), uint16(168))
	f.Add([]byte("luks-kms-agent\x00"), uint16(offSubsystem))
	f.Fuzz(func(t *testing.T, input []byte, at uint16) {
		head := make([]byte, 2*KeyslotsOffset)
		copy(head, good)
		copy(head[int(at)%len(head):], input)
		disk := holes{head, imageSize}
		i := bounded(t, disk)
		seenByCryptsetup(t, i, disk)
		isLUKS1 := bytes.HasPrefix(head, []byte(magicPrimary+"\x00\x01"))
		if isLUKS1 != (i.Kind == KindLUKS1) {
			t.Errorf("kind %s of %q", i.Kind, head[:8])
		}
		if i.Pass() || i.Verify(rightKey()) == nil {
			t.Error("it passes, or opens")
		}
		if !isLUKS1 {
			return
		}
		h := i.Header
		if i.Ours || h.Version != 1 || len(i.Reasons) != 1 || h.Token != nil || h.Offset < 0 || h.KeySize < 0 || h.UUID != "" && len(h.UUID) != 36 {
			t.Errorf("%+v, %+v", i, h)
		}
		if text := h.Cipher + h.UUID + h.Label; printable([]byte(text)) != text {
			t.Errorf("unprintable: %q", text)
		}
	})
}

// FuzzToken: what is taken for our token is one, in words of this test's own, and is the same after it was written again.
func FuzzToken(f *testing.F) {
	good := &Token{KeyARN: testARN, WrappedKey: []byte("what KMS wrapped"), MAC: bytes.Repeat([]byte{7}, 32), Version: 1}
	text, err := good.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(strings.ReplaceAll(string(text), ":", " :\n")))
	for old, news := range map[string][]string{
		`"keyslots":["0"]`: {`"keyslots":["31"]`, `"keyslots":["32"]`, `"keyslots":["00"]`, `"keyslots":["-1"]`, `"keyslots":[0]`, `"keyslots":["0","1"]`,
			`"keyslots":[]`, `"keyslots":null`, `"Keyslots":["0"]`, `"keyslots":["0"],"keyslots":["1"]`, `"keyslots":["0"],"key\u0073lots":["1"]`},
		`"version":1`: {`"version":2`, `"version":1e0`, `"version":1.0`, `"version":"1"`, `"version":-0`, `"version":99999999999999999999`},
		testARN:       {"", "arn", "arn:aws:kms:\\u0000", "a b", "ä", "\\ud800", strings.Repeat("a", maxARN), strings.Repeat("a", maxARN+1)},
		base64.StdEncoding.EncodeToString(good.WrappedKey): {"", "*", "YQ==", "YQ=", "YQ", "YR==", "YQ\\n==", "_-__", strings.Repeat("A", 8192), strings.Repeat("A", 8196)},
		base64.StdEncoding.EncodeToString(good.MAC):        {"", "YQ==", strings.Repeat("A", 43) + "=", strings.Repeat("A", 42) + "B=", strings.Repeat("A", 44)},
		`}`: {`,"more":1}`, `,"mac":""}`, `,"MAC":""}`, `}{}`, "}\x00", `} `, ``},
	} {
		for _, now := range news {
			if !bytes.Contains(text, []byte(old)) {
				f.Fatalf("the token has no %s", old)
			}
			f.Add([]byte(strings.Replace(string(text), old, now, 1)))
		}
	}
	for _, other := range []string{"", "null", "[]", "0", `"x"`, "{}", `{"type":"luks-kms-agent"}`, strings.Repeat("[", 5000), strings.Repeat(`{"type":`, 5000)} {
		f.Add([]byte(other))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		data = data[:min(len(data), maxText)] // no header has more
		before := bytes.Clone(data)
		token, err := parseToken(7, data)
		if !bytes.Equal(data, before) {
			t.Fatal("the input was changed")
		}
		if err != nil {
			if token != nil {
				t.Errorf("%v, and a token", err)
			}
			return
		}
		var m map[string]any
		if err := json.Unmarshal(data, &m); err != nil {
			t.Fatalf("it is no JSON: %v", err)
		}
		for name := range m {
			if !slices.Contains([]string{"type", "keyslots", "version", "key_arn", "wrapped_key", "mac"}, name) {
				t.Errorf("field %q", name)
			}
		}
		arn, _ := m["key_arn"].(string)
		if token.KeyARN != arn || len(arn) < 1 || len(arn) > 2048 || strings.ContainsFunc(arn, func(r rune) bool { return r < '!' || r > '~' }) {
			t.Errorf("key %q, read as %q", arn, token.KeyARN)
		}
		// base64 has one form of each value: who compares texts and who compares bytes see the same.
		if n := len(token.WrappedKey); n < 1 || n > 6144 || base64.StdEncoding.EncodeToString(token.WrappedKey) != m["wrapped_key"] {
			t.Errorf("%d bytes of wrapped key, from %q", n, m["wrapped_key"])
		}
		if len(token.MAC) != 32 || base64.StdEncoding.EncodeToString(token.MAC) != m["mac"] {
			t.Errorf("MAC %x, from %q", token.MAC, m["mac"])
		}
		if token.ID != 7 || token.Version != 1 || m["version"] != 1.0 || token.Keyslot < 0 || token.Keyslot > 31 {
			t.Errorf("%+v", token)
		}
		again, err := token.encode()
		if err != nil {
			t.Fatalf("it cannot be written: %v", err)
		}
		if back, err := parseToken(7, again); err != nil || !reflect.DeepEqual(back, token) {
			t.Errorf("%+v became %+v, %v", token, back, err)
		}
		whole := bytes.TrimSpace(data)
		for _, bad := range [][]byte{whole[:len(whole)-1], append(bytes.Clone(whole), '0'), append(bytes.Clone(whole), whole...),
			append([]byte(`{"colour":1,`), whole[1:]...), append([]byte(`{"mac":"",`), whole[1:]...), append([]byte(`{"Mac":"",`), whole[1:]...)} {
			if _, err := parseToken(7, bad); err == nil {
				t.Errorf("taken too: %q", bad)
			}
		}
	})
}
