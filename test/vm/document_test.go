//go:build vm

package vm_test

import (
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/document"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// follow runs the commands of a document's section that begin with the prefixes, as they stand there, one after the other in one shell of
// the guest, where each must succeed. before is run first; words replaces what stands for something of the reader's. Who calls it writes
// file, section and prefixes out: package document's test reads them.
func follow(t *testing.T, n *harness.Node, before string, words *strings.Replacer, file, section string, prefixes ...string) string {
	t.Helper()
	// The guest has no sudo, and its user is root.
	script := "set -eu\nsudo() { \"$@\"; }\n" + before + "\n"
	for _, prefix := range prefixes {
		command, err := document.Command(assets.Repo, file, section, prefix)
		if err != nil {
			t.Fatal(err)
		}
		script += words.Replace(command) + "\n"
	}
	return n.Sh(script)
}
