package s3test

import (
	"bytes"
	"cmp"
	"crypto/md5"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Object is what the server knows of an object, beside its content.
type Object struct {
	Encryption
	Size        int64  // of the content in the clear
	ETag        string // with its quotes
	Version     string // "" in a bucket without ObjectLock
	Modified    time.Time
	ContentType string
	Encoding    string            // Content-Encoding
	Metadata    map[string]string // names in lower case, without x-amz-meta-
}

// stored is an object as it lies on the server. What it holds is replaced and never changed: requests share it.
type stored struct {
	Object
	data []byte // ciphertext where Encryption has a wrapped key
	sums http.Header
}

// Stored is what lies on the server, ciphertext where it encrypted under a KMS key; nil without an object.
func (s *S3) Stored(bucket, key string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o := s.newest(bucket, key); o != nil {
		return bytes.Clone(o.data)
	}
	return nil
}

// Object returns what the server knows of an object. ok is false without one.
func (s *S3) Object(bucket, key string) (o Object, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	there := s.newest(bucket, key)
	if there == nil {
		return o, false
	}
	o = there.Object
	o.Metadata, o.Context, o.Wrapped = maps.Clone(o.Metadata), maps.Clone(o.Context), bytes.Clone(o.Wrapped)
	return o, true
}

// Versions returns how many versions of an object there are.
func (s *S3) Versions(bucket, key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.objects[bucket][key])
}

// Keys lists the objects of a bucket, in S3's order.
func (s *S3) Keys(bucket string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.objects[bucket]))
}

// Add stores an object as a client put it there that asked for no encryption, in a bucket that has none either.
func (s *S3) Add(bucket, key string, data []byte, metadata map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.objects[bucket] == nil {
		s.t.Fatalf("s3test: there is no bucket %s", bucket)
	}
	o := &stored{data: bytes.Clone(data), Object: Object{Size: int64(len(data)), ETag: etagOf(data), ContentType: binary, Metadata: maps.Clone(metadata), Encryption: Encryption{SSE: AES256}}}
	s.keep(bucket, key, o)
}

// Tamper changes what lies on the server: the ciphertext, where it encrypted under a KMS key. No checksum tells.
func (s *S3) Tamper(bucket, key string, change func(data []byte) []byte) {
	s.edit(bucket, key, func(o *stored) {
		o.data, o.sums = change(bytes.Clone(o.data)), nil
		if o.Wrapped == nil {
			o.Size = int64(len(o.data))
		}
	})
}

// SetMetadata replaces the metadata of an object.
func (s *S3) SetMetadata(bucket, key string, metadata map[string]string) {
	s.edit(bucket, key, func(o *stored) { o.Metadata = maps.Clone(metadata) })
}

func (s *S3) edit(bucket, key string, change func(*stored)) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	there := s.newest(bucket, key)
	if there == nil {
		s.t.Fatalf("s3test: there is no %s/%s", bucket, key)
		return
	}
	o := *there
	change(&o)
	versions := s.objects[bucket][key]
	versions[len(versions)-1] = &o
}

// newest is the version that there is, nil without one. The caller has locked.
func (s *S3) newest(bucket, key string) *stored {
	if versions := s.objects[bucket][key]; len(versions) > 0 {
		return versions[len(versions)-1]
	}
	return nil
}

// keep puts an object in its place. The caller has locked.
func (s *S3) keep(bucket, key string, o *stored) {
	o.Modified = s.now()
	if !s.buckets[bucket].ObjectLock {
		s.objects[bucket][key] = []*stored{o}
		return
	}
	o.Version = rand.Text()
	s.objects[bucket][key] = append(s.objects[bucket][key], o)
}

const binary = "binary/octet-stream" // what has no Content-Type

// properties are those that a request gives an object.
func properties(q *request) (o Object, no *refusal) {
	o = Object{ContentType: cmp.Or(q.Header.Get("Content-Type"), binary), Metadata: map[string]string{}}
	encodings := slices.DeleteFunc(strings.Split(q.Header.Get("Content-Encoding"), ","), func(e string) bool { return strings.TrimSpace(e) == "aws-chunked" })
	o.Encoding = strings.TrimSpace(strings.Join(encodings, ","))
	size := 0
	for name, values := range q.Header {
		if short, ok := strings.CutPrefix(name, headerMeta); ok {
			o.Metadata[strings.ToLower(short)] = strings.Join(values, ",")
			size += len(short) + len(o.Metadata[strings.ToLower(short)])
		}
	}
	if size > 2<<10 {
		return o, refuse(http.StatusBadRequest, "MetadataTooLarge", "Your metadata headers exceed the maximum allowed metadata size")
	}
	return o, nil
}

// etagOf is the ETag of what S3 encrypts with keys of its own.
func etagOf(data []byte) string { return quoted(sum(md5.New(), data)) }

func quoted(sum []byte) string { return `"` + hex.EncodeToString(sum) + `"` }

// opaque is the ETag of what is encrypted under a KMS key.
func opaque() string {
	etag := make([]byte, md5.Size)
	_, _ = rand.Read(etag) // never fails
	return quoted(etag)
}

// condition is what a write asks of the object that is there. The caller has locked.
func (s *S3) condition(q *request) *refusal {
	there := s.newest(q.Bucket, q.Key)
	switch none, match := q.Header.Get("If-None-Match"), q.Header.Get("If-Match"); {
	case none != "" && none != "*":
		return notImplemented("If-None-Match")
	case match != "" && there == nil:
		return noSuchKey()
	case none != "" && there != nil, match != "" && !matches(match, there.ETag):
		return preconditionFailed()
	}
	return nil
}

