package main

import (
	"errors"
	"io/fs"
	"os"
	"testing"

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
