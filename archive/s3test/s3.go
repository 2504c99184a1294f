package s3test

import (
	"bytes"
	"cmp"
	"crypto/md5"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Region and Account are those of a bucket that says nothing else.
const (
	Region  = "eu-central-1" // of package kmstest too
	Account = "111122223333"
)

// Bucket describes a bucket to make; the zero value is one of Account in Region, whose objects S3 encrypts with keys of its own.
type Bucket struct {
	Owner      string // account id
	Region     string
	DefaultKey string // ARN of the KMS key of objects for which nothing else is asked
	Locked     bool   // object lock: nothing is overwritten or deleted
}

// Mode is how honest the server is about encryption.
type Mode int

// The modes.
const (
	Honest   Mode = iota
	Ignores       // takes the header, answers 200 and stores plaintext, as some servers do
	Lies          // the same, but the answer to the PUT claims what was asked
	Silent        // encrypts, but the answer to the PUT does not say so
	WrongKey      // encrypts under the bucket's DefaultKey, whatever was asked, and says so
)

// Fault is an answer that S3 gives instead of its own.
type Fault struct {
	Op     string        // "PutObject", "GetObject", "HeadObject", "ListObjectsV2"; "" is every operation
	Code   string        // error code; Status is 400 unless given
	Status int           // HTTP status
	Hang   bool          // no answer until the client goes away
	Cut    bool          // the connection is closed without an answer, and nothing is done
	Lost   bool          // it is done, and then the connection is closed without an answer
	After  int           // bytes of the answer's body after which the connection is closed
	Delay  time.Duration // before whatever follows
	Times  int           // how often; 0 is for ever
}

// Call is one request that S3 got.
type Call struct {
	Op, Bucket, Name string
	Algorithm, KeyID string // of the encryption that was asked for
	AccessKey        string
	Status           int    // of the answer, 0 for none
	Code             string // of an error
}

// stored is an object as it lies on the server.
type stored struct {
	data      []byte // ciphertext, where algorithm is "aws:kms" and the server is honest
	size      int
	metadata  map[string]string
	algorithm string // "aws:kms", "AES256", "" for none
	keyARN    string
	wrapped   []byte
	etag      string
	modified  time.Time
}

// S3 is a server that speaks S3's protocol.
type S3 struct {
	t      testing.TB
	kmsURL string
	server *httptest.Server
	closed chan struct{}

	mu      sync.Mutex
	buckets map[string]Bucket
	objects map[string]map[string]*stored
	faults  []*Fault
	denied  map[string]bool
	calls   []Call
	mode    Mode
	ahead   time.Duration
}

// New starts an S3 that asks the KMS at a URL. It ends with the test.
func New(t testing.TB, kmsURL string) *S3 {
	s := &S3{t: t, kmsURL: kmsURL, closed: make(chan struct{}), buckets: map[string]Bucket{}, objects: map[string]map[string]*stored{}, denied: map[string]bool{}}
	s.server = httptest.NewServer(s)
	t.Cleanup(func() {
		close(s.closed)
		s.server.CloseClientConnections()
		s.server.Close()
	})
	return s
}

// URL is the endpoint.
func (s *S3) URL() string { return s.server.URL }

// NewBucket makes a bucket.
func (s *S3) NewBucket(name string, b Bucket) {
	if b.Owner == "" {
		b.Owner = Account
	}
	if b.Region == "" {
		b.Region = Region
	}
	s.locked(func() { s.buckets[name], s.objects[name] = b, map[string]*stored{} })
}

// Behave sets how honest the server is from now on.
func (s *S3) Behave(m Mode) { s.locked(func() { s.mode = m }) }

// SetClock puts the server's clock ahead of the machine's. A signature that is more than 15 minutes off is refused.
func (s *S3) SetClock(ahead time.Duration) { s.locked(func() { s.ahead = ahead }) }

// Deny makes operations answer AccessDenied, as a missing permission.
func (s *S3) Deny(ops ...string) {
	s.locked(func() {
		for _, op := range ops {
			s.denied[op] = true
		}
	})
}

// Fail adds a fault. Faults apply in the order in which they were added, each as often as it says.
func (s *S3) Fail(f Fault) { s.locked(func() { s.faults = append(s.faults, &f) }) }

// Heal takes all faults and denials away.
func (s *S3) Heal() {
	s.locked(func() { s.faults, s.denied, s.ahead, s.mode = nil, map[string]bool{}, 0, Honest })
}

// Calls returns every request so far, in order.
func (s *S3) Calls() (calls []Call) {
	s.locked(func() { calls = slices.Clone(s.calls) })
	return calls
}

// Count returns how many requests of an operation came.
func (s *S3) Count(op string) (n int) {
	for _, c := range s.Calls() {
		if c.Op == op {
			n++
		}
	}
	return n
}

// Names lists the objects of a bucket, in order.
func (s *S3) Names(bucket string) (names []string) {
	s.locked(func() { names = slices.Sorted(maps.Keys(s.objects[bucket])) })
	return names
}

// Stored is what lies on the server: ciphertext, where S3 encrypted under a KMS key. nil without an object.
func (s *S3) Stored(bucket, name string) (data []byte) {
	s.locked(func() {
		if o := s.objects[bucket][name]; o != nil {
			data = slices.Clone(o.data)
		}
	})
	return data
}

// Tamper changes an object where it lies, and its metadata.
func (s *S3) Tamper(bucket, name string, change func(data []byte, metadata map[string]string) []byte) {
	s.locked(func() {
		o := s.objects[bucket][name]
		if o == nil {
			s.t.Fatalf("s3test: there is no %s/%s", bucket, name)
		}
		o.data = change(o.data, o.metadata)
	})
}

// Add stores an object as a client put it there that asked for no encryption.
func (s *S3) Add(bucket, name string, data []byte, metadata map[string]string) {
	s.locked(func() {
		s.objects[bucket][name] = &stored{data: data, size: len(data), metadata: metadata, algorithm: "AES256", etag: etag(data), modified: time.Now()}
	})
}

func (s *S3) locked(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func etag(data []byte) string {
	sum := md5.Sum(data)
	return `"` + hex.EncodeToString(sum[:]) + `"`
}

// refusal is an error answer.
type refusal struct {
	status  int
	code    string
	message string
	header  map[string]string
}

func refuse(status int, code, format string, args ...any) *refusal {
	return &refusal{status: status, code: code, message: fmt.Sprintf(format, args...)}
}

// ServeHTTP implements http.Handler.
func (s *S3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	bucket, name, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	call := Call{Bucket: bucket, Name: name, Algorithm: r.Header.Get("X-Amz-Server-Side-Encryption"), KeyID: r.Header.Get("X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id")}
	switch {
	case r.Method == http.MethodGet && name == "" && r.URL.Query().Get("list-type") == "2":
		call.Op = "ListObjectsV2"
	case name != "" && r.URL.RawQuery != "" && r.URL.Query().Get("x-id") == "":
	case name != "":
		call.Op = map[string]string{http.MethodPut: "PutObject", http.MethodGet: "GetObject", http.MethodHead: "HeadObject", http.MethodDelete: "DeleteObject"}[r.Method]
	}
	if call.Op == "" {
		s.t.Errorf("s3test: %s %s is no request that this server knows", r.Method, r.URL)
		http.Error(w, "unknown", http.StatusNotImplemented)
		return
	}
	c := credentials(r)
	call.AccessKey = c.accessKey

	var fault Fault
	s.locked(func() {
		if f := s.fault(call.Op); f != nil {
			fault = *f
		}
	})
	select {
	case <-time.After(fault.Delay):
	case <-r.Context().Done():
		return
	}
	answer := &answer{header: http.Header{}, status: http.StatusOK}
	var no *refusal
	switch {
	case fault.Hang:
		s.note(call)
		select {
		case <-r.Context().Done():
		case <-s.closed:
		}
		return
	case fault.Cut:
		s.note(call)
		cut(w)
		return
	case fault.Code != "" || fault.Status != 0:
		no = refuse(cmp.Or(fault.Status, http.StatusBadRequest), fault.Code, "injected by the test")
	default:
		no = s.serve(call, c, r, answer)
	}
	if no != nil {
		answer = no.answer(r.Method == http.MethodHead)
		call.Code = no.code
	}
	if fault.Lost {
		s.note(call)
		cut(w)
		return
	}
	call.Status = answer.status
	s.note(call)
	maps.Copy(w.Header(), answer.header)
	w.Header().Set("X-Amz-Request-Id", fmt.Sprintf("S3TEST%010d", len(s.Calls())))
	s.locked(func() { w.Header().Set("Date", time.Now().Add(s.ahead).UTC().Format(http.TimeFormat)) })
	if r.Method != http.MethodHead {
		w.Header().Set("Content-Length", strconv.Itoa(len(answer.body)))
	}
	w.WriteHeader(answer.status)
	if fault.After > 0 && fault.After < len(answer.body) {
		_, _ = w.Write(answer.body[:fault.After])
		_ = http.NewResponseController(w).Flush()
		cut(w)
		return
	}
	if r.Method != http.MethodHead {
		_, _ = w.Write(answer.body)
	}
}

func (s *S3) note(c Call) { s.locked(func() { s.calls = append(s.calls, c) }) }

// fault takes the first one that applies.
func (s *S3) fault(op string) *Fault {
	for i, f := range s.faults {
		if f.Op != "" && f.Op != op {
			continue
		}
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				s.faults = slices.Delete(slices.Clone(s.faults), i, i+1)
			}
		}
		return f
	}
	return nil
}

func cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		_ = conn.Close()
	}
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

func (no *refusal) answer(head bool) *answer {
	a := &answer{status: no.status, header: http.Header{}}
	for name, value := range no.header {
		a.header.Set(name, value)
	}
	if head {
		return a // has no body
	}
	a.header.Set("Content-Type", "application/xml")
	a.body, _ = xml.Marshal(struct {
		XMLName       xml.Name `xml:"Error"`
		Code, Message string
	}{Code: no.code, Message: no.message})
	return a
}

func (a *answer) xml(v any) {
	a.header.Set("Content-Type", "application/xml")
	var b bytes.Buffer
	b.WriteString(xml.Header)
	if err := xml.NewEncoder(&b).Encode(v); err != nil {
		panic(err) // our own structures
	}
	a.body = b.Bytes()
}

// limit is the largest body that is taken.
const limit = 256 << 20

// body reads what a request carries, and checks it against its checksums.
func body(r *http.Request) ([]byte, *refusal) {
	raw, err := io.ReadAll(io.LimitReader(r.Body, limit))
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "IncompleteBody", "%v", err)
	}
	trailer := http.Header{}
	if strings.HasPrefix(r.Header.Get("X-Amz-Content-Sha256"), "STREAMING-") {
		if raw, trailer, err = unchunk(raw); err != nil {
			return nil, refuse(http.StatusBadRequest, "IncompleteBody", "%v", err)
		}
		if want := r.Header.Get("X-Amz-Decoded-Content-Length"); want != strconv.Itoa(len(raw)) {
			return nil, refuse(http.StatusBadRequest, "IncompleteBody", "%d bytes, want %s", len(raw), want)
		}
	}
	return raw, checksums(raw, r.Header, trailer)
}
