package keycache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
)

const (
	// imdsEndpoint is where EC2 puts the instance metadata service (IPv4).
	imdsEndpoint = "http://169.254.169.254"
	tokenPath    = "/latest/api/token"
	rolePath     = "iam/security-credentials/"
	mappingPath  = "block-device-mapping/"
)

// Identity is what the instance identity document says of this node.
type Identity struct {
	InstanceID       string // i-…
	Region           string // us-east-1
	AvailabilityZone string
	AccountID        string
	InstanceType     string
}

var (
	regionName   = regexp.MustCompile(`^[a-z]{2,}(-[a-z0-9]+)+-\d+$`)
	instanceName = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)
)

// metadata reads the instance metadata service with session tokens only
// (IMDSv2), once per call: retrying is the Client's business.
type metadata struct {
	client *imds.Client
	count  func() // called for every read, tokens not included
}

func newMetadata(endpoint string, transport http.RoundTripper, count func()) *metadata {
	return &metadata{
		count: count,
		client: imds.New(imds.Options{
			// Endpoint and ClientEnableState are set because a client without
			// them asks AWS_EC2_METADATA_SERVICE_ENDPOINT and
			// AWS_EC2_METADATA_DISABLED.
			Endpoint:          endpoint,
			ClientEnableState: imds.ClientEnabled,
			EnableFallback:    aws.FalseTernary,
			Retryer:           aws.NopRetryer{},
			// A client of our own also keeps the SDK from its 250 ms to
			// connect, which a booting network needs longer than.
			HTTPClient: tracer{httpClient(transport)},
			// Every call has a deadline of ours.
			DisableDefaultTimeout: true,
		}),
	}
}

// GetMetadata has the SDK's signature: ec2rolecreds reads through it.
func (m *metadata) GetMetadata(ctx context.Context, in *imds.GetMetadataInput, opts ...func(*imds.Options)) (*imds.GetMetadataOutput, error) {
	m.count()
	ctx, t := withTrace(ctx)
	out, err := m.client.GetMetadata(ctx, in, opts...)
	if err != nil {
		return nil, t.explain(in.Path, err)
	}
	return out, nil
}

func (m *metadata) identity(ctx context.Context) (Identity, error) {
	m.count()
	ctx, t := withTrace(ctx)
	doc, err := m.client.GetInstanceIdentityDocument(ctx, nil)
	if err != nil {
		return Identity{}, t.explain("instance-identity/document", err)
	}
	id := Identity{
		InstanceID:       doc.InstanceID,
		Region:           doc.Region,
		AvailabilityZone: doc.AvailabilityZone,
		AccountID:        doc.AccountID,
		InstanceType:     doc.InstanceType,
	}
	// Both end in records, and the region in the host name that is called.
	if !instanceName.MatchString(id.InstanceID) || !regionName.MatchString(id.Region) {
		return Identity{}, &metadataError{
			path: "instance-identity/document",
			err:  fmt.Errorf("instance id %q and region %q are not what EC2 names them", id.InstanceID, id.Region),
		}
	}
	return id, nil
}

// ephemeral returns the device names of ephemeral0, ephemeral1, … in order.
func (m *metadata) ephemeral(ctx context.Context) ([]string, error) {
	names, err := m.read(ctx, mappingPath)
	if err != nil {
		return nil, ignoreNotFound(err)
	}
	var devices []string
	for _, name := range strings.Fields(names) {
		if !strings.HasPrefix(name, "ephemeral") {
			continue
		}
		device, err := m.read(ctx, mappingPath+name)
		if err != nil {
			return nil, err
		}
		devices = append(devices, strings.TrimSpace(device))
	}
	return devices, nil
}

// ignoreNotFound: an instance without a mapping has no ephemeral disks.
func ignoreNotFound(err error) error {
	var md *metadataError
	if errors.As(err, &md) && !md.token && md.status == http.StatusNotFound {
		return nil
	}
	return err
}

func (m *metadata) read(ctx context.Context, path string) (string, error) {
	out, err := m.GetMetadata(ctx, &imds.GetMetadataInput{Path: path})
	if err != nil {
		return "", err
	}
	defer out.Content.Close()
	data, err := io.ReadAll(out.Content)
	if err != nil {
		return "", &metadataError{path: path, err: err}
	}
	return string(data), nil
}

// roleCredentials is the instance role's credentials and nothing else: the SDK's
// provider would also answer a failed refresh with expired credentials for
// another 5 to 15 minutes, and the failure would be seen as KMS's.
type roleCredentials struct {
	role    *ec2rolecreds.Provider
	timeout time.Duration
	done    func(Attempt) // may be nil
}

func newCredentials(m *metadata, timeout time.Duration, done func(Attempt)) *aws.CredentialsCache {
	return aws.NewCredentialsCache(roleCredentials{
		role: ec2rolecreds.New(func(o *ec2rolecreds.Options) { o.Client = m }),
		// aws.CredentialsCache hides the caller's deadline. A little less than
		// the attempt has, so that what was being waited for is in the error.
		timeout: timeout - timeout/10,
		done:    done,
	})
}

