package s3test_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// bench is the SDK's client of a server with one bucket, "b", and a KMS with a key.
type bench struct {
	*s3.Client
	t   *testing.T
	s3  *s3test.S3
	kms *kmstest.KMS
	key string
}

func newBench(t *testing.T, edit ...func(*s3.Options)) *bench {
	t.Helper()
	b := &bench{t: t, kms: kmstest.NewKMS(t)}
	b.kms.AllowContext()
	b.key = b.kms.NewKey(kmstest.KeySpec{})
	b.s3 = s3test.New(t, s3test.Options{KMS: b.kms.URL()})
	b.s3.NewBucket("b", s3test.Bucket{})
	b.Client = b.client(edit...)
	return b
}

func (b *bench) client(edit ...func(*s3.Options)) *s3.Client {
	transport := &http.Transport{}
	b.t.Cleanup(transport.CloseIdleConnections)
	o := s3.Options{
		Region: s3test.Region, Credentials: credentials.NewStaticCredentialsProvider("AKIATEST", "secret", "token"), BaseEndpoint: aws.String(b.s3.URL()),
		UsePathStyle: true, RequestChecksumCalculation: aws.RequestChecksumCalculationWhenSupported, ResponseChecksumValidation: aws.ResponseChecksumValidationWhenSupported,
		Retryer: aws.NopRetryer{}, HTTPClient: &http.Client{Transport: transport},
	}
	for _, f := range edit {
		f(&o)
	}
	return s3.New(o)
}

// underKey asks for SSE-KMS under the bench's key.
func (b *bench) underKey(in *s3.PutObjectInput) {
	in.ServerSideEncryption, in.SSEKMSKeyId = types.ServerSideEncryptionAwsKms, &b.key
}

func (b *bench) put(key, content string, edit ...func(*s3.PutObjectInput)) (*s3.PutObjectOutput, error) {
	in := &s3.PutObjectInput{Bucket: aws.String("b"), Key: &key, Body: strings.NewReader(content)}
	for _, f := range edit {
		f(in)
	}
	return b.PutObject(b.t.Context(), in)
}

