package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

// EMR's security configurations are documented in
// https://docs.aws.amazon.com/emr/latest/ManagementGuide/emr-create-security-configuration.html

// EMRImport is what was found in a security configuration of Amazon EMR.
type EMRImport struct {
	// KMSKey is the key of the local disk encryption.
	KMSKey string
	// Escrow is how EMRFS encrypts what it puts into S3, for the bucket that was given; without one it is zero.
	Escrow EscrowConfig
	// Logs is where the logs of a cluster go, and under which key, of [EMRImport.TakeLogs]; without one it is zero.
	Logs LogsConfig
	// Notes tell of every part what became of it.
	Notes []EMRNote
}

// EMRNote tells what became of one part of a security configuration, or of a cluster.
type EMRNote struct {
	Path  string // of the fields: "EncryptionConfiguration.EnableAtRestEncryption"
	Taken bool
	Text  string
}

// EMRError is a security configuration or a cluster that cannot be understood, and the place of the cause.
type EMRError struct {
	Cluster      bool
	Line, Column int // from 1; the column counts bytes
	Err          error
}

func (e *EMRError) Error() string {
	if e.Cluster {
		return fmt.Sprintf("cannot read the description of the cluster: line %d, column %d: %v", e.Line, e.Column, e.Err)
	}
	return fmt.Sprintf("cannot read the security configuration: line %d, column %d: %v", e.Line, e.Column, e.Err)
}

func (e *EMRError) Unwrap() error { return e.Err }

// EMRNothingError is a security configuration that has no local disk encryption under KMS.
type EMRNothingError struct{ Reason string }

func (e *EMRNothingError) Error() string {
	return "cannot take local disk encryption from the security configuration: " + e.Reason
}

// maxEMR is far above what EMR takes, in bytes.
const maxEMR = 1 << 20

// ImportEMR reads a security configuration strictly: an unknown or repeated field, or a value that the field cannot have, is an
// *[EMRError]. Where there is no local disk encryption under KMS the error is an *[EMRNothingError], and the notes are there all the same.
//
// A security configuration names no bucket: where escrowBucket is not "", the mode and the key of its S3 encryption become those of an escrow in it.
func ImportEMR(data []byte, escrowBucket string) (EMRImport, error) {
	e := emrReader{data: data, bucket: escrowBucket}
	root, err := e.parse()
	if err != nil {
		return EMRImport{}, err
	}
	if err := e.configuration(root); err != nil {
		return EMRImport{}, err
	}
	if e.found.KMSKey == "" {
		return e.found, &EMRNothingError{Reason: e.nothing}
	}
	return e.found, nil
}

// Config is the agent's configuration file with what was taken.
func (i EMRImport) Config() ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("# The local disk encryption of an Amazon EMR security configuration. All fields: docs/configuration.md.\n")
	type escrow struct {
		Bucket string `yaml:"bucket"`
		Mode   string `yaml:"mode"`
		KMSKey string `yaml:"kms_key"`
	}
	type logs struct {
		Bucket  string   `yaml:"bucket"`
		Prefix  string   `yaml:"prefix,omitempty"`
		Cluster string   `yaml:"cluster"`
		KMSKey  string   `yaml:"kms_key,omitempty"`
		Files   []string `yaml:"files,flow"`
	}
	file := struct {
		KMSKey string  `yaml:"kms_key"`
		Escrow *escrow `yaml:"escrow,omitempty"`
		Logs   *logs   `yaml:"logs,omitempty"`
	}{KMSKey: i.KMSKey}
	if l := i.Logs; l.Bucket != "" {
		file.Logs = &logs{l.Bucket, l.Prefix, l.Cluster, l.KMSKey, l.Files}
	}
	if i.Escrow.Bucket != "" {
		file.Escrow = &escrow{i.Escrow.Bucket, i.Escrow.Mode, i.Escrow.KMSKey}
	}
	err := yaml.NewEncoder(&b).Encode(file)
	return b.Bytes(), err
}

// emrReader reads one security configuration, or one cluster.
type emrReader struct {
	cluster bool
	data    []byte
	found   EMRImport
	nothing string // why there is no local disk encryption under KMS
	bucket  string // for the escrow
}

// emrValue is a JSON value and the place where it begins.
type emrValue struct {
	offset int64
	scalar any // string, json.Number, bool or nil, where it is no list or object
	list   []emrValue
	fields []emrField
	kind   json.Delim // '{', '[' or 0
}

