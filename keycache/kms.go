package keycache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go/middleware"
	"github.com/google/uuid"
)

// kmsAPI is what is used of KMS, as the SDK has it.
type kmsAPI interface {
	DescribeKey(context.Context, *kms.DescribeKeyInput, ...func(*kms.Options)) (*kms.DescribeKeyOutput, error)
	GenerateDataKey(context.Context, *kms.GenerateDataKeyInput, ...func(*kms.Options)) (*kms.GenerateDataKeyOutput, error)
	Decrypt(context.Context, *kms.DecryptInput, ...func(*kms.Options)) (*kms.DecryptOutput, error)
	ReEncrypt(context.Context, *kms.ReEncryptInput, ...func(*kms.Options)) (*kms.ReEncryptOutput, error)
}

// Options say which key a Client uses and how it reaches it. Nothing else does:
// the environment and ~/.aws are not read.
type Options struct {
	// KeyID is the customer managed key: a key ARN, a key id, an alias
	// ("alias/name") or an alias ARN.
	KeyID string
	// Region of KMS; "" is the instance's own, from the metadata service.
	Region string
	// KMSEndpoint is the URL to call instead of AWS's for the region: a VPC
	// endpoint or a test server.
	KMSEndpoint string
	// IMDSEndpoint is the URL of the metadata service; "" is
	// http://169.254.169.254.
	IMDSEndpoint string
	// CallTimeout is the deadline of every attempt, waiting for credentials
	// included; 0 is 10 s.
	CallTimeout time.Duration
	// RetryLimit is how long after its first attempt a call is tried again;
	// 0 is 10 min, less than 0 is one attempt only.
	RetryLimit time.Duration
	// OnRetry, if not nil, is called before each wait, in the goroutine of the
	// call.
	OnRetry func(Retry)
	// OnAttempt, if not nil, is called after each attempt of a call, in its
	// goroutine. It is for who measures.
	OnAttempt func(Attempt)
}

func (o Options) imdsEndpoint() string {
	if o.IMDSEndpoint == "" {
		return imdsEndpoint
	}
	return o.IMDSEndpoint
}

// Client gets data keys from KMS as the instance's role. It is safe for use by
// several goroutines. All its errors are *Error.
type Client struct {
	options Options
	timeout time.Duration
	limit   time.Duration
	imds    *metadata
	creds   *aws.CredentialsCache
	connect func(region string) kmsAPI
	clock   clock

	mu       sync.Mutex
	kms      kmsAPI // nil until the region is known
	identity *Identity
	calls    Calls
	ahead    map[string]time.Duration // of the node's clock before that of "KMS" and "IMDS", once they have answered
}

// Calls counts what a Client has sent.
type Calls struct {
	// Attempts of each KMS call that were sent; one call may be several.
	GenerateDataKey, Decrypt, DescribeKey, ReEncrypt int
	IMDS                                             int            // reads of the metadata service, session tokens not included
	Retries                                          int            // waits
	RequestIDs                                       []string       // of KMS's answers, in order, failures included
	RetriesOf                                        map[string]int // waits of each Retry.Op; nil without any
}

// aliasName matches the part of a key id or ARN that names an alias.
// https://docs.aws.amazon.com/kms/latest/APIReference/API_CreateAlias.html
var (
	bareKey  = regexp.MustCompile(`^(` + keyID + `)$`)
	aliasRef = regexp.MustCompile(`^(?:arn:aws[a-z-]*:kms:([a-z0-9-]+):\d{12}:)?(alias/[A-Za-z0-9/_-]{1,250})$`)
)

