package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

// newTimeline is the command; last is where the last run leaves its timeline.
func newTimeline(last string) *cobra.Command {
	asJSON, svg := false, ""
	cmd := &cobra.Command{
		Use:   "timeline [FILE]",
		Short: "Show what the last run spent its time on",
		Long: `Show what the last run or unlock of this boot spent its time on: a row for each
volume and each kind of call, side by side on one axis. FILE is a timeline that was
kept or copied from another node; without it, ` + last + `.

The text is as wide as the terminal, or as COLUMNS says: 60 to 120 columns.`,
		Example: `  sudo luks-kms-agent timeline
  sudo luks-kms-agent timeline --svg boot.svg
  ssh NODE sudo cat ` + last + ` >node.json
  luks-kms-agent timeline node.json`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, files []string) error {
			if asJSON && svg != "" {
				return &usageError{errors.New("--json and --svg cannot be used together")}
			}
			var t agent.Timeline
			var err error
			if len(files) > 0 {
				t, err = agent.ReadTimeline(files[0])
			} else {
				t, err = agent.LastTimeline(last)
			}
			if err != nil {
				return err
			}
			switch out := cmd.OutOrStdout(); {
			case svg == "-":
				return drawSVG(out, t)
			case svg != "":
				return writeSVG(svg, t)
			case asJSON:
				return printJSON(out, t)
			default:
				return printTimeline(out, t, columns(out))
			}
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&svg, "svg", "", "draw it into `FILE` (- for stdout)")
	return cmd
}

func writeSVG(path string, t agent.Timeline) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("cannot write the drawing: %w", err)
	}
	if err := drawSVG(f, t); err != nil {
		f.Close()
		return fmt.Errorf("cannot write the drawing: %w", err)
	}
	return f.Close()
}

// columns is how wide the text may be.
func columns(out io.Writer) int {
	n, err := strconv.Atoi(os.Getenv("COLUMNS"))
	if err != nil {
		n = screenOf(out).width
	}
	return min(max(n, 60), 120)
}

// look is how a kind of span is drawn.
type look struct {
	kind   agent.SpanKind
	name   string
	letter byte
	fill   string
	ink    string // of text on the fill
}

// looks are in the order of the legend.
func looks() []look {
	return []look{
		{agent.SpanRecords, "records", 'r', "#8f8f8f", "#ffffff"},
		{agent.SpanScan, "disks, programs", 's', "#4e79a7", "#ffffff"},
		{agent.SpanIMDS, "IMDS", 'i', "#76b7b2", "#000000"},
		{agent.SpanCredentials, "credentials", 'c', "#59a14f", "#ffffff"},
		{agent.SpanKMS, "KMS", 'k', "#d6404a", "#ffffff"},
		{agent.SpanInspect, "inspect", 'h', "#a0cbe8", "#000000"},
		{agent.SpanWait, "wait", '.', "#ececec", "#555555"},
		{agent.SpanUnseal, "unseal", 'u', "#f28e2b", "#000000"},
		{agent.SpanMap, "map", 'd', "#b07aa1", "#ffffff"},
		{agent.SpanFormat, "LUKS format", 'f', "#9c755f", "#ffffff"},
		{agent.SpanMkfs, "mkfs", 'x', "#edc948", "#000000"},
		{agent.SpanMount, "mount", 'm', "#2f7f6a", "#ffffff"},
		{agent.SpanWipe, "wipe keys", 'w', "#5b5b5b", "#ffffff"},
	}
}

// lookOf is that of a kind; one that a newer program wrote looks like nothing else.
func lookOf(kind agent.SpanKind) look {
	for _, l := range looks() {
		if l.kind == kind {
			return l
		}
	}
	return look{kind: kind, name: string(kind), letter: '?', fill: "#ffffff", ink: "#000000"}
}

// A lane is what went on in one place. Spans of it that overlap are in rows below each
// other.
type lane struct {
	name, detail string
	volume       bool
	rank         int
	rows         [][]agent.Span
}

// lanes sorts the spans: what the run did as a whole, then the volumes by mount point.
func lanes(t agent.Timeline) []*lane {
	byName := map[string]*lane{}
	var all []*lane
	for _, s := range t.Spans {
		l := laneOf(s)
		key := l.name + "\x00" + l.detail
		if byName[key] == nil {
			byName[key] = &l
			all = append(all, &l)
		}
		byName[key].put(s)
	}
	slices.SortStableFunc(all, func(a, b *lane) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
	})
	return all
}

func laneOf(s agent.Span) lane {
	if s.IsVolumes() {
		l := lane{name: s.MountPoint, detail: cmp.Or(s.Identity, s.Device), volume: true, rank: 10}
		if l.name == "" {
			l.name, l.detail, l.rank = l.detail, "", 11
		}
		l.name, l.detail = printable(l.name), printable(l.detail)
		return l
	}
	switch {
	case s.Kind == agent.SpanRecords:
		return lane{name: "records", rank: 0}
	case s.Kind == agent.SpanCredentials:
		return lane{name: "credentials", rank: 3}
	case s.Call == "Identity", s.Call == "Ephemeral":
		return lane{name: "IMDS " + s.Call, rank: 2}
	case s.Call != "":
		return lane{name: "KMS " + printable(s.Call), rank: 4}
	case s.Kind == agent.SpanMount:
		return lane{name: "systemd", rank: 5}
	case s.Kind == agent.SpanWipe:
		return lane{name: "memory", rank: 6}
	}
	return lane{name: "machine", rank: 1}
}

func (l *lane) put(s agent.Span) {
	for i, row := range l.rows {
		if row[len(row)-1].End <= s.Start {
			l.rows[i] = append(row, s)
			return
		}
	}
	l.rows = append(l.rows, []agent.Span{s})
}