func (b *bench) mustPut(key, content string, edit ...func(*s3.PutObjectInput)) *s3.PutObjectOutput {
	b.t.Helper()
	out, err := b.put(key, content, edit...)
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

func (b *bench) get(key string, edit ...func(*s3.GetObjectInput)) (string, *s3.GetObjectOutput, error) {
	in := &s3.GetObjectInput{Bucket: aws.String("b"), Key: &key}
	for _, f := range edit {
		f(in)
	}
	out, err := b.GetObject(b.t.Context(), in)
	if err != nil {
		return "", nil, err
	}
	defer out.Body.Close()
	data, err := io.ReadAll(out.Body)
	return string(data), out, err
}

func (b *bench) head(key string) (*s3.HeadObjectOutput, error) {
	return b.HeadObject(b.t.Context(), &s3.HeadObjectInput{Bucket: aws.String("b"), Key: &key})
}

func (b *bench) remove(key string, edit ...func(*s3.DeleteObjectInput)) error {
	in := &s3.DeleteObjectInput{Bucket: aws.String("b"), Key: &key}
	for _, f := range edit {
		f(in)
	}
	_, err := b.DeleteObject(b.t.Context(), in)
	return err
}

// wantGet wants the content of an object.
func (b *bench) wantGet(key, want string) *s3.GetObjectOutput {
	b.t.Helper()
	data, out, err := b.get(key)
	if err != nil || data != want {
		b.t.Fatalf("%s: %d bytes (%v), want %d", key, len(data), err, len(want))
	}
	return out
}

// wantCode wants a refusal, with a request id. Of the answer to a HEAD there is a status only.
func wantCode(t *testing.T, what string, err error, status int, code string) string {
	t.Helper()
	var answer *awshttp.ResponseError
	var api smithy.APIError
	if !errors.As(err, &answer) || !errors.As(err, &api) || answer.HTTPStatusCode() != status || code != "" && api.ErrorCode() != code {
		t.Fatalf("%s: %v, want %d %s", what, err, status, code)
	}
	if answer.ServiceRequestID() == "" {
		t.Errorf("%s: the answer has no request id", what)
	}
	return api.ErrorMessage()
}

// wantNoAnswer wants an error without an answer.
func wantNoAnswer(t *testing.T, what string, err error) {
	t.Helper()
	var answer *awshttp.ResponseError
	if err == nil || errors.As(err, &answer) && answer.Response != nil && answer.HTTPStatusCode() != 0 {
		t.Fatalf("%s: %v, want none", what, err)
	}
}

func noise(size int) string {
	data := make([]byte, size)
	_, _ = rand.Read(data)
	return string(data)
}

// raw sends what the SDK would not: a PUT, GET, … with a signature's scope and these headers, "" takes one away.
func (b *bench) raw(method, path, body string, header map[string]string) (*http.Response, string) {
	b.t.Helper()
	r, err := http.NewRequestWithContext(b.t.Context(), method, b.s3.URL()+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	all := map[string]string{
		"Authorization": "AWS4-HMAC-SHA256 Credential=AKIATEST/20260102/eu-central-1/s3/aws4_request, SignedHeaders=host, Signature=" + strings.Repeat("0", 64),
		"X-Amz-Date":    time.Now().UTC().Format("20060102T150405Z"), "X-Amz-Content-Sha256": "UNSIGNED-PAYLOAD",
	}
	maps.Copy(all, header)
	for name, value := range all {
		if value != "" {
			r.Header.Set(name, value)
		}
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return res, string(text)
}

// errorCode is the code in the XML of an answer.
func errorCode(text string) string {
	var e struct {
		XMLName                  xml.Name `xml:"Error"`
		Code, Message, RequestId string
	}
	if xml.Unmarshal([]byte(text), &e) != nil || e.RequestId == "" || e.Message == "" {
		return ""
	}
	return e.Code
}

func TestObjects(t *testing.T) {
	b := newBench(t)
	for _, key := range []string{"x", "a/b/c", "a//b", "a b+c", "50%", "%2F", "ü/日本", "a/../b", ".", "q?x=1&y#z", "<&>", "trailing/", strings.Repeat("k", 1024)} {
		content := noise(1000)
		put := b.mustPut(key, content, func(in *s3.PutObjectInput) {
			in.Metadata = map[string]string{"Identity": "vol-1", "n": "2"}
			in.ContentType = aws.String("application/x-tar")
		})
		sum := md5.Sum([]byte(content))
		etag := `"` + hex.EncodeToString(sum[:]) + `"`
		if aws.ToString(put.ETag) != etag || put.ServerSideEncryption != types.ServerSideEncryptionAes256 || put.VersionId != nil {
			t.Errorf("%s: PUT answers %+v", key, put)
		}
		out := b.wantGet(key, content)
		head, err := b.head(key)
		if err != nil {
			t.Fatal(err)
		}
		for _, got := range []s3.HeadObjectOutput{*head, {
			ETag: out.ETag, Metadata: out.Metadata, ContentType: out.ContentType, ContentLength: out.ContentLength, ServerSideEncryption: out.ServerSideEncryption, SSEKMSKeyId: out.SSEKMSKeyId, LastModified: out.LastModified,
		}} {
			if aws.ToString(got.ETag) != etag || !maps.Equal(got.Metadata, map[string]string{"identity": "vol-1", "n": "2"}) || aws.ToString(got.ContentType) != "application/x-tar" ||
				aws.ToInt64(got.ContentLength) != 1000 || got.ServerSideEncryption != types.ServerSideEncryptionAes256 || got.SSEKMSKeyId != nil || time.Since(*got.LastModified).Abs() > time.Minute {
				t.Errorf("%s: %+v", key, got)
			}
		}
		if o, ok := b.s3.Object("b", key); !ok || o.ETag != etag || o.Size != 1000 || string(b.s3.Stored("b", key)) != content || !slices.Equal(b.s3.Keys("b"), []string{key}) {
			t.Errorf("%s: %+v of %q", key, o, b.s3.Keys("b"))
		}
		for range 2 { // what is not there is deleted as well
			if err := b.remove(key); err != nil {
				t.Error(err)
			}
		}
		_, _, err = b.get(key)
		wantCode(t, "GET", err, 404, "NoSuchKey")
		_, err = b.head(key)
		wantCode(t, "HEAD", err, 404, "NotFound")
	}
	b.mustPut("x", "")
	b.wantGet("x", "")
	b.mustPut("x", "1")
	b.mustPut("x", "2")
	if b.wantGet("x", "2"); b.s3.Versions("b", "x") != 1 {
		t.Errorf("%d versions", b.s3.Versions("b", "x"))
	}
	_, err := b.put(strings.Repeat("k", 1025), "1")
	wantCode(t, "a long key", err, 400, "KeyTooLongError")
	_, err = b.put("x", "1", func(in *s3.PutObjectInput) { in.Metadata = map[string]string{"a": strings.Repeat("x", 2048)} })
	wantCode(t, "much metadata", err, 400, "MetadataTooLarge")
}

func TestRange(t *testing.T) {
	b := newBench(t)
	for _, sse := range []bool{false, true} {
		if b.mustPut("x", "0123456789"); sse {
			b.mustPut("x", "0123456789", b.underKey)
		}
		for r, want := range map[string]string{
			"bytes=0-0": "0", "bytes=2-4": "234", "bytes=8-": "89", "bytes=-3": "789", "bytes=5-99": "56789", "bytes=-99": "0123456789",
			"bytes=10-": "416", "bytes=-0": "416", "bytes=4-2": "", "lines=1-2": "", "bytes=0-1,3-4": "",
		} {
			data, out, err := b.get("x", func(in *s3.GetObjectInput) { in.Range = &r })
			switch {
			case want == "416":
				wantCode(t, r, err, 416, "InvalidRange")
			case want == "": // no range
				if err != nil || data != "0123456789" || out.ContentRange != nil {
					t.Errorf("%s: %q (%v)", r, data, err)
				}
			case err != nil || data != want || aws.ToString(out.ContentRange) != fmt.Sprintf("bytes %d-%d/10", strings.Index("0123456789", want), strings.Index("0123456789", want)+len(want)-1):
				t.Errorf("%s: %q, %s (%v)", r, data, aws.ToString(out.ContentRange), err)
			}
		}
	}
}

func TestConditions(t *testing.T) {
	const other = `"00000000000000000000000000000000"`
	for name, c := range map[string]struct {
		there  bool
		do     func(b *bench, etag string) error
		status int // 0 is success
	}{
		"put if none, none":    {false, func(b *bench, _ string) error { return ifNoneMatch(b, "*") }, 0},
		"put if none, one":     {true, func(b *bench, _ string) error { return ifNoneMatch(b, "*") }, 412},
		"put if none of a tag": {false, func(b *bench, _ string) error { return ifNoneMatch(b, other) }, 501},
		"put if match":         {true, ifMatch, 0},
		"put if match, other":  {true, func(b *bench, _ string) error { return ifMatch(b, other) }, 412},
		"put if match, none":   {false, func(b *bench, _ string) error { return ifMatch(b, other) }, 404},
		"get if match":         {true, func(b *bench, etag string) error { return getIf(b, &etag, nil) }, 0},
		"get if match, other":  {true, func(b *bench, _ string) error { return getIf(b, aws.String(other), nil) }, 412},
		"get if other":         {true, func(b *bench, _ string) error { return getIf(b, nil, aws.String(other)) }, 0},
		"get if other, same":   {true, func(b *bench, etag string) error { return getIf(b, nil, &etag) }, 304},
		"delete if match": {true, func(b *bench, etag string) error {
			return b.remove("x", func(in *s3.DeleteObjectInput) { in.IfMatch = &etag })
		}, 0},
		"delete if match other": {true, func(b *bench, _ string) error {
			return b.remove("x", func(in *s3.DeleteObjectInput) { in.IfMatch = aws.String(other) })
		}, 412},
	} {
		b := newBench(t)
		etag := ""
		if c.there {
			etag = aws.ToString(b.mustPut("x", "old").ETag)
		}
		err := c.do(b, etag)
		if c.status == 0 {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		wantCode(t, name, err, c.status, map[int]string{412: "PreconditionFailed", 501: "NotImplemented", 404: "NoSuchKey"}[c.status])
		if c.there {
			b.wantGet("x", "old")
		} else if keys := b.s3.Keys("b"); len(keys) != 0 {
			t.Errorf("%s: there is %q", name, keys)
		}
	}
}

func ifNoneMatch(b *bench, c string) error {
	_, err := b.put("x", "new", func(in *s3.PutObjectInput) { in.IfNoneMatch = &c })
	return err
}

func ifMatch(b *bench, c string) error {
	_, err := b.put("x", "new", func(in *s3.PutObjectInput) { in.IfMatch = &c })
	return err
}

func getIf(b *bench, match, noneMatch *string) error {
	_, _, err := b.get("x", func(in *s3.GetObjectInput) { in.IfMatch, in.IfNoneMatch = match, noneMatch })
	return err
}

// TestConditionHoldsUntilTheEnd: of many that want to be the first, one is.
func TestConditionHoldsUntilTheEnd(t *testing.T) {
	b := newBench(t)
	b.kms.Fail(kmstest.Fault{Delay: 20 * time.Millisecond, Rewrite: func(map[string]any) {}})
	results := make(chan error)
	for range 8 {
		go func() {
			_, err := b.put("x", noise(10), b.underKey, func(in *s3.PutObjectInput) { in.IfNoneMatch = aws.String("*") })
			results <- err
		}()
	}
	good := 0
	for range 8 {
		if err := <-results; err == nil {
			good++
		} else {
			wantCode(t, "PUT", err, 412, "PreconditionFailed")
		}
	}
	if good != 1 {
		t.Errorf("%d succeeded", good)
	}
}

func TestListObjects(t *testing.T) {
	b := newBench(t)
	keys := []string{"a", "b", "b/", "b/1", "b/2", "b/c/3", "b0", "c/1", "d\x01", "e<&>", "z", "é", "日本/1", "日本/2", "😀", "�"}
	for _, k := range keys {
		b.s3.Add("b", k, []byte(k), nil)
	}
	slices.Sort(keys) // bytes of UTF-8
	for name, c := range map[string]struct {
		in   s3.ListObjectsV2Input
		want []string // common prefixes have a ">" before
	}{
		"all":                  {s3.ListObjectsV2Input{}, keys},
		"a prefix":             {s3.ListObjectsV2Input{Prefix: aws.String("b/")}, []string{"b/", "b/1", "b/2", "b/c/3"}},
		"a prefix of none":     {s3.ListObjectsV2Input{Prefix: aws.String("x")}, nil},
		"a delimiter":          {s3.ListObjectsV2Input{Delimiter: aws.String("/")}, []string{"a", "b", ">b/", "b0", ">c/", "d\x01", "e<&>", "z", "é", ">日本/", "�", "😀"}},
		"prefix and delimiter": {s3.ListObjectsV2Input{Prefix: aws.String("b/"), Delimiter: aws.String("/")}, []string{"b/", "b/1", "b/2", ">b/c/"}},
		"a start":              {s3.ListObjectsV2Input{StartAfter: aws.String("é")}, []string{"日本/1", "日本/2", "�", "😀"}},
		"a start between":      {s3.ListObjectsV2Input{StartAfter: aws.String("b/15"), Prefix: aws.String("b/")}, []string{"b/2", "b/c/3"}},
		"a start in a prefix":  {s3.ListObjectsV2Input{StartAfter: aws.String("b/1"), Delimiter: aws.String("/"), Prefix: aws.String("b")}, []string{">b/", "b0"}},
		"a long delimiter":     {s3.ListObjectsV2Input{Delimiter: aws.String("/c/")}, nil},
	} {
		for _, size := range []int32{1, 2, 3, 1000} {
			in := c.in
			in.Bucket, in.EncodingType, in.MaxKeys = aws.String("b"), types.EncodingTypeUrl, &size
			var got []string
			for pages := s3.NewListObjectsV2Paginator(b.Client, &in); pages.HasMorePages(); {
				page, err := pages.NextPage(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if n := len(page.Contents) + len(page.CommonPrefixes); n > int(size) || n != int(*page.KeyCount) || *page.IsTruncated != (page.NextContinuationToken != nil) {
					t.Fatalf("%s: a page of %d, at most %d: %+v", name, n, size, page)
				}
				var names []string
				for _, o := range page.Contents {
					k := decoded(t, *o.Key)
					if names = append(names, k); *o.Size != int64(len(k)) || *o.ETag == "" || o.LastModified.IsZero() {
						t.Errorf("%s: %+v", name, o)
					}
				}
				for _, p := range page.CommonPrefixes {
					names = append(names, ">"+decoded(t, *p.Prefix))
				}
				slices.SortFunc(names, func(a, b string) int { return strings.Compare(strings.TrimPrefix(a, ">"), strings.TrimPrefix(b, ">")) })
				got = append(got, names...)
			}
			if name == "a long delimiter" {
				c.want = slices.Clone(keys)
				c.want[slices.Index(keys, "b/c/3")] = ">b/c/"
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%s, pages of %d: %q, want %q", name, size, got, c.want)
			}
		}
	}
	// Without an encoding most keys are as they are.
	out, err := b.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("b"), Prefix: aws.String("e")})
	if err != nil || len(out.Contents) != 1 || *out.Contents[0].Key != "e<&>" || *out.Prefix != "e" || *out.MaxKeys != 1000 {
		t.Errorf("%+v (%v)", out, err)
	}
	out, err = b.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("b"), MaxKeys: aws.Int32(0)})
	if err != nil || len(out.Contents) != 0 || *out.IsTruncated || *out.KeyCount != 0 {
		t.Errorf("none at most: %+v (%v)", out, err)
	}
	_, err = b.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("b"), MaxKeys: aws.Int32(-1)})
	wantCode(t, "max-keys", err, 400, "InvalidArgument")
	_, err = b.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("b"), ContinuationToken: aws.String("?")})
	wantCode(t, "token", err, 400, "InvalidArgument")
}

