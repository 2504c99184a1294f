package archive

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// Mode says who encrypts an object under the KMS key.
type Mode string

// The modes, by the names that Amazon EMR has for them.
const (
	SSE Mode = "sse-kms" // S3 asks KMS and encrypts; the context is {"aws:s3:arn": the object's ARN}
	CSE Mode = "cse-kms" // the node asks KMS and encrypts; the context is {"kms_cmk_id": the key's ARN}
)

// Limits. An object is read and encrypted in memory.
const (
	MaxSize = 64 << 20 // bytes of an object of Put and Get

	defaultTimeout = 2 * time.Minute
	attempts       = 5                // of each request
	longestBackoff = 20 * time.Second // between two of them: the SDK's own
)

// Options say where a Client puts objects and under which key. Nothing else does: the environment and ~/.aws are not read.
type Options struct {
	Bucket string
	// Region of the bucket.
	Region string
	// Owner is the account that the bucket has to belong to; "" is any.
	Owner string
	Mode  Mode
	// KeyARN is the customer managed key, by its ARN and no alias: what S3 says of an object is compared with it.
	KeyARN string
	// Endpoint is the URL of S3 instead of AWS's for the region, where buckets are paths; KMSEndpoint that of KMS, which is asked
	// in mode CSE only. They carry what is archived, and data keys: who sets them checks them.
	Endpoint, KMSEndpoint string
	// Credentials are those of the instance's role.
	Credentials aws.CredentialsProvider
	// Timeout is how long a call may take, with all that is tried again; 0 is 2 min.
	Timeout time.Duration
}

// bucketName is the rule for the names of general purpose buckets.
// https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
var bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)

var (
	keyARN     = regexp.MustCompile(`^arn:aws[a-z-]*:kms:([a-z0-9-]+):\d{12}:key/[A-Za-z0-9-]{1,256}$`)
	regionName = regexp.MustCompile(`^[a-z]{2,}(-[a-z]+)+-\d+$`)
	accountID  = regexp.MustCompile(`^\d{12}$`)
)

// Check tells what of the options cannot work, without any I/O. It is an *[Error] of ReasonInvalid, ReasonAWSManaged or, where
// the key is of another region than the bucket, ReasonWrongRegion.
func (o Options) Check() error {
	fail := func(reason Reason, format string, args ...any) error {
		return &Error{Op: "Check", Reason: reason, Err: fmt.Errorf(format, args...), object: o.Bucket}
	}
	m := keyARN.FindStringSubmatch(o.KeyARN)
	switch {
	case !bucketName.MatchString(o.Bucket) || strings.Contains(o.Bucket, "..") || net.ParseIP(o.Bucket) != nil:
		return fail(ReasonInvalid, "%q is no bucket's name", o.Bucket)
	case o.Mode != SSE && o.Mode != CSE:
		return fail(ReasonInvalid, "mode %q is not allowed (allowed: %s, %s)", o.Mode, SSE, CSE)
	case strings.Contains(o.KeyARN, "alias/aws/"):
		return fail(ReasonAWSManaged, "%s is an AWS managed key: its policy is AWS's, and no other account may be let in", o.KeyARN)
	case m == nil:
		return fail(ReasonInvalid, "%q is no key ARN: what S3 says of an object is compared with it, so aliases and key ids will not do", o.KeyARN)
	case o.Region != "" && !regionName.MatchString(o.Region):
		return fail(ReasonInvalid, "%q is no region", o.Region)
	case o.Region != "" && o.Mode == SSE && m[1] != o.Region:
		return fail(ReasonWrongRegion, "its region is %s, that of key %s is %s: S3 takes keys of its own region only", o.Region, o.KeyARN, m[1])
	case o.Owner != "" && !accountID.MatchString(o.Owner):
		return fail(ReasonInvalid, "owner %q is no account id, which has 12 digits", o.Owner)
	case o.Timeout < 0:
		return fail(ReasonInvalid, "the timeout %s is negative", o.Timeout)
	}
	return nil
}

// Client puts objects into a bucket and gets them back. It is safe for use by several goroutines. All its errors are *[Error].
type Client struct {
	options Options
	s3      *s3.Client
	kms     *kms.Client
}

// New checks the options and builds a Client. It does no I/O.
func New(o Options) (*Client, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	if o.Region == "" {
		return nil, &Error{Op: "Check", Reason: ReasonInvalid, Err: errors.New("the region is not known"), object: o.Bucket}
	}
	return build(o, keyARN.FindStringSubmatch(o.KeyARN)[1]), nil
}

// build is New without a look at the options; kmsRegion is the key's.
func build(o Options, kmsRegion string) *Client {
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	tries := func() aws.Retryer {
		return retry.NewStandard(func(r *retry.StandardOptions) { r.MaxAttempts, r.MaxBackoff = attempts, longestBackoff })
	}
	c := &Client{options: o}
	c.s3 = s3.New(s3.Options{
		Region: o.Region, Credentials: o.Credentials, HTTPClient: httpClient(), Retryer: tries(),
		UsePathStyle: o.Endpoint != "", BaseEndpoint: endpoint(o.Endpoint),
		// A bucket has one name and one region here; other ways to name it would lead elsewhere.
		DisableMultiRegionAccessPoints: true,
	})
	c.kms = kms.New(kms.Options{
		Region: kmsRegion, Credentials: o.Credentials, HTTPClient: httpClient(), Retryer: tries(),
		BaseEndpoint: endpoint(o.KMSEndpoint),
	})
	return c
}

func endpoint(url string) *string {
	if url == "" {
		return nil
	}
	return &url
}

// httpClient uses no proxy of the environment, as what is sent may be in the clear, and follows no redirect: it would lead to
// a bucket of another region.
func httpClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			ForceAttemptHTTP2:     true,
			MaxIdleConnsPerHost:   4,
			IdleConnTimeout:       90 * time.Second,
			TLSHandshakeTimeout:   10 * time.Second,
			ResponseHeaderTimeout: 30 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// URL names an object for people.
func (c *Client) URL(name string) string { return "s3://" + c.options.Bucket + "/" + name }

// call runs one call of the client, and tells what became of it.
func (c *Client) call(ctx context.Context, op, name string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.options.Timeout)
	defer cancel()
	if err := f(ctx); err != nil {
		return c.classify(op, c.URL(name), err)
	}
	return nil
}
