package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

const (
	emrLogKey  = "arn:aws:kms:us-east-1:123456789012:key/87654321-4321-4321-4321-210987654321"
	emrCluster = `{"Cluster": {"Id": "j-1", "ClusterArn": "arn:aws:elasticmapreduce:us-east-1:123456789012:cluster/j-1",
 "Status": {"State": "RUNNING"}, "LogUri": "s3://my-logs/a/b/", "LogEncryptionKmsKeyId": "` + emrLogKey + `"}}`
)

// TestImportEMRCluster: the section logs is what the cluster has, as the agent reads it, or is not there, and it is said why.
func TestImportEMRCluster(t *testing.T) {
	good := LogsConfig{Bucket: "my-logs", Prefix: "a/b/", Cluster: "j-1", KMSKey: emrLogKey, Files: emrLogFiles}
	with := func(change func(*LogsConfig)) *LogsConfig { l := good; change(&l); return &l }
	same := func(*LogsConfig) {}
	for name, c := range map[string]struct {
		from, to string
		want     *LogsConfig // nil for none
		path     string      // of a note, "+" before what is taken, and
		says     string      // what is in it
	}{
		"as EMR has it":         {"", "", with(same), "+Cluster.LogUri", "s3://my-logs/a/b/j-1/node/INSTANCE-ID/"},
		"its key":               {"", "", with(same), "+Cluster.LogEncryptionKmsKeyId", "logs.kms_key: " + emrLogKey},
		"s3n":                   {"s3://", "s3n://", with(same), "+Cluster.LogUri", ""},
		"no slash at the end":   {"/a/b/", "/a/b", with(same), "+Cluster.LogUri", ""},
		"no folder":             {"/a/b/", "/", with(func(l *LogsConfig) { l.Prefix = "logs/" }), "+Cluster.LogUri", "s3://my-logs/logs/j-1/node/"},
		"a bucket and no more":  {"/a/b/", "", with(func(l *LogsConfig) { l.Prefix = "logs/" }), "+Cluster.LogUri", ""},
		"a folder like a word":  {"/a/b/", "/true/", with(func(l *LogsConfig) { l.Prefix = "true/" }), "+Cluster.LogUri", ""},
		"a folder of no name":   {"/a/b/", "/a//b/", nil, "Cluster.LogUri", "a folder without a name"},
		"a folder above":        {"/a/b/", "/a/../b/", nil, "Cluster.LogUri", "two dots"},
		"HDFS":                  {"s3://", "hdfs://", nil, "Cluster.LogUri", "is no place in S3"},
		"no bucket":             {"my-logs", "", nil, "Cluster.LogUri", "is no place in S3"},
		"a bucket that is none": {"my-logs", "My_Logs", nil, "Cluster", "is no bucket's name"},
		"no LogUri":             {`"LogUri": "s3://my-logs/a/b/", `, ``, nil, "Cluster.LogUri", "EMR archives no logs"},
		"LogUri is null":        {`"s3://my-logs/a/b/"`, `null`, nil, "Cluster.LogUri", "EMR archives no logs"},
		"no key": {`, "LogEncryptionKmsKeyId": "` + emrLogKey + `"`, ``, with(func(l *LogsConfig) { l.KMSKey = emrKey }),
			"Cluster.LogEncryptionKmsKeyId", "EMR encrypts these logs under no customer managed key. The agent encrypts its own under kms_key"},
		"a key id":                  {"arn:aws:kms:us-east-1:123456789012:key/", "", with(same), "+Cluster.LogEncryptionKmsKeyId", "of the cluster's account and region"},
		"a key id, and no ARN":      {`"ClusterArn": "arn:aws:elasticmapreduce:us-east-1:123456789012:cluster/j-1",`, ``, with(same), "+Cluster.LogUri", ""},
		"an alias":                  {emrLogKey, "alias/logs", nil, "Cluster.LogEncryptionKmsKeyId", "`aws kms describe-key --key-id alias/logs --query KeyMetadata.Arn`"},
		"an alias's ARN":            {":key/87654321-4321-4321-4321-210987654321", ":alias/logs", nil, "Cluster.LogEncryptionKmsKeyId", "is no key ARN"},
		"AWS's key":                 {emrLogKey, "alias/aws/s3", nil, "Cluster", "alias/aws/s3 is an AWS managed key"},
		"something that is no key":  {emrLogKey, "my key", nil, "Cluster", "is no key ARN"},
		"a key of another account":  {":123456789012:key", ":999999999999:key", with(func(l *LogsConfig) { l.KMSKey = strings.Replace(emrLogKey, "123456789012", "999999999999", 1) }), "+Cluster.LogUri", ""},
		"what we know nothing of":   {`"Status"`, `"Ec2InstanceAttributes": {"a": [{"b": null}]}, "Status"`, with(same), "+Cluster.LogUri", ""},
		"a cluster in a list of it": {`{"State": "RUNNING"}`, `[{"LogUri": "s3://elsewhere/"}]`, with(same), "+Cluster.LogUri", "s3://my-logs/"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.from != "" && !strings.Contains(emrCluster, c.from) {
				t.Fatalf("there is no %s", c.from)
			}
			got, err := ImportEMR(emrExample(t, "disk"), "")
			if err == nil {
				err = got.TakeLogs([]byte(strings.Replace(emrCluster, c.from, c.to, 1)))
			}
			if err != nil {
				t.Fatal(err)
			}
			path, taken := strings.CutPrefix(c.path, "+")
			if !slices.ContainsFunc(got.Notes, func(n EMRNote) bool { return n.Path == path && n.Taken == taken && strings.Contains(n.Text, c.says) }) {
				t.Errorf("%+v, want %s: %s", got.Notes, c.path, c.says)
			}
			text, err := got.Config()
			if err != nil {
				t.Fatal(err)
			}
			cfg, err := parseConfig("c", text)
			want := LogsConfig{}
			if c.want != nil {
				want = *c.want
				want.Spool, want.MaxSpool = "/var/spool/luks-kms-agent", 1024
			} else if strings.Contains(string(text), "logs") {
				t.Errorf("%s", text)
			} else {
				want = defaultConfig("c").Logs
			}
			if err != nil || fmt.Sprint(cfg.Logs) != fmt.Sprint(want) || cfg.KMSKey != emrKey {
				t.Errorf("%v: %+v, want %+v, of\n%s", err, cfg.Logs, want, text)
			}
		})
	}
}

