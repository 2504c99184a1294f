package kmstest

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// Key states as DescribeKey names them.
const (
	Enabled         = "Enabled"
	Disabled        = "Disabled"
	PendingDeletion = "PendingDeletion"
)

// KeySpec describes a key to create; the zero value is a customer managed,
// symmetric, enabled key of Region.
type KeySpec struct {
	Manager string // "CUSTOMER" or "AWS"
	Spec    string // "SYMMETRIC_DEFAULT", "RSA_2048", …
	Usage   string // "ENCRYPT_DECRYPT", "SIGN_VERIFY", …
	State   string // Enabled, Disabled, PendingDeletion
}

// Fault is an answer that KMS gives instead of its own.
type Fault struct {
	Op      string                      // "Decrypt", …; "" is every operation
	Code    string                      // error code; Status is 400 unless given
	Status  int                         // HTTP status; without Code an empty or Body answer
	Body    string                      // sent as it is, instead of Code
	Header  http.Header                 // added to the answer
	Hang    bool                        // no answer until the client goes away
	Cut     bool                        // the connection is closed without an answer
	Delay   time.Duration               // before whatever follows
	Rewrite func(answer map[string]any) // changes a good answer
	Times   int                         // how often; 0 is for ever
}

// Call is one request that KMS got.
type Call struct {
	Op          string
	KeyID       string // of ReEncrypt, the one that unwraps
	To          string // of ReEncrypt, the one that wraps
	Context     map[string]string
	AccessKey   string
	Region      string // that the request was signed for
	Code        string // of the answer, "" for success or none
	RequestID   string
	ContextSent bool // EncryptionContext was in the request, even if empty
}

type key struct {
	KeySpec
	arn    string
	id     string
	secret []byte
}

// KMS is a server that speaks KMS's protocol (AWS JSON 1.1).
type KMS struct {
	t      testing.TB
	server *httptest.Server
	closed chan struct{}

	mu           sync.Mutex
	keys         map[string]*key // by key id
	aliases      map[string]string
	faults       []*Fault
	denied       map[string]bool
	access       *Access
	calls        []Call
	allowContext bool
	ahead        time.Duration
	imds         *IMDS
	arn          string
}

// NewKMS starts a KMS with one good key, [KMS.ARN]. It ends with the test, and
// fails it if a call carries an encryption context (see AllowContext).
func NewKMS(t testing.TB) *KMS {
	k := &KMS{
		t:       t,
		closed:  make(chan struct{}),
		keys:    map[string]*key{},
		aliases: map[string]string{},
		denied:  map[string]bool{},
	}
	k.arn = k.NewKey(KeySpec{})
	k.server = httptest.NewServer(k)
	t.Cleanup(func() {
		close(k.closed)
		k.server.CloseClientConnections()
		k.server.Close()
	})
	return k
}

// URL is the endpoint.
func (k *KMS) URL() string { return k.server.URL }

// ARN is the key that is there from the start.
func (k *KMS) ARN() string { return k.arn }

// NewKey creates a key and returns its ARN.
func (k *KMS) NewKey(s KeySpec) string {
	def := func(v *string, d string) {
		if *v == "" {
			*v = d
		}
	}
	def(&s.Manager, "CUSTOMER")
	def(&s.Spec, "SYMMETRIC_DEFAULT")
	def(&s.Usage, "ENCRYPT_DECRYPT")
	def(&s.State, Enabled)
	id := uuid.NewString()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails
	k.mu.Lock()
	defer k.mu.Unlock()
	arn := "arn:aws:kms:" + Region + ":" + Account + ":key/" + id
	k.keys[id] = &key{KeySpec: s, arn: arn, id: id, secret: secret}
	return arn
}

// Alias names a key, "alias/…".
func (k *KMS) Alias(name, arn string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.aliases[name] = arn
}

// SetState changes the state of a key.
func (k *KMS) SetState(arn, state string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keys[keyPart(arn)].State = state
}

// Deny makes operations answer AccessDeniedException, as a missing permission.
func (k *KMS) Deny(ops ...string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, op := range ops {
		k.denied[op] = true
	}
}

// Fail adds a fault. Faults apply in the order in which they were added, each
// as often as it says.
func (k *KMS) Fail(f Fault) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.faults = append(k.faults, &f)
}

// Heal takes all faults, denials and policies away.
func (k *KMS) Heal() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.faults, k.denied, k.access = nil, map[string]bool{}, nil
}

// Trust makes KMS accept only the credentials that m hands out now.
func (k *KMS) Trust(m *IMDS) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.imds = m
}

// SetClock puts KMS's clock ahead of the machine's. KMS answers with its own
// time, and refuses a signature that is more than 5 minutes off.
func (k *KMS) SetClock(ahead time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ahead = ahead
}

