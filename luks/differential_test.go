package luks

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// sealedSeeds are JSON texts of headers: what Format writes, what other writers may, and what is nearly right.
func sealedSeeds(t testing.TB) [][]byte {
	good, err := template()
	if err != nil {
		t.Fatal(err)
	}
	text := string(trimNUL(good[binarySize:secondaryAt]))
	replaced := func(old, now string) []byte {
		if !strings.Contains(text, old) {
			t.Fatalf("the header has no %s", old)
		}
		return []byte(strings.Replace(text, old, now, 1))
	}
	token := func(s string) []byte { return replaced(`"tokens":{`, `"tokens":{"7":`+s+`,`) }
	flags := func(s string) []byte { return replaced(`"config":{`, `"config":{`+s+`,`) }
	return [][]byte{
		[]byte(text),
		[]byte(strings.ReplaceAll(text, ":", " :\n")),
		replaced(`"size":"dynamic"`, `"size":"4096"`),
		replaced(`"sector_size":4096`, `"sector_size":512`),
		replaced(`"iterations":1000`, `"iterations":1e3`),
		replaced(`"iterations":1000`, `"iterations":1000.0`),
		replaced(`"iterations":1000`, `"iterations":1000000`),
		replaced(`"offset":"16777216"`, `"offset":"16781312"`),
		replaced(`"type":"crypt"`, `"type":"cr\u0079pt"`),
		replaced(`"key_size":64,`, `"key_size":64,"priority":2,`),
		replaced(`"key_size":64,`, `"key_size":64,"priority":0,`),
		replaced(`"key_size":64,`, `"key_size":-0,`),
		flags(`"flags":["allow-discards","no-read-workqueue"]`),
		flags(`"flags":[]`),
		flags(`"requirements":{"mandatory":[]}`),
		flags(`"requirements":{}`),
		token(`{"type":"x","keyslots":[]}`),
		token(`{"type":"x","keyslots":["0"],"N":null,"n":[[{"":1e400}]]}`),
		// json-c reads 32 levels, of which tokens begin at the third: just in, and one too many, with a value within and without.
		token(`{"type":"x","keyslots":[],"n":` + strings.Repeat("[", 28) + "1" + strings.Repeat("]", 28) + "}"),
		token(`{"type":"x","keyslots":[],"n":` + strings.Repeat("[", 29) + "1" + strings.Repeat("]", 29) + "}"),
		token(`{"type":"x","keyslots":[],"n":` + strings.Repeat("[", 29) + strings.Repeat("]", 29) + "}"),
		token(`{"type":"x","keyslots":[],"n":` + strings.Repeat("[", 30) + strings.Repeat("]", 30) + "}"),
		token(`{"type":"x\u0000y","keyslots":[]}`),
		token(`{"type":"x","keyslots":[],"t":"\ud800"}`),
		token(`{"type":"x"}`),
		token(`{"type":"x","keyslots":"0"}`),
		token(`{"type":"x","keyslots":[0]}`),
		token(`{"type":"x","keyslots":["9"]}`),
		token(`{"type":"x","keyslots":["0","0"]}`),
		token(`{"type":"x","Type":"y","keyslots":[]}`),
		token(`{"type":"x","keyslots":null}`),
		token(`{"type":"luks2-keyring","keyslots":[]}`),
		token(`{"type":"luks2-keyring","keyslots":["0"],"key_description":"d"}`),
		token(`{"type":"luks2-x","keyslots":["0"]}`),
	}
}

// sealed is the head of a disk with text in both copies and fuzz over the binary headers, checksums fixed. What says how
// large the copy is and where it stands is left alone, so that the JSON is reached.
func sealed(t testing.TB, binary, text []byte) []byte {
	good, err := template()
	if err != nil {
		t.Fatal(err)
	}
	head := bytes.Clone(good)
	for _, at := range []int{primaryAt, secondaryAt} {
		b := head[at : at+secondaryAt]
		for _, part := range []struct{ from, to int }{{offSeqID, offAlgorithm}, {offAlgorithm + lenAlgorithm, offOffset}, {offOffset + 8, offChecksum}} {
			if len(binary) > part.from {
				copy(b[part.from:part.to], binary[part.from:])
			}
		}
		lukstest.SetText(b, text)
		lukstest.Seal(b)
	}
	return head
}

// cryptsetupTakes asserts that cryptsetup accepts a header that passed.
func cryptsetupTakes(t *testing.T, head []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := makeImage(path, head, imageSize); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"isLuks", "--type", "luks2", path}, {"luksDump", path}} {
		if out, err := run(t, nil, "cryptsetup", args...); err != nil {
			t.Errorf("Inspect passes what cryptsetup %s refuses: %v %s\n%q", args[0], err, out, trimNUL(head[binarySize:secondaryAt]))
		}
	}
}

// What passes, cryptsetup accepts: stricter is allowed, laxer never.
func TestWhatPassesCryptsetupAccepts(t *testing.T) {
	t.Parallel()

	passed := 0
	for _, text := range sealedSeeds(t) {
		head := sealed(t, nil, text)
		i, err := inspect(holes{head, imageSize}, imageSize)
		if err != nil {
			t.Fatal(err)
		}
		if i.Pass() {
			passed++
			cryptsetupTakes(t, head)
		}
	}
	if passed < 8 {
		t.Errorf("only %d seeds pass: they show nothing", passed)
	}
}

// FuzzInspectSealed reaches behind the checksums, in the JSON and in the binary header, and holds what passes against cryptsetup.
func FuzzInspectSealed(f *testing.F) {
	for _, text := range sealedSeeds(f) {
		f.Add([]byte(nil), text)
	}
	good, err := template()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.Clone(good[:offChecksum]), bytes.Clone(trimNUL(good[binarySize:secondaryAt])))
	f.Fuzz(func(t *testing.T, binary, text []byte) {
		if len(text) >= secondaryAt-binarySize {
			text = text[:secondaryAt-binarySize]
		}
		head := sealed(t, binary, text)
		i := bounded(t, holes{head, imageSize})
		if i.Kind != KindLUKS2 && i.Kind != KindEmpty || i.Header == nil {
			t.Errorf("kind %s of a header with a valid checksum", i.Kind)
		}
		if i.Pass() {
			cryptsetupTakes(t, head)
		}
	})
}
