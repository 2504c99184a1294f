package luks

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// An attacker who can write to the disk, and fixes all checksums. want is a part of one reason.
func TestHostileHeaders(t *testing.T) {
	t.Parallel()

	list := func(v ...any) []any { return v }
	b64 := func(n int) string { return base64.StdEncoding.EncodeToString(make([]byte, n)) }
	seg := func(m tree) tree { return m.At("segments", "0") }
	slot := func(m tree) tree { return m.At("keyslots", "0") }
	dig := func(m tree) tree { return m.At("digests", "0") }
	tok := func(m tree) tree { return m.At("tokens", "0") }
	clone := func(m tree) tree {
		c := tree{}
		for k, v := range m {
			c[k] = v
		}
		return c
	}
	// second adds another keyslot at an offset.
	second := func(m tree, offset string) {
		s := clone(slot(m))
		a := clone(slot(m).At("area"))
		a["offset"] = offset
		s["area"] = map[string]any(a)
		m.At("keyslots")["1"] = map[string]any(s)
		dig(m)["keyslots"] = list("0", "1")
	}

	cases := []struct {
		name string
		want string
		edit func(tree)
	}{
		// The two that luks.go and cryptsetup 2.6.1 open with any passphrase, as plaintext.
		{"empty digest", "it is not 32 bytes long", func(m tree) { dig(m)["digest"] = "" }},
		{"null cipher", `cipher "cipher_null-ecb"`, func(m tree) { seg(m)["encryption"] = "cipher_null-ecb" }},
		{"null cipher of the area", `cipher "cipher_null-ecb"`, func(m tree) { slot(m).At("area")["encryption"] = "cipher_null-ecb" }},

		// The ones that make luks.go panic, eat all memory, or never end.
		{"sector size 0", "sector size 0", func(m tree) { seg(m)["sector_size"] = 0 }},
		{"argon2 time 0", "time 0", func(m tree) { lukstest.Argon2(slot(m), 0, 65536, 4) }},
		{"argon2 cpus 0", "cpus 0", func(m tree) { lukstest.Argon2(slot(m), 4, 65536, 0) }},
		{"argon2 cpus 256", "cpus 256", func(m tree) { lukstest.Argon2(slot(m), 4, 65536, 256) }},
		{"argon2 memory 4 TiB", "memory 4294967295", func(m tree) { lukstest.Argon2(slot(m), 4, 1<<32-1, 4) }},
		{"argon2 memory above cryptsetup's", "memory 4194305", func(m tree) { lukstest.Argon2(slot(m), 4, 4<<20+1, 4) }},
		{"argon2 memory below cryptsetup's", "memory 31 KiB", func(m tree) { lukstest.Argon2(slot(m), 4, 31, 4) }},
		{"argon2 time huge", "time 1001", func(m tree) { lukstest.Argon2(slot(m), 1001, 65536, 4) }},
		{"iterations 2^32-1", "keyslot 0: 4294967295 iterations", func(m tree) { slot(m).At("kdf")["iterations"] = 1<<32 - 1 }},
		{"iterations of the digest 2^32-1", "digest 0: 4294967295 iterations", func(m tree) { dig(m)["iterations"] = 1<<32 - 1 }},
		{"iterations of our slot", "1000001 iterations", func(m tree) { slot(m).At("kdf")["iterations"] = 1_000_001 }},
		{"iterations of our digest", "1000001 iterations", func(m tree) { dig(m)["iterations"] = 1_000_001 }},
		{"few iterations", "999 iterations", func(m tree) { slot(m).At("kdf")["iterations"] = 999 }},
		{"few iterations of the digest", "1 iterations", func(m tree) { dig(m)["iterations"] = 1 }},
		{"negative iterations", "-1 iterations", func(m tree) { dig(m)["iterations"] = -1 }},
		{"key size 0", "key size 0", func(m tree) { slot(m)["key_size"] = 0 }},
		{"key size huge", "key size 1099511627776", func(m tree) { slot(m)["key_size"] = 1 << 40 }},
		{"key size of AES-128", "key size 32", func(m tree) { slot(m)["key_size"] = 32 }},
		{"key size of the area", "key size 0", func(m tree) { slot(m).At("area")["key_size"] = 0 }},
		{"short digest", "it is not 32 bytes long", func(m tree) { dig(m)["digest"] = b64(31) }},
		{"long digest", "it is not 32 bytes long", func(m tree) { dig(m)["digest"] = b64(33) }},
		{"our slot with argon2", `kdf "argon2id"`, func(m tree) { lukstest.Argon2(slot(m), 4, 65536, 4) }},
		{"our slot with argon2 and a hash", `keyslot 0 has kdf "argon2id"`, func(m tree) {
			lukstest.Argon2(slot(m), 4, 65536, 4)
			slot(m).At("kdf")["hash"] = "sha256"
		}},
		{"our slot with sha512", `hashes "sha512" and "sha256"`, func(m tree) { slot(m).At("kdf")["hash"] = "sha512" }},
		{"our slot's splitter with sha512", `hashes "sha256" and "sha512"`, func(m tree) { slot(m).At("af")["hash"] = "sha512" }},

		{"sector size 1024", "sector size 1024", func(m tree) { seg(m)["sector_size"] = 1024 }},
		{"digest of sha1", `hash "sha1"`, func(m tree) { dig(m)["hash"] = "sha1" }},
		{"digest of another type", `type "none"`, func(m tree) { dig(m)["type"] = "none" }},
		{"digest not base64", "it is not 32 bytes long", func(m tree) { dig(m)["digest"] = "*" }},
		{"digest with a line end", "it is not 32 bytes long", func(m tree) { dig(m)["digest"] = dig(m)["digest"].(string) + "\n" }},
		{"salt of the digest empty", "digest 0: the salt", func(m tree) { dig(m)["salt"] = "" }},
		{"salt of the digest huge", "digest 0: the salt", func(m tree) { dig(m)["salt"] = b64(65) }},
		{"salt of the slot short", "keyslot 0: the salt", func(m tree) { slot(m).At("kdf")["salt"] = b64(15) }},
		{"digest without a segment", "0 digests", func(m tree) { dig(m)["segments"] = list() }},
		{"digest of another segment", `segment "1" does not exist`, func(m tree) { dig(m)["segments"] = list("1") }},
		{"digest of a segment twice", "it lists 2 segments", func(m tree) { dig(m)["segments"] = list("0", "0") }},
		{"digest of no keyslot", "does not list keyslot 0", func(m tree) { dig(m)["keyslots"] = list() }},
		{"digest of a missing keyslot", `keyslot "5" does not exist`, func(m tree) { dig(m)["keyslots"] = list("0", "5") }},
		{"two digests of the segment", "2 digests", func(m tree) {
			d := clone(dig(m))
			d["keyslots"] = list()
			m.At("digests")["1"] = map[string]any(d)
		}},
		{"two digests of the keyslot", "also is in digest 0", func(m tree) {
			d := clone(dig(m))
			d["segments"] = list()
			m.At("digests")["1"] = map[string]any(d)
		}},
		{"our slot in another digest", "does not list keyslot 0", func(m tree) {
			d := clone(dig(m))
			d["segments"] = list()
			m.At("digests")["1"] = map[string]any(d)
			dig(m)["keyslots"] = list()
		}},
		{"no digest", "0 digests", func(m tree) { m["digests"] = map[string]any{} }},
		{"digest whose id has escapes", "not an id", func(m tree) { m.At("digests")["\033[2J"] = map[string]any(clone(dig(m))) }},
		{"nine digests", `digest "8": not an id`, func(m tree) {
			d := clone(dig(m))
			d["segments"], d["keyslots"] = list(), list()
			m.At("digests")["8"] = map[string]any(d)
		}},

		{"data inside the header", "inside the header", func(m tree) { seg(m)["offset"] = "4096" }},
		{"data inside the keyslots", "inside the header", func(m tree) { seg(m)["offset"] = fmt.Sprint(KeyslotsOffset + keyslotsSize - 4096) }},
		{"data at 0", "inside the header", func(m tree) { seg(m)["offset"] = "0" }},
		{"data not aligned", "is not a multiple of 4096", func(m tree) { seg(m)["offset"] = fmt.Sprint(16<<20 + 512) }},
		{"data behind the device", "is not on the device", func(m tree) { seg(m)["offset"] = fmt.Sprint(imageSize) }},
		{"data at 2^63", "not a multiple", func(m tree) { seg(m)["offset"] = "9223372036854775808" }},
		{"negative data", "not a multiple", func(m tree) { seg(m)["offset"] = "-4096" }},
		{"data with a leading zero", "not a multiple", func(m tree) { seg(m)["offset"] = "016777216" }},
		{"fixed size 0", "does not fit", func(m tree) { seg(m)["size"] = "0" }},
		{"fixed size too large", "does not fit", func(m tree) { seg(m)["size"] = fmt.Sprint(imageSize) }},
		{"fixed size not of sectors", "not a multiple of the sector size", func(m tree) { seg(m)["size"] = "512" }},
		{"two segments", "exactly one segment", func(m tree) { m.At("segments")["1"] = map[string]any(clone(seg(m))) }},
		{"no segment", "exactly one segment", func(m tree) { m["segments"] = map[string]any{} }},
		{"segment 1 only", "exactly one segment", func(m tree) {
			m["segments"] = map[string]any{"1": map[string]any(seg(m))}
			dig(m)["segments"] = list("1")
		}},
		{"linear segment", `type "linear"`, func(m tree) { seg(m)["type"] = "linear" }},
		{"iv_tweak", `iv_tweak "8"`, func(m tree) { seg(m)["iv_tweak"] = "8" }},
		{"integrity", "integrity", func(m tree) { seg(m)["integrity"] = map[string]any{"type": "hmac(sha256)"} }},
		{"segment of a reencryption", "flags", func(m tree) { seg(m)["flags"] = list("backup-final") }},
		{"requirements", "online-reencrypt", func(m tree) {
			m.At("config")["requirements"] = map[string]any{"mandatory": list("online-reencrypt-v2")}
		}},
		{"unknown kind of requirements", "shape of LUKS2", func(m tree) {
			m.At("config")["requirements"] = map[string]any{"optional": list("x")}
		}},
		{"unknown flag", `unknown flag "high-priority"`, func(m tree) { m.At("config")["flags"] = list("high-priority") }},
		{"json_size", "json_size", func(m tree) { m.At("config")["json_size"] = "16384" }},
		{"keyslots_size no number", `keyslots_size "x"`, func(m tree) { m.At("config")["keyslots_size"] = "x" }},
		{"keyslots_size odd", "keyslots_size", func(m tree) { m.At("config")["keyslots_size"] = "5000" }},
		{"keyslots_size huge", "keyslots_size", func(m tree) { m.At("config")["keyslots_size"] = fmt.Sprint(128<<20 + 4096) }},
		{"keyslots over the data", "inside the header", func(m tree) { m.At("config")["keyslots_size"] = fmt.Sprint(16 << 20) }},

		// What is quoted is cut, so that the rest of the reason is read.
		{"area with a long cipher", `…", key size 64`, func(m tree) { slot(m).At("area")["encryption"] = strings.Repeat("x", 2000) }},
		{"area in the header", "not in the keyslots area", func(m tree) { slot(m).At("area")["offset"] = "16384" }},
		{"area in the data", "not in the keyslots area", func(m tree) { slot(m).At("area")["offset"] = fmt.Sprint(16 << 20) }},
		{"area over the end", "not in the keyslots area", func(m tree) { slot(m).At("area")["size"] = fmt.Sprint(16 << 20) }},
		{"area of 8 EiB", "not in the keyslots area", func(m tree) { slot(m).At("area")["size"] = fmt.Sprint(1<<63 - 4096) }},
		{"area too small", "too small", func(m tree) { slot(m).At("area")["size"] = "4096" }},
		{"area of an odd size", "not aligned", func(m tree) { slot(m).At("area")["size"] = "258560" }},
		{"area not aligned", "not aligned", func(m tree) { slot(m).At("area")["offset"] = "33280" }},
		{"area of another type", `area of type "journal"`, func(m tree) { slot(m).At("area")["type"] = "journal" }},
		{"areas the same", "overlap", func(m tree) { second(m, "32768") }},
		{"areas overlap", "overlap", func(m tree) { second(m, fmt.Sprint(32768+4096)) }},
		{"slot of a reencryption", `type "reencrypt"`, func(m tree) { slot(m)["type"] = "reencrypt" }},
		{"splitter of another hash", "anti-forensic", func(m tree) { slot(m).At("af")["hash"] = "sha1" }},
		{"splitter of another type", `anti-forensic splitter "luks2"`, func(m tree) { slot(m).At("af")["type"] = "luks2" }},
		{"splitter of one stripe", "anti-forensic", func(m tree) { slot(m).At("af")["stripes"] = 1 }},
		{"unknown kdf of another slot", `keyslot 1: kdf "scrypt"`, func(m tree) {
			second(m, "290816")
			k := clone(slot(m).At("kdf"))
			k["type"] = "scrypt"
			m.At("keyslots", "1")["kdf"] = map[string]any(k)
		}},
		{"unknown kdf", `kdf "scrypt"`, func(m tree) { slot(m).At("kdf")["type"] = "scrypt" }},
		{"pbkdf2 of sha1", `hash "sha1"`, func(m tree) { slot(m).At("kdf")["hash"] = "sha1" }},
		{"priority", "priority 7", func(m tree) { slot(m)["priority"] = 7 }},
		{"slot 32", `keyslot "32": not an id`, func(m tree) { second(m, "290816"); m.At("keyslots")["32"] = m.At("keyslots")["1"] }},
		{"slot 00", `keyslot "00": not an id`, func(m tree) { second(m, "290816"); m.At("keyslots")["00"] = m.At("keyslots")["1"] }},

		{"stripped token", "no luks-kms-agent token", func(m tree) { m["tokens"] = map[string]any{} }},
		{"renamed token", "no luks-kms-agent token", func(m tree) { tok(m)["type"] = "luks-kms-agenT" }},
		{"two tokens of ours", "2 luks-kms-agent tokens", func(m tree) { m.At("tokens")["1"] = map[string]any(tok(m)) }},
		{"token without a type", "no type", func(m tree) { m.At("tokens")["1"] = map[string]any{"keyslots": list()} }},
		{"token with an empty type", "token 1: it has no type", func(m tree) { m.At("tokens")["1"] = map[string]any{"type": "", "keyslots": list()} }},
		{"token that is a list", "no type", func(m tree) { m.At("tokens")["1"] = list() }},
		{"token of a missing slot", "keyslot 9 does not exist", func(m tree) { tok(m)["keyslots"] = list("9") }},
		{"token of two slots", "2 keyslots", func(m tree) { tok(m)["keyslots"] = list("0", "0") }},
		{"token of slot -1", "not an id", func(m tree) { tok(m)["keyslots"] = list("-1") }},
		{"token of a future", "version is 2", func(m tree) { tok(m)["version"] = 2 }},
		{"token with more", "unknown field", func(m tree) { tok(m)["more"] = 1 }},
		{"token with a null", "null", func(m tree) { tok(m)["mac"] = nil }},
		{"token with folded keys", "none of LUKS2", func(m tree) { tok(m)["MAC"] = tok(m)["mac"] }},
		{"short MAC", "MAC is not", func(m tree) { tok(m)["mac"] = b64(16) }},
		{"empty wrapped key", "wrapped key", func(m tree) { tok(m)["wrapped_key"] = "" }},
		{"huge wrapped key", "wrapped key", func(m tree) { tok(m)["wrapped_key"] = b64(6145) }},
		{"empty ARN", "key ARN", func(m tree) { tok(m)["key_arn"] = "" }},
		{"ARN with a line end", "key ARN", func(m tree) { tok(m)["key_arn"] = "arn:\n" }},
		{"token 32", `token "32": not an id`, func(m tree) { m.At("tokens")["32"] = map[string]any{"type": "x"} }},

		{"unknown field", "unknown field", func(m tree) { seg(m)["more"] = 1 }},
		{"a section more", "unknown field", func(m tree) { m["more"] = 1 }},
		{"number as text", "shape of LUKS2", func(m tree) { slot(m)["key_size"] = "64" }},
		{"number with a fraction", "shape of LUKS2", func(m tree) { dig(m)["iterations"] = json.Number("1000.5") }},
		{"number as a power", "shape of LUKS2", func(m tree) { dig(m)["iterations"] = json.Number("1e3") }},
		{"null", "null", func(m tree) { seg(m)["integrity"] = nil }},
		{"folded key", "none of LUKS2", func(m tree) { m["Segments"] = m["segments"] }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := volume(t)
			edit(t, path, c.edit)
			refused(t, path, c.want)
		})
	}
}