// New checks the options and builds a Client. It does no I/O. Errors have the
// reasons ReasonInvalid (malformed key, region, endpoint), ReasonAWSManaged
// (alias/aws/…) and ReasonWrongRegion (the key's ARN is of another region than
// Region).
func New(o Options) (*Client, error) {
	fail := func(reason Reason, format string, args ...any) (*Client, error) {
		return nil, &Error{Op: "New", Reason: reason, Err: fmt.Errorf(format, args...), object: o.KeyID}
	}
	keyRegion := ""
	if m := keyARN.FindStringSubmatch(o.KeyID); m != nil {
		keyRegion = m[1]
	} else if m := aliasRef.FindStringSubmatch(o.KeyID); m != nil {
		if strings.HasPrefix(m[2], "alias/aws/") {
			return fail(ReasonAWSManaged, "it is an alias of an AWS managed key")
		}
		keyRegion = m[1]
	} else if !bareKey.MatchString(o.KeyID) {
		return fail(ReasonInvalid, "%q is no key ARN, key id, alias or alias ARN", o.KeyID)
	}
	if o.Region != "" && !regionName.MatchString(o.Region) {
		return fail(ReasonInvalid, "%q is no region", o.Region)
	}
	if o.Region != "" && keyRegion != "" && keyRegion != o.Region {
		return fail(ReasonWrongRegion, "it is in region %s, the configured region is %s", keyRegion, o.Region)
	}
	for _, endpoint := range []string{o.KMSEndpoint, o.IMDSEndpoint} {
		if err := CheckEndpoint(endpoint); err != nil {
			return fail(ReasonInvalid, "%w", err)
		}
	}
	if o.CallTimeout < 0 {
		return fail(ReasonInvalid, "the call timeout %s is negative", o.CallTimeout)
	}

	c := &Client{options: o, timeout: o.CallTimeout, limit: o.RetryLimit, clock: realClock()}
	if c.timeout == 0 {
		c.timeout = defaultCallTimeout
	}
	if c.limit == 0 {
		c.limit = defaultRetryLimit
	}
	c.imds = newMetadata(o.imdsEndpoint(), timekeeper{transport(), c.sawClock("IMDS")}, func() { c.note(func(calls *Calls) { calls.IMDS++ }) })
	c.creds = newCredentials(c.imds, c.timeout, o.OnAttempt)
	c.connect = c.connectKMS
	return c, nil
}

// CheckEndpoint tells whether an endpoint of KMS or IMDS is one to which requests may go. Plain HTTP is for loopback and link-local
// addresses, where tests, proxies and IMDS are: over a network it would show the data key. "" is the default endpoint.
func CheckEndpoint(endpoint string) error {
	if endpoint == "" {
		return nil
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("endpoint %q is no URL of a server, such as https://HOST[:PORT]", endpoint)
	}
	switch u.Scheme {
	case "https":
		return nil
	case "http":
		addr, err := netip.ParseAddr(u.Hostname())
		if err == nil && (addr.IsLoopback() || addr.IsLinkLocalUnicast()) {
			return nil
		}
		return fmt.Errorf("endpoint %q: plain http is allowed for loopback and link-local addresses only, because answers carry the data key", endpoint)
	}
	return fmt.Errorf("endpoint %q: scheme %q is not allowed (allowed: https, http)", endpoint, u.Scheme)
}

// transport is http.DefaultTransport's way to connect, but for the proxies of
// the environment: keys must not travel where HTTPS_PROXY points.
func transport() *http.Transport {
	return &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		ForceAttemptHTTP2:   true,
		MaxIdleConns:        4,
		IdleConnTimeout:     90 * time.Second,
		TLSHandshakeTimeout: 10 * time.Second,
	}
}

// httpClient follows no redirect: neither service sends one.
func httpClient(t http.RoundTripper) *http.Client {
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func (c *Client) connectKMS(region string) kmsAPI {
	o := kms.Options{
		Region:      region,
		Credentials: c.creds,
		HTTPClient:  tracer{httpClient(timekeeper{transport(), c.sawClock("KMS")})},
		Retryer:     aws.NopRetryer{},
	}
	if c.options.KMSEndpoint != "" {
		o.BaseEndpoint = aws.String(c.options.KMSEndpoint)
	}
	return kms.New(o)
}

// Credentials gives those of the instance's role, to who else calls AWS for this node.
func (c *Client) Credentials() aws.CredentialsProvider { return c.creds }

// Calls returns what has been counted so far.
func (c *Client) Calls() Calls {
	c.mu.Lock()
	defer c.mu.Unlock()
	calls := c.calls
	calls.RequestIDs, calls.RetriesOf = slices.Clone(calls.RequestIDs), maps.Clone(calls.RetriesOf)
	return calls
}

func (c *Client) note(f func(*Calls)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.calls)
}

// Identity returns the node's instance identity document, read once and
// retried as every call is. Errors are ReasonIMDS.
func (c *Client) Identity(ctx context.Context) (Identity, error) {
	return c.identityFrom(ctx, c.clock.now())
}

