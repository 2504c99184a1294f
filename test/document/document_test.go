package document_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/document"
)

const tree = "../.."

// Documents of which each command has to be tried by a test, or to be listed in elsewhere.
var documents = []string{"README.md", "docs/images.md", "docs/packages.md", "docs/policies.md"}

// call is a test's claim on a command: it gives this to follow or to document.Command.
type call struct{ in, file, section, prefix string }

// Commands that a test runs in words of its own: the file that does so, and the words.
var ownWords = map[string][2]string{
	"make demo":          {"Makefile", "\ndemo: "},
	"make test":          {".ci/run", "exec make test\n"},
	"make bench":         {"Makefile", "\nbench: "},
	"make package":       {"packaging/package_test.go", "exec make package ARCHES="},
	"systemctl poweroff": {"test/vm/harness/node.go", `"systemctl --no-block poweroff"`},
	"sudo dnf install ./luks-kms-agent-*.x86_64.rpm": {"test/vm/package_test.go", `n.Sh(rpm + "-i " + earlier(t, n, "rpm"))`}, // Debian has no repository for dnf
	// As far as it goes without an account: validate, with these variables.
	packerBuild: {"packaging/packer_test.go", `args := []string{"validate"}`},
}

const packerBuild = "packer build -var region=us-east-1 -var source_ami=ami-0123456789abcdef0 \\\n" +
	"    -var package=build/packages/luks-kms-agent_VERSION_amd64.deb -var config=config.yaml packaging/image"

// Commands that need an account, or an instance in it, and why.
var needAccount = []struct{ begins, why string }{
	{"aws ", "calls AWS"},
	{"(umask 077; aws ec2 create-key-pair ", "calls AWS"},
	{"for file in packaging/image/install.sh ", "calls AWS, aws s3 cp"},
	{"packer init packaging/image", "fetches Packer's plugin for Amazon"},
	{"ssh -i luks-kms-agent.pem admin@ADDRESS", "goes to an instance"},
	{"scp ", "goes to an instance"},
}

// judge says which commands of the documents nobody tries, and which claims on a command are not true.
func judge(t *testing.T, texts map[string]string, calls []call) (wrong []string) {
	t.Helper()
	commands := map[string][]string{} // by file and section
	everything := map[string]string{} // where each is
	for file, text := range texts {
		sections, err := document.Sections(text)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, s := range sections {
			commands[file+", "+s.Heading] = append(commands[file+", "+s.Heading], s.Commands...)
			for _, c := range s.Commands {
				everything[c] = file + ", " + s.Heading
			}
		}
	}
	tried := map[string]bool{}
	for _, c := range calls {
		n := 0
		for _, command := range commands[c.file+", "+c.section] {
			if strings.HasPrefix(command, c.prefix) {
				n, tried[command] = n+1, true
			}
		}
		if n != 1 {
			wrong = append(wrong, c.in+": "+strconv.Itoa(n)+" commands of "+c.file+", "+c.section+", begin with "+c.prefix)
		}
	}
	for command, by := range ownWords {
		if everything[command] == "" {
			wrong = append(wrong, "no document has "+command)
		}
		if text, err := os.ReadFile(filepath.Join(tree, by[0])); err != nil || !strings.Contains(string(text), by[1]) {
			wrong = append(wrong, by[0]+" does not have "+by[1])
		}
		tried[command] = true
	}
	needed := map[string]bool{}
	for command, where := range everything {
		listed := false
		for _, a := range needAccount {
			if strings.HasPrefix(command, a.begins) {
				listed, needed[a.begins] = true, true
			}
		}
		if !listed && !tried[command] {
			wrong = append(wrong, where+": nobody tries "+command)
		}
	}
	for _, a := range needAccount {
		if !needed[a.begins] {
			wrong = append(wrong, "no document has "+a.begins)
		}
	}
	slices.Sort(wrong)
	return wrong
}