func decoded(t *testing.T, key string) string {
	t.Helper()
	k, err := url.QueryUnescape(key)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestSSEKMS(t *testing.T) {
	b := newBench(t)
	b.s3.NewBucket("default", s3test.Bucket{DefaultKey: b.kms.ARN(), BucketKey: true})
	b.kms.Alias("alias/node", b.key)
	b.kms.Alias("alias/aws/s3", b.kms.ARN())
	type put = s3.PutObjectInput
	for name, c := range map[string]struct {
		bucket    string
		ask       func(*put)
		key       string // "" for SSE-S3
		bucketKey bool
		context   map[string]string // beside the ARN
	}{
		"nothing":             {"b", func(*put) {}, "", false, nil},
		"AES256":              {"b", func(in *put) { in.ServerSideEncryption = types.ServerSideEncryptionAes256 }, "", false, nil},
		"an ARN":              {"b", b.underKey, b.key, false, nil},
		"a key id":            {"b", func(in *put) { b.underKey(in); in.SSEKMSKeyId = aws.String(b.key[strings.LastIndex(b.key, "/")+1:]) }, b.key, false, nil},
		"an alias":            {"b", func(in *put) { b.underKey(in); in.SSEKMSKeyId = aws.String("alias/node") }, b.key, false, nil},
		"AWS's key":           {"b", func(in *put) { in.ServerSideEncryption = types.ServerSideEncryptionAwsKms }, b.kms.ARN(), false, nil},
		"a bucket key":        {"b", func(in *put) { b.underKey(in); in.BucketKeyEnabled = aws.Bool(true) }, b.key, true, nil},
		"a context":           {"b", func(in *put) { b.underKey(in); in.SSEKMSEncryptionContext = aws.String("eyJhIjoiYiJ9") }, b.key, false, map[string]string{"a": "b"}},
		"the default":         {"default", func(*put) {}, b.kms.ARN(), true, nil},
		"the default's key":   {"default", func(in *put) { in.ServerSideEncryption = types.ServerSideEncryptionAwsKms }, b.kms.ARN(), true, nil},
		"the default, no key": {"default", func(in *put) { in.BucketKeyEnabled = aws.Bool(false) }, b.kms.ARN(), false, nil},
		"AES256 by default": {"default", func(in *put) {
			in.BucketKeyEnabled = aws.Bool(true)
			in.ServerSideEncryption = types.ServerSideEncryptionAes256
		}, "", false, nil},
		"a key by default": {"default", b.underKey, b.key, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(b.kms.Calls())
			content := noise(1000)
			in := &put{Bucket: &c.bucket, Key: aws.String("a/x"), Body: strings.NewReader(content)}
			c.ask(in)
			out, err := b.PutObject(t.Context(), in)
			if err != nil {
				t.Fatal(err)
			}
			head, err := b.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: &c.bucket, Key: in.Key})
			if err != nil {
				t.Fatal(err)
			}
			algorithm := types.ServerSideEncryptionAwsKms
			if c.key == "" {
				algorithm = types.ServerSideEncryptionAes256
			}
			for what, got := range map[string]s3.PutObjectOutput{"PUT": *out, "HEAD": {ServerSideEncryption: head.ServerSideEncryption, SSEKMSKeyId: head.SSEKMSKeyId, BucketKeyEnabled: head.BucketKeyEnabled}} {
				if got.ServerSideEncryption != algorithm || aws.ToString(got.SSEKMSKeyId) != c.key || aws.ToBool(got.BucketKeyEnabled) != c.bucketKey {
					t.Errorf("%s says %+v", what, got)
				}
			}
			got, err := b.GetObject(t.Context(), &s3.GetObjectInput{Bucket: &c.bucket, Key: in.Key})
			if err != nil {
				t.Fatal(err)
			}
			if data, err := io.ReadAll(got.Body); err != nil || string(data) != content {
				t.Errorf("%d bytes: %v", len(data), err)
			}
			got.Body.Close()
			calls := b.kms.Calls()[before:]
			o, _ := b.s3.Object(c.bucket, "a/x")
			sum := md5.Sum([]byte(content))
			plain := aws.ToString(out.ETag) == `"`+hex.EncodeToString(sum[:])+`"`
			if c.key == "" {
				if len(calls) != 0 || !plain || o.Wrapped != nil {
					t.Errorf("without KMS: %d calls, ETag %s, %+v", len(calls), *out.ETag, o)
				}
				return
			}
			context := map[string]string{"aws:s3:arn": "arn:aws:s3:::" + c.bucket + "/a/x"}
			if c.bucketKey {
				context["aws:s3:arn"] = "arn:aws:s3:::" + c.bucket
			}
			maps.Copy(context, c.context)
			if len(calls) != 2 || calls[0].Op != "GenerateDataKey" || calls[1].Op != "Decrypt" || calls[1].KeyID != c.key {
				t.Fatalf("KMS was asked %+v", calls)
			}
			for _, call := range calls {
				if !maps.Equal(call.Context, context) || call.AccessKey != "AKIATEST" || call.Region != s3test.Region {
					t.Errorf("%+v, want the context %v", call, context)
				}
			}
			if bytes.Contains(b.s3.Stored(c.bucket, "a/x"), []byte(content[:16])) || plain || o.SSE != s3test.AWSKMS || o.KeyARN != c.key || o.Size != 1000 {
				t.Errorf("what lies there: ETag %s, %+v", *out.ETag, o)
			}
			// The wrapped key is KMS's, and opens under the context only.
			if _, err := b.kms.Unwrap(c.key, o.Wrapped); err == nil {
				t.Error("the data key is unwrapped without the context")
			}
		})
	}
}