type emrField struct {
	name   string
	offset int64
	value  emrValue
}

func (e *emrReader) fail(offset int64, format string, args ...any) error {
	before := e.data[:min(max(offset, 0), int64(len(e.data)))]
	return &EMRError{
		Cluster: e.cluster,
		Line:    1 + bytes.Count(before, []byte("\n")),
		Column:  len(before) - bytes.LastIndexByte(before, '\n'),
		Err:     fmt.Errorf(format, args...),
	}
}

// parse reads exactly one JSON object in which no object has a field twice.
func (e *emrReader) parse() (emrValue, error) {
	if len(e.data) > maxEMR {
		return emrValue{}, e.fail(maxEMR, "it is longer than %d bytes", maxEMR)
	}
	dec := json.NewDecoder(bytes.NewReader(e.data))
	dec.UseNumber()
	root, err := e.value(dec, 0)
	if err != nil {
		return emrValue{}, err
	}
	if rest := bytes.TrimLeft(e.data[dec.InputOffset():], " \t\r\n"); len(rest) > 0 {
		return emrValue{}, e.fail(int64(len(e.data)-len(rest)), "there is something after %s", e.where(""))
	}
	return root, nil
}

// next is where the next token begins: the decoder stands behind the last one.
func (e *emrReader) next(dec *json.Decoder) int64 {
	at := dec.InputOffset()
	return at + int64(len(e.data[at:])-len(bytes.TrimLeft(e.data[at:], " \t\r\n,:")))
}

// maxEMRDepth is far above the depth of any security configuration.
const maxEMRDepth = 32

func (e *emrReader) token(dec *json.Decoder) (json.Token, error) {
	at := e.next(dec)
	tok, err := dec.Token()
	var syntax *json.SyntaxError
	switch {
	case err == nil:
		return tok, nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, e.fail(int64(len(e.data)), "it ends too early")
	case errors.As(err, &syntax):
		return nil, e.fail(at, "it is not JSON: %w", err)
	}
	return nil, e.fail(at, "%w", err)
}

func (e *emrReader) value(dec *json.Decoder, depth int) (emrValue, error) {
	v := emrValue{offset: e.next(dec)}
	if depth > maxEMRDepth {
		return v, e.fail(v.offset, "values are nested deeper than %d", maxEMRDepth)
	}
	tok, err := e.token(dec)
	if err != nil {
		return v, err
	}
	delim, nested := tok.(json.Delim)
	if !nested {
		v.scalar = tok
		return v, nil
	}
	v.kind = delim
	seen := map[string]bool{}
	for dec.More() {
		if delim == '[' {
			item, err := e.value(dec, depth+1)
			if err != nil {
				return v, err
			}
			v.list = append(v.list, item)
			continue
		}
		f := emrField{offset: e.next(dec)}
		tok, err := e.token(dec)
		if err != nil {
			return v, err
		}
		f.name, _ = tok.(string)
		if seen[f.name] {
			return v, e.fail(f.offset, "field %q stands twice", f.name)
		}
		seen[f.name] = true
		if f.value, err = e.value(dec, depth+1); err != nil {
			return v, err
		}
		v.fields = append(v.fields, f)
	}
	_, err = e.token(dec) // the closing delimiter
	return v, err
}

// emrFields are the fields that an object may have, and who reads each.
type emrFields map[string]func(path string, v emrValue) error

// object reads an object whose fields are all known, in the order of the file.
func (e *emrReader) object(path string, v emrValue, known emrFields) error {
	if v.kind != '{' {
		return e.fail(v.offset, "%s must be an object", e.where(path))
	}
	for _, f := range v.fields {
		read, ok := known[f.name]
		if !ok {
			return e.fail(f.offset, "unknown field %q in %s (allowed: %s)", f.name, e.where(path), strings.Join(sortedKeys(known), ", "))
		}
		if err := read(join(path, f.name), f.value); err != nil {
			return err
		}
	}
	return nil
}

func (e *emrReader) where(path string) string {
	switch {
	case path != "":
		return path
	case e.cluster:
		return "the description of the cluster"
	}
	return "the security configuration"
}

