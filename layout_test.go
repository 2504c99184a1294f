// Package repo_test holds the rules of the repository that the compiler does not: who imports whom, and what no package
// may have.
package repo_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

const module = "github.com/luks-kms-agent/luks-kms-agent/"

// Each room, and the rooms that it may import.
var rooms = map[string][]string{
	"cmd":      {"agent", "volumes", "luks", "keycache", "systemd", "archive"},
	"agent":    {"volumes", "luks", "keycache", "systemd", "archive"},
	"archive":  {},
	"volumes":  {},
	"luks":     {},
	"keycache": {},
	"systemd":  {},
	"test":     {"agent", "volumes", "luks", "keycache", "systemd", "archive"},
}

// Libraries that only some rooms may import; the tests' own servers and stories may too.
var owners = map[string][]string{
	"github.com/aws/":                          {"keycache", "archive"},
	"github.com/aws/aws-sdk-go-v2/service/s3":  {"archive"},
	"github.com/aws/amazon-s3-encryption":      {"archive"},
	"github.com/aws/aws-sdk-go-v2/feature/ec2": {"keycache"},
	"github.com/anatol/":                       {"luks"},
	"github.com/coreos/go-systemd":             {"systemd"},
	"github.com/godbus/":                       {"systemd"},
	"github.com/spf13/":                        {"cmd"},
	"github.com/piglig/":                       {"cmd"},
	"golang.org/x/term":                        {"cmd"},
}

// Packages for tests, which are not to be linked into the program. The tests of every room may import them.
var testKits = []string{"kmstest", "lukstest", "s3test"}

// Names under which anything could be put.
var shapeless = []string{"util", "utils", "common", "helper", "helpers", "misc", "types", "shared", "base", "lib", "internal"}

// judge returns what is wrong with a tree of Go files.
func judge(tree fs.FS) ([]string, error) {
	var wrong []string
	documented := map[string]bool{} // folder -> has a package comment
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata") {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		text, err := fs.ReadFile(tree, name)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, name, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		say := func(pos token.Pos, format string, args ...any) {
			wrong = append(wrong, fmt.Sprintf("%s: %s", fset.Position(pos), fmt.Sprintf(format, args...)))
		}
		folder := path.Dir(name)
		room, _, _ := strings.Cut(folder, "/")
		isTest := strings.HasSuffix(name, "_test.go")
		if !isTest {
			documented[folder] = documented[folder] || strings.TrimSpace(file.Doc.Text()) != ""
		}
		if slices.Contains(shapeless, path.Base(folder)) || slices.Contains(shapeless, file.Name.Name) {
			say(file.Package, "package %s is named after nothing", folder)
		}
		for _, imp := range file.Imports {
			p, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				return err
			}
			kit := strings.HasPrefix(p, module) && slices.Contains(testKits, path.Base(p))
			if !kit || !isTest {
				judgeImport(room, p, func(format string, args ...any) { say(imp.Pos(), format, args...) })
			}
			if kit && !isTest && room != "test" {
				say(imp.Pos(), "only tests may import %s", p)
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Name.Name == "init" && n.Recv == nil {
					say(n.Pos(), "init() runs where nobody sees it")
				}
			case *ast.BasicLit:
				// The program's name as a whole string: what an exec or a LookPath would be given.
				s, err := strconv.Unquote(n.Value)
				if err == nil && n.Kind == token.STRING && path.Base(s) == "cryptsetup" && !isTest && room != "luks" && room != "test" {
					say(n.Pos(), "only luks runs cryptsetup")
				}
			}
			return true
		})
		return nil
	})
	for folder, ok := range documented {
		if !ok {
			wrong = append(wrong, folder+": no package comment")
		}
	}
	slices.Sort(wrong)
	return wrong, err
}

func judgeImport(room, imported string, say func(format string, args ...any)) {
	if rest, ours := strings.CutPrefix(imported, module); ours {
		other, _, _ := strings.Cut(rest, "/")
		may, known := rooms[room]
		switch _, exists := rooms[other]; {
		case !exists:
			say("%s is no room of this house", other)
		case known && other != room && !slices.Contains(may, other):
			say("%s may not import %s", room, other)
		}
		return
	}
	for prefix, owner := range owners {
		if strings.HasPrefix(imported, prefix) && !slices.Contains(owner, room) && room != "test" {
			say("only %s may import %s", strings.Join(owner, " and "), imported)
		}
	}
}

func TestLayout(t *testing.T) {
	for room := range rooms {
		if files, err := filepath.Glob(filepath.Join(room, "*.go")); err != nil || len(files) == 0 && room != "cmd" && room != "test" {
			t.Errorf("there is no room %s (%v): this test would prove nothing about it", room, err)
		}
	}
	wrong, err := judge(os.DirFS("."))
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range wrong {
		t.Error(w)
	}
}

