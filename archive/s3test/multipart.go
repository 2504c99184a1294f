package s3test

import (
	"cmp"
	"crypto/md5"
	"crypto/rand"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"maps"
	"net/http"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"time"
)

// MinPart is the least size of a part that is not the last.
const MinPart = 5 << 20

// upload is an object that comes in parts.
type upload struct {
	id, bucket, key string
	began           time.Time
	object          Object     // its properties
	claims          Encryption // what its answers say
	parts           map[int]*part
}

type part struct {
	data     []byte // encrypted as the object will be
	size     int64
	sum      []byte // MD5 of the content in the clear
	etag     string
	sums     http.Header
	modified time.Time
}

func (s *S3) createUpload(q *request, a *answer) *refusal {
	o, no := properties(q)
	if no != nil {
		return no
	}
	e, claims, _, no := s.encryption(q)
	if no != nil {
		return no
	}
	o.Encryption = e
	s.mu.Lock()
	defer s.mu.Unlock()
	u := &upload{id: rand.Text(), bucket: q.Bucket, key: q.Key, began: s.now(), object: o, claims: claims, parts: map[int]*part{}}
	s.uploads[u.id] = u
	claims.tell(a.header)
	for _, name := range []string{headerChecksum + "Algorithm", headerChecksum + "Type"} {
		if value := q.Header.Get(name); value != "" {
			a.header.Set(name, value)
		}
	}
	a.xml(struct {
		XMLName               xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ InitiateMultipartUploadResult"`
		Bucket, Key, UploadId string
	}{Bucket: u.bucket, Key: u.key, UploadId: u.id})
	return nil
}

// upload finds the one that a request is about. The caller has locked.
func (s *S3) upload(q *request) (*upload, *refusal) {
	u := s.uploads[q.query.Get("uploadId")]
	if u == nil || u.bucket != q.Bucket || u.key != q.Key {
		return nil, refuse(http.StatusNotFound, "NoSuchUpload", "The specified upload does not exist. The upload ID may be invalid, or the upload may have been aborted or completed.")
	}
	return u, nil
}

// openUpload finds an upload and its data key: S3 keeps none, so who uploads under a KMS key has to be allowed kms:Decrypt.
// https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html#mpuAndPermissions
func (s *S3) openUpload(q *request) (*upload, []byte, *refusal) {
	s.mu.Lock()
	u, no := s.upload(q)
	s.mu.Unlock()
	if no != nil {
		return nil, nil, no
	}
	dataKey, no := s.unwrap(q, u.object.Encryption)
	return u, dataKey, no
}

