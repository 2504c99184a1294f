package s3test

import (
	"bufio"
	"bytes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
)

const (
	headerMeta     = "X-Amz-Meta-"
	headerChecksum = "X-Amz-Checksum-"

	limit = 256 << 20 // bytes of a body
)

var checksums = map[string]func() hash.Hash{
	headerChecksum + "Crc32":     func() hash.Hash { return crc32.NewIEEE() },
	headerChecksum + "Crc32c":    func() hash.Hash { return crc32.New(crc32.MakeTable(crc32.Castagnoli)) },
	headerChecksum + "Crc64nvme": func() hash.Hash { return crc64.New(crc64.MakeTable(0x9a6c9329ac4bc9b5)) },
	headerChecksum + "Sha1":      sha1.New,
	headerChecksum + "Sha256":    sha256.New,
}

// read takes the framing off a body and compares it with what the request says of it.
func (q *request) read(body []byte) *refusal {
	if len(body) > limit {
		return refuse(http.StatusBadRequest, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
	}
	if q.Method == http.MethodPut && q.ContentLength < 0 {
		return refuse(http.StatusLengthRequired, "MissingContentLength", "You must provide the Content-Length HTTP header.")
	}
	payload, trailer := q.Header.Get("X-Amz-Content-Sha256"), http.Header{}
	switch {
	case payload == "":
		return refuse(http.StatusBadRequest, "MissingSecurityHeader", "Missing required header for this request: x-amz-content-sha256")
	case strings.HasPrefix(payload, "STREAMING-"):
		var err error
		signed := strings.HasPrefix(payload, "STREAMING-AWS4-HMAC-SHA256-PAYLOAD")
		if body, trailer, err = unchunk(body, signed); err != nil || q.Header.Get("X-Amz-Decoded-Content-Length") != strconv.Itoa(len(body)) {
			return refuse(http.StatusBadRequest, "IncompleteBody", "The request body terminated unexpectedly: %d bytes, %v", len(body), err)
		}
		for name := range strings.FieldsFuncSeq(q.Header.Get("X-Amz-Trailer"), func(r rune) bool { return r == ',' || r == ' ' }) {
			if trailer.Get(name) == "" {
				return refuse(http.StatusBadRequest, "MalformedTrailerError", "The request contained trailing data that was not well-formed or did not conform to our published schema.")
			}
		}
	case len(payload) == 2*sha256.Size && payload != hex.EncodeToString(sum(sha256.New(), body)):
		return refuse(http.StatusBadRequest, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed.")
	}
	if want := q.Header.Get("Content-Md5"); want != "" {
		if value, err := base64.StdEncoding.DecodeString(want); err != nil || len(value) != md5.Size {
			return refuse(http.StatusBadRequest, "InvalidDigest", "The Content-MD5 you specified was invalid.")
		} else if !bytes.Equal(value, sum(md5.New(), body)) {
			return refuse(http.StatusBadRequest, "BadDigest", "The Content-MD5 you specified did not match what we received.")
		}
	}
	q.data, q.sums = body, http.Header{}
	for name, algorithm := range checksums {
		want := q.Header.Get(name) + trailer.Get(name)
		if want == "" {
			continue
		}
		h := algorithm()
		if value, err := base64.StdEncoding.DecodeString(want); err != nil || len(value) != h.Size() {
			return refuse(http.StatusBadRequest, "InvalidRequest", "Value for %s header is invalid.", strings.ToLower(name))
		} else if !bytes.Equal(value, sum(h, body)) {
			return refuse(http.StatusBadRequest, "BadDigest", "The %s you specified did not match the calculated checksum.", strings.ToUpper(strings.TrimPrefix(name, headerChecksum)))
		}
		q.sums.Set(name, want)
	}
	return nil
}

func sum(h hash.Hash, data []byte) []byte {
	h.Write(data) // never fails
	return h.Sum(nil)
}

// unchunk takes the framing of aws-chunked off: SIZE[;chunk-signature=…]\r\nDATA\r\n … 0\r\n, headers and an empty line.
func unchunk(raw []byte, signed bool) (data []byte, trailer http.Header, err error) {
	r := bufio.NewReader(bytes.NewReader(raw))
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return data, nil, fmt.Errorf("a chunk's size: %w", err)
		}
		text, extension, _ := strings.Cut(strings.TrimSuffix(line, "\r\n"), ";")
		size, err := strconv.ParseUint(text, 16, 32)
		if err != nil || signed != strings.HasPrefix(extension, "chunk-signature=") {
			return data, nil, fmt.Errorf("a chunk begins with %q", line)
		}
		if size == 0 {
			break
		}
		chunk := make([]byte, min(size, limit)+2)
		if _, err := io.ReadFull(r, chunk); err != nil {
			return data, nil, fmt.Errorf("a chunk of %d bytes: %w", size, err)
		}
		if !bytes.HasSuffix(chunk, []byte("\r\n")) {
			return data, nil, errors.New("a chunk is longer than it says")
		}
		data = append(data, chunk[:len(chunk)-2]...)
	}
	header, err := textproto.NewReader(r).ReadMIMEHeader()
	return data, http.Header(header), err
}
