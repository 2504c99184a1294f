//go:build vm

package vm_test

import (
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// badInput is one thing that is wrong with a node, and what must come of it.
type badInput struct {
	what   string
	config string                // all of it
	before func()                // how it comes to be wrong
	after  func()                // how it is well again
	code   int                   // exit code
	says   []string              // what the message must name
	open   bool                  // volumes are open, and their filesystems may write
	run    func() harness.Result // instead of `run` with the configuration
}

// TestBadInput: whatever is wrong on the node, the exit code and the remedy are right, no disk is written to and no record is
// lost. What can be wrong with AWS is in TestNetworkFaults.
func TestBadInput(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "", ssd1, ebs1)
	n.Provide(harness.ConfigFile, 0o600, "kms_key: [\n") // the service at boot is the first to meet bad input
	n.Resume()
	if code := n.AwaitAgent(); code != "2" {
		t.Errorf("the service ended with exit code %s, want 2:\n%s", code, n.Journal())
	}
	try := func(cases []badInput) {
		t.Helper()
		for _, c := range cases {
			tryBadInput(t, n, c)
		}
	}
	try(badConfigurations(n))
	try(badPrograms(n))

	// Now with volumes that could be lost.
	n.Write(harness.ConfigFile, 0o600, n.Config("filesystem: ext4\n"))
	n.Sh("systemctl restart luks-kms-agent.service")
	wantMounted(t, n, "/mnt", "/mnt1")
	n.Sh("luks-kms-agent lock && rm -rf /root/good && cp -a /var/lib/luks-kms-agent /root/good")
	n.KMS.Forget()
	try(badRecords(n))
	try(badStateDirs(n))
	// Everything is as it was: the volumes open.
	twoAtOnce(t, n)
	wantMounted(t, n, "/mnt", "/mnt1")
	n.Sh("mkdir -m 0700 /mnt1/state /srv/bind && mount --bind /mnt1/state /srv/bind")
	try([]badInput{{what: "state directory on a managed volume, by a bind mount", config: n.Config("state_dir: /srv/bind\n"), open: true,
		code: 2, says: []string{"state_dir /srv/bind", "only its records can open"}}})
}

// tryBadInput lets the agent meet one bad input and compares the node before and after.
func tryBadInput(t *testing.T, n *harness.Node, c badInput) {
	t.Helper()
	const file = "/root/bad.yaml"
	n.Write(file, 0o600, c.config)
	limit := int64(0)
	if c.open {
		limit = headerArea
	}
	before, records, mapped := n.Digests(limit), n.State(), n.Sh("dmsetup ls")
	if c.before != nil {
		c.before()
	}
	var r harness.Result
	if c.run != nil {
		r = c.run()
	} else {
		r = n.Agent("--config " + file + " run")
	}
	if c.after != nil {
		c.after()
	}
	r.Command = c.what + ": " + r.Command
	wantRefusal(t, r, c.code, c.says...)
	if changed := harness.ChangedDisks(before, n.Digests(limit)); len(changed) > 0 {
		t.Errorf("%s: disks were written to: %v", c.what, changed)
	}
	if after := n.State(); after != records {
		t.Errorf("%s: records changed:\n%s\n%s", c.what, records, after)
	}
	if after := n.Sh("dmsetup ls"); after != mapped {
		t.Errorf("%s: mappings changed:\n%s\n%s", c.what, mapped, after)
		n.Sh("luks-kms-agent lock")
	}
}

