package keycache

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// node is a client with the services that it talks to. Its waits take no time:
// the clock is moved instead.
type node struct {
	*Client
	kms     *kmstest.KMS
	imds    *kmstest.IMDS
	elapsed atomic.Int64 // by waiting
	mu      sync.Mutex
	waits   []time.Duration
	retries []Retry
}

func newNode(t *testing.T, edit ...func(*Options)) *node {
	t.Helper()
	n := &node{kms: kmstest.NewKMS(t), imds: kmstest.NewIMDS(t)}
	n.kms.Trust(n.imds)
	o := Options{
		KeyID: n.kms.ARN(), KMSEndpoint: n.kms.URL(), IMDSEndpoint: n.imds.URL(),
		CallTimeout: 5 * time.Second, RetryLimit: time.Minute,
		OnRetry: func(r Retry) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.retries = append(n.retries, r)
		},
	}
	for _, f := range edit {
		f(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	c.clock.now = func() time.Time { return start.Add(time.Duration(n.elapsed.Load())) }
	c.clock.sleep = func(ctx context.Context, d time.Duration) error {
		n.elapsed.Add(int64(d))
		n.mu.Lock()
		defer n.mu.Unlock()
		n.waits = append(n.waits, d)
		return ctx.Err()
	}
	n.Client = c
	return n
}

// generate makes a key and its record.
func (n *node) generate(t *testing.T) (*Key, KeyRecord) {
	t.Helper()
	k, r, err := n.Generate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k, r
}

// expect checks an error's facts. What is in err must never be a key.
func expect(t *testing.T, err error, reason Reason, code string) *Error {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("%v is no *Error, want %s", err, reason)
	}
	if e.Reason != reason || e.Code != code {
		t.Errorf("got %s %q, want %s %q: %v", e.Reason, e.Code, reason, code, err)
	}
	if !strings.HasPrefix(e.Error(), "cannot ") {
		t.Errorf("message %q", e.Error())
	}
	return e
}

func TestGenerateAndDecrypt(t *testing.T) {
	n := newNode(t)
	k, r := n.generate(t)
	want := KeyRecord{
		Version: RecordVersion, ID: r.ID, KeyARN: n.kms.ARN(), WrappedKey: r.WrappedKey,
		InstanceID: kmstest.InstanceID, Region: kmstest.Region, Created: r.Created, RequestID: n.kms.Calls()[0].RequestID,
	}
	if !reflect.DeepEqual(r, want) || !isUUID(r.ID) || len(r.WrappedKey) == 0 || r.Created.Location() != time.UTC {
		t.Errorf("record %+v", r)
	}
	// The record is one that a store takes, and what comes back is the key.
	s, err := OpenStore(t.TempDir() + "/state")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.PutKey(r); err != nil {
		t.Fatal(err)
	}
	again, err := n.Decrypt(t.Context(), load(t, s).Keys[r.ID])
	if err != nil {
		t.Fatal(err)
	}
	defer again.Wipe()
	if !k.Equal(again) {
		t.Error("Decrypt gives another key")
	}
	other, _ := n.generate(t)
	if k.Equal(other) {
		t.Error("the same data key twice")
	}

	calls := n.kms.Calls()
	// Each key has the id of the very call that gave it, also once it is wiped.
	again.Wipe()
	for i, key := range []*Key{k, again, other} {
		if key.RequestID() != calls[i].RequestID || calls[i].RequestID == "" {
			t.Errorf("key %d is of request %q, want %q", i, key.RequestID(), calls[i].RequestID)
		}
	}
	for _, c := range calls {
		if c.ContextSent || c.Region != kmstest.Region || c.KeyID != n.kms.ARN() {
			t.Errorf("call %+v", c)
		}
	}
	var ids []string
	for _, c := range calls {
		ids = append(ids, c.RequestID)
	}
	// Identity document, role name, role credentials; each once.
	if got, want := n.Calls(), (Calls{GenerateDataKey: 2, Decrypt: 1, IMDS: 3, RequestIDs: ids}); !reflect.DeepEqual(got, want) {
		t.Errorf("counted %+v, want %+v", got, want)
	}
	n.Calls().RequestIDs[0] = "changed"
	if n.Calls().RequestIDs[0] != ids[0] {
		t.Error("Calls lends its own slice")
	}
}

func TestReEncrypt(t *testing.T) {
	n := newNode(t)
	k, r := n.generate(t)
	to := n.kms.NewKey(kmstest.KeySpec{})
	n.kms.Alias("alias/next", to)
	for name, key := range map[string]string{"ARN": to, "id": to[strings.LastIndex(to, "/")+1:], "alias": "alias/next"} {
		other, err := New(Options{KeyID: key, KMSEndpoint: n.kms.URL(), IMDSEndpoint: n.imds.URL()})
		if err != nil {
			t.Fatal(err)
		}
		got, err := other.ReEncrypt(t.Context(), r)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		calls := n.kms.Calls()
		last := calls[len(calls)-1]
		want := r
		want.KeyARN, want.WrappedKey, want.RequestID = to, got.WrappedKey, last.RequestID
		if !reflect.DeepEqual(got, want) || bytes.Equal(got.WrappedKey, r.WrappedKey) {
			t.Errorf("%s: %+v", name, got)
		}
		if last.Op != "ReEncrypt" || last.KeyID != r.KeyARN || last.To != key || last.ContextSent {
			t.Errorf("%s: call %+v", name, last)
		}
		if c := other.Calls(); c.ReEncrypt != 1 || c.Decrypt != 0 {
			t.Errorf("%s: counted %+v", name, c)
		}
		again, err := other.Decrypt(t.Context(), got)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !again.Equal(k) {
			t.Errorf("%s: it holds another data key", name)
		}
		again.Wipe()
	}
}

func TestReEncryptTrustsNoAnswer(t *testing.T) {
	other := "arn:aws:kms:" + kmstest.Region + ":" + kmstest.Account + ":key/1234abcd-12ab-34cd-56ef-1234567890ab"
	for name, c := range map[string]struct {
		rewrite func(answer map[string]any)
		want    Reason
	}{
		"under another key":          {func(a map[string]any) { a["KeyId"] = other }, ReasonAnswer},
		"decrypted under another":    {func(a map[string]any) { a["SourceKeyId"] = other }, ReasonAnswer},
		"no key":                     {func(a map[string]any) { delete(a, "KeyId") }, ReasonUnavailable},
		"no wrapped key":             {func(a map[string]any) { delete(a, "CiphertextBlob") }, ReasonUnavailable},
		"a wrapped key that is long": {func(a map[string]any) { a["CiphertextBlob"] = make([]byte, maxWrapped+1) }, ReasonAnswer},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			_, r := n.generate(t)
			n.kms.Fail(kmstest.Fault{Op: "ReEncrypt", Rewrite: c.rewrite})
			_, err := n.ReEncrypt(t.Context(), r)
			expect(t, err, c.want, "")
		})
	}
}

func TestReEncryptRefusals(t *testing.T) {
	n := newNode(t)
	_, r := n.generate(t)
	other := r
	other.KeyARN = n.kms.NewKey(kmstest.KeySpec{})
	_, err := n.ReEncrypt(t.Context(), other)
	expect(t, err, ReasonCiphertext, "IncorrectKeyException")
	elsewhere := r
	elsewhere.KeyARN = strings.Replace(r.KeyARN, kmstest.Region, "us-east-1", 1)
	_, err = n.ReEncrypt(t.Context(), elsewhere)
	expect(t, err, ReasonWrongRegion, "")
	n.kms.Deny("ReEncrypt")
	_, err = n.ReEncrypt(t.Context(), r)
	if e := expect(t, err, ReasonDenied, "AccessDeniedException"); !strings.Contains(e.Error(), "cannot wrap the data key anew under "+n.kms.ARN()) {
		t.Error(e)
	}
}

