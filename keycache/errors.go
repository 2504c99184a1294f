package keycache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/smithy-go"
)

// Reason says what is wrong, as far as a caller can act on it.
type Reason string

// The reasons. The first nine are final; the last four may pass.
const (
	ReasonDenied      Reason = "denied"       // the role or the key policy does not allow the call
	ReasonNotFound    Reason = "not-found"    // no such key in this account and region
	ReasonAWSManaged  Reason = "aws-managed"  // the key is AWS's, not the customer's
	ReasonAsymmetric  Reason = "asymmetric"   // the key is not a symmetric encryption key
	ReasonKeyState    Reason = "key-state"    // the key is disabled, pending deletion or otherwise not enabled
	ReasonWrongRegion Reason = "wrong-region" // the key's ARN names another region than the one called
	ReasonCiphertext  Reason = "ciphertext"   // the wrapped key is not one that this KMS key opens
	ReasonInvalid     Reason = "invalid"      // an option or request is malformed
	ReasonAnswer      Reason = "answer"       // what answered is not KMS, or answered for another key than was asked for

	ReasonUnavailable   Reason = "unavailable"    // no answer from KMS, 5xx or throttling
	ReasonIMDS          Reason = "imds"           // the instance metadata service does not answer, is off, or gives no token
	ReasonNoCredentials Reason = "no-credentials" // no instance role, or its credentials are not (yet, any more) accepted
	ReasonClock         Reason = "clock"          // the node's clock and KMS's differ too much for signatures
)

// Codes that Error.Code has for the metadata service, where KMS's own are names
// that end in Exception.
const (
	CodeTokenTimeout = "TokenTimeout" // the service was reached but the token never came: hop limit
	CodeForbidden    = "HTTP403"      // the service is turned off for this instance
)

// ErrOtherKey is a new data key that KMS does not give back: Decrypt of what
// GenerateDataKey wrapped has to be what it answered in the clear.
var ErrOtherKey = errors.New("Decrypt gave another key than GenerateDataKey")

// Error is a failed call of a Client, or options that cannot work.
type Error struct {
	Op        string // "New", "DescribeKey", "GenerateDataKey", "Decrypt", "ReEncrypt", or the method that is none of KMS's: "Identity", "CheckRole", …
	Reason    Reason
	Code      string // as KMS names it ("AccessDeniedException"), HTTPnnn or CodeTokenTimeout for the metadata service, "" if there was no answer
	RequestID string // KMS's, "" if there was no answer
	Err       error

	object string // the key, the wrapped key's, or the endpoint
}

