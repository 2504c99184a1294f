package luks

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
)

const otherARN = "arn:aws:kms:us-east-1:111122223333:key/0f1e2d3c-0000-4000-8000-00000000000b"

func TestReplaceToken(t *testing.T) {
	t.Parallel()
	path := volume(t)
	// A person's slot and token are not ours to touch.
	mustRun(t, []byte(`{"type":"clevis","keyslots":[],"jwe":{"Protected":null}}`), "cryptsetup", "token", "import", "--json-file=-", path)
	before := inspected(t, path)
	rest := content(t, path)[0x8000:]
	if err := ReplaceToken(t.Context(), path, otherARN, []byte("wrapped anew"), rightKey()); err != nil {
		t.Fatal(err)
	}
	i := inspected(t, path)
	token := i.Header.Token
	if !i.Pass() || i.PrimaryDamaged || i.SecondaryDamaged || token.KeyARN != otherARN || string(token.WrappedKey) != "wrapped anew" {
		t.Errorf("%+v %+v", i, token)
	}
	if token.ID != before.Header.Token.ID || len(i.Header.Tokens) != 2 || !bytes.Equal(token.MAC, before.Header.Token.MAC) {
		t.Errorf("token %+v was %+v; %v", token, before.Header.Token, i.Header.Tokens)
	}
	if err := i.Verify(rightKey()); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(content(t, path)[0x8000:], rest) {
		t.Error("more than the header was written")
	}
	// Again: nothing is written, and cryptsetup is not asked.
	done := content(t, path)
	if err := ReplaceToken(t.Context(), path, otherARN, []byte("wrapped anew"), rightKey()); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(content(t, path), done) {
		t.Error("the same token was written again")
	}
}

// Where the header is not the one that the key made, or not whole, not a byte is written.
func TestReplaceTokenRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil   func(t *testing.T, path string)
		key     testKey
		arn     string
		wrapped string
		want    string
	}{
		"another key":     {key: keyOf(1), want: "does not open"},
		"primary damaged": {spoil: func(t *testing.T, path string) { flip(t, path, 5000) }, want: "the primary header copy is damaged"},
		"tampered": {spoil: func(t *testing.T, path string) {
			edit(t, path, func(m tree) { m.At("segments", "0")["sector_size"] = 512 })
		}, want: "MAC"},
		"not ours": {spoil: func(t *testing.T, path string) { edit(t, path, func(m tree) { delete(m.At("tokens"), "0") }) }, want: "no luks-kms-agent token"},
		"no ARN":   {arn: "two words", want: "ARN"},
		"no key":   {wrapped: "-", want: "wrapped key"},
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			if c.spoil != nil {
				c.spoil(t, path)
			}
			key, arn, wrapped := rightKey(), otherARN, []byte("wrapped anew")
			if c.key != (testKey{}) {
				key = c.key
			}
			if c.arn != "" {
				arn = c.arn
			}
			if c.wrapped != "" {
				wrapped = nil
			}
			before := content(t, path)
			if err := ReplaceToken(t.Context(), path, arn, wrapped, key); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
			if !bytes.Equal(content(t, path), before) {
				t.Error("something was written")
			}
		})
	}
}

// A cut between the header copies leaves an old or torn secondary. That must not keep the command from being run again.
func TestReplaceTokenAfterACutBetweenTheCopies(t *testing.T) {
	t.Parallel()
	path := volume(t)
	flip(t, path, 0x4000+5000)
	if i := inspected(t, path); !i.SecondaryDamaged {
		t.Fatalf("%+v", i)
	}
	if err := ReplaceToken(t.Context(), path, otherARN, []byte("wrapped anew"), rightKey()); err != nil {
		t.Fatal(err)
	}
	if i := inspected(t, path); i.SecondaryDamaged || i.Header.Token.KeyARN != otherARN || i.Verify(rightKey()) != nil {
		t.Errorf("%+v", i)
	}
}