// refused asserts that a header which is valid as such is not trusted, for a reason with want in it, and opens by no way.
func refused(t *testing.T, path, want string) {
	t.Helper()
	i := inspected(t, path)
	if i.Pass() || i.Kind != KindLUKS2 || !i.Ours || i.Header == nil {
		t.Errorf("pass %v, kind %s, ours %v, reasons %q", i.Pass(), i.Kind, i.Ours, i.Reasons)
	}
	if all := strings.Join(i.Reasons, "\n"); !strings.Contains(all, want) {
		t.Errorf("no reason with %q: %q", want, i.Reasons)
	}
	for _, r := range i.Reasons {
		if printable([]byte(r)) != r {
			t.Errorf("a terminal could take this for more than text: %q", r)
		}
	}
	if err := i.Verify(rightKey()); err == nil {
		t.Error("verified")
	} else if r := reasons(t, err); !strings.Contains(r, want) {
		t.Errorf("verify: %v", err)
	}
	if _, err := i.unseal(rightKey(), nil); err == nil {
		t.Error("unsealed")
	}
}

// Text that no decoder of ours would make.
func TestHostileText(t *testing.T) {
	t.Parallel()

	replace := func(old, new string) func(string) string {
		return func(s string) string {
			if !strings.Contains(s, old) {
				panic("nothing to replace")
			}
			return strings.Replace(s, old, new, 1)
		}
	}
	for _, c := range []struct {
		name, want string
		edit       func(string) string
	}{
		{"duplicate section", `"segments" is there twice`, replace(`"segments":{`, `"segments":{},"segments":{`)},
		{"duplicate field", `"encryption" is there twice`, replace(`"iv_tweak":"0",`, `"iv_tweak":"0","encryption":"cipher_null-ecb",`)},
		{"duplicate by escape", `"encryption" is there twice`, replace(`"iv_tweak":"0",`, `"iv_tweak":"0","encryptio\u006e":"cipher_null-ecb",`)},
		{"duplicate in a token", `"mac" is there twice`, replace(`"mac":`, `"mac":"","mac":`)},
		{"kelvin sign", "none of LUKS2", replace(`"keyslots":{`, "\"\u212aeyslots\":{},\"keyslots\":{")},
		{"not UTF-8", "not UTF-8", replace(`"dynamic"`, "\"dynamic\xff\"")},
		{"two objects", "malformed", func(s string) string { return s + s }},
		{"a list", "not an object", func(s string) string { return "[" + s + "]" }},
		{"leading space", "not an object", func(s string) string { return " " + s }},
		{"cut short", "malformed", func(s string) string { return s[:len(s)-1] }},
		{"deep", "too deeply", replace(`"tokens":{`, `"tokens":{"1":{"type":"x","y":`+strings.Repeat("[", 100)+strings.Repeat("]", 100)+`},`)},
		{"all deep", "malformed", func(string) string { return "{\"a\":" + strings.Repeat("[", 12000) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := volume(t)
			editText(t, path, c.edit)
			i := inspected(t, path)
			if i.Pass() || i.Kind != KindLUKS2 || !strings.Contains(strings.Join(i.Reasons, "\n"), c.want) {
				t.Errorf("kind %s, reasons %q", i.Kind, i.Reasons)
			}
			reasons(t, i.Verify(rightKey()))
		})
	}
}

