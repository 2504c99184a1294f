// Package s3test is S3 as far as package archive needs it, for tests. It stores, refuses and fails as S3 does, and encrypts as S3 does: for
// SSE-KMS it asks a KMS, over the network, with the context that S3 has, and keeps nothing but ciphertext.
//
// Not checked are the signature itself (its credential scope and time are), bucket policies and ACLs. There is no versioning, no multipart upload, and
// buckets are paths.
package s3test
