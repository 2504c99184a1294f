package main

import (
	"encoding/xml"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

// TestNothingHasRun: there is nothing to draw, in whatever form, and no file is made.
func TestNothingHasRun(t *testing.T) {
	last, drawing := filepath.Join(t.TempDir(), "timeline.json"), filepath.Join(t.TempDir(), "out.svg")
	for _, flags := range [][]string{nil, {"--json"}, {"--svg", drawing}} {
		var out, said strings.Builder
		cmd := newTimeline(last)
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		cmd.SetArgs(flags)
		cmd.SetOut(&out)
		err := cmd.ExecuteContext(t.Context())
		printError(&said, err)
		if exitCode(err) != exitDevice || out.Len() > 0 ||
			!strings.Contains(said.String(), "cannot read "+last+": nothing has run since the boot") || !strings.Contains(said.String(), "-> See `systemctl status luks-kms-agent`") {
			t.Errorf("%q: exit code %d, %q, %q", flags, exitCode(err), &out, &said)
		}
	}
	if _, err := os.Stat(drawing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a drawing was made: %v", err)
	}
}

// TestBarShowsEverySpan: one that is too short for a column has one all the same.
func TestBarShowsEverySpan(t *testing.T) {
	row := []agent.Span{
		{Kind: agent.SpanIMDS, Start: 0.51, End: 0.52}, {Kind: agent.SpanKMS, Start: 5, End: 7}, {Kind: agent.SpanMount, Start: 10, End: 10},
	}
	if got := bar(row, 10, 10); got != "i    kk  m" {
		t.Errorf("%q", got)
	}
}

// TestDrawingIsXML: whatever disks and files call things, the drawing is well-formed, and nothing of it is an element of theirs.
func TestDrawingIsXML(t *testing.T) {
	const hostile = "]]></title><script>x</script>\x00\x1b[2J\xff&amp;"
	line := agent.Timeline{Command: hostile, Result: hostile, InstanceID: hostile, Finished: time.Time{}.Add(time.Second)}
	for _, kind := range []agent.SpanKind{agent.SpanMount, hostile} {
		line.Spans = append(line.Spans,
			agent.Span{Kind: kind, Name: hostile, Identity: hostile, Device: hostile, MountPoint: hostile, End: 1, Failed: true},
			agent.Span{Kind: kind, Name: hostile, Call: hostile, End: 1})
	}
	var out strings.Builder
	if err := drawSVG(&out, line); err != nil {
		t.Fatal(err)
	}
	for dec := xml.NewDecoder(strings.NewReader(out.String())); ; {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, &out)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "script" {
			t.Errorf("a script is in\n%s", &out)
		}
	}
	out.Reset()
	if err := printTimeline(&out, line, 80); err != nil || strings.ContainsAny(out.String(), "\x00\x1b") {
		t.Errorf("%v, %q", err, &out)
	}
}
