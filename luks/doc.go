// Package luks is the only code that knows LUKS: it inspects, formats, opens, restores and closes volumes. It is also the only
// code that runs cryptsetup, and it runs it only to write headers; opening happens in process, and so do [RestoreHeader] and [Wipe], where
// the order of writes matters.
//
// It knows nothing of AWS, of records or of policy. It never decides whether a device may be formatted: the caller does. It
// never keeps a secret: a [Key] is borrowed for the length of a call.
//
// # What is trusted
//
// A disk is untrusted input. Whoever could write to it can also fix its checksums, so neither cryptsetup's nor luks.go's
// checks are enough: both accept any passphrase where a header has an empty digest, and map plaintext where the cipher is
// cipher_null. Three things therefore stand before a mapping, in this order:
//
//  1. [Inspect] reads both header copies once, judges every field against what [Format] and plain cryptsetup write, and says in
//     [Inspection.Reasons] what it does not accept. It keeps what it judged, and only that is used; Open reads the
//     disk once more, to refuse a header that changed while the key was being fetched.
//  2. [Inspection.Verify] and [Inspection.Open] build a new, minimal header from the judged values (one keyslot, one digest, one
//     segment), put it with the keyslot's area into a memory file and let luks.go unseal that. So luks.go never parses bytes
//     that came from a disk, and no difference between two JSON parsers matters.
//  3. The unsealed volume is compared with what was judged, and the MAC in our token must hold under the data key.
//
// # Verdict and ownership
//
// Passing ([Inspection.Pass]) is about shape only: a LUKS2 header that this package could open safely. A LUKS2 volume that
// somebody else made passes if its shape is sound; [Inspection.Ours] is false then and it cannot be opened by this package.
// A header of our subsystem without our token does not pass: it has nothing that authenticates it.
//
// # Two copies of the header
//
// LUKS2 keeps the header twice. cryptsetup writes the primary first, then the secondary, with an fsync after each.
//
//   - Both valid and the same: the usual case.
//   - The secondary is damaged or older: [Inspection.SecondaryDamaged]. This is what a cut between the two writes leaves. The
//     primary is used; cryptsetup will rewrite the secondary when it next runs.
//   - Both valid, but the secondary is newer, or they have the same sequence id and differ: refused. No order of writes by
//     cryptsetup leaves this, and cryptsetup would follow the secondary without a word.
//   - Only the secondary is valid: [Inspection.PrimaryDamaged] if it passes every check and the place of the primary holds
//     either a header that was damaged or zeros. If it holds anything else (a filesystem, a swap signature), the header is
//     refused, because a restore would overwrite that. [RestorePrimary] lets cryptsetup write the primary again.
//   - Neither is valid: [KindTorn] if there is any LUKS magic, or nothing but JSON text of a header where its copies stand (a
//     cut left that alone); else [KindNone].
//
// An I/O error is always an error, never a damaged copy and never [KindNone].
//
// # The token
//
// A LUKS2 token of type "luks-kms-agent":
//
//	{
//	  "type": "luks-kms-agent",
//	  "keyslots": ["0"],          exactly one: the slot that the data key opens
//	  "version": 1,
//	  "key_arn": "arn:aws:kms:…", the KMS key that wrapped the data key; printable ASCII, 1 to 2048 bytes
//	  "wrapped_key": "…",         KMS ciphertext, standard base64 with padding; 1 to 6144 bytes (the limit of KMS Decrypt)
//	  "mac": "…"                  32 bytes, standard base64 with padding
//	}
//
// The passphrase of the slot is the standard base64 of the 32-byte data key: 44 bytes, no newline. So the break-glass path
// needs nothing but a KMS Decrypt and cryptsetup.
//
// # The MAC
//
//	mac key = HKDF-SHA256(secret: the 32 bytes of the data key, no salt, info: "luks-kms-agent token mac v1", 32 bytes)
//	mac     = HMAC-SHA256(mac key, document)
//
// The document is JSON without white space, with the keys of every object in ascending order:
//
//	{"digests":{"0":{"digest":"…","hash":"sha256","iterations":1000,"salt":"…","segments":["0"],"type":"pbkdf2"}},
//	 "segments":{"0":{"encryption":"aes-xts-plain64","iv_tweak":"0","offset":"16777216","sector_size":4096,"size":"dynamic","type":"crypt"}},
//	 "uuid":"…","version":1}
//
// (one line). "digests" holds the digest of segment 0, the one that identifies the volume key, without its "keyslots"; "segments"
// is the header's own; uuid is the header's; version is the token's. Values stand as they do in the header.
//
// So the MAC binds UUID, volume key, cipher, sector size and place of the data to the data key. It leaves out on purpose:
//
//   - the list of keyslots in the digest, and the keyslots: an operator may add a recovery passphrase with plain cryptsetup,
//     and a volume key is authenticated by its digest, whichever slot it came from;
//   - key_arn and wrapped_key: whoever changes them gains a failed KMS Decrypt and nothing else, since what KMS returns has to
//     be the data key for the MAC to hold, and re-wrapping under another KMS key must not need the data key. A caller must
//     still check that it is willing to use the ARN before it calls KMS with it;
//   - label and subsystem, which are names, and persistent flags, of which only those on a list are accepted. An attacker can
//     set allow-discards there, which would show which blocks are in use, but neither content nor control.
//
// # Recovery keys
//
// A recovery key opens a key slot of its own, without KMS. The slot is made as the data key's is, pbkdf2 with 1000 iterations: the passphrase
// carries 160 random bits, so there is nothing to guess that more iterations would slow down. A token of type "luks-kms-agent-recovery" names it:
//
//	{
//	  "type": "luks-kms-agent-recovery",
//	  "keyslots": ["1"],                 one; none after a removal that was cut
//	  "version": 1,
//	  "created": "2026-01-31T08:15:30Z", RFC 3339, UTC
//	  "mac": "…"                         32 bytes, standard base64 with padding
//	}
//
// Its MAC is that of the token above, over the same document, but under a key of its own, so that the header can be authenticated without the
// data key:
//
//	mac key = HKDF-SHA256(secret: the 20 bytes of the recovery key, no salt, info: "luks-kms-agent recovery token mac v1", 32 bytes)
//
// [Inspection.OpenRecovery] does all that Open does, with that MAC and that slot: the strict check, the bounds on what is computed, the minimal
// header in memory, the comparison. A recovery token with which something is wrong ([RecoveryToken].Problem) does not keep the data key from opening
// the volume: whoever can write it could as well remove it.
package luks
