// Package keycache owns the node's data keys: it gets them from AWS KMS,
// holds them in locked memory while they are needed, and keeps their wrapped
// form, with what is known of each volume, as records on the boot volume. It
// is the only package that talks to KMS and to the instance metadata service,
// and the only one that sees a data key before LUKS does.
//
// It never touches a data volume, never decides what happens to one, and never
// deletes a record: what is no longer valid is moved to archive/ or
// quarantine/, byte for byte.
//
// # Keys
//
// A data key is 32 random bytes made by KMS. The LUKS passphrase is its
// standard base64: 44 bytes without a newline, which is what
// "aws kms decrypt --query Plaintext --output text" prints. A [Key] lives in
// its own locked mapping outside the Go heap and prints as [key] everywhere.
//
// A recovery key is not KMS's: 160 random bits that this package makes, writes as
// text for people and reads back ([NewRecoveryKey], [ParseRecoveryKey]). It is here, and
// not in luks, because it is a secret in memory as a data key is: the same locked
// pages, the same redaction, the same search for copies.
//
// While a key is used there are copies of it that nobody can reach to wipe: the
// JSON text of KMS's answer, TLS's buffers, what hashes keep. [ProtectMemory],
// called first, keeps them where they are, and [WipeAll], at the end, searches
// memory for them and overwrites them.
//
// # KMS and credentials
//
// A [Client] is built from its [Options] alone. Region and credentials come
// from IMDSv2; no environment variable, shared configuration file or proxy
// setting can point it at another key source, and no redirect is followed.
// LUKS calls carry no encryption context, as Amazon EMR's do not.
//
// # Records
//
// A [Store] is a directory, 0700, with
//
//	lock                          held by flock while an agent works
//	keys/<key-id>.json            KeyRecord
//	volumes/<luks-uuid>.json      VolumeRecord
//	archive/volumes/<luks-uuid>.<time>.json, .why.json
//	quarantine/<time>/why.json, keys/, volumes/
//
// Every record is one JSON object, 0600, with a version; it is written as
// temporary file, fsync, rename (or link, where nothing may be replaced),
// fsync of the directory, and read back. Names that start with ".tmp-" are
// what a cut left behind; they were never a record.
package keycache
