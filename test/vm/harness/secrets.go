package harness

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/search"
)

// secret is a byte string that must stand nowhere, and how to speak of it without showing it.
type secret struct {
	name  string
	bytes []byte
}

// secrets returns every form of the data keys of the node's records and of the volume keys of its open volumes.
func (n *Node) secrets() []secret {
	n.tb.Helper()
	var all []secret
	add := func(name string, key []byte) {
		all = append(all,
			secret{name, key},
			secret{name + " as hex", []byte(hex.EncodeToString(key))},
			secret{name + " as HEX", []byte(strings.ToUpper(hex.EncodeToString(key)))},
			secret{name + " as base64", []byte(base64.StdEncoding.EncodeToString(key))},
		)
		// HMAC, and so PBKDF2, keeps its key xored with two constants (RFC 2104).
		for pad, constant := range map[string]byte{"inner": 0x36, "outer": 0x5c} {
			all = append(all,
				secret{name + " in an " + pad + " pad", xored(key, constant)},
				secret{name + " as base64 in an " + pad + " pad", xored([]byte(base64.StdEncoding.EncodeToString(key)), constant)},
			)
		}
	}
	for _, record := range n.KeyRecords() {
		key, err := base64.StdEncoding.DecodeString(n.Unwrap(record))
		if err != nil || len(key) != 32 {
			n.tb.Fatalf("the data key of record %s has %d bytes: %v", record.ID, len(key), err)
		}
		add("data key "+record.ID, key)
	}
	// luks-UUID: 0 770048 crypt aes-xts-plain64 KEY 0 259:2 32768 …
	for line := range strings.Lines(n.Sh("dmsetup table --showkeys --target crypt")) {
		fields := strings.Fields(line)
		if len(fields) < 6 {
			continue
		}
		key, err := hex.DecodeString(fields[5])
		if err != nil {
			continue // in the kernel's keyring
		}
		add("volume key of "+fields[0], key)
	}
	return all
}

func xored(b []byte, constant byte) []byte {
	b = bytes.Clone(b)
	for i := range b {
		b[i] ^= constant
	}
	return b
}

// search lets a command of the guest look for secrets and a control, which is not one, and returns by name of secret where each was
// found. The command has $find for "guest find" with the needles.
func (n *Node) search(all []secret, command string) map[string][]string {
	n.tb.Helper()
	const needlesFile = "/dev/shm/needles" // never on a disk
	var text strings.Builder
	for _, s := range all {
		fmt.Fprintln(&text, base64.StdEncoding.EncodeToString(s.bytes))
	}
	n.Write(needlesFile, 0o600, text.String())
	printed := n.Sh("set -o pipefail; find='/usr/local/lib/story/guest find " + needlesFile + "'; " + command + "; rm " + needlesFile)
	found := map[string][]string{}
	for line := range strings.Lines(printed) {
		var i int
		var where string
		if _, err := fmt.Sscanf(strings.TrimSpace(line), "%d %s", &i, &where); err != nil {
			n.tb.Fatalf("the search printed %q: %v", line, err)
		}
		found[all[i].name] = append(found[all[i].name], where)
	}
	return found
}

// Leaks searches the journal of every boot, /run, /var, /etc, /root and /tmp of the running node, and its raw disks, for its
// keys in every form, and returns what it found. It first proves to itself that it would find something.
func (n *Node) Leaks() []string {
	n.tb.Helper()
	const planted = "/run/planted"
	all := n.secrets()
	if len(all) < 8 {
		n.tb.Fatalf("only %d secrets to search for: is no volume open?", len(all))
	}
	control := secret{"control", []byte("a string that only the search itself has written 7f3a")}
	n.Write(planted, 0o600, string(control.bytes))
	n.ShWith(control.bytes, "systemd-cat; journalctl --sync")
	found := n.search(append(all, control), "$find /run /var /etc /root /tmp; journalctl --all --no-pager -o export | $find -; rm "+planted)
	if !slices.Contains(found[control.name], planted) || !slices.Contains(found[control.name], "standard") {
		n.tb.Fatalf("the search does not find what was planted: %v", found[control.name])
	}
	delete(found, control.name)

	var leaks []string
	for name, where := range found {
		leaks = append(leaks, name+" in "+strings.Join(where, ", "))
	}
	raw := make([][]byte, len(all))
	for i, s := range all {
		raw[i] = s.bytes
	}
	for _, d := range n.disks {
		if found := n.Find(d.Name, raw...); len(found) > 0 {
			leaks = append(leaks, fmt.Sprintf("%d keys on the raw disk %s", len(found), d.Name))
		}
	}
	return leaks
}

// heldUnit runs the agent that stops at a step. It has what the service has; and no right to read other processes' memory, so that
// another process of root without that right can try to read its.
const heldUnit = "held.service"

// inMemory is in the environment of a held agent: what a search of its memory must find.
const inMemory = "a string that only the environment of the held agent has 51cc"

