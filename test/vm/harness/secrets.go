package harness

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
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

// Leaks searches the journal of every boot, /run, /var, /etc, /root and /tmp of the running node, and its raw disks, for its
// keys in every form, and returns what it found. It first proves to itself that it would find something.
func (n *Node) Leaks() []string {
	n.tb.Helper()
	const needlesFile, planted = "/dev/shm/needles", "/run/planted"
	control := secret{"control", []byte("a string that only the search itself has written 7f3a")}
	all := append(n.secrets(), control)
	if len(all) < 9 {
		n.tb.Fatalf("only %d secrets to search for: is no volume open?", len(all)-1)
	}
	var text strings.Builder
	raw := make([][]byte, len(all))
	for i, s := range all {
		raw[i] = s.bytes
		fmt.Fprintln(&text, base64.StdEncoding.EncodeToString(s.bytes))
	}
	n.Write(needlesFile, 0o600, text.String())
	n.Write(planted, 0o600, string(control.bytes))
	n.ShWith(control.bytes, "systemd-cat; journalctl --sync")
	const guest = "/usr/local/lib/story/guest find " + needlesFile
	printed := n.Sh(guest + " /run /var /etc /root /tmp; journalctl --all --no-pager -o export | " + guest + " -; rm " + needlesFile + " " + planted)

	var leaks []string
	controls := map[string]bool{}
	for line := range strings.Lines(printed) {
		var i int
		var where string
		if _, err := fmt.Sscanf(strings.TrimSpace(line), "%d %s", &i, &where); err != nil {
			n.tb.Fatalf("the search printed %q: %v", line, err)
		}
		if all[i].name == control.name {
			controls[where] = true
			continue
		}
		leaks = append(leaks, all[i].name+" in "+where)
	}
	if !controls[planted] || !controls["standard"] {
		n.tb.Fatalf("the search does not find what was planted: %v", controls)
	}
	for _, d := range n.disks {
		if found := n.Find(d.Name, raw...); len(found) > 0 {
			leaks = append(leaks, fmt.Sprintf("%d keys on the raw disk %s", len(found), d.Name))
		}
	}
	return leaks
}
