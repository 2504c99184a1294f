// Command protections takes away what protects data, one thing at a time, and sees for each that the test fails which is there
// for it. It changes no file: the compiler is given another text in place of a source file (go build -overlay).
//
//	go run ./test/protections [-only REGEXP] [-vm]
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// A protection is something that the program does for the data's sake, and how to take it out of the source.
type protection struct {
	what  string // "an intent record is durable before the disk is written to"
	edits []edit
	test  string // of the package that the test is in: "./agent TestX", or "./agent TestX/a subtest"
}

// An edit replaces the one place in a file that has a text.
type edit struct{ file, old, new string }

// one is a protection that a single edit takes away.
func one(what, file, old, replaced, test string) protection {
	return protection{what, []edit{{file, old, replaced}}, test}
}

// inVM says whether the test is a story, which takes a minute or more.
func (p protection) inVM() bool { return strings.HasPrefix(p.test, "./test/vm ") }

// all are the protections, by the room that has them.
func all() []protection {
	return slices.Concat(inAgent(), inLuks(), inKeycache(), inVolumes(), inSystemd(), inCommands(), inHeaders(), inEscrow(), inStories())
}

// apply returns the files of the edits as they are without the protection.
func (p protection) apply(root string) (map[string][]byte, error) {
	texts := map[string][]byte{}
	for _, e := range p.edits {
		file := filepath.Join(root, e.file)
		text, ok := texts[file]
		if !ok {
			var err error
			if text, err = os.ReadFile(file); err != nil {
				return nil, err
			}
		}
		if n := bytes.Count(text, []byte(e.old)); n != 1 {
			return nil, fmt.Errorf("%s: %s has %d places like this, want one:\n%s", p.what, e.file, n, e.old)
		}
		texts[file] = bytes.Replace(text, []byte(e.old), []byte(e.new), 1)
	}
	return texts, nil
}

// outcome is what the test said without the protection.
type outcome struct {
	failed bool
	why    error // why there is no answer
	said   string
	took   time.Duration
}

// try runs the test without the protection.
func (p protection) try(ctx context.Context, root string) (o outcome) {
	start := time.Now()
	defer func() { o.took = time.Since(start) }()
	dir, err := os.MkdirTemp("", "protections-")
	if err != nil {
		return outcome{why: err}
	}
	defer os.RemoveAll(dir)
	texts, err := p.apply(root)
	if err != nil {
		return outcome{why: err}
	}
	replace := map[string]string{}
	for file, text := range texts {
		replace[file] = filepath.Join(dir, fmt.Sprint(len(replace), ".go"))
		if err := os.WriteFile(replace[file], text, 0o600); err != nil {
			return outcome{why: err}
		}
	}
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return outcome{why: err}
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, text, 0o600); err != nil {
		return outcome{why: err}
	}

	pkg, test, _ := strings.Cut(p.test, " ")
	var pattern []string
	for part := range strings.SplitSeq(test, "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(strings.ReplaceAll(part, " ", "_"))+"$")
	}
	args := []string{"test", "-count=1", "-timeout=20m", "-run", strings.Join(pattern, "/")}
	if p.inVM() {
		args = append(args, "-tags=vm")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, pkg)...)
	cmd.Dir = root
	// By the environment, so that it also holds for the program that a story builds.
	cmd.Env = append(os.Environ(), "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -overlay="+overlay))
	out, err := cmd.CombinedOutput()
	o.said = string(out)
	name, _, _ := strings.Cut(test, "/")
	switch {
	case ctx.Err() != nil:
		o.why = ctx.Err()
	case strings.Contains(o.said, "no tests to run"):
		o.why = fmt.Errorf("there is no test %s", p.test)
	case err == nil:
	case strings.Contains(o.said, "--- FAIL: "+name), strings.Contains(o.said, "panic: "), strings.Contains(o.said, "fatal error: "):
		o.failed = true
	default:
		o.why = err
	}
	return o
}

func main() {
	only := flag.String("only", "", "try protections, or tests, that match this regular expression")
	vm := flag.Bool("vm", false, "try also those whose test is a story")
	flag.Parse()
	wanted, err := regexp.Compile(*only)
	if err != nil || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	root, err := os.Getwd()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	chosen := slices.DeleteFunc(all(), func(p protection) bool {
		return p.inVM() && !*vm || !wanted.MatchString(p.what) && !wanted.MatchString(p.test)
	})
	if !run(ctx, root, chosen) {
		os.Exit(1)
	}
}

// run tries protections, two at a time, prints a line for each, and says whether each was missed by its test.
func run(ctx context.Context, root string, protections []protection) bool {
	outcomes := make([]outcome, len(protections))
	slots := make(chan struct{}, 2)
	var wg sync.WaitGroup
	var mu sync.Mutex
	missed := 0
	for i, p := range protections {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			outcomes[i] = p.try(ctx, root)
			mu.Lock()
			defer mu.Unlock()
			switch o := outcomes[i]; {
			case o.failed:
				missed++
				fmt.Printf("missed      %-80s %s (%.0f s)\n", p.what, p.test, o.took.Seconds())
			case o.why != nil:
				fmt.Printf("NO ANSWER   %-80s %s: %v\n%s", p.what, p.test, o.why, o.said)
			default:
				fmt.Printf("NOT MISSED  %-80s %s (%.0f s)\n", p.what, p.test, o.took.Seconds())
			}
		})
	}
	wg.Wait()
	fmt.Printf("\n%d protections taken away, %d missed by their tests\n", len(protections), missed)
	return missed == len(protections)
}