func (c *Client) identityFrom(ctx context.Context, start time.Time) (Identity, error) {
	c.mu.Lock()
	known := c.identity
	c.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	var id Identity
	err := c.retry(ctx, start, "Identity", "", func(ctx context.Context) (err error) {
		id, err = c.imds.identity(ctx)
		return err
	})
	if err != nil {
		return Identity{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.identity = &id
	return id, nil
}

// Ephemeral returns the device names ("sdb") that the block device mapping has
// for ephemeral0, ephemeral1, …; it never lists NVMe instance store. None is no
// error. Errors are ReasonIMDS.
func (c *Client) Ephemeral(ctx context.Context) ([]string, error) {
	var devices []string
	err := c.retry(ctx, c.clock.now(), "Ephemeral", "", func(ctx context.Context) (err error) {
		devices, err = c.imds.ephemeral(ctx)
		return err
	})
	return devices, err
}

// KeyFacts is what DescribeKey says of the configured key.
type KeyFacts struct {
	Checked bool   // false: the role may not call DescribeKey, nothing else is known
	ARN     string // of the key, also where an alias is configured
	Manager string // "CUSTOMER" or "AWS"
	Spec    string // "SYMMETRIC_DEFAULT", "RSA_2048", …
	Usage   string // "ENCRYPT_DECRYPT", "SIGN_VERIFY", …
	State   string // "Enabled", "Disabled", "PendingDeletion", …
}

// CheckKey asks KMS whether the configured key is customer managed, symmetric
// and enabled. What was found comes with the error if it is not
// (ReasonAWSManaged, ReasonAsymmetric, ReasonKeyState). A role that may not
// call DescribeKey is no error: then Generate's errors tell.
func (c *Client) CheckKey(ctx context.Context) (KeyFacts, error) {
	const op = "DescribeKey"
	var out *kms.DescribeKeyOutput
	err := c.call(ctx, c.clock.now(), op, c.options.KeyID, func(ctx context.Context, api kmsAPI) (md middleware.Metadata, err error) {
		out, err = api.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(c.options.KeyID)})
		if err != nil {
			return md, err
		}
		if out.KeyMetadata == nil || aws.ToString(out.KeyMetadata.Arn) == "" {
			return out.ResultMetadata, incomplete("key metadata")
		}
		return out.ResultMetadata, nil
	})
	var e *Error
	if errors.As(err, &e) && e.Reason == ReasonDenied {
		return KeyFacts{}, nil
	}
	if err != nil {
		return KeyFacts{}, err
	}
	m := out.KeyMetadata
	f := KeyFacts{
		Checked: true,
		ARN:     aws.ToString(m.Arn),
		Manager: string(m.KeyManager),
		Spec:    string(m.KeySpec),
		Usage:   string(m.KeyUsage),
		State:   string(m.KeyState),
	}
	bad := func(reason Reason, format string, args ...any) (KeyFacts, error) {
		return f, &Error{Op: op, Reason: reason, Err: fmt.Errorf(format, args...), object: c.options.KeyID}
	}
	switch {
	case m.KeyManager != types.KeyManagerTypeCustomer:
		return bad(ReasonAWSManaged, "its manager is %s, not CUSTOMER", f.Manager)
	case m.KeySpec != types.KeySpecSymmetricDefault || m.KeyUsage != types.KeyUsageTypeEncryptDecrypt:
		return bad(ReasonAsymmetric, "it is a %s key for %s, not a symmetric encryption key", f.Spec, f.Usage)
	case m.KeyState != types.KeyStateEnabled:
		return bad(ReasonKeyState, "its state is %s, not Enabled", f.State)
	}
	return f, nil
}

// Generate makes a data key under the configured key: GenerateDataKey, AES_256,
// no encryption context. The caller owns the Key. The record is complete, with
// a new ID, but neither stored nor proven to decrypt.
func (c *Client) Generate(ctx context.Context) (*Key, KeyRecord, error) {
	const op = "GenerateDataKey"
	start := c.clock.now()
	id, err := c.identityFrom(ctx, start)
	if err != nil {
		return nil, KeyRecord{}, err
	}
	var key *Key
	var r KeyRecord
	err = c.call(ctx, start, op, c.options.KeyID, func(ctx context.Context, api kmsAPI) (md middleware.Metadata, err error) {
		out, err := api.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{
			KeyId:   aws.String(c.options.KeyID),
			KeySpec: types.DataKeySpecAes256,
		})
		if err != nil {
			return md, err
		}
		defer clear(out.Plaintext)
		r = KeyRecord{
			Version:    RecordVersion,
			ID:         uuid.NewString(),
			KeyARN:     aws.ToString(out.KeyId),
			WrappedKey: out.CiphertextBlob,
			InstanceID: id.InstanceID,
			Region:     id.Region,
			Created:    c.clock.now().UTC(),
		}
		r.RequestID, _ = awsmiddleware.GetRequestIDMetadata(out.ResultMetadata)
		if r.KeyARN == "" || len(out.CiphertextBlob) == 0 || len(out.Plaintext) == 0 {
			return out.ResultMetadata, incomplete("data key")
		}
		if err := c.isConfigured(r.KeyARN); err != nil {
			return out.ResultMetadata, err
		}
		if err := r.validate(); err != nil {
			return out.ResultMetadata, &Error{Reason: ReasonAnswer, Err: fmt.Errorf("the answer makes no record: %w", err)}
		}
		key, err = NewKey(out.Plaintext)
		if errors.Is(err, errKeyLength) {
			return out.ResultMetadata, &Error{Reason: ReasonAnswer, Err: fmt.Errorf("the answer has no data key: %w", err)}
		}
		if err != nil {
			return out.ResultMetadata, &Error{Reason: ReasonInvalid, Err: err}
		}
		key.m.requestID = r.RequestID
		return out.ResultMetadata, nil
	})
	if err != nil {
		return nil, KeyRecord{}, err
	}
	return key, r, nil
}

