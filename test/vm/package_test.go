//go:build vm

package vm_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// earlier makes the package of an earlier version, as of 2020, and puts it onto the node.
func earlier(t *testing.T, n *harness.Node, format string) (path string) {
	t.Helper()
	return upload(t, n, format, "earlier", "VERSION=earlier", "SOURCE_DATE_EPOCH=1600000000")
}

func upload(t *testing.T, n *harness.Node, format, name string, variables ...string) (path string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := assets.BuildPackage(t.Context(), format, file, variables...); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	path = "/root/" + name + "." + format
	n.Write(path, 0o644, string(b))
	return path
}

const (
	// Which run of the service, the target and a consumer it is, and how that is.
	incarnations = "systemctl show -p Id,InvocationID,ActiveState,NRestarts luks-kms-agent.service luks-kms-agent.target consumer.service"
	// What would start the agent at a boot.
	enabledLinks = "find /etc/systemd/system -type l -name 'luks-kms-agent*'"
	stateDir     = "/var/lib/luks-kms-agent"
)

// packaged is a node with volumes in use, and what no change of packages may change on it.
type packaged struct {
	*harness.Node
	t                        *testing.T
	files, state, runs, conf string
}

// downloaded is what the documents call the package, and where it is on a node.
const downloaded = "/root/luks-kms-agent_VERSION_amd64.deb"

// unpackaged returns a node without the agent.
func unpackaged(t *testing.T, disks ...harness.Disk) *harness.Node {
	n := harness.NewNode(t, assets, "", disks...)
	n.Wake()
	// Nothing was ever kept here: a purge is clean, and has nothing to say.
	if said := n.Sh("dpkg --purge luks-kms-agent"); strings.Contains(said, "luks-kms-agent:") {
		t.Errorf("a purge without records: %s", said)
	}
	for _, path := range []string{stateDir, "/var/log/luks-kms-agent", "/etc/luks-kms-agent", "/usr/bin/luks-kms-agent", "/usr/share/doc/luks-kms-agent"} {
		n.Sh("! ls -d " + path + "*")
	}
	if links := n.Sh(enabledLinks); links != "" {
		t.Errorf("after a purge there are %s", links)
	}
	return n
}

// setUp checks what a fresh install did, which is nothing, and does what the README tells to do then.
func setUp(t *testing.T, n *harness.Node, blank map[string]string) *packaged {
	t.Helper()
	if links := n.Sh(enabledLinks); links != "" {
		t.Errorf("the install enabled %s", links)
	}
	if unit := n.Unit("luks-kms-agent.service"); unit["ActiveState"] != "inactive" {
		t.Errorf("the install started the service: %v", unit)
	}
	if got := n.Sh("stat -c '%a %U %G' " + harness.ConfigFile); got != "640 root root\n" {
		t.Errorf("the configuration has %s", got)
	}
	if got := n.Sh("luks-kms-agent version"); !strings.HasPrefix(got, "luks-kms-agent earlier ") {
		t.Errorf("version: %s", got)
	}
	// By accident, the configuration that comes with the package does nothing.
	wantRefusal(t, n.Agent("run"), 2, "kms_key is missing", harness.ConfigFile)
	wantMounted(t, n)
	wantUntouched(t, n, blank)

	words := strings.NewReplacer("KEY-ARN", n.Key)
	follow(t, n, "", words, "README.md", "Install on a node", "sudo sed -i ")
	// The story's KMS and disks are what else has to be said.
	n.Sh("printf 'filesystem: ext4\\nkms_endpoint: " + harness.KMSEndpoint + "\\nmulti_attach: allow\\n' >>" + harness.ConfigFile)
	p := &packaged{Node: n, t: t, conf: string(n.Read(harness.ConfigFile))}
	follow(t, n, "", words, "README.md", "Install on a node", "sudo luks-kms-agent preflight", "sudo luks-kms-agent plan")
	wantMounted(t, n)
	wantUntouched(t, n, blank)
	follow(t, n, "", words, "README.md", "Install on a node", "sudo systemctl enable --now ")
	n.Sh("systemctl start consumer.service")
	wantMounted(t, n, "/mnt", "/mnt1")
	if said := follow(t, n, "", words, "README.md", "Install on a node", "sudo luks-kms-agent status"); !strings.HasPrefix(said, "All well: 2 volumes mounted\n") {
		t.Errorf("status: %s", said)
	}
	p.files = writeFiles(n, "/mnt", "/mnt1")
	n.Sh("systemd-run -q --unit=user-of-a-volume tail -f /mnt/plaintext-file")
	p.state, p.runs = n.State(), n.Sh(incarnations)
	if p.state == "" || strings.Count(p.runs, "ActiveState=active") != 3 {
		t.Fatalf("records: %s\nunits: %s", p.state, p.runs)
	}
	return p
}

// wantKept checks that volumes, records, logs and units are as they were.
func (p *packaged) wantKept(after string) {
	p.t.Helper()
	wantMounted(p.t, p.Node, "/mnt", "/mnt1")
	wantFiles(p.t, p.Node, p.files, after, "/mnt", "/mnt1")
	if state := p.State(); state != p.state {
		p.t.Errorf("records after %s:\n%s\nbefore:\n%s", after, state, p.state)
	}
	p.wantUnits(after)
	p.Sh("test -s " + auditLog)
}

func (p *packaged) wantUnits(after string) {
	p.t.Helper()
	if runs := p.Sh(incarnations + "; systemctl -q is-active user-of-a-volume"); runs != p.runs {
		p.t.Errorf("units after %s:\n%s\nbefore:\n%s", after, runs, p.runs)
	}
}

