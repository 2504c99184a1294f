package s3test

import (
	"cmp"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Options say what the server stands for.
type Options struct {
	KMS    string // URL of the KMS that is asked for SSE-KMS
	Region string // of the endpoint; "" is that of each region, whichever a request is signed for
}

// Bucket describes a bucket to make; the zero value is one of Account in Region, whose objects S3 encrypts with keys of its own.
type Bucket struct {
	Owner      string // account id
	Region     string
	DefaultKey string // the KMS key of objects for which nothing else is asked
	BucketKey  bool   // with DefaultKey: a key for the bucket, so that the bucket's ARN is the encryption context
	ObjectLock bool   // nothing is deleted, and what is overwritten stays as a version
}

// Call is one request that S3 got.
type Call struct {
	Op          string
	Bucket, Key string
	SSE, KeyID  string // the encryption that was asked for
	AccessKey   string
	Region      string // that the request was signed for
	Code        string // of the answer, "" for success or none
	Status      int    // of the answer, 0 for none
	RequestID   string
}

// S3 is a server that speaks S3's protocol.
type S3 struct {
	t       testing.TB
	options Options
	server  *httptest.Server
	ctx     context.Context // ends with the test
	kmsHTTP *http.Client

	mu      sync.Mutex
	buckets map[string]Bucket
	objects map[string]map[string][]*stored // by bucket and key: the versions, the newest last
	uploads map[string]*upload
	faults  []*Fault
	denied  map[string]bool
	trust   func(accessKey, token string) error
	calls   []Call
	mode    Mode
	ahead   time.Duration
}

// New starts an S3 without buckets. It ends with the test, and fails it if a request is none that the server knows.
func New(t testing.TB, o Options) *S3 {
	transport := &http.Transport{} // without a proxy
	s := &S3{
		t:       t,
		options: o,
		kmsHTTP: &http.Client{Transport: transport},
		buckets: map[string]Bucket{},
		objects: map[string]map[string][]*stored{},
		uploads: map[string]*upload{},
		denied:  map[string]bool{},
	}
	var end context.CancelFunc
	s.ctx, end = context.WithCancel(context.Background())
	s.server = httptest.NewServer(s)
	t.Cleanup(func() {
		end()
		s.server.CloseClientConnections()
		s.server.Close()
		transport.CloseIdleConnections()
	})
	return s
}

// URL is the endpoint.
func (s *S3) URL() string { return s.server.URL }

// NewBucket makes a bucket, empty.
func (s *S3) NewBucket(name string, b Bucket) {
	b.Owner, b.Region = cmp.Or(b.Owner, Account), cmp.Or(b.Region, Region)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.buckets[name], s.objects[name] = b, map[string][]*stored{}
	maps.DeleteFunc(s.uploads, func(_ string, u *upload) bool { return u.bucket == name })
}

// SetClock puts the server's clock ahead of the machine's. S3 answers with its own time, and refuses a signature that is more than 15 minutes off.
func (s *S3) SetClock(ahead time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead = ahead
}

// Calls returns every request so far, in the order in which they came.
func (s *S3) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Count returns how many requests of an operation came.
func (s *S3) Count(op string) int {
	n := 0
	for _, c := range s.Calls() {
		if c.Op == op {
			n++
		}
	}
	return n
}

// operation is a kind of request.
type operation struct {
	name, action string // and the permission that it needs
	method       string
	object       bool     // it has a key
	needs, takes []string // names of the query, "x-id" aside
	serve        func(*S3, *request, *answer) *refusal
}

// https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html
var operations = []operation{
	{"PutObject", "PutObject", http.MethodPut, true, nil, nil, (*S3).putObject},
	{"GetObject", "GetObject", http.MethodGet, true, nil, []string{"versionId"}, (*S3).getObject},
	{"HeadObject", "GetObject", http.MethodHead, true, nil, []string{"versionId"}, (*S3).getObject},
	{"DeleteObject", "DeleteObject", http.MethodDelete, true, nil, []string{"versionId"}, (*S3).deleteObject},
	{"CreateMultipartUpload", "PutObject", http.MethodPost, true, []string{"uploads"}, nil, (*S3).createUpload},
	{"UploadPart", "PutObject", http.MethodPut, true, []string{"partNumber", "uploadId"}, nil, (*S3).uploadPart},
	{"CompleteMultipartUpload", "PutObject", http.MethodPost, true, []string{"uploadId"}, nil, (*S3).completeUpload},
	{"AbortMultipartUpload", "AbortMultipartUpload", http.MethodDelete, true, []string{"uploadId"}, nil, (*S3).abortUpload},
	{"ListParts", "ListMultipartUploadParts", http.MethodGet, true, []string{"uploadId"}, []string{"max-parts", "part-number-marker"}, (*S3).listParts},
	{"ListObjectsV2", "ListBucket", http.MethodGet, false, []string{"list-type"}, []string{"prefix", "delimiter", "max-keys", "continuation-token", "start-after", "encoding-type"}, (*S3).listObjects},
	{"ListMultipartUploads", "ListBucketMultipartUploads", http.MethodGet, false, []string{"uploads"}, []string{"prefix", "max-uploads", "key-marker", "upload-id-marker"}, (*S3).listUploads},
	{"HeadBucket", "ListBucket", http.MethodHead, false, nil, nil, (*S3).headBucket},
}

// is tells whether a request is of the operation: a name in the query that it does not take makes another one of it.
func (o operation) is(r *http.Request, object bool, query url.Values) bool {
	if o.method != r.Method || o.object != object || query.Has("list-type") && query.Get("list-type") != "2" {
		return false
	}
	for _, name := range o.needs {
		if !query.Has(name) {
			return false
		}
	}
	for name := range query {
		if name != "x-id" && !slices.Contains(o.needs, name) && !slices.Contains(o.takes, name) {
			return false
		}
	}
	return true
}

// headers are those of S3's own that the server knows, apart from metadata, checksums and encryption.
var headers = []string{
	"X-Amz-Content-Sha256", "X-Amz-Date", "X-Amz-Decoded-Content-Length", "X-Amz-Expected-Bucket-Owner", "X-Amz-Sdk-Checksum-Algorithm",
	"X-Amz-Security-Token", "X-Amz-Trailer", "X-Amz-User-Agent", headerSSE, headerKey, headerBucketKey, headerContext,
}

// request is one request on its way through the server.
type request struct {
	*http.Request
	Call
	operation *operation
	query     url.Values
	caller    caller
	bucket    Bucket
	data      []byte      // the body without its framing
	sums      http.Header // the checksums that it was sent with, all of them right
}

// ServeHTTP implements http.Handler.
func (s *S3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := &request{Request: r, query: r.URL.Query(), caller: signer(r)}
	q.Bucket, q.Key, _ = strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	i := slices.IndexFunc(operations, func(o operation) bool { return o.is(r, q.Key != "", q.query) })
	if i < 0 || q.Bucket == "" {
		s.t.Errorf("s3test: %s %s is no request that this server knows", r.Method, r.URL)
		http.Error(w, "no call of S3 that this server knows", http.StatusNotImplemented)
		return
	}
	q.operation = &operations[i]
	q.Op, q.AccessKey, q.Call.Region = q.operation.name, q.caller.accessKey, q.caller.region
	q.SSE, q.KeyID = r.Header.Get(headerSSE), r.Header.Get(headerKey)
	s.mu.Lock()
	number := len(s.calls)
	q.RequestID = fmt.Sprintf("S3TEST%010d", number+1)
	s.calls = append(s.calls, q.Call)
	fault := s.fault(q.Op)
	s.mu.Unlock()

	if !s.wait(r, fault.Delay) {
		return
	}
	switch {
	case fault.Hang:
		s.hang(r)
		return
	case fault.Cut:
		cut(w)
		return
	}
	// All of it, whatever is answered: a client that is still sending may not see an answer.
	body, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	if err != nil {
		return
	}
	a := &answer{status: http.StatusOK, header: http.Header{}}
	var no *refusal
	switch {
	case fault.Code != "":
		no = refuse(cmp.Or(fault.Status, http.StatusBadRequest), fault.Code, "injected by the test")
	case fault.Status != 0 || fault.Body != "":
		a.status, a.body = cmp.Or(fault.Status, http.StatusOK), []byte(fault.Body)
	default:
		if no = s.allowed(q); no == nil {
			no = q.read(body)
		}
		if no == nil {
			no = q.operation.serve(s, q, a)
		}
	}
	if no != nil {
		a = no.answer(q)
		q.Code = no.code
	}
	if fault.Lost {
		cut(w)
		return
	}
	s.mu.Lock()
	s.calls[number].Status, s.calls[number].Code = a.status, q.Code
	w.Header().Set("Date", s.now().UTC().Format(http.TimeFormat))
	s.mu.Unlock()
	w.Header().Set("X-Amz-Request-Id", q.RequestID)
	w.Header().Set("X-Amz-Id-2", "s3test")
	maps.Copy(w.Header(), a.header)
	s.send(w, r, a, fault)
}

// now is the server's time. The caller has locked.
func (s *S3) now() time.Time { return time.Now().Add(s.ahead) }

// answer is what a request gets.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a *answer) xml(v any) {
	text, err := xml.Marshal(v)
	if err != nil {
		panic(err) // our own structures
	}
	a.header.Set("Content-Type", "application/xml")
	a.body = append([]byte(xml.Header), text...)
}

