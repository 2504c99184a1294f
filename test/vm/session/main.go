// Command session records "A session" of docs/operations.md anew: it runs the commands on a node in a VM and puts them, with what they printed,
// in the place of the block that is there. What the reader does not see is told before the block: a recovery key, and disks that only the
// VM has.
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

func main() {
	if !harness.Tell("session", record) {
		fmt.Println("session: FAILED")
		os.Exit(1)
	}
	fmt.Println("\nsession: OK")
}

// step is a command, and how it goes.
type step struct {
	before   string // what the reader is told first: what happens besides
	command  string
	terminal bool // it is told to a terminal, 100 columns wide, which it fits; else its lines are not broken
	code     int
	quiet    bool // it has nothing to say
	after    func(*harness.Node)
}

const (
	packageName = "luks-kms-agent_%s_amd64.deb"
	disk        = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1"
	backup      = "/root/vol-0aaaaaaaaaaaaaaa1*.header.tar"
	withKey     = "luks-kms-agent unlock --recovery-key"
)

// steps are the session's, with a version of the package and a KMS key.
func steps(version, key string) []step {
	kms := func(operation string) func(*harness.Node) {
		return func(n *harness.Node) { n.Administer(operation, map[string]any{"KeyId": key}, nil) }
	}
	return []step{
		{command: "dpkg -i " + fmt.Sprintf(packageName, version)},
		{command: "luks-kms-agent version"},
		{command: "sed -i 's|^# kms_key:.*|kms_key: " + key + "|' " + harness.ConfigFile, quiet: true, after: func(n *harness.Node) {
			n.Sh("printf 'kms_endpoint: " + harness.KMSEndpoint + "\\nmulti_attach: allow\\n' >>" + harness.ConfigFile)
		}},
		{command: "grep -v -e '^#' -e '^$' " + harness.ConfigFile},
		{command: "luks-kms-agent preflight", terminal: true},
		{command: "luks-kms-agent plan", terminal: true},
		{command: "systemctl enable --now luks-kms-agent.service"},
		{command: "luks-kms-agent status", terminal: true},
		{command: "luks-kms-agent timeline", terminal: true},
		{command: "luks-kms-agent recovery-key add /mnt /mnt1", terminal: true},
		{command: "luks-kms-agent rotate"},
		{command: "luks-kms-agent verify"},
		{command: "luks-kms-agent header backup --to /root"},
		{command: "luks-kms-agent verify"},
		{command: "luks-kms-agent recovery-key list", after: kms("DisableKey")},
		{before: "now somebody disables the KMS key, and the volumes are closed", command: "luks-kms-agent lock"},
		{command: "luks-kms-agent unlock", code: 4},
		{command: withKey},
		{command: "luks-kms-agent status", terminal: true, after: kms("EnableKey")},
		{before: "the KMS key is enabled again; the start of a closed disk is overwritten", command: "luks-kms-agent lock /mnt1"},
		{command: "dd if=/dev/zero of=" + disk + " bs=1M count=4 status=none conv=fsync", quiet: true},
		{command: "luks-kms-agent plan", terminal: true},
		{command: "luks-kms-agent header restore " + backup + " --yes"},
		{command: "luks-kms-agent unlock /mnt1"},
	}
}

var (
	recoveryKey = regexp.MustCompile(`([0-9A-HJKMNP-TV-Z]{5}-){7}[0-9A-HJKMNP-TV-Z]{5}`)
	// A disk of the VM that no node of EC2 has, and the reasons below it.
	otherDisk = regexp.MustCompile(`(?m)^leave +/dev/(vd|loop|ram|sr|fd)\S* .*\n( .*\n)+`)
	block     = regexp.MustCompile("(?s)\n```console\n.*?\n```\n")
)

const hidden = "XXXXX-XXXXX-XXXXX-XXXXX-XXXXX-XXXXX-XXXXX-XXXXX"

func record(t harness.TB) {
	announce := harness.Announce(os.Stdout)
	assets, err := harness.Prepare(context.Background(), announce)
	if err != nil {
		t.Fatalf("cannot get ready: %v", err)
	}
	t.Cleanup(func() {
		if err := assets.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
	n := harness.NewNode(t, assets, "", harness.InstanceStore("ssd1", "AWS11111111111111111"), harness.EBS("ebs1", "0aaaaaaaaaaaaaaa1"))
	n.Wake()
	version := strings.TrimSpace(n.Sh("dpkg --purge luks-kms-agent >/dev/null; dpkg-deb --field " + harness.Package + " Version"))
	n.Sh("cp " + harness.Package + " /root/" + fmt.Sprintf(packageName, version))

	var session strings.Builder
	key := ""
	for _, s := range steps(version, n.Key) {
		done := announce(s.command)
		said := s.run(t, n, key)
		done()
		if found := recoveryKey.FindString(said); found != "" {
			key = found
			said = strings.ReplaceAll(said, key, hidden)
		}
		if session.Len() > 0 {
			session.WriteString("\n")
		}
		if s.before != "" {
			session.WriteString("# : " + s.before + "\n")
		}
		session.WriteString("# " + s.command + "\n" + otherDisk.ReplaceAllString(said, ""))
		if s.code != 0 {
			fmt.Fprintf(&session, "(exit code %d)\n", s.code)
		}
		if s.after != nil {
			s.after(n)
		}
	}
	if err := replace(filepath.Join(assets.Repo, "docs/operations.md"), session.String()); err != nil {
		t.Fatalf("%v", err)
	}
}

// run returns what a step printed, without what a terminal keeps to itself.
func (s step) run(t harness.TB, n *harness.Node, key string) string {
	// The guest's channel is a service, and what it starts would log as one.
	const shell = "unset INVOCATION_ID; cd /root; "
	var r harness.Result
	switch {
	case s.terminal:
		// What it says of its progress is taken away from a terminal, and not said to a file.
		r = n.Try(shell + "script -qec 'stty cols 100 rows 50; NO_COLOR=1 TERM=xterm " + s.command + " 2>/run/session' /dev/null; code=$?; cat /run/session; exit $code")
	case s.command == withKey:
		r = n.TryWith([]byte(key+"\n"), shell+s.command+" 2>&1")
	default:
		r = n.Try(shell + "{ " + s.command + "; } 2>&1")
	}
	said := strings.ReplaceAll(r.Stdout+r.Stderr, "\r", "")
	switch {
	case r.Code != s.code, strings.ContainsRune(said, '\x1b'):
		t.Fatalf("%s: exit code %d:\n%q", s.command, r.Code, recoveryKey.ReplaceAllString(said, hidden))
	case s.quiet != (said == ""):
		t.Fatalf("%s said %q", s.command, said)
	}
	return said
}

// replace puts a session in the place of the one in a document.
func replace(file, session string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	at := block.FindAllIndex(text, -1)
	if len(at) != 1 {
		return fmt.Errorf("%s has %d sessions", file, len(at))
	}
	fresh := bytes.Join([][]byte{text[:at[0][0]], []byte("\n```console\n" + session + "```\n"), text[at[0][1]:]}, nil)
	return os.WriteFile(file, fresh, 0o644)
}
