package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// IMDSState is how instance metadata behaves.
type IMDSState int

// The states that an instance can be in.
const (
	Well      IMDSState = iota
	Off                 // HttpEndpoint is disabled: 403 to everything
	FarHop              // the hop limit is too low: requests for a token get no answer
	NoRole              // no instance profile: 404 for credentials
	Down                // connections close without an answer, as early in a boot
	Forgetful           // tokens are given and not accepted: 401
	Failing             // 500 to everything
	Busy                // 503 to requests for a token
	Expired             // the role's credentials have expired
)

// expiredToken is the session token of credentials that have expired; KMS knows it.
const expiredToken = "expired"

// IMDS is a reverse proxy in front of the metadata mock.
type IMDS struct {
	upstream http.Handler

	mu       sync.Mutex
	state    IMDSState
	times    int // how many answers the state still has; 0 is for ever
	requests []string
	insecure []string
}

// NewIMDS returns a proxy for the mock at upstream.
func NewIMDS(upstream *url.URL) *IMDS {
	i := &IMDS{}
	i.upstream = &httputil.ReverseProxy{
		Rewrite:        func(r *httputil.ProxyRequest) { r.SetURL(upstream); r.Out.Header.Del("Accept-Encoding") },
		ModifyResponse: i.expire,
	}
	return i
}

// Set changes how metadata behaves from now on.
func (i *IMDS) Set(state IMDSState) { i.SetFor(state, 0) }

// SetFor changes how metadata behaves for a number of answers that the state makes bad; then all is well.
func (i *IMDS) SetFor(state IMDSState, times int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.state, i.times = state, times
}

// Forget empties the record of requests, but not of insecure ones.
func (i *IMDS) Forget() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.requests = nil
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

// Where the role's name and, below it, its credentials are.
const credentials = "/latest/meta-data/iam/security-credentials/"

// bad reports whether a state has a bad answer to a request.
func (s IMDSState) bad(forToken bool, path string) bool {
	switch s {
	case FarHop, Busy:
		return forToken
	case Forgetful:
		return !forToken
	case NoRole:
		return strings.HasPrefix(path, credentials)
	case Expired:
		return len(path) > len(credentials) && strings.HasPrefix(path, credentials)
	}
	return s != Well
}

// take returns the state that answers a request, and counts it.
func (i *IMDS) take(forToken bool, path string) IMDSState {
	i.mu.Lock()
	defer i.mu.Unlock()
	state := i.state
	if !state.bad(forToken, path) {
		return Well
	}
	if i.times > 0 {
		if i.times--; i.times == 0 {
			i.state = Well
		}
	}
	return state
}

type expiredKey struct{}

// ServeHTTP answers one request.
func (i *IMDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	forToken := r.Method == http.MethodPut && strings.HasPrefix(r.URL.Path, "/latest/api/token")
	i.mu.Lock()
	i.requests = append(i.requests, r.Method+" "+r.URL.Path)
	if !forToken && r.Header.Get("X-Aws-Ec2-Metadata-Token") == "" {
		i.insecure = append(i.insecure, r.Method+" "+r.URL.Path)
	}
	i.mu.Unlock()
	status := 0
	switch i.take(forToken, r.URL.Path) {
	case Off:
		status = http.StatusForbidden
	case FarHop:
		// A server notices that its client went away only once it has read the whole request.
		_ = r.Body.Close()
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	case NoRole:
		status = http.StatusNotFound
	case Down:
		panic(http.ErrAbortHandler)
	case Forgetful:
		status = http.StatusUnauthorized
	case Failing:
		status = http.StatusInternalServerError
	case Busy:
		status = http.StatusServiceUnavailable
	case Expired:
		r = r.WithContext(context.WithValue(r.Context(), expiredKey{}, true))
	}
	if status != 0 {
		http.Error(w, http.StatusText(status), status)
		return
	}
	i.upstream.ServeHTTP(w, r)
}

// expire makes credentials that expired an hour ago of good ones.
func (i *IMDS) expire(response *http.Response) error {
	if response.Request.Context().Value(expiredKey{}) == nil || response.StatusCode != http.StatusOK {
		return nil
	}
	var fields map[string]any
	err := json.NewDecoder(response.Body).Decode(&fields)
	if err := errors.Join(err, response.Body.Close()); err != nil {
		return err
	}
	fields["Token"], fields["Expiration"] = expiredToken, time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)
	body, err := json.Marshal(fields)
	if err != nil {
		return err
	}
	response.Body = io.NopCloser(bytes.NewReader(body))
	response.ContentLength = int64(len(body))
	response.Header.Set("Content-Length", strconv.Itoa(len(body)))
	return nil
}
