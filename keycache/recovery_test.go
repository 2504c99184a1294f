package keycache

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Computed once by another program, with the multiplication in the field written out.
var recoveryTexts = map[string]string{
	"0000000000000000000000000000000000000000": "00000-0000G-00005-0000N-0000A-0000T-0000F-0000Z",
	"000102030405060708090a0b0c0d0e0f10111213": "000G5-40R4X-0M30R-E209C-185G1-R38E2-1W813-24GKP",
	"ffffffffffffffffffffffffffffffffffffffff": "ZZZZD-ZZZZX-ZZZZ8-ZZZZR-ZZZZ7-ZZZZQ-ZZZZ2-ZZZZJ",
	"8f1d3c5ba9e2700142d6c3b8f90e7a6512ab34cd": "HWEKR-RPX91-W9R0V-2GPPZ-REWFD-J3KTX-CM9AN-PD6DR",
}

func parseRecovery(t testing.TB, text string) *Key {
	t.Helper()
	k, err := ParseRecoveryKey([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func TestRecoveryKeyIsWrittenAsSpecified(t *testing.T) {
	for raw, text := range recoveryTexts {
		b, _ := hex.DecodeString(raw)
		k, err := lockKey(b, recoveryTextLen, encodeRecovery)
		if err != nil {
			t.Fatal(err)
		}
		defer k.Wipe()
		if got := string(k.Passphrase()); got != text {
			t.Errorf("%s is %s, want %s", raw, got, text)
		}
		for _, typed := range []string{text, strings.ToLower(text), strings.ReplaceAll(text, "-", ""), strings.ReplaceAll(text, "-", " ") + "\r\n",
			strings.NewReplacer("0", "o", "1", "l").Replace(text), strings.NewReplacer("0", "O", "1", "I").Replace(text)} {
			if got := parseRecovery(t, typed); !got.Equal(k) || !bytes.Equal(got.Passphrase(), k.Passphrase()) {
				t.Errorf("%q is another key than %s", typed, text)
			}
		}
	}
}

func TestNewRecoveryKey(t *testing.T) {
	a, errA := NewRecoveryKey()
	b, errB := NewRecoveryKey()
	if errA != nil || errB != nil {
		t.Fatal(errA, errB)
	}
	defer a.Wipe()
	defer b.Wipe()
	if a.Equal(b) || len(a.Bytes()) != 20 || len(a.Passphrase()) != 47 || bytes.Equal(a.Bytes(), make([]byte, 20)) {
		t.Error("two new keys are not two of 160 random bits")
	}
	if !parseRecovery(t, string(a.Passphrase())).Equal(a) {
		t.Error("the text of a new key is another key")
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		if got := fmt.Sprintf(verb, a); got != redacted {
			t.Errorf("%s prints %s", verb, got)
		}
	}
}

// Each single typo, and each two neighbours that changed places, is found and its group named.
func TestRecoveryKeyTypos(t *testing.T) {
	const text = "HWEKR-RPX91-W9R0V-2GPPZ-REWFD-J3KTX-CM9AN-PD6DR"
	wrong := func(typed string, group int) {
		t.Helper()
		_, err := ParseRecoveryKey([]byte(typed))
		var e *RecoveryKeyError
		if !errors.As(err, &e) || !slices.Equal(e.Groups, []int{group}) || !strings.Contains(err.Error(), fmt.Sprintf("group %d of 8 has a typo", group)) {
			t.Fatalf("group %d is wrong, and the error is %v", group, err)
		}
		if bytes.Contains([]byte(err.Error()), []byte(text[:5])) {
			t.Error("the error tells the key")
		}
	}
	for i := range len(text) {
		if text[i] == '-' {
			continue
		}
		for _, c := range alphabet + "U?#" {
			if byte(c) != text[i] {
				wrong(text[:i]+string(c)+text[i+1:], i/6+1)
			}
		}
		if i+1 < len(text) && text[i+1] != '-' && text[i] != text[i+1] {
			wrong(text[:i]+text[i+1:i+2]+text[i:i+1]+text[i+2:], i/6+1)
		}
	}
	groups := strings.Split(text, "-")
	for i := range groups {
		for j := range i {
			swapped := slices.Clone(groups)
			swapped[i], swapped[j] = swapped[j], swapped[i]
			_, err := ParseRecoveryKey([]byte(strings.Join(swapped, "-")))
			var e *RecoveryKeyError
			if !errors.As(err, &e) || !slices.Equal(e.Groups, []int{j + 1, i + 1}) || !strings.Contains(err.Error(), fmt.Sprintf("groups %d %d of 8", j+1, i+1)) {
				t.Errorf("groups %d and %d changed places: %v", i+1, j+1, err)
			}
		}
	}
	for typed, want := range map[string]string{
		"":                        "nothing was entered",
		" -\n":                    "nothing was entered",
		text[:46]:                 "39 characters instead of 40; the first group that is wrong is number 8",
		text + "0":                "41 characters instead of 40",
		text[:12] + text[13:]:     "39 characters instead of 40; the first group that is wrong is number 3",
		text[:18]:                 "15 characters instead of 40; the first group that is wrong is number 4",
		text[:6] + "7" + text[6:]: "41 characters instead of 40; the first group that is wrong is number 2",
		strings.Repeat("7", 5000): "5000 characters instead of 40; the first group that is wrong is number",
	} {
		if _, err := ParseRecoveryKey([]byte(typed)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", typed, err, want)
		}
	}
}

func TestParsedTextIsWiped(t *testing.T) {
	for _, typed := range []string{"HWEKR-RPX91-W9R0V-2GPPZ-REWFD-J3KTX-CM9AN-PD6DR", "ABC"} {
		b := []byte(typed)
		if k, err := ParseRecoveryKey(b); err == nil {
			k.Wipe()
		}
		if !bytes.Equal(b, make([]byte, len(b))) {
			t.Error("the text is left where it was")
		}
	}
}

// FuzzParseRecoveryKey: what is taken is a key whose text is what was typed, and what is not never shows.
func FuzzParseRecoveryKey(f *testing.F) {
	for _, text := range recoveryTexts {
		f.Add([]byte(text))
		f.Add([]byte(strings.ToLower(strings.ReplaceAll(text, "-", ""))))
	}
	f.Add([]byte("\x10\xff"))
	f.Fuzz(func(t *testing.T, typed []byte) {
		folded := strings.NewReplacer("-", "", " ", "", "\t", "", "\n", "", "\v", "", "\f", "", "\r", "", "O", "0", "I", "1", "L", "1").
			Replace(string(bytes.Map(func(r rune) rune {
				if r >= 'a' && r <= 'z' {
					return r - 'a' + 'A'
				}
				return r
			}, typed)))
		k, err := ParseRecoveryKey(typed)
		if err != nil {
			var e *RecoveryKeyError
			if !errors.As(err, &e) || len(err.Error()) > 150 {
				t.Errorf("%v", err)
			}
			return
		}
		defer k.Wipe()
		if got := strings.ReplaceAll(string(k.Passphrase()), "-", ""); got != folded {
			t.Errorf("%q was taken for %q", folded, got)
		}
	})
}