// text reads a string, one of those that are allowed where there are any.
func (e *emrReader) text(to *string, allowed ...string) func(string, emrValue) error {
	return func(path string, v emrValue) error {
		s, ok := v.scalar.(string)
		switch {
		case !ok || s == "":
			return e.fail(v.offset, "%s must be a text, not empty", path)
		case len(allowed) > 0 && !slices.Contains(allowed, s):
			return e.fail(v.offset, "%s is %q (allowed: %s)", path, s, strings.Join(allowed, ", "))
		}
		*to = s
		return nil
	}
}

// flag reads true or false; EMR's own examples have them in quotes too.
func (e *emrReader) flag(to *bool) func(string, emrValue) error {
	return func(path string, v emrValue) error {
		switch v.scalar {
		case true, "true":
			*to = true
		case false, "false":
			*to = false
		default:
			return e.fail(v.offset, "%s must be true or false", path)
		}
		return nil
	}
}

func (e *emrReader) number(path string, v emrValue) error {
	if _, ok := v.scalar.(json.Number); !ok {
		return e.fail(v.offset, "%s must be a number", path)
	}
	return nil
}

func (e *emrReader) take(path, format string, args ...any) {
	e.found.Notes = append(e.found.Notes, EMRNote{Path: path, Taken: true, Text: fmt.Sprintf(format, args...)})
}

func (e *emrReader) leave(path, format string, args ...any) {
	e.found.Notes = append(e.found.Notes, EMRNote{Path: path, Text: fmt.Sprintf(format, args...)})
}

// whole leaves a part as a whole, because nothing in it is the agent's.
func (e *emrReader) whole(why string) func(string, emrValue) error {
	return func(path string, v emrValue) error {
		if v.kind != '{' {
			return e.fail(v.offset, "%s must be an object", path)
		}
		e.leave(path, "%s", why)
		return nil
	}
}

func (e *emrReader) configuration(root emrValue) error {
	e.nothing = "it has no EncryptionConfiguration"
	return e.object("", root, emrFields{
		"EncryptionConfiguration":     e.encryption,
		"AuthenticationConfiguration": e.whole("who may log in (Kerberos) is not the agent's"),
		"AuthorizationConfiguration":  e.whole("who may read what in S3 and in tables is not the agent's"),
		"InstanceMetadataServiceConfiguration": func(path string, v emrValue) error {
			e.leave(path, "the agent always uses IMDSv2; its settings belong to the launch of the instance")
			return e.object(path, v, emrFields{
				"MinimumInstanceMetadataServiceVersion": e.number, "HttpPutResponseHopLimit": e.number,
			})
		},
	})
}

func (e *emrReader) encryption(path string, v emrValue) error {
	atRest, inTransit := false, false
	var disk *emrValue
	var s3 func() error
	err := e.object(path, v, emrFields{
		"EnableAtRestEncryption":    e.flag(&atRest),
		"EnableInTransitEncryption": e.flag(&inTransit),
		"InTransitEncryptionConfiguration": e.whole(
			"TLS between the nodes is the applications'; the agent encrypts what is at rest"),
		"EMRWALEncryptionConfiguration": e.whole("EMR WAL is a service of EMR's, not a disk of the node"),
		"AtRestEncryptionConfiguration": func(path string, v emrValue) error {
			return e.object(path, v, emrFields{
				"S3EncryptionConfiguration": func(path string, v emrValue) error {
					s3 = func() error { return e.s3(path, v, atRest, false) }
					return nil
				},
				"LocalDiskEncryptionConfiguration": func(_ string, v emrValue) error { disk = &v; return nil },
			})
		},
	})
	if err != nil {
		return err
	}
	// Whether encryption at rest is on may stand below what it is about.
	at := join(path, "AtRestEncryptionConfiguration")
	if disk == nil {
		e.nothing = "it has no LocalDiskEncryptionConfiguration"
	} else if err := e.disk(join(at, "LocalDiskEncryptionConfiguration"), *disk, atRest); err != nil {
		return err
	}
	if s3 != nil {
		return s3()
	}
	return nil
}

