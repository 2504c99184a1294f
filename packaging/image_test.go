package packaging_test

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// component is a component document of EC2 Image Builder, as "Use the AWSTOE component document framework" in its user guide has it.
type component struct {
	Name          string
	Description   string
	SchemaVersion string `yaml:"schemaVersion"`
	Parameters    []map[string]struct {
		Type, Description string
		Default           *string
	}
	Phases []struct {
		Name  string
		Steps []struct {
			Name, Action   string
			TimeoutSeconds *int   `yaml:"timeoutSeconds"`
			OnFailure      string `yaml:"onFailure"`
			MaxAttempts    *int   `yaml:"maxAttempts"`
			Inputs         yaml.Node
		}
	}
}

// The inputs of the actions that ours uses; the guide's "Supported action modules" has more. true: it must be there.
var actions = map[string]struct {
	list   bool // inputs are a list of these
	inputs map[string]bool
}{
	"ExecuteBash":  {false, map[string]bool{"commands": true}},
	"CreateFolder": {true, map[string]bool{"path": true, "owner": false, "group": false, "permissions": false, "overwrite": false}},
	"S3Download":   {true, map[string]bool{"source": true, "destination": true, "expectedBucketOwner": false, "overwrite": false}},
}

var (
	name      = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
	reference = regexp.MustCompile(`\{\{\s*([^}\s]*)\s*\}\}`)
)

