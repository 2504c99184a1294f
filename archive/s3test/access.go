package s3test

import (
	"errors"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/aws/smithy-go"
)

// principal is who every caller is.
const principal = "arn:aws:sts::" + Account + ":assumed-role/node-role/i-0123456789abcdef0"

// Deny makes operations answer AccessDenied, as a missing permission. Who may not ListObjectsV2 is not told either that an object is not there.
func (s *S3) Deny(ops ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, op := range ops {
		s.denied[op] = true
	}
}

// Trust makes S3 accept only the credentials that f has no error for; nil is all. The code of the refusal is that of the error if it has one (smithy.APIError),
// else InvalidAccessKeyId.
func (s *S3) Trust(f func(accessKey, token string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trust = f
}

// caller is who signed a request.
type caller struct {
	accessKey, token, region string
	at                       time.Time
}

const signingTime = "20060102T150405Z" // the layout of X-Amz-Date

var scope = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([^/, ]+)/\d{8}/([^/, ]+)/s3/aws4_request, *SignedHeaders=[^, ]+, *Signature=[0-9a-f]{64}$`)

// signer returns what a request's signature says; without one there is no access key.
func signer(r *http.Request) caller {
	m := scope.FindStringSubmatch(r.Header.Get("Authorization"))
	if m == nil {
		return caller{}
	}
	at, _ := time.Parse(signingTime, r.Header.Get("X-Amz-Date")) // the zero time is too far off
	return caller{accessKey: m[1], region: m[2], token: r.Header.Get("X-Amz-Security-Token"), at: at}
}

// allowed checks in S3's order: who calls, then the bucket, then whether they may.
func (s *S3) allowed(q *request) *refusal {
	s.mu.Lock()
	now, trust, here, denied := s.now(), s.trust, s.options.Region, s.denied[q.Op]
	b, exists := s.buckets[q.Bucket]
	s.mu.Unlock()
	if q.caller.accessKey == "" {
		return accessDenied()
	}
	if now.Sub(q.caller.at).Abs() > 15*time.Minute {
		return refuse(http.StatusForbidden, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.")
	}
	if trust != nil {
		if err := trust(q.caller.accessKey, q.caller.token); err != nil {
			return untrusted(err)
		}
	}
	if here != "" && q.caller.region != here {
		region := here
		if exists {
			region = b.Region
		}
		no := refuse(http.StatusBadRequest, "AuthorizationHeaderMalformed", "The authorization header is malformed; the region '%s' is wrong; expecting '%s'", q.caller.region, region)
		return no.elsewhere(region)
	}
	switch owner := q.Header.Get("X-Amz-Expected-Bucket-Owner"); {
	case !exists:
		return refuse(http.StatusNotFound, "NoSuchBucket", "The specified bucket does not exist")
	case q.caller.region != b.Region:
		no := refuse(http.StatusMovedPermanently, "PermanentRedirect", "The bucket you are attempting to access must be addressed using the specified endpoint. Please send all future requests to this endpoint.")
		return no.elsewhere(b.Region)
	case owner != "" && owner != b.Owner:
		return accessDenied()
	case denied:
		return mayNot(q.operation.action, q)
	case len(q.Key) > 1024:
		return refuse(http.StatusBadRequest, "KeyTooLongError", "Your key is too long")
	}
	for name := range q.Header {
		known := slices.Contains(headers, name) || strings.HasPrefix(name, headerMeta) || strings.HasPrefix(name, headerChecksum)
		if strings.HasPrefix(name, "X-Amz-") && !known {
			return notImplemented(name)
		}
	}
	q.bucket = b
	return nil
}

func (no *refusal) elsewhere(region string) *refusal {
	no.region, no.header = region, map[string]string{"X-Amz-Bucket-Region": region}
	return no
}

// mayNot is the answer to who lacks a permission.
func mayNot(action string, q *request) *refusal {
	on := "arn:aws:s3:::" + q.Bucket
	if q.operation.object && action != "ListBucket" {
		on += "/" + q.Key
	}
	return refuse(http.StatusForbidden, "AccessDenied", "User: %s is not authorized to perform: s3:%s on resource: %q because no identity-based policy allows the s3:%s action", principal, action, on, action)
}

// untrusted is the answer to credentials that are none (any more).
func untrusted(err error) *refusal {
	code := "InvalidAccessKeyId"
	var api smithy.APIError
	if errors.As(err, &api) {
		code = api.ErrorCode()
	}
	switch code {
	case "ExpiredToken", "ExpiredTokenException":
		return refuse(http.StatusBadRequest, "ExpiredToken", "The provided token has expired.")
	case "InvalidToken":
		return refuse(http.StatusBadRequest, code, "The provided token is malformed or otherwise invalid.")
	case "UnrecognizedClientException":
		code = "InvalidAccessKeyId"
	}
	return refuse(http.StatusForbidden, code, "The AWS Access Key Id you provided does not exist in our records.")
}

func (s *S3) headBucket(q *request, a *answer) *refusal {
	a.header.Set("X-Amz-Bucket-Region", q.bucket.Region)
	return nil
}