func (s *S3) uploadPart(q *request, a *answer) *refusal {
	n, err := strconv.Atoi(q.query.Get("partNumber"))
	if err != nil || n < 1 || n > 10000 {
		return invalid("Part number must be an integer between 1 and 10000, inclusive")
	}
	_, dataKey, no := s.openUpload(q)
	if no != nil {
		return no
	}
	p := &part{data: seal(dataKey, q.data), size: int64(len(q.data)), sum: sum(md5.New(), q.data), etag: etagOf(q.data), sums: q.sums}
	if dataKey != nil {
		p.etag = opaque()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u, no := s.upload(q) // it may have been aborted
	if no != nil {
		return no
	}
	p.modified = s.now()
	u.parts[n] = p
	u.claims.tell(a.header)
	maps.Copy(a.header, p.sums)
	a.header.Set("Etag", p.etag)
	return nil
}

// completion is the body of a CompleteMultipartUpload.
type completion struct {
	XMLName xml.Name `xml:"CompleteMultipartUpload"`
	Part    []struct {
		PartNumber int
		ETag       string
		Sums       []struct {
			XMLName xml.Name
			Value   string `xml:",chardata"`
		} `xml:",any"`
	}
}

// named finds the parts that a completion names.
func (u *upload) named(c completion) (parts []*part, no *refusal) {
	for i, named := range c.Part {
		p := u.parts[named.PartNumber]
		if i > 0 && named.PartNumber <= c.Part[i-1].PartNumber {
			return nil, refuse(http.StatusBadRequest, "InvalidPartOrder", "The list of parts was not in ascending order. Parts must be ordered by part number.")
		}
		wrong := p == nil || !matches(named.ETag, p.etag)
		for _, sum := range named.Sums {
			name := textproto.CanonicalMIMEHeaderKey(headerChecksum + strings.TrimPrefix(sum.XMLName.Local, "Checksum"))
			wrong = wrong || p.sums.Get(name) != sum.Value
		}
		if wrong {
			return nil, refuse(http.StatusBadRequest, "InvalidPart", "One or more of the specified parts could not be found. The part may not have been uploaded, or the specified entity tag may not match the part's entity tag.")
		}
		if p.size < MinPart && i < len(c.Part)-1 {
			return nil, refuse(http.StatusBadRequest, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size")
		}
		parts = append(parts, p)
	}
	return parts, nil
}

func (s *S3) completeUpload(q *request, a *answer) *refusal {
	for name := range checksums {
		if q.Header.Get(name) != "" {
			return notImplemented(name) // the one of the object, not of this body
		}
	}
	var c completion
	if err := xml.Unmarshal(q.data, &c); err != nil || len(c.Part) == 0 {
		return refuse(http.StatusBadRequest, "MalformedXML", "The XML you provided was not well-formed or did not validate against our published schema")
	}
	u, dataKey, no := s.openUpload(q)
	if no != nil {
		return no
	}
	s.mu.Lock()
	parts, no := u.named(c)
	s.mu.Unlock()
	if no != nil {
		return no
	}
	o := &stored{Object: u.object}
	var data, sums []byte
	for _, p := range parts {
		plaintext, no := open(dataKey, p.data)
		if no != nil {
			return no
		}
		data, sums = append(data, plaintext...), append(sums, p.sum...)
	}
	o.Size, o.data = int64(len(data)), seal(dataKey, data)
	o.ETag = fmt.Sprintf(`"%s-%d"`, hex.EncodeToString(sum(md5.New(), sums)), len(parts))
	if dataKey != nil {
		o.ETag = fmt.Sprintf(`%s-%d"`, strings.TrimSuffix(opaque(), `"`), len(parts))
	}
	if no := s.store(q, o, a); no != nil {
		return no
	}
	u.claims.tell(a.header)
	a.header.Del("Etag") // it is in the body
	a.xml(struct {
		XMLName                     xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ CompleteMultipartUploadResult"`
		Location, Bucket, Key, ETag string
	}{Location: s.URL() + q.URL.EscapedPath(), Bucket: u.bucket, Key: u.key, ETag: o.ETag})
	return nil
}

func (s *S3) abortUpload(q *request, a *answer) *refusal {
	s.mu.Lock()
	defer s.mu.Unlock()
	u, no := s.upload(q)
	if no != nil {
		return no
	}
	delete(s.uploads, u.id)
	a.status = http.StatusNoContent
	return nil
}

type listedPart struct {
	PartNumber         int
	LastModified, ETag string
	Size               int64
}

func (s *S3) listParts(q *request, a *answer) *refusal {
	most, no := number(q.query, "max-parts")
	if no != nil {
		return no
	}
	after, _ := strconv.Atoi(q.query.Get("part-number-marker"))
	s.mu.Lock()
	defer s.mu.Unlock()
	u, no := s.upload(q)
	if no != nil {
		return no
	}
	out := struct {
		XMLName                        xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListPartsResult"`
		Bucket, Key, UploadId          string
		PartNumberMarker               int
		NextPartNumberMarker, MaxParts int
		IsTruncated                    bool
		StorageClass                   string
		Part                           []listedPart
	}{Bucket: u.bucket, Key: u.key, UploadId: u.id, PartNumberMarker: after, MaxParts: most, StorageClass: "STANDARD"}
	for _, n := range slices.Sorted(maps.Keys(u.parts)) {
		if n <= after {
			continue
		}
		if len(out.Part) == most {
			out.IsTruncated = true
			break
		}
		p := u.parts[n]
		out.Part = append(out.Part, listedPart{n, p.modified.UTC().Format(timeXML), p.etag, p.size})
		out.NextPartNumberMarker = n
	}
	a.xml(out)
	return nil
}

type listedUpload struct{ Key, UploadId, StorageClass, Initiated string }

func (s *S3) listUploads(q *request, a *answer) *refusal {
	most, no := number(q.query, "max-uploads")
	if no != nil {
		return no
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := struct {
		XMLName                           xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListMultipartUploadsResult"`
		Bucket, Prefix                    string
		KeyMarker, UploadIdMarker         string
		NextKeyMarker, NextUploadIdMarker string `xml:",omitempty"`
		MaxUploads                        int
		IsTruncated                       bool
		Upload                            []listedUpload
	}{Bucket: q.Bucket, Prefix: q.query.Get("prefix"), KeyMarker: q.query.Get("key-marker"), UploadIdMarker: q.query.Get("upload-id-marker"), MaxUploads: most}
	order := func(a, b *upload) int { return cmp.Or(cmp.Compare(a.key, b.key), a.began.Compare(b.began)) }
	marker := &upload{key: out.KeyMarker}
	if u := s.uploads[out.UploadIdMarker]; u != nil {
		marker.began = u.began
	}
	for _, u := range slices.SortedFunc(maps.Values(s.uploads), order) {
		// Without an upload of the marker's key, all of that key are before it.
		before := order(u, marker) <= 0 || u.key == out.KeyMarker && out.UploadIdMarker == ""
		if u.bucket != q.Bucket || !strings.HasPrefix(u.key, out.Prefix) || before {
			continue
		}
		if len(out.Upload) == most {
			out.IsTruncated = true
			break
		}
		out.Upload = append(out.Upload, listedUpload{u.key, u.id, "STANDARD", u.began.UTC().Format(timeXML)})
		out.NextKeyMarker, out.NextUploadIdMarker = u.key, u.id
	}
	if !out.IsTruncated {
		out.NextKeyMarker, out.NextUploadIdMarker = "", ""
	}
	a.xml(out)
	return nil
}