// TestKMSRefuses: KMS's refusals are S3's answers, to PUT and GET, and nothing is stored.
func TestKMSRefuses(t *testing.T) {
	elsewhere := strings.Replace(newBench(t).key, s3test.Region, "us-west-2", 1)
	for name, c := range map[string]struct {
		fault    func(*bench)
		status   int
		code     string
		says     string
		onlyPut  bool
		otherKey string
	}{
		"denied":              {func(b *bench) { b.kms.Deny("GenerateDataKey", "Decrypt") }, 403, "AccessDenied", "is not authorized to perform: kms:", false, ""},
		"disabled":            {func(b *bench) { b.kms.SetState(b.key, kmstest.Disabled) }, 400, "KMS.DisabledException", "is disabled", false, ""},
		"to be deleted":       {func(b *bench) { b.kms.SetState(b.key, kmstest.PendingDeletion) }, 400, "KMS.KMSInvalidStateException", "pending", false, ""},
		"unknown":             {func(*bench) {}, 400, "KMS.NotFoundException", "does not exist", true, "00000000-0000-0000-0000-000000000000"},
		"of another region":   {func(*bench) {}, 400, "KMS.NotFoundException", "Invalid arn us-west-2", true, elsewhere},
		"throttled":           {func(b *bench) { b.kms.Fail(kmstest.Fault{Code: "ThrottlingException"}) }, 503, "SlowDown", "KMS", false, ""},
		"broken":              {func(b *bench) { b.kms.Fail(kmstest.Fault{Code: "KMSInternalException", Status: 500}) }, 500, "InternalError", "", false, ""},
		"away":                {func(b *bench) { b.kms.Fail(kmstest.Fault{Cut: true}) }, 503, "ServiceUnavailable", "", false, ""},
		"unknown credentials": {func(b *bench) { b.kms.Trust(kmstest.NewIMDS(b.t)) }, 403, "InvalidAccessKeyId", "", false, ""},
		"expired credentials": {func(b *bench) { b.kms.Fail(kmstest.Fault{Code: "ExpiredTokenException"}) }, 400, "ExpiredToken", "", false, ""},
		"an asymmetric key":   {func(b *bench) { b.key = b.kms.NewKey(kmstest.KeySpec{Spec: "RSA_2048"}) }, 400, "KMS.InvalidKeyUsageException", "", true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.mustPut("old", "content", b.underKey)
			c.fault(b)
			_, err := b.put("x", "1", b.underKey, func(in *s3.PutObjectInput) {
				if c.otherKey != "" {
					in.SSEKMSKeyId = &c.otherKey
				}
			})
			if message := wantCode(t, "PUT", err, c.status, c.code); !strings.Contains(message, c.says) {
				t.Errorf("PUT: %q, want it to say %q", message, c.says)
			}
			if keys := b.s3.Keys("b"); !slices.Equal(keys, []string{"old"}) {
				t.Errorf("there is %q", keys)
			}
			if _, err := b.head("old"); err != nil {
				t.Errorf("a HEAD needs no key: %v", err)
			}
			if !c.onlyPut {
				_, _, err := b.get("old")
				wantCode(t, "GET", err, c.status, c.code)
			}
		})
	}
	b := newBench(t)
	for name, ask := range map[string]func(*s3.PutObjectInput){
		"a key without SSE-KMS": func(in *s3.PutObjectInput) { in.SSEKMSKeyId = &b.key },
		"another algorithm":     func(in *s3.PutObjectInput) { in.ServerSideEncryption = "aws:rot13" },
		"a context that is none": func(in *s3.PutObjectInput) {
			b.underKey(in)
			in.SSEKMSEncryptionContext = aws.String("e30x")
		},
	} {
		_, err := b.put("x", "1", ask)
		wantCode(t, name, err, 400, "InvalidArgument")
	}
}

// TestKMSClock: AWS has one time, whatever the machine's.
func TestKMSClock(t *testing.T) {
	b := newBench(t)
	b.kms.SetClock(time.Hour)
	b.mustPut("x", "1", b.underKey)
	b.wantGet("x", "1")
}

// TestRoleCredentials: KMS sees who called S3.
func TestRoleCredentials(t *testing.T) {
	b := newBench(t)
	imds := kmstest.NewIMDS(t)
	b.kms.Trust(imds)
	role := func() aws.Credentials {
		ask := func(method, path string, header ...string) string {
			r, err := http.NewRequestWithContext(t.Context(), method, imds.URL()+"/latest/"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set(header[0], header[1])
			res, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			text, _ := io.ReadAll(res.Body)
			return string(text)
		}
		token := ask("PUT", "api/token", "X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
		var c struct{ AccessKeyId, SecretAccessKey, Token string }
		if err := json.Unmarshal([]byte(ask("GET", "meta-data/iam/security-credentials/"+kmstest.Role, "X-Aws-Ec2-Metadata-Token", token)), &c); err != nil {
			t.Fatal(err)
		}
		return aws.Credentials{AccessKeyID: c.AccessKeyId, SecretAccessKey: c.SecretAccessKey, SessionToken: c.Token}
	}
	current := role()
	b.Client = b.client(func(o *s3.Options) {
		o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return current, nil })
	})
	b.mustPut("x", "1", b.underKey)
	imds.Rotate(time.Now().Add(time.Hour))
	_, _, err := b.get("x")
	wantCode(t, "old credentials", err, 403, "InvalidAccessKeyId")
	current = role()
	b.wantGet("x", "1")
}

func TestModes(t *testing.T) {
	for mode, c := range map[s3test.Mode]struct {
		claims, tells types.ServerSideEncryption // in the answer to the upload, in that to HEAD
		other         bool                       // key
		ciphertext    bool
	}{
		s3test.Honest:   {"aws:kms", "aws:kms", false, true},
		s3test.Ignores:  {"", "", false, false},
		s3test.Lies:     {"aws:kms", "", false, false},
		s3test.Silent:   {"", "aws:kms", false, true},
		s3test.WrongKey: {"aws:kms", "aws:kms", true, true},
	} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			b.s3.NewBucket("b", s3test.Bucket{DefaultKey: b.kms.ARN()})
			b.s3.Behave(mode)
			content := noise(1000)
			put := b.mustPut("x", content, b.underKey)
			u := b.begin("y", func(in *s3.CreateMultipartUploadInput) {
				in.ServerSideEncryption, in.SSEKMSKeyId = types.ServerSideEncryptionAwsKms, &b.key
			})
			part, err := u.part(1, content)
			if err != nil {
				t.Fatal(err)
			}
			complete, err := u.complete()
			if err != nil {
				t.Fatal(err)
			}
			key := func(algorithm types.ServerSideEncryption) string {
				return map[bool]string{algorithm == "": "", algorithm != "" && c.other: b.kms.ARN(), algorithm != "" && !c.other: b.key}[true]
			}
			for what, got := range map[string]s3.PutObjectOutput{
				"PUT":    *put,
				"create": {ServerSideEncryption: u.ServerSideEncryption, SSEKMSKeyId: u.SSEKMSKeyId}, "part": {ServerSideEncryption: part.ServerSideEncryption, SSEKMSKeyId: part.SSEKMSKeyId},
				"complete": {ServerSideEncryption: complete.ServerSideEncryption, SSEKMSKeyId: complete.SSEKMSKeyId},
			} {
				if got.ServerSideEncryption != c.claims || aws.ToString(got.SSEKMSKeyId) != key(c.claims) {
					t.Errorf("%s says %q, %s", what, got.ServerSideEncryption, aws.ToString(got.SSEKMSKeyId))
				}
			}
			for _, name := range []string{"x", "y"} {
				head, err := b.head(name)
				if err != nil || head.ServerSideEncryption != c.tells || aws.ToString(head.SSEKMSKeyId) != key(c.tells) {
					t.Errorf("HEAD of %s says %+v (%v)", name, head, err)
				}
				if bytes.Contains(b.s3.Stored("b", name), []byte(content)) == c.ciphertext {
					t.Errorf("%s lies there in the clear: %v", name, c.ciphertext)
				}
				b.wantGet(name, content)
			}
			b.s3.Heal()
			if out := b.mustPut("z", "1", b.underKey); out.ServerSideEncryption != "aws:kms" || aws.ToString(out.SSEKMSKeyId) != b.key {
				t.Errorf("healed it says %+v", out)
			}
		})
	}
}

// uploading is a multipart upload under way.
type uploading struct {
	*s3.CreateMultipartUploadOutput
	b     *bench
	parts []types.CompletedPart
}

func (b *bench) begin(key string, edit ...func(*s3.CreateMultipartUploadInput)) *uploading {
	b.t.Helper()
	in := &s3.CreateMultipartUploadInput{Bucket: aws.String("b"), Key: &key, Metadata: map[string]string{"identity": "vol-1"}}
	for _, f := range edit {
		f(in)
	}
	out, err := b.CreateMultipartUpload(b.t.Context(), in)
	if err != nil {
		b.t.Fatal(err)
	}
	return &uploading{CreateMultipartUploadOutput: out, b: b}
}