func TestDecryptNeedsOnlyArnAndWrappedKey(t *testing.T) {
	n := newNode(t)
	k, r := n.generate(t)
	got, err := n.Decrypt(t.Context(), KeyRecord{KeyARN: r.KeyARN, WrappedKey: r.WrappedKey})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !got.Equal(k) {
		t.Error("another key")
	}
	for name, bad := range map[string]KeyRecord{
		"alias": {KeyARN: "arn:aws:kms:eu-central-1:111122223333:alias/x", WrappedKey: r.WrappedKey},
		"bare":  {KeyARN: "1234abcd-12ab-34cd-56ef-1234567890ab", WrappedKey: r.WrappedKey},
		"empty": {KeyARN: r.KeyARN}, "nothing": {}, "huge": {KeyARN: r.KeyARN, WrappedKey: make([]byte, maxWrapped+1)},
	} {
		_, err := n.Decrypt(t.Context(), bad)
		if e := expect(t, err, ReasonInvalid, ""); e.Retryable() {
			t.Errorf("%s is retryable", name)
		}
	}
	if c := n.kms.Count("Decrypt"); c != 1 {
		t.Errorf("KMS was asked %d times", c)
	}
}

// An alias can be moved: what was wrapped before is still under the key that it was wrapped under.
func TestDecryptNamesTheRecordsKey(t *testing.T) {
	n := newNode(t)
	n.kms.Alias("alias/disks", n.kms.ARN())
	n.options.KeyID = "alias/disks"
	k, r := n.generate(t)
	n.kms.Alias("alias/disks", n.kms.NewKey(kmstest.KeySpec{}))
	got, err := n.Decrypt(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if calls := n.kms.Calls(); !got.Equal(k) || calls[len(calls)-1].KeyID != n.kms.ARN() {
		t.Errorf("another key, or asked for: %+v", calls)
	}
}

// answers is a KMS whose answers the test still holds when the call is over.
type answers struct {
	kmsAPI
	arn       string
	plaintext []byte
}

func (a answers) GenerateDataKey(context.Context, *kms.GenerateDataKeyInput, ...func(*kms.Options)) (*kms.GenerateDataKeyOutput, error) {
	return &kms.GenerateDataKeyOutput{KeyId: &a.arn, CiphertextBlob: []byte("wrapped"), Plaintext: a.plaintext}, nil
}

func (a answers) Decrypt(context.Context, *kms.DecryptInput, ...func(*kms.Options)) (*kms.DecryptOutput, error) {
	return &kms.DecryptOutput{KeyId: &a.arn, Plaintext: a.plaintext}, nil
}

// What is refused is a key all the same.
func TestPlaintextOfAnAnswerIsWiped(t *testing.T) {
	n := newNode(t)
	other := strings.Replace(n.kms.ARN(), kmstest.Account, "999999999999", 1)
	for what, call := range map[string]func() error{
		"GenerateDataKey": func() error { _, _, err := n.Generate(t.Context()); return err },
		"Decrypt": func() error {
			_, err := n.Decrypt(t.Context(), KeyRecord{KeyARN: n.kms.ARN(), WrappedKey: []byte("x")})
			return err
		},
	} {
		a := answers{arn: other, plaintext: bytes.Repeat([]byte{7}, keyLen)}
		n.Client.kms = a
		expect(t, call(), ReasonAnswer, "")
		if !bytes.Equal(a.plaintext, make([]byte, keyLen)) {
			t.Errorf("%s: the key is left in the answer", what)
		}
	}
}

func TestContextOfARecordIsUsed(t *testing.T) {
	n := newNode(t)
	n.kms.AllowContext()
	plain := bytes.Repeat([]byte{5}, 32)
	r := KeyRecord{KeyARN: n.kms.ARN(), EncryptionContext: map[string]string{"a": "b"}}
	r.WrappedKey = n.kms.Wrap(r.KeyARN, plain, r.EncryptionContext)
	k, err := n.Decrypt(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Wipe()
	if !bytes.Equal(k.Bytes(), plain) {
		t.Error("another key")
	}
	for _, c := range []map[string]string{nil, {"a": "c"}} {
		r.EncryptionContext = c
		_, err := n.Decrypt(t.Context(), r)
		expect(t, err, ReasonCiphertext, "InvalidCiphertextException")
	}
}

func TestDecryptTrustsNoAnswer(t *testing.T) {
	n := newNode(t, func(o *Options) { o.RetryLimit = -1 })
	_, r := n.generate(t)
	other := n.kms.NewKey(kmstest.KeySpec{})
	set := func(name string, v any) func(map[string]any) {
		return func(m map[string]any) {
			if m[name] = v; v == nil {
				delete(m, name)
			}
		}
	}
	cases := map[string]struct {
		rewrite func(map[string]any)
		reason  Reason
	}{
		"another key": {set("KeyId", other), ReasonAnswer},
		"no key id":   {set("KeyId", nil), ReasonUnavailable},
		"31 bytes":    {set("Plaintext", make([]byte, 31)), ReasonCiphertext},
		"33 bytes":    {set("Plaintext", make([]byte, 33)), ReasonCiphertext},
		"no bytes":    {set("Plaintext", nil), ReasonCiphertext},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			n.kms.Fail(kmstest.Fault{Op: "Decrypt", Rewrite: c.rewrite, Times: 1})
			k, err := n.Decrypt(t.Context(), r)
			if k != nil {
				t.Error("there is a key")
			}
			expect(t, err, c.reason, "")
		})
	}
	for name, c := range map[string]struct {
		rewrite func(map[string]any)
		reason  Reason
	}{
		"another key":  {set("KeyId", other), ReasonAnswer},
		"alias":        {set("KeyId", strings.Replace(other, ":key/", ":alias/", 1)), ReasonAnswer},
		"no wrapped":   {set("CiphertextBlob", nil), ReasonUnavailable},
		"no plaintext": {set("Plaintext", nil), ReasonUnavailable},
		"short":        {set("Plaintext", make([]byte, 16)), ReasonAnswer},
		"long":         {set("Plaintext", make([]byte, 33)), ReasonAnswer},
		"huge wrapped": {set("CiphertextBlob", make([]byte, maxWrapped+1)), ReasonAnswer},
		"empty answer": {func(m map[string]any) { clear(m) }, ReasonUnavailable},
	} {
		t.Run("generate "+name, func(t *testing.T) {
			n.kms.Fail(kmstest.Fault{Op: "GenerateDataKey", Rewrite: c.rewrite, Times: 1})
			k, r, err := n.Generate(t.Context())
			if k != nil || !reflect.DeepEqual(r, KeyRecord{}) {
				t.Error("there is a key or record")
			}
			expect(t, err, c.reason, "")
		})
	}
}

