package keycache

import (
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// probed is a client that asks once, of servers that behave.
func probed(t *testing.T, change func(*Options)) (*Client, *kmstest.KMS, *kmstest.IMDS) {
	t.Helper()
	k, m := kmstest.NewKMS(t), kmstest.NewIMDS(t)
	o := Options{KeyID: k.ARN(), KMSEndpoint: k.URL(), IMDSEndpoint: m.URL(), RetryLimit: -1, CallTimeout: 10 * time.Second}
	if change != nil {
		change(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c, k, m
}

func TestCheckRole(t *testing.T) {
	c, _, m := probed(t, nil)
	if name, err := c.CheckRole(t.Context()); err != nil || name != kmstest.Role {
		t.Errorf("%q, %v", name, err)
	}
	m.Set(kmstest.NoRole)
	var e *Error
	if _, err := c.CheckRole(t.Context()); !errors.As(err, &e) || e.Reason != ReasonNoCredentials {
		t.Errorf("without a role: %v", err)
	}
}

func TestRegionIsThatOfTheKey(t *testing.T) {
	c, _, _ := probed(t, nil)
	if r, err := c.Region(t.Context()); err != nil || r != kmstest.Region {
		t.Errorf("%q, %v", r, err)
	}
	c, _, _ = probed(t, func(o *Options) { o.KeyID = strings.Replace(o.KeyID, kmstest.Region, "eu-north-1", 1) })
	var e *Error
	if _, err := c.Region(t.Context()); !errors.As(err, &e) || e.Reason != ReasonWrongRegion || e.Object() != c.options.KeyID {
		t.Errorf("a key of another region: %v", err)
	}
}

func TestCheckEndpoint(t *testing.T) {
	c, k, _ := probed(t, nil)
	f, err := c.CheckEndpoint(t.Context())
	if err != nil || f.URL != k.URL() || len(f.Addresses) != 1 || !f.Addresses[0].IsLoopback() || f.TLS != "" {
		t.Errorf("%+v, %v", f, err)
	}
	if len(k.Calls()) != 0 {
		t.Errorf("KMS was called: %v", k.Calls())
	}
}

// TestCheckEndpointNamesTheCertificate: with the one who shows it, and whose it is, a person can find out who answers in KMS's place.
func TestCheckEndpointNamesTheCertificate(t *testing.T) {
	asked := false
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	c, _, _ := probed(t, func(o *Options) { o.KMSEndpoint = server.URL })
	_, err := c.CheckEndpoint(t.Context())
	var e *Error
	if !errors.As(err, &e) || e.Reason != ReasonUnavailable || asked {
		t.Fatalf("%v (asked: %v)", err, asked)
	}
	for _, part := range []string{"cannot reach KMS at " + server.URL + ": ", "x509: ", "the certificate is of O=Acme Co, by O=Acme Co, until 20"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
}

func TestCheckClock(t *testing.T) {
	for _, tc := range []struct {
		ahead time.Duration // KMS's
		says  string
		fails bool
	}{
		{0, "the node's clock is that of KMS", false},
		{3 * time.Minute, "the node's clock is 3m0s behind KMS's", false},
		{-2 * time.Minute, "the node's clock is 2m0s ahead of KMS's", false},
		{301 * time.Second, "behind KMS's, and KMS takes signatures that are less than 5m0s off", true},
		{-time.Hour, "1h0m0s ahead of KMS's", true},
	} {
		c, k, _ := probed(t, nil)
		if f, err := c.CheckClock(); f.Server != "" || err != nil {
			t.Errorf("before anybody answered: %+v, %v", f, err)
		}
		if _, err := c.Identity(t.Context()); err != nil {
			t.Fatal(err)
		}
		if f, err := c.CheckClock(); f.Server != "IMDS" || err != nil || f.Ahead.Abs() > 3*time.Second {
			t.Errorf("by IMDS: %+v, %v", f, err)
		}
		k.SetClock(tc.ahead)
		if _, err := c.CheckEndpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		f, err := c.CheckClock()
		text := f.String()
		var e *Error
		if err != nil {
			text = err.Error()
		}
		if tc.fails != (errors.As(err, &e) && e.Reason == ReasonClock) || f.Server != "KMS" || (f.Ahead+tc.ahead).Abs() > 3*time.Second {
			t.Errorf("%v: %+v, %v", tc.ahead, f, err)
		}
		// The second may turn between two looks at the clock.
		if !strings.Contains(text, tc.says) && tc.ahead%time.Minute == 0 && (f.Ahead+tc.ahead).Abs() < time.Second/2 {
			t.Errorf("%v: %q, want %q", tc.ahead, text, tc.says)
		}
	}
}
