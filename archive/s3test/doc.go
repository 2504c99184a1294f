// Package s3test has a server that behaves like Amazon S3, for tests of this module. It is a test kit: no program imports it.
//
// [S3] stores objects, whole and in parts, checks who calls, and refuses as S3 does. It encrypts as S3 does: for SSE-KMS it asks a KMS, over the
// network, as who called, with the context that S3 has, and keeps nothing but ciphertext and the wrapped key. It can be told to fail, to refuse and to
// be dishonest about encryption, and records what it was asked.
//
// Buckets are paths. Of a signature only the scope and the time are looked at, not the HMAC: that a request was changed on its way shows in its
// checksums only. What the server does not know it refuses: a request fails the test, a header is NotImplemented.
package s3test

// Region and Account are those of a bucket that says nothing else, and of package kmstest.
const (
	Region  = "eu-central-1"
	Account = "111122223333"
)