// The JSON area itself, and the binary header before it.
func TestHostileBinary(t *testing.T) {
	t.Parallel()

	for _, c := range []struct {
		name, want string
		edit       func(b []byte)
	}{
		{"JSON without an end", "has no end", func(b []byte) {
			for i := len(trimNUL(b[binarySize:])) + binarySize; i < len(b); i++ {
				b[i] = ' '
			}
		}},
		{"bytes after the end", "bytes after its end", func(b []byte) { b[len(b)-1] = 1 }},
		{"empty JSON", "not an object", func(b []byte) { lukstest.SetText(b, nil) }},
		{"UUID as path", "is not a UUID", func(b []byte) { copy(b[offUUID:], "../../../../../../../etc/cron.d/xxxx") }},
		{"UUID cut short", "is not a UUID", func(b []byte) { clear(b[offUUID+8 : offUUID+lenUUID]) }},
		{"no UUID", "is not a UUID", func(b []byte) { clear(b[offUUID : offUUID+lenUUID]) }},
		{"UUID with more", "is not a UUID", func(b []byte) { copy(b[offUUID:], testUUID+"0000") }},
		{"UUID without dashes", "is not a UUID", func(b []byte) { copy(b[offUUID:], strings.ReplaceAll(testUUID, "-", "0")) }},
		{"UUID in upper case", "is not a UUID", func(b []byte) { copy(b[offUUID:], strings.ToUpper(testUUID)) }},
		{"UUID without an end", "is not a UUID", func(b []byte) { copy(b[offUUID:], strings.Repeat("a", lenUUID)) }},
		{"label with escapes", "not printable", func(b []byte) { copy(b[offLabel:], "\033[2J") }},
		{"label not UTF-8", "not printable", func(b []byte) { b[offLabel] = 0xff }},
		{"subsystem with escapes", "not printable", func(b []byte) { copy(b[offSubsystem:], "luks-kms-agent\033[2J") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := volume(t)
			rewrite(t, path, primaryAt, c.edit)
			rewrite(t, path, secondaryAt, c.edit)
			refused(t, path, c.want)
			h := inspected(t, path).Header
			if !utf8.ValidString(h.Label) || strings.Contains(h.Label, "\033") || strings.ContainsAny(h.UUID, "/A") {
				t.Errorf("%+v", h)
			}
		})
	}
}

