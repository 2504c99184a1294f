package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// metaSHA256 is the metadata that Put gives an object: the SHA-256 of its content in the clear, in hexadecimal.
const metaSHA256 = "sha256"

// Object is what S3 tells of an object.
type Object struct {
	Name       string // what S3 calls the object's key
	Size       int64  // bytes as they are stored; mode CSE adds a tag of 16
	Modified   time.Time
	Version    string // "" where the bucket keeps no versions
	Encryption Encryption
	SHA256     string // of the content, as Put noted it; "" for objects of others
	Metadata   map[string]string
}

// Encryption is how an object is encrypted, by its own properties.
type Encryption struct {
	Mode      Mode   // "" for neither of ours
	Algorithm string // of S3: "aws:kms", "AES256", "" for none
	KeyARN    string // of the KMS key: in mode SSE S3 tells it, in mode CSE the object's metadata
}

// Put stores data as a new object, encrypted, and returns once a HEAD has confirmed that it is there, whole, and encrypted as it has
// to be. What S3 answered otherwise is ReasonEncryption: the object may then be there in the clear, and is left for who is told.
//
// metadata is what HEAD tells everybody who may read properties; its names are in lower case, and none is "sha256".
//
// It never overwrites: where an object of that name has the same content, that one is confirmed, so that a Put whose answer was lost
// can be repeated; with other content it is ReasonExists.
func (c *Client) Put(ctx context.Context, name string, data []byte, metadata map[string]string) (o Object, err error) {
	if len(data) == 0 || len(data) > MaxSize {
		return o, &Error{Op: "Put", Reason: ReasonInvalid, Err: fmt.Errorf("it has %d bytes, allowed are 1 to %d", len(data), MaxSize), object: c.URL(name)}
	}
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	told := maps.Clone(metadata)
	if told == nil {
		told = map[string]string{}
	}
	told[metaSHA256] = digest
	err = c.call(ctx, "Put", name, func(ctx context.Context) error {
		in := &s3.PutObjectInput{
			Bucket: &c.options.Bucket, Key: &name, ExpectedBucketOwner: c.owner(), Body: bytes.NewReader(data),
			IfNoneMatch: aws.String("*"), ChecksumAlgorithm: types.ChecksumAlgorithmSha256, Metadata: told,
		}
		var out *s3.PutObjectOutput
		var err error
		if c.options.Mode == CSE {
			out, err = c.putEncrypted(ctx, in)
		} else {
			in.ServerSideEncryption, in.SSEKMSKeyId = types.ServerSideEncryptionAwsKms, &c.options.KeyARN
			out, err = c.s3.PutObject(ctx, in)
		}
		if err != nil && c.classify("Put", "", err).Reason != ReasonExists {
			return err
		}
		if err == nil && c.options.Mode == SSE {
			if err := c.check(Encryption{Mode: SSE, Algorithm: string(out.ServerSideEncryption), KeyARN: aws.ToString(out.SSEKMSKeyId)}); err != nil {
				return err
			}
		}
		existed := err
		if o, err = c.head(ctx, name); err != nil {
			return c.classify("Head", c.URL(name), err) // not allowed to look is another thing than not allowed to put
		}
		stored := int64(len(data))
		if c.options.Mode == CSE {
			stored += tagSize
		}
		switch {
		case existed != nil && o.SHA256 != digest:
			return existed
		case o.SHA256 != digest || o.Size != stored:
			return &Error{Reason: ReasonTampered, Err: fmt.Errorf("S3 has another object of that name than was put: %d bytes, want %d", o.Size, stored)}
		}
		return c.check(o.Encryption)
	})
	return o, err
}

// Head returns the properties of an object.
func (c *Client) Head(ctx context.Context, name string) (o Object, err error) {
	err = c.call(ctx, "Head", name, func(ctx context.Context) (err error) {
		o, err = c.head(ctx, name)
		return err
	})
	return o, err
}

// Get returns the content of an object that Put or, in mode CSE, EMRFS stored. It has to be encrypted as the options say, under
// their key, and to have the SHA-256 that Put noted.
func (c *Client) Get(ctx context.Context, name string) (data []byte, o Object, err error) {
	err = c.call(ctx, "Get", name, func(ctx context.Context) error {
		in := &s3.GetObjectInput{Bucket: &c.options.Bucket, Key: &name, ExpectedBucketOwner: c.owner()}
		get := c.s3.GetObject
		if c.options.Mode == CSE {
			get = c.getEncrypted
		}
		out, err := get(ctx, in)
		if err != nil {
			return err
		}
		defer out.Body.Close()
		o = object(name, aws.ToInt64(out.ContentLength), out.LastModified, out.VersionId, out.ServerSideEncryption, out.SSEKMSKeyId, out.Metadata)
		if err := c.check(o.Encryption); err != nil {
			return err
		}
		data, err = io.ReadAll(io.LimitReader(out.Body, MaxSize+1))
		if notAuthentic(err) {
			return &Error{Reason: ReasonTampered, Err: errors.New("its content is not what was encrypted: its tag is another one")}
		}
		if err != nil {
			return err
		}
		if len(data) > MaxSize {
			return &Error{Reason: ReasonInvalid, Err: fmt.Errorf("it has more than %d bytes", MaxSize)}
		}
		if sum := sha256.Sum256(data); o.SHA256 != "" && o.SHA256 != hex.EncodeToString(sum[:]) {
			return &Error{Reason: ReasonTampered, Err: errors.New("its content is not what was put there: its SHA-256 is another one")}
		}
		return nil
	})
	if err != nil {
		return nil, o, err
	}
	return data, o, nil
}

