// Package kmstest has servers that behave like AWS KMS and the EC2 instance
// metadata service, for tests of this module. It is a test kit: no program
// imports it.
//
// [KMS] stores keys, wraps by AES-GCM bound to key and encryption context,
// checks who calls, and refuses as KMS does. [IMDS] is IMDSv2: no token, no
// answer. Both can be told to fail, and record what they were asked.
package kmstest

// Region, Account and the names of the node that the servers have unless told
// otherwise.
const (
	Region       = "eu-central-1"
	Account      = "111122223333"
	InstanceID   = "i-0123456789abcdef0"
	InstanceType = "i4i.large"
	Role         = "node-role"
)
