package archive

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

const bucket = "escrow"

// bench is a client with the services that it talks to.
type bench struct {
	*Client
	t   *testing.T
	s3  *s3test.S3
	kms *kmstest.KMS
	key string
}

// role are credentials that nobody checks; what S3 does for the role, KMS sees with them.
var role = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
	return aws.Credentials{AccessKeyID: "ASIANODE", SecretAccessKey: "not looked at", SessionToken: "token"}, nil
})

func newBench(t *testing.T, mode Mode, edit ...func(*Options)) *bench {
	t.Helper()
	b := &bench{t: t, kms: kmstest.NewKMS(t)}
	b.kms.AllowContext()
	b.key = b.kms.NewKey(kmstest.KeySpec{})
	b.s3 = s3test.New(t, s3test.Options{KMS: b.kms.URL()})
	b.s3.NewBucket(bucket, s3test.Bucket{})
	o := Options{Bucket: bucket, Region: s3test.Region, Mode: mode, KeyARN: b.key, Endpoint: b.s3.URL(), KMSEndpoint: b.kms.URL(), Credentials: role, Timeout: 20 * time.Second}
	for _, f := range edit {
		f(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	// As it is, but for the waits.
	quick := func(r aws.Retryer) aws.Retryer {
		return retry.AddWithMaxBackoffDelay(r, time.Millisecond)
	}
	so := c.s3.Options()
	so.Retryer = quick(so.Retryer)
	c.s3 = s3.New(so)
	b.Client = c
	return b
}

// tamper changes an object where it lies, and its metadata.
func (b *bench) tamper(name string, change func(data []byte, metadata map[string]string) []byte) {
	b.t.Helper()
	o, ok := b.s3.Object(bucket, name)
	if !ok {
		b.t.Fatalf("there is no %s", name)
	}
	b.s3.Tamper(bucket, name, func(d []byte) []byte { return change(d, o.Metadata) })
	b.s3.SetMetadata(bucket, name, o.Metadata)
}

// content is something that cannot be told from noise, as a header is.
func content(t *testing.T, size int) []byte {
	t.Helper()
	data := make([]byte, size)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	return data
}

func wantReason(t *testing.T, what string, err error, reason Reason) *Error {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Reason != reason {
		t.Fatalf("%s: %v, want %s", what, err, reason)
	}
	if !strings.HasPrefix(e.Error(), "cannot ") {
		t.Errorf("message %q", e.Error())
	}
	return e
}

func TestPutAndGet(t *testing.T) {
	for mode, context := range map[Mode]func(*bench) map[string]string{
		SSE: func(*bench) map[string]string { return map[string]string{"aws:s3:arn": "arn:aws:s3:::escrow/a/b.tar"} },
		CSE: func(b *bench) map[string]string { return map[string]string{"kms_cmk_id": b.key} },
	} {
		for _, size := range []int{1, 4096, 3 << 20} { // the encryption client goes through a file at 2.5 MiB by default
			b := newBench(t, mode)
			data := content(t, size)
			o, err := b.Put(t.Context(), "a/b.tar", data, map[string]string{"identity": "vol-1"})
			if err != nil {
				t.Fatal(err)
			}
			if o.Encryption.Mode != mode || o.Encryption.KeyARN != b.key || o.Metadata["identity"] != "vol-1" || o.Name != "a/b.tar" {
				t.Errorf("%s: %+v", mode, o)
			}
			if stored := b.s3.Stored(bucket, "a/b.tar"); size > 16 && bytes.Contains(stored, data[:16]) {
				t.Errorf("%s: plaintext lies in the bucket", mode)
			}
			back, o, err := b.Get(t.Context(), "a/b.tar")
			if err != nil || !bytes.Equal(back, data) || o.Encryption.Mode != mode {
				t.Errorf("%s: %v, %+v", mode, err, o)
			}
			// One data key for the object, both times under the context that Amazon EMR has, and nothing else in it.
			want := context(b)
			calls := b.kms.Calls()
			if len(calls) != 2 || calls[0].Op != "GenerateDataKey" || calls[1].Op != "Decrypt" {
				t.Fatalf("%s: KMS was asked %+v", mode, calls)
			}
			for _, c := range calls {
				if !maps.Equal(c.Context, want) || c.AccessKey != "ASIANODE" || c.KeyID != b.key {
					t.Errorf("%s: %+v, want the context %v", mode, c, want)
				}
			}
			// S3 does not encrypt under KMS what the node has encrypted.
			for _, c := range b.s3.Calls() {
				if c.Op == "PutObject" && (c.SSE == "aws:kms") != (mode == SSE) {
					t.Errorf("%s: the PUT asks for %q", mode, c.SSE)
				}
			}
		}
	}
}

func TestPutNeverOverwrites(t *testing.T) {
	for _, mode := range []Mode{SSE, CSE} {
		b := newBench(t, mode)
		data := content(t, 1000)
		if _, err := b.Put(t.Context(), "x", data, nil); err != nil {
			t.Fatal(err)
		}
		stored := b.s3.Stored(bucket, "x")
		// The same again is the one that is there.
		if o, err := b.Put(t.Context(), "x", data, nil); err != nil || o.Encryption.Mode != mode {
			t.Errorf("%s: %v", mode, err)
		}
		_, err := b.Put(t.Context(), "x", content(t, 1000), nil)
		wantReason(t, string(mode), err, ReasonExists)
		if !bytes.Equal(stored, b.s3.Stored(bucket, "x")) {
			t.Errorf("%s: the object is another one", mode)
		}
		// Its answer was lost, so it is sent again: what is there is confirmed.
		b.s3.Fail(s3test.Fault{Op: "PutObject", Lost: true, Times: 1})
		if _, err := b.Put(t.Context(), "y", data, nil); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
		if names := b.s3.Keys(bucket); !slices.Equal(names, []string{"x", "y"}) {
			t.Errorf("%s: %v", mode, names)
		}
	}
}

// TestServerThatDoesNotEncrypt: a server may answer 200 and not have done what was asked.
func TestServerThatDoesNotEncrypt(t *testing.T) {
	for name, behaviour := range map[string]s3test.Mode{"it ignores the header": s3test.Ignores, "it lies": s3test.Lies, "it takes another key": s3test.WrongKey} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, SSE)
			b.s3.NewBucket(bucket, s3test.Bucket{DefaultKey: b.kms.ARN()})
			b.s3.Behave(behaviour)
			_, err := b.Put(t.Context(), "x", content(t, 1000), nil)
			wantReason(t, name, err, ReasonEncryption)
			if err.(*Error).Retryable() {
				t.Error("it would be tried again, and there is one more object in the clear each time")
			}
			// Nor without encryption, nor is what is there taken for safe the next time.
			puts := b.s3.Count("PutObject")
			if puts != 1 {
				t.Errorf("%d PUTs", puts)
			}
			for _, c := range b.s3.Calls() {
				if c.Op == "PutObject" && c.SSE != "aws:kms" {
					t.Errorf("a PUT asks for encryption %q", c.SSE)
				}
			}
			_, _, err = b.Get(t.Context(), "x")
			wantReason(t, "Get", err, ReasonEncryption)
		})
	}
	// Encrypted on the node it does not matter.
	b := newBench(t, CSE)
	b.s3.Behave(s3test.Ignores)
	data := content(t, 1000)
	if _, err := b.Put(t.Context(), "x", data, nil); err != nil {
		t.Error(err)
	}
	if bytes.Contains(b.s3.Stored(bucket, "x"), data[:16]) {
		t.Error("plaintext lies in the bucket")
	}
}