func matches(condition, etag string) bool {
	return condition == "*" || strings.Trim(condition, `"`) == strings.Trim(etag, `"`)
}

func preconditionFailed() *refusal {
	return refuse(http.StatusPreconditionFailed, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
}

func noSuchKey() *refusal {
	return refuse(http.StatusNotFound, "NoSuchKey", "The specified key does not exist.")
}

// store keeps an object if the condition (still) holds and its upload is (still) there, and says so.
func (s *S3) store(q *request, o *stored, a *answer) *refusal {
	s.mu.Lock()
	defer s.mu.Unlock()
	if no := s.condition(q); no != nil {
		return no
	}
	if q.query.Has("uploadId") {
		u, no := s.upload(q)
		if no != nil {
			return no
		}
		delete(s.uploads, u.id)
	}
	s.keep(q.Bucket, q.Key, o)
	if a.header.Set("Etag", o.ETag); o.Version != "" {
		a.header.Set("X-Amz-Version-Id", o.Version)
	}
	return nil
}

func (s *S3) putObject(q *request, a *answer) *refusal {
	s.mu.Lock()
	no := s.condition(q)
	s.mu.Unlock()
	if no != nil {
		return no
	}
	o := &stored{sums: q.sums}
	if o.Object, no = properties(q); no != nil {
		return no
	}
	e, claims, dataKey, no := s.encryption(q)
	if no != nil {
		return no
	}
	o.Encryption, o.Size, o.ETag, o.data = e, int64(len(q.data)), etagOf(q.data), seal(dataKey, q.data)
	if dataKey != nil {
		o.ETag = opaque()
	}
	if no := s.store(q, o, a); no != nil {
		return no
	}
	claims.tell(a.header)
	maps.Copy(a.header, q.sums)
	return nil
}

// find returns the object that a request is about.
func (s *S3) find(q *request) (*stored, *refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if version := q.query.Get("versionId"); version != "" {
		for _, o := range s.objects[q.Bucket][q.Key] {
			if version == cmp.Or(o.Version, "null") {
				return o, nil
			}
		}
		return nil, refuse(http.StatusNotFound, "NoSuchVersion", "The specified version does not exist.")
	}
	o := s.newest(q.Bucket, q.Key)
	if o == nil && s.denied["ListObjectsV2"] {
		return nil, mayNot("ListBucket", q)
	}
	if o == nil {
		return nil, noSuchKey()
	}
	return o, nil
}

// getObject answers HEAD too, for which the key is not needed.
func (s *S3) getObject(q *request, a *answer) *refusal {
	o, no := s.find(q)
	if no != nil {
		return no
	}
	if c := q.Header.Get("If-Match"); c != "" && !matches(c, o.ETag) {
		return preconditionFailed()
	}
	if c := q.Header.Get("If-None-Match"); c != "" && matches(c, o.ETag) {
		return refuse(http.StatusNotModified, "NotModified", "Not Modified")
	}
	from, to := int64(0), o.Size
	if first, last, ok := byteRange(q.Header.Get("Range"), o.Size); ok {
		if first >= o.Size || last < first {
			return refuse(http.StatusRequestedRangeNotSatisfiable, "InvalidRange", "The requested range is not satisfiable")
		}
		from, to, a.status = first, last+1, http.StatusPartialContent
		a.header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, o.Size))
	} else if q.Header.Get("X-Amz-Checksum-Mode") == "ENABLED" {
		maps.Copy(a.header, o.sums)
	}
	o.tell(a.header)
	if q.Method == http.MethodHead {
		a.header.Set("Content-Length", strconv.FormatInt(to-from, 10))
		return nil
	}
	dataKey, no := s.unwrap(q, o.Encryption)
	if no != nil {
		return no
	}
	data, no := open(dataKey, o.data)
	if no != nil {
		return no
	}
	a.body = data[from:to]
	return nil
}

// byteRange reads "bytes=1-2", "bytes=1-" and "bytes=-2". S3 gives all of an object for anything else.
func byteRange(text string, size int64) (first, last int64, ok bool) {
	a, b, ok := strings.Cut(strings.TrimPrefix(text, "bytes="), "-")
	if !ok {
		return 0, 0, false
	}
	first, errA := strconv.ParseInt(a, 10, 64)
	last, errB := strconv.ParseInt(b, 10, 64)
	switch {
	case a == "" && errB == nil && last >= 0:
		return max(size-last, 0), size - 1, true
	case errA == nil && b == "":
		return first, size - 1, true
	}
	return first, min(last, size-1), errA == nil && errB == nil && first <= last
}

func (o Object) tell(h http.Header) {
	for name, value := range o.Metadata {
		h.Set(headerMeta+name, value)
	}
	for name, value := range map[string]string{"Content-Encoding": o.Encoding, "X-Amz-Version-Id": o.Version} {
		if value != "" {
			h.Set(name, value)
		}
	}
	h.Set("Etag", o.ETag)
	h.Set("Content-Type", o.ContentType)
	h.Set("Accept-Ranges", "bytes")
	h.Set("Last-Modified", o.Modified.UTC().Format(http.TimeFormat))
	o.Encryption.tell(h)
}

func (s *S3) deleteObject(q *request, a *answer) *refusal {
	s.mu.Lock()
	defer s.mu.Unlock()
	there := s.newest(q.Bucket, q.Key)
	if there != nil && q.bucket.ObjectLock {
		return refuse(http.StatusForbidden, "AccessDenied", "Access Denied because object protected by object lock.")
	}
	if no := s.condition(q); no != nil {
		return no
	}
	delete(s.objects[q.Bucket], q.Key)
	a.status = http.StatusNoContent
	return nil
}
