package proxy

import (
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
)

// IMDSState is how instance metadata behaves.
type IMDSState int

// The states that an instance can be in.
const (
	Well   IMDSState = iota
	Off              // HttpEndpoint is disabled: 403 to everything
	FarHop           // the hop limit is too low: requests for a token get no answer
	NoRole           // no instance profile: 404 for credentials
	Down             // connections close without an answer, as early in a boot
)

// IMDS is a reverse proxy in front of the metadata mock.
type IMDS struct {
	upstream http.Handler

	mu       sync.Mutex
	state    IMDSState
	requests []string
	insecure []string
}

// NewIMDS returns a proxy for the mock at upstream.
func NewIMDS(upstream *url.URL) *IMDS {
	return &IMDS{upstream: httputil.NewSingleHostReverseProxy(upstream)}
}

// Set changes how metadata behaves from now on.
func (i *IMDS) Set(state IMDSState) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.state = state
}

// Requests returns every request so far, as "GET /latest/meta-data/instance-id".
func (i *IMDS) Requests() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([]string(nil), i.requests...)
}

// Insecure returns the requests that came without a session token (IMDSv1), which a node must never make.
func (i *IMDS) Insecure() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([]string(nil), i.insecure...)
}

// TakeInsecure returns the insecure requests and forgets them: a story expected them.
func (i *IMDS) TakeInsecure() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	insecure := i.insecure
	i.insecure = nil
	return insecure
}

// ServeHTTP answers one request.
func (i *IMDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	forToken := r.Method == http.MethodPut && strings.HasPrefix(r.URL.Path, "/latest/api/token")
	i.mu.Lock()
	state := i.state
	i.requests = append(i.requests, r.Method+" "+r.URL.Path)
	if !forToken && r.Header.Get("X-Aws-Ec2-Metadata-Token") == "" {
		i.insecure = append(i.insecure, r.Method+" "+r.URL.Path)
	}
	i.mu.Unlock()
	switch {
	case state == Off:
		http.Error(w, "Forbidden", http.StatusForbidden)
	case state == FarHop && forToken:
		// A server notices that its client went away only once it has read the whole request.
		_ = r.Body.Close()
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	case state == NoRole && strings.HasPrefix(r.URL.Path, "/latest/meta-data/iam/"):
		http.Error(w, "Not Found", http.StatusNotFound)
	case state == Down:
		panic(http.ErrAbortHandler)
	default:
		i.upstream.ServeHTTP(w, r)
	}
}