func (u *uploading) part(n int32, content string) (*s3.UploadPartOutput, error) {
	out, err := u.b.UploadPart(u.b.t.Context(), &s3.UploadPartInput{Bucket: u.Bucket, Key: u.Key, UploadId: u.UploadId, PartNumber: &n, Body: strings.NewReader(content)})
	if err == nil {
		u.parts = append(u.parts, types.CompletedPart{PartNumber: &n, ETag: out.ETag, ChecksumCRC32: out.ChecksumCRC32})
	}
	return out, err
}

func (u *uploading) mustPart(n int32, content string) {
	u.b.t.Helper()
	if _, err := u.part(n, content); err != nil {
		u.b.t.Fatal(err)
	}
}

func (u *uploading) complete(edit ...func(*s3.CompleteMultipartUploadInput)) (*s3.CompleteMultipartUploadOutput, error) {
	in := &s3.CompleteMultipartUploadInput{Bucket: u.Bucket, Key: u.Key, UploadId: u.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: u.parts}}
	for _, f := range edit {
		f(in)
	}
	return u.b.CompleteMultipartUpload(u.b.t.Context(), in)
}

func TestMultipart(t *testing.T) {
	b := newBench(t)
	for _, sse := range []bool{false, true} {
		before := len(b.kms.Calls())
		u := b.begin("a/x", func(in *s3.CreateMultipartUploadInput) {
			if sse {
				in.ServerSideEncryption, in.SSEKMSKeyId = types.ServerSideEncryptionAwsKms, &b.key
			}
		})
		first, second := noise(s3test.MinPart), noise(1000)
		u.mustPart(2, "a part that is sent again")
		u.parts = nil
		u.mustPart(1, first)
		u.mustPart(2, second)
		list, err := b.ListParts(t.Context(), &s3.ListPartsInput{Bucket: u.Bucket, Key: u.Key, UploadId: u.UploadId})
		if err != nil || len(list.Parts) != 2 || *list.Parts[0].Size != s3test.MinPart || *list.Parts[1].PartNumber != 2 || *list.Parts[1].ETag != *u.parts[1].ETag {
			t.Errorf("%+v (%v)", list, err)
		}
		if keys := b.s3.Keys("b"); !sse && len(keys) != 0 {
			t.Errorf("there is %q before it is complete", keys)
		}
		out, err := u.complete()
		if err != nil || !strings.HasSuffix(aws.ToString(out.ETag), `-2"`) || *out.Key != "a/x" {
			t.Fatalf("%+v (%v)", out, err)
		}
		got := b.wantGet("a/x", first+second)
		if got.Metadata["identity"] != "vol-1" || *got.ETag != *out.ETag || (got.ServerSideEncryption == "aws:kms") != sse || *got.ContentLength != s3test.MinPart+1000 {
			t.Errorf("%+v", got)
		}
		if bytes.Contains(b.s3.Stored("b", "a/x"), []byte(second)) == sse {
			t.Errorf("it lies there in the clear: %v", sse)
		}
		var ops []string
		for _, c := range b.kms.Calls()[before:] {
			if ops = append(ops, c.Op); c.Context["aws:s3:arn"] != "arn:aws:s3:::b/a/x" || len(c.Context) != 1 {
				t.Errorf("%+v", c)
			}
		}
		// One data key, and the last is GET's.
		if want := []string{"GenerateDataKey", "Decrypt", "Decrypt", "Decrypt", "Decrypt", "Decrypt"}; sse && !slices.Equal(ops, want) || !sse && ops != nil {
			t.Errorf("KMS was asked %q", ops)
		}
		_, err = u.complete()
		wantCode(t, "a second time", err, 404, "NoSuchUpload")
	}
}

func TestMultipartRefuses(t *testing.T) {
	big := noise(s3test.MinPart)
	b := newBench(t)
	b.mustPut("x", "old")
	for name, c := range map[string]struct {
		do     func(*uploading) error
		status int
		code   string
	}{
		"a small part": {func(u *uploading) error {
			u.mustPart(1, big[1:])
			u.mustPart(2, "2")
			_, err := u.complete()
			return err
		}, 400, "EntityTooSmall"},
		"no parts": {func(u *uploading) error { _, err := u.complete(); return err }, 400, "MalformedXML"},
		"a part of none": {func(u *uploading) error {
			u.mustPart(1, "1")
			u.parts[0].PartNumber = aws.Int32(2)
			_, err := u.complete()
			return err
		}, 400, "InvalidPart"},
		"another ETag": {func(u *uploading) error {
			u.mustPart(1, "1")
			u.parts[0].ETag = aws.String("x")
			_, err := u.complete()
			return err
		}, 400, "InvalidPart"},
		"another checksum": {func(u *uploading) error {
			u.mustPart(1, "1")
			u.parts[0].ChecksumCRC32 = aws.String("AAAAAA==")
			_, err := u.complete()
			return err
		}, 400, "InvalidPart"},
		"the wrong order": {func(u *uploading) error { u.mustPart(2, big); u.mustPart(1, big); _, err := u.complete(); return err }, 400, "InvalidPartOrder"},
		"part 10001":      {func(u *uploading) error { _, err := u.part(10001, "1"); return err }, 400, "InvalidArgument"},
		"another upload":  {func(u *uploading) error { u.UploadId = aws.String("x"); _, err := u.part(1, "1"); return err }, 404, "NoSuchUpload"},
		"if there is none": {func(u *uploading) error {
			u.mustPart(1, "1")
			_, err := u.complete(func(in *s3.CompleteMultipartUploadInput) { in.IfNoneMatch = aws.String("*") })
			return err
		}, 412, "PreconditionFailed"},
		"aborted": {func(u *uploading) error {
			u.mustPart(1, "1")
			if _, err := u.b.AbortMultipartUpload(t.Context(), &s3.AbortMultipartUploadInput{Bucket: u.Bucket, Key: u.Key, UploadId: u.UploadId}); err != nil {
				return err
			}
			_, err := u.complete()
			return err
		}, 404, "NoSuchUpload"},
		"denied kms:Decrypt": {func(u *uploading) error {
			u.b.kms.Deny("Decrypt")
			defer u.b.kms.Heal()
			_, err := u.part(1, "1")
			return err
		}, 403, "AccessDenied"},
	} {
		u := b.begin("x", func(in *s3.CreateMultipartUploadInput) {
			in.ServerSideEncryption, in.SSEKMSKeyId = types.ServerSideEncryptionAwsKms, &b.key
		})
		wantCode(t, name, c.do(u), c.status, c.code)
		b.wantGet("x", "old")
	}
}

