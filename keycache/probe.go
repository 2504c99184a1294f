package keycache

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// clockTolerance is how far a signature's time may be from KMS's.
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-troubleshooting.html
const clockTolerance = 5 * time.Minute

// CheckRole gets the credentials of the instance's role, which are not returned, and tells the role's name. Errors are ReasonIMDS
// and ReasonNoCredentials.
func (c *Client) CheckRole(ctx context.Context) (name string, err error) {
	err = c.retry(ctx, c.clock.now(), "CheckRole", "", func(ctx context.Context) error {
		names, err := c.imds.read(ctx, rolePath)
		if err != nil {
			return err
		}
		name, _, _ = strings.Cut(names, "\n")
		_, err = c.creds.Retrieve(ctx)
		return err
	})
	return name, err
}

// Region returns the region that KMS is called in. The error is ReasonWrongRegion where the configured key is an ARN of
// another, or what [Client.Identity] returns where the region is the node's own.
func (c *Client) Region(ctx context.Context) (string, error) {
	return c.region(ctx, c.clock.now(), "Region", c.options.KeyID)
}

// EndpointFacts is who answers where KMS is called.
type EndpointFacts struct {
	URL       string
	Addresses []netip.Addr // that the host's name stands for
	TLS       string       // "TLS 1.3"; "" over plain http
	Holder    string       // whose the certificate is
	Issuer    string       // who signed it
	NotAfter  time.Time
}

// CheckEndpoint looks the name of KMS's endpoint up, connects, and has its certificate verified. It sends one request, which is not
// signed and asks for nothing. Errors are ReasonUnavailable; of a certificate that is not trusted, they name it.
func (c *Client) CheckEndpoint(ctx context.Context) (EndpointFacts, error) {
	const op = "CheckEndpoint"
	var f EndpointFacts
	region, err := c.Region(ctx)
	if err != nil {
		return f, err
	}
	f.URL = c.options.KMSEndpoint
	if f.URL == "" {
		endpoint, err := kms.NewDefaultEndpointResolverV2().ResolveEndpoint(ctx, kms.EndpointParameters{Region: aws.String(region)})
		if err != nil {
			return f, &Error{Op: op, Reason: ReasonInvalid, Err: err}
		}
		f.URL = endpoint.URI.String()
	}
	err = c.retry(ctx, c.clock.now(), op, f.URL, func(ctx context.Context) error {
		u, err := url.Parse(f.URL)
		if err != nil {
			return &Error{Reason: ReasonInvalid, Err: err}
		}
		if f.Addresses, err = net.DefaultResolver.LookupNetIP(ctx, "ip", u.Hostname()); err != nil {
			return &Error{Reason: ReasonUnavailable, Err: err}
		}
		for i, a := range f.Addresses {
			f.Addresses[i] = a.Unmap()
		}
		slices.SortFunc(f.Addresses, netip.Addr.Compare)
		return c.knock(ctx, &f)
	})
	return f, err
}

// knock sends the request of [Client.CheckEndpoint]. Whatever is answered, it is an answer.
func (c *Client) knock(ctx context.Context, f *EndpointFacts) error {
	t := transport()
	defer t.CloseIdleConnections()
	ctx, tr := withTrace(ctx)
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, f.URL, http.NoBody)
	if err != nil {
		return &Error{Reason: ReasonInvalid, Err: err}
	}
	response, err := tracer{httpClient(timekeeper{t, c.sawClock("KMS")})}.Do(request)
	var sent *url.Error
	if errors.As(err, &sent) {
		err = sent.Err // the URL is in our own words
	}
	var certificate *tls.CertificateVerificationError
	switch {
	case errors.As(err, &certificate) && len(certificate.UnverifiedCertificates) > 0:
		shown := certificate.UnverifiedCertificates[0]
		err = fmt.Errorf("%w; the certificate is of %s, by %s, until %s", err, holder(shown), issuer(shown), shown.NotAfter.Format(time.DateOnly))
		fallthrough
	case err != nil:
		return &Error{Reason: ReasonUnavailable, Err: tr.late(err)}
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(response.Body, 64<<10))
	if state := response.TLS; state != nil && len(state.PeerCertificates) > 0 {
		leaf := state.PeerCertificates[0]
		f.TLS, f.Holder, f.Issuer, f.NotAfter = tls.VersionName(state.Version), holder(leaf), issuer(leaf), leaf.NotAfter
	}
	return nil
}

// holder says whose a certificate is. Some have no subject, but for the names that it holds for.
func holder(c *x509.Certificate) string {
	names := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return cmp.Or(c.Subject.String(), strings.Join(names, ", "), "nobody")
}

func issuer(c *x509.Certificate) string { return cmp.Or(c.Issuer.String(), "nobody named") }

// ClockFacts is how the node's clock compares with that of the one who answered.
type ClockFacts struct {
	Server string        // "KMS", or "IMDS" where KMS has not answered; "" where nobody has told the time
	Ahead  time.Duration // of the node's clock, to a second or two
}

// CheckClock compares the clocks by the answers that came until now. The error is ReasonClock where KMS would refuse
// the node's signatures.
func (c *Client) CheckClock() (ClockFacts, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, server := range []string{"KMS", "IMDS"} {
		ahead, told := c.ahead[server]
		if !told {
			continue
		}
		f := ClockFacts{Server: server, Ahead: ahead}
		if ahead.Abs() >= clockTolerance {
			return f, &Error{Op: "CheckClock", Reason: ReasonClock,
				Err: fmt.Errorf("%s, and KMS takes signatures that are less than %v off", f, clockTolerance)}
		}
		return f, nil
	}
	return ClockFacts{}, nil
}

// String tells it in words.
func (f ClockFacts) String() string {
	switch ahead := f.Ahead.Round(time.Second); {
	case f.Server == "":
		return "nobody has told the time"
	case ahead.Abs() <= 2*time.Second:
		return "the node's clock is that of " + f.Server
	case ahead > 0:
		return fmt.Sprintf("the node's clock is %v ahead of %s's", ahead, f.Server)
	default:
		return fmt.Sprintf("the node's clock is %v behind %s's", -ahead, f.Server)
	}
}

// sawClock returns what notes the time that a server told, and that was between two of ours.
func (c *Client) sawClock(server string) func(told, asked, answered time.Time) {
	return func(told, asked, answered time.Time) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.ahead == nil {
			c.ahead = map[string]time.Duration{}
		}
		// What is told is cut to seconds.
		c.ahead[server] = asked.Add(answered.Sub(asked) / 2).Sub(told.Add(time.Second / 2))
	}
}

// timekeeper hands the Date of each answer on.
type timekeeper struct {
	http.RoundTripper
	saw func(told, asked, answered time.Time)
}

// RoundTrip implements http.RoundTripper.
func (t timekeeper) RoundTrip(r *http.Request) (*http.Response, error) {
	asked := time.Now()
	response, err := t.RoundTripper.RoundTrip(r)
	if err == nil {
		if told, dateErr := http.ParseTime(response.Header.Get("Date")); dateErr == nil {
			t.saw(told, asked, time.Now())
		}
	}
	return response, err
}
