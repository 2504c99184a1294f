package s3test

import (
	"bufio"
	"bytes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"net/http"
	"net/textproto"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// caller is who signed a request.
type caller struct {
	accessKey, token, region, date string
}

var scope = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([^/,]+)/\d{8}/([^/]+)/s3/aws4_request,`)

func credentials(r *http.Request) caller {
	m := scope.FindStringSubmatch(r.Header.Get("Authorization"))
	if m == nil {
		return caller{}
	}
	return caller{accessKey: m[1], region: m[2], token: r.Header.Get("X-Amz-Security-Token"), date: r.Header.Get("X-Amz-Date")}
}

// allowed is all that is asked before the object is looked at.
func (s *S3) allowed(call Call, c caller, r *http.Request) (Bucket, *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.buckets[call.Bucket]
	signed, err := time.Parse("20060102T150405Z", c.date)
	switch {
	case c.accessKey == "":
		return b, refuse(http.StatusForbidden, "AccessDenied", "Access Denied")
	case err != nil || time.Now().Add(s.ahead).Sub(signed).Abs() > 15*time.Minute:
		return b, refuse(http.StatusForbidden, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.")
	case !ok:
		return b, refuse(http.StatusNotFound, "NoSuchBucket", "The specified bucket does not exist")
	case c.region != b.Region:
		no := refuse(http.StatusMovedPermanently, "PermanentRedirect", "The bucket you are attempting to access must be addressed using the specified endpoint.")
		no.header = map[string]string{"X-Amz-Bucket-Region": b.Region}
		return b, no
	case r.Header.Get("X-Amz-Expected-Bucket-Owner") != "" && r.Header.Get("X-Amz-Expected-Bucket-Owner") != b.Owner:
		return b, refuse(http.StatusForbidden, "AccessDenied", "Access Denied")
	case s.denied[call.Op]:
		return b, refuse(http.StatusForbidden, "AccessDenied", "User: arn:aws:sts::%s:assumed-role/node/i-0 is not authorized to perform: s3:%s on resource: %q", Account, call.Op, call.Bucket+"/"+call.Name)
	}
	return b, nil
}

func (s *S3) serve(call Call, c caller, r *http.Request, a *answer) *refusal {
	b, no := s.allowed(call, c, r)
	if no != nil {
		return no
	}
	switch call.Op {
	case "PutObject":
		return s.put(b, call, c, r, a)
	case "ListObjectsV2":
		return s.list(call, r.URL.Query(), a)
	}
	var o *stored
	s.locked(func() {
		if found := s.objects[call.Bucket][call.Name]; found != nil {
			copied := *found
			o = &copied
		}
	})
	if o == nil {
		return refuse(http.StatusNotFound, "NoSuchKey", "The specified key does not exist.")
	}
	if call.Op == "DeleteObject" {
		if b.Locked {
			return refuse(http.StatusForbidden, "AccessDenied", "Access Denied because object protected by object lock.")
		}
		s.locked(func() { delete(s.objects[call.Bucket], call.Name) })
		a.status = http.StatusNoContent
		return nil
	}
	o.tell(a.header)
	a.header.Set("Content-Length", strconv.Itoa(o.size))
	if call.Op == "HeadObject" {
		return nil
	}
	a.body, no = s.decrypted(call, c, o)
	return no
}

// tell are the properties in an answer.
func (o *stored) tell(h http.Header) {
	for name, value := range o.metadata {
		h.Set("X-Amz-Meta-"+name, value)
	}
	h.Set("Etag", o.etag)
	h.Set("Last-Modified", o.modified.UTC().Format(http.TimeFormat))
	o.tellEncryption(h)
}

func (o *stored) tellEncryption(h http.Header) {
	if o.algorithm != "" {
		h.Set("X-Amz-Server-Side-Encryption", o.algorithm)
	}
	if o.keyARN != "" {
		h.Set("X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id", o.keyARN)
	}
}

func (s *S3) put(b Bucket, call Call, c caller, r *http.Request, a *answer) *refusal {
	data, no := body(r)
	if no != nil {
		return no
	}
	exists := func() (is bool) {
		s.locked(func() { is = s.objects[call.Bucket][call.Name] != nil })
		return is
	}
	taken := refuse(http.StatusPreconditionFailed, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
	switch {
	case r.Header.Get("If-None-Match") == "*" && exists():
		return taken
	case b.Locked && exists():
		return refuse(http.StatusForbidden, "AccessDenied", "Access Denied because object protected by object lock.")
	}
	o := &stored{size: len(data), metadata: map[string]string{}, etag: etag(data), modified: time.Now()}
	for name, values := range r.Header {
		if short, ok := strings.CutPrefix(strings.ToLower(name), "x-amz-meta-"); ok {
			o.metadata[short] = values[0]
		}
	}
	if no := s.encrypt(b, call, c, o, data); no != nil {
		return no
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Header.Get("If-None-Match") == "*" && s.objects[call.Bucket][call.Name] != nil {
		return taken
	}
	s.objects[call.Bucket][call.Name] = o
	a.header.Set("Etag", o.etag)
	switch s.mode {
	case Lies:
		(&stored{algorithm: call.Algorithm, keyARN: call.KeyID}).tellEncryption(a.header)
	case Silent:
	default:
		o.tellEncryption(a.header)
	}
	return nil
}

func (s *S3) list(call Call, q url.Values, a *answer) *refusal {
	type content struct {
		Key          string
		LastModified string
		ETag         string
		Size         int
	}
	type result struct {
		XMLName               struct{} `xml:"ListBucketResult"`
		Name, Prefix          string
		KeyCount, MaxKeys     int
		IsTruncated           bool
		NextContinuationToken string `xml:",omitempty"`
		Contents              []content
	}
	out := result{Name: call.Bucket, Prefix: q.Get("prefix"), MaxKeys: 1000}
	if n, err := strconv.Atoi(q.Get("max-keys")); err == nil {
		out.MaxKeys = min(n, out.MaxKeys)
	}
	after, _ := base64.StdEncoding.DecodeString(q.Get("continuation-token"))
	for _, name := range s.Names(call.Bucket) {
		if !strings.HasPrefix(name, out.Prefix) || name <= string(after) {
			continue
		}
		if len(out.Contents) == out.MaxKeys {
			out.IsTruncated = true
			out.NextContinuationToken = base64.StdEncoding.EncodeToString([]byte(out.Contents[out.MaxKeys-1].Key))
			break
		}
		s.locked(func() {
			o := s.objects[call.Bucket][name]
			out.Contents = append(out.Contents, content{Key: name, LastModified: o.modified.UTC().Format(time.RFC3339), ETag: o.etag, Size: o.size})
		})
	}
	out.KeyCount = len(out.Contents)
	a.xml(out)
	return nil
}

// unchunk takes the framing of aws-chunked off: SIZE[;signature]\r\nDATA\r\n … 0\r\n, and headers after it.
func unchunk(raw []byte) (data []byte, trailer http.Header, err error) {
	r := bufio.NewReader(bytes.NewReader(raw))
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return nil, nil, fmt.Errorf("a chunk's size: %w", err)
		}
		size, err := strconv.ParseInt(strings.TrimSpace(strings.SplitN(line, ";", 2)[0]), 16, 64)
		if err != nil || size < 0 || size > limit {
			return nil, nil, fmt.Errorf("a chunk's size is %q", line)
		}
		if size == 0 {
			break
		}
		chunk := make([]byte, size+2)
		if _, err := io.ReadFull(r, chunk); err != nil {
			return nil, nil, fmt.Errorf("a chunk of %d bytes: %w", size, err)
		}
		data = append(data, chunk[:size]...)
	}
	header, err := textproto.NewReader(r).ReadMIMEHeader()
	if err != nil && len(header) == 0 && err != io.EOF {
		return nil, nil, err
	}
	return data, http.Header(header), nil
}

// checksums compares a body with what the request says of it.
func checksums(data []byte, header, trailer http.Header) *refusal {
	bad := refuse(http.StatusBadRequest, "BadDigest", "The checksum you specified did not match what we received.")
	of := func(h hash.Hash) []byte { h.Write(data); return h.Sum(nil) }
	if want := header.Get("X-Amz-Content-Sha256"); len(want) == 64 && want != hex.EncodeToString(of(sha256.New())) {
		return refuse(http.StatusBadRequest, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed.")
	}
	sums := map[string]func() hash.Hash{
		"X-Amz-Checksum-Sha256": sha256.New, "X-Amz-Checksum-Sha1": sha1.New, "Content-Md5": md5.New,
		"X-Amz-Checksum-Crc32":     func() hash.Hash { return crc32.NewIEEE() },
		"X-Amz-Checksum-Crc32c":    func() hash.Hash { return crc32.New(crc32.MakeTable(crc32.Castagnoli)) },
		"X-Amz-Checksum-Crc64nvme": func() hash.Hash { return crc64.New(crc64.MakeTable(0x9a6c9329ac4bc9b5)) },
	}
	for name, sum := range sums {
		for _, want := range slices.Concat(header[name], trailer[name]) {
			if want != base64.StdEncoding.EncodeToString(of(sum())) {
				return bad
			}
		}
	}
	return nil
}