func badConfigurations(n *harness.Node) []badInput {
	return []badInput{
		{what: "not YAML", config: "kms_key: x\nvolumes: [\n", code: 2, says: []string{"/root/bad.yaml:", "Correct /root/bad.yaml"}},
		{what: "unknown field", config: n.Config("kms_ky: x\n"), code: 2, says: []string{"/root/bad.yaml:3:", `"kms_ky"`, "key_scope"}},
		{what: "wrong value", config: n.Config("key_scope: disk\n"), code: 2, says: []string{"/root/bad.yaml:3:", "node, volume"}},
		{what: "no key", config: "filesystem: xfs\n", code: 2, says: []string{"kms_key is missing"}},
		{what: "malformed key", config: n.ConfigFor("not/a/key", ""), code: 2, says: []string{"Correct kms_key"}},
		{what: "AWS managed key by alias", config: n.ConfigFor("alias/aws/ebs", ""), code: 4, says: []string{"customer managed key"}},
		{what: "wrong region", config: n.Config("region: eu-west-1\n"), code: 4, says: []string{"same region"}},
		{what: "others may write it", config: n.Config(""), before: func() { n.Sh("chmod 0666 /root/bad.yaml") }, code: 2, says: []string{"0666", "0600"}},
		{what: "another's", config: n.Config(""), before: func() { n.Sh("chown 1:1 /root/bad.yaml") }, after: func() { n.Sh("chown 0:0 /root/bad.yaml") },
			code: 2, says: []string{"uid 1", "root"}},
		{what: "not there", run: func() harness.Result { return n.Agent("--config /root/none.yaml run") }, code: 2, says: []string{"/root/none.yaml", "kms_key: arn:aws:kms"}},
		{what: "data keys in clear text over a network", config: n.Config("imds_endpoint: http://192.0.2.1\n"), code: 2, says: []string{"/root/bad.yaml:3:", "link-local"}},
		{what: "unknown flag", run: func() harness.Result { return n.Agent("run --force") }, code: 2, says: []string{"--help"}},
	}
}

func badPrograms(n *harness.Node) []badInput {
	hide := func(path string) (before, after func()) {
		return func() { n.Sh("mv " + path + " /root/hidden") }, func() { n.Sh("mv /root/hidden " + path) }
	}
	noCryptsetup, cryptsetup := hide("/usr/sbin/cryptsetup")
	noMkfs, mkfs := hide("/usr/sbin/mkfs.xfs")
	module := strings.TrimSpace(n.Sh("modinfo -n dm_crypt"))
	moveModule, withModule := hide(module)
	noModule := func() { moveModule(); n.Sh("modprobe -r dm_crypt") }
	return []badInput{
		{what: "no cryptsetup", config: n.Config(""), before: noCryptsetup, after: cryptsetup, code: 8, says: []string{"Install cryptsetup"}},
		{what: "no mkfs.xfs", config: n.Config(""), before: noMkfs, after: mkfs, code: 8, says: []string{"xfsprogs"}},
		{what: "no dm-crypt", config: n.Config(""), before: noModule, after: withModule, code: 8, says: []string{"modprobe dm_crypt"}},
	}
}

// badRecords are state directories of a node with volumes. Each is a damaged copy.
func badRecords(n *harness.Node) []badInput {
	copied := func(script string) func() {
		return func() { n.Sh("rm -rf /srv/state && cp -a /root/good /srv/state && cd /srv/state && " + script) }
	}
	config := n.Config("state_dir: /srv/state\n")
	return []badInput{
		{what: "corrupt volume record", config: config, code: 3, says: []string{"/srv/state/volumes/", "Look at the record"},
			before: copied("for f in volumes/*; do truncate -s 40 $f; done")},
		{what: "corrupt key record", config: config, code: 3, says: []string{"/srv/state/keys/", "Look at the record"},
			before: copied("for f in keys/*; do truncate -s 40 $f; done")},
		{what: "records of a future version", config: config, code: 3, says: []string{"version 3"},
			before: copied(`sed -i 's/"version": *1/"version": 3/' volumes/* keys/*`)},
		{what: "unknown field in a record", config: config, code: 3, says: []string{"surprise"},
			before: copied(`sed -i '1s/{/{"surprise": 1,/' volumes/*`)},
		{what: "a FIFO and a directory in place of records", config: config, code: 3, says: []string{"it is not a regular file", "Look at the record"},
			before: copied("set -- volumes/* && rm $1 $2 && mkfifo -m 0600 $1 && mkdir -m 0700 $2")},
		{what: "another's record, and one that a group may write", config: config, code: 3, says: []string{"owned by user 1, not by 0", "0620"},
			before: copied("set -- volumes/* && chown 1 $1 && chmod 0620 $2")},
		{what: "a symbolic link in place of a record", config: config, code: 3, says: []string{"/srv/state/keys/", "it is a symbolic link"},
			before: copied("set -- keys/* && mv $1 /srv/moved && ln -s /srv/moved $1")},
		{what: "a symbolic link in place of a directory of records", config: config, code: 6, says: []string{"/srv/state/keys", "it is a symbolic link"},
			before: copied("rm -rf /srv/keys && mv keys /srv/keys && ln -s /srv/keys keys")},
		{what: "a symbolic link in place of the state directory", config: n.Config("state_dir: /srv/link\n"), code: 2, says: []string{"/srv/link is a symbolic link to /srv/state"},
			before: copied("ln -sfn /srv/state /srv/link")},
		{what: "others may read the state", config: config, code: 6, says: []string{"/srv/state", "0700"},
			before: copied("chmod 0755 .")},
		{what: "another's state directory", config: config, code: 6, says: []string{"/srv/state", "owned by user 1, not by 0"},
			before: copied("chown 1 .")},
		{what: "the ciphertext of another key", config: config, code: 4, says: []string{"wrapped key"},
			before: copied(`sed -i 's/\("wrapped_key": *"\)[^"]*/\1AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA/' keys/*`)},
	}
}

