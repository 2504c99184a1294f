package s3test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"
)

// Algorithms, as the header has them.
const (
	AES256 = "AES256"  // SSE-S3: keys of S3's own
	AWSKMS = "aws:kms" // SSE-KMS
)

const (
	headerSSE       = "X-Amz-Server-Side-Encryption"
	headerKey       = "X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id"
	headerBucketKey = "X-Amz-Server-Side-Encryption-Bucket-Key-Enabled"
	headerContext   = "X-Amz-Server-Side-Encryption-Context"
)

// Mode is how honest the server is about encryption.
type Mode string

// The modes.
const (
	Honest   Mode = ""
	Ignores  Mode = "ignores"   // answers 200 and stores plaintext, whatever was asked, as some servers do
	Lies     Mode = "lies"      // the same, but what is answered to the upload claims what was asked
	Silent   Mode = "silent"    // encrypts as it was asked, but what is answered to the upload does not say so
	WrongKey Mode = "wrong key" // encrypts under the bucket's DefaultKey where another was asked, and says so
)

// Behave changes how honest the server is from now on.
func (s *S3) Behave(m Mode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mode = m
}

// Encryption is how an object is encrypted.
type Encryption struct {
	SSE       string // AES256, AWSKMS; "" is not at all
	KeyARN    string
	BucketKey bool
	Context   map[string]string // that KMS was given
	Wrapped   []byte            // the data key, by KMS
}

func (e Encryption) tell(h http.Header) {
	if e.SSE != "" {
		h.Set(headerSSE, e.SSE)
	}
	if e.KeyARN != "" {
		h.Set(headerKey, e.KeyARN)
	}
	if e.BucketKey {
		h.Set(headerBucketKey, "true")
	}
}

// encryption decides how to encrypt what a request brings, and gets a data key for it. claims is what the answers to the upload say.
func (s *S3) encryption(q *request) (e, claims Encryption, dataKey []byte, no *refusal) {
	s.mu.Lock()
	mode := s.mode
	s.mu.Unlock()
	asked := Encryption{SSE: q.SSE, KeyARN: q.KeyID, BucketKey: q.Header.Get(headerBucketKey) == "true"}
	switch {
	case asked.SSE != "" && asked.SSE != AES256 && asked.SSE != AWSKMS:
		return e, e, nil, invalid("The encryption method specified is not supported")
	case asked.SSE != AWSKMS && asked.KeyARN != "":
		return e, e, nil, invalid("Server Side Encryption with AWS KMS managed key requires HTTP header x-amz-server-side-encryption : aws:kms")
	case mode == Ignores:
		return e, e, nil, nil
	case mode == Lies:
		return e, asked, nil, nil
	}
	e, dataKey, no = s.encryptionUnder(q, asked, mode)
	if mode != Silent {
		claims = e
	}
	return e, claims, dataKey, no
}

// encryptionUnder fills in what was not asked, and asks KMS.
func (s *S3) encryptionUnder(q *request, e Encryption, mode Mode) (_ Encryption, dataKey []byte, no *refusal) {
	switch {
	case e.SSE == "" && q.bucket.DefaultKey != "":
		e.SSE = AWSKMS
	case e.SSE == "":
		e.SSE = AES256 // what S3 does today where nobody asked
	}
	if e.SSE == AES256 {
		e.BucketKey = false
		return e, nil, nil
	}
	switch {
	case mode == WrongKey && q.bucket.DefaultKey == "":
		s.t.Errorf("s3test: bucket %s has no DefaultKey to take for the wrong one", q.Bucket)
	case mode == WrongKey || e.KeyARN == "":
		e.KeyARN = q.bucket.DefaultKey
		e.BucketKey = e.BucketKey || q.bucket.BucketKey && q.Header.Get(headerBucketKey) == ""
	}
	if e.KeyARN == "" {
		e.KeyARN = "alias/aws/s3" // AWS's key of the account
	}
	if parts := strings.Split(e.KeyARN, ":"); len(parts) > 3 && parts[3] != q.bucket.Region {
		return e, nil, refuse(http.StatusBadRequest, "KMS.NotFoundException", "Invalid arn %s", parts[3])
	}
	if e.Context, no = encryptionContext(q, e.BucketKey); no != nil {
		return e, nil, no
	}
	out, err := s.kms(q).GenerateDataKey(s.ctx, &kms.GenerateDataKeyInput{KeyId: &e.KeyARN, KeySpec: types.DataKeySpecAes256, EncryptionContext: e.Context})
	if err != nil {
		return e, nil, ofKMS(err)
	}
	e.KeyARN, e.Wrapped = aws.ToString(out.KeyId), out.CiphertextBlob
	return e, out.Plaintext, nil
}

