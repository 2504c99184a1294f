//go:build vm

package vm_test

import (
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestNodeIsLikeEC2 is about the harness: what the other stories believe of a node is so.
func TestNodeIsLikeEC2(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "", ssd1, ebs1, plain)
	n.Provide(harness.ConfigFile, 0o600, "the agent stays out of this story")
	n.Boot()

	disks := n.Sh("lsblk -dnro NAME,MODEL,SERIAL")
	for _, line := range []string{
		`Amazon\x20EC2\x20NVMe\x20Instance\x20Storage AWS11111111111111111`,
		`Amazon\x20Elastic\x20Block\x20Store vol0aaaaaaaaaaaaaaa1`,
		`Amazon\x20Elastic\x20Block\x20Store vol0b007b007b007b007`, // the boot disk too
	} {
		if !strings.Contains(disks, line+"\n") {
			t.Errorf("no disk %q:\n%s", line, disks)
		}
	}
	n.Sh("test -b /dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1")
	n.Sh("losetup /dev/loop0")

	// Instance metadata is at its address, wants a token, and tells which instance this is.
	const ask = `exec 3<>/dev/tcp/169.254.169.254/80; printf '%b' "$request" >&3; cat <&3`
	if r := n.Sh(`request='GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n'; ` + ask); !strings.Contains(r, " 401 ") {
		t.Errorf("without a token: %s", r)
	}
	if insecure := n.IMDS.TakeInsecure(); len(insecure) != 1 {
		t.Errorf("requests without a token: %q", insecure)
	}
	r := n.Sh(`request='PUT /latest/api/token HTTP/1.0\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n'
		token=$(` + ask + ` | tail -n 1)
		request='GET /latest/dynamic/instance-identity/document HTTP/1.0\r\nX-aws-ec2-metadata-token: '$token'\r\n\r\n'; ` + ask)
	if !strings.Contains(r, `"`+harness.InstanceID+`"`) || !strings.Contains(r, `"`+harness.Region+`"`) {
		t.Errorf("with a token: %s", r)
	}
	// KMS is there, and every call is seen.
	r = n.Sh(`exec 3<>/dev/tcp/169.254.169.250/8080; printf 'POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}' >&3; cat <&3`)
	if !strings.Contains(r, "MissingAuthenticationTokenException") || len(n.KMS.Calls()) != 1 {
		t.Errorf("KMS: %s; calls %v", r, n.KMS.Calls())
	}
	// Nothing else is.
	if r := n.Try("timeout 3 bash -c 'exec 3<>/dev/tcp/169.254.169.2/22'"); r.Code == 0 {
		t.Error("the node reaches its host")
	}

	// Kernel names change, disks and files stay, and a power cut loses nothing that was synced.
	before := n.Sh("cat /sys/block/nvme1n1/device/serial")
	n.Sh("echo file >/root/file; echo disk >/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1; sync")
	n.PowerCut()
	n.Shuffle()
	n.Boot()
	if after := n.Sh("cat /sys/block/nvme1n1/device/serial"); after == before {
		t.Errorf("nvme1n1 still is %s", after)
	}
	if got := n.Sh("cat /root/file; head -c 5 /dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1"); got != "file\ndisk\n" {
		t.Errorf("after a power cut: %q", got)
	}
}