// TestKMSRefusals: what a person must change ends at once, with its reason.
func TestKMSRefusals(t *testing.T) {
	spec := func(s kmstest.KeySpec) func(*node) string {
		return func(n *node) string { return n.kms.NewKey(s) }
	}
	missing := "arn:aws:kms:" + kmstest.Region + ":" + kmstest.Account + ":key/00000000-0000-0000-0000-000000000000"
	cases := map[string]struct {
		key    func(*node) string
		reason Reason
		code   string
	}{
		"unknown key": {func(*node) string { return missing }, ReasonNotFound, "NotFoundException"},
		"no alias":    {func(*node) string { return "alias/none" }, ReasonNotFound, "NotFoundException"},
		"disabled":    {spec(kmstest.KeySpec{State: kmstest.Disabled}), ReasonKeyState, "DisabledException"},
		"deletion":    {spec(kmstest.KeySpec{State: kmstest.PendingDeletion}), ReasonKeyState, "KMSInvalidStateException"},
		"rsa":         {spec(kmstest.KeySpec{Spec: "RSA_2048"}), ReasonAsymmetric, "InvalidKeyUsageException"},
		"mac":         {spec(kmstest.KeySpec{Spec: "HMAC_256", Usage: "GENERATE_VERIFY_MAC"}), ReasonAsymmetric, "InvalidKeyUsageException"},
		"denied":      {func(n *node) string { n.kms.Deny("GenerateDataKey", "Decrypt"); return n.kms.ARN() }, ReasonDenied, "AccessDeniedException"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.options.KeyID = c.key(n)
			_, _, err := n.Generate(t.Context())
			e := expect(t, err, c.reason, c.code)
			if e.RequestID != n.kms.Calls()[0].RequestID || !strings.Contains(e.Error(), e.RequestID) || !strings.Contains(e.Error(), c.code) {
				t.Errorf("request id %q, message %q", e.RequestID, e)
			}
			if !keyARN.MatchString(n.options.KeyID) {
				return
			}
			_, err = n.Decrypt(t.Context(), KeyRecord{KeyARN: n.options.KeyID, WrappedKey: []byte("x")})
			expect(t, err, c.reason, c.code)
			if got := n.Calls(); got.Retries != 0 || got.GenerateDataKey != 1 || got.Decrypt != 1 || len(got.RequestIDs) != 2 {
				t.Errorf("a final error was retried: %+v", got)
			}
		})
	}
	t.Run("ciphertext", func(t *testing.T) {
		n := newNode(t)
		other := n.kms.NewKey(kmstest.KeySpec{})
		foreign := n.kms.Wrap(other, make([]byte, 32), nil)
		_, err := n.Decrypt(t.Context(), KeyRecord{KeyARN: n.kms.ARN(), WrappedKey: foreign})
		expect(t, err, ReasonCiphertext, "IncorrectKeyException")
		foreign[len(foreign)-1]++
		_, err = n.Decrypt(t.Context(), KeyRecord{KeyARN: other, WrappedKey: foreign})
		expect(t, err, ReasonCiphertext, "InvalidCiphertextException")
		if got := n.Calls(); got.Retries != 0 || got.Decrypt != 2 {
			t.Errorf("calls %+v", got)
		}
	})
}

// TestErrorCodes: every code that KMS or the front end has is final or retried.
func TestErrorCodes(t *testing.T) {
	final := map[string]Reason{
		"AccessDeniedException": ReasonDenied, "NotFoundException": ReasonNotFound, "DisabledException": ReasonKeyState,
		"KMSInvalidStateException": ReasonKeyState, "InvalidKeyUsageException": ReasonAsymmetric, "IncorrectKeyException": ReasonCiphertext,
		"InvalidCiphertextException": ReasonCiphertext, "InvalidArnException": ReasonInvalid, "ValidationException": ReasonInvalid,
		"InvalidGrantTokenException": ReasonInvalid, "SomethingNewException": ReasonInvalid,
		"AccessDenied": ReasonDenied, "OptInRequired": ReasonDenied, "UnsupportedOperationException": ReasonInvalid,
	}
	passing := map[string]Reason{
		"ThrottlingException": ReasonUnavailable, "Throttling": ReasonUnavailable, "LimitExceededException": ReasonUnavailable,
		"TooManyRequestsException": ReasonUnavailable, "RequestLimitExceeded": ReasonUnavailable,
		"KMSInternalException": ReasonUnavailable, "KeyUnavailableException": ReasonUnavailable, "DependencyTimeoutException": ReasonUnavailable,
		"InternalFailure": ReasonUnavailable, "InternalServerError": ReasonUnavailable,
		"ServiceUnavailable": ReasonUnavailable, "ServiceUnavailableException": ReasonUnavailable, "ThrottledException": ReasonUnavailable,
		"ExpiredTokenException": ReasonNoCredentials, "ExpiredToken": ReasonNoCredentials, "UnrecognizedClientException": ReasonNoCredentials,
		"InvalidClientTokenId": ReasonNoCredentials, "InvalidSignatureException": ReasonNoCredentials, "SignatureDoesNotMatch": ReasonNoCredentials,
		"IncompleteSignature": ReasonNoCredentials, "IncompleteSignatureException": ReasonNoCredentials,
		"MissingAuthenticationToken": ReasonNoCredentials, "MissingAuthenticationTokenException": ReasonNoCredentials,
		"RequestExpired": ReasonClock, "RequestTimeTooSkewed": ReasonClock,
	}
	for code := range reasons {
		if final[code] == "" && passing[code] == "" {
			t.Errorf("%s is not tested", code)
		}
	}
	n := newNode(t)
	_, r := n.generate(t)
	for code, reason := range final {
		n.kms.Fail(kmstest.Fault{Code: code, Times: 1})
		before := n.kms.Count("Decrypt")
		_, err := n.Decrypt(t.Context(), r)
		if e := expect(t, err, reason, code); e.Retryable() {
			t.Errorf("%s is retryable", code)
		}
		if d := n.kms.Count("Decrypt") - before; d != 1 {
			t.Errorf("%s: %d attempts", code, d)
		}
	}
	for code, reason := range passing {
		for _, status := range []int{400, 500, 503} {
			n.retries = nil
			n.kms.Fail(kmstest.Fault{Code: code, Status: status, Times: 2})
			before := n.kms.Count("Decrypt")
			k, err := n.Decrypt(t.Context(), r)
			if err != nil {
				t.Fatalf("%s %d: %v", code, status, err)
			}
			k.Wipe()
			if d := n.kms.Count("Decrypt") - before; d != 3 || len(n.retries) != 2 {
				t.Errorf("%s %d: %d attempts, %d retries", code, status, d, len(n.retries))
			}
			if e := expect(t, n.retries[0].Err, reason, code); !e.Retryable() || n.retries[0].Op != "Decrypt" {
				t.Errorf("%s: %+v", code, n.retries[0])
			}
		}
	}
}