// Error names what could not be done and the cause, with KMS's code and
// request id.
func (e *Error) Error() string {
	var what string
	switch e.Op {
	case "New":
		what = "use KMS key"
	case "Identity":
		what = "read the instance identity"
	case "Ephemeral":
		what = "read the block device mapping"
	case "CheckRole":
		what = "get the role's credentials"
	case "Region":
		what = "use KMS key"
	case "CheckEndpoint":
		what = "reach KMS at"
	case "CheckClock":
		what = "sign requests"
	case "DescribeKey":
		what = "describe KMS key"
	case "GenerateDataKey":
		what = "generate a data key under"
	case "Decrypt":
		what = "decrypt the wrapped key under"
	case "ReEncrypt":
		what = "wrap the data key anew under"
	default:
		what = "call " + e.Op
	}
	if e.object != "" {
		what += " " + e.object
	}
	var api smithy.APIError
	if errors.As(e.Err, &api) {
		// The SDK's text repeats operation, status and request id.
		text := fmt.Sprintf("cannot %s: %s: %s", what, api.ErrorCode(), api.ErrorMessage())
		if e.RequestID != "" {
			text += " (request " + e.RequestID + ")"
		}
		return text
	}
	return fmt.Sprintf("cannot %s: %v", what, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Object is what the call was about: the KMS key as it was named, or the endpoint; "" for calls that have neither.
func (e *Error) Object() string { return e.object }

// MarshalJSON shows the message: the SDK's error structures are no part of
// what this package promises, and may hold pieces of KMS's answer.
func (e *Error) MarshalJSON() ([]byte, error) { return json.Marshal(e.Error()) }

// Retryable reports whether the same call may succeed later without anyone
// changing the key, the policy or the configuration.
func (e *Error) Retryable() bool {
	switch e.Reason {
	case ReasonUnavailable, ReasonIMDS, ReasonNoCredentials, ReasonClock:
		return true
	}
	return false
}

// throttled reports whether KMS answered that too many requests are made, and
// served others.
func (e *Error) throttled() bool {
	switch e.Code {
	case "ThrottlingException", "Throttling", "ThrottledException", "TooManyRequestsException", "RequestLimitExceeded", "LimitExceededException":
		return true
	}
	return false
}

// reasons maps the codes of KMS and of the AWS front end. Several, AccessDenied
// and Throttling among them, have no Go type in the SDK: the code is all there is.
var reasons = map[string]Reason{
	"AccessDeniedException": ReasonDenied,
	"AccessDenied":          ReasonDenied,
	"OptInRequired":         ReasonDenied,

	"NotFoundException": ReasonNotFound,

	// A key that is pending deletion answers either.
	"DisabledException":        ReasonKeyState,
	"KMSInvalidStateException": ReasonKeyState,

	"InvalidKeyUsageException": ReasonAsymmetric,

	"IncorrectKeyException":      ReasonCiphertext,
	"InvalidCiphertextException": ReasonCiphertext,

	"InvalidArnException":           ReasonInvalid,
	"ValidationException":           ReasonInvalid,
	"InvalidGrantTokenException":    ReasonInvalid,
	"UnsupportedOperationException": ReasonInvalid,

	"ThrottlingException":         ReasonUnavailable,
	"Throttling":                  ReasonUnavailable,
	"ThrottledException":          ReasonUnavailable,
	"TooManyRequestsException":    ReasonUnavailable,
	"RequestLimitExceeded":        ReasonUnavailable,
	"LimitExceededException":      ReasonUnavailable,
	"KeyUnavailableException":     ReasonUnavailable,
	"DependencyTimeoutException":  ReasonUnavailable,
	"KMSInternalException":        ReasonUnavailable,
	"InternalFailure":             ReasonUnavailable,
	"InternalServerError":         ReasonUnavailable,
	"ServiceUnavailable":          ReasonUnavailable,
	"ServiceUnavailableException": ReasonUnavailable,

	// Role credentials that have just been issued are not known everywhere at
	// once; expired ones are fetched anew.
	"ExpiredTokenException":               ReasonNoCredentials,
	"ExpiredToken":                        ReasonNoCredentials,
	"UnrecognizedClientException":         ReasonNoCredentials,
	"InvalidClientTokenId":                ReasonNoCredentials,
	"InvalidSignatureException":           ReasonNoCredentials,
	"SignatureDoesNotMatch":               ReasonNoCredentials,
	"IncompleteSignature":                 ReasonNoCredentials,
	"IncompleteSignatureException":        ReasonNoCredentials,
	"MissingAuthenticationToken":          ReasonNoCredentials,
	"MissingAuthenticationTokenException": ReasonNoCredentials,

	"RequestExpired":       ReasonClock,
	"RequestTimeTooSkewed": ReasonClock,
}

// classify turns whatever a call returned into an *Error.
func classify(op, object string, err error) *Error {
	e := &Error{Op: op, object: object, Err: err}
	var known *Error
	if errors.As(err, &known) {
		// Judged where it happened; only the call is known better here.
		e.Reason, e.Code, e.RequestID, e.Err = known.Reason, known.Code, known.RequestID, known.Err
		return e
	}
	var md *metadataError
	if errors.As(err, &md) {
		e.Reason, e.Code, e.Err = md.reason(), md.code(), md
		return e
	}
	var canceled *aws.RequestCanceledError
	if errors.As(err, &canceled) {
		// Only waiting for credentials ends so.
		e.Reason = ReasonIMDS
		return e
	}

	e.RequestID = requestID(err)
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() != noCode {
		e.Code = api.ErrorCode()
		r, ok := reasons[e.Code]
		switch {
		case clockIsOff(err):
			r = ReasonClock
		case !ok:
			r = statusReason(statusOf(err), ReasonDenied, ReasonInvalid)
		}
		e.Reason = r
		return e
	}
	status := statusOf(err)
	e.Reason = statusReason(status, ReasonAnswer, ReasonAnswer)
	var broken *smithy.DeserializationError
	var sent *url.Error
	switch {
	case status >= 300:
		e.Err = withSafeCause(fmt.Errorf("%w (%d %s)", errNotKMS, status, http.StatusText(status)), err)
	case errors.As(err, &broken):
		// Its text and snapshot may hold pieces of an answer with a key in it.
		e.Err = withSafeCause(errUnreadable, broken)
	case errors.As(err, &sent):
		// What the SDK puts around it tells of an answer, and there was none.
		e.Err = sent
	}
	return e
}

// noCode is what the SDK makes of an answer without an error code.
const noCode = "UnknownError"

// clockIsOff reports whether KMS refused a signature whose time is not its own:
// codes are the same for bad credentials. The SDK compares with the Date of the
// answer, and signs by KMS's clock from then on.
func clockIsOff(err error) bool {
	var skewed interface{ RetryableError() bool }
	return errors.As(err, &skewed) && skewed.RetryableError()
}

// statusOf is the HTTP status of the answer, 0 if there was none.
func statusOf(err error) int {
	var s interface{ HTTPStatusCode() int }
	if !errors.As(err, &s) {
		return 0
	}
	return s.HTTPStatusCode()
}

// statusReason judges an answer without a code that we know, or no answer.
func statusReason(status int, denied, invalid Reason) Reason {
	switch {
	case status == http.StatusForbidden || status == http.StatusUnauthorized:
		return denied
	case status >= 400 && status < 500 && status != http.StatusTooManyRequests && status != http.StatusRequestTimeout:
		return invalid
	}
	// Refused, timed out, no such host, TLS; 5xx, throttling, something between
	// us and KMS that answers for it.
	return ReasonUnavailable
}

func requestID(err error) string {
	var r interface{ ServiceRequestID() string }
	if errors.As(err, &r) {
		return r.ServiceRequestID()
	}
	return ""
}

var (
	// errUnreadable stands for an answer that is not what KMS sends.
	errUnreadable = errors.New("the answer cannot be understood")
	// errNotKMS stands for a failure without one of KMS's codes.
	errNotKMS = errors.New("the answer is not KMS's")
)

// withSafeCause adds the cause of a broken answer if it cannot hold a piece of it.
func withSafeCause(broken, err error) error {
	var timeout net.Error
	for _, safe := range []error{context.DeadlineExceeded, context.Canceled, io.ErrUnexpectedEOF} {
		if errors.Is(err, safe) {
			return fmt.Errorf("%w: %w", broken, safe)
		}
	}
	if errors.As(err, &timeout) {
		return fmt.Errorf("%w: %w", broken, timeout)
	}
	return broken
}

// joinContext adds the end of a context to an error that does not have it.
func joinContext(err, end error) error {
	if errors.Is(err, end) {
		return err
	}
	return fmt.Errorf("%w: %w", end, err)
}
