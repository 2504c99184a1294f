package archive

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
)

// Reason says what is wrong, as far as a caller can act on it.
type Reason string

// The reasons. Those up to ReasonAnswer are final; the last three may pass.
const (
	ReasonDenied      Reason = "denied"       // the role, the bucket's policy or its owner does not allow the call
	ReasonKMSDenied   Reason = "kms-denied"   // the role or the key's policy does not allow the use of the key
	ReasonKey         Reason = "key"          // KMS has no such key in the region, or it is not enabled
	ReasonAWSManaged  Reason = "aws-managed"  // the key is AWS's, not the customer's
	ReasonNoBucket    Reason = "no-bucket"    // there is no such bucket
	ReasonNotFound    Reason = "not-found"    // there is no such object
	ReasonExists      Reason = "exists"       // there is an object of that name, with other content
	ReasonWrongRegion Reason = "wrong-region" // the bucket or the key is of another region
	ReasonEncryption  Reason = "encryption"   // the object is not encrypted as it has to be
	ReasonTampered    Reason = "tampered"     // the object is not what was put there
	ReasonInvalid     Reason = "invalid"      // an option or request is malformed
	ReasonAnswer      Reason = "answer"       // what answered is not S3

	ReasonUnavailable   Reason = "unavailable"    // no answer, 5xx or throttling
	ReasonNoCredentials Reason = "no-credentials" // no instance role, or its credentials are not (yet, any more) accepted
	ReasonClock         Reason = "clock"          // the node's clock and S3's differ too much for signatures
)

// Error is a failed call of a Client, or options that cannot work.
type Error struct {
	Op        string // "Check", "Put", "Head", "Get" or "List"
	Reason    Reason
	Code      string // as S3 or KMS names it ("NoSuchBucket"), "" if there was no answer or the answer was good
	RequestID string // "" if there was no answer
	Err       error

	object string // the object's URL, or the bucket
}

