package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// commands are all commands, the root first. What is tested of them is tested of those that are added later.
func commands(cmd *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{cmd}
	for _, sub := range cmd.Commands() {
		all = append(all, commands(sub)...)
	}
	return all
}

// newTree is the tree of commands as a command line finds it.
func newTree() *cobra.Command {
	root := newRoot()
	root.InitDefaultHelpCmd()
	return root
}

// golden holds text against a file of testdata, or with -update writes it there.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v; `make update-golden` writes it", err)
	}
	if got != string(want) {
		t.Errorf("%s is not as expected (`make update-golden` takes it as it is):\n%s", name, got)
	}
}

// TestHelp: each command says what it does, with an example that names it, on lines that fit a terminal.
func TestHelp(t *testing.T) {
	for _, cmd := range commands(newTree()) {
		t.Run(pageName(cmd), func(t *testing.T) {
			if cmd.Short == "" || cmd.Long == "" || !strings.Contains(cmd.Example, cmd.CommandPath()) {
				t.Errorf("it has no Short, no Long or no Example of its use")
			}
			if cmd.HasParent() && (strings.HasSuffix(cmd.Short, ".") || utf8.RuneCountInString(cmd.Short) > 66) {
				t.Errorf("%q does not fit a list of commands", cmd.Short)
			}
			var out, said strings.Builder
			line := append(strings.Fields(cmd.CommandPath())[1:], "--help")
			if code := execute(t.Context(), line, &out, &said); code != exitOK || said.Len() > 0 {
				t.Fatalf("exit code %d, %s", code, &said)
			}
			for i, line := range strings.Split(out.String(), "\n") {
				if utf8.RuneCountInString(line) > helpWidth {
					t.Errorf("line %d has more than %d characters: %s", i+1, helpWidth, line)
				}
			}
			golden(t, "help/"+pageName(cmd)+".txt", out.String())
		})
	}
	files, err := filepath.Glob("testdata/help/*.txt")
	if n := len(commands(newTree())); err != nil || len(files) != n {
		t.Errorf("testdata/help has %d files, want one for each of %d commands: %v", len(files), n, err)
	}
}

// TestHelpCommand: help COMMAND is COMMAND --help.
func TestHelpCommand(t *testing.T) {
	for _, cmd := range commands(newTree()) {
		path := strings.Fields(cmd.CommandPath())[1:]
		var byFlag, byCommand, said strings.Builder
		execute(t.Context(), append(path, "--help"), &byFlag, &said)
		execute(t.Context(), append([]string{"help"}, path...), &byCommand, &said)
		if byFlag.String() != byCommand.String() || said.Len() > 0 {
			t.Errorf("help %s prints\n%s%s\nwant\n%s", strings.Join(path, " "), &byCommand, &said, &byFlag)
		}
	}
}

// TestSubcommandsThatThereAreNot are refused wherever there are subcommands.
func TestSubcommandsThatThereAreNot(t *testing.T) {
	for _, cmd := range commands(newTree()) {
		if !cmd.HasSubCommands() {
			continue
		}
		var out, said strings.Builder
		line := append(strings.Fields(cmd.CommandPath())[1:], "no-such-command")
		if code := execute(t.Context(), line, &out, &said); code != exitUsage || !strings.Contains(said.String(), "unknown command") {
			t.Errorf("%v: exit code %d, %s", line, code, &said)
		}
	}
}

// TestFill: words are kept, lines are not; what is indented stays.
func TestFill(t *testing.T) {
	const text = "one two\nthree four five\n\n  a  table\n  b  row\n\n- item\n- item"
	if got, want := fill(text, 10), "one two\nthree four\nfive\n\n  a  table\n  b  row\n\n- item\n- item"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestManPages: each command has a page with all sections, and neither groff nor mandoc finds anything wrong with it.
func TestManPages(t *testing.T) {
	dir := t.TempDir()
	if err := writePages(newTree(), dir, time.Unix(0, 0).UTC()); err != nil {
		t.Fatal(err)
	}
	pages := 0
	for _, cmd := range commands(newTree()) {
		if cmd.Hidden || cmd.Name() == "help" {
			continue
		}
		pages++
		page := filepath.Join(dir, pageName(cmd)+".8")
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, section := range []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "EXIT STATUS", "FILES", "SEE ALSO"} {
			if !strings.Contains(string(text), "\n.SH "+section+"\n") {
				t.Errorf("%s has no section %s", pageName(cmd), section)
			}
		}
		for _, check := range [][]string{{"groff", "-man", "-ww", "-Tutf8", "-z", page}, {"mandoc", "-Tlint", "-Wwarning", page}} {
			if out, err := exec.Command(check[0], check[1:]...).CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("%v: %v (package groff-base or mandoc)\n%s", check, err, out)
			}
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != pages {
		t.Errorf("%d pages, want %d: %v", len(entries), pages, err)
	}
}

// TestManPageShowsTextAsItIs: nothing that help says is taken for a request or lost.
func TestManPageShowsTextAsItIs(t *testing.T) {
	cmd := &cobra.Command{
		Use: "odd", Short: "Show odd text", Example: "  odd 'a\\nb' | sed \"s/^~//\"",
		Long: ".hidden is a file, and `--flag` one-of-a-kind;\n'quoted' a\\b too.\n\n  1  a table\n  .  a dot",
	}
	page := filepath.Join(t.TempDir(), "odd.8")
	if err := os.WriteFile(page, []byte(manPage(cmd, time.Unix(0, 0).UTC())), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("mandoc", "-Tascii", page).Output()
	if err != nil {
		t.Fatal(err)
	}
	var shown strings.Builder // without what is struck over for bold
	for _, r := range string(out) {
		if r == '\b' {
			text := shown.String()
			shown.Reset()
			shown.WriteString(text[:len(text)-1])
			continue
		}
		shown.WriteRune(r)
	}
	for _, want := range []string{".hidden is a file, and --flag one-of-a-kind;", `'quoted' a\b too.`, "1  a table", ".  a dot", `odd 'a\nb' | sed "s/^~//"`} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("%q is not in\n%s", want, &shown)
		}
	}
}

// TestFlagsOfOneName mean one thing: --json prints JSON, and a shorthand is not used twice.
func TestFlagsOfOneName(t *testing.T) {
	for _, cmd := range commands(newTree()) {
		if f := cmd.Flags().Lookup("json"); f != nil && (f.Usage != "print JSON" || f.Value.Type() != "bool" || f.Shorthand != "") {
			t.Errorf("%s: --json is %q of type %s", cmd.CommandPath(), f.Usage, f.Value.Type())
		}
	}
}

// TestCommandsAreInTheReadme: the table of commands has every one of them.
func TestCommandsAreInTheReadme(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "## Commands\n")
	section, _, _ = strings.Cut(section, "\n## ")
	for _, cmd := range commands(newTree()) {
		name := strings.TrimPrefix(cmd.CommandPath(), "luks-kms-agent ")
		if cmd.HasParent() && !cmd.HasSubCommands() && !cmd.Hidden && cmd.Name() != "help" && !strings.Contains(section, name) {
			t.Errorf("README.md does not name %s", name)
		}
	}
}
