package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// DefaultTimelinePath is where it stands what the last run spent its time on. It is
// on a tmpfs, beside the status.
const DefaultTimelinePath = "/run/luks-kms-agent/timeline.json"

// timelineVersion is the version of the timeline's fields.
const timelineVersion = 1

// ErrNothingRan says that no run of this boot wrote down a timeline.
var ErrNothingRan = errors.New("nothing has run since the boot")

// SpanKind says what the time of a span went to.
type SpanKind string

// The kinds of span, in the order in which a run comes to them.
const (
	SpanRecords     SpanKind = "records"     // lock, prove and read the state directory; write a volume's record
	SpanScan        SpanKind = "scan"        // list the disks, look for programs and what the kernel can do
	SpanIMDS        SpanKind = "imds"        // one attempt at instance metadata
	SpanCredentials SpanKind = "credentials" // the role's credentials, read from IMDS inside a KMS attempt
	SpanKMS         SpanKind = "kms"         // one attempt of one KMS call, credentials included
	SpanWipe        SpanKind = "wipe"        // wipe the keys and search memory for copies
	SpanWait        SpanKind = "wait"        // for what the name says
	SpanInspect     SpanKind = "inspect"     // read and check the header; where there is none, the content
	SpanUnseal      SpanKind = "unseal"      // open the key slot, verify the MAC
	SpanMap         SpanKind = "map"         // read the header again, load the table, use it; remove what a killed run left
	SpanFormat      SpanKind = "format"      // write header and token, zero the ends of the volume
	SpanMkfs        SpanKind = "mkfs"        // make the filesystem
	SpanMount       SpanKind = "mount"       // connect to systemd; mount
)

// Timeline is where the time of one run went.
type Timeline struct {
	Version    int       `json:"version"`
	Command    string    `json:"command"` // "run" or "unlock"
	Started    time.Time `json:"started"`
	Finished   time.Time `json:"finished"`
	InstanceID string    `json:"instance_id,omitempty"`
	Result     string    `json:"result"` // "ok" or "failed"
	Spans      []Span    `json:"spans"`  // in order of their start
}

// Span is one stretch of time. Several run at the same time.
type Span struct {
	Kind SpanKind `json:"kind"`
	Name string   `json:"name"`
	Call string   `json:"call,omitempty"` // "Decrypt", …: of imds, credentials, kms and the wait before another attempt
	// Of a volume's span: the identity may come from the disk, so it is any text.
	Identity   string  `json:"identity,omitempty"`
	Device     string  `json:"device,omitempty"`
	MountPoint string  `json:"mount_point,omitempty"`
	Start      float64 `json:"start"` // seconds since the run started
	End        float64 `json:"end"`
	Failed     bool    `json:"failed,omitempty"`
}

// IsVolumes tells a volume's span from one of the run as a whole.
func (s Span) IsVolumes() bool { return s.Device != "" || s.Identity != "" }

// shortestWait is what a wait has to take to be written down: most that could be
// waited for is there already.
const shortestWait = 100 * time.Microsecond

// spans collects what a run spends its time on, from all its goroutines.
type spans struct {
	now   func() time.Time
	mu    sync.Mutex
	start time.Time
	done  []timed
}

// timed is a span before it is written down; it holds what is there already, so that
// it costs next to nothing.
type timed struct {
	kind       SpanKind
	name, call string
	device     *volumes.Device // nil: of the run
	from, to   time.Time
	failed     bool
	mountPoint string
}

// reset begins the collection of another run.
func (s *spans) reset(start time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start, s.done = start, make([]timed, 0, 64)
}

