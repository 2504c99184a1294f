// Command report writes the page about the benchmarks and its plots from the results of `make bench`.
//
//	report -results DIR -page FILE
//
// DIR has results.csv and io.csv, from test/vm/bench; machine.txt, a line of text about the machine; and fleet.csv, from test/bench/fleet.
// The plots go there too.
package main

import (
	"embed"
	"encoding/csv"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"
)

//go:embed page.md story.md
var texts embed.FS

func main() {
	results := flag.String("results", "", "directory with results.csv, and of the plots")
	to := flag.String("page", "", "the page to be written")
	flag.Parse()
	if *results == "" || *to == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := write(*results, *to); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func write(dir, to string) error {
	r, err := read(filepath.Join(dir, "results.csv"))
	if err != nil {
		return err
	}
	machine, err := os.ReadFile(filepath.Join(dir, "machine.txt"))
	if err != nil {
		return err
	}
	if r.fleet, err = readFleet(filepath.Join(dir, "fleet.csv")); err != nil {
		return err
	}
	story, err := texts.ReadFile("story.md")
	if err != nil {
		return err
	}
	for _, p := range plots {
		if len(r.subjects[p.phase]) == 0 {
			continue // a run of some subjects only
		}
		if err := r.plot(p, filepath.Join(dir, p.file)); err != nil {
			return fmt.Errorf("cannot plot %s: %w", p.file, err)
		}
	}
	io, err := readIO(filepath.Join(dir, "io.csv"))
	if err != nil {
		return err
	}
	if err := io.plot(filepath.Join(dir, "io.svg")); err != nil {
		return fmt.Errorf("cannot plot io.svg: %w", err)
	}
	functions := template.FuncMap{
		"ioSubjects": io.subjectsTable, "ioTable": io.table, "ioSettings": io.settings,
		"table": r.table, "costs": r.costs, "goals": r.goals,
		"machine": func() string { return strings.TrimSpace(string(machine)) },
		"story":   func() string { return strings.TrimSpace(string(story)) },
		"rounds":  func() int { return r.rounds },
	}
	t, err := template.New("page.md").Funcs(functions).ParseFS(texts, "page.md")
	if err != nil {
		return err
	}
	var b strings.Builder
	if err := t.Execute(&b, nil); err != nil {
		return err
	}
	return os.WriteFile(to, []byte(b.String()), 0o644)
}

// A point is where measurements belong together.
type point struct {
	phase, subject string
	volumes        int
}

// results are the measurements of each point, by column.
type results struct {
	values   map[point]map[string][]float64
	subjects map[string][]string // by phase, in order of appearance
	volumes  []int
	rounds   int                // the most of any point
	fleet    map[string]float64 // its reference, by column
}

func read(file string) (*results, error) {
	rows, err := readCSV(file)
	if err != nil {
		return nil, err
	}
	if len(rows) < 2 || len(rows[0]) < 5 {
		return nil, fmt.Errorf("cannot read %s: it has no results", file)
	}
	r := &results{values: map[point]map[string][]float64{}, subjects: map[string][]string{}}
	for i, row := range rows[1:] {
		n, err := strconv.Atoi(row[2])
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: row %d: %w", file, i+2, err)
		}
		p := point{row[0], row[1], n}
		if r.values[p] == nil {
			r.values[p] = map[string][]float64{}
		}
		if !slices.Contains(r.subjects[p.phase], p.subject) {
			r.subjects[p.phase] = append(r.subjects[p.phase], p.subject)
		}
		if !slices.Contains(r.volumes, n) {
			r.volumes = append(r.volumes, n)
		}
		for c, text := range row[4:] {
			v, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return nil, fmt.Errorf("cannot read %s: row %d: %w", file, i+2, err)
			}
			column := rows[0][c+4]
			r.values[p][column] = append(r.values[p][column], v)
		}
	}
	slices.Sort(r.volumes)
	for _, columns := range r.values {
		r.rounds = max(r.rounds, len(columns[rows[0][4]]))
	}
	return r, nil
}

func readCSV(file string) ([][]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", file, err)
	}
	return rows, nil
}