// TestTampered: nothing that somebody changed in the bucket is taken.
func TestTampered(t *testing.T) {
	other := ""
	for name, c := range map[string]struct {
		mode   Mode
		change func(data []byte, metadata map[string]string) []byte
		reason Reason
	}{
		"a bit of the ciphertext": {CSE, func(d []byte, _ map[string]string) []byte { d[len(d)/2] ^= 1; return d }, ReasonTampered},
		"a bit of the tag":        {CSE, func(d []byte, _ map[string]string) []byte { d[len(d)-1] ^= 1; return d }, ReasonTampered},
		"another SHA-256":         {CSE, func(d []byte, m map[string]string) []byte { m["sha256"] = strings.Repeat("0", 64); return d }, ReasonTampered},
		"another SHA-256, SSE":    {SSE, func(d []byte, m map[string]string) []byte { m["sha256"] = strings.Repeat("0", 64); return d }, ReasonTampered},
		"another nonce":           {CSE, func(d []byte, m map[string]string) []byte { m["x-amz-iv"] = "AAAAAAAAAAAAAAAA"; return d }, ReasonTampered},
		"a long nonce":            {CSE, func(d []byte, m map[string]string) []byte { m["x-amz-iv"] = "AAAAAAAAAAAAAAAAAAAAAA=="; return d }, ReasonTampered},
		"another wrapped key":     {CSE, func(d []byte, m map[string]string) []byte { m["x-amz-key-v2"] = "AAAA"; return d }, ReasonTampered},
		"another key's ARN": {CSE, func(d []byte, m map[string]string) []byte {
			m["x-amz-matdesc"] = `{"kms_cmk_id":"` + other + `"}`
			return d
		}, ReasonEncryption},
		"more in the context": {CSE, func(d []byte, m map[string]string) []byte {
			m["x-amz-matdesc"] = m["x-amz-matdesc"][:len(m["x-amz-matdesc"])-1] + `,"a":"b"}`
			return d
		}, ReasonEncryption},
		"a cipher without a tag":    {CSE, func(d []byte, m map[string]string) []byte { m["x-amz-cek-alg"] = "AES/CBC/PKCS5Padding"; return d }, ReasonEncryption},
		"no metadata of encryption": {CSE, func(d []byte, m map[string]string) []byte { clear(m); return d }, ReasonEncryption},
		"a client's metadata at S3's": {SSE, func(d []byte, m map[string]string) []byte {
			maps.Copy(m, map[string]string{"x-amz-key-v2": "AAAA", "x-amz-wrap-alg": "kms", "x-amz-cek-alg": contentGCM, "x-amz-matdesc": "{}"})
			return d
		}, ReasonEncryption},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, c.mode)
			other = b.kms.ARN()
			if _, err := b.Put(t.Context(), "x", content(t, 1000), nil); err != nil {
				t.Fatal(err)
			}
			b.tamper("x", c.change)
			data, _, err := b.Get(t.Context(), "x")
			wantReason(t, name, err, c.reason)
			if data != nil {
				t.Errorf("%d bytes were given out", len(data))
			}
		})
	}
}