// AllowContext stops calls with an encryption context from failing the test.
func (k *KMS) AllowContext() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.allowContext = true
}

// Calls returns every request so far, in order.
func (k *KMS) Calls() []Call {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]Call(nil), k.calls...)
}

// Count returns how many requests of an operation came.
func (k *KMS) Count(op string) int {
	n := 0
	for _, c := range k.Calls() {
		if c.Op == op {
			n++
		}
	}
	return n
}

// Wrap encrypts plaintext under a key as KMS Encrypt would.
func (k *KMS) Wrap(arn string, plaintext []byte, context map[string]string) []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.keys[keyPart(arn)].wrap(plaintext, context)
}

type request struct {
	KeyId               string
	KeySpec             string
	NumberOfBytes       int
	CiphertextBlob      []byte
	EncryptionContext   map[string]string
	EncryptionAlgorithm string
	// Of ReEncrypt. EncryptionContext above is not sent by it.
	SourceKeyId                  string
	SourceEncryptionContext      map[string]string
	DestinationKeyId             string
	DestinationEncryptionContext map[string]string
}

type apiError struct {
	status  int
	code    string
	message string
}

func refuse(code, format string, args ...any) *apiError {
	return &apiError{status: 400, code: code, message: fmt.Sprintf(format, args...)}
}

// ServeHTTP implements http.Handler.
func (k *KMS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return
	}
	if r.Method == http.MethodGet && r.URL.Path == "/" {
		k.mu.Lock()
		defer k.mu.Unlock()
		w.Header().Set("Date", time.Now().Add(k.ahead).UTC().Format(http.TimeFormat))
		http.NotFound(w, r)
		return
	}
	op, ok := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
	if !ok || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/x-amz-json-1.1" {
		k.t.Errorf("kmstest: %s %s is no KMS call (target %q)", r.Method, r.URL, r.Header.Get("X-Amz-Target"))
		http.Error(w, "no KMS call", http.StatusNotFound)
		return
	}
	var in request
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(body, &fields); err == nil {
		err = json.Unmarshal(body, &in)
		if err != nil {
			fields = nil
		}
	}
	contextSent := false
	for _, name := range []string{"EncryptionContext", "SourceEncryptionContext", "DestinationEncryptionContext"} {
		_, sent := fields[name]
		contextSent = contextSent || sent
	}
	if op == "ReEncrypt" {
		in.KeyId = in.SourceKeyId
	}
	call := Call{Op: op, KeyID: in.KeyId, To: in.DestinationKeyId, Context: in.EncryptionContext, ContextSent: contextSent, RequestID: uuid.NewString()}
	call.AccessKey, call.Region = signer(r)

	k.mu.Lock()
	if contextSent && !k.allowContext {
		k.t.Errorf("kmstest: %s carries the encryption context %v", op, in.EncryptionContext)
	}
	fault := k.fault(op)
	var answer map[string]any
	var refusal *apiError
	switch {
	case fault != nil && fault.Code != "":
		refusal = refuse(fault.Code, "injected by the test")
		if fault.Status != 0 {
			refusal.status = fault.Status
		}
	case fault != nil && fault.Rewrite == nil && (fault.Hang || fault.Cut || fault.Status != 0 || fault.Body != ""):
	case fields == nil:
		refusal = refuse("SerializationException", "the body is no request")
	default:
		answer, refusal = k.serve(op, in, r)
	}
	if refusal != nil {
		call.Code = refusal.code
	}
	k.calls = append(k.calls, call)
	w.Header().Set("Date", time.Now().Add(k.ahead).UTC().Format(http.TimeFormat))
	k.mu.Unlock()

	if fault != nil {
		select {
		case <-time.After(fault.Delay):
		case <-r.Context().Done():
			return
		}
		for name, values := range fault.Header {
			w.Header()[name] = values
		}
		switch {
		case fault.Hang:
			select {
			case <-r.Context().Done():
			case <-k.closed:
			}
			return
		case fault.Cut:
			cut(w)
			return
		case fault.Rewrite != nil && answer != nil:
			fault.Rewrite(answer)
		}
	}
	w.Header().Set("X-Amzn-RequestId", call.RequestID)
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	switch {
	case refusal != nil:
		w.WriteHeader(refusal.status)
		_ = json.NewEncoder(w).Encode(map[string]string{"__type": refusal.code, "message": refusal.message})
	case answer == nil:
		if fault.Status != 0 {
			w.WriteHeader(fault.Status)
		}
		_, _ = io.WriteString(w, fault.Body)
	default:
		_ = json.NewEncoder(w).Encode(answer)
	}
}

