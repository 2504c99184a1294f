//go:build vm

package vm_test

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestCommandLine: what is installed beside the program works on a node: man pages, completion of volumes in bash; and what
// import-emr makes of an EMR security configuration opens the volumes.
func TestCommandLine(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ebs1)
	n.Provide("/usr/share/bash-completion/bash_completion", 0o644, bashCompletion(t))
	n.Provide("/root/complete", 0o755, `#!/bin/bash
source /usr/share/bash-completion/bash_completion
_completion_loader "$1"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMP_TYPE=9
compopt() { :; }
__start_luks-kms-agent
printf '%s\n' "${COMPREPLY[@]}"
`)
	n.Resume()
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt")

	for _, page := range []string{"luks-kms-agent", "luks-kms-agent-run", "luks-kms-agent-import-emr"} {
		if text := n.Sh("zcat /usr/share/man/man8/" + page + ".8.gz"); !strings.Contains(text, "\n.SH EXIT STATUS\n") {
			t.Errorf("%s:\n%s", page, text)
		}
	}

	asked := len(n.KMS.Calls()) + len(n.IMDS.Requests())
	for typed, want := range map[string]string{
		"unl": "unlock", "lock vol-": "vol-0aaaaaaaaaaaaaaa1", "unlock /m": "/mnt", "status --log-level de": "debug",
	} {
		if got := strings.TrimSpace(n.Sh("/root/complete luks-kms-agent " + typed)); got != want {
			t.Errorf("%q is completed with %q, want %q", typed, got, want)
		}
	}
	if now := len(n.KMS.Calls()) + len(n.IMDS.Requests()); now != asked {
		t.Errorf("KMS and IMDS were asked %d times to complete words", now-asked)
	}

	// The node as EMR would have it: the configuration is made anew.
	n.Sh("luks-kms-agent lock && rm " + harness.ConfigFile)
	n.Write("/root/emr.json", 0o600, `{"EncryptionConfiguration": {"EnableInTransitEncryption": false, "EnableAtRestEncryption": true,
		"AtRestEncryptionConfiguration": {"LocalDiskEncryptionConfiguration": {"EncryptionKeyProviderType": "AwsKms", "AwsKmsKey": "`+n.Key+`"}}}}`)
	n.Sh("luks-kms-agent import-emr /root/emr.json --output " + harness.ConfigFile)
	if text := string(n.Read(harness.ConfigFile)); !strings.Contains(text, "kms_key: "+n.Key) {
		t.Errorf("the configuration is\n%s", text)
	}
	// Where the story's KMS is, no security configuration can say.
	n.Sh("printf 'kms_endpoint: " + harness.KMSEndpoint + "\\nmulti_attach: allow\\n' >>" + harness.ConfigFile)
	var report struct {
		Version int
		Result  string
		Volumes []struct{ Action, Identity string }
	}
	if err := json.Unmarshal([]byte(n.Sh("luks-kms-agent run --json")), &report); err != nil {
		t.Fatal(err)
	}
	if report.Version != 1 || report.Result != "ok" || len(report.Volumes) != 1 || report.Volumes[0].Action != "unlock" {
		t.Errorf("run --json: %+v", report)
	}
	wantMounted(t, n, "/mnt")
	if locked := n.Sh("luks-kms-agent lock --json"); !strings.Contains(locked, `"locked": true`) {
		t.Errorf("lock --json: %s", locked)
	}
	wantMounted(t, n)
}

// bashCompletion is the host's own bash-completion: the boot disk of the stories has none.
func bashCompletion(t *testing.T) string {
	t.Helper()
	const path = "/usr/share/bash-completion/bash_completion"
	text, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		if err := harness.Install(context.Background(), "bash-completion"); err != nil {
			t.Fatal(err)
		}
		text, err = os.ReadFile(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
