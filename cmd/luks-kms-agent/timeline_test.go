package main

import (
	"encoding/xml"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

// TestNothingHasRun is about a machine on which no run wrote a timeline; the one that runs the tests may be another.
func TestNothingHasRun(t *testing.T) {
	if _, err := os.Stat(agent.DefaultTimelinePath); !errors.Is(err, fs.ErrNotExist) {
		t.Skipf("%s is there (%v)", agent.DefaultTimelinePath, err)
	}
	testscript.Run(t, testscript.Params{
		Files: []string{script(t, `exits 6 luks-kms-agent timeline
stderr 'cannot read /run/luks-kms-agent/timeline.json: nothing has run since the boot'
stderr '-> See .systemctl status luks-kms-agent'
exits 6 luks-kms-agent timeline --json
! stdout .
exits 6 luks-kms-agent timeline --svg out.svg
! exists out.svg
`)},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
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