// fault returns the fault that applies to a call of op and uses it up.
func (k *KMS) fault(op string) *Fault {
	for i, f := range k.faults {
		if f.Op != "" && f.Op != op {
			continue
		}
		if f.Times == 1 {
			k.faults = append(k.faults[:i:i], k.faults[i+1:]...)
		} else if f.Times > 1 {
			f.Times--
		}
		return f
	}
	return nil
}

// serve checks in KMS's order: who calls, whether they may, then the key and
// last the ciphertext.
func (k *KMS) serve(op string, in request, r *http.Request) (map[string]any, *apiError) {
	access, region := signer(r)
	if access == "" {
		return nil, refuse("MissingAuthenticationTokenException", "Request is missing Authentication Token")
	}
	now := time.Now().Add(k.ahead)
	if signed, err := time.Parse(signingTime, r.Header.Get("X-Amz-Date")); err != nil || now.Sub(signed).Abs() > 5*time.Minute {
		return nil, refuse("InvalidSignatureException", "Signature expired: %s is not near %s", r.Header.Get("X-Amz-Date"), now.UTC().Format(signingTime))
	}
	if region != Region {
		return nil, refuse("InvalidSignatureException", "Credential should be scoped to a valid region.")
	}
	if k.imds != nil {
		if e := k.imds.accepts(access, r.Header.Get("X-Amz-Security-Token")); e != nil {
			return nil, e
		}
	}
	if k.denied[op] {
		return nil, refuse("AccessDeniedException", "User: arn:aws:sts::%s:assumed-role/%s/%s is not authorized to perform: kms:%s on this resource", Account, Role, InstanceID, op)
	}
	key, refusal := k.find(in.KeyId)
	if refusal != nil {
		return nil, refusal
	}
	if op == "ReEncrypt" {
		refusal = k.authorize("ReEncryptFrom", key, in.SourceEncryptionContext)
	} else {
		refusal = k.authorize(op, key, in.EncryptionContext)
	}
	if refusal != nil {
		return nil, refusal
	}
	switch op {
	case "DescribeKey":
		return map[string]any{"KeyMetadata": map[string]any{
			"AWSAccountId": Account, "KeyId": key.id, "Arn": key.arn,
			"KeyManager": key.Manager, "KeySpec": key.Spec, "CustomerMasterKeySpec": key.Spec,
			"KeyUsage": key.Usage, "KeyState": key.State, "Enabled": key.State == Enabled,
		}}, nil
	case "GenerateDataKey":
		if e := key.usable(); e != nil {
			return nil, e
		}
		if in.KeySpec != "AES_256" {
			return nil, refuse("ValidationException", "kmstest knows KeySpec AES_256 only, not %q", in.KeySpec)
		}
		plaintext := make([]byte, 32)
		_, _ = rand.Read(plaintext) // never fails
		return map[string]any{"KeyId": key.arn, "Plaintext": plaintext, "CiphertextBlob": key.wrap(plaintext, in.EncryptionContext)}, nil
	case "Decrypt":
		if e := key.usable(); e != nil {
			return nil, e
		}
		plaintext, e := k.unwrap(key, in.CiphertextBlob, in.EncryptionContext)
		if e != nil {
			return nil, e
		}
		return map[string]any{"KeyId": key.arn, "Plaintext": plaintext, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}, nil
	case "ReEncrypt":
		if in.KeyId == "" {
			return nil, refuse("ValidationException", "kmstest wants a SourceKeyId")
		}
		to, refusal := k.find(in.DestinationKeyId)
		if refusal != nil {
			return nil, refusal
		}
		if e := k.authorize("ReEncryptTo", to, in.DestinationEncryptionContext); e != nil {
			return nil, e
		}
		if e := key.usable(); e != nil {
			return nil, e
		}
		if e := to.usable(); e != nil {
			return nil, e
		}
		plaintext, e := k.unwrap(key, in.CiphertextBlob, in.SourceEncryptionContext)
		if e != nil {
			return nil, e
		}
		return map[string]any{
			"SourceKeyId": key.arn, "KeyId": to.arn, "CiphertextBlob": to.wrap(plaintext, in.DestinationEncryptionContext),
			"SourceEncryptionAlgorithm": "SYMMETRIC_DEFAULT", "DestinationEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
		}, nil
	}
	return nil, refuse("UnknownOperationException", "kmstest knows no %s", op)
}