// TestNoInstructionFile: for an object without metadata the encryption client would read a file beside it, with the configuration and the
// credentials of the environment.
func TestNoInstructionFile(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "ENVIRONMENT")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "x")
	b := newBench(t, CSE)
	t.Setenv("AWS_ENDPOINT_URL", b.s3.URL())
	b.s3.Add(bucket, "x", []byte("in the clear"), map[string]string{})
	b.s3.Add(bucket, "x.instruction", []byte(`{"x-amz-key-v2":"AAAA"}`), nil)
	_, _, err := b.Get(t.Context(), "x")
	wantReason(t, "Get", err, ReasonEncryption)
	if calls := b.s3.Calls(); len(calls) != 1 || calls[0].AccessKey != "ASIANODE" {
		t.Errorf("S3 was asked %+v", calls)
	}
}

// TestEMRFS: an object as EMRFS writes it, without our SHA-256.
func TestEMRFS(t *testing.T) {
	b := newBench(t, CSE)
	data := content(t, 5000)
	if _, err := b.Put(t.Context(), "x", data, nil); err != nil {
		t.Fatal(err)
	}
	b.tamper("x", func(d []byte, m map[string]string) []byte {
		want := map[string]string{"x-amz-wrap-alg": "kms", "x-amz-cek-alg": "AES/GCM/NoPadding", "x-amz-tag-len": "128", "x-amz-matdesc": `{"kms_cmk_id":"` + b.key + `"}`, "x-amz-unencrypted-content-length": "5000"}
		for name, value := range want {
			if m[name] != value {
				t.Errorf("%s is %q, EMRFS has %q", name, m[name], value)
			}
		}
		delete(m, "sha256")
		return d
	})
	if back, o, err := b.Get(t.Context(), "x"); err != nil || !bytes.Equal(back, data) || o.SHA256 != "" {
		t.Errorf("%v, %+v", err, o)
	}
}