func TestListsOfUploads(t *testing.T) {
	b := newBench(t)
	var want []string
	for i := range 7 {
		key := fmt.Sprintf("p/%d", i/2) // two of a key
		want = append(want, key+" "+*b.begin(key).UploadId)
	}
	b.begin("q")
	var got []string
	in := &s3.ListMultipartUploadsInput{Bucket: aws.String("b"), Prefix: aws.String("p/"), MaxUploads: aws.Int32(3)}
	for pages := s3.NewListMultipartUploadsPaginator(b.Client, in); pages.HasMorePages(); {
		page, err := pages.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range page.Uploads {
			got = append(got, *u.Key+" "+*u.UploadId)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	u := b.begin("x")
	for n := range int32(5) {
		u.mustPart(n+1, "1")
	}
	var numbers []int32
	for pages := s3.NewListPartsPaginator(b.Client, &s3.ListPartsInput{Bucket: u.Bucket, Key: u.Key, UploadId: u.UploadId, MaxParts: aws.Int32(2)}); pages.HasMorePages(); {
		page, err := pages.NextPage(t.Context())
		if err != nil || len(page.Parts) > 2 {
			t.Fatalf("%+v (%v)", page, err)
		}
		for _, p := range page.Parts {
			numbers = append(numbers, *p.PartNumber)
		}
	}
	if !slices.Equal(numbers, []int32{1, 2, 3, 4, 5}) {
		t.Errorf("%v", numbers)
	}
}

func TestAccess(t *testing.T) {
	b := newBench(t)
	b.s3.NewBucket("west", s3test.Bucket{Region: "us-west-2", Owner: "999999999999"})
	west := b.client(func(o *s3.Options) { o.Region = "us-west-2" })
	get := func(c *s3.Client, bucket, owner string) error {
		in := &s3.GetObjectInput{Bucket: &bucket, Key: aws.String("x")}
		if owner != "" {
			in.ExpectedBucketOwner = &owner
		}
		_, err := c.GetObject(t.Context(), in)
		return err
	}
	wantCode(t, "no bucket", get(b.Client, "c", ""), 404, "NoSuchBucket")
	wantCode(t, "its owner", get(b.Client, "b", s3test.Account), 404, "NoSuchKey")
	wantCode(t, "another owner", get(b.Client, "b", "999999999999"), 403, "AccessDenied")
	wantCode(t, "its region and owner", get(west, "west", "999999999999"), 404, "NoSuchKey")

	inRegion := func(err error) string {
		var answer *awshttp.ResponseError
		errors.As(err, &answer)
		return answer.Response.Header.Get("X-Amz-Bucket-Region")
	}
	err := get(b.Client, "west", "")
	if wantCode(t, "another region", err, 301, "PermanentRedirect"); inRegion(err) != "us-west-2" {
		t.Errorf("the bucket is in %q", inRegion(err))
	}
	_, err = b.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: aws.String("west"), Key: aws.String("x")})
	if wantCode(t, "another region, HEAD", err, 301, ""); inRegion(err) != "us-west-2" {
		t.Errorf("the bucket is in %q", inRegion(err))
	}
	_, text := b.raw("GET", "/west/x", "", nil)
	if !strings.Contains(text, "<Region>us-west-2</Region>") {
		t.Error(text)
	}
	if _, err := west.HeadBucket(t.Context(), &s3.HeadBucketInput{Bucket: aws.String("west")}); err != nil {
		t.Error(err)
	}
	// An endpoint of one region.
	one := s3test.New(t, s3test.Options{Region: s3test.Region})
	one.NewBucket("b", s3test.Bucket{})
	err = get(b.client(func(o *s3.Options) { o.Region, o.BaseEndpoint = "us-west-2", aws.String(one.URL()) }), "b", "")
	if wantCode(t, "an endpoint's region", err, 400, "AuthorizationHeaderMalformed"); inRegion(err) != s3test.Region {
		t.Errorf("the bucket is in %q", inRegion(err))
	}

	for name, header := range map[string]map[string]string{
		"no signature":    {"Authorization": ""},
		"another service": {"Authorization": "AWS4-HMAC-SHA256 Credential=A/20260102/eu-central-1/kms/aws4_request, SignedHeaders=host, Signature=" + strings.Repeat("0", 64)},
		"no credentials":  {"Authorization": "Bearer x"},
	} {
		if res, text := b.raw("GET", "/b/x", "", header); res.StatusCode != 403 || errorCode(text) != "AccessDenied" {
			t.Errorf("%s: %d %s", name, res.StatusCode, text)
		}
	}

	for ahead, refused := range map[time.Duration]bool{14 * time.Minute: false, -14 * time.Minute: false, 16 * time.Minute: true, -16 * time.Minute: true} {
		b.s3.SetClock(ahead)
		code := "NoSuchKey"
		status := 404
		if refused {
			status, code = 403, "RequestTimeTooSkewed"
		}
		wantCode(t, ahead.String(), get(b.client(), "b", ""), status, code)
		res, _ := b.raw("GET", "/b/x", "", nil)
		if date, err := http.ParseTime(res.Header.Get("Date")); err != nil || time.Until(date.Add(-ahead)).Abs() > 5*time.Second {
			t.Errorf("%s ahead the server's time is %s", ahead, date)
		}
	}
	b.s3.SetClock(0)

	trusted := "AKIATEST token"
	b.s3.Trust(func(accessKey, token string) error {
		if trusted == "" {
			return &smithy.GenericAPIError{Code: "ExpiredToken"}
		}
		if accessKey+" "+token != trusted {
			return errors.New("unknown")
		}
		return nil
	})
	wantCode(t, "trusted", get(b.Client, "b", ""), 404, "NoSuchKey")
	trusted = "AKIATEST other"
	wantCode(t, "another token", get(b.Client, "b", ""), 403, "InvalidAccessKeyId")
	trusted = ""
	wantCode(t, "expired", get(b.Client, "b", ""), 400, "ExpiredToken")
	b.s3.Heal()
	wantCode(t, "whom it trusts stays", get(b.Client, "b", ""), 400, "ExpiredToken")
	b.s3.Trust(nil)
	wantCode(t, "all", get(b.Client, "b", ""), 404, "NoSuchKey")
}

func TestDeny(t *testing.T) {
	for op, action := range map[string]string{
		"PutObject": "s3:PutObject on resource: \"arn:aws:s3:::b/x\"", "GetObject": "s3:GetObject", "HeadObject": "", "DeleteObject": "s3:DeleteObject",
		"ListObjectsV2": "s3:ListBucket on resource: \"arn:aws:s3:::b\"", "CreateMultipartUpload": "s3:PutObject",
	} {
		b := newBench(t)
		b.mustPut("x", "1")
		b.s3.Deny(op)
		do := map[string]func() error{
			"PutObject":    func() error { _, err := b.put("x", "2"); return err },
			"GetObject":    func() error { _, _, err := b.get("x"); return err },
			"HeadObject":   func() error { _, err := b.head("x"); return err },
			"DeleteObject": func() error { return b.remove("x") },
			"ListObjectsV2": func() error {
				_, err := b.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("b")})
				return err
			},
			"CreateMultipartUpload": func() error {
				_, err := b.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: aws.String("b"), Key: aws.String("x")})
				return err
			},
		}[op]
		if message := wantCode(t, op, do(), 403, ""); !strings.Contains(message, action) {
			t.Errorf("%s: %q, want %q", op, message, action)
		}
		// Who may not list is not told that something is not there.
		_, _, err := b.get("y")
		switch op {
		case "ListObjectsV2", "GetObject":
			wantCode(t, op, err, 403, "AccessDenied")
		default:
			wantCode(t, op, err, 404, "NoSuchKey")
		}
		b.s3.Heal()
		if b.wantGet("x", "1"); do() != nil {
			t.Errorf("%s: healed it is %v", op, do())
		}
	}
}