// end is when the last of a lane ended.
func (l *lane) end() float64 {
	end := 0.0
	for _, row := range l.rows {
		end = max(end, row[len(row)-1].End)
	}
	return end
}

// printable keeps what disks say of themselves from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// used is how long anything of a kind was under way, and the longest span of it.
func used(t agent.Timeline, kind agent.SpanKind) (total float64, longest agent.Span) {
	until := 0.0
	for _, s := range t.Spans { // in order of their start
		if s.Kind != kind {
			continue
		}
		if s.End-s.Start >= longest.End-longest.Start {
			longest = s
		}
		total += max(0, s.End-max(s.Start, until))
		until = max(until, s.End)
	}
	return total, longest
}

// step is a round number of seconds of which at most n fit into the total.
func step(total float64, n int) float64 {
	least := max(total, 1e-6) / float64(max(n, 1))
	unit := math.Pow(10, math.Floor(math.Log10(least)))
	for _, m := range []float64{1, 2, 5} {
		if m*unit >= least {
			return m * unit
		}
	}
	return 10 * unit
}

// seconds has as many digits as the step needs.
func seconds(at, step float64) string {
	return strconv.FormatFloat(at, 'f', max(0, int(math.Ceil(-math.Log10(step)-1e-9))), 64)
}

// title is what the timeline is of.
func title(t agent.Timeline) string {
	node := ""
	if t.InstanceID != "" {
		node = " on " + printable(t.InstanceID)
	}
	return fmt.Sprintf("%s%s: %s, %s, %s", printable(t.Command), node, printable(t.Result), t.Started.UTC().Format(time.RFC3339), took(t.Seconds()))
}

// took is a length of time for people.
func took(s float64) string {
	switch {
	case s < 0.001:
		return fmt.Sprintf("%.1f ms", s*1e3)
	case s < 1:
		return fmt.Sprintf("%.0f ms", s*1e3)
	}
	return fmt.Sprintf("%.2f s", s)
}

func printTimeline(w io.Writer, t agent.Timeline, width int) error {
	all := lanes(t)
	names := 0
	for _, l := range all {
		names = max(names, len([]rune(l.label())))
	}
	names = min(names, width*2/5)
	const ends = 9 // the column of how long
	bars := width - names - 2 - ends
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", title(t))
	for _, l := range all {
		name := fit(l.label(), names)
		for i, row := range l.rows {
			end := ""
			if i == 0 {
				end = took(l.end())
			}
			text := fmt.Sprintf("%-*s |%-*s %*s", names, name, bars, bar(row, t.Seconds(), bars), ends-2, end)
			b.WriteString(strings.TrimRight(text, " ") + "\n")
			name = ""
		}
	}
	fmt.Fprintf(&b, "%s\n\n", axis(t.Seconds(), names, bars))

	fmt.Fprintf(&b, "   %-16s %9s %9s\n", "", "UNDER WAY", "LONGEST")
	for _, l := range looks() {
		total, longest := used(t, l.kind)
		if longest.Kind == "" {
			continue
		}
		fmt.Fprintf(&b, " %c %-16s %9s %9s  %s\n", l.letter, l.name, took(total), took(longest.End-longest.Start),
			fit(describe(longest), width-41))
	}
	if slices.ContainsFunc(t.Spans, func(s agent.Span) bool { return s.Failed }) {
		fmt.Fprintf(&b, " ! failed\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// describe names a span outside of its lane.
func describe(s agent.Span) string {
	text := s.Name
	if s.Call != "" && !strings.HasPrefix(s.Name, s.Call) {
		text += " of " + s.Call
	}
	if s.IsVolumes() {
		text += ", " + cmp.Or(s.MountPoint, s.Identity, s.Device)
	}
	return printable(text)
}

func (l *lane) label() string {
	if l.detail == "" {
		return l.name
	}
	return l.name + " " + l.detail
}

func fit(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// bar draws a row: in each column what took most of its time. What would get no
// column gets the one that its middle is in, if that is free.
func bar(row []agent.Span, total float64, width int) string {
	line := []byte(strings.Repeat(" ", width))
	cell := max(total, 1e-6) / float64(width)
	letter := func(s agent.Span) byte {
		if s.Failed {
			return '!'
		}
		return lookOf(s.Kind).letter
	}
	shown := make([]bool, len(row))
	for i := range line {
		from, to := float64(i)*cell, float64(i+1)*cell
		most, which := cell, -1
		for j, s := range row {
			in := max(0, min(s.End, to)-max(s.Start, from))
			most -= in
			if in > 0 && (which < 0 || in > max(0, min(row[which].End, to)-max(row[which].Start, from))) {
				which = j
			}
		}
		if which >= 0 && min(row[which].End, to)-max(row[which].Start, from) >= most {
			line[i], shown[which] = letter(row[which]), true
		}
	}
	for j, s := range row {
		if i := min(width-1, int((s.Start+s.End)/2/cell)); !shown[j] && line[i] == ' ' {
			line[i] = letter(s)
		}
	}
	return string(line)
}

// axis is the scale below the bars.
func axis(total float64, names, bars int) string {
	every := step(total, bars/8)
	line := []byte(strings.Repeat(" ", names+2+bars+8))
	for i := 0; ; i++ {
		at := float64(i) * every
		col := int(math.Round(at / max(total, 1e-6) * float64(bars)))
		if col > bars {
			break
		}
		text := seconds(at, every)
		if i == 0 {
			text = "0 s"
		}
		copy(line[names+2+col:], text)
	}
	return strings.TrimRight(string(line), " ")
}