// ReEncrypt wraps a record's data key anew, under the configured key. The data key
// does not leave KMS. The record that it returns has the same ID and is complete,
// but neither stored nor proven to decrypt to the same data key. Errors are as
// those of Generate, for the configured key, and of Decrypt, for the record.
func (c *Client) ReEncrypt(ctx context.Context, r KeyRecord) (KeyRecord, error) {
	const op = "ReEncrypt"
	start := c.clock.now()
	// KMS looks for both keys in the region that it is called in.
	if _, err := c.api(ctx, start, op, r.KeyARN); err != nil {
		return KeyRecord{}, err
	}
	var rewrapped KeyRecord
	err := c.call(ctx, start, op, c.options.KeyID, func(ctx context.Context, api kmsAPI) (md middleware.Metadata, err error) {
		out, err := api.ReEncrypt(ctx, &kms.ReEncryptInput{
			CiphertextBlob:               r.WrappedKey,
			SourceKeyId:                  aws.String(r.KeyARN),
			SourceEncryptionContext:      r.EncryptionContext,
			DestinationKeyId:             aws.String(c.options.KeyID),
			DestinationEncryptionContext: r.EncryptionContext,
		})
		if err != nil {
			return md, err
		}
		rewrapped = r
		rewrapped.KeyARN, rewrapped.WrappedKey = aws.ToString(out.KeyId), out.CiphertextBlob
		rewrapped.RequestID, _ = awsmiddleware.GetRequestIDMetadata(out.ResultMetadata)
		if rewrapped.KeyARN == "" || len(out.CiphertextBlob) == 0 {
			return out.ResultMetadata, incomplete("wrapped key")
		}
		if got := aws.ToString(out.SourceKeyId); got != r.KeyARN {
			return out.ResultMetadata, &Error{Reason: ReasonAnswer, Err: fmt.Errorf("KMS decrypted it under %s", got)}
		}
		if err := c.isConfigured(rewrapped.KeyARN); err != nil {
			return out.ResultMetadata, err
		}
		if err := rewrapped.validate(); err != nil {
			return out.ResultMetadata, &Error{Reason: ReasonAnswer, Err: fmt.Errorf("the answer makes no record: %w", err)}
		}
		return out.ResultMetadata, nil
	})
	if err != nil {
		return KeyRecord{}, err
	}
	return rewrapped, nil
}

// isConfigured refuses a data key under another key than the configured one.
// What an alias stands for only KMS knows.
func (c *Client) isConfigured(arn string) error {
	want := c.options.KeyID
	if arn == want || aliasRef.MatchString(want) || (bareKey.MatchString(want) && strings.HasSuffix(arn, ":key/"+want)) {
		return nil
	}
	return &Error{Reason: ReasonAnswer, Err: fmt.Errorf("KMS answered with a data key under %s", arn)}
}

