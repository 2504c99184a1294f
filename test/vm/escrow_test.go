//go:build vm

package vm_test

import (
	"bytes"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// Where the node finds S3.
const (
	s3Address    = "169.254.169.249:9000"
	escrowBucket = "escrow"
)

// TestEscrowSSE and TestEscrowCSE: the boot volume of a node is lost, and one of the headers with it. On another instance, with the data disks of
// the first, everything comes back from S3.
func TestEscrowSSE(t *testing.T) { escrowStory(t, "sse-kms") }

func TestEscrowCSE(t *testing.T) { escrowStory(t, "cse-kms") }

func escrowStory(t *testing.T, mode string) {
	parallel(t)
	n := harness.NewNode(t, assets, "", ebs1, ebs2)
	noHotAttach(n)
	s := s3test.New(t, s3test.Options{KMS: n.UpstreamKMS()})
	s.NewBucket(escrowBucket, s3test.Bucket{Region: harness.Region})
	host, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	n.Serve(s3Address, host.Host)
	key := n.CreateKey(map[string]string{"Description": "of the escrow"})
	config := n.Config("device_wait: 1s\nescrow:\n  bucket: " + escrowBucket + "\n  mode: " + mode + "\n  kms_key: " + key +
		"\n  s3_endpoint: http://" + s3Address + "\n  required: true\n")
	n.Provide(harness.ConfigFile, 0o600, config)
	if mode == "cse-kms" {
		n.KMS.Expect(map[string]string{"kms_cmk_id": key})
	}

	// Nothing is mounted while S3 says no.
	s.Deny("PutObject")
	n.Wake()
	n.StartServices()
	if code := n.AwaitAgent(); code != "4" {
		t.Errorf("without an escrow the service ended with %s: %s", code, n.Journal())
	}
	wantMounted(t, n)
	if journal := n.Journal(); !strings.Contains(journal, "before its escrow is confirmed") || !strings.Contains(journal, "s3:PutObject") {
		t.Errorf("the journal does not say why: %s", journal)
	}
	s.Heal()
	n.Sh("systemctl restart luks-kms-agent.service")
	wantMounted(t, n, "/mnt", "/mnt1")
	files := writeFiles(n, "/mnt", "/mnt1")
	if names := s.Keys(escrowBucket); len(names) != 2 {
		t.Fatalf("in the escrow: %v", names)
	}
	if out := n.Sh("luks-kms-agent escrow put && luks-kms-agent escrow verify && luks-kms-agent status"); strings.Count(out, ": is in s3://") != 2 ||
		strings.Count(out, "header.tar: ok\n") != 2 || !strings.Contains(out, "; escrowed ") {
		t.Errorf("after the run: %s", out)
	}
	// A change of the keys is sent by the timer, which comes every five minutes; while it is on, at once.
	n.Sh("luks-kms-agent rotate && luks-kms-agent status | grep -q 'changed since' && systemctl start luks-kms-agent-escrow.timer")
	n.Await("the new keys are in the escrow", 3*time.Minute, func() bool { return len(s.Keys(escrowBucket)) == 4 })
	n.Await("and it is noted", time.Minute, func() bool { return !strings.Contains(n.Sh("luks-kms-agent status"), "changed since") })
	n.Sh("luks-kms-agent rotate")
	n.Await("what is newer is there too, at once", time.Minute, func() bool { return len(s.Keys(escrowBucket)) == 6 })
	n.Await("and that is noted", time.Minute, func() bool { return !strings.Contains(n.Sh("luks-kms-agent status"), "changed since") })
	if unit := n.Unit("luks-kms-agent-escrow.service"); unit["Result"] != "success" {
		t.Errorf("luks-kms-agent-escrow.service: %v", unit)
	}
	points := map[string]string{}
	for point, v := range volumes(t, n) {
		points[v.Identity] = point
	}
	list := n.Sh("luks-kms-agent escrow list")
	if strings.Count(list, mode) != 6 || strings.Count(list, key) != 6 {
		t.Errorf("the list: %s", list)
	}
	for _, name := range s.Keys(escrowBucket) {
		if bytes.Contains(s.Stored(escrowBucket, name), []byte("LUKS\xba\xbe")) {
			t.Errorf("%s lies in the bucket in the clear", name)
		}
	}

	n.PowerOff()
	n.Fill("ebs1", 0, bytes.Repeat([]byte{0xa5}, 4<<20))
	n.BecomeInstance("i-0fedcba9876543210")
	n.KMS.Forget()
	n.Wake() // with a new boot disk
	if state := n.State(); state != "" {
		t.Fatalf("the new boot disk has records: %s", state)
	}
	if r := n.Agent("escrow restore --to /root"); r.Code != 2 || strings.Count(r.Stdout, "records:     lost, to be written again: key, volume\n") != 2 {
		t.Errorf("without --yes: %s", r)
	}
	if state := n.State(); state != "" {
		t.Errorf("without --yes records were written: %s", state)
	}
	out := n.Sh("luks-kms-agent escrow restore --to /root --yes")
	if strings.Count(out, "restored, opened, found a filesystem, and closed") != 2 || strings.Count(out, "overwritten: saved as ") != 1 {
		t.Errorf("the restore: %s", out)
	}
	n.StartServices()
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt", "/mnt1")
	wantFiles(t, n, files, "after the restore", "/mnt", "/mnt1")
	for point, v := range volumes(t, n) {
		if points[v.Identity] != point || v.Action != "unlock" {
			t.Errorf("%s is at %s, was at %s: %+v", v.Identity, point, points[v.Identity], v)
		}
	}
	for _, c := range n.KMS.Calls() {
		if c.Op == "GenerateDataKey" && len(c.Context) == 0 {
			t.Errorf("a new data key was made: %v", c)
		}
	}
}