// claims reads which commands the tests take out of the documents.
func claims(t *testing.T) (calls []call) {
	t.Helper()
	files, err := filepath.Glob(tree + "/test/vm/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob(tree + "/packaging/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	reached := map[string]bool{} // functions that are called, or are tests
	for _, file := range append(files, more...) {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			in := filepath.Base(file) + ", " + f.Name.Name
			if strings.HasPrefix(f.Name.Name, "Test") {
				reached[in] = true
			}
			ast.Inspect(f, func(n ast.Node) bool {
				c, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				var arguments []ast.Expr
				switch fun := c.Fun.(type) {
				case *ast.Ident:
					reached[filepath.Base(file)+", "+fun.Name] = true
					if fun.Name == "follow" && len(c.Args) > 4 {
						arguments = c.Args[4:]
					}
				case *ast.SelectorExpr:
					if x, ok := fun.X.(*ast.Ident); ok && x.Name == "document" && fun.Sel.Name == "Command" && f.Name.Name != "follow" {
						arguments = c.Args[1:]
					}
				}
				if arguments == nil {
					return true
				}
				var words []string
				for _, a := range arguments {
					literal, ok := a.(*ast.BasicLit)
					if !ok {
						t.Errorf("%s: file, section and prefixes have to be written out", in)
						return true
					}
					word, err := strconv.Unquote(literal.Value)
					if err != nil {
						t.Fatal(err)
					}
					words = append(words, word)
				}
				if len(words) < 3 {
					t.Errorf("%s follows no command: %q", in, words)
					return true
				}
				for _, prefix := range words[2:] {
					calls = append(calls, call{in, words[0], words[1], prefix})
				}
				return true
			})
		}
	}
	for _, c := range calls {
		if !reached[c.in] {
			t.Errorf("%s is never called", c.in)
		}
	}
	return calls
}

func readDocuments(t *testing.T) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, file := range documents {
		text, err := os.ReadFile(filepath.Join(tree, file))
		if err != nil {
			t.Fatal(err)
		}
		texts[file] = string(text)
	}
	return texts
}

// Each command of the documents is run by a test as it stands there, or by one in words of its own, or needs an account of AWS.
func TestEveryCommandIsTried(t *testing.T) {
	calls := claims(t)
	if len(calls) < 10 {
		t.Errorf("the tests follow only %d commands", len(calls))
	}
	for _, w := range judge(t, readDocuments(t), calls) {
		t.Error(w)
	}
}

func TestUntriedCommandsAreSeen(t *testing.T) {
	calls := claims(t)
	for _, c := range []struct{ file, from, to, says string }{
		{"README.md", "sudo luks-kms-agent plan ", "sudo luks-kms-agent plan\nsudo luks-kms-agent plan --json ", "2 commands of README.md, Install on a node, begin with sudo luks-kms-agent plan"},
		{"README.md", "sudo apt install", "sudo systemctl daemon-reload\nsudo apt install", "nobody tries sudo systemctl daemon-reload"},
		{"README.md", "make demo ", "make demonstration ", "nobody tries make demonstration"},
		{"README.md", "sh seal.sh ", "sh seal.sh --discard-records ", "nobody tries sh seal.sh --discard-records"},
		{"docs/images.md", "sh seal.sh\n", "", "0 commands of docs/images.md, By hand, begin with sh seal.sh"},
		{"docs/images.md", "systemctl poweroff\n", "reboot\n", "nobody tries reboot"},
		{"docs/packages.md", "mv -T ", "cp -a ", "nobody tries cp -a "},
		{"docs/packages.md", "luks-kms-agent verify\n", "luks-kms-agent verify\n\n", ""},
		{"docs/policies.md", "aws kms create-grant", "kms create-grant", "nobody tries kms create-grant"},
	} {
		texts := readDocuments(t)
		changed := strings.Replace(texts[c.file], c.from, c.to, 1)
		if changed == texts[c.file] {
			t.Errorf("%s has no %q", c.file, c.from)
		}
		texts[c.file] = changed
		wrong := judge(t, texts, calls)
		if c.says == "" && len(wrong) != 0 || c.says != "" && !slices.ContainsFunc(wrong, func(w string) bool { return strings.Contains(w, c.says) }) {
			t.Errorf("with %q for %q: %q, want %q", c.to, c.from, wrong, c.says)
		}
	}
}

func TestSections(t *testing.T) {
	got, err := document.Sections("# One\n\n```sh\na 'b # c\nd' # no part of it\n# nor this\ne \\\n    f\nfor x in y; do\n  z\ndone\n```\n\n```json\n{}\n```\n\n## Two `2`\n\n```sh node:x\ng\n```\n\n```\nh#i\n```\n")
	want := []document.Section{
		{Heading: "One", Commands: []string{"a 'b # c\nd'", "e \\\n    f", "for x in y; do\n  z\ndone"}},
		{Heading: "Two `2`", Commands: []string{"h#i"}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %q (%v), want %q", got, err, want)
	}
	for _, bad := range []string{"```\na\n```\n", "# One\n```bash\na\n```\n", "# One\n```\na 'b\n```\n", "# One\n```\nfor a in b; do\n```\n", "# One\n```\na \\\n```\n"} {
		if got, err := document.Sections(bad); err == nil {
			t.Errorf("%q is %q", bad, got)
		}
	}
}