// Hold runs the agent until a step, where it stands still with all that it has in memory, and returns its process id.
func (n *Node) Hold(step string) (pid string) { n.tb.Helper(); return n.HoldCommand(step, "run") }

// HoldCommand is Hold for another command of the agent than run.
func (n *Node) HoldCommand(step, arguments string) (pid string) {
	n.tb.Helper()
	n.Sh("rm -f /run/luks-kms-agent.held; printf %s '" + step + "' >/run/luks-kms-agent.hold; " +
		"systemd-run --quiet --collect --unit=" + heldUnit + " -p LimitMEMLOCK=infinity -p LimitCORE=infinity -p CapabilityBoundingSet=~CAP_SYS_PTRACE " +
		// With GOTRACEBACK=crash a Go program that crashes wants to leave a core.
		"-E GOTRACEBACK=crash -E STORY='" + inMemory + "' " + holdingAgent + " " + arguments)
	n.Await("the agent is at the step "+step, 2*time.Minute, func() bool {
		if n.Try("test -e /run/luks-kms-agent.held").Code == 0 {
			return true
		}
		if n.Unit(heldUnit)["ActiveState"] != "active" {
			n.tb.Fatalf("the agent ended before the step %q\n%s", step, n.Try("journalctl -b --no-pager -o cat -u "+heldUnit).Stdout)
		}
		return false
	})
	return strings.TrimSpace(n.Sh("systemctl show -P MainPID " + heldUnit))
}

// Release kills a held agent, or waits for one that was killed.
func (n *Node) Release() {
	n.tb.Helper()
	n.Sh("systemctl kill -s KILL " + heldUnit + " 2>/dev/null || true; rm -f /run/luks-kms-agent.hold")
	n.Await("the held agent is gone", time.Minute, func() bool { return n.Unit(heldUnit)["ActiveState"] != "active" })
}

// Memory searches all memory of a held agent for the keys of the node in every form, and returns the names of those it found. It proves
// to itself that it reads that memory.
func (n *Node) Memory(pid string) []string {
	n.tb.Helper()
	all := n.secrets()
	for _, s := range all {
		if strings.HasPrefix(s.name, "data key") && strings.HasSuffix(s.name, "as base64") {
			all = append(all, secret{"KMS's answer with " + s.name, append([]byte(`"Plaintext":"`), s.bytes...)})
		}
	}
	control := secret{"control", []byte(inMemory)}
	found := n.search(append(all, control), "/usr/local/lib/story/guest memory "+pid+" | $find -")
	if found[control.name] == nil {
		n.tb.Fatalf("the search does not find the environment of the held agent in its memory: %v", found)
	}
	delete(found, control.name)
	return slices.Sorted(maps.Keys(found))
}

// SwapOut takes all memory that may be swapped out from units, and returns which keys stand in the swap file then. control is a string
// that must.
func (n *Node) SwapOut(swapFile, control string, units ...string) []string {
	n.tb.Helper()
	for _, unit := range units {
		// The kernel says EAGAIN where there is less to reclaim than it was asked for.
		n.Sh("echo 1G >/sys/fs/cgroup/system.slice/" + unit + "/memory.reclaim 2>/dev/null || true")
	}
	all := append(n.secrets(), secret{"control", []byte(control)})
	// What the page cache has of the file is older than what was swapped to its blocks.
	found := n.search(all, "sync; echo 3 >/proc/sys/vm/drop_caches; $find "+swapFile)
	if found["control"] == nil {
		n.tb.Fatalf("nothing was swapped out that had to be: %s", n.Sh("cat /proc/swaps; grep -H VmSwap /proc/[0-9]*/status | grep -v ' 0 kB' || true"))
	}
	delete(found, "control")
	return slices.Sorted(maps.Keys(found))
}

// BootDiskHolds returns the names of the keys that stand anywhere on the raw boot disk of a node that is switched off. The keys
// are those of the running node, so they are asked for before, and control is a string that must be there.
func (n *Node) BootDiskHolds(control string) func() []string {
	n.tb.Helper()
	all := append(n.secrets(), secret{"control", []byte(control)})
	needles := make([][]byte, len(all))
	for i, s := range all {
		needles[i] = s.bytes
	}
	return func() []string {
		n.tb.Helper()
		n.mustBeOff()
		raw := filepath.Join(n.dir, "boot.raw")
		if err := command(context.Background(), n.dir, "qemu-img", "convert", "-O", "raw", n.overlay(), raw); err != nil {
			n.tb.Fatalf("%v", err)
		}
		f, err := os.Open(raw)
		if err != nil {
			n.tb.Fatalf("%v", err)
		}
		defer f.Close()
		indexes, err := search.Find(&data{f: f}, needles)
		if err != nil {
			n.tb.Fatalf("cannot search %s: %v", raw, err)
		}
		var found []string
		for _, i := range indexes {
			found = append(found, all[i].name)
		}
		if !slices.Contains(found, "control") {
			n.tb.Fatalf("the search does not find what is on the boot disk")
		}
		return slices.DeleteFunc(found, func(name string) bool { return name == "control" })
	}
}
