//go:build vm

package vm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// bakeFolder is where Packer's template and the component of Image Builder put the scripts.
const bakeFolder = "/tmp/luks-kms-agent-image"

// TestBake makes an image with the commands of docs/images.md, of a machine that had volumes, and starts two instances of it: each makes a data key of its
// own, and has nothing of the builder's. An image that was taken before it was sealed is caught by its instance id.
func TestBake(t *testing.T) {
	leave := parallel(t)
	builder := unpackaged(t, ebs1, ebs2)
	blanks := builder.Digests(0)
	bring(t, builder)
	// No list of packages can be fetched here, and none is asked for: the guest has all that the package depends on.
	follow(t, builder, "export PREFLIGHT=yes", strings.NewReplacer(), "docs/images.md", "By hand", "cd /tmp/", "sh install.sh ")
	builder.Sh("systemctl is-enabled luks-kms-agent.service")
	if unit := builder.Unit("luks-kms-agent.service"); unit["ActiveState"] != "inactive" {
		t.Errorf("after install.sh the service is %v", unit)
	}
	follow(t, builder, "", strings.NewReplacer(), "docs/images.md", "By hand", "cd /tmp/", "sh seal.sh")
	wantUntouched(t, builder, blanks)
	if left := builder.State(); left != "" {
		t.Errorf("a builder that had no volume has records: %s", left)
	}

	// Now one that has volumes.
	builder.Sh("systemctl start luks-kms-agent.service")
	builder.AwaitVolumes()
	key := builder.KeyRecords()[0]
	audit, _ := auditLines(t, builder, auditLog)
	if len(audit) == 0 {
		t.Fatal("the builder has no audit log")
	}
	machine := builder.Sh("cat /etc/machine-id")

	// Not while a volume is open.
	wantRefusal(t, builder.Agent("seal-image"), 3,
		"vol-0aaaaaaaaaaaaaaa1) is open as luks-", "vol-0bbbbbbbbbbbbbbb2) is open as luks-", "mounted on /mnt1", "Run `luks-kms-agent lock`")
	builder.Sh("luks-kms-agent lock")
	builder.Detach("ebs1", "ebs2")
	unsealed := builder.TakeImage("unsealed")

	// The volumes exist elsewhere now: their records do not go unasked.
	state := builder.State()
	wantRefusal(t, builder.Agent("seal-image"), 3, "remove ", "no volume of it is attached", "last copies of their wrapped keys", "--save-records FILE")
	wantRefusal(t, builder.Agent("seal-image --save-records /root/records.tar"), 2, "would go into the image")
	if after := builder.State(); after != state {
		t.Errorf("a refused seal-image changed records:\n%s\n%s", state, after)
	}
	said := builder.Sh("cd " + bakeFolder + " && sh seal.sh --save-records /run/records.tar")
	for _, want := range []string{"removed ", "cleared ", auditLog, "sealed; what was removed is in /run/records.tar, which is in memory"} {
		if !strings.Contains(said, want) {
			t.Errorf("seal-image does not say %q:\n%s", want, said)
		}
	}
	builder.Sh(`cd /run && tar -xf records.tar && sha256sum -c --quiet SHA256SUMS && cat keys/*.json | grep -q ` + key.ID)
	follow(t, builder, "", strings.NewReplacer(), "docs/images.md", "By hand", "cd /tmp/", "sh seal.sh", "sh cleanup.sh ")
	// As the component checks it.
	builder.Sh("systemctl is-enabled luks-kms-agent.service && luks-kms-agent seal-image | grep -qF 'there was nothing to do'")
	if left := builder.State(); left != "" {
		t.Errorf("the sealed image has %s", left)
	}
	builder.PowerOff()
	sealed := builder.TakeImage("sealed")

	// The instances start together: the subtests wait for the end of this function.
	leave()
	var mu sync.Mutex
	var keys []harness.KeyRecord
	for i, name := range []string{"first", "second"} {
		t.Run(name, func(t *testing.T) {
			parallel(t)
			n := sealed.Launch(t, fmt.Sprintf("i-0c10e000000000%d", i), blank(i))
			n.Boot()
			n.AwaitVolumes()
			rec := ownKey(t, n, key)
			mu.Lock()
			for _, other := range keys {
				if string(other.WrappedKey) == string(rec.WrappedKey) {
					t.Error("both instances have one data key")
				}
			}
			keys = append(keys, rec)
			mu.Unlock()
			if got := n.Sh("ls -A /var/lib/luks-kms-agent/quarantine /var/lib/luks-kms-agent/archive/volumes; cat /etc/machine-id"); strings.Contains(got, machine) || strings.Contains(got, "Z") {
				t.Errorf("of the builder: %s", got)
			}
			traces(t, n, key, harness.InstanceID, "vol-0aaaaaaaaaaaaaaa1", "vol-0bbbbbbbbbbbbbbb2")
		})
	}
	t.Run("not sealed", func(t *testing.T) {
		parallel(t)
		n := unsealed.Launch(t, "i-0c10e000000000009", blank(9))
		n.Boot()
		n.AwaitVolumes()
		ownKey(t, n, key)
		if got := n.Status()["quarantined"]; got != 2.0 {
			t.Errorf("status says of quarantine: %v", got)
		}
		if r := n.Agent("status"); !strings.Contains(r.Stdout, "quarantine") {
			t.Errorf("status does not tell of it: %s", r)
		}
		lines, _ := auditLines(t, n, auditLog)
		quarantined := false
		for _, l := range lines {
			if l.InstanceID == "i-0c10e000000000009" && string(l.Event) == "records-quarantined" {
				quarantined = strings.Contains(strings.Join(l.Records, " "), key.ID)
			}
		}
		if !quarantined {
			t.Error("the audit log does not tell that the builder's records were moved")
		}
	})
}

