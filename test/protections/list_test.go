package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
)

// The list is not tried in each test run; that it fits the source is.
func TestListFitsTheSource(t *testing.T) {
	const root = "../.."
	tests := map[string]map[string]bool{} // by package
	seen := map[string]bool{}
	for _, p := range all() {
		if seen[p.what] {
			t.Errorf("%q is listed twice", p.what)
		}
		seen[p.what] = true
		texts, err := p.apply(root)
		if err != nil {
			t.Error(err)
			continue
		}
		for file, text := range texts {
			if _, err := parser.ParseFile(token.NewFileSet(), file, text, parser.SkipObjectResolution); err != nil {
				t.Errorf("%s: without it this is no Go: %v", p.what, err)
			}
		}
		pkg, test, ok := strings.Cut(p.test, " ")
		if tests[pkg] == nil {
			tests[pkg] = testsOf(t, filepath.Join(root, pkg))
		}
		if name, _, _ := strings.Cut(test, "/"); !ok || !tests[pkg][name] {
			t.Errorf("%s: there is no test %q", p.what, p.test)
		}
	}
	if len(seen) < 50 {
		t.Errorf("only %d protections are listed", len(seen))
	}
}

// testsOf returns the names of the tests in a folder.
func testsOf(t *testing.T, folder string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Test") {
				names[f.Name.Name] = true
			}
		}
	}
	return names
}