// TestChecksums: with each algorithm, in the header and, as it is with TLS, in the trailer.
func TestChecksums(t *testing.T) {
	b := newBench(t)
	tls := httptest.NewTLSServer(b.s3)
	defer tls.Close()
	overTLS := b.client(func(o *s3.Options) { o.BaseEndpoint, o.HTTPClient = aws.String(tls.URL), tls.Client() })
	content := noise(200 << 10) // several chunks
	for name, c := range map[string]*s3.Client{"http": b.Client, "https": overTLS} {
		for _, algorithm := range append(types.ChecksumAlgorithm("").Values()[:5:5], "") {
			out, err := c.PutObject(t.Context(), &s3.PutObjectInput{Bucket: aws.String("b"), Key: aws.String("x"), Body: strings.NewReader(content), ChecksumAlgorithm: algorithm, ContentEncoding: aws.String("gzip")})
			if err != nil {
				t.Fatalf("%s, %s: %v", name, algorithm, err)
			}
			sent := map[types.ChecksumAlgorithm]*string{"CRC32": out.ChecksumCRC32, "CRC32C": out.ChecksumCRC32C, "SHA1": out.ChecksumSHA1, "SHA256": out.ChecksumSHA256, "CRC64NVME": out.ChecksumCRC64NVME, "": out.ChecksumCRC32}[algorithm]
			if aws.ToString(sent) == "" {
				t.Errorf("%s, %s: %+v", name, algorithm, out)
			}
			if got := b.wantGet("x", content); aws.ToString(got.ContentEncoding) != "gzip" { // without aws-chunked
				t.Errorf("%s, %s: Content-Encoding %q", name, algorithm, aws.ToString(got.ContentEncoding))
			}
		}
	}

	md5sum := md5.Sum([]byte("hello"))
	hello := map[string]string{ // of "hello"
		"Content-Md5": base64.StdEncoding.EncodeToString(md5sum[:]), "X-Amz-Checksum-Crc32": "NhCmhg==", "X-Amz-Checksum-Crc32c": "mnG7TA==", "X-Amz-Checksum-Crc64nvme": "M3eFcAZSQlc=",
		"X-Amz-Checksum-Sha1": "qvTGHdzF6KLavt4PO0gs2a6pQ00=", "X-Amz-Checksum-Sha256": "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=",
	}
	for name, value := range hello {
		if res, text := b.raw("PUT", "/b/y", "hello", map[string]string{name: value}); res.StatusCode != 200 {
			t.Errorf("%s: %d %s", name, res.StatusCode, text)
		}
		if res, text := b.raw("PUT", "/b/z", "Hello", map[string]string{name: value}); res.StatusCode != 400 || errorCode(text) != "BadDigest" {
			t.Errorf("%s: %d %s", name, res.StatusCode, text)
		}
		want := "InvalidRequest"
		if name == "Content-Md5" {
			want = "InvalidDigest"
		}
		if res, text := b.raw("PUT", "/b/z", "hello", map[string]string{name: "AA=="}); res.StatusCode != 400 || errorCode(text) != want {
			t.Errorf("%s: %d %s", name, res.StatusCode, text)
		}
	}
	const sha = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
	for name, c := range map[string]struct {
		body, payload, code string
		header              map[string]string
	}{
		"its hash":                {"hello", sha, "", nil},
		"another hash":            {"Hello", sha, "XAmzContentSHA256Mismatch", nil},
		"no word of it":           {"hello", "", "MissingSecurityHeader", nil},
		"chunks":                  {"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "", nil},
		"a trailer":               {"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "", map[string]string{"X-Amz-Trailer": "x-amz-checksum-crc32"}},
		"another trailer":         {"5\r\nHello\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "BadDigest", map[string]string{"X-Amz-Trailer": "x-amz-checksum-crc32"}},
		"a trailer that is not":   {"5\r\nhello\r\n0\r\n\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "MalformedTrailerError", map[string]string{"X-Amz-Trailer": "x-amz-checksum-crc32"}},
		"signed chunks":           {"5;chunk-signature=00\r\nhello\r\n0;chunk-signature=00\r\n\r\n", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "", nil},
		"a signed trailer":        {"5;chunk-signature=00\r\nhello\r\n0;chunk-signature=00\r\nx-amz-checksum-crc32:NhCmhg==\r\nx-amz-trailer-signature:00\r\n\r\n", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER", "", map[string]string{"X-Amz-Trailer": "x-amz-checksum-crc32"}},
		"chunks without":          {"5\r\nhello\r\n0\r\n\r\n", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "IncompleteBody", nil},
		"a chunk too long":        {"4\r\nhello\r\n0\r\n\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "IncompleteBody", nil},
		"no last chunk":           {"5\r\nhello\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "IncompleteBody", nil},
		"no end":                  {"5\r\nhello\r\n0\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "IncompleteBody", nil},
		"a size that is none":     {"five\r\nhello\r\n0\r\n\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "IncompleteBody", nil},
		"another length in clear": {"4\r\nhell\r\n0\r\n\r\n", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "IncompleteBody", nil},
		"not chunks":              {"hello", "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "IncompleteBody", nil},
	} {
		if err := b.remove("y"); err != nil {
			t.Fatal(err)
		}
		header := map[string]string{"X-Amz-Content-Sha256": c.payload, "X-Amz-Decoded-Content-Length": "5", "Content-Encoding": "aws-chunked"}
		maps.Copy(header, c.header)
		res, text := b.raw("PUT", "/b/y", c.body, header)
		if c.code == "" {
			if res.StatusCode != 200 || string(b.s3.Stored("b", "y")) != "hello" {
				t.Errorf("%s: %d %s, %q", name, res.StatusCode, text, b.s3.Stored("b", "y"))
			}
		} else if res.StatusCode != 400 || errorCode(text) != c.code || b.s3.Stored("b", "y") != nil {
			t.Errorf("%s: %d %s, want %s; %q", name, res.StatusCode, text, c.code, b.s3.Stored("b", "y"))
		}
	}
}

func TestObjectLock(t *testing.T) {
	b := newBench(t)
	b.s3.NewBucket("b", s3test.Bucket{ObjectLock: true})
	first, second := b.mustPut("x", "1"), b.mustPut("x", "2")
	if first.VersionId == nil || second.VersionId == nil || *first.VersionId == *second.VersionId || b.s3.Versions("b", "x") != 2 {
		t.Fatalf("versions %v, %v", first.VersionId, second.VersionId)
	}
	if out := b.wantGet("x", "2"); aws.ToString(out.VersionId) != *second.VersionId {
		t.Errorf("version %v", out.VersionId)
	}
	if data, _, err := b.get("x", func(in *s3.GetObjectInput) { in.VersionId = first.VersionId }); err != nil || data != "1" {
		t.Errorf("the first version is %q (%v)", data, err)
	}
	_, _, err := b.get("x", func(in *s3.GetObjectInput) { in.VersionId = aws.String("none") })
	wantCode(t, "a version of none", err, 404, "NoSuchVersion")
	wantCode(t, "DELETE", b.remove("x"), 403, "AccessDenied")
	wantCode(t, "DELETE", b.remove("x", func(in *s3.DeleteObjectInput) { in.VersionId = first.VersionId }), 403, "AccessDenied")
	wantCode(t, "PUT", ifNoneMatch(b, "*"), 412, "PreconditionFailed")
	if b.s3.Versions("b", "x") != 2 || len(b.s3.Keys("b")) != 1 {
		t.Errorf("%d versions of %q", b.s3.Versions("b", "x"), b.s3.Keys("b"))
	}
}

func TestFaults(t *testing.T) {
	content := noise(100 << 10)
	// done tells whether the PUT that is tried was done all the same.
	for name, c := range map[string]struct {
		fault  s3test.Fault
		status int // 0 is no answer
		code   string
		done   bool
	}{
		"slow down":      {s3test.Fault{Code: "SlowDown", Status: 503}, 503, "SlowDown", false},
		"internal error": {s3test.Fault{Op: "PutObject", Code: "InternalError", Status: 500}, 500, "InternalError", false},
		"denied":         {s3test.Fault{Code: "AccessDenied", Status: 403}, 403, "AccessDenied", false},
		"a bad request":  {s3test.Fault{Code: "BadDigest"}, 400, "BadDigest", false},
		"a proxy":        {s3test.Fault{Status: 502, Body: "<html>Bad Gateway</html>"}, 502, "", false},
		"cut":            {s3test.Fault{Cut: true}, 0, "", false},
		"lost":           {s3test.Fault{Lost: true}, 0, "", true},
		"lost later":     {s3test.Fault{Lost: true, Delay: 50 * time.Millisecond}, 0, "", true},
	} {
		b := newBench(t)
		c.fault.Times = 2
		b.s3.Fail(c.fault)
		for range 2 {
			_, err := b.put("x", content, b.underKey)
			if c.status == 0 {
				wantNoAnswer(t, name, err)
			} else {
				wantCode(t, name, err, c.status, c.code)
			}
		}
		if done := b.s3.Stored("b", "x") != nil; done != c.done || b.s3.Count("PutObject") != 2 {
			t.Errorf("%s: %d PUTs, it is there: %v", name, b.s3.Count("PutObject"), done)
		}
		b.mustPut("x", content, b.underKey)
		b.wantGet("x", content)
	}
}

func TestFaultsOfAnswers(t *testing.T) {
	b := newBench(t)
	content := noise(100 << 10)
	b.mustPut("x", content)
	b.s3.Fail(s3test.Fault{Op: "GetObject", CutAfter: 1000, Times: 1})
	data, _, err := b.get("x")
	if err == nil || len(data) > 1000 {
		t.Errorf("cut: %d bytes (%v)", len(data), err)
	}
	b.wantGet("x", content)

	b.s3.Fail(s3test.Fault{Op: "GetObject", Slow: 400 << 10, Times: 1})
	start := time.Now()
	b.wantGet("x", content)
	if took := time.Since(start); took < 150*time.Millisecond {
		t.Errorf("slow: it took %s", took)
	}
	b.s3.Fail(s3test.Fault{Op: "HeadObject", Delay: 100 * time.Millisecond, Times: 1})
	start = time.Now()
	if _, err := b.head("x"); err != nil || time.Since(start) < 100*time.Millisecond {
		t.Errorf("delay: %v after %s", err, time.Since(start))
	}

	for name, f := range map[string]s3test.Fault{"hang": {Hang: true}, "delay": {Delay: time.Hour}, "slow": {Slow: 1}} {
		b.s3.Fail(f)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		out, err := b.GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String("b"), Key: aws.String("x")})
		if err == nil {
			_, err = io.ReadAll(out.Body)
			out.Body.Close()
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		b.s3.Heal()
	}

	// In their order, each as often as it says, and for its operation.
	b.s3.Fail(s3test.Fault{Op: "GetObject", Code: "SlowDown", Status: 503, Times: 1})
	b.s3.Fail(s3test.Fault{Op: "GetObject", Code: "InternalError", Status: 500})
	b.mustPut("x", content)
	for i, code := range []string{"SlowDown", "InternalError", "InternalError"} {
		_, _, err := b.get("x")
		wantCode(t, code, err, []int{503, 500, 500}[i], code)
	}
	b.s3.Heal()
	b.wantGet("x", content)

	// A good answer with an error in it, and an answer that was lost: it is complete.
	u := b.begin("y")
	u.mustPart(1, "1")
	b.s3.Fail(s3test.Fault{Op: "CompleteMultipartUpload", Status: 200, Code: "InternalError", Times: 1})
	_, err = u.complete()
	wantCode(t, "200", err, 500, "InternalError") // what the SDK makes of it
	b.s3.Fail(s3test.Fault{Op: "CompleteMultipartUpload", Lost: true, Times: 1})
	_, err = u.complete()
	wantNoAnswer(t, "lost", err)
	b.wantGet("y", "1")
}

func TestUnderneath(t *testing.T) {
	b := newBench(t)
	b.mustPut("x", "content", b.underKey)
	b.s3.Tamper("b", "x", func(d []byte) []byte { d[len(d)-1] ^= 1; return d })
	_, _, err := b.get("x")
	wantCode(t, "ciphertext that was changed", err, 500, "InternalError")
	b.s3.Tamper("b", "x", func([]byte) []byte { return nil })
	_, _, err = b.get("x")
	wantCode(t, "no ciphertext", err, 500, "InternalError")

	b.mustPut("y", "content")
	b.s3.Tamper("b", "y", func(d []byte) []byte { return append(d, '!') })
	b.wantGet("y", "content!")
	b.s3.SetMetadata("b", "y", map[string]string{"a": "b"})
	if head, err := b.head("y"); err != nil || !maps.Equal(head.Metadata, map[string]string{"a": "b"}) || *head.ContentLength != 8 {
		t.Errorf("%+v (%v)", head, err)
	}
	b.s3.Add("b", "z", []byte("others'"), map[string]string{"c": "d"})
	if out := b.wantGet("z", "others'"); out.Metadata["c"] != "d" || out.ServerSideEncryption != types.ServerSideEncryptionAes256 {
		t.Errorf("%+v", out)
	}
	if keys := b.s3.Keys("b"); !slices.Equal(keys, []string{"x", "y", "z"}) {
		t.Errorf("%q", keys)
	}
	if _, ok := b.s3.Object("b", "none"); ok || b.s3.Stored("b", "none") != nil || b.s3.Versions("b", "none") != 0 {
		t.Error("there is something that is not")
	}
	b.s3.NewBucket("b", s3test.Bucket{})
	if keys := b.s3.Keys("b"); len(keys) != 0 {
		t.Errorf("a new bucket has %q", keys)
	}
}

func TestCalls(t *testing.T) {
	b := newBench(t)
	b.mustPut("a/x", "1", b.underKey)
	_, _, _ = b.get("none")
	_, _ = b.head("none")
	b.s3.Fail(s3test.Fault{Cut: true, Times: 1})
	_, _ = b.put("y", "1")
	_, _ = b.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("c")})
	call := func(op, key, code string, status int) s3test.Call {
		return s3test.Call{Op: op, Bucket: "b", Key: key, AccessKey: "AKIATEST", Region: s3test.Region, Code: code, Status: status}
	}
	put := call("PutObject", "a/x", "", 200)
	put.SSE, put.KeyID = "aws:kms", b.key
	list := call("ListObjectsV2", "", "NoSuchBucket", 404)
	list.Bucket = "c"
	got := b.s3.Calls()
	ids := map[string]bool{}
	for i := range got {
		ids[got[i].RequestID] = true
		got[i].RequestID = ""
	}
	want := []s3test.Call{put, call("GetObject", "none", "NoSuchKey", 404), call("HeadObject", "none", "NoSuchKey", 404), call("PutObject", "y", "", 0), list}
	if !slices.Equal(got, want) || len(ids) != len(want) || ids[""] {
		t.Errorf("%+v, want %+v; %v", got, want, ids)
	}
	if b.s3.Count("PutObject") != 2 || b.s3.Count("DeleteObject") != 0 {
		t.Errorf("%d PUTs", b.s3.Count("PutObject"))
	}
}

func TestAnswers(t *testing.T) {
	b := newBench(t)
	b.mustPut("x", "1")
	for _, c := range []struct{ method, path string }{{"GET", "/b/x"}, {"HEAD", "/b/x"}, {"GET", "/b/none"}, {"HEAD", "/b/none"}, {"GET", "/none/x"}, {"DELETE", "/b/none"}, {"GET", "/b?list-type=2"}} {
		res, text := b.raw(c.method, c.path, "", nil)
		date, err := http.ParseTime(res.Header.Get("Date"))
		if err != nil || time.Since(date).Abs() > 5*time.Second || res.Header.Get("X-Amz-Request-Id") == "" {
			t.Errorf("%s %s: %v", c.method, c.path, res.Header)
		}
		if c.method == "HEAD" && text != "" || res.StatusCode == 404 && c.method == "GET" && (errorCode(text) == "" || !strings.Contains(text, res.Header.Get("X-Amz-Request-Id"))) {
			t.Errorf("%s %s: %q", c.method, c.path, text)
		}
	}
}

// failing notes that a test would fail.
type failing struct {
	testing.TB
	said []string
}

func (f *failing) Errorf(format string, args ...any) {
	f.said = append(f.said, fmt.Sprintf(format, args...))
}

// TestWhatIsNotKnown is refused, and nothing is done by halves.
func TestWhatIsNotKnown(t *testing.T) {
	b := newBench(t)
	for _, header := range []string{"X-Amz-Copy-Source", "X-Amz-Server-Side-Encryption-Customer-Algorithm", "X-Amz-Object-Lock-Mode", "X-Amz-Acl"} {
		if res, text := b.raw("PUT", "/b/x", "1", map[string]string{header: "x"}); res.StatusCode != 501 || errorCode(text) != "NotImplemented" {
			t.Errorf("%s: %d %s", header, res.StatusCode, text)
		}
	}
	f := &failing{TB: t}
	b.s3 = s3test.New(f, s3test.Options{})
	b.s3.NewBucket("b", s3test.Bucket{})
	for i, c := range []struct{ method, path string }{{"GET", "/"}, {"GET", "/b"}, {"PUT", "/b"}, {"POST", "/b?delete"}, {"GET", "/b/x?acl"}, {"PUT", "/b/x?tagging"}, {"PATCH", "/b/x"}, {"GET", "/b?list-type=1"}} {
		if res, _ := b.raw(c.method, c.path, "", nil); res.StatusCode != 501 || len(f.said) != i+1 || !strings.Contains(f.said[i], c.method+" "+c.path) {
			t.Errorf("%v: %d, the test says %q", c, res.StatusCode, f.said)
		}
	}
	f.said = nil
	if res, _ := b.raw("PUT", "/b/x", "1", map[string]string{"X-Amz-Server-Side-Encryption": "aws:kms"}); res.StatusCode < 400 || len(f.said) != 1 || !strings.Contains(f.said[0], "KMS") {
		t.Errorf("without a KMS: %d, the test says %q", res.StatusCode, f.said)
	}
}