// blank is the new volume of an instance.
func blank(i int) harness.Disk {
	return harness.EBS("new", fmt.Sprintf("0eeeeeeeeeeeeee%02d", i))
}

// bring puts onto the builder what Packer, Image Builder or somebody by hand brings there.
func bring(t *testing.T, n *harness.Node) {
	t.Helper()
	n.Sh("mkdir -p /root/clone/packaging " + bakeFolder + " && cp " + harness.Package + " " + bakeFolder + "/luks-kms-agent_VERSION_amd64.deb")
	for from, to := range map[string]string{
		"install.sh": bakeFolder + "/install.sh", "seal.sh": bakeFolder + "/seal.sh", "cleanup.sh": bakeFolder + "/cleanup.sh",
		"../config.yaml": "/root/clone/packaging/config.yaml",
	} {
		text, err := os.ReadFile(filepath.Join(assets.Repo, "packaging", "image", from))
		if err != nil {
			t.Fatal(err)
		}
		n.Write(to, 0o644, string(text))
	}
	follow(t, n, "cd /root/clone", strings.NewReplacer("KEY-ARN", n.Key), "docs/images.md", "By hand", "cp ", "sed ")
	// The story's KMS and disks are what else has to be said.
	n.Sh("cd /root/clone && printf 'kms_endpoint: " + harness.KMSEndpoint + "\nmulti_attach: allow\n' >>config.yaml && mv config.yaml " + bakeFolder + " && rm -r /root/clone")
}

// ownKey wants an instance to have made one data key, to use no other, and to have its one volume mounted.
func ownKey(t *testing.T, n *harness.Node, builders harness.KeyRecord) harness.KeyRecord {
	t.Helper()
	wantCalls(t, n, 1, 1, 1)
	wantMounted(t, n, "/mnt")
	records := n.KeyRecords()
	if len(records) != 1 || records[0].ID == builders.ID || string(records[0].WrappedKey) == string(builders.WrappedKey) {
		t.Fatalf("key records: %+v, the builder's is %+v", records, builders)
	}
	lines, _ := auditLines(t, n, auditLog)
	for _, l := range lines {
		if l.Event == "data-key-unwrapped" && l.InstanceID != harness.InstanceID && l.KeyID != records[0].ID {
			t.Errorf("it unwrapped %+v", l)
		}
	}
	return records[0]
}

// traces wants nothing of the builder to be in the records, the logs and the journal.
func traces(t *testing.T, n *harness.Node, key harness.KeyRecord, words ...string) {
	t.Helper()
	for _, word := range append(words, key.ID) {
		if found := n.Sh("grep -rlF " + word + " /var/lib/luks-kms-agent /var/log /run/luks-kms-agent /run/log || true; journalctl --no-pager | grep -F " + word + " || true"); found != "" {
			t.Errorf("%s stands in %s", word, found)
		}
	}
}
