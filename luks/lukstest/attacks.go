package lukstest

import "bytes"

// An Attack changes both copies of a header. A header that [github.com/luks-kms-agent/luks-kms-agent/luks.Format] wrote is
// attacked; its data begins at 16 MiB and nothing is assumed of the size of the disk but 64 KiB behind that.
type Attack struct {
	Name string
	// Reason is a part of what the strict check, alone, refuses it for; "" where it does not.
	Reason string
	// MAC says that the MAC, alone, refuses it.
	MAC bool
	// Why only one of the two does.
	Why Blind

	edit func(Tree)
	raw  func(header []byte) // instead of edit
}

// A Blind says why one of the checks does not see an attack.
type Blind string

// Why the MAC alone, or the strict check alone, does not refuse an attack.
const (
	// Slots: keyslots are not under the MAC, because operators may change them with cryptsetup.
	Slots Blind = "keyslots are not under the MAC"
	// InTheWay: the MAC does not hold, but only after luks.go has worked on the value: without the key's slot opened, a wrong key
	// and a tampered header look the same.
	InTheWay Blind = "luks.go works on it before the MAC can speak"
	// Wrapping: it is not content, and what the MAC covers is the same.
	Wrapping Blind = "what the MAC covers is the same"
	// Plausible: the value is one that Format or an operator could have written, only not for this volume.
	Plausible Blind = "the value is allowed, only not this volume's"
)

// Do makes the attack on a disk or image.
func (a Attack) Do(path string) error {
	if a.raw == nil {
		return Edit(path, a.edit)
	}
	return Rewrite(path, func(header []byte) error { a.raw(header); return nil })
}

// Attacks are the known ones.
func Attacks() []Attack {
	segment := func(m Tree) Tree { return m.At("segments", "0") }
	slot := func(m Tree) Tree { return m.At("keyslots", "0") }
	digest := func(m Tree) Tree { return m.At("digests", "0") }
	return []Attack{
		{Name: "empty digest, which any passphrase opens", MAC: true, Reason: "not 32 bytes long", edit: func(m Tree) { digest(m)["digest"] = "" }},
		{Name: "null cipher, which maps plaintext", MAC: true, Reason: `cipher "cipher_null-ecb"`, edit: func(m Tree) { segment(m)["encryption"] = "cipher_null-ecb" }},
		{Name: "another cipher", MAC: true, Reason: `cipher "aes-xts-plain"`, edit: func(m Tree) { segment(m)["encryption"] = "aes-xts-plain" }},
		{Name: "iv_tweak", MAC: true, Reason: `iv_tweak "8"`, edit: func(m Tree) { segment(m)["iv_tweak"] = "8" }},
		{Name: "data over the key slots", MAC: true, Reason: "inside the header", edit: func(m Tree) { segment(m)["offset"] = "32768" }},
		{Name: "another type of segment", MAC: true, Reason: `type "linear"`, edit: func(m Tree) { segment(m)["type"] = "linear" }},

		{Name: "sector size 0, a panic", Why: InTheWay, Reason: "sector size 0", edit: func(m Tree) { segment(m)["sector_size"] = 0 }},
		{Name: "hash of the digest too short, a panic", Why: InTheWay, Reason: `hash "sha1"`, edit: func(m Tree) { digest(m)["hash"] = "sha1" }},
		{Name: "endless digest", Why: InTheWay, Reason: "4294967295 iterations", edit: func(m Tree) { digest(m)["iterations"] = uint32(1<<32 - 1) }},

		{Name: "JSON without an end, a panic", Why: Wrapping, Reason: "has no end", raw: func(header []byte) {
			rest := header[Binary+len(Text(header)):]
			copy(rest, bytes.Repeat([]byte(" "), len(rest)))
		}},
		{Name: "unknown requirements", Why: Wrapping, Reason: "online-reencrypt", edit: func(m Tree) {
			m.At("config")["requirements"] = map[string]any{"mandatory": []any{"online-reencrypt-v2"}}
		}},

		{Name: "endless slot", Why: Slots, Reason: "4294967295 iterations", edit: func(m Tree) { slot(m).At("kdf")["iterations"] = uint32(1<<32 - 1) }},
		{Name: "argon2 of 4 TiB", Why: Slots, Reason: "memory 4294967295", edit: func(m Tree) { Argon2(slot(m), 4, 1<<32-1, 4) }},
		{Name: "argon2 time 0, a panic", Why: Slots, Reason: "time 0", edit: func(m Tree) { Argon2(slot(m), 0, 65536, 4) }},
		{Name: "argon2 cpus 0, a panic", Why: Slots, Reason: "cpus 0", edit: func(m Tree) { Argon2(slot(m), 4, 65536, 0) }},
		{Name: "argon2 cpus 256, a panic", Why: Slots, Reason: "cpus 256", edit: func(m Tree) { Argon2(slot(m), 4, 65536, 256) }},
		{Name: "key size 0, a panic", Why: Slots, Reason: "key size 0", edit: func(m Tree) { slot(m)["key_size"] = 0 }},
		{Name: "key size of 1 TiB", Why: Slots, Reason: "key size 1099511627776", edit: func(m Tree) { slot(m)["key_size"] = int64(1 << 40) }},
		{Name: "area of 8 EiB", Why: Slots, Reason: "not in the keyslots area", edit: func(m Tree) { slot(m).At("area")["size"] = "9223372036854771712" }},
		{Name: "null cipher of the area", Why: Slots, Reason: `cipher "cipher_null-ecb"`, edit: func(m Tree) { slot(m).At("area")["encryption"] = "cipher_null-ecb" }},

		{Name: "data moved", MAC: true, Why: Plausible, edit: func(m Tree) { segment(m)["offset"] = "16781312" }},
		{Name: "data cut short", MAC: true, Why: Plausible, edit: func(m Tree) { segment(m)["size"] = "8192" }},
		{Name: "other sectors", MAC: true, Why: Plausible, edit: func(m Tree) { segment(m)["sector_size"] = 512 }},
		{Name: "another UUID", MAC: true, Why: Plausible, raw: func(header []byte) {
			digit := &header[uuidAt]
			if *digit++; *digit != '1' {
				*digit = '0'
			}
		}},
	}
}

// Argon2 turns a keyslot into one of argon2id; memory is in KiB.
func Argon2(slot Tree, time, memory, cpus int64) {
	k := slot.At("kdf")
	delete(k, "hash")
	delete(k, "iterations")
	k["type"], k["time"], k["memory"], k["cpus"] = "argon2id", time, memory, cpus
}
