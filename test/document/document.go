// Package document reads the commands of the project's documents, so that tests run them as they stand there.
package document

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Section is the part of a document below one heading, up to the next of any level.
type Section struct {
	Heading  string
	Commands []string // of its blocks, in order; without comments
}

var (
	// A heading, or a block with its info string.
	part = regexp.MustCompile("(?ms)^#+ ([^\n]*)$|^```([^\n]*)\n(.*?)^```$")
	// No commands, or those of package harness's Document, which runs them by name.
	other = regexp.MustCompile(`^(text|json|yaml|ini|console|sql|sh (node|admin):.*)$`)
)

// Sections reads a document. Blocks without an info string, and those of sh, have commands. A kind of block that is not known is an error,
// so that no command hides in it.
func Sections(text string) ([]Section, error) {
	var all []Section
	for _, found := range part.FindAllStringSubmatch(text, -1) {
		heading, info, block := found[1], found[2], found[3]
		if heading != "" {
			all = append(all, Section{Heading: heading})
			continue
		}
		if other.MatchString(info) {
			continue
		}
		if info != "" && info != "sh" || len(all) == 0 {
			return nil, fmt.Errorf("a block of %q below no heading, or of no known kind:\n%s", info, block)
		}
		commands, err := split(block)
		if err != nil {
			return nil, err
		}
		last := &all[len(all)-1]
		last.Commands = append(last.Commands, commands...)
	}
	return all, nil
}

// split returns the commands of a block. One goes on in the next line after a backslash, within quotes, and in a loop until its end.
func split(block string) ([]string, error) {
	var commands []string
	var command strings.Builder
	var quote, before rune
	comment := false
	for _, r := range block {
		switch {
		case comment && r != '\n':
			continue
		case quote != 0:
			if r == quote {
				quote = 0
			}
		case r == '\'' || r == '"':
			quote = r
		case r == '#' && (before == 0 || before == ' ' || before == '\n'):
			comment = true
			continue
		case r == '\n' && before != '\\':
			comment = false
			text := strings.TrimSpace(command.String())
			if strings.HasPrefix(text, "for ") && !strings.HasSuffix(text, "\ndone") {
				break
			}
			if text != "" {
				commands = append(commands, text)
			}
			command.Reset()
			before = r
			continue
		}
		command.WriteRune(r)
		before = r
	}
	if rest := strings.TrimSpace(command.String()); rest != "" {
		return nil, fmt.Errorf("a command has no end: %s", rest)
	}
	return commands, nil
}

// Command returns the one command of a section that begins with prefix. The file is below the top of the tree.
func Command(tree, file, heading, prefix string) (string, error) {
	text, err := os.ReadFile(filepath.Join(tree, file))
	if err != nil {
		return "", err
	}
	sections, err := Sections(string(text))
	if err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	var found []string
	for _, s := range sections {
		for _, c := range s.Commands {
			if s.Heading == heading && strings.HasPrefix(c, prefix) {
				found = append(found, c)
			}
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s, %q: %d commands begin with %q: %q", file, heading, len(found), prefix, found)
	}
	return found[0], nil
}