// TestBrokenAnswers: what is no answer of KMS, by status and by shape.
func TestBrokenAnswers(t *testing.T) {
	html := "<html>proxy</html>"
	cases := map[string]struct {
		fault  kmstest.Fault
		reason Reason
		again  bool
	}{
		"500":         {kmstest.Fault{Status: 500}, ReasonUnavailable, true},
		"502 html":    {kmstest.Fault{Status: 502, Body: html}, ReasonUnavailable, true},
		"503 json":    {kmstest.Fault{Status: 503, Body: "{}"}, ReasonUnavailable, true},
		"429":         {kmstest.Fault{Status: 429, Body: html}, ReasonUnavailable, true},
		"408":         {kmstest.Fault{Status: 408, Body: html}, ReasonUnavailable, true},
		"200 html":    {kmstest.Fault{Status: 200, Body: html}, ReasonUnavailable, true},
		"200 nothing": {kmstest.Fault{Status: 200}, ReasonUnavailable, true},
		"200 null":    {kmstest.Fault{Status: 200, Body: "null"}, ReasonUnavailable, true},
		"connection":  {kmstest.Fault{Cut: true}, ReasonUnavailable, true},
		"403 html":    {kmstest.Fault{Status: 403, Body: html}, ReasonAnswer, false},
		"404 html":    {kmstest.Fault{Status: 404, Body: html}, ReasonAnswer, false},
		"unfinished":  {kmstest.Fault{Status: 200, Body: `{"KeyId": "x`, Header: http.Header{"Content-Length": {"500"}}}, ReasonUnavailable, true},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			_, r := n.generate(t)
			c.fault.Op, c.fault.Times = "Decrypt", 1
			n.kms.Fail(c.fault)
			k, err := n.Decrypt(t.Context(), r)
			k.Wipe()
			if c.again {
				if err != nil || len(n.retries) == 0 {
					t.Fatalf("not retried: %v", err)
				}
				err = n.retries[0].Err
			}
			var e *Error
			if !errors.As(err, &e) || e.Reason != c.reason {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestNotReached: what keeps a node from KMS before KMS could answer.
func TestNotReached(t *testing.T) {
	var handshakes atomic.Int32
	unknown := httptest.NewUnstartedServer(http.NotFoundHandler())
	unknown.Config.ErrorLog = log.New(io.Discard, "", 0)
	unknown.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			handshakes.Add(1)
		}
	}
	unknown.StartTLS()
	defer unknown.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "http://" + l.Addr().String()
	_ = l.Close()
	for _, c := range []struct {
		what, endpoint string
		is             func(error) bool
	}{
		{"a certificate of an unknown CA", unknown.URL, func(err error) bool {
			var certificate *tls.CertificateVerificationError
			return errors.As(err, &certificate)
		}},
		{"nobody listens", nobody, func(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }},
	} {
		n := newNode(t, func(o *Options) { o.KMSEndpoint, o.RetryLimit = c.endpoint, 5*time.Second })
		_, err := n.Decrypt(t.Context(), KeyRecord{KeyARN: n.kms.ARN(), WrappedKey: []byte("x")})
		e := expect(t, err, ReasonUnavailable, "")
		if !e.Retryable() || !c.is(err) || strings.Contains(err.Error(), "StatusCode") {
			t.Errorf("%s: %v", c.what, err)
		}
		if calls := n.Client.Calls(); calls.Retries == 0 || time.Duration(n.elapsed.Load()) != 5*time.Second {
			t.Errorf("%s: %+v in %s", c.what, calls, time.Duration(n.elapsed.Load()))
		}
	}
	if handshakes.Load() < 2 {
		t.Errorf("%d connections to the server with the unknown CA", handshakes.Load())
	}
}

// TestClockSkew: signatures of a node whose clock is wrong are refused once;
// from then on they are made by KMS's clock.
func TestClockSkew(t *testing.T) {
	for _, ahead := range []time.Duration{time.Hour, -time.Hour, 6 * time.Minute} {
		n := newNode(t)
		n.kms.SetClock(ahead)
		n.generate(t)
		if len(n.retries) != 1 {
			t.Fatalf("KMS %s ahead: %d retries", ahead, len(n.retries))
		}
		if e := expect(t, n.retries[0].Err, ReasonClock, "InvalidSignatureException"); !e.Retryable() {
			t.Errorf("KMS %s ahead: final", ahead)
		}
		n.generate(t)
		if c := n.Client.Calls(); c.GenerateDataKey != 3 || c.Retries != 1 {
			t.Errorf("KMS %s ahead: calls %+v", ahead, c)
		}
		// The clock is set: the next answer tells, and it goes on.
		n.kms.SetClock(0)
		n.generate(t)
		if c := n.Client.Calls(); c.GenerateDataKey != 5 || c.Retries != 2 {
			t.Errorf("KMS %s ahead, then not: calls %+v", ahead, c)
		}
	}
	// A permission that is denied under a bad signature is no judgement; under a good one it is.
	n := newNode(t)
	n.kms.SetClock(time.Hour)
	n.kms.Deny("GenerateDataKey")
	n.kms.Fail(kmstest.Fault{Code: "AccessDeniedException", Times: 1})
	_, _, err := n.Generate(t.Context())
	expect(t, err, ReasonDenied, "AccessDeniedException")
	if len(n.retries) != 1 {
		t.Fatalf("%d retries", len(n.retries))
	}
	expect(t, n.retries[0].Err, ReasonClock, "AccessDeniedException")
}

// An answer that cannot be decoded has a key in it all the same.
func TestErrorsShowNoPieceOfAnAnswer(t *testing.T) {
	secret := base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef"))
	for _, body := range []string{
		`{"Plaintext": "` + secret, `{"Plaintext": "` + secret + `!!"}`, `{"Plaintext": ["` + secret + `"]}`,
		`{"KeyId": {"` + secret + `": 1}}`, secret, `{"Plaintext": "` + secret + `", "KeyId": 5}`, `{"` + secret + `"`,
		`"` + secret + `"`, // of which the SDK says: expected '{', got …
	} {
		for _, status := range []int{200, 500} {
			n := newNode(t, func(o *Options) { o.RetryLimit = -1 })
			n.kms.Fail(kmstest.Fault{Status: status, Body: body})
			_, err := n.Decrypt(t.Context(), KeyRecord{KeyARN: n.kms.ARN(), WrappedKey: []byte("x")})
			var e *Error
			if !errors.As(err, &e) {
				t.Fatal(err)
			}
			asJSON, jsonErr := json.Marshal(map[string]any{"e": err})
			if jsonErr != nil {
				t.Fatal(jsonErr)
			}
			shown := fmt.Sprintf("%v %+v %#v %q %s", err, err, *e, err, asJSON)
			for link := error(e); link != nil; link = errors.Unwrap(link) {
				shown += fmt.Sprintf(" %v %+v %#v", link, link, link)
			}
			if strings.Contains(shown, secret[:16]) || strings.Contains(shown, fmt.Sprintf("%#v", []byte(secret))[8:60]) {
				t.Errorf("%d %s shows in %s", status, body, shown)
			}
		}
	}
}

func TestDeadlineOfEveryCall(t *testing.T) {
	// The role's credentials have a tenth less than the call, which has to be enough on a busy machine to tell what did not come.
	const timeout = time.Second
	short := func(o *Options) { o.CallTimeout, o.RetryLimit = timeout, -1 }
	cases := map[string]func(n *node) (func(context.Context) error, Reason, string){
		"KMS hangs": func(n *node) (func(context.Context) error, Reason, string) {
			n.kms.Fail(kmstest.Fault{Hang: true})
			return func(ctx context.Context) error { _, _, err := n.Generate(ctx); return err }, ReasonUnavailable, ""
		},
		"KMS body hangs": func(n *node) (func(context.Context) error, Reason, string) {
			n.kms.Fail(kmstest.Fault{Status: 200, Delay: time.Minute})
			return func(ctx context.Context) error { _, err := n.CheckKey(ctx); return err }, ReasonUnavailable, ""
		},
		"token hangs": func(n *node) (func(context.Context) error, Reason, string) {
			n.imds.Set(kmstest.HopLimit)
			return func(ctx context.Context) error { _, err := n.Identity(ctx); return err }, ReasonIMDS, CodeTokenTimeout
		},
		"document hangs": func(n *node) (func(context.Context) error, Reason, string) {
			n.imds.Set(kmstest.Hangs)
			return func(ctx context.Context) error { _, err := n.Identity(ctx); return err }, ReasonIMDS, ""
		},
		"credentials hang": func(n *node) (func(context.Context) error, Reason, string) {
			n.options.Region = kmstest.Region
			n.imds.Set(kmstest.Hangs)
			return func(ctx context.Context) error { _, err := n.CheckKey(ctx); return err }, ReasonIMDS, ""
		},
		"credentials' token hangs": func(n *node) (func(context.Context) error, Reason, string) {
			n.options.Region = kmstest.Region
			n.imds.Set(kmstest.HopLimit)
			return func(ctx context.Context) error { _, err := n.CheckKey(ctx); return err }, ReasonIMDS, CodeTokenTimeout
		},
		"mapping hangs": func(n *node) (func(context.Context) error, Reason, string) {
			n.imds.Set(kmstest.Hangs)
			return func(ctx context.Context) error { _, err := n.Ephemeral(ctx); return err }, ReasonIMDS, ""
		},
	}
	for name, prepare := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, short)
			if name == "KMS hangs" || name == "KMS body hangs" {
				if _, err := n.Identity(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			call, reason, code := prepare(n)
			// Without a deadline of its own it hangs until here.
			ctx, cancel := context.WithTimeout(t.Context(), 20*timeout)
			defer cancel()
			start := time.Now()
			err := call(ctx)
			e := expect(t, err, reason, code)
			if !errors.Is(err, context.DeadlineExceeded) || !e.Retryable() {
				t.Errorf("error %v", err)
			}
			if strings.HasPrefix(name, "KMS") && !strings.Contains(err.Error(), "deadline exceeded while ") {
				t.Errorf("it does not say what was waited for: %v", err)
			}
			if d := time.Since(start); d < timeout/2 || d > 10*timeout {
				t.Errorf("it took %s", d)
			}
		})
	}
}