// refusal is an error.
type refusal struct {
	status  int
	code    string
	message string
	header  map[string]string
	region  string
}

func refuse(status int, code, format string, args ...any) *refusal {
	return &refusal{status: status, code: code, message: fmt.Sprintf(format, args...)}
}

func accessDenied() *refusal { return refuse(http.StatusForbidden, "AccessDenied", "Access Denied") }

func invalid(format string, args ...any) *refusal {
	return refuse(http.StatusBadRequest, "InvalidArgument", format, args...)
}

func notImplemented(name string) *refusal {
	return refuse(http.StatusNotImplemented, "NotImplemented", "A header you provided implies functionality that is not implemented: %s", name)
}

// answer is the refusal as XML.
func (no *refusal) answer(q *request) *answer {
	a := &answer{status: no.status, header: http.Header{}}
	a.xml(struct {
		XMLName   xml.Name `xml:"Error"`
		Code      string
		Message   string
		Region    string `xml:",omitempty"`
		Resource  string
		RequestId string
		HostId    string
	}{Code: no.code, Message: no.message, Region: no.region, Resource: q.URL.Path, RequestId: q.RequestID, HostId: "s3test"})
	for name, value := range no.header {
		a.header.Set(name, value)
	}
	return a
}

// send writes an answer, as a fault wants it. That to a HEAD has no body.
func (s *S3) send(w http.ResponseWriter, r *http.Request, a *answer, fault Fault) {
	body, head := a.body, r.Method == http.MethodHead
	if !head && a.status != http.StatusNoContent && a.status != http.StatusNotModified {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	}
	w.WriteHeader(a.status)
	if head {
		return
	}
	ends := fault.CutAfter > 0 && fault.CutAfter < int64(len(body))
	if ends {
		body = body[:fault.CutAfter]
	}
	s.write(w, r, body, fault.Slow)
	if ends {
		_ = http.NewResponseController(w).Flush()
		cut(w)
	}
}