// badStateDirs are places that are no good for records, whatever the state of the volumes.
func badStateDirs(n *harness.Node) []badInput {
	tmpfs := func(options, script string) func() {
		return func() {
			n.Sh("mkdir -p /srv/tmpfs && mount -t tmpfs -o mode=0700," + options + " tmpfs /srv/tmpfs && cd /srv/tmpfs && " + script)
		}
	}
	umount := func() { n.Sh("umount /srv/tmpfs") }
	return []badInput{
		{what: "state directory full", config: n.Config("state_dir: /srv/tmpfs\n"), code: 6, says: []string{"no space left", "Free space"},
			before: tmpfs("size=4k", "head -c 4096 /dev/zero >full"), after: umount},
		{what: "state directory read-only", config: n.Config("state_dir: /srv/tmpfs\n"), code: 6, says: []string{"read-only", "writable"},
			before: tmpfs("size=1m", "mount -o remount,ro /srv/tmpfs"), after: umount},
		{what: "state directory on a managed volume", config: n.Config("state_dir: /mnt/state\n"), code: 2, says: []string{"state_dir /mnt/state"}},
	}
}

// twoAtOnce: a second agent waits for the first and says so. It gives up after a while, or goes on when the first is done. One that
// was killed keeps nobody out.
func twoAtOnce(t *testing.T, n *harness.Node) {
	t.Helper()
	n.Write(harness.ConfigFile, 0o600, n.Config("call_timeout: 2s\n"))
	// first starts an agent that waits for KMS with the records in its hands, and returns its process.
	first := func() string {
		n.KMS.Forget()
		n.KMS.Inject(proxy.Fault{Kind: proxy.Hang})
		pid := strings.TrimSpace(n.Sh("luks-kms-agent run >/root/first 2>&1 & echo $!"))
		n.Await("the first agent asks KMS", time.Minute, func() bool { return len(n.KMS.Calls()) > 0 })
		return pid
	}
	pid := first()
	wantRefusal(t, n.Agent("run"), 5, "waiting for another command", "in use by process "+pid, "Another luks-kms-agent is at work")
	n.Sh("rm -f /root/code; (luks-kms-agent run >/root/second 2>&1; echo $? >/root/code) &")
	n.Await("the second agent waits", time.Minute, func() bool { return strings.Contains(string(n.Read("/root/second")), "waiting for another command") })
	n.KMS.Inject()
	n.Await("the second agent is done", time.Minute, func() bool { return n.Try("test -s /root/code").Code == 0 })
	wantRefusal(t, n.Try("cat /root/second; exit $(cat /root/code)"), 0, "2 already open")
	wantRefusal(t, n.Try("cat /root/first"), 0, "2 unlocked")

	n.Sh("luks-kms-agent lock")
	n.Sh("kill -KILL " + first())
	n.KMS.Inject()
	if r := n.Agent("run"); r.Code != 0 || strings.Contains(r.Stderr, "waiting for another command") {
		t.Errorf("after an agent was killed: %s", r)
	}
}
