//go:build packer

package packaging_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// packer validates the template as one that Packer 1.6 knows, Debian's, with its own amazon-ebs: without the blocks that came later.
func packer(t *testing.T, template string, vars ...string) (string, error) {
	t.Helper()
	program, err := exec.LookPath("packer")
	if err != nil {
		t.Fatal("install packer (make test-unit does, on Debian 12)")
	}
	dir := t.TempDir()
	later := regexp.MustCompile(`(?ms)^  metadata_options \{.*?^  \}\n|^  imds_support .*?\n`)
	files := map[string]string{"node.pkr.hcl": later.ReplaceAllString(template, ""), "agent.deb": "", "config.yaml": ""}
	for _, script := range []string{"install.sh", "seal.sh", "cleanup.sh"} {
		files[script] = read(t, "image/"+script)
	}
	for file, text := range files {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"validate"}
	for _, v := range append([]string{"region=us-east-1", "source_ami=ami-0123456789abcdef0", "package=agent.deb", "config=config.yaml"}, vars...) {
		args = append(args, "-var", v)
	}
	cmd := exec.Command(program, append(args, ".")...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "CHECKPOINT_DISABLE=1", "PACKER_NO_COLOR=1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestPackerTemplate(t *testing.T) {
	text := read(t, "image/luks-kms-agent.pkr.hcl")
	if out, err := packer(t, text, "preflight=yes", "subnet_id=subnet-0123456789abcdef0"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for _, broken := range [][2]string{
		{"ssh_username  ", "ssh_usrname  "}, {"var.source_ami\n", "var.source_image\n"}, {`"amazon-ebs" "node"`, `"amazon-ebz" "node"`},
		{"provisioner \"shell\"", "provisioner \"sh\""}, {"/seal.sh\"", "/seel.sh\""}, {"\nbuild {", "\nbuild "},
	} {
		spoilt := strings.Replace(text, broken[0], broken[1], 1)
		if out, err := packer(t, spoilt); spoilt == text || err == nil {
			t.Errorf("with %q for %q it is still good: %s", broken[1], broken[0], out)
		}
	}
	for _, v := range []string{
		"region=here", "source_ami=debian", "package=agent.tar", "config=config.json", "ssh_username=", "instance_type=big", "subnet_id=mine",
		"instance_profile=arn:aws:iam::1:x", "preflight=perhaps", "ami_name=x",
	} {
		name, _, _ := strings.Cut(v, "=")
		if out, err := packer(t, text, v); err == nil || !strings.Contains(out, name) {
			t.Errorf("%s is taken: %v\n%s", v, err, out)
		}
	}
}