// checkComponent says what is wrong with a component document.
func checkComponent(text string) error {
	var c component
	dec := yaml.NewDecoder(strings.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil {
		return err
	}
	var wrong []error
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	if c.SchemaVersion != "1.0" {
		bad("schemaVersion is %q", c.SchemaVersion)
	}
	parameters := map[string]bool{}
	for _, p := range c.Parameters {
		for n, v := range p {
			if !name.MatchString(n) || v.Type != "string" || v.Description == "" || parameters[n] {
				bad("parameter %s: %+v", n, v)
			}
			parameters[n] = true
		}
	}
	phases := map[string]bool{}
	for _, p := range c.Phases {
		if phases[p.Name] || !slices.Contains([]string{"build", "validate", "test"}, p.Name) {
			bad("phase %q", p.Name)
		}
		phases[p.Name] = true
		steps := map[string]bool{}
		for _, s := range p.Steps {
			if steps[s.Name] || !name.MatchString(s.Name) {
				bad("step %q of %s", s.Name, p.Name)
			}
			steps[s.Name] = true
			if s.OnFailure != "" && !slices.Contains([]string{"Abort", "Continue", "Ignore"}, s.OnFailure) {
				bad("onFailure %q of %s", s.OnFailure, s.Name)
			}
			for _, n := range []*int{s.TimeoutSeconds, s.MaxAttempts} {
				if n != nil && *n != -1 && *n < 1 {
					bad("%d in %s", *n, s.Name)
				}
			}
			action, ok := actions[s.Action]
			if !ok {
				bad("action %q of %s", s.Action, s.Name)
				continue
			}
			inputs := make([]map[string]any, 1)
			var err error
			if action.list {
				err = s.Inputs.Decode(&inputs)
			} else {
				err = s.Inputs.Decode(&inputs[0])
			}
			if err != nil || len(inputs) == 0 {
				bad("inputs of %s: %v", s.Name, err)
				continue
			}
			for _, in := range inputs {
				for n, must := range action.inputs {
					if _, ok := in[n]; must && !ok {
						bad("%s has no %s", s.Name, n)
					}
				}
				for n := range in {
					if _, ok := action.inputs[n]; !ok {
						bad("%s has a %s", s.Name, n)
					}
				}
			}
		}
	}
	if !phases["build"] {
		bad("there is no build")
	}
	for _, r := range reference.FindAllStringSubmatch(text, -1) {
		if !parameters[r[1]] {
			bad("{{ %s }} is no parameter", r[1])
		}
	}
	return errors.Join(wrong...)
}

func TestImageBuilderComponent(t *testing.T) {
	text := read(t, "image/component.yaml")
	if err := checkComponent(text); err != nil {
		t.Error(err)
	}
	for _, broken := range [][2]string{
		{"schemaVersion: 1.0", "schemaVersion: 2.0"}, {"name: validate", "name: verify"}, {"name: validate", "name: build"},
		{"name: Seal", "name: Install"}, {"action: S3Download", "action: S3Fetch"}, {"commands:", "command:"}, {"destination:", "target:"},
		{"onFailure: Abort", "onFailure: Stop"}, {"{{ Package }}", "{{ Pakage }}"}, {"timeoutSeconds: 600", "timeoutSeconds: 0"},
		{"type: string", "type: text"}, {"    steps:", "    step:"}, {"phases:", "phase:"},
	} {
		spoilt := strings.Replace(text, broken[0], broken[1], 1)
		if spoilt == text || checkComponent(spoilt) == nil {
			t.Errorf("with %q for %q it is still good", broken[1], broken[0])
		}
	}
}

// What Debian's Packer does not know, and what no validator asks for.
func TestPackerTemplateMeansIMDSv2(t *testing.T) {
	text := read(t, "image/luks-kms-agent.pkr.hcl")
	for _, want := range []string{`http_tokens                 = "required"`, `imds_support = "v2.0"`, "ssh_clear_authorized_keys = true"} {
		if strings.Count(text, want) != 1 {
			t.Errorf("there is no %s", want)
		}
	}
	variables := regexp.MustCompile(`(?ms)^variable .*?^}`).FindAllString(text, -1)
	if len(variables) < 5 {
		t.Errorf("only %d variables", len(variables))
	}
	for _, v := range variables {
		if !strings.Contains(v, "description = ") || !strings.Contains(v, "validation {") {
			t.Errorf("without description or validation:\n%s", v)
		}
	}
}

// TestImageDocument: what the document shows is what template and component do, in the same order.
func TestImageDocument(t *testing.T) {
	doc, readme := read(t, "../docs/images.md"), read(t, "../README.md")
	template, builder := read(t, "image/luks-kms-agent.pkr.hcl"), read(t, "image/component.yaml")
	at := map[string]int{}
	for _, step := range []string{"sh install.sh config.yaml", "sh seal.sh", "sh cleanup.sh "} {
		for file, text := range map[string]string{"docs/images.md": doc, "README.md": readme, "the template": template, "the component": builder} {
			i := strings.Index(text, step)
			if i < at[file] || i < 0 {
				t.Errorf("%s: %q is at %d, after %d", file, step, i, at[file])
			}
			at[file] = i
		}
	}
	for _, v := range regexp.MustCompile(`-var (\w+)=`).FindAllStringSubmatch(doc+readme, -1) {
		if !strings.Contains(template, `variable "`+v[1]+`"`) {
			t.Errorf("there is no variable %s", v[1])
		}
	}
	for _, p := range regexp.MustCompile(`(?m)^  - (\w+):$`).FindAllStringSubmatch(builder, -1) {
		if !strings.Contains(doc, `"name":"`+p[1]+`"`) {
			t.Errorf("docs/images.md gives the component no %s", p[1])
		}
	}
	if !strings.Contains(read(t, "image/seal.sh"), "\nluks-kms-agent lock\nluks-kms-agent seal-image ") || !strings.Contains(readme, "# luks-kms-agent lock, luks-kms-agent seal-image\n") {
		t.Error("README.md does not say what seal.sh runs")
	}
	for _, script := range []string{"install.sh", "seal.sh", "cleanup.sh", "component.yaml"} {
		if !strings.Contains(doc, "packaging/image/"+script) {
			t.Errorf("docs/images.md does not bring %s", script)
		}
	}
}

// The scripts are read by whatever sh the image has.
func TestImageScriptsArePOSIX(t *testing.T) {
	scripts, err := filepath.Glob("image/*.sh")
	if err != nil || len(scripts) != 3 {
		t.Fatalf("%v, %v", scripts, err)
	}
	for _, script := range scripts {
		if text := read(t, script); !strings.HasPrefix(text, "#!/bin/sh\n") || !strings.Contains(text, "\nset -eu\n") {
			t.Errorf("%s is not for /bin/sh, or goes on after a failure", script)
		}
		if out, err := exec.Command("sh", "-n", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", script, err, out)
		}
	}
	out, err := exec.Command("sh", "image/install.sh", "config.yaml", "agent.tar").CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !bytes.Contains(out, []byte("neither")) {
		t.Errorf("a package that is none: %v, %s", err, out)
	}
}