// TestFaults: each has its reason, nothing is lost, and once it is over the same call succeeds.
func TestFaults(t *testing.T) {
	for name, c := range map[string]struct {
		mode   Mode
		fault  func(*bench)
		heal   func(*bench)
		reason Reason // "" for none: it is tried again and succeeds
		says   string
	}{
		"denied put":             {SSE, func(b *bench) { b.s3.Deny("PutObject") }, nil, ReasonDenied, "s3:PutObject"},
		"denied head":            {SSE, func(b *bench) { b.s3.Deny("HeadObject") }, nil, ReasonDenied, "cannot read the properties of s3://"},
		"denied KMS, SSE":        {SSE, func(b *bench) { b.kms.Deny("GenerateDataKey") }, nil, ReasonKMSDenied, "kms:GenerateDataKey"},
		"denied KMS, CSE":        {CSE, func(b *bench) { b.kms.Deny("GenerateDataKey") }, nil, ReasonKMSDenied, "AccessDeniedException"},
		"disabled key, SSE":      {SSE, func(b *bench) { b.kms.SetState(b.key, kmstest.Disabled) }, func(b *bench) { b.kms.SetState(b.key, kmstest.Enabled) }, ReasonKey, "KMS.DisabledException"},
		"disabled key, CSE":      {CSE, func(b *bench) { b.kms.SetState(b.key, kmstest.Disabled) }, func(b *bench) { b.kms.SetState(b.key, kmstest.Enabled) }, ReasonKey, "DisabledException"},
		"no such bucket":         {SSE, func(b *bench) { b.options.Bucket = "others" }, func(b *bench) { b.options.Bucket = bucket }, ReasonNoBucket, "NoSuchBucket"},
		"another region":         {SSE, func(b *bench) { b.s3.NewBucket(bucket, s3test.Bucket{Region: "eu-west-1"}) }, func(b *bench) { b.s3.NewBucket(bucket, s3test.Bucket{}) }, ReasonWrongRegion, "the bucket is in region eu-west-1, not eu-central-1"},
		"another account":        {SSE, func(b *bench) { b.options.Owner = "999999999999" }, func(b *bench) { b.options.Owner = s3test.Account }, ReasonDenied, "AccessDenied"},
		"the clock is off":       {SSE, func(b *bench) { b.s3.SetClock(20 * time.Minute) }, nil, "", ""}, // the SDK takes S3's time
		"503 SlowDown, for long": {SSE, func(b *bench) { b.s3.Fail(s3test.Fault{Code: "SlowDown", Status: 503}) }, nil, ReasonUnavailable, "SlowDown"},
		"503 SlowDown, twice":    {SSE, func(b *bench) { b.s3.Fail(s3test.Fault{Code: "SlowDown", Status: 503, Times: 2}) }, nil, "", ""},
		"500":                    {CSE, func(b *bench) { b.s3.Fail(s3test.Fault{Op: "PutObject", Code: "InternalError", Status: 500, Times: 1}) }, nil, "", ""},
		"cut connections":        {CSE, func(b *bench) { b.s3.Fail(s3test.Fault{Cut: true, Times: 2}) }, nil, "", ""},
		"a lost answer of HEAD":  {SSE, func(b *bench) { b.s3.Fail(s3test.Fault{Op: "HeadObject", Lost: true, Times: 1}) }, nil, "", ""},
		"no server":              {SSE, func(b *bench) { b.s3.Fail(s3test.Fault{Cut: true}) }, nil, ReasonUnavailable, ""},
		"no answer":              {SSE, func(b *bench) { b.options.Timeout = 300 * time.Millisecond; b.s3.Fail(s3test.Fault{Hang: true}) }, func(b *bench) { b.options.Timeout = 20 * time.Second }, ReasonUnavailable, ""},
		"a slow server":          {SSE, func(b *bench) { b.s3.Fail(s3test.Fault{Delay: 300 * time.Millisecond}) }, nil, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, c.mode)
			data := content(t, 1000)
			c.fault(b)
			_, err := b.Put(t.Context(), "x", data, nil)
			if c.reason == "" {
				if err != nil {
					t.Fatal(err)
				}
			} else {
				e := wantReason(t, name, err, c.reason)
				if !strings.Contains(e.Error(), c.says) || !strings.Contains(e.Error(), "s3://") {
					t.Errorf("%q, want it to say %q", e.Error(), c.says)
				}
			}
			b.s3.Heal()
			b.kms.Heal()
			if c.heal != nil {
				c.heal(b)
			}
			if _, err := b.Put(t.Context(), "x", data, nil); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if back, _, err := b.Get(t.Context(), "x"); err != nil || !bytes.Equal(back, data) {
				t.Errorf("afterwards: %v", err)
			}
			if names := b.s3.Keys(bucket); len(names) != 1 {
				t.Errorf("%v", names)
			}
		})
	}
}

