// Package proxy has the two reverse proxies that a story puts between a VM and its servers. KMS stands in front of
// local-kms, IMDS in front of the EC2 metadata mock. Both record what was asked, can be told to fail in the ways the real
// services fail, and answer as the real services do where the servers behind them do not.
package proxy

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Call is one request to KMS.
type Call struct {
	Time      time.Time
	Op        string            // "Decrypt"
	KeyID     string            // as the caller wrote it: ARN, id or alias
	Context   map[string]string // the encryption context
	RequestID string            // as answered in x-amzn-RequestId
	Status    int               // HTTP status; 0 where the connection was dropped
	Code      string            // the exception's name, "babble" or "broken"; "" for success
}

func (c Call) String() string {
	result := c.Code
	if result == "" {
		result = "ok"
	}
	if c.Status == 0 {
		result = "dropped"
	}
	return fmt.Sprintf("%s %s %s (request %s, context %v)", c.Op, c.KeyID, result, c.RequestID, c.Context)
}

// FaultKind is a way to fail.
type FaultKind int

// The ways to fail.
const (
	Deny        FaultKind = iota // AccessDeniedException, as a role without the permission gets
	Throttle                     // ThrottlingException
	ServerError                  // KMSInternalException with status 500
	Hang                         // never answer
	Drop                         // close the connection without an answer
	Refuse                       // the exception Code, with Status
	Babble                       // a page with Status, as a load balancer or another server answers
	Slow                         // the true answer after Delay
	Break                        // the true answer, but the connection closes in its middle
	Forge                        // the true answer as Edit changes it
	Clock                        // the true answer, but to a signature that is 5 minutes off InvalidSignatureException
)

// Fault makes calls fail. The zero Ops means every operation, the zero Times for ever.
type Fault struct {
	Kind  FaultKind
	Ops   []string
	Times int

	Code   string               // of Refuse: the exception's name
	Status int                  // of Refuse and Babble; of Refuse 0 is 400
	Delay  time.Duration        // of Slow
	Edit   func(map[string]any) // of Forge; the answer as JSON decodes it
}

// KMS is a reverse proxy in front of one local-kms, and speaks the JSON protocol of KMS. Where it differs from local-kms,
// it answers as KMS does: an unsigned request, an ARN of another region, Decrypt under another key than the
// ciphertext's, GenerateDataKey under an asymmetric key, and keys that AWS manages.
type KMS struct {
	upstream string // "http://127.0.0.1:1234/"
	region   string

	mu         sync.Mutex
	calls      []Call
	offences   []Call
	faults     []Fault
	awsManaged map[string]bool
	asDisabled bool
	expected   map[string]string
}

// NewKMS returns a proxy for the local-kms at upstream ("http://host:port/"), which serves the keys of region.
func NewKMS(upstream, region string) *KMS {
	return &KMS{upstream: upstream, region: region, awsManaged: map[string]bool{}}
}

// Calls returns what was asked since the last Forget, in order of arrival of the answers.
func (k *KMS) Calls() []Call {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.calls)
}

// Count returns how often an operation succeeded since the last Forget.
func (k *KMS) Count(op string) int {
	n := 0
	for _, c := range k.Calls() {
		if c.Op == op && c.Status == http.StatusOK && c.Code == "" {
			n++
		}
	}
	return n
}

// Forget empties the record.
func (k *KMS) Forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls = nil
}

// Expect makes an encryption context no offence: that of objects that the node encrypts.
func (k *KMS) Expect(context map[string]string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.expected = context
}

// Offences returns the calls that a node must make without an encryption context and that carried one, ever.
func (k *KMS) Offences() []Call {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.offences)
}

// Inject replaces the faults; without any, KMS is well again.
func (k *KMS) Inject(faults ...Fault) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.faults = faults
}

// ManageByAWS makes a key, by id, look like one that AWS manages: its policy lets only AWS services use it.
func (k *KMS) ManageByAWS(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.awsManaged[id] = true
}

// PendingDeletionIsDisabled chooses between the two answers that real KMS is known to give for a key that waits for its
// deletion: DisabledException if true, KMSInvalidStateException if not.
func (k *KMS) PendingDeletionIsDisabled(yes bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asDisabled = yes
}

// input is what the proxy needs to know of a request.
type input struct {
	KeyID         string            `json:"KeyId"`
	DestinationID string            `json:"DestinationKeyId"`
	Context       map[string]string `json:"EncryptionContext"`
	SourceContext map[string]string `json:"SourceEncryptionContext"`
	TargetContext map[string]string `json:"DestinationEncryptionContext"`
}