// TestPersistentFaultsEndInTime: attempts are made to the limit, and what is under way then has its deadline.
func TestPersistentFaultsEndInTime(t *testing.T) {
	const timeout, limit, slack = 300 * time.Millisecond, 2 * time.Second, 5 * time.Second
	for name, fault := range map[string]kmstest.Fault{
		"throttled": {Code: "ThrottlingException"}, "dropped": {Cut: true}, "hangs": {Hang: true}, "slow": {Delay: 2 * timeout, Code: "ThrottlingException"},
		"expired credentials": {Code: "ExpiredTokenException"}, "clock": {Code: "RequestExpired"}, "503 of a load balancer": {Status: 503, Body: "<html>"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			_, r := n.generate(t)
			n.clock, n.timeout, n.limit = realClock(), timeout, limit
			n.kms.Fail(fault)
			start := time.Now()
			_, err := n.Decrypt(t.Context(), r)
			var e *Error
			if took := time.Since(start); !errors.As(err, &e) || !e.Retryable() || took < limit || took > limit+timeout+slack {
				t.Errorf("%v after %s", err, took)
			}
			if c := n.Client.Calls(); c.Decrypt < 2 || c.Retries != c.Decrypt-1 {
				t.Errorf("calls %+v", c)
			}
		})
	}
}

// TestLateIsExplained: an attempt that ran out of time tells how far it came.
func TestLateIsExplained(t *testing.T) {
	for want, hook := range map[string]func(*httptrace.ClientTrace){
		"lookup kms.example: no answer": func(c *httptrace.ClientTrace) { c.DNSStart(httptrace.DNSStartInfo{Host: "kms.example"}) },
		"while connecting to 192.0.2.1:443": func(c *httptrace.ClientTrace) {
			c.DNSStart(httptrace.DNSStartInfo{Host: "kms.example"})
			c.ConnectStart("tcp", "192.0.2.1:443")
		},
		"while agreeing on TLS":        func(c *httptrace.ClientTrace) { c.TLSHandshakeStart() },
		"while waiting for the answer": func(c *httptrace.ClientTrace) { c.GotConn(httptrace.GotConnInfo{}) },
		"while reading the answer":     func(c *httptrace.ClientTrace) { c.GotFirstResponseByte() },
	} {
		ctx, tr := withTrace(t.Context())
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://kms.example", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		if got := tr.late(context.DeadlineExceeded); got != context.DeadlineExceeded {
			t.Errorf("before a request: %v", got)
		}
		_, err = tracer{httpClient(roundTripper(func(r *http.Request) (*http.Response, error) {
			hook(httptrace.ContextClientTrace(r.Context()))
			return nil, context.DeadlineExceeded
		}))}.Do(r)
		var dns *net.DNSError
		if got := tr.late(err); !errors.Is(got, context.DeadlineExceeded) || !strings.Contains(got.Error(), want) || errors.As(got, &dns) != strings.Contains(want, "lookup") {
			t.Errorf("%v, want %q", got, want)
		}
		if other := errors.New("refused"); tr.late(other) != other {
			t.Error("another error was changed")
		}
	}
}

func TestIMDSTroubles(t *testing.T) {
	cases := map[kmstest.Mode]struct {
		reason Reason
		code   string
	}{
		kmstest.Off:        {ReasonIMDS, CodeForbidden},
		kmstest.TokenError: {ReasonIMDS, "HTTP503"},
		kmstest.Broken:     {ReasonIMDS, "HTTP500"},
		kmstest.Down:       {ReasonIMDS, ""},
		kmstest.NoRole:     {ReasonNoCredentials, "HTTP404"},
		kmstest.RoleFails:  {ReasonNoCredentials, ""},
		kmstest.Garbage:    {ReasonNoCredentials, ""}, // a role name that is none
	}
	for mode, c := range cases {
		t.Run(string(mode), func(t *testing.T) {
			// Credentials only: the region is known and CheckKey needs no identity.
			n := newNode(t, func(o *Options) { o.Region, o.RetryLimit = kmstest.Region, 5*time.Second })
			n.imds.Set(mode)
			_, err := n.CheckKey(t.Context())
			var e *Error
			if !errors.As(err, &e) || e.Reason != c.reason && mode != kmstest.Garbage || !e.Retryable() {
				t.Fatalf("%v", err)
			}
			if c.code != "" && e.Code != c.code {
				t.Errorf("code %q: %v", e.Code, err)
			}
			if len(n.kms.Calls()) != 0 || n.Client.Calls().Retries == 0 {
				t.Errorf("calls %+v", n.Client.Calls())
			}
			for _, secret := range []string{"secret-", "Token"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("%q in %v", secret, err)
				}
			}
			// It passes: the same client goes on.
			n.imds.Set(kmstest.Works)
			if _, err := n.CheckKey(t.Context()); err != nil {
				t.Errorf("afterwards: %v", err)
			}

			// The identity does not need a role.
			n = newNode(t, func(o *Options) { o.RetryLimit = -1 })
			n.imds.Set(mode)
			_, err = n.Identity(t.Context())
			if mode == kmstest.NoRole || mode == kmstest.RoleFails {
				if err != nil {
					t.Errorf("Identity: %v", err)
				}
				return
			}
			expect(t, err, ReasonIMDS, map[bool]string{true: c.code}[c.code != ""])
			_, err = n.Ephemeral(t.Context())
			if mode != kmstest.Garbage {
				expect(t, err, ReasonIMDS, c.code)
			}
			if slices.ContainsFunc(n.imds.Requests(), func(r string) bool { return mode == kmstest.Off && strings.HasPrefix(r, "GET") }) {
				t.Errorf("it was tried without a token: %v", n.imds.Requests())
			}
		})
	}
}

func TestIMDSUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	n := newNode(t, func(o *Options) { o.IMDSEndpoint = "http://" + addr })
	_, err = n.Identity(t.Context())
	expect(t, err, ReasonIMDS, "")
	if !strings.Contains(err.Error(), "connection refused") || n.Client.Calls().Retries == 0 {
		t.Errorf("%v, %+v", err, n.Client.Calls())
	}
}