// TestCutAnswers: an answer that ends early is none.
func TestCutAnswers(t *testing.T) {
	for _, mode := range []Mode{SSE, CSE} {
		b := newBench(t, mode)
		data := content(t, 1<<20)
		if _, err := b.Put(t.Context(), "x", data, nil); err != nil {
			t.Fatal(err)
		}
		b.s3.Fail(s3test.Fault{Op: "GetObject", CutAfter: 1 << 19})
		back, _, err := b.Get(t.Context(), "x")
		if wantReason(t, string(mode), err, ReasonUnavailable); back != nil {
			t.Errorf("%s: %d bytes", mode, len(back))
		}
	}
}

func TestGetOfNothing(t *testing.T) {
	for _, mode := range []Mode{SSE, CSE} {
		b := newBench(t, mode)
		_, _, err := b.Get(t.Context(), "x")
		wantReason(t, string(mode), err, ReasonNotFound)
		_, err = b.Head(t.Context(), "x")
		wantReason(t, string(mode), err, ReasonNotFound)
		_, err = b.Put(t.Context(), "x", nil, nil)
		wantReason(t, string(mode), err, ReasonInvalid)
		_, err = b.Put(t.Context(), "x", make([]byte, MaxSize+1), nil)
		wantReason(t, string(mode), err, ReasonInvalid)
	}
}

func TestObjectLock(t *testing.T) {
	b := newBench(t, SSE)
	b.s3.NewBucket(bucket, s3test.Bucket{ObjectLock: true})
	data := content(t, 1000)
	for range 2 {
		if _, err := b.Put(t.Context(), "x", data, nil); err != nil {
			t.Error(err)
		}
	}
	_, err := b.Put(t.Context(), "x", content(t, 1000), nil)
	wantReason(t, "overwriting", err, ReasonExists)
}

func TestList(t *testing.T) {
	b := newBench(t, SSE)
	var want []string
	for i := range 1005 { // more than a page
		name := "p/" + string(rune('a'+i%26)) + strings.Repeat("x", i/26)
		b.s3.Add(bucket, name, []byte("1"), nil)
		want = append(want, name)
	}
	b.s3.Add(bucket, "q/1", []byte("1"), nil)
	slices.Sort(want)
	objects, err := b.List(t.Context(), "p/")
	var got []string
	for _, o := range objects {
		got = append(got, o.Name)
		if o.Size != 1 || o.Modified.IsZero() {
			t.Fatalf("%+v", o)
		}
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%d objects, want %d: %v", len(got), len(want), err)
	}
	b.s3.Deny("ListObjectsV2")
	_, err = b.List(t.Context(), "p/")
	wantReason(t, "List", err, ReasonDenied)
}

