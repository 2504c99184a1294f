package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
)

// emrExample reads one of testdata/emr: the examples of EMR's documentation, by what is in them.
func emrExample(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata/emr", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

const emrKey = "arn:aws:kms:us-east-1:123456789012:key/12345678-1234-1234-1234-123456789012"

// TestImportEMR: of each example the disk part is taken, or it is said why not, and every other part is named.
func TestImportEMR(t *testing.T) {
	const (
		rest    = "EncryptionConfiguration.AtRestEncryptionConfiguration."
		disk    = rest + "LocalDiskEncryptionConfiguration"
		s3      = rest + "S3EncryptionConfiguration"
		transit = "EncryptionConfiguration.InTransitEncryptionConfiguration"
	)
	for name, want := range map[string]struct {
		notes   []string // paths, "+" before what is taken
		nothing string
	}{
		"sse-s3-and-disk":            {[]string{"+" + disk, s3}, ""},
		"sse-kms-and-disk":           {[]string{transit, "+" + disk, s3}, ""},
		"cse-kms-and-custom-disk":    {[]string{transit, disk, s3}, "Custom provider"},
		"cse-custom-and-custom-disk": {[]string{transit, disk, s3}, "Custom provider"},
		"overrides-without-disk":     {[]string{s3, s3 + ".Overrides.0", s3 + ".Overrides.1", s3 + ".Overrides.2"}, "no LocalDiskEncryptionConfiguration"},
		"sse-s3-without-disk":        {[]string{s3}, "no LocalDiskEncryptionConfiguration"},
		"disk":                       {[]string{"+" + disk}, ""},
		"disk-and-ebs":               {[]string{"+" + disk, disk + ".EnableEbsEncryption"}, ""},
		"in-transit-only":            {[]string{transit}, "no LocalDiskEncryptionConfiguration"},
		"wal-only":                   {[]string{"EncryptionConfiguration.EMRWALEncryptionConfiguration"}, "no LocalDiskEncryptionConfiguration"},
		"everything-else": {[]string{"AuthenticationConfiguration", "AuthorizationConfiguration", "+" + disk,
			"InstanceMetadataServiceConfiguration"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ImportEMR(emrExample(t, name), "")
			var nothing *EMRNothingError
			switch {
			case want.nothing == "" && (err != nil || got.KMSKey != emrKey):
				t.Errorf("key %q, %v", got.KMSKey, err)
			case want.nothing != "" && (!errors.As(err, &nothing) || !strings.Contains(err.Error(), want.nothing) || got.KMSKey != ""):
				t.Errorf("key %q, %v, want %q", got.KMSKey, err, want.nothing)
			}
			var notes []string
			for _, n := range got.Notes {
				path := n.Path
				if n.Taken {
					path = "+" + path
				}
				if n.Text == "" {
					t.Errorf("%s: nothing is said", path)
				}
				notes = append(notes, path)
			}
			if !slices.Equal(notes, want.notes) {
				t.Errorf("notes are\n%q, want\n%q", notes, want.notes)
			}
			if want.nothing == "" {
				loads(t, got)
			}
		})
	}
}

// loads writes the configuration of an import to a file and loads it as the agent does.
func loads(t *testing.T, i EMRImport) {
	t.Helper()
	text, err := i.Config()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := LoadConfig(path)
	want := defaultConfig(path)
	want.KMSKey = i.KMSKey
	if err != nil || !slices.Equal([]any{got.KMSKey, got.EBS, got.InstanceStore}, []any{want.KMSKey, want.EBS, want.InstanceStore}) {
		t.Fatalf("%v: %+v, want %+v, of\n%s", err, got, want, text)
	}
	if _, err := New(got, zap.NewNop(), Program{}); err != nil {
		t.Fatalf("%v, of\n%s", err, text)
	}
}

// TestMalformedEMR: what is not understood is refused at its place, so that nothing which was meant is passed over.
func TestMalformedEMR(t *testing.T) {
	disk := func(fields string) string {
		return `{"EncryptionConfiguration": {"EnableAtRestEncryption": true, "AtRestEncryptionConfiguration": {` + "\n" +
			`"LocalDiskEncryptionConfiguration": {` + fields + `}}}}`
	}
	kms := `"EncryptionKeyProviderType": "AwsKms", "AwsKmsKey": "` + emrKey + `"`
	for text, want := range map[string]string{
		"":                                   "line 1, column 1: it ends too early",
		"\n{":                                "line 2, column 2: it ends too early",
		"[]":                                 "line 1, column 1: the security configuration must be an object",
		"{}\n,":                              "line 2, column 1: there is something after",
		"{} {}":                              "line 1, column 4: there is something after",
		`{"a": nope}`:                        "line 1, column 7: it is not JSON",
		"{\n \"Encryption\": {}}":            "line 2, column 2: unknown field \"Encryption\" in the security configuration (allowed: ",
		`{"SecurityConfiguration": "x"}`:     "unknown field",
		`{"encryptionConfiguration": {}}`:    "unknown field",
		`{"EncryptionConfiguration": []}`:    "EncryptionConfiguration must be an object",
		`{"AuthorizationConfiguration": []}`: "must be an object",
		`{"AuthorizationConfiguration": {"a": {"b": 1, "b": 2}}}`:                 `line 1, column 47: field "b" stands twice`,
		`{"EncryptionConfiguration": {"EnableAtRestEncryption": "yes"}}`:          "must be true or false",
		`{"InstanceMetadataServiceConfiguration": {"HttpTokens": "required"}}`:    "unknown field",
		`{"InstanceMetadataServiceConfiguration": {"HttpPutResponseHopLimit":{}}`: "ends too early",
		strings.Repeat("[", 100):                      "nested deeper than 32",
		disk(kms + `, "Foo": 1`):                      `line 2, column 169: unknown field "Foo" in EncryptionConfiguration.AtRestEncryptionConfiguration.LocalDiskEncryptionConfiguration`,
		disk(kms + `, "AwsKmsKey": "x"`):              `field "AwsKmsKey" stands twice`,
		disk(""):                                      "has no EncryptionKeyProviderType",
		disk(`"EncryptionKeyProviderType": "AwsKms"`): "has no AwsKmsKey",
		disk(`"EncryptionKeyProviderType": "AWSKMS"`): "(allowed: AwsKms, Custom)",
		disk(`"EncryptionKeyProviderType": "AwsKms", "AwsKmsKey": "my key"`):               "line 2, column 90: ",
		disk(kms + `, "S3Object": "s3://x"`):                                               "which are for Custom",
		strings.Repeat(" ", maxEMR) + "{}":                                                 "longer than",
		strings.Replace(string(emrExample(t, "sse-s3-without-disk")), "SSE-S3", "S3", 1):   "(allowed: SSE-S3, SSE-KMS, CSE-KMS, CSE-Custom)",
		strings.Replace(string(emrExample(t, "overrides-without-disk")), "Bucket", "B", 1): "unknown field \"BName\"",
	} {
		_, err := ImportEMR([]byte(text), "")
		var malformed *EMRError
		if !errors.As(err, &malformed) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.200s:\n%v, want %q", text, err, want)
		}
	}
}