// A boot that is faster than IMDS and KMS.
func TestComesUpLate(t *testing.T) {
	n := newNode(t)
	n.imds.SetFor(kmstest.Down, 3)
	n.kms.Fail(kmstest.Fault{Code: "ThrottlingException", Times: 2})
	n.kms.Fail(kmstest.Fault{Cut: true, Times: 1})
	n.generate(t)
	if c := n.Client.Calls(); c.Retries < 4 || c.GenerateDataKey != 4 {
		t.Errorf("calls %+v", c)
	}
	if ops := n.retries; ops[0].Op != "Identity" || ops[len(ops)-1].Op != "GenerateDataKey" || ops[0].Attempt != 1 || ops[1].Attempt != 2 {
		t.Errorf("retries %+v", ops)
	}
}

func TestIdentityAndEphemeral(t *testing.T) {
	n := newNode(t)
	want := Identity{
		InstanceID: kmstest.InstanceID, Region: kmstest.Region, AvailabilityZone: kmstest.Region + "a",
		AccountID: kmstest.Account, InstanceType: kmstest.InstanceType,
	}
	for range 3 {
		if got, err := n.Identity(t.Context()); err != nil || got != want {
			t.Errorf("%+v %v", got, err)
		}
	}
	if c := n.Client.Calls(); c.IMDS != 1 || len(n.imds.Requests()) != 2 {
		t.Errorf("calls %+v, %v", c, n.imds.Requests())
	}
	if got, err := n.Ephemeral(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("none: %v %v", got, err)
	}
	n.imds.SetMapping("ephemeral0", "sdb")
	n.imds.SetMapping("ephemeral1", "sdc\n")
	if got, err := n.Ephemeral(t.Context()); err != nil || !slices.Equal(got, []string{"sdb", "sdc"}) {
		t.Errorf("two: %v %v", got, err)
	}
	// A session token that the service has forgotten is replaced.
	n.imds.ForgetTokens()
	if got, err := n.Ephemeral(t.Context()); err != nil || len(got) != 2 {
		t.Errorf("after the tokens were forgotten: %v %v", got, err)
	}
	for field, value := range map[string]string{"region": "evil.example.com/", "instanceId": ""} {
		n := newNode(t, func(o *Options) { o.RetryLimit = -1 })
		n.imds.SetIdentity(field, value)
		_, err := n.Identity(t.Context())
		expect(t, err, ReasonIMDS, "")
	}
}

func TestExpiredCredentials(t *testing.T) {
	n := newNode(t)
	n.generate(t)
	// Rotated behind our back: the cached ones are dropped, once.
	n.imds.Rotate(time.Now().Add(time.Hour))
	n.generate(t)
	if c := n.Client.Calls(); c.Retries != 1 || c.GenerateDataKey != 3 {
		t.Errorf("calls %+v", c)
	}
	// Nothing but expired ones: retried to the limit.
	n.imds.Rotate(time.Now().Add(-time.Hour))
	_, _, err := n.Generate(t.Context())
	e := expect(t, err, ReasonNoCredentials, "ExpiredTokenException")
	if !e.Retryable() {
		t.Error("final")
	}
	// Then the metadata service is gone too: that is what the error says, not
	// KMS's view of credentials that the SDK would go on using.
	n.imds.Set(kmstest.Off)
	_, _, err = n.Generate(t.Context())
	expect(t, err, ReasonIMDS, CodeForbidden)
}

// The SDK would use credentials that have expired for another 5 to 15 minutes
// when the metadata service fails.
func TestExpiredCredentialsAreNotUsedOn(t *testing.T) {
	t.Parallel()
	n := newNode(t, func(o *Options) { o.RetryLimit = -1 })
	expiration := time.Now().Add(1500 * time.Millisecond).Truncate(time.Second)
	n.imds.Rotate(expiration)
	n.generate(t)
	time.Sleep(time.Until(expiration) + 10*time.Millisecond)
	n.imds.Set(kmstest.Off)
	_, _, err := n.Generate(t.Context())
	expect(t, err, ReasonIMDS, CodeForbidden)
	if c := n.kms.Count("GenerateDataKey"); c != 1 {
		t.Errorf("KMS was asked %d times", c)
	}
}

func TestEmptyCredentialsAreNotUsed(t *testing.T) {
	body := map[string]string{"/latest/api/token": "token", "/latest/meta-data/" + rolePath: "role", "/latest/meta-data/" + rolePath + "role": `{"Code": "Success"}`}
	m := newMetadata("http://169.254.169.254", roundTripper(func(r *http.Request) (*http.Response, error) {
		return &http.Response{
			StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(body[r.URL.Path])),
			Header: http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"60"}},
		}, nil
	}), func() {})
	_, err := newCredentials(m, time.Second).Retrieve(t.Context())
	var e *Error
	if !errors.As(err, &e) || e.Reason != ReasonNoCredentials || !strings.Contains(err.Error(), "are empty") {
		t.Errorf("%v", err)
	}
}

func TestCheckKey(t *testing.T) {
	n := newNode(t)
	n.kms.Alias("alias/disks", n.kms.ARN())
	n.options.KeyID = "alias/disks"
	want := KeyFacts{Checked: true, ARN: n.kms.ARN(), Manager: "CUSTOMER", Spec: "SYMMETRIC_DEFAULT", Usage: "ENCRYPT_DECRYPT", State: "Enabled"}
	if got, err := n.CheckKey(t.Context()); err != nil || got != want {
		t.Errorf("%+v %v", got, err)
	}
	for name, c := range map[string]struct {
		spec   kmstest.KeySpec
		reason Reason
	}{
		"aws managed": {kmstest.KeySpec{Manager: "AWS"}, ReasonAWSManaged},
		"rsa":         {kmstest.KeySpec{Spec: "RSA_2048"}, ReasonAsymmetric},
		"sign":        {kmstest.KeySpec{Spec: "ECC_NIST_P256", Usage: "SIGN_VERIFY"}, ReasonAsymmetric},
		"mac":         {kmstest.KeySpec{Usage: "GENERATE_VERIFY_MAC"}, ReasonAsymmetric},
		"disabled":    {kmstest.KeySpec{State: kmstest.Disabled}, ReasonKeyState},
		"deletion":    {kmstest.KeySpec{State: kmstest.PendingDeletion}, ReasonKeyState},
		"import":      {kmstest.KeySpec{State: "PendingImport"}, ReasonKeyState},
	} {
		n.options.KeyID = n.kms.NewKey(c.spec)
		f, err := n.CheckKey(t.Context())
		expect(t, err, c.reason, "")
		if !f.Checked || f.ARN != n.options.KeyID {
			t.Errorf("%s: facts %+v", name, f)
		}
	}
	n.options.KeyID = n.kms.ARN()
	n.kms.Deny("DescribeKey")
	if got, err := n.CheckKey(t.Context()); err != nil || got != (KeyFacts{}) {
		t.Errorf("denied: %+v %v", got, err)
	}
	n.generate(t) // which needs no DescribeKey
	n.options.KeyID = strings.Replace(n.kms.ARN(), kmstest.Account, "999999999999", 1)
	n.kms.Heal()
	_, err := n.CheckKey(t.Context())
	expect(t, err, ReasonNotFound, "NotFoundException")
}

