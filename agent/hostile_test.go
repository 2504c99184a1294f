package agent

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// Each attack on a volume that a first boot made, with its record and without: it is refused as a header, which is exit code 7
// (cmd's TestExitCodesAndRemedies), nothing is mapped or written, and the other volume opens. That each check stands by itself is
// for luks's TestEachCheckAlone.
func TestAttacksInRun(t *testing.T) {
	m := newMachine(t)
	victim := m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	good, err := os.ReadFile(victim.Path)
	if err != nil {
		t.Fatal(err)
	}
	records := filepath.Join(m.dir, "records")
	tool(t, "", "cp", "-a", m.cfg.StateDir, records)
	for _, a := range lukstest.Attacks() {
		for _, adopted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, adopted %v", a.Name, adopted), func(t *testing.T) {
				m.t = t
				m.reboot()
				if err := os.RemoveAll(m.cfg.StateDir); err != nil {
					t.Fatal(err)
				}
				if !adopted {
					tool(t, "", "cp", "-a", records, m.cfg.StateDir)
				}
				m.write(victim, 0, good[:1<<20])
				if err := a.Do(victim.Path); err != nil {
					t.Fatal(err)
				}
				before, err := os.ReadFile(victim.Path)
				if err != nil {
					t.Fatal(err)
				}

				errs := m.run().Failures()
				if len(errs) != 1 {
					t.Fatalf("failures: %v", errs)
				}
				var refused *RefusedError
				var header *luks.HeaderError
				switch {
				case errors.As(errs[0], &header), errors.As(errs[0], &refused) && refused.Refusal == RefusedHeader:
				case a.Name == "another UUID" && !adopted && refused != nil && refused.Refusal == RefusedContent:
					// To the plan it is another volume on the disk of this one.
				default:
					t.Errorf("it is not refused as a header: %v", errs[0])
				}
				if !strings.Contains(errs[0].Error(), a.Reason) {
					t.Errorf("the reason does not say %q: %v", a.Reason, errs[0])
				}
				if len(m.open) != 1 || len(m.mounts) != 1 || slices.Contains(opened(m), victim.Path) {
					t.Errorf("open %v, mounted %v", m.open, m.mounts)
				}
				if after, err := os.ReadFile(victim.Path); err != nil || !bytes.Equal(before, after) {
					t.Errorf("the disk was written to (%v)", err)
				}
			})
		}
	}
}

func opened(m *machine) []string {
	var paths []string
	for _, path := range m.open {
		paths = append(paths, path)
	}
	return paths
}