// TestEMRKeysThatCannotBeUsed: there is nothing to take where EMR would not encrypt either, or the nodes could not.
func TestEMRKeysThatCannotBeUsed(t *testing.T) {
	for from, to := range map[string]string{
		`"EnableAtRestEncryption": true`:           `"EnableAtRestEncryption": false`,
		`"EnableAtRestEncryption": true,`:          ``,
		"key/12345678-1234-1234-1234-123456789012": "alias/aws/ebs",
		`"AwsKms"`: `"Custom"`,
	} {
		text := strings.Replace(string(emrExample(t, "disk")), from, to, 1)
		got, err := ImportEMR([]byte(text), "")
		var nothing *EMRNothingError
		if !errors.As(err, &nothing) || got.KMSKey != "" {
			t.Errorf("%s: key %q, %v", text, got.KMSKey, err)
		}
	}
}

// FuzzImportEMR: whatever is given, the answer is an error of its kind or a configuration that loads and has the key that stands there.
func FuzzImportEMR(f *testing.F) {
	examples, err := filepath.Glob("testdata/emr/*.json")
	if err != nil || len(examples) < 10 {
		f.Fatalf("%d examples, %v", len(examples), err)
	}
	for _, name := range examples {
		f.Add(emrExample(f, strings.TrimSuffix(filepath.Base(name), ".json")))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := ImportEMR(data, "my-escrow")
		var (
			malformed *EMRError
			nothing   *EMRNothingError
		)
		switch {
		case err == nil:
			loads(t, got)
		case got.KMSKey != "":
			t.Errorf("a key beside an error: %v", err)
		case errors.As(err, &malformed):
			lines := strings.Split(string(data), "\n")
			if malformed.Line < 1 || malformed.Line > len(lines) || malformed.Column < 1 || malformed.Column > len(lines[malformed.Line-1])+1 {
				t.Errorf("%v is no place in %q", err, data)
			}
		case !errors.As(err, &nothing):
			t.Errorf("%T: %v", err, err)
		}
	})
}