func TestNewJudgesOptions(t *testing.T) {
	const uuid = "1234abcd-12ab-34cd-56ef-1234567890ab"
	const arn = "arn:aws:kms:eu-central-1:111122223333:"
	for _, id := range []string{
		uuid, arn + "key/" + uuid, "mrk-1234abcd12ab34cd56ef1234567890ab", arn + "key/mrk-1234abcd12ab34cd56ef1234567890ab",
		"alias/disks", "alias/team/disks", arn + "alias/disks", "arn:aws-cn:kms:eu-central-1:111122223333:key/" + uuid, "alias/awsome",
	} {
		if _, err := New(Options{KeyID: id, Region: "eu-central-1"}); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	cases := []struct {
		o      Options
		reason Reason
	}{
		{Options{}, ReasonInvalid},
		{Options{KeyID: "alias/aws/ebs"}, ReasonAWSManaged},
		{Options{KeyID: arn + "alias/aws/ebs"}, ReasonAWSManaged},
		{Options{KeyID: "alias/"}, ReasonInvalid},
		{Options{KeyID: "disks"}, ReasonInvalid},
		{Options{KeyID: uuid + "\n"}, ReasonInvalid},
		{Options{KeyID: uuid[:35]}, ReasonInvalid},
		{Options{KeyID: arn + "key/" + uuid + "/x"}, ReasonInvalid},
		{Options{KeyID: strings.Replace(arn, "kms", "s3", 1) + "key/" + uuid}, ReasonInvalid},
		{Options{KeyID: arn + "key/" + uuid, Region: "us-east-1"}, ReasonWrongRegion},
		{Options{KeyID: arn + "alias/x", Region: "us-east-1"}, ReasonWrongRegion},
		{Options{KeyID: uuid, Region: "mars"}, ReasonInvalid},
		{Options{KeyID: uuid, Region: "us-east-1.evil.example"}, ReasonInvalid},
		{Options{KeyID: uuid, KMSEndpoint: "kms.local"}, ReasonInvalid},
		{Options{KeyID: uuid, KMSEndpoint: "ftp://kms.local"}, ReasonInvalid},
		{Options{KeyID: uuid, IMDSEndpoint: "http://user:pw@h"}, ReasonInvalid},
		{Options{KeyID: uuid, IMDSEndpoint: "http://"}, ReasonInvalid},
		{Options{KeyID: uuid, CallTimeout: -1}, ReasonInvalid},
	}
	for _, c := range cases {
		_, err := New(c.o)
		if e := expect(t, err, c.reason, ""); e.Retryable() {
			t.Errorf("%+v: retryable", c.o)
		}
	}
}

func TestWrongRegionOfTheNode(t *testing.T) {
	n := newNode(t) // Region from the identity document
	n.imds.SetIdentity("region", "us-east-1")
	_, _, err := n.Generate(t.Context())
	expect(t, err, ReasonWrongRegion, "")
	_, err = n.Decrypt(t.Context(), KeyRecord{KeyARN: n.kms.ARN(), WrappedKey: []byte("x")})
	expect(t, err, ReasonWrongRegion, "")
	if len(n.kms.Calls()) != 0 {
		t.Error("KMS was asked")
	}
}

// TestOnlyOptionsDecide: nothing in the environment, no file at home, no proxy
// and no redirect leads to another key source.
func TestOnlyOptionsDecide(t *testing.T) {
	var hits atomic.Int32
	trap := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		http.Error(w, "", http.StatusTeapot)
	}))
	defer trap.Close()
	home := t.TempDir()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "AKIDENV", "AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "x", "AWS_PROFILE": "evil",
		"AWS_REGION": "us-west-2", "AWS_DEFAULT_REGION": "us-west-2", "AWS_ENDPOINT_URL": trap.URL, "AWS_ENDPOINT_URL_KMS": trap.URL,
		"AWS_EC2_METADATA_SERVICE_ENDPOINT": trap.URL, "AWS_EC2_METADATA_DISABLED": "true", "AWS_EC2_METADATA_V1_DISABLED": "false",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI": trap.URL, "AWS_WEB_IDENTITY_TOKEN_FILE": "/dev/null", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x",
		"AWS_USE_FIPS_ENDPOINT": "true", "AWS_MAX_ATTEMPTS": "9", "AWS_CONFIG_FILE": home + "/config", "AWS_CA_BUNDLE": home + "/ca", "HOME": home,
		"HTTP_PROXY": trap.URL, "http_proxy": trap.URL, "HTTPS_PROXY": trap.URL, "https_proxy": trap.URL, "ALL_PROXY": trap.URL, "NO_PROXY": "", "no_proxy": "",
	} {
		t.Setenv(name, value)
	}
	n := newNode(t)
	n.generate(t)
	if _, err := n.CheckKey(t.Context()); err != nil {
		t.Error(err)
	}
	for _, c := range n.kms.Calls() {
		if c.AccessKey == "AKIDENV" || c.Region != kmstest.Region {
			t.Errorf("call %+v", c)
		}
	}
	// Where no IMDS endpoint is configured it is EC2's, not the environment's.
	var asked []string
	_, err := newMetadata(Options{}.imdsEndpoint(), roundTripper(func(r *http.Request) (*http.Response, error) {
		asked = append(asked, r.URL.String())
		return nil, errors.New("not sent")
	}), func() {}).identity(t.Context())
	if err == nil || !slices.Equal(asked, []string{"http://169.254.169.254/latest/api/token"}) {
		t.Errorf("without an endpoint: %v, asked %v", err, asked)
	}

	redirect := newNode(t, func(o *Options) { o.RetryLimit = -1 })
	if _, err := redirect.Identity(t.Context()); err != nil {
		t.Fatal(err)
	}
	redirect.kms.Fail(kmstest.Fault{Status: 302, Header: http.Header{"Location": {trap.URL}}})
	if _, _, err := redirect.Generate(t.Context()); err == nil {
		t.Error("a redirect was followed")
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("the trap got %d requests", n)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Go reads the proxies once per process and never uses them for 127.0.0.1, so
// another process calls names that only a proxy could resolve.
func TestProxiesOfTheEnvironmentAreNotAsked(t *testing.T) {
	var hits atomic.Int32
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		hits.Add(1)
		http.Error(w, "", http.StatusForbidden)
	}))
	defer proxy.Close()
	imds := kmstest.NewIMDS(t)
	cmd := child(t, "proxy", imds.URL())
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"} {
		cmd.Env = append(cmd.Env, name+"="+proxy.URL)
	}
	cmd.Env = append(cmd.Env, "NO_PROXY=", "no_proxy=")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("the proxy got %d requests", n)
	}
	if len(imds.Requests()) == 0 {
		t.Error("the process got no credentials, so it did not try KMS")
	}
}

func TestBackoffIsFullJitter(t *testing.T) {
	highest := func(n int64) int64 { return n - 1 }
	lowest := func(int64) int64 { return 0 }
	want := []time.Duration{200, 400, 800, 1600, 3200, 6400, 12800, 20000, 20000, 20000}
	for i, w := range want {
		if got := (clock{random: highest}).backoff(i + 1); got != w*time.Millisecond {
			t.Errorf("attempt %d: at most %s, want %s", i+1, got, w*time.Millisecond)
		}
		if got := (clock{random: lowest}).backoff(i + 1); got != 0 {
			t.Errorf("attempt %d: at least %s", i+1, got)
		}
	}
	if got := (clock{random: highest}).backoff(1 << 40); got != backoffCap {
		t.Errorf("much later: %s", got)
	}
	c := realClock()
	var sum time.Duration
	for range 2000 {
		d := c.backoff(3)
		if d < 0 || d > 800*time.Millisecond {
			t.Fatalf("waits %s", d)
		}
		sum += d
	}
	if mean := sum / 2000; mean < 350*time.Millisecond || mean > 450*time.Millisecond {
		t.Errorf("the mean wait is %s", mean)
	}
}

