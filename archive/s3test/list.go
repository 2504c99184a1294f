package s3test

import (
	"encoding/base64"
	"encoding/xml"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// number reads a limit of the query, up to 1000.
func number(query url.Values, name string) (int, *refusal) {
	if !query.Has(name) {
		return 1000, nil
	}
	n, err := strconv.Atoi(query.Get(name))
	if err != nil || n < 0 {
		return 0, invalid("Argument %s must be an integer between 0 and 2147483647", name)
	}
	return min(n, 1000), nil
}

type listedObject struct {
	Key, LastModified, ETag string
	Size                    int64
	StorageClass            string
}

type listedPrefix struct{ Prefix string }

func (s *S3) listObjects(q *request, a *answer) *refusal {
	var out struct {
		XMLName                                                                       xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListBucketResult"`
		Name, Prefix                                                                  string
		Delimiter, StartAfter, ContinuationToken, NextContinuationToken, EncodingType string `xml:",omitempty"`
		KeyCount, MaxKeys                                                             int
		IsTruncated                                                                   bool
		Contents                                                                      []listedObject
		CommonPrefixes                                                                []listedPrefix
	}
	encode := func(key string) string { return key }
	if out.EncodingType = q.query.Get("encoding-type"); out.EncodingType == "url" {
		encode = func(key string) string { return strings.ReplaceAll(url.QueryEscape(key), "%2F", "/") }
	} else if out.EncodingType != "" {
		return invalid("Invalid Encoding Method specified in Request")
	}
	prefix, delimiter := q.query.Get("prefix"), q.query.Get("delimiter")
	out.Name, out.Prefix, out.Delimiter = q.Bucket, encode(prefix), encode(delimiter)
	out.StartAfter, out.ContinuationToken = encode(q.query.Get("start-after")), q.query.Get("continuation-token")
	most, no := number(q.query, "max-keys")
	if no != nil {
		return no
	}
	out.MaxKeys = most
	after := q.query.Get("start-after")
	if out.ContinuationToken != "" {
		text, err := base64.URLEncoding.DecodeString(out.ContinuationToken)
		if err != nil {
			return invalid("The continuation token provided is incorrect")
		}
		after = string(text)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	group, last := "", "" // the common prefix that was listed last, and the key that the list is at
	for _, key := range slices.Sorted(maps.Keys(s.objects[q.Bucket])) {
		if group != "" && strings.HasPrefix(key, group) {
			last = key
			continue
		}
		if key <= after || !strings.HasPrefix(key, prefix) {
			continue
		}
		if out.KeyCount == most {
			if out.IsTruncated = most > 0; out.IsTruncated {
				out.NextContinuationToken = base64.URLEncoding.EncodeToString([]byte(last))
			}
			break
		}
		out.KeyCount++
		last, group = key, ""
		if before, _, ok := strings.Cut(key[len(prefix):], delimiter); ok && delimiter != "" {
			group = prefix + before + delimiter
			out.CommonPrefixes = append(out.CommonPrefixes, listedPrefix{encode(group)})
			continue
		}
		o := s.newest(q.Bucket, key)
		out.Contents = append(out.Contents, listedObject{encode(key), o.Modified.UTC().Format(timeXML), o.ETag, o.Size, "STANDARD"})
	}
	a.xml(out)
	return nil
}

const timeXML = "2006-01-02T15:04:05.000Z"