func (s *spans) add(t timed) {
	if t.kind == SpanWait && t.to.Sub(t.from) < shortestWait {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = append(s.done, t)
}

// begin starts a span, of the run where the device is nil, and returns what ends it.
func (s *spans) begin(kind SpanKind, name string, d *volumes.Device) (end func(error)) {
	from := s.now()
	return func(err error) {
		s.add(timed{kind: kind, name: name, device: d, from: from, to: s.now(), failed: err != nil})
	}
}

// phases are spans of one volume of which each ends where the next begins.
type phases struct {
	*spans
	current timed
}

func (s *spans) phases(d *volumes.Device, mountPoint string) *phases {
	return &phases{spans: s, current: timed{device: d, mountPoint: mountPoint}}
}

// next ends the phase that is under way, if one is, and begins another.
func (p *phases) next(kind SpanKind, name string) {
	if p == nil {
		return // nobody draws this
	}
	p.end(nil)
	p.current.kind, p.current.name, p.current.from = kind, name, p.now()
}

// end ends the phase that is under way; again it does nothing.
func (p *phases) end(err error) {
	if p == nil || p.current.kind == "" {
		return
	}
	p.current.to, p.current.failed = p.now(), err != nil
	p.add(p.current)
	p.current.kind = ""
}

// attempted is the span of one attempt at KMS or IMDS.
func (s *spans) attempted(a keycache.Attempt) {
	kind := SpanKMS
	switch a.Op {
	case "Identity", "Ephemeral":
		kind = SpanIMDS
	case "Credentials":
		kind = SpanCredentials
	}
	name := a.Op
	if a.Number > 1 {
		name = fmt.Sprintf("%s, attempt %d", a.Op, a.Number)
	}
	s.add(timed{kind: kind, name: name, call: a.Op, from: a.Start, to: a.Start.Add(a.Took), failed: a.Err != nil})
}

// retried is the span of the wait that now begins.
func (s *spans) retried(r keycache.Retry) {
	now := s.now()
	s.add(timed{kind: SpanWait, name: "before another attempt", call: r.Op, from: now, to: now.Add(r.Wait)})
}

// timeline is what was collected, as it is written down. What goes beyond the end,
// such as a wait that was interrupted, is cut there.
func (s *spans) timeline(command string, status Status, finished time.Time) Timeline {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := Timeline{
		Version: timelineVersion, Command: command, Started: status.Started, Finished: status.Finished,
		InstanceID: status.InstanceID, Result: status.Result, Spans: make([]Span, 0, len(s.done)),
	}
	places := map[string]string{} // device -> mount point, which a plan gives only after the first spans
	for _, d := range s.done {
		if d.device != nil && d.mountPoint != "" {
			places[d.device.Path] = d.mountPoint
		}
	}
	total := finished.Sub(s.start)
	at := func(when time.Time) float64 {
		since := min(max(0, when.Sub(s.start)), total)
		return math.Round(since.Seconds()*1e6) / 1e6
	}
	for _, d := range s.done {
		span := Span{Kind: d.kind, Name: d.name, Call: d.call, Start: at(d.from), End: at(d.to), Failed: d.failed}
		if d.device != nil {
			span.Identity, span.Device, span.MountPoint = d.device.Identity, d.device.Path, places[d.device.Path]
		}
		t.Spans = append(t.Spans, span)
	}
	slices.SortStableFunc(t.Spans, func(a, b Span) int { return cmp.Compare(a.Start, b.Start) })
	return t
}

// Seconds is how long the run took.
func (t Timeline) Seconds() float64 { return t.Finished.Sub(t.Started).Seconds() }

// LastTimeline reads the timeline that the last run of this boot left at path, which is
// [DefaultTimelinePath]. Where there is none the error is [ErrNothingRan].
func LastTimeline(path string) (Timeline, error) {
	t, err := ReadTimeline(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("cannot read %s: %w", path, ErrNothingRan)
	}
	return t, err
}

// ReadTimeline reads a timeline.
func ReadTimeline(path string) (Timeline, error) {
	var t Timeline
	data, err := os.ReadFile(path)
	if err != nil {
		return t, fmt.Errorf("cannot read the timeline: %w", err)
	}
	if err := json.Unmarshal(data, &t); err != nil {
		return t, &TimelineError{path, err}
	}
	if t.Version != timelineVersion {
		return t, &TimelineError{path, fmt.Errorf("version %d is not supported, only %d is", t.Version, timelineVersion)}
	}
	total := t.Seconds()
	for i, s := range t.Spans {
		if !(0 <= s.Start && s.Start <= s.End && s.End <= total+1e-6) {
			return t, &TimelineError{path, fmt.Errorf("span %d lasts from %g to %g s of a run of %g s", i, s.Start, s.End, total)}
		}
	}
	return t, nil
}

// TimelineError is a file that is no timeline.
type TimelineError struct {
	Path string
	Err  error
}

func (e *TimelineError) Error() string {
	return fmt.Sprintf("cannot use %s as a timeline: %v", e.Path, e.Err)
}
func (e *TimelineError) Unwrap() error { return e.Err }

// replaceFile replaces a derived file in the run directory as a whole. It is not
// synced; a reader sees the old one or the new one.
func replaceFile(path string, data []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, mode); err != nil {
		return err
	}
	// The service's umask leaves nothing to others, nor does a file that is there already.
	if err := os.Chmod(tmp, mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