// answer is what goes back to the caller.
type answer struct {
	status int
	body   []byte
	code   string
	broken bool // the connection closes in the middle of the body
}

func failure(status int, code, message string) answer {
	body, err := json.Marshal(map[string]string{"__type": code, "message": message})
	if err != nil {
		panic(err) // strings always marshal
	}
	return answer{status: status, body: body, code: code}
}

// ServeHTTP answers one call.
func (k *KMS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the caller is gone
	}
	call := Call{Time: time.Now(), RequestID: newRequestID()}
	_, call.Op, _ = strings.Cut(r.Header.Get("X-Amz-Target"), ".")
	var in input
	malformed := json.Unmarshal(body, &in)
	call.KeyID = in.KeyID
	call.Context = map[string]string{}
	for _, context := range []map[string]string{in.Context, in.SourceContext, in.TargetContext} {
		maps.Copy(call.Context, context)
	}

	k.mu.Lock()
	fault := k.takeFault(call.Op)
	k.mu.Unlock()
	var a answer
	switch {
	case fault.Kind == Drop || fault.Kind == Hang:
		k.record(call)
		if fault.Kind == Hang {
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler) // net/http closes the connection
	case fault.Kind == Slow:
		select {
		case <-time.After(fault.Delay):
			a = k.judge(r, call, in, malformed, body)
		case <-r.Context().Done():
			k.record(call)
			return
		}
	default:
		var failed bool
		if a, failed = fault.answer(call, r); !failed {
			a = fault.change(k.judge(r, call, in, malformed, body))
		}
	}
	call.Status, call.Code = a.status, a.code
	if a.broken {
		call.Code = "broken"
	}
	k.record(call)
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.Header().Set("X-Amzn-Requestid", call.RequestID)
	if a.broken {
		w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
		a.body = a.body[:len(a.body)/2]
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body)
	if a.broken {
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
}

// judge answers what AWS's front end checks first, and has the rest answered.
func (k *KMS) judge(r *http.Request, call Call, in input, malformed error, body []byte) answer {
	switch token := r.Header.Get("X-Amz-Security-Token"); {
	case malformed != nil:
		return failure(http.StatusBadRequest, "SerializationException", malformed.Error())
	case !strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 "):
		return failure(http.StatusBadRequest, "MissingAuthenticationTokenException", "Request is missing Authentication Token")
	case token == expiredToken:
		return failure(http.StatusBadRequest, "ExpiredTokenException", "The security token included in the request is expired")
	}
	return k.ask(r, call, in, body)
}

func (k *KMS) record(call Call) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls = append(k.calls, call)
	if len(call.Context) > 0 && !maps.Equal(call.Context, k.expected) && slices.Contains([]string{"GenerateDataKey", "Decrypt", "ReEncrypt"}, call.Op) {
		k.offences = append(k.offences, call)
	}
}

// none is the fault of a call that is answered as it should be.
const none FaultKind = -1

// takeFault returns the fault of an operation, and counts it. The caller holds mu.
func (k *KMS) takeFault(op string) Fault {
	for i := range k.faults {
		f := &k.faults[i]
		if len(f.Ops) > 0 && !slices.Contains(f.Ops, op) {
			continue
		}
		taken := *f
		if f.Times == 1 {
			k.faults = slices.Delete(slices.Clone(k.faults), i, i+1)
		} else if f.Times > 1 {
			f.Times--
		}
		return taken
	}
	return Fault{Kind: none}
}

// answer is what a fault answers in KMS's place, if it does.
func (f Fault) answer(call Call, r *http.Request) (a answer, failed bool) {
	switch f.Kind {
	case Deny:
		return denied(call), true
	case Throttle:
		return failure(http.StatusBadRequest, "ThrottlingException", "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls."), true
	case ServerError:
		return failure(http.StatusInternalServerError, "KMSInternalException", "KMS could not complete the request"), true
	case Refuse:
		return failure(cmp.Or(f.Status, http.StatusBadRequest), f.Code, "as the story wants it"), true
	case Babble:
		return answer{status: f.Status, body: []byte("<html><body>Nothing to see here</body></html>"), code: "babble"}, true
	case Clock:
		const layout = "20060102T150405Z"
		now := time.Now().UTC()
		signed, err := time.Parse(layout, r.Header.Get("X-Amz-Date"))
		if err != nil || now.Sub(signed).Abs() > 5*time.Minute {
			return failure(http.StatusBadRequest, "InvalidSignatureException", fmt.Sprintf("Signature expired: %s is now earlier than %s (%s - 5 min.)",
				r.Header.Get("X-Amz-Date"), now.Add(-5*time.Minute).Format(layout), now.Format(layout))), true
		}
	}
	return answer{}, false
}

