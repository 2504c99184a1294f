//go:build vm

package vm_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestLogs: a file that logrotate rotates, of another user's, and the journal of a unit are in S3, each line once, though S3 is away for a while and the
// power goes; the last lines are sent while the node is switched off.
func TestLogs(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "", ssd1)
	s := s3test.New(t, s3test.Options{KMS: n.UpstreamKMS()})
	s.NewBucket("node-logs", s3test.Bucket{Region: harness.Region})
	host, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	n.Serve(s3Address, host.Host)
	key := n.CreateKey(map[string]string{"Description": "of the logs"})
	n.Provide(harness.ConfigFile, 0o600, n.Config("logs:\n  bucket: node-logs\n  cluster: c-1\n  kms_key: "+key+"\n  s3_endpoint: http://"+s3Address+
		"\n  files: [\"/var/log/app/*.log*\"]\n  units: [app.service]\n"))
	n.Boot()
	n.AwaitVolumes()
	const app = `i=0; while :; do echo "file line $i" >>/var/log/app/app.log; echo "journal line $i"; i=$((i+1)); sleep 0.2; done`
	n.Sh(`install -d -m 0700 -o nobody /var/log/app
		printf '/var/log/app/app.log {\n size 1\n rotate 1000\n nocompress\n su nobody nogroup\n}\n' >/etc/logrotate-app.conf
		cat >/etc/systemd/system/app.service <<'EOF'
[Service]
User=nobody
ExecStart=/bin/sh -c '` + app + `'
EOF
		systemctl daemon-reload && systemctl start app.service && systemctl enable --now luks-kms-agent-logs-last.service`)
	count := func() int { return s.Count("PutObject") }
	// Before anything is sent: the key and the bucket are looked at.
	if r := n.Agent("preflight"); r.Code != 0 || !strings.Contains(r.Stdout, "logs key") || !strings.Contains(r.Stdout, "s3://node-logs/logs/ can be listed") || count() != 0 {
		t.Errorf("preflight: %s", r)
	}
	send := func() harness.Result { return n.Agent("logs archive") }
	n.Await("the first lines", time.Minute, func() bool { return send().Code == 0 && count() >= 2 })

	// The disk under the spool is full, of what is not ours: what cannot be kept there is read again later.
	// ext4 keeps 16 MiB for itself that are free, and nobody's.
	n.Sh("head -c 4000000 /dev/urandom | base64 >/var/log/app/big.log; sync; fallocate -l $(($(stat -f -c '%f*%S' /) - 64000000)) /full; ! dd if=/dev/zero of=/full2 bs=1M")
	if r := send(); r.Code == 0 || !strings.Contains(r.Stderr, "no space left on device") {
		t.Errorf("the disk is full: %s", r)
	}
	n.Sh("rm /full /full2")
	if r := send(); r.Code != 0 || !strings.Contains(n.Sh("luks-kms-agent status"), "Logs: all sent ") {
		t.Errorf("there is room again: %s", r)
	}

	s.Deny("PutObject")
	for range 3 {
		n.Sh("logrotate -f /etc/logrotate-app.conf; sleep 1")
		if r := send(); r.Code != 4 || !strings.Contains(r.Stdout, "bytes wait in the spool") {
			t.Errorf("while S3 says no: %s", r)
		}
	}
	n.PowerCut()
	s.Heal()
	n.Boot()
	n.AwaitVolumes()
	n.Sh("systemctl start luks-kms-agent-logs.service && systemctl is-active luks-kms-agent-logs-last.service")
	if r := n.Agent("logs verify"); r.Code != 0 || strings.Count(r.Stdout, " ok ") != len(s.Keys("node-logs")) || strings.Count(r.Stdout, key) != len(s.Keys("node-logs")) {
		t.Errorf("verify: %s", r)
	}
	// What the files have is in the archive, each line once. Those of the last second before the cut nobody has.
	files := strings.ReplaceAll(n.Sh(`cat $(ls -rt /var/log/app/*.log*)`), "\x00", "") // zeros stand where the cut took what was written
	n.Sh(`echo "the last line" >>/var/log/app/app.log`)
	before := count()
	n.PowerOff()
	if count() == before {
		t.Error("nothing was sent while the node was switched off")
	}
	n.Boot()
	got := map[string]int{}
	for _, name := range s.Keys("node-logs") {
		if !strings.HasPrefix(name, "logs/c-1/node/"+harness.InstanceID+"/") {
			t.Errorf("an object is %s", name)
		}
		if strings.HasPrefix(string(s.Stored("node-logs", name)), "\x1f\x8b\x08") { // further in, ciphertext has these by chance: three bytes in 4 MB
			t.Errorf("%s lies in the bucket in the clear", name)
		}
		text := plainLog(t, s, key, name)
		for line := range strings.Lines(text) {
			got[line]++
		}
		t.Logf("%s: %d lines, from %.40q", name, strings.Count(text, "\n"), text)
	}
	lines := 0
	for line := range strings.Lines(files + "the last line\n") {
		lines++
		if got[line] != 1 {
			t.Errorf("%q is in the archive %d times", line, got[line])
		}
	}
	t.Logf("%d lines in %d objects", lines, len(s.Keys("node-logs")))
	if lines < 10 {
		t.Errorf("only %d lines", lines)
	}
}

// plainLog is what is in an object of the archive, by the client that is the agent's too.
func plainLog(t *testing.T, s *s3test.S3, key, name string) string {
	t.Helper()
	c, err := archive.New(archive.Options{Bucket: "node-logs", Region: harness.Region, Mode: archive.SSE, KeyARN: key, Endpoint: s.URL(), Credentials: aws.CredentialsProviderFunc(
		func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: "AKIAREADER", SecretAccessKey: "not looked at"}, nil
		})})
	if err != nil {
		t.Fatal(err)
	}
	data, _, err := c.Get(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	zip, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(zip)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
