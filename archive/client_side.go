package archive

import (
	"context"
	"crypto/rand"

	"encoding/json"
	"fmt"
	"math"
	"strings"

	"github.com/aws/amazon-s3-encryption-client-go/v3/client"
	"github.com/aws/amazon-s3-encryption-client-go/v3/materials"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/middleware"
)

// What the metadata of an object says that a client encrypted: version 2 of the format of AWS's encryption clients.
// https://docs.aws.amazon.com/amazon-s3-encryption-client/latest/developerguide/encryption-algorithms.html
const (
	metaWrappedKey  = "x-amz-key-v2"
	metaWrapping    = "x-amz-wrap-alg"
	metaContent     = "x-amz-cek-alg"
	metaDescription = "x-amz-matdesc"

	wrapping   = "kms" // under an encryption context that the caller chooses, and nothing else in it
	contentGCM = "AES/GCM/NoPadding"
	nonceSize  = 12 // bytes, of AES-GCM
	tagSize    = 16

	// contextKey is the encryption context of Amazon EMR's CSE-KMS; its value is the key's ARN.
	contextKey = "kms_cmk_id"
)

// clientKey returns the KMS key of an object that a client encrypted.
func clientKey(metadata map[string]string) (arn string, ok bool) {
	if metadata[metaWrappedKey] == "" || metadata[metaWrapping] != wrapping || metadata[metaContent] != contentGCM {
		return "", false
	}
	var description map[string]string
	if json.Unmarshal([]byte(metadata[metaDescription]), &description) != nil {
		return "", false
	}
	return description[contextKey], true
}

// manager makes the data key of one object and unwraps it, with exactly the encryption context that EMR has. It keeps the key until
// wipe: the encryption client does not.
type manager struct {
	kms    *kms.Client
	keyARN string
	key    []byte
}

// GetEncryptionMaterials implements [materials.CryptographicMaterialsManager].
func (m *manager) GetEncryptionMaterials(ctx context.Context, _ materials.MaterialDescription) (*materials.CryptographicMaterials, error) {
	encryptionContext := map[string]string{contextKey: m.keyARN}
	out, err := m.kms.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{KeyId: &m.keyARN, KeySpec: types.DataKeySpecAes256, EncryptionContext: encryptionContext})
	if err != nil {
		return nil, err
	}
	m.wipe()
	m.key = out.Plaintext
	if aws.ToString(out.KeyId) != m.keyARN || len(out.Plaintext) != 32 || len(out.CiphertextBlob) == 0 {
		return nil, &Error{Reason: ReasonAnswer, Err: fmt.Errorf("KMS answered with no data key under %s", m.keyARN)}
	}
	nonce := make([]byte, nonceSize)
	_, _ = rand.Read(nonce) // never fails
	return &materials.CryptographicMaterials{
		Key: m.key, IV: nonce, KeyringAlgorithm: wrapping, CEKAlgorithm: contentGCM, TagLength: fmt.Sprint(tagSize * 8),
		MaterialDescription: encryptionContext, EncryptedKey: out.CiphertextBlob,
	}, nil
}

// DecryptMaterials implements [materials.CryptographicMaterialsManager].
func (m *manager) DecryptMaterials(ctx context.Context, req materials.DecryptMaterialsRequest) (*materials.CryptographicMaterials, error) {
	var description materials.MaterialDescription
	if err := json.Unmarshal([]byte(req.MatDesc), &description); err != nil {
		return nil, &Error{Reason: ReasonTampered, Err: fmt.Errorf("its material description is none: %w", err)}
	}
	if req.KeyringAlg != wrapping || len(description) != 1 || description[contextKey] != m.keyARN {
		return nil, &Error{Reason: ReasonEncryption, Err: fmt.Errorf("its data key is wrapped by %q under %v, want %q under %s %s", req.KeyringAlg, description, wrapping, contextKey, m.keyARN)}
	}
	if len(req.Iv) != nonceSize {
		return nil, &Error{Reason: ReasonTampered, Err: fmt.Errorf("its nonce has %d bytes, want %d", len(req.Iv), nonceSize)}
	}
	out, err := m.kms.Decrypt(ctx, &kms.DecryptInput{KeyId: &m.keyARN, CiphertextBlob: req.CipherKey, EncryptionContext: description})
	if err != nil {
		return nil, err
	}
	m.wipe()
	m.key = out.Plaintext
	if aws.ToString(out.KeyId) != m.keyARN || len(out.Plaintext) != 32 {
		return nil, &Error{Reason: ReasonAnswer, Err: fmt.Errorf("KMS answered with no data key under %s", m.keyARN)}
	}
	return &materials.CryptographicMaterials{
		Key: m.key, IV: req.Iv, KeyringAlgorithm: req.KeyringAlg, CEKAlgorithm: req.CekAlg, TagLength: req.TagLength,
		MaterialDescription: description, EncryptedKey: req.CipherKey,
	}, nil
}

func (m *manager) wipe() { clear(m.key) }

// encrypting returns a client for one object.
func (c *Client) encrypting() (*client.S3EncryptionClientV3, *manager, error) {
	m := &manager{kms: c.kms, keyARN: c.options.KeyARN}
	e, err := client.New(c.s3, m, func(o *client.EncryptionClientOptions) {
		o.MinFileSize = math.MaxInt64 // in memory: what is encrypted would else go through a temporary file
		o.BufferSize = 4 << 10
	})
	return e, m, err
}

func (c *Client) putEncrypted(ctx context.Context, in *s3.PutObjectInput) (*s3.PutObjectOutput, error) {
	e, m, err := c.encrypting()
	if err != nil {
		return nil, err
	}
	defer m.wipe()
	return e.PutObject(ctx, in)
}

// getEncrypted returns the object with its content in the clear, all of it authenticated.
func (c *Client) getEncrypted(ctx context.Context, in *s3.GetObjectInput, _ ...func(*s3.Options)) (*s3.GetObjectOutput, error) {
	e, m, err := c.encrypting()
	if err != nil {
		return nil, err
	}
	defer m.wipe() // the client has its own of it once it returns
	return e.GetObject(ctx, in, func(o *s3.Options) { o.APIOptions = append(o.APIOptions, wantClientSide) })
}

// wantClientSide lets no object through to the encryption client that has no metadata of a client's encryption. For those the client
// would look for an instruction file, with a configuration of its own from the environment.
func wantClientSide(stack *middleware.Stack) error {
	return stack.Deserialize.Add(middleware.DeserializeMiddlewareFunc("WantClientSide", func(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (middleware.DeserializeOutput, middleware.Metadata, error) {
		out, md, err := next.HandleDeserialize(ctx, in)
		if err != nil {
			return out, md, err
		}
		answer, ok := out.Result.(*s3.GetObjectOutput)
		if !ok {
			return out, md, &Error{Reason: ReasonAnswer, Err: fmt.Errorf("the answer is a %T", out.Result)}
		}
		metadata := lower(answer.Metadata)
		if _, ok := clientKey(metadata); !ok {
			answer.Body.Close()
			return out, md, &Error{Reason: ReasonEncryption, Err: fmt.Errorf("it has no metadata of %s (content %q, data key wrapped by %q)", CSE, metadata[metaContent], metadata[metaWrapping])}
		}
		return out, md, nil
	}), middleware.Before)
}

// notAuthentic reports whether the tag of AES-GCM was another one. The error for it is not exported.
func notAuthentic(err error) bool {
	return err != nil && strings.Contains(err.Error(), "message authentication failed")
}
