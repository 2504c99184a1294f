// Package archive keeps things in S3 under a customer managed KMS key. It is the only package that knows S3.
package archive