// Sizes, places and algorithms that make a copy invalid as such.
func TestInvalidCopies(t *testing.T) {
	t.Parallel()

	for name, change := range map[string]func(b []byte){
		"size 0":             func(b []byte) { clear(b[offSize : offSize+8]) },
		"size huge":          func(b []byte) { b[offSize] = 0x80 },
		"size not listed":    func(b []byte) { b[offSize+6] = 0x60 },
		"size of the device": func(b []byte) { copy(b[offSize:], "\x00\x00\x00\x00\x00\x40\x00\x00") },
		"version 3":          func(b []byte) { b[offVersion+1] = 3 },
		"another place":      func(b []byte) { b[offOffset+6] ^= 0x80 },
		"another checksum":   func(b []byte) { copy(b[offAlgorithm:], "sha512") },
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			rewrite(t, path, primaryAt, change)
			rewrite(t, path, secondaryAt, change)
			if i := inspected(t, path); i.Kind != KindTorn || i.Pass() || i.Header != nil || len(i.Reasons) != 1 {
				t.Errorf("%+v", i)
			}
		})
	}
}

func TestManyReasonsAreCut(t *testing.T) {
	path := volume(t)
	edit(t, path, func(m tree) {
		flags := make([]any, 500)
		for i := range flags {
			flags[i] = "x"
		}
		m.At("config")["flags"] = flags
	})
	if i := inspected(t, path); len(i.Reasons) != maxReasons {
		t.Errorf("%d reasons", len(i.Reasons))
	}
}