// TestImportEMRForAnEscrow: what EMRFS does with what it puts into S3, the escrow does.
func TestImportEMRForAnEscrow(t *testing.T) {
	const rest = `{"EncryptionConfiguration":{"EnableAtRestEncryption":%s,"AtRestEncryptionConfiguration":{"LocalDiskEncryptionConfiguration":{"EncryptionKeyProviderType":"AwsKms","AwsKmsKey":"` + emrKey + `"},"S3EncryptionConfiguration":{%s}}}}`
	for name, c := range map[string]struct{ atRest, s3, bucket, mode, says string }{
		"SSE-KMS":               {"true", `"EncryptionMode":"SSE-KMS","AwsKmsKey":"` + emrKey + `"`, "my-escrow", "sse-kms", "by sse-kms under " + emrKey},
		"CSE-KMS":               {"true", `"EncryptionMode":"CSE-KMS","AwsKmsKey":"` + emrKey + `"`, "my-escrow", "cse-kms", "by cse-kms under " + emrKey},
		"no bucket":             {"true", `"EncryptionMode":"SSE-KMS","AwsKmsKey":"` + emrKey + `"`, "", "", "--escrow-bucket NAME"},
		"SSE-S3":                {"true", `"EncryptionMode":"SSE-S3"`, "my-escrow", "", "under keys of its own"},
		"AWS's key":             {"true", `"EncryptionMode":"SSE-KMS","AwsKmsKey":"alias/aws/s3"`, "my-escrow", "", "AWS managed"},
		"no key":                {"true", `"EncryptionMode":"SSE-KMS"`, "my-escrow", "", "is no key ARN"},
		"a bucket that is none": {"true", `"EncryptionMode":"SSE-KMS","AwsKmsKey":"` + emrKey + `"`, "My_Escrow", "", "is no bucket's name"},
		"not at rest":           {"false", `"EncryptionMode":"SSE-KMS","AwsKmsKey":"` + emrKey + `"`, "my-escrow", "", "EnableAtRestEncryption is not true"},
		"an override":           {"true", `"EncryptionMode":"SSE-S3","Overrides":[{"BucketName":"b","EncryptionMode":"SSE-KMS","AwsKmsKey":"` + emrKey + `"}]`, "my-escrow", "", "an escrow has one bucket"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ImportEMR(fmt.Appendf(nil, rest, c.atRest, c.s3), c.bucket)
			if c.atRest == "true" && err != nil {
				t.Fatal(err)
			}
			want := EscrowConfig{}
			if c.mode != "" {
				want = EscrowConfig{Bucket: c.bucket, Mode: c.mode, KMSKey: emrKey}
			}
			if got.Escrow != want {
				t.Errorf("%+v, want %+v", got.Escrow, want)
			}
			if !slices.ContainsFunc(got.Notes, func(n EMRNote) bool { return strings.Contains(n.Text, c.says) }) {
				t.Errorf("%+v do not say %q", got.Notes, c.says)
			}
			text, err := got.Config()
			if err != nil {
				t.Fatal(err)
			}
			if c.mode != "" {
				cfg, err := parseConfig("c", text)
				want.Prefix = "luks-kms-agent/"
				if err != nil || cfg.Escrow != want {
					t.Errorf("%s\n%v: %+v", text, err, cfg.Escrow)
				}
			} else if strings.Contains(string(text), "escrow") {
				t.Errorf("%s", text)
			}
		})
	}
}
