package proxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
)

const (
	key   = "arn:aws:kms:us-east-1:111122223333:key/1"
	other = "arn:aws:kms:us-east-1:111122223333:key/2"
)

// localKMS answers as local-kms does: one data key, wrapped under key.
func localKMS(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var in struct{ KeyId string }
	_ = json.Unmarshal(body, &in)
	fail := func(code string) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"__type":"`+code+`","message":"`+in.KeyId+` is pending deletion."}`)
	}
	switch op := strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "TrentService."); {
	case op == "Decrypt" && in.KeyId != "" && in.KeyId != key:
		fail("InvalidCiphertextException")
	case op == "GenerateDataKey" && in.KeyId == "rsa":
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, `{"__type":"InternalFailureException","message":"key type not yet supported for encryption"}`)
	case in.KeyId == "pending":
		fail("KMSInvalidStateException")
	case op == "DescribeKey":
		_, _ = io.WriteString(w, `{"KeyMetadata":{"Arn":"`+in.KeyId+`","KeyManager":"CUSTOMER"}}`)
	default:
		_, _ = io.WriteString(w, `{"KeyId":"`+key+`","Plaintext":"AAAA"}`)
	}
}

type client struct {
	t      *testing.T
	url    string
	kms    *KMS
	behind time.Duration // its clock
	token  string        // of its credentials
}

func newClient(t *testing.T) *client {
	upstream := httptest.NewServer(http.HandlerFunc(localKMS))
	t.Cleanup(upstream.Close)
	kms := NewKMS(upstream.URL+"/", "us-east-1")
	server := httptest.NewServer(kms)
	t.Cleanup(server.Close)
	return &client{t: t, url: server.URL, kms: kms}
}

// call returns the exception's name, "ok", or "dropped".
func (c *client) call(op string, in map[string]any) (result, body string) {
	c.t.Helper()
	b, err := json.Marshal(in)
	if err != nil {
		c.t.Fatal(err)
	}
	request, err := http.NewRequest(http.MethodPost, c.url, bytes.NewReader(b))
	if err != nil {
		c.t.Fatal(err)
	}
	request.Header.Set("X-Amz-Target", "TrentService."+op)
	request.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=x")
	request.Header.Set("X-Amz-Date", time.Now().Add(-c.behind).UTC().Format("20060102T150405Z"))
	request.Header.Set("X-Amz-Security-Token", c.token)
	http := http.Client{Timeout: 300 * time.Millisecond}
	response, err := http.Do(request)
	if err != nil {
		var timeout interface{ Timeout() bool }
		if errors.As(err, &timeout) && timeout.Timeout() {
			return "hangs", ""
		}
		return "dropped", ""
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return "broken", string(answer)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	var exception struct {
		Type string `json:"__type"`
	}
	if err := json.Unmarshal(answer, &exception); err != nil {
		return response.Status, string(answer)
	}
	if response.Header.Get("X-Amzn-Requestid") == "" {
		c.t.Errorf("%s: no request id", op)
	}
	if exception.Type != "" {
		return exception.Type, string(answer)
	}
	return "ok", string(answer)
}

func TestKMSAnswersAsRealKMSDoes(t *testing.T) {
	c := newClient(t)
	c.kms.ManageByAWS("aws")
	for _, test := range []struct {
		op, key, want string
	}{
		{"GenerateDataKey", key, "ok"},
		{"Decrypt", key, "ok"},
		{"Decrypt", other, "IncorrectKeyException"},
		{"GenerateDataKey", "rsa", "InvalidKeyUsageException"},
		{"GenerateDataKey", "arn:aws:kms:eu-west-1:111122223333:key/1", "NotFoundException"},
		{"GenerateDataKey", "pending", "KMSInvalidStateException"},
		{"GenerateDataKey", "arn:aws:kms:us-east-1:111122223333:key/aws", "AccessDeniedException"},
		{"DescribeKey", "arn:aws:kms:us-east-1:111122223333:key/aws", "ok"},
	} {
		if got, _ := c.call(test.op, map[string]any{"KeyId": test.key}); got != test.want {
			t.Errorf("%s %s: %s, want %s", test.op, test.key, got, test.want)
		}
	}
	if _, body := c.call("DescribeKey", map[string]any{"KeyId": "x/aws"}); !strings.Contains(body, `"KeyManager":"AWS"`) {
		t.Errorf("an AWS managed key is described as %s", body)
	}
	c.kms.PendingDeletionIsDisabled(true)
	if got, _ := c.call("Decrypt", map[string]any{"KeyId": "pending"}); got != "DisabledException" && got != "IncorrectKeyException" {
		t.Errorf("pending deletion: %s", got)
	}
	if got, _ := c.call("GenerateDataKey", map[string]any{"KeyId": "pending"}); got != "DisabledException" {
		t.Errorf("pending deletion as DisabledException: %s", got)
	}
}

func TestKMSRefusesUnsignedRequests(t *testing.T) {
	c := newClient(t)
	response, err := http.Post(c.url, "application/x-amz-json-1.1", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	if response.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), "MissingAuthenticationTokenException") {
		t.Errorf("%d %s", response.StatusCode, body)
	}
}

func TestKMSRemembersContexts(t *testing.T) {
	c := newClient(t)
	c.call("Decrypt", map[string]any{"KeyId": key})
	c.call("CreateGrant", map[string]any{"KeyId": key, "EncryptionContext": map[string]string{"fine": "here"}})
	if offences := c.kms.Offences(); len(offences) > 0 {
		t.Errorf("offences without any: %v", offences)
	}
	c.call("Decrypt", map[string]any{"KeyId": key, "EncryptionContext": map[string]string{"a": "b"}})
	c.call("ReEncrypt", map[string]any{"SourceKeyId": key, "DestinationKeyId": key, "DestinationEncryptionContext": map[string]string{"a": "b"}})
	c.kms.Forget()
	if offences := c.kms.Offences(); len(offences) != 2 || offences[0].Context["a"] != "b" || offences[0].KeyID != key {
		t.Errorf("offences: %v", offences)
	}
}

func TestKMSFaults(t *testing.T) {
	c := newClient(t)
	want := func(op, want string) {
		t.Helper()
		if got, _ := c.call(op, map[string]any{"KeyId": key}); got != want {
			t.Errorf("%s: %s, want %s", op, got, want)
		}
	}
	c.kms.Inject(Fault{Kind: Deny, Ops: []string{"Decrypt"}})
	want("Decrypt", "AccessDeniedException")
	want("Decrypt", "AccessDeniedException")
	want("GenerateDataKey", "ok")
	c.kms.Inject(Fault{Kind: Throttle, Times: 2}, Fault{Kind: ServerError, Times: 1})
	want("Decrypt", "ThrottlingException")
	want("Decrypt", "ThrottlingException")
	want("Decrypt", "KMSInternalException")
	want("Decrypt", "ok")
	c.kms.Inject(Fault{Kind: Drop})
	want("Decrypt", "dropped")
	c.kms.Inject(Fault{Kind: Hang})
	want("Decrypt", "hangs")
	c.kms.Inject(Fault{Kind: Refuse, Code: "DependencyTimeoutException", Status: 503})
	want("Decrypt", "DependencyTimeoutException")
	c.kms.Inject(Fault{Kind: Babble, Status: 200})
	want("Decrypt", "200 OK")
	c.kms.Inject(Fault{Kind: Slow, Delay: 10 * time.Millisecond, Times: 1}, Fault{Kind: Slow, Delay: time.Second})
	want("Decrypt", "ok")
	want("Decrypt", "hangs")
	c.kms.Inject(Fault{Kind: Break})
	want("Decrypt", "broken")
	c.kms.Inject()
	want("Decrypt", "ok")

	if n := c.kms.Count("Decrypt"); n != 3 {
		t.Errorf("%d successful calls of Decrypt, want 3", n)
	}
	if calls := c.kms.Calls(); len(calls) != 15 || calls[0].Code != "AccessDeniedException" {
		t.Errorf("calls: %v", calls)
	}
}

func TestKMSForges(t *testing.T) {
	c := newClient(t)
	c.kms.Inject(Fault{Kind: Forge, Edit: func(answer map[string]any) { answer["KeyId"] = other }})
	if result, body := c.call("Decrypt", map[string]any{"KeyId": key}); result != "ok" || !strings.Contains(body, `"KeyId":"`+other+`"`) || !strings.Contains(body, `"Plaintext":"AAAA"`) {
		t.Errorf("%s: %s", result, body)
	}
	if result, _ := c.call("Decrypt", map[string]any{"KeyId": "pending"}); result == "ok" {
		t.Error("a failure was made an answer")
	}
}

func TestKMSJudgesSignatures(t *testing.T) {
	c := newClient(t)
	for _, test := range []struct {
		behind time.Duration
		token  string
		want   string
	}{
		{0, "", "ok"},
		{time.Hour, "", "InvalidSignatureException"},
		{-time.Hour, "", "InvalidSignatureException"},
		{time.Minute, "", "ok"},
		{0, expiredToken, "ExpiredTokenException"},
	} {
		c.behind, c.token = test.behind, test.token
		c.kms.Inject(Fault{Kind: Clock})
		if got, _ := c.call("Decrypt", map[string]any{"KeyId": key}); got != test.want {
			t.Errorf("%+v: %s", test, got)
		}
	}
}

func TestIMDSStates(t *testing.T) {
	mock := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, `{"Token":"good"}`) }))
	t.Cleanup(mock.Close)
	upstream, err := url.Parse(mock.URL)
	if err != nil {
		t.Fatal(err)
	}
	imds := NewIMDS(upstream)
	server := httptest.NewServer(imds)
	t.Cleanup(server.Close)
	var body string
	ask := func(method, path, token string) int {
		request, err := http.NewRequest(method, server.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("X-aws-ec2-metadata-token", token)
		client := http.Client{Timeout: 300 * time.Millisecond}
		response, err := client.Do(request)
		if err != nil {
			return 0
		}
		b, err := io.ReadAll(response.Body)
		if err := errors.Join(err, response.Body.Close()); err != nil {
			t.Fatal(err)
		}
		body = string(b)
		return response.StatusCode
	}
	const token, role, document = "/latest/api/token", "/latest/meta-data/iam/security-credentials/", "/latest/dynamic/instance-identity/document"
	for _, test := range []struct {
		state                 IMDSState
		token, role, document int
	}{
		{Well, 200, 200, 200},
		{Off, 403, 403, 403},
		{FarHop, 0, 200, 200},
		{NoRole, 200, 404, 200},
		{Down, 0, 0, 0},
		{Forgetful, 200, 401, 401},
		{Failing, 500, 500, 500},
		{Busy, 503, 200, 200},
		{Expired, 200, 200, 200},
	} {
		imds.Set(test.state)
		if got := [3]int{ask("PUT", token, ""), ask("GET", role, "t"), ask("GET", document, "t")}; got != [3]int{test.token, test.role, test.document} {
			t.Errorf("state %d: %v", test.state, got)
		}
	}
	imds.SetFor(Expired, 1)
	ask("GET", role, "t")
	if ask("GET", role+"node", "t"); !strings.Contains(body, `"Token":"`+expiredToken+`"`) || !strings.Contains(body, `"Expiration":"20`) {
		t.Errorf("expired credentials: %s", body)
	}
	if ask("GET", role+"node", "t"); !strings.Contains(body, `"Token":"good"`) {
		t.Errorf("after expired credentials: %s", body)
	}
	if insecure := imds.Insecure(); len(insecure) > 0 {
		t.Errorf("insecure requests: %v", insecure)
	}
	imds.Forget()
	ask("GET", document, "")
	if requests := imds.Requests(); len(requests) != 1 {
		t.Errorf("requests since they were forgotten: %v", requests)
	}
	if insecure := imds.Insecure(); len(insecure) != 1 || insecure[0] != "GET "+document {
		t.Errorf("insecure requests: %v", insecure)
	}
}
