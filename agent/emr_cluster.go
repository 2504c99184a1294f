package agent

import (
	"regexp"
	"slices"
	"strings"
)

// emrLogFiles are archived where a cluster says so. EMR tells where its logs go, not which they are.
var emrLogFiles = []string{"/var/log/*.log*", "/var/log/hadoop*/*"}

var (
	// s3n is an older name of Hadoop's for the same place.
	emrLogURI     = regexp.MustCompile(`^s3n?://([^/]+)(/.*)?$`)
	emrClusterARN = regexp.MustCompile(`^(arn:aws[a-z-]*):elasticmapreduce:([a-z0-9-]+:\d{12}):cluster/`)
	keyID         = regexp.MustCompile(`^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32})$`)
)

// TakeLogs reads the answer of EMR's DescribeCluster: where the cluster's logs go and under which key, which no security configuration has. What else it has is
// not looked into. What cannot be understood is an *[EMRError]; what cannot be taken is in the notes.
func (i *EMRImport) TakeLogs(cluster []byte) error {
	e := emrReader{cluster: true, data: cluster}
	root, err := e.parse()
	if err != nil {
		return err
	}
	found := map[string]emrField{}
	if err := e.fields("", root, found, "Cluster"); err != nil {
		return err
	}
	described, ok := found["Cluster"]
	if !ok {
		return e.fail(root.offset, "it has no Cluster")
	}
	if err := e.fields("Cluster", described.value, found, "Id", "ClusterArn", "LogUri", "LogEncryptionKmsKeyId"); err != nil {
		return err
	}
	var id, arn, uri, key string
	for _, want := range []struct {
		name string
		to   *string
	}{{"Id", &id}, {"ClusterArn", &arn}, {"LogUri", &uri}, {"LogEncryptionKmsKeyId", &key}} {
		if f, ok := found[want.name]; ok {
			if err := e.text(want.to)("Cluster."+want.name, f.value); err != nil {
				return err
			}
		}
	}
	if !clusterName.MatchString(id) {
		return e.fail(described.value.offset, "Cluster.Id is %q, want that of a cluster, as in j-3KVTXXXXXX7UG", id)
	}
	e.logs(i, id, arn, uri, key)
	i.Notes = append(i.Notes, e.found.Notes...)
	return nil
}

// fields finds the fields of an object that are looked at; null is absent.
func (e *emrReader) fields(path string, v emrValue, found map[string]emrField, names ...string) error {
	if v.kind != '{' {
		return e.fail(v.offset, "%s must be an object", e.where(path))
	}
	for _, f := range v.fields {
		if slices.Contains(names, f.name) && (f.value.kind != 0 || f.value.scalar != nil) {
			found[f.name] = f
		}
	}
	return nil
}

// logs makes the section of what a cluster has, as a whole or not at all: without its key the logs would go under another one.
func (e *emrReader) logs(i *EMRImport, id, arn, uri, key string) {
	const atURI, atKey = "Cluster.LogUri", "Cluster.LogEncryptionKmsKeyId"
	if uri == "" {
		e.leave(atURI, "it is absent: EMR archives no logs of this cluster")
		return
	}
	place := emrLogURI.FindStringSubmatch(uri)
	if place == nil {
		e.leave(atURI, "%s is no place in S3, as in s3://BUCKET/FOLDER/", uri)
		return
	}
	folder := strings.Trim(place[2], "/")
	if strings.Contains(folder, "//") || strings.Contains(folder, "..") {
		e.leave(atURI, "%s has a folder without a name, or with two dots in it, which logs.prefix does not take", uri)
		return
	}
	l := LogsConfig{Bucket: place[1], Cluster: id, Files: emrLogFiles}
	if folder != "" {
		l.Prefix = folder + "/"
	}
	why := ""
	switch in := emrClusterARN.FindStringSubmatch(arn); {
	case key == "":
		l.KMSKey = i.KMSKey // as the agent has it
	case keyID.MatchString(key) && in != nil:
		l.KMSKey, why = in[1]+":kms:"+in[2]+":key/"+key, " (a key that is named by its id is of the cluster's account and region)"
	case keyID.MatchString(key), strings.Contains(key, "alias/") && !strings.Contains(key, "alias/aws/"):
		e.leave(atKey, "%s is no key ARN, and what S3 tells of an object is compared with one: "+
			"`aws kms describe-key --key-id %s --query KeyMetadata.Arn` tells it; put it there, and import again", key, key)
		return
	default:
		l.KMSKey = key
	}
	if err := l.options().Check(); err != nil {
		e.leave("Cluster", "logs: %v", err)
		return
	}
	under := l.Prefix
	if under == "" {
		under = defaultConfig("").Logs.Prefix
	}
	e.take(atURI, "logs: they go to s3://%s/%s%s/node/INSTANCE-ID/…; EMR does not say which files, so see logs.files", l.Bucket, under, id)
	if key == "" {
		e.leave(atKey, "it is absent: EMR encrypts these logs under no customer managed key. The agent encrypts its own under kms_key, unless you name another in logs.kms_key")
		l.KMSKey = ""
	} else {
		e.take(atKey, "logs.kms_key: %s; S3 encrypts them under it%s", l.KMSKey, why)
	}
	i.Logs = l
}
