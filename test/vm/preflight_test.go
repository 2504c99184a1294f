//go:build vm

package vm_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// TestPreflight: a node that is ready says so before it has volumes and when it has them; then one thing after another is not as
// it should be, and is named. Disks and records stay as they are.
func TestPreflight(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1)
	n.Wake()
	blank := n.Digests(0)
	r := n.Agent("preflight")
	lacks := lacking(r.Stdout, "IMDSv2: "+harness.InstanceID, "ok       data key ", "dm-crypt, AES-XTS", "(will be made)", "ok       service ", "0 failures, 0 skipped")
	if r.Code != 0 || len(lacks) > 0 {
		t.Errorf("%s\na new node lacks %q", r, lacks)
	}
	if now := n.Digests(0); !maps.Equal(now, blank) {
		t.Error("a disk was written to before the first run")
	}
	if n.Try("test -e /var/lib/luks-kms-agent").Code == 0 {
		t.Error("the state directory was made")
	}
	n.StartServices()
	n.AwaitVolumes()
	n.Sh("luks-kms-agent lock; sync")

	// Every name below, with mode, size and time.
	const list = "find /var/lib/luks-kms-agent -printf '%p %M %s %T@\\n' | sort"
	disks, records := n.Digests(0), n.Sh(list)

	deny := func(op string) func() {
		return func() { n.KMS.Inject(proxy.Fault{Kind: proxy.Deny, Ops: []string{op}}) }
	}
	imds := func(s proxy.IMDSState) func() { return func() { n.IMDS.Set(s) } }
	for _, c := range []struct {
		what         string
		host         func()
		setup, after string // in the guest
		config       string // more of it
		code         int
		says         []string
	}{
		{what: "DescribeKey denied, and a service that is off", host: deny("DescribeKey"),
			setup: "systemctl disable luks-kms-agent.service", after: "systemctl enable luks-kms-agent.service",
			says: []string{"warning  KMS key ", "-> Optional: allow kms:DescribeKey", "ok       data key ",
				"warning  service ", "-> Run `systemctl enable luks-kms-agent.service`", "14 ok, 2 warnings, 0 failures"}},
		{what: "GenerateDataKey denied", host: deny("GenerateDataKey"), code: 4, says: []string{"failure  data key ", "-> Allow kms:GenerateDataKey on " + n.Key}},
		{what: "Decrypt denied", host: deny("Decrypt"), code: 4, says: []string{"failure  data key ", "-> Allow kms:Decrypt on " + n.Key}},
		{what: "IMDS off", host: imds(proxy.Off), code: 5, says: []string{"failure  instance metadata ", "skipped  data key ", "-> IMDSv2 must be on"}},
		{what: "a wrong clock", setup: "date -s '+1 hour'", after: "date -s '-1 hour'", code: 5, says: []string{"failure  clock ", "ahead of KMS", "skipped  KMS key "}},
		{what: "a certificate of an unknown CA", config: "kms_endpoint: " + harness.KMSTLSEndpoint, code: 5,
			says: []string{"failure  KMS endpoint ", "x509", "the certificate is of ", "not one that this node trusts"}},
		{what: "a CA that the node trusts", config: "kms_endpoint: " + harness.KMSTLSEndpoint, after: "rm /etc/ssl/certs/ca-certificates.crt",
			setup: fmt.Sprintf("mkdir -p /etc/ssl/certs; echo '%s' >/etc/ssl/certs/ca-certificates.crt", n.CertificateOfKMS()),
			says:  []string{"ok       KMS endpoint ", "TLS 1.3, certificate of ", "ok       data key "}},
		{what: "a state directory for all", setup: "chmod 0755 /var/lib/luks-kms-agent", after: "chmod 0700 /var/lib/luks-kms-agent", code: 6,
			says: []string{"failure  state directory ", "0755"}},
		{what: "a read-only state directory", code: 6, says: []string{"failure  state directory ", "read-only file system"},
			setup: "cd /var/lib/luks-kms-agent && mount --bind . . && mount -o remount,ro,bind $PWD", after: "umount /var/lib/luks-kms-agent"},
		{what: "a full disk", setup: "mount -t tmpfs -o size=64k,mode=0700 none /var/lib/luks-kms-agent", after: "umount /var/lib/luks-kms-agent", code: 6,
			says: []string{"failure  state directory ", "no space left on device"}},
		{what: "no service", setup: "systemctl mask luks-kms-agent.target", after: "systemctl unmask luks-kms-agent.target", code: 8,
			says: []string{"failure  service ", "luks-kms-agent.target is masked"}},
		{what: "a configuration that others may write", setup: "chmod 0666 /root/preflight.yaml", code: 2,
			says: []string{"failure  configuration ", "skipped  data key ", "ok       kernel "}},
	} {
		config := n.Config("filesystem: ext4\n")
		if c.config != "" {
			config = strings.Replace(config, "kms_endpoint: "+harness.KMSEndpoint, c.config, 1)
		}
		if c.host != nil {
			c.host()
		}
		r := n.TryWith([]byte(config), fmt.Sprintf("umask 077; cat >/root/preflight.yaml; { %s; } >&2; luks-kms-agent --config /root/preflight.yaml preflight; code=$?; { %s; } >&2; exit $code",
			cmp.Or(c.setup, ":"), cmp.Or(c.after, ":")))
		r.Command = c.what
		n.KMS.Inject()
		n.IMDS.Set(proxy.Well)
		lacks := lacking(r.Stdout, c.says...)
		if r.Code != c.code || len(lacks) > 0 {
			t.Errorf("%s\nwant exit code %d, and %q", r, c.code, lacks)
		}
	}

	var report struct {
		Ready  bool
		Checks []struct{ Name, Result string }
	}
	if err := json.Unmarshal([]byte(n.Sh("luks-kms-agent preflight --json")), &report); err != nil || !report.Ready || len(report.Checks) != 16 {
		t.Errorf("as JSON: %+v (%v)", report, err)
	}
	if now := n.Digests(0); !maps.Equal(now, disks) {
		t.Error("a disk was written to")
	}
	if now := n.Sh(list); now != records {
		t.Errorf("the state directory was\n%s\nand is\n%s", records, now)
	}
}

// lacking are the pieces that a text does not have.
func lacking(text string, pieces ...string) []string {
	return slices.DeleteFunc(pieces, func(s string) bool { return strings.Contains(text, s) })
}