// readFleet returns the fleet's reference by column: 10,000 nodes, against a quota of 70 % of the rate at which they boot. It is
// measured rarely; without its file there is nothing.
func readFleet(file string) (map[string]float64, error) {
	rows, err := readCSV(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for i, row := range rows[min(1, len(rows)):] {
		values := map[string]float64{}
		for c, text := range row {
			if values[rows[0][c]], err = strconv.ParseFloat(text, 64); err != nil {
				return nil, fmt.Errorf("cannot read %s: row %d: %w", file, i+2, err)
			}
		}
		share := values["quota"] * values["boot"] / values["nodes"]
		if values["nodes"] == 10_000 && math.Abs(share-0.7) < 0.001 {
			return values, nil
		}
	}
	return nil, fmt.Errorf("cannot read %s: the reference is not in it", file)
}

// spread is the least, the median and the most.
type spread struct{ low, median, high float64 }

func spreadOf(values []float64) (spread, bool) {
	v := slices.Sorted(slices.Values(values))
	if len(v) == 0 {
		return spread{}, false
	}
	return spread{v[0], (v[(len(v)-1)/2] + v[len(v)/2]) / 2, v[len(v)-1]}, true
}

// spread is that of a point's values.
func (r *results) spread(p point, column string) (low, median, high float64, ok bool) {
	s, ok := spreadOf(r.values[p][column])
	return s.low, s.median, s.high, ok
}

// median is that of a point, and false where it was not measured.
func (r *results) median(p point, column string) (float64, bool) {
	_, m, _, ok := r.spread(p, column)
	return m, ok
}

// table has a phase's seconds: subjects down, volumes across, and how often the agent's time it is. A point with fewer rounds says so.
func (r *results) table(phase string) string {
	var b strings.Builder
	b.WriteString("| seconds: median (least – most) |")
	for _, n := range r.volumes {
		fmt.Fprintf(&b, " %d |", n)
	}
	b.WriteString("\n| --- |" + strings.Repeat(" --- |", len(r.volumes)) + "\n")
	for _, s := range r.subjects[phase] {
		fmt.Fprintf(&b, "| %s |", s)
		for _, n := range r.volumes {
			low, m, high, ok := r.spread(point{phase, s, n}, "seconds")
			if !ok {
				b.WriteString(" |")
				continue
			}
			fmt.Fprintf(&b, " %s (%s – %s", digits(m), digits(low), digits(high))
			if rounds := len(r.values[point{phase, s, n}]["seconds"]); rounds < r.rounds {
				fmt.Fprintf(&b, "; %d", rounds)
			}
			b.WriteString(")")
			if agent, ok := r.median(point{phase, "agent", n}, "seconds"); ok && s != "agent" {
				fmt.Fprintf(&b, "<br>%s ×", digits(m/agent))
			}
			b.WriteString(" |")
		}
		b.WriteString("\n")
	}
	return b.String()
}

func digits(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// costs has what a phase costs besides time, at one number of volumes.
func (r *results) costs(phase string, volumes int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| %d volumes, medians | ended after, s | CPU, s | processes | largest, MiB | together, MiB | KMS calls | IMDS calls | written, MiB |\n", volumes)
	b.WriteString("| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for _, s := range r.subjects[phase] {
		var cells []string
		for _, c := range []struct {
			column string
			unit   float64
		}{{"ended_seconds", 1}, {"cpu_seconds", 1}, {"processes", 1}, {"largest_kib", 1024}, {"sum_kib", 1024}, {"kms_calls", 1}, {"imds_calls", 1}, {"written_bytes", 1 << 20}} {
			if m, ok := r.median(point{phase, s, volumes}, c.column); ok {
				cells = append(cells, strconv.FormatFloat(m/c.unit, 'f', map[bool]int{true: 1}[c.unit != 1 || strings.HasSuffix(c.column, "seconds")], 64))
			}
		}
		if len(cells) > 0 {
			fmt.Fprintf(&b, "| %s | %s |\n", s, strings.Join(cells, " | "))
		}
	}
	return b.String()
}

var errNotMeasured = errors.New("not measured")