func TestLayoutSeesWhatIsWrong(t *testing.T) {
	for _, c := range []struct{ file, text, says string }{
		{"luks/a.go", `import _ "` + module + `volumes"`, "luks may not import volumes"},
		{"luks/a_test.go", `import _ "` + module + `agent"`, "luks may not import agent"},
		{"keycache/kmstest/a.go", `import _ "` + module + `luks"`, "keycache may not import luks"},
		{"agent/a.go", `import _ "` + module + `cmd/luks-kms-agent"`, "agent may not import cmd"},
		{"agent/a.go", `import _ "` + module + `shed"`, "shed is no room of this house"},
		{"agent/a.go", `import _ "github.com/aws/aws-sdk-go-v2/service/kms"`, "only keycache and archive may import"},
		{"keycache/a.go", `import _ "github.com/aws/aws-sdk-go-v2/service/s3"`, "only archive may import"},
		{"agent/a.go", `import _ "github.com/anatol/luks.go"`, "only luks may import"},
		{"cmd/x/a.go", `import _ "github.com/anatol/devmapper.go"`, "only luks may import"},
		{"volumes/a.go", `import _ "github.com/godbus/dbus/v5"`, "only systemd may import"},
		{"agent/a.go", `import _ "github.com/spf13/cobra"`, "only cmd may import"},
		{"agent/a.go", `import _ "` + module + `keycache/kmstest"`, "only tests may import"},
		{"luks/a.go", `import _ "` + module + `luks/lukstest"`, "only tests may import"},
		{"agent/a.go", `const c = "/usr/sbin/cryptsetup"`, "only luks runs cryptsetup"},
		{"volumes/a.go", `func init() {}`, "init() runs"},
		{"luks/util/a.go", ``, "is named after nothing"},
	} {
		wrong, err := judge(oneFile(c.file, "// Package a is documented.\npackage a\n"+c.text))
		if err != nil || len(wrong) != 1 || !strings.Contains(wrong[0], c.says) {
			t.Errorf("%s with %s: got %q (%v), want %q", c.file, c.text, wrong, err, c.says)
		}
	}
	if wrong, err := judge(oneFile("volumes/a.go", "package volumes")); err != nil || len(wrong) != 1 {
		t.Errorf("without a package comment: got %q (%v)", wrong, err)
	}
	for file, text := range map[string]string{
		"luks/a.go":       `import _ "github.com/anatol/luks.go"` + "\n" + `const c = "cryptsetup"`,
		"keycache/a.go":   `import _ "github.com/aws/aws-sdk-go-v2/service/kms"`,
		"agent/a.go":      `import _ "` + module + `systemd"`,
		"cmd/x/a.go":      `import _ "` + module + `agent"` + "\n" + `const c = "install the package cryptsetup"`,
		"luks/b/a.go":     `import _ "` + module + `luks"`,
		"test/vm/x/a.go":  `import _ "github.com/aws/aws-sdk-go-v2/service/kms"` + "\n" + `import _ "` + module + `luks/lukstest"`,
		"agent/a_test.go": `import _ "` + module + `keycache/kmstest"`,
	} {
		if wrong, err := judge(oneFile(file, "// Package a is documented.\npackage a\n"+text)); err != nil || len(wrong) != 0 {
			t.Errorf("%s with %s: got %q (%v), want nothing", file, text, wrong, err)
		}
	}
}

// Troubleshooting is keyed by exact messages: each piece of a quoted heading, between its "…", stands in the source.
func TestTroubleshootingQuotesRealMessages(t *testing.T) {
	text, err := os.ReadFile("docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	for room := range rooms {
		err := filepath.WalkDir(room, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || filepath.Ext(name) != ".go" || strings.HasSuffix(name, "_test.go") || room == "test" {
				return err
			}
			text, err := os.ReadFile(name)
			source.Write(text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// Put together from verb and object, or the kernel's own.
	elsewhere := []string{
		"cannot generate a data key under ", "cannot decrypt the wrapped key under ", "cannot wrap the data key anew under ", "no space left on device",
		"read-only file system", "cannot use ", " is recorded ready, but the disk is blank", "the state directory is in use by process ",
		": failed", "cannot unmount ", " lies on ", ": job of ", "(allowed: ", "cannot reach KMS at ",
	}
	headings := 0
	for line := range strings.Lines(string(text)) {
		heading, ok := strings.CutPrefix(line, "### ")
		if !ok {
			continue
		}
		headings++
		for i, quoted := range strings.Split(heading, "`") {
			if i%2 == 0 {
				continue
			}
			for piece := range strings.SplitSeq(quoted, "…") {
				// A piece may be made of several messages, one around the other.
				if !slices.Contains(elsewhere, piece) && len(piece) > 6 && !allIn(source.String(), strings.SplitAfter(piece, ": ")) {
					t.Errorf("no program prints %q (of %q)", piece, quoted)
				}
			}
		}
	}
	if headings < 20 {
		t.Errorf("only %d headings were read", headings)
	}
}

func allIn(text string, pieces []string) bool {
	for _, p := range pieces {
		if !strings.Contains(text, strings.TrimSpace(strings.TrimSuffix(p, ": "))) {
			return false
		}
	}
	return true
}

func oneFile(name, text string) fs.FS { return fstest.MapFS{name: {Data: []byte(text)}} }
