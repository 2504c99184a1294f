package packaging_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// purging is the script that dpkg runs after a remove and a purge, with its folders in one of this test.
type purging struct {
	t           *testing.T
	dir, script string
}

func newPurging(t *testing.T) purging {
	t.Helper()
	dir := t.TempDir()
	script := read(t, "scripts/postremove-deb.sh")
	for _, folder := range []string{"/var/lib/luks-kms-agent", "/var/log/luks-kms-agent", "/var/spool/luks-kms-agent", "/etc/systemd/system", "/run/systemd/system"} {
		if !strings.Contains(script, folder) {
			t.Errorf("the script does not know %s", folder)
		}
		script = strings.ReplaceAll(script, folder, dir+folder)
	}
	p := purging{t, dir, filepath.Join(dir, "postrm")}
	p.write("postrm", script)
	// Every purge of this test is in the same second.
	p.write("bin/date", "#!/bin/sh\necho 20261126T014240Z\n")
	if err := errors.Join(os.MkdirAll(dir+"/var/lib", 0o755), os.MkdirAll(dir+"/var/log", 0o755), os.Chmod(dir+"/bin/date", 0o755)); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p purging) write(path, text string) {
	p.t.Helper()
	if err := write(filepath.Join(p.dir, path), []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// run runs the script as dpkg does, and returns what it says.
func (p purging) run(args ...string) string {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), "sh", append([]string{p.script}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+p.dir+"/bin:"+os.Getenv("PATH"), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		p.t.Errorf("%v: %v\n%s", args, err, out)
	}
	return strings.ReplaceAll(string(out), p.dir, "")
}

func (p purging) want(path, text string) {
	p.t.Helper()
	if got, err := os.ReadFile(filepath.Join(p.dir, path)); err != nil || string(got) != text {
		p.t.Errorf("%s is %q (%v), want %q", path, got, err, text)
	}
}

func (p purging) wantGone(paths ...string) {
	p.t.Helper()
	for _, path := range paths {
		if _, err := os.Lstat(filepath.Join(p.dir, path)); !errors.Is(err, os.ErrNotExist) {
			p.t.Errorf("%s is there (%v)", path, err)
		}
	}
}

const record = "var/lib/luks-kms-agent/keys/1.json"

// A purge renames what it finds and says so, each time under a name of its own; only then is anything other than before.
func TestPurgeKeepsRecords(t *testing.T) {
	p := newPurging(t)
	p.write(record, "key 1")
	p.write("var/log/luks-kms-agent/audit.jsonl", "{}")
	p.write("var/spool/luks-kms-agent/positions.json", "{}")
	p.write("var/spool/luks-kms-agent/spool/000000000001.gz", "lines")
	link := filepath.Join(p.dir, "etc/systemd/system/multi-user.target.wants/luks-kms-agent.service")
	p.write("etc/systemd/system/multi-user.target.wants/other.service", "")
	if err := errors.Join(os.Symlink("/nowhere/luks-kms-agent.service", link), os.Symlink("multi-user.target.wants/other.service",
		filepath.Join(p.dir, "etc/systemd/system/luks-kms-agent-other.service"))); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"remove"}, {"upgrade", "1.2.3"}, {"failed-upgrade", "1.2.3"}, {"abort-install"}, {"disappear"}} {
		if said := p.run(args...); said != "" {
			t.Errorf("%v said %q", args, said)
		}
		p.want(record, "key 1")
		if _, err := os.Lstat(link); err != nil {
			t.Error(err)
		}
	}

	const purged = "luks-kms-agent.purged-20261126T014240Z"
	if said, want := p.run("purge"), "luks-kms-agent: the key records are not deleted, they are now in /var/lib/"+purged+
		"\nluks-kms-agent: the logs are not deleted, they are now in /var/log/"+purged+
		"\nluks-kms-agent: the logs that were not sent are not deleted, they are now in /var/spool/"+purged+"\n"; said != want {
		t.Errorf("the purge said\n%s\nwant\n%s", said, want)
	}
	p.want("var/lib/"+purged+"/keys/1.json", "key 1")
	p.want("var/log/"+purged+"/audit.jsonl", "{}")
	p.want("var/spool/"+purged+"/spool/000000000001.gz", "lines")
	p.wantGone("var/lib/luks-kms-agent", "var/log/luks-kms-agent", "var/spool/luks-kms-agent", "etc/systemd/system/multi-user.target.wants/luks-kms-agent.service")
	p.want("etc/systemd/system/multi-user.target.wants/other.service", "")
	p.want("etc/systemd/system/luks-kms-agent-other.service", "") // somebody's link that leads somewhere
	if info, err := os.Stat(filepath.Join(p.dir, "var/lib", purged)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the archive: %v (%v)", info, err)
	}

	p.write(record, "key 2")
	p.run("purge")
	p.write(record, "key 3")
	p.run("purge")
	p.want("var/lib/"+purged+"/keys/1.json", "key 1")
	p.want("var/lib/"+purged+"-2/keys/1.json", "key 2")
	p.want("var/lib/"+purged+"-3/keys/1.json", "key 3")
}

// What has no records goes without a word.
func TestPurgeOfNothing(t *testing.T) {
	p := newPurging(t)
	if said := p.run("purge"); said != "" {
		t.Errorf("without folders: %s", said)
	}
	p.write("var/lib/luks-kms-agent/lock", "1234\n")
	p.write("var/spool/luks-kms-agent/lock", "")
	p.write("var/spool/luks-kms-agent/positions.json", "{}") // all that was read is sent
	if err := errors.Join(os.MkdirAll(p.dir+"/var/lib/luks-kms-agent/keys", 0o700), os.MkdirAll(p.dir+"/var/log/luks-kms-agent", 0o700),
		os.MkdirAll(p.dir+"/var/spool/luks-kms-agent/spool", 0o700)); err != nil {
		t.Fatal(err)
	}
	if said := p.run("purge"); said != "" {
		t.Errorf("with empty folders: %s", said)
	}
	p.wantGone("var/lib/luks-kms-agent", "var/log/luks-kms-agent", "var/spool/luks-kms-agent")
}

// What cannot be renamed stays, and the purge goes on; so does what a link leads to.
func TestPurgeLeavesWhatItCannotRename(t *testing.T) {
	p := newPurging(t)
	p.write(record, "key 1")
	p.write("bin/mv", "#!/bin/sh\nexit 1\n")
	if err := os.Chmod(p.dir+"/bin/mv", 0o755); err != nil {
		t.Fatal(err)
	}
	if said := p.run("purge"); said != "luks-kms-agent: the key records are not deleted, they are still in /var/lib/luks-kms-agent\n" {
		t.Errorf("the purge said %s", said)
	}
	p.want(record, "key 1")

	p = newPurging(t)
	p.write("elsewhere/keys/1.json", "key 1")
	if err := os.Symlink(p.dir+"/elsewhere", p.dir+"/var/lib/luks-kms-agent"); err != nil {
		t.Fatal(err)
	}
	if said := p.run("purge"); said != "" {
		t.Errorf("with a link: %s", said)
	}
	p.want(record, "key 1")
}