func TestCheck(t *testing.T) {
	const key = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	good := Options{Bucket: "b-1", Region: "us-east-1", Mode: SSE, KeyARN: key}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		edit   func(*Options)
		reason Reason
	}{
		"no bucket":               {func(o *Options) { o.Bucket = "" }, ReasonInvalid},
		"a URL":                   {func(o *Options) { o.Bucket = "s3://b" }, ReasonInvalid},
		"an address":              {func(o *Options) { o.Bucket = "10.0.0.1" }, ReasonInvalid},
		"capitals":                {func(o *Options) { o.Bucket = "Bucket" }, ReasonInvalid},
		"another mode":            {func(o *Options) { o.Mode = "sse-s3" }, ReasonInvalid},
		"an alias":                {func(o *Options) { o.KeyARN = "arn:aws:kms:us-east-1:111122223333:alias/a" }, ReasonInvalid},
		"a key id":                {func(o *Options) { o.KeyARN = "1234abcd-12ab-34cd-56ef-1234567890ab" }, ReasonInvalid},
		"AWS's key":               {func(o *Options) { o.KeyARN = "alias/aws/s3" }, ReasonAWSManaged},
		"AWS's key's ARN":         {func(o *Options) { o.KeyARN = "arn:aws:kms:us-east-1:111122223333:alias/aws/s3" }, ReasonAWSManaged},
		"a region that is none":   {func(o *Options) { o.Region = "Ireland" }, ReasonInvalid},
		"a key of another region": {func(o *Options) { o.Region = "eu-west-1" }, ReasonWrongRegion},
		"an owner that is none":   {func(o *Options) { o.Owner = "me" }, ReasonInvalid},
		"a negative timeout":      {func(o *Options) { o.Timeout = -1 }, ReasonInvalid},
	} {
		o := good
		c.edit(&o)
		wantReason(t, name, o.Check(), c.reason)
		if _, err := New(o); err == nil {
			t.Errorf("%s: New takes it", name)
		}
	}
	elsewhere := good
	elsewhere.Mode, elsewhere.Region = CSE, "eu-west-1"
	if err := elsewhere.Check(); err != nil {
		t.Errorf("in mode CSE S3 does not see the key: %v", err)
	}
	good.Region = ""
	if _, err := New(good); err == nil {
		t.Error("New takes options without a region")
	}
}

// TestDataKeyIsWiped: the encryption client forgets the key; the manager does not.
func TestDataKeyIsWiped(t *testing.T) {
	b := newBench(t, CSE)
	_, m, err := b.encrypting()
	if err != nil {
		t.Fatal(err)
	}
	made, err := m.GetEncryptionMaterials(t.Context(), nil)
	if err != nil || len(made.Key) != 32 || bytes.Equal(made.Key, make([]byte, 32)) {
		t.Fatalf("no key was made: %v", err)
	}
	m.wipe()
	if !bytes.Equal(made.Key, make([]byte, 32)) {
		t.Error("the data key is still in memory")
	}
}

// TestNoProxy: Go takes no proxy of the environment for loopback, so this cannot be seen from outside.
func TestNoProxy(t *testing.T) {
	c := httpClient()
	if c.Transport.(*http.Transport).Proxy != nil {
		t.Error("what is sent goes where HTTPS_PROXY points")
	}
	if c.CheckRedirect(nil, nil) != http.ErrUseLastResponse {
		t.Error("redirects are followed")
	}
}

// TestPutHasToSay: that a HEAD is content with the object is not enough.
func TestPutHasToSay(t *testing.T) {
	b := newBench(t, SSE)
	b.s3.Behave(s3test.Silent)
	_, err := b.Put(t.Context(), "x", content(t, 1000), nil)
	wantReason(t, "Put", err, ReasonEncryption)
}
