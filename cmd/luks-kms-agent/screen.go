package main

import (
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// wide is the width, in columns, from which tables are worth it.
const wide = 120

// screen is what is known of where text will be read.
type screen struct {
	width, height int  // columns and lines
	terminal      bool // else a file or another program, where lines are not wrapped
	color         bool
}

// screenOf asks the terminal behind a writer, if there is one.
func screenOf(w io.Writer) screen {
	s := screen{width: 80}
	f, ok := w.(interface{ Fd() uintptr })
	if !ok {
		return s
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return s
	}
	s.terminal, s.height = true, int(size.Row)
	if size.Col > 0 { // a serial console does not know
		s.width = int(size.Col)
	}
	term := os.Getenv("TERM")
	s.color = os.Getenv("NO_COLOR") == "" && term != "" && term != "dumb"
	return s
}

// style is an SGR parameter of ECMA-48, "" for none.
type style string

const (
	bold   style = "1"
	dim    style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
)

func (s screen) paint(as style, text string) string {
	if !s.color || as == "" || text == "" {
		return text
	}
	return "\x1b[" + string(as) + "m" + text + "\x1b[0m"
}

// wrap breaks text between words so that it fits behind first. The lines that follow are indented as far as first is long.
func (s screen) wrap(first, text string) string { return s.fill(first, strings.Fields(clean(text))) }

// fill is wrap for words that may have blanks in them.
func (s screen) fill(first string, words []string) string {
	var b strings.Builder
	b.WriteString(first)
	indent := utf8.RuneCountInString(first)
	at := indent
	for i, word := range words {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case s.terminal && at+1+n > s.width:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			at = indent
		default:
			b.WriteString(" ")
			at++
		}
		b.WriteString(word)
		at += n
	}
	return b.String()
}

// clean replaces what a terminal would take for more than text: much of what is printed was read from disks.
func clean(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case !unicode.IsPrint(r):
			return unicode.ReplacementChar
		}
		return r
	}, text)
}

// gap is what stands between two columns.
const gap = "  "

// align pads the cells of rows to columns. It returns a line for each row, the width of the longest, and as many blanks as there are
// before the second column.
func align(rows [][]string) (lines []string, longest int, indent string) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(clean(cell)))
		}
	}
	for _, row := range rows {
		var b strings.Builder
		for i, cell := range row {
			cell = clean(cell)
			b.WriteString(cell)
			b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)) + gap)
		}
		line := strings.TrimRight(b.String(), " ")
		lines, longest = append(lines, line), max(longest, utf8.RuneCountInString(line))
	}
	return lines, longest, strings.Repeat(" ", widths[0]) + gap
}
