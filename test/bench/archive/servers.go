package main

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/test/bench/alone"
)

const bucket = "logs"

// places is where the servers are.
type places struct {
	IMDS, KMS, S3 string // URLs
	Key           string // ARN
}

// stored is what a subject has put into the bucket.
type stored struct {
	Objects int
	Bytes   int64  // compressed
	SHA256  string // of the log, read back, decrypted and decompressed
}

// serve is a process by itself, so that its memory is not the subject's: an IMDS, a KMS and an S3, until in ends. It tells their places first, and what
// the subject has put there last.
func serve(in io.Reader, out io.Writer) error {
	return alone.With(func(t testing.TB) error {
		imds, kms := kmstest.NewIMDS(t), kmstest.NewKMS(t)
		kms.Trust(imds)
		kms.AllowContext()
		s := s3test.New(t, s3test.Options{KMS: kms.URL()})
		s.NewBucket(bucket, s3test.Bucket{})
		p := places{IMDS: imds.URL(), KMS: kms.URL(), S3: s.URL(), Key: kms.ARN()}
		if err := json.NewEncoder(out).Encode(p); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, in); err != nil {
			return err
		}
		there, err := readBack(context.Background(), p, s)
		if err != nil {
			return fmt.Errorf("cannot read back what was stored: %w", err)
		}
		return json.NewEncoder(out).Encode(there)
	})
}

// readBack is what is in the bucket, in the order of the names.
func readBack(ctx context.Context, p places, s *s3test.S3) (there stored, err error) {
	client, err := p.client()
	if err != nil {
		return there, err
	}
	sum := sha256.New()
	for _, name := range s.Keys(bucket) {
		o, _ := s.Object(bucket, name)
		if o.SSE != s3test.AWSKMS || o.KeyARN != p.Key {
			return there, fmt.Errorf("%s is encrypted by %q under %q", name, o.SSE, o.KeyARN)
		}
		out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: new(bucket), Key: &name})
		if err != nil {
			return there, err
		}
		zip, err := gzip.NewReader(out.Body)
		if err == nil {
			_, err = io.Copy(sum, zip)
		}
		if err = errors.Join(err, out.Body.Close()); err != nil {
			return there, err
		}
		there.Objects++
		there.Bytes += o.Size
	}
	there.SHA256 = hex.EncodeToString(sum.Sum(nil))
	return there, nil
}

// client talks to the S3, with the role's credentials.
func (p places) client() (*s3.Client, error) {
	node, err := keycache.New(keycache.Options{KeyID: p.Key, KMSEndpoint: p.KMS, IMDSEndpoint: p.IMDS})
	if err != nil {
		return nil, err
	}
	return s3.New(s3.Options{Region: s3test.Region, Credentials: node.Credentials(), UsePathStyle: true, BaseEndpoint: &p.S3}), nil
}
