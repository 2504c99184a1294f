package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The session in docs/operations.md has the commands of the steps, in their order.
func TestDocumentHasTheSteps(t *testing.T) {
	text, err := os.ReadFile("../../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	session := string(block.Find(text))
	version := regexp.MustCompile(`(?m)^# dpkg -i luks-kms-agent_(\S+)_amd64\.deb$`).FindStringSubmatch(session)
	key := regexp.MustCompile(`\|kms_key: (\S+)\|'`).FindStringSubmatch(session)
	if version == nil || key == nil {
		t.Fatalf("no version or no key in\n%s", session)
	}
	var want, got []string
	for _, s := range steps(version[1], key[1]) {
		if s.before != "" {
			want = append(want, "# : "+s.before)
		}
		want = append(want, "# "+s.command)
	}
	for line := range strings.Lines(session) {
		if strings.HasPrefix(line, "# ") {
			got = append(got, strings.TrimSuffix(line, "\n"))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("docs/operations.md has\n%s\nthe steps are\n%s\n(make session)", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if recoveryKey.MatchString(strings.ReplaceAll(session, hidden, "")) || strings.Count(session, hidden) != 1 {
		t.Error("there is a recovery key in it, or none was hidden")
	}
}

func TestReplace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "document.md")
	const one = "before\n\n```console\n# a\n```\n"
	for text, want := range map[string]string{
		one + "\n## After\n": "before\n\n```console\n# b\nc\n```\n\n## After\n", one + one: "", "none": "",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		err := replace(file, "# b\nc\n")
		got, _ := os.ReadFile(file)
		if want == "" && (err == nil || string(got) != text) || want != "" && (err != nil || string(got) != want) {
			t.Errorf("%q becomes %q (%v)", text, got, err)
		}
	}
}

func TestOtherDisksAreLeftOut(t *testing.T) {
	const plan = "nothing  /dev/nvme0n1  /mnt\n         open\nleave    /dev/vdb      -  in use\n         neither\nleave    /dev/nvme2n1  -  in use\n         neither\nNothing would be changed.\n"
	const want = "nothing  /dev/nvme0n1  /mnt\n         open\nleave    /dev/nvme2n1  -  in use\n         neither\nNothing would be changed.\n"
	if got := otherDisk.ReplaceAllString(plan, ""); got != want {
		t.Errorf("got\n%s", got)
	}
}
