package main

import (
	"encoding/xml"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

// Sizes of the drawing, in pixels.
const (
	svgWidth   = 1200
	svgMargin  = 20
	svgNames   = 240 // left of the bars
	svgEnds    = 70  // right of them
	svgRow     = 22
	svgTop     = 84
	svgCell    = 150 // of the legend
	glyphWidth = 5.6 // of an average letter in the bars

	svgFailed = "#8a0014" // around what failed
)

// drawSVG draws the timeline as one picture that needs nothing else. Names come from
// disks: every text goes through escape.
func drawSVG(w io.Writer, t agent.Timeline) error {
	all := lanes(t)
	total := max(t.Seconds(), 1e-6)
	rows := 0
	for _, l := range all {
		rows += len(l.rows)
	}
	left, plot := float64(svgMargin+svgNames), float64(svgWidth-2*svgMargin-svgNames-svgEnds)
	bottom := svgTop + rows*svgRow
	var legend []look
	for _, l := range looks() {
		if _, longest := used(t, l.kind); longest.Kind != "" {
			legend = append(legend, l)
		}
	}
	cells := len(legend)
	if slices.ContainsFunc(t.Spans, func(s agent.Span) bool { return s.Failed }) {
		cells++
	}
	perLine := (svgWidth - 2*svgMargin) / svgCell
	height := bottom + 40 + (cells+perLine-1)/perLine*40 + 4

	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line(`<?xml version="1.0" encoding="UTF-8"?>`)
	line(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif" font-size="12">`, svgWidth, height)
	line(`<rect width="100%%" height="100%%" fill="#ffffff"/>`)
	line(`<text x="%d" y="30" font-size="17" font-weight="bold">luks-kms-agent %s</text>`, svgMargin, escape(title(t)))
	line(`<text x="%d" y="50" fill="#555555">What the run spent its time on. On the right: when the last of a row ended.</text>`, svgMargin)

	// Rows, then the grid over them, then the bars.
	y := svgTop
	for i, l := range all {
		if i%2 == 0 {
			line(`<rect x="%d" y="%d" width="%d" height="%d" fill="#f6f7f9"/>`, svgMargin, y, svgWidth-2*svgMargin, len(l.rows)*svgRow)
		}
		y += len(l.rows) * svgRow
	}
	every := step(total, 12)
	for i := 0; float64(i)*every <= total*(1+1e-9); i++ {
		at := float64(i) * every
		x := left + at/total*plot
		line(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#d3d7dd"/>`, x, svgTop-6, x, bottom)
		for _, at := range []int{svgTop - 11, bottom + 15} {
			line(`<text x="%.1f" y="%d" text-anchor="middle" font-size="11" fill="#555555">%s s</text>`, x, at, seconds(float64(i)*every, every))
		}
	}
	y = svgTop
	for i, l := range all {
		if l.volume && (i == 0 || !all[i-1].volume) {
			line(`<line x1="%d" y1="%d" x2="%d" y2="%d" stroke="#9aa1ab"/>`, svgMargin, y, svgWidth-svgMargin, y)
		}
		name, detail := fit(l.name, 36), ""
		if l.detail != "" {
			detail = fmt.Sprintf(` <tspan fill="#777777" font-size="11">%s</tspan>`, escape(fit(l.detail, max(4, 36-len([]rune(name))))))
		}
		line(`<text x="%d" y="%d">%s%s<title>%s</title></text>`, svgMargin+6, y+15, escape(name), detail, escape(l.label()))
		line(`<text x="%d" y="%d" text-anchor="end" font-size="11" fill="#555555">%s</text>`, svgWidth-svgMargin-6, y+15, took(l.end()))
		for _, row := range l.rows {
			for _, s := range row {
				drawSpan(line, s, left+s.Start/total*plot, max(1, (s.End-s.Start)/total*plot), y+3)
			}
			y += svgRow
		}
	}

	line(`<g font-size="11">`)
	for i, l := range legend {
		x, y := svgMargin+i%perLine*svgCell, bottom+34+i/perLine*40
		sum, longest := used(t, l.kind)
		line(`<rect x="%d" y="%d" width="14" height="14" rx="2" fill="%s" stroke="#777777" stroke-width="0.5"/>`, x, y, l.fill)
		line(`<text x="%d" y="%d">%s</text>`, x+20, y+11, escape(l.name))
		line(`<text x="%d" y="%d" fill="#777777">%s, longest %s</text>`, x+20, y+24, took(sum), took(longest.End-longest.Start))
	}
	if n := len(legend); n < cells {
		x, y := svgMargin+n%perLine*svgCell, bottom+34+n/perLine*40
		line(`<rect x="%d" y="%d" width="14" height="14" rx="2" fill="none" stroke="%s" stroke-width="2"/>`, x, y, svgFailed)
		line(`<text x="%d" y="%d">× failed</text>`, x+20, y+11)
	}
	line(`</g>`)
	line(`</svg>`)
	_, err := io.WriteString(w, b.String())
	return err
}

func drawSpan(line func(string, ...any), s agent.Span, x, width float64, y int) {
	look := lookOf(s.Kind)
	stroke := ""
	failed := ""
	switch {
	case s.Failed:
		stroke, failed = fmt.Sprintf(` stroke="%s" stroke-width="2"`, svgFailed), ", failed"
	case s.Kind == agent.SpanWait:
		stroke = ` stroke="#c4c4c4" stroke-width="0.5"`
	}
	line(`<rect x="%.1f" y="%d" width="%.1f" height="%d" rx="2" fill="%s"%s><title>%s: %s, from %s to %s%s</title></rect>`,
		x, y, width, svgRow-6, look.fill, stroke, escape(look.name+": "+describe(s)), took(s.End-s.Start), took(s.Start), took(s.End), failed)
	texts := []string{s.Name + ", " + took(s.End-s.Start), s.Name}
	if s.Failed {
		texts = []string{"failed: " + texts[0], "failed: " + texts[1], "failed", "×"}
	}
	for _, text := range texts {
		if float64(len([]rune(text)))*glyphWidth+8 <= width {
			line(`<text x="%.1f" y="%d" font-size="10.5" fill="%s" pointer-events="none">%s</text>`, x+4, y+12, look.ink, escape(printable(text)))
			return
		}
	}
}

// escape makes any text a text of XML, also one that holds what XML cannot have.
func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}