// find resolves a key id, key ARN, alias or alias ARN.
func (k *KMS) find(id string) (*key, *apiError) {
	prefix := "arn:aws:kms:" + Region + ":" + Account + ":"
	if strings.HasPrefix(id, "arn:") {
		rest, ok := strings.CutPrefix(id, prefix)
		if !ok {
			return nil, refuse("NotFoundException", "Invalid arn %s", id)
		}
		id = strings.TrimPrefix(rest, "key/")
	}
	if strings.HasPrefix(id, "alias/") {
		arn, ok := k.aliases[id]
		if !ok {
			return nil, refuse("NotFoundException", "Alias %s%s is not found.", prefix, id)
		}
		id = keyPart(arn)
	}
	key, ok := k.keys[id]
	if !ok {
		return nil, refuse("NotFoundException", "Key '%skey/%s' does not exist", prefix, id)
	}
	return key, nil
}

func (k *key) usable() *apiError {
	switch {
	case k.State == Disabled:
		return refuse("DisabledException", "%s is disabled.", k.arn)
	case k.State != Enabled:
		return refuse("KMSInvalidStateException", "%s is %s.", k.arn, strings.ToLower(k.State))
	case k.Spec != "SYMMETRIC_DEFAULT" || k.Usage != "ENCRYPT_DECRYPT":
		return refuse("InvalidKeyUsageException", "%s key usage is %s which is not valid for the operation.", k.arn, k.Usage)
	}
	return nil
}

// magic starts every blob, then the key id (36 bytes), nonce and ciphertext.
var magic = []byte("kmstest1")

func (k *key) wrap(plaintext []byte, context map[string]string) []byte {
	gcm := k.gcm()
	nonce := make([]byte, gcm.NonceSize())
	_, _ = rand.Read(nonce) // never fails
	blob := append(append(bytes.Clone(magic), k.id...), nonce...)
	return gcm.Seal(blob, nonce, plaintext, k.bind(context))
}

func (k *KMS) unwrap(key *key, blob []byte, context map[string]string) ([]byte, *apiError) {
	invalid := refuse("InvalidCiphertextException", "")
	rest, ok := bytes.CutPrefix(blob, magic)
	gcm := key.gcm()
	if !ok || len(rest) < len(key.id)+gcm.NonceSize() {
		return nil, invalid
	}
	if string(rest[:len(key.id)]) != key.id {
		return nil, refuse("IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation.")
	}
	rest = rest[len(key.id):]
	plaintext, err := gcm.Open(nil, rest[:gcm.NonceSize()], rest[gcm.NonceSize():], key.bind(context))
	if err != nil {
		return nil, invalid
	}
	return plaintext, nil
}

func (k *key) gcm() cipher.AEAD {
	block, err := aes.NewCipher(k.secret)
	if err != nil {
		panic(err) // 32 bytes always
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // AES always has 16-byte blocks
	}
	return gcm
}

// bind is what the ciphertext is bound to. No context and an empty one are the
// same to KMS; JSON of a map is sorted.
func (k *key) bind(context map[string]string) []byte {
	c := maps.Clone(context)
	if c == nil {
		c = map[string]string{}
	}
	data, err := json.Marshal([]any{k.arn, c})
	if err != nil {
		panic(err) // strings only
	}
	return data
}

func keyPart(arn string) string { return arn[strings.LastIndex(arn, "/")+1:] }

// signingTime is the layout of X-Amz-Date.
const signingTime = "20060102T150405Z"

var scope = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([^/]+)/\d{8}/([^/]+)/kms/aws4_request, `)

// signer returns the access key and region of the request's signature.
func signer(r *http.Request) (accessKey, region string) {
	m := scope.FindStringSubmatch(r.Header.Get("Authorization"))
	if m == nil {
		return "", ""
	}
	return m[1], m[2]
}

// cut closes the connection of a request without an answer.
func cut(w http.ResponseWriter) {
	if h, ok := w.(http.Hijacker); ok {
		if conn, _, err := h.Hijack(); err == nil {
			_ = conn.Close()
		}
	}
}

// ImportKey creates a key of that id and secret, as [KMS.NewKey] makes it otherwise, and returns its ARN: what was wrapped under it in another process
// is unwrapped.
func (k *KMS) ImportKey(id string, secret [32]byte) string {
	arn := k.NewKey(KeySpec{})
	k.mu.Lock()
	defer k.mu.Unlock()
	made := k.keys[keyPart(arn)]
	delete(k.keys, made.id)
	made.id, made.arn, made.secret = id, strings.Replace(arn, made.id, id, 1), secret[:]
	k.keys[id] = made
	return made.arn
}

// Unwrap decrypts what [KMS.Wrap] made, as KMS Decrypt would.
func (k *KMS) Unwrap(arn string, blob []byte) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	plaintext, refused := k.unwrap(k.keys[keyPart(arn)], blob, nil)
	if refused != nil {
		return nil, fmt.Errorf("cannot unwrap: %s: %s", refused.code, refused.message)
	}
	return plaintext, nil
}