// What an operator may do with plain cryptsetup, and what it looks like afterwards.
func TestOperatorsChangesAreFine(t *testing.T) {
	t.Parallel()

	pass := string(rightKey().Passphrase())
	for name, change := range map[string]func(t *testing.T, path string){
		"a recovery passphrase": func(t *testing.T, path string) {
			keyFile := t.TempDir() + "/key"
			if err := makeImage(keyFile, []byte(pass), 44); err != nil {
				t.Fatal(err)
			}
			mustRun(t, []byte("recovery"), "cryptsetup", "luksAddKey", "--batch-mode", "--pbkdf", "argon2id", "--pbkdf-force-iterations", "4",
				"--pbkdf-memory", "64", "--pbkdf-parallel", "1", "--key-file", keyFile, path, "-")
			if h := inspected(t, path).Header; len(h.Keyslots) != 2 || h.Keyslots[1].KDF != "argon2id" || h.Keyslots[1].Iterations != 4 {
				t.Errorf("%+v", h.Keyslots)
			}
		},
		"a token of another": func(t *testing.T, path string) {
			mustRun(t, []byte(`{"type":"clevis","keyslots":[],"jwe":{"Protected":null,"x":[[1]]}}`), "cryptsetup", "token", "import", "--json-file=-", path)
			if h := inspected(t, path).Header; len(h.Tokens) != 2 || h.Tokens[1] != "clevis" || h.Token == nil {
				t.Errorf("%+v", h)
			}
		},
		"another label": func(t *testing.T, path string) {
			mustRun(t, nil, "cryptsetup", "config", "--label", "new", "--subsystem", "", path)
			if i := inspected(t, path); i.Header.Label != "new" || !i.Ours {
				t.Errorf("%+v", i.Header)
			}
		},
		"a preferred slot": func(t *testing.T, path string) {
			mustRun(t, nil, "cryptsetup", "config", "--priority", "prefer", "--key-slot", "0", path)
		},
		"known flags": func(t *testing.T, path string) {
			edit(t, path, func(m tree) {
				m.At("config")["flags"] = []any{"allow-discards", "same-cpu-crypt", "submit-from-crypt-cpus", "no-read-workqueue", "no-write-workqueue"}
			})
		},
		// What systemd-cryptenroll asks libcryptsetup for.
		"a slot with sha512": func(t *testing.T, path string) {
			keyFile := t.TempDir() + "/key"
			if err := makeImage(keyFile, []byte(pass), 44); err != nil {
				t.Fatal(err)
			}
			mustRun(t, []byte("recovery"), "cryptsetup", "luksAddKey", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
				"--hash", "sha512", "--key-file", keyFile, path, "-")
			edit(t, path, func(m tree) { // only to look: the test means something while cryptsetup writes both
				if s := m.At("keyslots", "1"); s.At("kdf")["hash"] != "sha512" || s.At("af")["hash"] != "sha512" {
					t.Errorf("slot %v", s)
				}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := volume(t)
			change(t, path)
			i := inspected(t, path)
			if !i.Pass() || !i.Ours || i.Verify(rightKey()) != nil {
				t.Errorf("reasons %q, verify %v", i.Reasons, i.Verify(rightKey()))
			}
		})
	}
}

// A stranger erased the slots, and a cut came between the two copies: it is not empty, as the older copy has slots, and not sound.
func TestNoKeyslotsInTheNewerCopy(t *testing.T) {
	t.Parallel()

	path := volume(t)
	edit(t, path, func(m tree) { m["tokens"] = tree{} })
	rewrite(t, path, primaryAt, func(b []byte) { setSeqID(b, 100); clear(b[offSubsystem : offSubsystem+lenSubsystem]) })
	old := read(t, path, secondaryAt, 0x4000)
	edit(t, path, func(m tree) { m["keyslots"] = tree{}; m.At("digests", "0")["keyslots"] = []any{} })
	write(t, path, secondaryAt, old)
	if i := inspected(t, path); i.Pass() || i.Kind != KindLUKS2 || i.Ours || !slices.Equal(i.Reasons, []string{"there are no keyslots"}) {
		t.Errorf("%+v", i)
	}
}

// Facts of a header that is refused are shown too: a size that is none is 0.
func TestKeySizesThatAreNone(t *testing.T) {
	t.Parallel()

	for size, want := range map[int64]int{64: 512, 0: 0, -64: 0, 1<<20 + 1: 0, 1 << 62: 0} {
		path := volume(t)
		edit(t, path, func(m tree) { m.At("keyslots", "0")["key_size"] = size })
		if h := inspected(t, path).Header; h.KeySize != want || h.Keyslots[0].KeySize != want {
			t.Errorf("%d bytes: %d, %+v", size, h.KeySize, h.Keyslots)
		}
	}
}

// A header that passes is not a volume of ours.
func TestStrangersHeaders(t *testing.T) {
	t.Parallel()

	format := func(t *testing.T, args ...string) string {
		path := blank(t, imageSize)
		args = append([]string{"luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "64"}, args...)
		mustRun(t, rightKey().Passphrase(), "cryptsetup", append(args, "--key-file=-", path)...)
		return path
	}
	i := inspected(t, format(t))
	if !i.Pass() || i.Ours || i.Header.Token != nil {
		t.Errorf("cryptsetup's default: %+v", i)
	}
	if r := reasons(t, i.Verify(rightKey())); !strings.Contains(r, "no luks-kms-agent token") {
		t.Error(r)
	}
	i = inspected(t, format(t, "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"))
	if i.Pass() || i.Ours || i.Kind != KindLUKS2 || i.Header.Cipher != "aes-cbc-essiv:sha256" {
		t.Errorf("another cipher: %+v", i)
	}
	i = inspected(t, format(t, "--subsystem", "luks-kms-agent"))
	if i.Pass() || !i.Ours || len(i.Reasons) != 1 || i.Reasons[0] != reasonNoToken {
		t.Errorf("our subsystem without our token: %+v", i)
	}
	// Larger headers than ours.
	i = inspected(t, format(t, "--luks2-metadata-size", "64k", "--luks2-keyslots-size", "1m"))
	if !i.Pass() || i.Header.Offset < 128<<10+1<<20 {
		t.Errorf("a larger header: %+v %+v", i, i.Header)
	}
}