// Error names what could not be done and the cause.
func (e *Error) Error() string {
	verb := map[string]string{"Check": "use bucket", "Put": "put", "Head": "read the properties of", "Get": "get", "List": "list"}[e.Op]
	var api smithy.APIError
	if errors.As(e.Err, &api) {
		// The SDK's text repeats operation, status and request id.
		text := fmt.Sprintf("cannot %s %s: %s", verb, e.object, api.ErrorCode())
		if m := api.ErrorMessage(); m != "" && m != api.ErrorCode() {
			text += ": " + m
		}
		if e.RequestID != "" {
			text += " (request " + e.RequestID + ")"
		}
		return text
	}
	return fmt.Sprintf("cannot %s %s: %v", verb, e.object, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Retryable reports whether the same call may succeed later without anyone changing the key, a policy or the configuration.
func (e *Error) Retryable() bool {
	switch e.Reason {
	case ReasonUnavailable, ReasonNoCredentials, ReasonClock:
		return true
	}
	return false
}

// reasons maps the codes of S3, those of KMS as S3 passes them on ("KMS.…"), and KMS's own, which mode CSE sees.
// https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
var reasons = map[string]Reason{
	"AccessDenied":                         ReasonDenied,
	"AllAccessDisabled":                    ReasonDenied,
	"AccountProblem":                       ReasonDenied,
	"MethodNotAllowed":                     ReasonDenied,
	"InvalidRequest":                       ReasonInvalid,
	"NoSuchBucket":                         ReasonNoBucket,
	"NoSuchKey":                            ReasonNotFound,
	"NotFound":                             ReasonNotFound, // of a HEAD, whose answer has no body
	"PreconditionFailed":                   ReasonExists,
	"ObjectLockConfigurationNotFoundError": ReasonInvalid,

	"PermanentRedirect":                  ReasonWrongRegion,
	"TemporaryRedirect":                  ReasonWrongRegion,
	"AuthorizationHeaderMalformed":       ReasonWrongRegion,
	"IllegalLocationConstraintException": ReasonWrongRegion,
	"MovedPermanently":                   ReasonWrongRegion, // of a HEAD

	"BadDigest":                  ReasonUnavailable, // the bytes were changed on the way
	"XAmzContentSHA256Mismatch":  ReasonUnavailable,
	"InvalidDigest":              ReasonUnavailable,
	"IncompleteBody":             ReasonUnavailable,
	"RequestTimeout":             ReasonUnavailable,
	"SlowDown":                   ReasonUnavailable,
	"InternalError":              ReasonUnavailable,
	"ServiceUnavailable":         ReasonUnavailable,
	"OperationAborted":           ReasonUnavailable,
	"ConditionalRequestConflict": ReasonUnavailable,

	"RequestTimeTooSkewed": ReasonClock,
	"RequestExpired":       ReasonClock,

	"ExpiredToken":                ReasonNoCredentials,
	"ExpiredTokenException":       ReasonNoCredentials,
	"InvalidAccessKeyId":          ReasonNoCredentials,
	"InvalidToken":                ReasonNoCredentials,
	"TokenRefreshRequired":        ReasonNoCredentials,
	"SignatureDoesNotMatch":       ReasonNoCredentials,
	"UnrecognizedClientException": ReasonNoCredentials,
	"InvalidSignatureException":   ReasonNoCredentials,

	"AccessDeniedException":      ReasonKMSDenied,
	"NotFoundException":          ReasonKey,
	"DisabledException":          ReasonKey,
	"KMSInvalidStateException":   ReasonKey,
	"InvalidKeyUsageException":   ReasonKey,
	"InvalidArnException":        ReasonKey,
	"IncorrectKeyException":      ReasonTampered,
	"InvalidCiphertextException": ReasonTampered,
	"ThrottlingException":        ReasonUnavailable,
	"KMSInternalException":       ReasonUnavailable,
	"DependencyTimeoutException": ReasonUnavailable,
	"KeyUnavailableException":    ReasonUnavailable,
}

// classify turns whatever a call returned into an *Error.
func (c *Client) classify(op, object string, err error) *Error {
	e := &Error{Op: op, object: object, Err: err}
	var known *Error
	if errors.As(err, &known) {
		// Judged where it happened; only the call is known better here.
		e.Reason, e.Code, e.RequestID, e.Err = known.Reason, known.Code, known.RequestID, known.Err
		if known.Op != "" {
			e.Op = known.Op
		}
		return e
	}
	var answer *awshttp.ResponseError
	status := 0
	if errors.As(err, &answer) {
		status, e.RequestID = answer.HTTPStatusCode(), answer.ServiceRequestID()
	}
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() != "UnknownError" {
		e.Code = api.ErrorCode()
		reason, ok := reasons[strings.TrimPrefix(e.Code, "KMS.")]
		switch {
		case !ok:
			reason = statusReason(status)
		case e.Code == "AccessDenied" && strings.Contains(api.ErrorMessage(), " kms:"):
			reason = ReasonKMSDenied // S3 passes on what KMS said
		}
		e.Reason = reason
	} else {
		e.Reason = statusReason(status)
	}
	var sent *url.Error
	if status == 0 && errors.As(err, &sent) {
		e.Err = sent // what the SDK puts around it tells of an answer, and there was none
	}
	if e.Reason == ReasonWrongRegion && answer != nil {
		if region := answer.Response.Header.Get("X-Amz-Bucket-Region"); region != "" {
			e.Err = fmt.Errorf("the bucket is in region %s, not %s: %w", region, c.options.Region, errors.New(e.Code))
		}
	}
	return e
}

// statusReason judges an answer without a code that we know, or no answer. A HEAD's answer has a status and nothing else.
func statusReason(status int) Reason {
	switch {
	case status == http.StatusForbidden || status == http.StatusUnauthorized:
		return ReasonDenied
	case status == http.StatusNotFound:
		return ReasonNotFound
	case status == http.StatusMovedPermanently || status == http.StatusTemporaryRedirect:
		return ReasonWrongRegion
	case status == http.StatusPreconditionFailed:
		return ReasonExists
	case status == 0 || status >= 500 || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout || status == http.StatusConflict:
		return ReasonUnavailable
	case status >= 400:
		return ReasonInvalid
	}
	return ReasonAnswer
}