// encryptionContext is what S3 gives KMS: what the request has, and the ARN.
// https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingKMSEncryption.html#encryption-context
func encryptionContext(q *request, bucketKey bool) (map[string]string, *refusal) {
	given := map[string]string{}
	if text := q.Header.Get(headerContext); text != "" {
		data, err := base64.StdEncoding.DecodeString(text)
		if err != nil || json.Unmarshal(data, &given) != nil {
			return nil, invalid("The header '%s' shall be Base64-encoded UTF-8 string holding JSON which represents a string-string map", strings.ToLower(headerContext))
		}
	}
	arn := "arn:aws:s3:::" + q.Bucket
	if !bucketKey {
		arn += "/" + q.Key
	}
	maps.Copy(given, map[string]string{"aws:s3:arn": arn})
	return given, nil
}

// unwrap asks KMS for the data key, nil where there is none.
func (s *S3) unwrap(q *request, e Encryption) ([]byte, *refusal) {
	if e.SSE != AWSKMS {
		return nil, nil
	}
	out, err := s.kms(q).Decrypt(s.ctx, &kms.DecryptInput{KeyId: &e.KeyARN, CiphertextBlob: e.Wrapped, EncryptionContext: e.Context})
	if err != nil {
		return nil, ofKMS(err)
	}
	return out.Plaintext, nil
}

// kms calls KMS as who called S3.
func (s *S3) kms(q *request) *kms.Client {
	credentials := aws.Credentials{AccessKeyID: q.caller.accessKey, SecretAccessKey: "not looked at", SessionToken: q.caller.token}
	if s.options.KMS == "" {
		s.t.Errorf("s3test: %s of %s/%s needs a KMS, and Options has none", q.Op, q.Bucket, q.Key)
	}
	return kms.New(kms.Options{
		Region: q.bucket.Region, BaseEndpoint: &s.options.KMS, HTTPClient: s.kmsHTTP,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return credentials, nil }),
		// Once more with KMS's own time, if its clock is another: AWS has one clock. Other refusals are the caller's.
		Retryer: retry.NewStandard(func(o *retry.StandardOptions) {
			o.MaxAttempts, o.MaxBackoff = 2, 1
			o.Retryables = []retry.IsErrorRetryable{retry.RetryableErrorCode{Codes: map[string]struct{}{"InvalidSignatureException": {}}}}
		}),
	})
}

// ofKMS is what S3 makes of KMS's refusals.
func ofKMS(err error) *refusal {
	var api smithy.APIError
	if !errors.As(err, &api) {
		return refuse(http.StatusServiceUnavailable, "ServiceUnavailable", "Service is unable to handle request.")
	}
	switch code := api.ErrorCode(); {
	case code == "AccessDeniedException":
		return refuse(http.StatusForbidden, "AccessDenied", "%s", api.ErrorMessage())
	case code == "UnrecognizedClientException" || code == "ExpiredTokenException":
		return untrusted(err) // S3 looks itself, and before
	case strings.HasPrefix(code, "Throttl"):
		return refuse(http.StatusServiceUnavailable, "SlowDown", "Please reduce your request rate for operations involving AWS KMS.")
	case api.ErrorFault() == smithy.FaultServer:
		return internalError()
	default:
		return refuse(http.StatusBadRequest, "KMS."+code, "%s", api.ErrorMessage())
	}
}

func internalError() *refusal {
	return refuse(http.StatusInternalServerError, "InternalError", "We encountered an internal error. Please try again.")
}

// seal encrypts; without a data key it stays as it is.
func seal(dataKey, plaintext []byte) []byte {
	if dataKey == nil {
		return plaintext
	}
	aead := gcm(dataKey)
	nonce := make([]byte, aead.NonceSize())
	_, _ = rand.Read(nonce) // never fails
	return aead.Seal(nonce, nonce, plaintext, nil)
}

// open undoes seal.
func open(dataKey, data []byte) ([]byte, *refusal) {
	if dataKey == nil {
		return data, nil
	}
	aead := gcm(dataKey)
	if len(data) < aead.NonceSize() {
		return nil, internalError()
	}
	plaintext, err := aead.Open(nil, data[:aead.NonceSize()], data[aead.NonceSize():], nil)
	if err != nil {
		return nil, internalError()
	}
	return plaintext, nil
}

func gcm(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // KMS gave no AES key
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // AES always has 16-byte blocks
	}
	return aead
}