// change is what a fault does to KMS's own answer. Failures stay what they are.
func (f Fault) change(a answer) answer {
	if a.code != "" {
		return a
	}
	switch f.Kind {
	case Break:
		a.broken = true
	case Forge:
		var fields map[string]any
		if err := json.Unmarshal(a.body, &fields); err != nil {
			return failure(http.StatusInternalServerError, "KMSInternalException", "the answer cannot be forged: "+err.Error())
		}
		f.Edit(fields)
		body, err := json.Marshal(fields)
		if err != nil {
			return failure(http.StatusInternalServerError, "KMSInternalException", "the answer cannot be forged: "+err.Error())
		}
		a.body = body
	}
	return a
}

func denied(call Call) answer {
	return failure(http.StatusBadRequest, "AccessDeniedException", fmt.Sprintf("User: arn:aws:sts::111122223333:assumed-role/node/i-0 "+
		"is not authorized to perform: kms:%s on resource: %s because no identity-based policy allows the kms:%s action", call.Op, call.KeyID, call.Op))
}

// ask passes a call on to local-kms and mends the answer.
func (k *KMS) ask(r *http.Request, call Call, in input, body []byte) answer {
	for _, id := range []string{in.KeyID, in.DestinationID} {
		// arn:partition:kms:region:account:key/id
		if parts := strings.Split(id, ":"); len(parts) > 5 && parts[3] != k.region {
			return failure(http.StatusBadRequest, "NotFoundException", "Invalid arn "+parts[3])
		}
	}
	k.mu.Lock()
	awsManaged := k.awsManaged[in.KeyID[strings.LastIndex(in.KeyID, "/")+1:]]
	asDisabled := k.asDisabled
	k.mu.Unlock()
	if awsManaged && call.Op != "DescribeKey" {
		return denied(call)
	}
	a := k.forward(r, body)
	switch {
	case awsManaged && a.code == "":
		a.body = bytes.Replace(a.body, []byte(`"KeyManager":"CUSTOMER"`), []byte(`"KeyManager":"AWS"`), 1)
	case call.Op == "GenerateDataKey" && a.code == "InternalFailureException":
		return failure(http.StatusBadRequest, "InvalidKeyUsageException", in.KeyID+" key usage is not valid for GenerateDataKey.")
	case call.Op == "Decrypt" && a.code == "InvalidCiphertextException" && in.KeyID != "" && k.opensWithoutKeyID(r, body):
		return failure(http.StatusBadRequest, "IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation.")
	case asDisabled && a.code == "KMSInvalidStateException" && strings.Contains(string(a.body), "pending deletion"):
		return failure(http.StatusBadRequest, "DisabledException", in.KeyID+" is disabled.")
	}
	return a
}

// opensWithoutKeyID says whether a ciphertext opens if KMS looks the key up itself.
func (k *KMS) opensWithoutKeyID(r *http.Request, body []byte) bool {
	var fields map[string]json.RawMessage
	if json.Unmarshal(body, &fields) != nil {
		return false
	}
	delete(fields, "KeyId")
	body, err := json.Marshal(fields)
	return err == nil && k.forward(r, body).code == ""
}

func (k *KMS) forward(r *http.Request, body []byte) answer {
	unavailable := failure(http.StatusInternalServerError, "KMSInternalException", "local-kms does not answer")
	request, err := http.NewRequestWithContext(r.Context(), http.MethodPost, k.upstream, bytes.NewReader(body))
	if err != nil {
		return unavailable
	}
	request.Header.Set("Content-Type", "application/x-amz-json-1.1")
	request.Header.Set("X-Amz-Target", r.Header.Get("X-Amz-Target"))
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return unavailable
	}
	defer response.Body.Close()
	a := answer{status: response.StatusCode}
	if a.body, err = io.ReadAll(response.Body); err != nil {
		return unavailable
	}
	if a.status != http.StatusOK {
		var exception struct {
			Type string `json:"__type"`
		}
		if json.Unmarshal(a.body, &exception) != nil || exception.Type == "" {
			return failure(a.status, "UnknownOperationException", string(a.body))
		}
		a.code = exception.Type
	}
	return a
}

func newRequestID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, as its documentation says
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