func (e *emrReader) disk(path string, v emrValue, atRest bool) error {
	var provider, key, object, class string
	ebs := false
	keyAt := v.offset
	err := e.object(path, v, emrFields{
		"EncryptionKeyProviderType":  e.text(&provider, "AwsKms", "Custom"),
		"AwsKmsKey":                  func(path string, v emrValue) error { keyAt = v.offset; return e.text(&key)(path, v) },
		"EnableEbsEncryption":        e.flag(&ebs),
		"S3Object":                   e.text(&object),
		"EncryptionKeyProviderClass": e.text(&class),
	})
	if err != nil {
		return err
	}
	switch {
	case provider == "":
		return e.fail(v.offset, "%s has no EncryptionKeyProviderType", path)
	case provider == "Custom":
		e.leave(path, "a key provider of your own (class %s in %s) is Java code that runs in EMR; the agent has KMS only", orNone(class), orNone(object))
		e.nothing = "its keys come from a Custom provider, not from KMS"
		return nil
	case key == "":
		return e.fail(v.offset, "%s has no AwsKmsKey, which AwsKms needs", path)
	case object != "" || class != "":
		return e.fail(v.offset, "%s has S3Object or EncryptionKeyProviderClass, which are for Custom", path)
	case !atRest:
		e.leave(path, "EnableAtRestEncryption is not true: EMR itself encrypts nothing under this configuration")
		e.nothing = "EnableAtRestEncryption is not true"
		return nil
	}
	if _, err := keycache.New(keycache.Options{KeyID: key}); err != nil {
		var kms *keycache.Error
		if errors.As(err, &kms) && kms.Reason == keycache.ReasonAWSManaged {
			e.leave(join(path, "AwsKmsKey"), "%s is an AWS managed key, which nodes of your own cannot use", key)
			e.nothing = "its key is AWS managed; make a customer managed one"
			return nil
		}
		return e.fail(keyAt, "%s is %q, want the ARN of a KMS key", join(path, "AwsKmsKey"), key)
	}
	e.found.KMSKey = key
	e.take(path, "kms_key: %s; instance store and EBS data volumes become LUKS2 volumes under it", key)
	if ebs {
		e.leave(join(path, "EnableEbsEncryption"), "this is EBS's own encryption of the volumes, the boot volume included: "+
			"switch it on when you launch the instance. The agent encrypts EBS data volumes besides, unless `ebs: ignore` is set")
	}
	return nil
}

func (e *emrReader) s3(path string, v emrValue, atRest, override bool) error {
	var mode, key, object, class, bucket string
	known := emrFields{
		"EncryptionMode":             e.text(&mode, "SSE-S3", "SSE-KMS", "CSE-KMS", "CSE-Custom"),
		"AwsKmsKey":                  e.text(&key),
		"S3Object":                   e.text(&object),
		"EncryptionKeyProviderClass": e.text(&class),
	}
	var overrides []emrValue
	if override {
		known["BucketName"] = e.text(&bucket)
	} else {
		known["Overrides"] = func(path string, v emrValue) error {
			if v.kind != '[' {
				return e.fail(v.offset, "%s must be a list", path)
			}
			overrides = v.list
			return nil
		}
	}
	if err := e.object(path, v, known); err != nil {
		return err
	}
	if mode == "" {
		return e.fail(v.offset, "%s has no EncryptionMode", path)
	}
	why := map[string]string{
		"SSE-S3":     "S3 encrypts by itself, under keys of its own, which no escrow uses",
		"SSE-KMS":    "S3 encrypts and asks KMS, as in an escrow: --escrow-bucket NAME takes mode and key for one",
		"CSE-KMS":    "the cluster's S3 client asks KMS and encrypts, as in an escrow: --escrow-bucket NAME takes mode and key for one",
		"CSE-Custom": "the cluster's S3 client encrypts by Java code of your own",
	}[mode]
	ours := EscrowConfig{Bucket: e.bucket, Mode: strings.ToLower(mode), KMSKey: key}
	switch kms := mode == "SSE-KMS" || mode == "CSE-KMS"; {
	case override:
		e.leave(path, "%s for bucket %s: an escrow has one bucket", mode, bucket)
	case !kms || e.bucket == "":
		e.leave(path, "%s: %s", mode, why)
	case !atRest:
		e.leave(path, "EnableAtRestEncryption is not true: EMR itself encrypts nothing under this configuration")
	default:
		if err := ours.options().Check(); err != nil {
			e.leave(path, "%s: %v", mode, err)
			break
		}
		e.found.Escrow = ours
		e.take(path, "escrow: copies of LUKS headers and key records go to %s, by %s under %s", ours.Bucket, ours.Mode, ours.KMSKey)
	}
	for i, o := range overrides {
		if err := e.s3(fmt.Sprintf("%s.Overrides.%d", path, i), o, atRest, true); err != nil {
			return err
		}
	}
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "not named"
	}
	return s
}