// A person adds a slot, removes another and more, all with plain cryptsetup: the volume opens with its record, and is adopted without.
func TestHeaderChangedByAPersonOpens(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()

	var rec keycache.KeyRecord
	for _, rec = range m.records().Keys {
	}
	key, err := m.node().cloud.Decrypt(t.Context(), rec)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Wipe()
	ours, backup := filepath.Join(m.dir, "ours"), filepath.Join(m.dir, "backup")
	if err := os.WriteFile(ours, key.Passphrase(), 0o600); err != nil {
		t.Fatal(err)
	}
	cheap := []string{"--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "64", "--pbkdf-parallel", "1"}
	cryptsetup := func(input string, args ...string) {
		t.Helper()
		tool(t, input, "cryptsetup", append([]string{"--batch-mode"}, args...)...)
	}
	cryptsetup("temporary", append([]string{"luksAddKey", "--key-file", ours, d.Path, "-"}, cheap...)...)
	cryptsetup("recovery", append([]string{"luksAddKey", "--key-file", ours, d.Path, "-"}, cheap...)...)
	cryptsetup("", "luksKillSlot", d.Path, "1")
	cryptsetup(`{"type":"clevis","keyslots":["2"],"jwe":{"x":[1]}}`, "token", "import", "--json-file=-", d.Path)
	cryptsetup("", "config", "--label", "renamed", "--subsystem", "theirs", d.Path)
	cryptsetup("", "luksHeaderBackup", "--header-backup-file", backup, d.Path)
	cryptsetup("recovery", "luksKillSlot", "--key-file=-", d.Path, "0")
	if errs := m.run().Failures(); len(errs) != 1 || !strings.Contains(errs[0].Error(), "keyslots instead of one") {
		t.Errorf("without its slot: %v", errs)
	}
	cryptsetup("", "luksHeaderRestore", "--header-backup-file", backup, d.Path)

	before := m.sums()
	for _, adopted := range []bool{false, true} {
		m.reboot()
		if adopted {
			if err := os.RemoveAll(m.cfg.StateDir); err != nil {
				t.Fatal(err)
			}
		}
		if r := m.runOK(); len(m.mounts) != 1 || r.Outcomes[0].Action.Verb != map[bool]Verb{false: Unlock, true: Adopt}[adopted] {
			t.Errorf("adopted %v: %s, mounts %v", adopted, r.Outcomes[0].Action.Verb, m.mounts)
		}
	}
	m.untouched(before)
	cryptsetup("recovery", "open", "--test-passphrase", "--key-slot", "2", "--key-file=-", d.Path)
}

// What volumes.Probe is held against in full, here as far as the agent: all sorts of foreign disks beside a blank one. Each is refused
// with what it holds, and has the same bytes afterwards; the blank one is formatted.
func TestForeignDisksInRun(t *testing.T) {
	const mib = 1 << 20
	at := func(offset int64, data string) func(*machine, volumes.Device) {
		return func(m *machine, d volumes.Device) {
			if offset < 0 {
				offset += d.Size
			}
			m.write(d, offset, []byte(data))
		}
	}
	program := func(input, name string, args ...string) func(*machine, volumes.Device) {
		return func(m *machine, d volumes.Device) { tool(m.t, input, name, append(args, d.Path)...) }
	}
	noise := make([]byte, mib)
	rand.NewChaCha8([32]byte{3}).Read(noise)
	m := newMachine(t)
	want := map[string]string{} // identity -> in the reason
	for i, c := range []struct {
		want string
		make func(*machine, volumes.Device)
	}{
		{"ext4 filesystem (label data)", program("", "mke2fs", "-q", "-F", "-t", "ext4", "-L", "data")},
		{"swap signature", program("", "mkswap", "-q")},
		{"gpt partition table", program("label: gpt\nsize=10M\n", "sfdisk", "-q")},
		{"dos partition table", program("label: dos\nsize=10M\n", "sfdisk", "-q")},
		{"LUKS1", program("pass", "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file=-")},
		{"LUKS2 volume that is not ours", program("pass", "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2",
			"--pbkdf-force-iterations", "1000", "--key-file=-")},
		{"is not zero", func(m *machine, d volumes.Device) { // the backup of a GPT alone
			program("label: gpt\nsize=10M\n", "sfdisk", "-q")(m, d)
			m.write(d, 0, make([]byte, mib))
		}},
		{"it holds the remains of a LUKS header", at(0, "LUKS\xba\xbe\x00\x02")},
		{"it holds the remains of a LUKS header", at(0x4000, "SKUL\xba\xbe\x00\x02")},
		{"isw_raid_member", at(-1024, "Intel Raid ISM Cfg Sig. 1.3.00")},
		{"is not zero", at(0, string(noise))},
		{"is not zero", at(-mib, string(noise))},
		{"byte 0x01 at offset 0 ", at(0, "\x01")},
		{"byte 0x01 at offset 16777215 ", at(16*mib-1, "\x01")},
		{"byte 0x01 at offset 25165824 ", at(-16*mib, "\x01")},
		{"byte 0x01 at offset 41943039 ", at(-1, "\x01")},
	} {
		d := m.disk(volumes.ClassEBS, fmt.Sprintf("vol-%02d", i))
		c.make(m, d)
		want[d.Identity] = c.want
	}
	before := m.sums()
	blank := m.disk(volumes.ClassEBS, "vol-blank")

	r := m.run()
	for _, o := range r.Outcomes {
		id := o.Action.Device.Identity
		if id == blank.Identity {
			if o.Err != nil || o.Action.Verb != Format {
				t.Errorf("%s: %s, %v", id, o.Action.Verb, o.Err)
			}
			continue
		}
		var refused *RefusedError
		if !errors.As(o.Err, &refused) || refused.Refusal != RefusedContent || !strings.Contains(refused.Reason, want[id]) {
			t.Errorf("%s: got %v, want a refusal with %q", id, o.Err, want[id])
		}
		delete(want, id)
	}
	if len(want) > 0 || len(m.open) != 1 {
		t.Errorf("not decided on: %v; open: %v", want, m.open)
	}
	delete(before, blank.Identity)
	after := m.sums()
	for id, sum := range before {
		if after[id] != sum {
			t.Errorf("disk %s was written to", id)
		}
	}
}

// tool runs a real program.
func tool(t testing.TB, input, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err != nil {
			path, err = exec.LookPath(filepath.Join(dir, name))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}