func (p *packaged) wantConfig(file, after string) {
	p.t.Helper()
	if conf := string(p.Read(file)); conf != p.conf {
		p.t.Errorf("configuration after %s:\n%s", after, conf)
	}
}

// wantReopened closes all volumes and opens them again: with the key that they had.
func (p *packaged) wantReopened() {
	p.t.Helper()
	p.Sh("systemctl stop user-of-a-volume consumer.service; luks-kms-agent lock")
	wantMounted(p.t, p.Node)
	p.KMS.Forget()
	p.Sh("systemctl restart luks-kms-agent.service")
	wantCalls(p.t, p.Node, 0, 1, 1)
	wantMounted(p.t, p.Node, "/mnt", "/mnt1")
	wantFiles(p.t, p.Node, p.files, "opened again", "/mnt", "/mnt1")
}

// TestDeb: a node's life under dpkg. No install, upgrade, remove or purge starts or stops anything, touches a volume, or loses a record.
func TestDeb(t *testing.T) {
	parallel(t)
	n := unpackaged(t, ssd1, ebs1)
	blank := n.Digests(0)
	// apt looks at the dependencies, and at what they are called; here it has no network.
	n.Sh("mv " + earlier(t, n, "deb") + " " + downloaded)
	follow(t, n, "cd /root; export DEBIAN_FRONTEND=noninteractive", strings.NewReplacer(), "README.md", "Install on a node", "sudo apt install ")
	p := setUp(t, n, blank)

	if said := n.Sh("dpkg -i " + harness.Package); !strings.Contains(said, "over (0.0.0~git20200913122640.earlier)") {
		t.Errorf("the upgrade said %s", said)
	}
	p.wantKept("the upgrade")
	p.wantConfig(harness.ConfigFile, "the upgrade")
	if got := n.Sh("luks-kms-agent version"); strings.Contains(got, "earlier") {
		t.Errorf("version: %s", got)
	}

	n.Sh("dpkg -r luks-kms-agent; ! test -e /usr/bin/luks-kms-agent")
	p.wantKept("the remove")
	p.wantConfig(harness.ConfigFile, "the remove")

	n.Sh("dpkg -i " + harness.Package)
	p.wantKept("the reinstall")
	p.wantConfig(harness.ConfigFile, "the reinstall")
	n.Sh("luks-kms-agent status")
	if links := n.Sh(enabledLinks); links != "/etc/systemd/system/multi-user.target.wants/luks-kms-agent.service\n" {
		t.Errorf("after remove and reinstall the links are %q", links)
	}

	said := n.Sh("dpkg --purge luks-kms-agent")
	archive := regexp.MustCompile(`(?m)^luks-kms-agent: the key records are not deleted, they are now in (` + stateDir + `\.purged-\d{8}T\d{6}Z)$`).FindStringSubmatch(said)
	if archive == nil {
		t.Fatalf("the purge said\n%s", said)
	}
	if got := n.Sh("stat -c '%a %U' " + archive[1]); got != "700 root\n" {
		t.Errorf("the archive has %s", got)
	}
	wantMounted(t, n, "/mnt", "/mnt1")
	wantFiles(t, n, p.files, "after the purge", "/mnt", "/mnt1")
	p.wantUnits("the purge")
	n.Sh("! test -e " + stateDir + "; ! test -e /etc/luks-kms-agent; test -s /var/log/luks-kms-agent.purged-*/audit.jsonl")
	if links := n.Sh(enabledLinks); links != "" {
		t.Errorf("after the purge there are %s", links)
	}

	n.Sh("dpkg -i " + harness.Package)
	n.Write(harness.ConfigFile, 0o640, p.conf)
	words := strings.NewReplacer(stateDir+".purged-20261126T014240Z", archive[1])
	follow(t, n, "", words, "docs/packages.md", "After a purge", "mv -T ")
	if state := n.State(); state != p.state {
		t.Errorf("records of the archive:\n%s\nbefore:\n%s", state, p.state)
	}
	follow(t, n, "", words, "docs/packages.md", "After a purge", "luks-kms-agent verify", "systemctl enable --now ")
	p.wantReopened()
}

// TestRPM: the same under rpm, which has no purge.
func TestRPM(t *testing.T) {
	parallel(t)
	n := unpackaged(t, ssd1, ebs1)
	blank := n.Digests(0)
	const rpm = "rpm --force-debian --nodeps "
	n.Sh(rpm + "-i " + earlier(t, n, "rpm"))
	p := setUp(t, n, blank)

	current := upload(t, n, "rpm", "current")
	n.Sh(rpm + "-U " + current)
	p.wantKept("the upgrade")
	p.wantConfig(harness.ConfigFile, "the upgrade")
	if got := n.Sh("luks-kms-agent version"); strings.Contains(got, "earlier") {
		t.Errorf("version: %s", got)
	}
	// Nothing but the configuration is other than it was packed.
	if got := n.Try("rpm -V --nodeps luks-kms-agent").Stdout; strings.Count(got, "\n") != 1 || !strings.Contains(got, " c "+harness.ConfigFile) {
		t.Errorf("rpm -V: %s", got)
	}

	n.Sh(rpm + "-e luks-kms-agent; ! test -e /usr/bin/luks-kms-agent")
	p.wantKept("the erase")
	p.wantConfig(harness.ConfigFile+".rpmsave", "the erase")

	n.Sh(rpm + "-i " + current)
	p.wantKept("the reinstall")
	n.Sh("mv " + harness.ConfigFile + ".rpmsave " + harness.ConfigFile + "; luks-kms-agent status")
	p.wantReopened()
}
