// Command licenses collects the licences of what is linked into the agent, and refuses those that are not allowed.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/licensecheck"
)

// allowed are the licences that a program under Apache-2.0 can be given away with, without a duty but to carry their text. One that is not here has to be
// weighed first: MPL-2.0 by name and with the reason in docs/dependencies.md; GPL, LGPL and AGPL not at all.
var allowed = []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT"}

// architectures are those that there are packages for.
var architectures = []string{"amd64", "arm64"}

func main() {
	root := flag.String("root", "../..", "`folder` of the agent's module")
	out := flag.String("out", "packaging/licenses/THIRD-PARTY-LICENSES", "`file` to write, below the root")
	flag.Parse()
	text, err := collect(*root)
	if err == nil {
		err = os.WriteFile(filepath.Join(*root, *out), text, 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "licenses:", err)
		os.Exit(1)
	}
}

// module is one that is linked in.
type module struct {
	Path, Version, Dir string
	Main               bool
}

// document is a licence or a notice.
type document struct {
	name   string   // below the module's folder
	text   string   // without white space at the ends of lines
	notice bool     // no licence
	ids    []string // of its licences, SPDX
}

// collect returns the licences and notices of everything that is linked into the agent.
func collect(root string) ([]byte, error) {
	folders, err := linked(root)
	if err != nil {
		return nil, err
	}
	var head, body bytes.Buffer
	fmt.Fprintln(&head, "What is linked into luks-kms-agent beside its own code, and under which licence. Made by \"make licenses\".")
	fmt.Fprintln(&head)
	var wrong []error
	var texts []string // in order, each once
	headings := map[string][]string{}
	for _, m := range slices.SortedFunc(maps.Keys(folders), func(a, b module) int { return strings.Compare(a.Path, b.Path) }) {
		documents, err := documentsOf(m, folders[m])
		if err != nil {
			return nil, err
		}
		ids, err := judge(documents)
		if err != nil {
			wrong = append(wrong, fmt.Errorf("%s: %w", m.Path, err))
		}
		fmt.Fprintf(&head, "%s: %s\n", strings.TrimSpace(m.Path+" "+m.Version), strings.Join(ids, ", "))
		for _, d := range documents {
			if headings[d.text] == nil {
				texts = append(texts, d.text)
			}
			headings[d.text] = append(headings[d.text], m.Path+": "+d.name)
		}
	}
	for _, text := range texts {
		fmt.Fprintf(&body, "\n%s\n%s\n\n%s", strings.Repeat("-", 80), strings.Join(headings[text], "\n"), text)
	}
	return append(head.Bytes(), body.Bytes()...), errors.Join(wrong...)
}

// linked returns the modules that are linked in, with the folders of their packages, and Go's own library.
func linked(root string) (map[module][]string, error) {
	goroot, err := run(root, nil, "env", "GOROOT")
	if err != nil {
		return nil, err
	}
	folders := map[module][]string{{Path: "Go", Dir: strings.TrimSpace(string(goroot))}: nil}
	for _, arch := range architectures {
		out, err := run(root, []string{"GOOS=linux", "GOARCH=" + arch, "CGO_ENABLED=0"}, "list", "-deps", "-json=Dir,Module", "./cmd/luks-kms-agent")
		if err != nil {
			return nil, err
		}
		for d := json.NewDecoder(bytes.NewReader(out)); ; {
			var p struct {
				Dir    string
				Module *module
			}
			if err := d.Decode(&p); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return nil, err
			}
			if p.Module != nil && !p.Module.Main && !slices.Contains(folders[*p.Module], p.Dir) {
				folders[*p.Module] = append(folders[*p.Module], p.Dir)
			}
		}
	}
	return folders, nil
}

func run(dir string, env []string, args ...string) ([]byte, error) {
	c := exec.Command("go", args...)
	var stderr bytes.Buffer
	c.Dir, c.Env, c.Stderr = dir, append(os.Environ(), env...), &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return out, nil
}

// documentsOf returns the licences and notices in the folders of a module's packages, and above them.
func documentsOf(m module, folders []string) ([]document, error) {
	looked := map[string]bool{}
	var names []string
	for _, dir := range append(slices.Clone(folders), m.Dir) {
		for ; len(dir) >= len(m.Dir) && !looked[dir]; dir = filepath.Dir(dir) {
			looked[dir] = true
			entries, err := os.ReadDir(dir)
			if err != nil {
				return nil, err
			}
			for _, e := range entries {
				base := strings.ToUpper(strings.TrimSuffix(strings.TrimSuffix(e.Name(), ".md"), ".txt"))
				if e.Type().IsRegular() && slices.ContainsFunc([]string{"LICENSE", "LICENCE", "COPYING", "NOTICE", "PATENTS"}, func(s string) bool {
					return base == s || strings.HasPrefix(base, s+"-") || strings.HasPrefix(base, s+".")
				}) {
					names = append(names, filepath.Join(dir, e.Name()))
				}
			}
		}
	}
	slices.Sort(names)
	var documents []document
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		below, err := filepath.Rel(m.Dir, name)
		if err != nil {
			return nil, err
		}
		d := document{name: below, text: tidy(string(text))}
		d.notice = strings.HasPrefix(filepath.Base(name), "NOTICE") || strings.HasPrefix(filepath.Base(name), "PATENTS")
		if !d.notice {
			d.ids = classify(text)
		}
		documents = append(documents, d)
	}
	return documents, nil
}

// tidy leaves nothing out but white space at the ends of lines and of the text.
func tidy(text string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimSpace(text)) {
		b.WriteString(strings.TrimRight(line, " \t\r\n\f") + "\n")
	}
	return b.String()
}

// classify returns the licences that a text is, or nothing where much of it is something else.
func classify(text []byte) (ids []string) {
	found := licensecheck.Scan(text)
	if found.Percent < 75 {
		return nil
	}
	for _, m := range found.Match {
		if !m.IsURL && !slices.Contains(ids, m.ID) {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// judge returns the licences of a module, or which is missing, not known or not allowed.
func judge(documents []document) (ids []string, err error) {
	for _, d := range documents {
		if d.notice {
			continue
		}
		if len(d.ids) == 0 {
			return nil, fmt.Errorf("the licence in %s is not known", d.name)
		}
		for _, id := range d.ids {
			if !slices.Contains(allowed, id) {
				return nil, fmt.Errorf("the licence in %s is %s (allowed: %s)", d.name, id, strings.Join(allowed, ", "))
			}
			if !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	if len(ids) == 0 {
		return nil, errors.New("it has no licence")
	}
	slices.Sort(ids)
	return ids, nil
}