// Decrypt unwraps a record's key under the record's key ARN and encryption
// context (LUKS keys have none). Only KeyARN, WrappedKey and EncryptionContext
// are used. The caller owns the Key. It fails with ReasonAnswer if the answer is
// under another key, with ReasonCiphertext if it has not 32 bytes, with
// ReasonWrongRegion if the ARN is of another region.
func (c *Client) Decrypt(ctx context.Context, r KeyRecord) (*Key, error) {
	const op = "Decrypt"
	if !keyARN.MatchString(r.KeyARN) || len(r.WrappedKey) == 0 || len(r.WrappedKey) > maxWrapped {
		return nil, &Error{Op: op, Reason: ReasonInvalid, object: r.KeyARN,
			Err: fmt.Errorf("the record has no key ARN or no wrapped key of 1 to %d bytes", maxWrapped)}
	}
	var key *Key
	err := c.call(ctx, c.clock.now(), op, r.KeyARN, func(ctx context.Context, api kmsAPI) (md middleware.Metadata, err error) {
		out, err := api.Decrypt(ctx, &kms.DecryptInput{
			KeyId:             aws.String(r.KeyARN),
			CiphertextBlob:    r.WrappedKey,
			EncryptionContext: r.EncryptionContext,
		})
		if err != nil {
			return md, err
		}
		defer clear(out.Plaintext)
		if aws.ToString(out.KeyId) == "" {
			return out.ResultMetadata, incomplete("key ARN")
		}
		if got := aws.ToString(out.KeyId); got != r.KeyARN {
			return out.ResultMetadata, &Error{Reason: ReasonAnswer, Err: fmt.Errorf("KMS decrypted it under %s", got)}
		}
		key, err = NewKey(out.Plaintext)
		if errors.Is(err, errKeyLength) {
			return out.ResultMetadata, &Error{Reason: ReasonCiphertext, Err: fmt.Errorf("it holds no data key: %w", err)}
		}
		if err != nil {
			return out.ResultMetadata, &Error{Reason: ReasonInvalid, Err: err}
		}
		key.m.requestID, _ = awsmiddleware.GetRequestIDMetadata(out.ResultMetadata)
		return out.ResultMetadata, nil
	})
	if err != nil {
		return nil, err
	}
	return key, nil
}

// incomplete is a success without what was asked for: something between us and
// KMS answered.
func incomplete(what string) error {
	return &Error{Reason: ReasonUnavailable, Err: fmt.Errorf("the answer has no %s", what)}
}

// call makes one KMS call, retried from start on.
func (c *Client) call(ctx context.Context, start time.Time, op, object string, f func(context.Context, kmsAPI) (middleware.Metadata, error)) error {
	api, err := c.api(ctx, start, op, object)
	if err != nil {
		return err
	}
	return c.retry(ctx, start, op, object, func(ctx context.Context) error {
		// Fetched here and not inside the SDK's call, so that what IMDS lacks
		// is never taken for KMS's fault.
		if _, err := c.creds.Retrieve(ctx); err != nil {
			return err
		}
		c.note(func(calls *Calls) {
			switch op {
			case "GenerateDataKey":
				calls.GenerateDataKey++
			case "Decrypt":
				calls.Decrypt++
			case "DescribeKey":
				calls.DescribeKey++
			case "ReEncrypt":
				calls.ReEncrypt++
			}
		})
		ctx, t := withTrace(ctx)
		md, err := f(ctx, api)
		id, _ := awsmiddleware.GetRequestIDMetadata(md)
		if err != nil {
			e := classify(op, object, t.late(err))
			if e.RequestID == "" {
				e.RequestID = id
			}
			id = e.RequestID
			if e.Reason == ReasonNoCredentials {
				// The ones we have are refused: ask for others.
				c.creds.Invalidate()
			}
			err = e
		}
		if id != "" {
			c.note(func(calls *Calls) { calls.RequestIDs = append(calls.RequestIDs, id) })
		}
		return err
	})
}

// api returns the KMS client of the node's region, once that is known, and
// refuses a key ARN of another region.
func (c *Client) api(ctx context.Context, start time.Time, op, object string) (kmsAPI, error) {
	region, err := c.region(ctx, start, op, object)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kms == nil {
		c.kms = c.connect(region)
	}
	return c.kms, nil
}

// region returns the region that KMS is called in, and refuses a key ARN of another: KMS would only say that the key is not found.
func (c *Client) region(ctx context.Context, start time.Time, op, object string) (string, error) {
	region := c.options.Region
	if region == "" {
		id, err := c.identityFrom(ctx, start)
		if err != nil {
			return "", err
		}
		region = id.Region
	}
	keyRegion := ""
	if m := keyARN.FindStringSubmatch(object); m != nil {
		keyRegion = m[1]
	} else if m := aliasRef.FindStringSubmatch(object); m != nil {
		keyRegion = m[1]
	}
	if keyRegion != "" && keyRegion != region {
		return "", &Error{Op: op, Reason: ReasonWrongRegion, object: object,
			Err: fmt.Errorf("the key is in region %s, KMS is called in %s", keyRegion, region)}
	}
	return region, nil
}