// TestMalformedEMRCluster: what cannot be a cluster is refused at its place.
func TestMalformedEMRCluster(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "line 1, column 1: it ends too early",
		"{\"Cluster\": {\n\"Id\": j}}":    "line 2, column 7: it is not JSON",
		"[]":                              "line 1, column 1: the description of the cluster must be an object",
		"{} x":                            "line 1, column 4: there is something after the description of the cluster",
		" {}":                             "line 1, column 2: it has no Cluster",
		`{"Cluster": null}`:               "it has no Cluster",
		`{"Clusters": [{"Id": "j-1"}]}`:   "it has no Cluster",
		`{"Cluster": []}`:                 "line 1, column 13: Cluster must be an object",
		`{"Cluster": {}}`:                 `line 1, column 13: Cluster.Id is ""`,
		`{"Cluster": {"Id": 1}}`:          "line 1, column 20: Cluster.Id must be a text",
		`{"Cluster": {"Id": "a/b"}}`:      `Cluster.Id is "a/b"`,
		`{"Cluster": {"LogUri": {}}}`:     "Cluster.LogUri must be a text",
		`{"Cluster": {"LogUri": ""}}`:     "Cluster.LogUri must be a text, not empty",
		`{"Cluster": {"a": 1, "a": 2}}`:   `field "a" stands twice`,
		strings.Repeat(" ", maxEMR) + "{": "longer than",
	} {
		var found EMRImport
		err := found.TakeLogs([]byte(text))
		var malformed *EMRError
		if !errors.As(err, &malformed) || !malformed.Cluster || !strings.HasPrefix(err.Error(), "cannot read the description of the cluster: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100s:\n%v, want %q", text, err, want)
		}
		if found.Logs.Bucket != "" || found.Notes != nil {
			t.Errorf("%.100s: %+v", text, found)
		}
	}
}

// FuzzImportEMRCluster: whatever is given, the answer is an error of its kind or a configuration that loads.
func FuzzImportEMRCluster(f *testing.F) {
	f.Add([]byte(emrCluster))
	f.Add([]byte(strings.Replace(emrCluster, emrLogKey, "alias/a", 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		found := EMRImport{KMSKey: emrKey}
		var malformed *EMRError
		switch err := found.TakeLogs(data); {
		case err == nil:
			loads(t, found)
		case !errors.As(err, &malformed):
			t.Errorf("%T: %v", err, err)
		}
	})
}