// List returns the objects whose name begins with prefix, in the order of their names, without their Encryption, SHA256 and Metadata.
func (c *Client) List(ctx context.Context, prefix string) (objects []Object, err error) {
	err = c.call(ctx, "List", prefix, func(ctx context.Context) error {
		pages := s3.NewListObjectsV2Paginator(c.s3, &s3.ListObjectsV2Input{Bucket: &c.options.Bucket, Prefix: &prefix, ExpectedBucketOwner: c.owner()})
		for pages.HasMorePages() {
			page, err := pages.NextPage(ctx)
			if err != nil {
				return err
			}
			for _, o := range page.Contents {
				objects = append(objects, Object{Name: aws.ToString(o.Key), Size: aws.ToInt64(o.Size), Modified: aws.ToTime(o.LastModified)})
			}
		}
		return nil
	})
	return objects, err
}

// CheckBucket tells why List of prefix would fail, without listing more than one object: there is no such bucket in the region or of the
// owner, the role may not list it, or S3 does not answer.
func (c *Client) CheckBucket(ctx context.Context, prefix string) error {
	return c.call(ctx, "List", prefix, func(ctx context.Context) error {
		_, err := c.s3.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: &c.options.Bucket, Prefix: &prefix, MaxKeys: aws.Int32(1), ExpectedBucketOwner: c.owner()})
		return err
	})
}

func (c *Client) owner() *string {
	if c.options.Owner == "" {
		return nil
	}
	return &c.options.Owner
}

func (c *Client) head(ctx context.Context, name string) (Object, error) {
	out, err := c.s3.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &c.options.Bucket, Key: &name, ExpectedBucketOwner: c.owner()})
	if err != nil {
		return Object{}, err
	}
	return object(name, aws.ToInt64(out.ContentLength), out.LastModified, out.VersionId, out.ServerSideEncryption, out.SSEKMSKeyId, out.Metadata), nil
}

func object(name string, size int64, modified *time.Time, version *string, algorithm types.ServerSideEncryption, key *string, metadata map[string]string) Object {
	o := Object{
		Name: name, Size: size, Modified: aws.ToTime(modified), Version: aws.ToString(version), Metadata: lower(metadata),
		Encryption: Encryption{Algorithm: string(algorithm), KeyARN: aws.ToString(key)},
	}
	o.SHA256 = o.Metadata[metaSHA256]
	if arn, ok := clientKey(o.Metadata); ok {
		o.Encryption.Mode, o.Encryption.KeyARN = CSE, arn
	} else if algorithm == types.ServerSideEncryptionAwsKms {
		o.Encryption.Mode = SSE
	}
	return o
}

// lower is metadata by names in lower case, as S3 keeps them; some servers do not.
func lower(metadata map[string]string) map[string]string {
	lowered := make(map[string]string, len(metadata))
	for name, value := range metadata {
		lowered[strings.ToLower(name)] = value
	}
	return lowered
}

// Check tells why an object, as Head gave it, is not encrypted as the options want it: an *[Error] of ReasonEncryption.
func (c *Client) Check(o Object) error {
	if err := c.check(o.Encryption); err != nil {
		return c.classify("Get", c.URL(o.Name), err)
	}
	return nil
}

// check refuses an object that is not encrypted as the options want it.
func (c *Client) check(e Encryption) error {
	bad := func(format string, args ...any) error {
		return &Error{Reason: ReasonEncryption, Err: fmt.Errorf(format, args...)}
	}
	switch {
	case e.Mode != c.options.Mode && e.Mode == "" && e.Algorithm == "":
		return bad("it is not encrypted: S3 names no encryption, want %s", c.options.Mode)
	case e.Mode != c.options.Mode && e.Mode == "":
		return bad("its encryption is %s, want %s", e.Algorithm, c.options.Mode)
	case e.Mode != c.options.Mode:
		return bad("its encryption is %s, want %s", e.Mode, c.options.Mode)
	case e.Mode == SSE && e.Algorithm != string(types.ServerSideEncryptionAwsKms):
		return bad("its encryption is %q, want aws:kms", e.Algorithm)
	case e.KeyARN != c.options.KeyARN:
		return bad("it is encrypted under %q, want %s", e.KeyARN, c.options.KeyARN)
	}
	return nil
}