// Retrieve implements aws.CredentialsProvider.
func (r roleCredentials) Retrieve(ctx context.Context) (_ aws.Credentials, err error) {
	if r.done != nil {
		start := time.Now()
		defer func() { r.done(Attempt{Op: "Credentials", Number: 1, Start: start, Took: time.Since(start), Err: err}) }()
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	creds, err := r.role.Retrieve(ctx)
	if err != nil {
		var md *metadataError
		if errors.As(err, &md) {
			return aws.Credentials{}, md
		}
		// Reached the service, which has no role or no credentials for it.
		return aws.Credentials{}, &Error{Reason: ReasonNoCredentials, Err: err}
	}
	if !creds.HasKeys() {
		return aws.Credentials{}, &Error{Reason: ReasonNoCredentials, Err: errors.New("the instance role's credentials are empty")}
	}
	return creds, nil
}

// metadataError is a read of the metadata service that failed.
type metadataError struct {
	path    string
	token   bool // the token could not be had, path was not asked for
	reached bool // a connection was made
	status  int  // of the answer, 0 if there was none
	err     error
}

func (e *metadataError) Error() string {
	what := "instance metadata " + strings.Trim(e.path, "/")
	if e.token {
		what = "a session token for instance metadata"
	}
	if e.status >= 300 {
		return fmt.Sprintf("cannot get %s: the answer is %d %s", what, e.status, http.StatusText(e.status))
	}
	return fmt.Sprintf("cannot get %s: %v", what, e.err)
}

func (e *metadataError) Unwrap() error { return e.err }

func (e *metadataError) reason() Reason {
	// A node without a role answers 404 here and nowhere before.
	if !e.token && e.status == http.StatusNotFound && strings.Contains(e.path, rolePath) {
		return ReasonNoCredentials
	}
	return ReasonIMDS
}

func (e *metadataError) code() string {
	switch {
	case e.token && e.reached && e.status == 0 && errors.Is(e.err, context.DeadlineExceeded):
		return CodeTokenTimeout
	case e.status >= 300:
		return fmt.Sprintf("HTTP%d", e.status)
	}
	return ""
}

// trace notes the last request of one call. The SDK's errors hide how far it
// came: for a token that could not be had status and cause are behind a type
// without Unwrap, and those are what tells "off" from "hop limit"; for an attempt
// that ran out of time only that is said, and not whether the name, the
// connection or the answer did not come.
type trace struct {
	mu      sync.Mutex
	token   bool
	reached bool
	status  int
	err     error
	host    string // that is looked up, "" once that is done
	doing   string // what else is being waited for
}

type traceKey struct{}

func withTrace(ctx context.Context) (context.Context, *trace) {
	t := &trace{}
	return context.WithValue(ctx, traceKey{}, t), t
}

type tracer struct{ client *http.Client }

// Do implements the SDK's HTTP clients.
func (t tracer) Do(r *http.Request) (*http.Response, error) {
	tr, ok := r.Context().Value(traceKey{}).(*trace)
	if !ok {
		return t.client.Do(r)
	}
	tr.note(func() {
		tr.token, tr.reached, tr.status, tr.err, tr.host, tr.doing = r.URL.Path == tokenPath, false, 0, nil, "", "connecting"
	})
	doing := func(what string) { tr.note(func() { tr.host, tr.doing = "", what }) }
	ctx := httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		DNSStart:             func(i httptrace.DNSStartInfo) { tr.note(func() { tr.host = i.Host }) },
		ConnectStart:         func(_, address string) { doing("connecting to " + address) },
		TLSHandshakeStart:    func() { doing("agreeing on TLS") },
		GotConn:              func(httptrace.GotConnInfo) { doing("waiting for the answer"); tr.note(func() { tr.reached = true }) },
		GotFirstResponseByte: func() { doing("reading the answer") },
	})
	resp, err := t.client.Do(r.WithContext(ctx))
	tr.note(func() {
		tr.err = err
		if resp != nil {
			tr.status = resp.StatusCode
		}
	})
	return resp, err
}

func (t *trace) note(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f()
}

// late adds to the error of an attempt that ran out of time what did not come.
func (t *trace) late(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.doing == "" || !errors.Is(err, context.DeadlineExceeded):
		return err // nothing was sent, or that is not what happened
	case t.host != "":
		return fmt.Errorf("%w: %w", context.DeadlineExceeded, &net.DNSError{Err: "no answer", Name: t.host, IsTimeout: true})
	}
	return fmt.Errorf("%w while %s", context.DeadlineExceeded, t.doing)
}

func (t *trace) explain(path string, err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := &metadataError{path: path, token: t.token, reached: t.reached, status: t.status, err: err}
	if t.err != nil {
		e.err = t.err
	}
	return e
}
