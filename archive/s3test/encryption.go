package s3test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"net/http"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"
)

const algorithmKMS = "aws:kms"

// encrypt fills in how an object is stored.
func (s *S3) encrypt(b Bucket, call Call, c caller, o *stored, data []byte) *refusal {
	algorithm, keyID := call.Algorithm, call.KeyID
	var mode Mode
	s.locked(func() { mode = s.mode })
	switch {
	case mode == Ignores || mode == Lies:
		o.data = data
		return nil
	case algorithm == "" && b.DefaultKey != "":
		algorithm, keyID = algorithmKMS, b.DefaultKey
	case algorithm == "":
		algorithm = "AES256" // what S3 does today with what nobody asked for
	}
	if mode == WrongKey {
		keyID = b.DefaultKey
	}
	o.algorithm = algorithm
	if algorithm != algorithmKMS {
		o.data = data
		return nil
	}
	if parts := strings.Split(keyID, ":"); len(parts) > 3 && parts[3] != b.Region {
		return refuse(http.StatusBadRequest, "KMS.NotFoundException", "Invalid arn %s", parts[3])
	}
	out, err := s.kms(b, c).GenerateDataKey(context.Background(), &kms.GenerateDataKeyInput{KeyId: &keyID, KeySpec: types.DataKeySpecAes256, EncryptionContext: encryptionContext(call)})
	if err != nil {
		return ofKMS(err)
	}
	o.keyARN, o.wrapped = aws.ToString(out.KeyId), out.CiphertextBlob
	nonce := make([]byte, 12)
	_, _ = rand.Read(nonce) // never fails
	o.data = append(nonce, gcm(out.Plaintext).Seal(nil, nonce, data, nil)...)
	return nil
}

// decrypted is the content of an object.
func (s *S3) decrypted(call Call, c caller, o *stored) ([]byte, *refusal) {
	if o.wrapped == nil {
		return o.data, nil
	}
	var b Bucket
	s.locked(func() { b = s.buckets[call.Bucket] })
	out, err := s.kms(b, c).Decrypt(context.Background(), &kms.DecryptInput{KeyId: &o.keyARN, CiphertextBlob: o.wrapped, EncryptionContext: encryptionContext(call)})
	if err != nil {
		return nil, ofKMS(err)
	}
	plain, err := gcm(out.Plaintext).Open(nil, o.data[:12], o.data[12:], nil)
	if err != nil {
		return nil, refuse(http.StatusInternalServerError, "InternalError", "We encountered an internal error. Please try again.")
	}
	return plain, nil
}

// encryptionContext is what S3 gives KMS.
// https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingKMSEncryption.html#encryption-context
func encryptionContext(call Call) map[string]string {
	return map[string]string{"aws:s3:arn": "arn:aws:s3:::" + call.Bucket + "/" + call.Name}
}

// kms calls KMS as who called S3.
func (s *S3) kms(b Bucket, c caller) *kms.Client {
	return kms.New(kms.Options{
		Region: b.Region, BaseEndpoint: &s.kmsURL, Retryer: aws.NopRetryer{},
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: c.accessKey, SecretAccessKey: "not looked at", SessionToken: c.token}, nil
		}),
	})
}

// ofKMS is what S3 makes of KMS's refusals.
func ofKMS(err error) *refusal {
	var api smithy.APIError
	switch {
	case !errors.As(err, &api):
		return refuse(http.StatusServiceUnavailable, "ServiceUnavailable", "Please reduce your request rate.")
	case api.ErrorCode() == "AccessDeniedException":
		return refuse(http.StatusForbidden, "AccessDenied", "%s", api.ErrorMessage())
	case strings.Contains(api.ErrorCode(), "Throttl"):
		return refuse(http.StatusServiceUnavailable, "SlowDown", "Please reduce your request rate.")
	}
	return refuse(http.StatusBadRequest, "KMS."+api.ErrorCode(), "%s", api.ErrorMessage())
}

func gcm(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // KMS gave no AES key
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}