// Who is throttled waits for seconds from the first refusal on, and no longer
// after the next ones: docs/benchmarks-fleet.md has why.
func TestThrottledBackoff(t *testing.T) {
	highest := func(n int64) int64 { return n - 1 }
	lowest := func(int64) int64 { return 0 }
	for refusals, want := range map[int]time.Duration{
		1: throttledWindow, 2: throttledWindow, throttledTries: throttledWindow, throttledTries + 1: backoffCap, 1 << 40: backoffCap,
	} {
		if got := (clock{random: highest}).throttledBackoff(refusals); got != want {
			t.Errorf("refusal %d: at most %s, want %s", refusals, got, want)
		}
		if got := (clock{random: lowest}).throttledBackoff(refusals); got != want/2 {
			t.Errorf("refusal %d: at least %s, want %s", refusals, got, want/2)
		}
	}
	c := realClock()
	var sum time.Duration
	for range 2000 {
		sum += c.throttledBackoff(1)
	}
	if mean := sum / 2000; mean < 4400*time.Millisecond || mean > 4600*time.Millisecond {
		t.Errorf("the mean wait is %s", mean)
	}
}

// A refusal is counted among refusals only: what was unreachable for long and
// throttles when it is back is asked again soon.
func TestRefusalsAreCountedApart(t *testing.T) {
	n := newNode(t)
	n.clock.random = func(n int64) int64 { return n - 1 }
	faults := []kmstest.Fault{
		{Code: "KMSInternalException", Status: 500}, {Cut: true}, {Code: "KMSInternalException", Status: 500},
		{Code: "ThrottlingException"}, {Code: "Throttling"}, {Code: "RequestLimitExceeded"}, {Code: "LimitExceededException"},
		{Cut: true},
	}
	want := []time.Duration{200, 400, 800, 6000, 6000, 6000, 6000, 20000}
	for i, f := range faults {
		f.Times = 1
		n.kms.Fail(f)
		want[i] *= time.Millisecond
	}
	n.generate(t)
	if !slices.Equal(n.waits, want) {
		t.Errorf("waits %v, want %v", n.waits, want)
	}
}

func TestRetryLimit(t *testing.T) {
	n := newNode(t, func(o *Options) { o.RetryLimit = 3 * time.Second })
	n.clock.random = func(n int64) int64 { return n - 1 }
	n.kms.Fail(kmstest.Fault{Code: "KMSInternalException"})
	_, _, err := n.Generate(t.Context())
	expect(t, err, ReasonUnavailable, "KMSInternalException")
	// 0.2 + 0.4 + 0.8 + 1.6, of which the last is cut to the limit.
	want := []time.Duration{200, 400, 800, 1600}
	for i := range want {
		want[i] *= time.Millisecond
	}
	if !slices.Equal(n.waits, want) && !slices.Equal(n.waits[:3], want[:3]) {
		t.Errorf("waits %v", n.waits)
	}
	if total := time.Duration(n.elapsed.Load()); total != 3*time.Second || n.Client.Calls().GenerateDataKey != len(n.waits)+1 {
		t.Errorf("waited %s, %+v", total, n.Client.Calls())
	}
	for i, r := range n.retries {
		if r.Attempt != i+1 || r.Wait != n.waits[i] || r.Limit != 3*time.Second || (i > 0 && r.Elapsed <= n.retries[i-1].Elapsed) {
			t.Errorf("retry %d: %+v", i, r)
		}
	}
	// Looking for the region counts towards the same limit.
	n = newNode(t, func(o *Options) { o.RetryLimit = 2 * time.Second })
	n.imds.Set(kmstest.Off)
	_, _, err = n.Generate(t.Context())
	expect(t, err, ReasonIMDS, CodeForbidden)
	if total := time.Duration(n.elapsed.Load()); total != 2*time.Second {
		t.Errorf("waited %s", total)
	}
	n = newNode(t, func(o *Options) { o.RetryLimit = -1 })
	n.kms.Fail(kmstest.Fault{Code: "ThrottlingException"})
	if _, _, err := n.Generate(t.Context()); err == nil || n.Client.Calls().Retries != 0 {
		t.Errorf("one attempt: %v %+v", err, n.Client.Calls())
	}
}

func TestCallerEndsACall(t *testing.T) {
	n := newNode(t)
	n.clock = realClock()
	n.clock.random = func(n int64) int64 { return n - 1 }
	n.kms.Fail(kmstest.Fault{Code: "ThrottlingException"})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, _, err := n.Generate(ctx)
	expect(t, err, ReasonUnavailable, "ThrottlingException")
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 3*time.Second {
		t.Errorf("%v after %s", err, time.Since(start))
	}
	hang := newNode(t)
	hang.kms.Fail(kmstest.Fault{Hang: true})
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, _, err = hang.Generate(ctx)
	if !errors.Is(err, context.Canceled) || hang.Client.Calls().Retries != 0 {
		t.Errorf("%v %+v", err, hang.Client.Calls())
	}
}

func TestSDKDoesNotRetry(t *testing.T) {
	n := newNode(t, func(o *Options) { o.RetryLimit = -1 })
	for _, f := range []kmstest.Fault{{Code: "ThrottlingException"}, {Status: 500}, {Cut: true}, {Code: "InvalidSignatureException"}} {
		n.kms.Fail(f)
		before := len(n.kms.Calls())
		if _, err := n.CheckKey(t.Context()); err == nil {
			t.Error("no error")
		}
		if d := len(n.kms.Calls()) - before; d != 1 {
			t.Errorf("%+v: %d requests", f, d)
		}
		n.kms.Heal()
	}
	m := newNode(t, func(o *Options) { o.RetryLimit = -1 })
	for _, mode := range []kmstest.Mode{kmstest.TokenError, kmstest.Off, kmstest.Down} {
		m.imds.Set(mode)
		before := len(m.imds.Requests())
		_, _ = m.Identity(t.Context())
		if d := len(m.imds.Requests()) - before; d != 1 {
			t.Errorf("%s: %d requests", mode, d)
		}
	}
}

func TestTwoGoroutines(t *testing.T) {
	n := newNode(t)
	n.imds.SetFor(kmstest.Down, 2)
	n.kms.Fail(kmstest.Fault{Code: "ThrottlingException", Times: 2})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			k, r, err := n.Generate(context.Background())
			if err != nil {
				t.Error(err)
				return
			}
			defer k.Wipe()
			again, err := n.Decrypt(context.Background(), r)
			if err != nil {
				t.Error(err)
				return
			}
			defer again.Wipe()
			if !again.Equal(k) {
				t.Error("another key")
			}
			_ = n.Client.Calls()
		})
	}
	wg.Wait()
	if c := n.Client.Calls(); c.GenerateDataKey != 4 || c.Decrypt != 2 || len(c.RequestIDs) != 6 {
		t.Errorf("calls %+v", c)
	}
}

func TestEndpointsMustNotShowTheDataKey(t *testing.T) {
	for endpoint, good := range map[string]bool{
		"": true, "https://vpce-1.kms.eu-west-1.vpce.example": true, "http://127.0.0.1:8080": true, "http://[::1]:8080": true,
		"http://169.254.169.254": true, "http://kms.example": false, "http://10.0.0.1": false, "http://localhost": false,
		"ftp://127.0.0.1": false, "kms.example": false, "https://user@kms.example": false, "https://": false,
	} {
		if err := CheckEndpoint(endpoint); (err == nil) != good {
			t.Errorf("%q: %v", endpoint, err)
		}
		if _, err := New(Options{KeyID: "alias/x", KMSEndpoint: endpoint}); (err == nil) != good {
			t.Errorf("a client of %q: %v", endpoint, err)
		}
	}
}
