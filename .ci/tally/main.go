// Command tally reads the events of `go test -json` and prints what a person wants of them: the output of what failed
// and a line for each package.
//
//	go test -json ./... | tally -to FILE
//	tally FILE
//
// The first form appends its counts to FILE and exits with 1 unless every test passed: a skipped test is a test that
// did not run. The second form adds up the counts in FILE. Both end with the line "N passed, N failed" (", N skipped"
// where there are any).
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

func main() {
	to := flag.String("to", "", "append the counts to this file")
	live := flag.Bool("live", false, "print the output of the tests as it comes, and that of those that failed once more at the end")
	flag.Parse()
	c, err := run(os.Stdin, os.Stdout, *to, *live, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "tally:", err)
		os.Exit(1)
	}
	if !c.good() {
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer, to string, live bool, files []string) (counts, error) {
	if len(files) > 0 {
		sum, err := add(files)
		if err == nil {
			fmt.Fprintln(out, sum)
		}
		return sum, err
	}
	c, err := read(in, out, live)
	if err != nil {
		return c, err
	}
	fmt.Fprintln(out, c)
	if to == "" {
		return c, nil
	}
	f, err := os.OpenFile(to, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return c, err
	}
	_, err = fmt.Fprintln(f, c.Passed, c.Failed, c.Skipped)
	return c, errors.Join(err, f.Close())
}

// counts are of tests and subtests; a package that failed without a failed test (it does not build, or it crashed)
// counts as one failed test.
type counts struct{ Passed, Failed, Skipped int }

func (c counts) String() string {
	s := fmt.Sprintf("%d passed, %d failed", c.Passed, c.Failed)
	if c.Skipped > 0 {
		s += fmt.Sprintf(", %d skipped", c.Skipped)
	}
	return s
}

// good says whether the run may be called green: something ran, and nothing failed or was left out.
func (c counts) good() bool { return c.Passed > 0 && c.Failed == 0 && c.Skipped == 0 }

func add(files []string) (counts, error) {
	var sum counts
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			return sum, err
		}
		for line := range strings.Lines(string(text)) {
			var c counts
			if _, err := fmt.Sscanln(line, &c.Passed, &c.Failed, &c.Skipped); err != nil {
				return sum, fmt.Errorf("cannot read the counts in %s: %w", name, err)
			}
			sum.Passed += c.Passed
			sum.Failed += c.Failed
			sum.Skipped += c.Skipped
		}
	}
	return sum, nil
}

// event is one line of `go test -json` (go doc test2json), or of the build's (go help buildjson).
type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64 // seconds
}

type key struct{ pkg, test string }

func read(in io.Reader, out io.Writer, live bool) (counts, error) {
	var (
		c      counts
		output = map[key][]string{} // of what has not ended
		open   = map[string]bool{}  // packages that have begun and not ended
		failed = map[string]int{}   // failed tests of a package
		again  strings.Builder      // what failed, where that was printed long ago
	)
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			var e event
			if json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
				fmt.Fprint(out, line) // not an event: what the go command itself says
			} else {
				c.take(e, out, live, output, open, failed, &again)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return c, err
		}
	}
	for _, pkg := range sorted(open) {
		fmt.Fprintf(out, "FAIL %s: it never ended\n", pkg)
		c.Failed++
	}
	fmt.Fprint(out, again.String())
	return c, nil
}

func (c *counts) take(e event, out io.Writer, live bool, output map[key][]string, open map[string]bool, failed map[string]int, again io.Writer) {
	k := key{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(out, e.Output)
	case "start":
		open[e.Package] = true
	case "output":
		output[k] = append(output[k], e.Output)
		if live {
			fmt.Fprint(out, e.Output)
		}
	case "pass", "fail", "skip":
		text := strings.Join(output[k], "")
		delete(output, k)
		switch {
		case live && e.Action == "fail" && e.Test != "":
			fmt.Fprintf(again, "FAILED %s\n%s", e.Test, text)
		case !live && (e.Action == "fail" || e.Action == "skip" && e.Test != ""):
			fmt.Fprint(out, text)
		}
		switch {
		case e.Test == "":
			delete(open, e.Package)
			c.endPackage(e, out, failed[e.Package])
		case e.Action == "pass":
			c.Passed++
		case e.Action == "fail":
			c.Failed++
			failed[e.Package]++
		default:
			c.Skipped++
			fmt.Fprintf(out, "SKIPPED %s %s: a skipped test fails the run\n", e.Package, e.Test)
		}
	}
}

func (c *counts) endPackage(e event, out io.Writer, failed int) {
	switch e.Action {
	case "pass":
		fmt.Fprintf(out, "ok   %s %.1fs\n", e.Package, e.Elapsed)
	case "fail":
		fmt.Fprintf(out, "FAIL %s %.1fs\n", e.Package, e.Elapsed)
		if failed == 0 {
			c.Failed++
		}
	}
}

func sorted(set map[string]bool) []string {
	var names []string
	for n := range set {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