// A cryptsetup that does not do what it was asked for is found out; one that cannot is told before anything is written.
func TestReplaceTokenChecksTheResult(t *testing.T) {
	// instead is a cryptsetup that does something else where it is to import a token.
	instead := func(done string) string {
		return `if [ "$1" = token ]; then for p; do :; done; ` + done + `; else exec "$REAL" "$@"; fi`
	}
	for name, c := range map[string]struct{ script, want string }{
		"nothing":             {instead("cat >/dev/null"), "not the header that was asked for"},
		"another wrapped key": {instead(`sed 's/"wrapped_key":"[^"]*"/"wrapped_key":"AAAA"/' | "$REAL" "$@"`), "not the header that was asked for"},
		"another MAC":         {instead(`sed 's/"mac":"...../"mac":"AAAAA/' | "$REAL" "$@"`), "MAC"},
		"one copy":            {instead(`"$REAL" "$@"; dd if=/dev/zero of="$p" bs=4096 seek=4 count=1 conv=notrunc status=none`), "a header copy is damaged"},
		"a keyslot more": {instead(`"$REAL" "$@"; echo other | "$REAL" luksAddKey --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --unbound --key-size 512 "$p" -`),
			"not the header that was asked for"},
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			stub(t, c.script)
			if r := reasons(t, ReplaceToken(t.Context(), path, otherARN, []byte("wrapped anew"), rightKey())); !strings.Contains(r, c.want) {
				t.Error(r)
			}
		})
	}
	t.Run("too old", func(t *testing.T) {
		path := volume(t)
		before := content(t, path)
		stub(t, `case "$*" in *--token-replace*) echo "unknown option" >&2; exit 1;; esac; exec "$REAL" "$@"`)
		if err := ReplaceToken(t.Context(), path, otherARN, []byte("wrapped anew"), rightKey()); !errors.Is(err, ErrNoCryptsetup) {
			t.Error(err)
		}
		if !bytes.Equal(content(t, path), before) {
			t.Error("something was written")
		}
	})
}

// TestReplaceTokenIsCut: each header copy is the old one, the new one, or torn, as a cut leaves them while cryptsetup writes one after the other.
func TestReplaceTokenIsCut(t *testing.T) {
	t.Parallel()
	path := volume(t)
	before := content(t, path)
	if err := ReplaceToken(t.Context(), path, otherARN, []byte("wrapped anew"), rightKey()); err != nil {
		t.Fatal(err)
	}
	after := content(t, path)
	const size = 0x4000
	copies := func(old, new []byte) map[string][]byte {
		out := map[string][]byte{"old": old, "new": new}
		for _, at := range []int{512, 4096, 8192} {
			out["torn"+string(rune('a'+at/512))] = append(bytes.Clone(new[:at]), old[at:]...)
		}
		return out
	}
	seen := map[string]bool{}
	for first, a := range copies(before[:size], after[:size]) {
		for second, b := range copies(before[size:2*size], after[size:2*size]) {
			torn := strings.HasPrefix(first, "torn")
			if torn && second != "old" && second != "new" || first == "old" && second != "old" {
				continue // the second copy is written when the first is whole
			}
			state := bytes.Clone(before)
			copy(state, a)
			copy(state[size:], b)
			if err := os.WriteFile(path, state, 0o600); err != nil {
				t.Fatal(err)
			}
			i := inspected(t, path)
			if err := i.Verify(rightKey()); err != nil {
				t.Errorf("%s, %s: %v", first, second, err)
				continue
			}
			token := i.Header.Token
			switch string(token.WrappedKey) {
			case "what KMS wrapped":
				if token.KeyARN != testARN {
					t.Errorf("%s, %s: %+v", first, second, token)
				}
			case "wrapped anew":
				if token.KeyARN != otherARN {
					t.Errorf("%s, %s: %+v", first, second, token)
				}
			default:
				t.Errorf("%s, %s: %+v", first, second, token)
			}
			seen[string(token.WrappedKey)] = true
		}
	}
	if len(seen) != 2 {
		t.Errorf("only %v was seen", seen)
	}
}
