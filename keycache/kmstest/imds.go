package kmstest

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// Mode is how the metadata service is doing.
type Mode string

// The modes.
const (
	Works      Mode = ""
	Off        Mode = "off"        // turned off for the instance: 403 to everything
	HopLimit   Mode = "hop limit"  // the token never arrives
	TokenError Mode = "token 503"  // tokens fail
	Broken     Mode = "broken"     // 500 to everything but tokens
	Down       Mode = "down"       // connections are closed without an answer
	Hangs      Mode = "hangs"      // tokens are given, then no answer
	Garbage    Mode = "garbage"    // answers that are no JSON
	NoRole     Mode = "no role"    // no instance profile: 404 to its credentials
	RoleFails  Mode = "role fails" // the credentials say Code AssumeRoleUnauthorizedAccess
)

// IMDS is a metadata service that answers with a session token only (IMDSv2).
type IMDS struct {
	t      testing.TB
	server *httptest.Server
	closed chan struct{}

	mu         sync.Mutex
	mode       Mode
	times      int // requests that mode is for; 0 is all
	tokens     map[string]bool
	requests   []string
	identity   map[string]string
	mapping    map[string]string
	accessKey  string
	token      string
	expiration time.Time
}

// NewIMDS starts a service for a node in Region with the role Role. It ends
// with the test.
func NewIMDS(t testing.TB) *IMDS {
	m := &IMDS{
		t:       t,
		closed:  make(chan struct{}),
		tokens:  map[string]bool{},
		mapping: map[string]string{"ami": "/dev/xvda", "root": "/dev/xvda"},
		identity: map[string]string{
			"accountId": Account, "architecture": "x86_64", "availabilityZone": Region + "a",
			"imageId": "ami-0123456789abcdef0", "instanceId": InstanceID, "instanceType": InstanceType,
			"privateIp": "10.0.0.5", "region": Region, "version": "2017-09-30", "pendingTime": "2026-01-02T03:04:05Z",
		},
	}
	m.Rotate(time.Now().Add(6 * time.Hour))
	m.server = httptest.NewServer(m)
	t.Cleanup(func() {
		close(m.closed)
		m.server.CloseClientConnections()
		m.server.Close()
	})
	return m
}

// URL is the endpoint.
func (m *IMDS) URL() string { return m.server.URL }

// Set changes how the service is doing from now on.
func (m *IMDS) Set(mode Mode) { m.SetFor(mode, 0) }

// SetFor changes how it is doing for a number of requests; then it works.
func (m *IMDS) SetFor(mode Mode, requests int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mode, m.times = mode, requests
}

// SetIdentity changes a field of the identity document: "instanceId", "region", …
func (m *IMDS) SetIdentity(field, value string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.identity[field] = value
}

// SetMapping changes an entry of block-device-mapping: "ephemeral0", "sdb".
func (m *IMDS) SetMapping(name, device string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mapping[name] = device
}

// Rotate issues new role credentials; the old ones are not accepted any more by
// a KMS that trusts this service. expiration in the past issues expired ones.
func (m *IMDS) Rotate(expiration time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.accessKey = "ASIA" + strings.ToUpper(strings.ReplaceAll(uuid.NewString(), "-", "")[:16])
	m.token = uuid.NewString()
	m.expiration = expiration
}

// ForgetTokens makes every session token that was given out invalid.
func (m *IMDS) ForgetTokens() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tokens = map[string]bool{}
}

// Requests returns "METHOD path" of every request so far, in order.
func (m *IMDS) Requests() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.requests)
}

// accepts is what KMS makes of credentials of this service.
func (m *IMDS) accepts(accessKey, token string) *apiError {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case accessKey != m.accessKey || token != m.token:
		return refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
	case time.Now().After(m.expiration):
		return refuse("ExpiredTokenException", "The security token included in the request is expired")
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (m *IMDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	m.mu.Lock()
	m.requests = append(m.requests, r.Method+" "+r.URL.Path)
	mode := m.mode
	if m.times > 0 {
		if m.times--; m.times == 0 {
			m.mode = Works
		}
	}
	m.mu.Unlock()

	wantsToken := r.URL.Path == "/latest/api/token"
	switch {
	case mode == Down:
		cut(w)
		return
	case mode == Off:
		http.Error(w, "", http.StatusForbidden)
		return
	case mode == HopLimit && wantsToken, mode == Hangs && !wantsToken:
		select {
		case <-r.Context().Done():
		case <-m.closed:
		}
		return
	case mode == TokenError && wantsToken:
		http.Error(w, "", http.StatusServiceUnavailable)
		return
	}
	if wantsToken {
		m.giveToken(w, r)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.Method != http.MethodGet || !m.tokens[r.Header.Get("X-Aws-Ec2-Metadata-Token")] {
		http.Error(w, "", http.StatusUnauthorized)
		return
	}
	switch mode {
	case Broken:
		http.Error(w, "", http.StatusInternalServerError)
		return
	case Garbage:
		_, _ = io.WriteString(w, "<html>it works</html>")
		return
	}
	if text, ok := m.answer(strings.TrimPrefix(r.URL.Path, "/latest/"), mode); ok {
		_, _ = io.WriteString(w, text)
		return
	}
	http.NotFound(w, r)
}

func (m *IMDS) giveToken(w http.ResponseWriter, r *http.Request) {
	const ttl = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	seconds, err := strconv.Atoi(r.Header.Get(ttl))
	if r.Method != http.MethodPut || err != nil || seconds < 1 || seconds > 21600 {
		http.Error(w, "", http.StatusBadRequest)
		return
	}
	token := uuid.NewString()
	m.mu.Lock()
	m.tokens[token] = true
	m.mu.Unlock()
	w.Header().Set(ttl, strconv.Itoa(seconds))
	_, _ = io.WriteString(w, token)
}

func (m *IMDS) answer(path string, mode Mode) (string, bool) {
	const (
		role    = "meta-data/iam/security-credentials/"
		mapping = "meta-data/block-device-mapping/"
	)
	switch {
	case path == "dynamic/instance-identity/document":
		return toJSON(m.identity), true
	case strings.HasPrefix(path, role) && mode == NoRole:
		return "", false
	case path == role:
		return Role, true
	case path == role+Role && mode == RoleFails:
		return toJSON(map[string]string{"Code": "AssumeRoleUnauthorizedAccess", "Message": "EC2 cannot assume the role " + Role}), true
	case path == role+Role:
		return toJSON(map[string]string{
			"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": time.Now().UTC().Format(time.RFC3339),
			"AccessKeyId": m.accessKey, "SecretAccessKey": "secret-" + m.accessKey, "Token": m.token,
			"Expiration": m.expiration.UTC().Format(time.RFC3339),
		}), true
	case path == mapping || path+"/" == mapping:
		names := make([]string, 0, len(m.mapping))
		for name := range m.mapping {
			names = append(names, name)
		}
		slices.Sort(names)
		return strings.Join(names, "\n"), true
	}
	if name, ok := strings.CutPrefix(path, mapping); ok {
		device, ok := m.mapping[name]
		return device, ok
	}
	return "", false
}

func toJSON(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings only
	}
	return string(data)
}
