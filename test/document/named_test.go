package document_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestNamedTests: a document that names a test as its proof names one that there is. In the tables of docs/emr.md every row has one.
func TestNamedTests(t *testing.T) {
	tests := map[string]bool{}
	function := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	err := filepath.WalkDir(tree, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range function.FindAllSubmatch(text, -1) {
			tests[string(m[1])] = true
		}
		return err
	})
	if err != nil || len(tests) < 500 {
		t.Fatalf("%d tests, %v", len(tests), err)
	}
	files, err := filepath.Glob(filepath.Join(tree, "docs/*.md"))
	if err != nil || len(files) < 10 {
		t.Fatalf("%v, %v", files, err)
	}
	name := regexp.MustCompile("`(Test[A-Z]\\w+)`")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range name.FindAllSubmatch(text, -1) {
			if !tests[string(m[1])] {
				t.Errorf("%s names %s, which is no test", file, m[1])
			}
		}
	}

	emr, err := os.ReadFile(filepath.Join(tree, "docs/emr.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, tables, _ := strings.Cut(string(emr), "\n## EMR's places")
	rows := 0
	for line := range strings.Lines(tables) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| --- ") || strings.HasPrefix(line, "| | EMR |") {
			continue
		}
		rows++
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if last := cells[len(cells)-1]; len(cells) != 4 || !name.MatchString(last) {
			t.Errorf("docs/emr.md: %q has no test", strings.TrimSpace(line))
		}
	}
	if rows < 15 {
		t.Errorf("docs/emr.md has %d rows", rows)
	}
}
