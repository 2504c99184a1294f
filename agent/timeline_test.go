package agent

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// timeline is that of the machine's last run.
func (m *machine) timeline() Timeline {
	m.t.Helper()
	t, err := ReadTimeline(filepath.Join(m.dir, "run", "timeline.json"))
	if err != nil {
		m.t.Fatal(err)
	}
	return t
}

// TestTimelineCoversTheRun: a first boot and a reboot leave spans in order, within the run, each volume's one after the other, and next
// to no time of which nobody knows what it went to.
func TestTimelineCoversTheRun(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS1")
	m.disk(volumes.ClassEBS, "vol-1")
	for _, boot := range []struct {
		name string
		of   []SpanKind // of each volume, in this order, waits aside
		run  []SpanKind
	}{
		{"first boot", []SpanKind{SpanInspect, SpanInspect, SpanRecords, SpanFormat, SpanInspect, SpanUnseal, SpanMap, SpanFormat, SpanMkfs, SpanRecords, SpanMount},
			[]SpanKind{SpanRecords, SpanScan, SpanIMDS, SpanCredentials, SpanKMS, SpanMount, SpanWipe}},
		{"reboot", []SpanKind{SpanInspect, SpanUnseal, SpanMap, SpanMap, SpanMount},
			[]SpanKind{SpanRecords, SpanScan, SpanIMDS, SpanCredentials, SpanKMS, SpanMount, SpanWipe}},
	} {
		m.runOK()
		line := m.timeline()
		if line.Command != "run" || line.Result != "ok" || line.InstanceID == "" {
			t.Errorf("%s: %s, %s on %q", boot.name, line.Command, line.Result, line.InstanceID)
		}
		until, unknown := 0.0, 0.0
		ofRun, ends := map[SpanKind]bool{}, map[string]float64{}
		ofVolume := map[string][]SpanKind{}
		for i, s := range line.Spans {
			if s.Start < 0 || s.End < s.Start || s.End > line.Seconds()+1e-6 || i > 0 && s.Start < line.Spans[i-1].Start {
				t.Errorf("%s: span %d is out of order: %+v", boot.name, i, s)
			}
			unknown += max(0, s.Start-until)
			until = max(until, s.End)
			if !s.IsVolumes() {
				ofRun[s.Kind] = true
				continue
			}
			if s.Start < ends[s.Identity] || s.MountPoint == "" || s.Device != filepath.Join(m.dir, s.Identity+".img") {
				t.Errorf("%s: %+v before its volume's last ended at %g", boot.name, s, ends[s.Identity])
			}
			ends[s.Identity] = s.End
			if s.Kind != SpanWait {
				ofVolume[s.Identity] = append(ofVolume[s.Identity], s.Kind)
			}
		}
		if unknown += line.Seconds() - until; unknown > 0.1*line.Seconds()+0.02 {
			t.Errorf("%s: of %g of %g s nobody knows what they went to", boot.name, unknown, line.Seconds())
		}
		for _, id := range []string{"AWS1", "vol-1"} {
			if !slices.Equal(ofVolume[id], boot.of) {
				t.Errorf("%s: %s has %v, want %v", boot.name, id, ofVolume[id], boot.of)
			}
		}
		for _, kind := range boot.run {
			if !ofRun[kind] {
				t.Errorf("%s: the run has no %s", boot.name, kind)
			}
		}
		m.reboot()
	}
}

// TestTimelineShowsWaitsAndFailures: attempts and the waits between them are there, and what failed says so.
func TestTimelineShowsWaitsAndFailures(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.kms.Fail(kmstest.Fault{Op: "Decrypt", Status: 500, Code: "KMSInternalException", Times: 2})
	m.fail = func(step, _ string) error {
		if step == "mount" {
			return errors.New("no")
		}
		return nil
	}
	if r := m.run(); len(r.Failures()) != 1 {
		t.Fatalf("failures: %v", r.Failures())
	}
	var names []string
	for _, s := range m.timeline().Spans {
		if s.Call == "Decrypt" || s.Failed {
			names = append(names, strings.TrimSpace(string(s.Kind)+" "+map[bool]string{true: "failed"}[s.Failed]))
		}
	}
	if want := []string{"kms failed", "wait", "kms failed", "wait", "kms", "mount failed"}; !slices.Equal(names, want) {
		t.Errorf("spans %q, want %q", names, want)
	}
	s, err := ReadStatus(m.node().statusPath)
	if err != nil || !reflect.DeepEqual(s.KMS.RetriesOf, map[string]int{"Decrypt": 2}) || s.LastSuccess == nil {
		t.Errorf("%v, last success %v, %v", s.KMS.RetriesOf, s.LastSuccess, err)
	}
}

// TestNothingFailsForWhatIsTold: a run whose status, timeline and metrics cannot be written is as good as any.
func TestNothingFailsForWhatIsTold(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	if err := os.WriteFile(filepath.Join(m.dir, "run"), nil, 0o600); err != nil { // a file where the directory would be
		t.Fatal(err)
	}
	m.runOK()
	if locked, err := m.node().Lock(t.Context(), nil); err != nil || len(locked) != 1 || locked[0].Err != nil {
		t.Errorf("lock: %+v, %v", locked, err)
	}
}

func TestReadTimelineRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t.json")
	const run = `"started":"2026-01-31T08:15:30Z","finished":"2026-01-31T08:15:31Z"`
	for text, says := range map[string]string{
		"":              "unexpected end",
		`{"version":2}`: "version 2 is not supported, only 1 is",
		`{"spans":[]}`:  "version 0 is not supported",
		`{"version":1,` + run + `,"spans":[{"start":0.5,"end":0.4}]}`: "span 0 lasts from 0.5 to 0.4 s",
		`{"version":1,` + run + `,"spans":[{"start":0.5,"end":1.4}]}`: "of a run of 1 s",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var bad *TimelineError
		if _, err := ReadTimeline(path); !errors.As(err, &bad) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestSpansAreCheap: a span is two looks at the clock and a place in a list.
func TestSpansAreCheap(t *testing.T) {
	s := &spans{now: time.Now}
	s.reset(time.Now())
	p := s.phases(&volumes.Device{}, "/mnt")
	allocs := testing.AllocsPerRun(1000, func() { p.next(SpanMap, "map it") })
	if allocs > 0 { // but for the list, which doubles: less than one in a hundred
		t.Errorf("%g allocations for each span", allocs)
	}
}

func BenchmarkSpan(b *testing.B) {
	s := &spans{now: time.Now}
	p := s.phases(&volumes.Device{}, "/mnt")
	for i := range b.N {
		if i%256 == 0 {
			s.reset(time.Now())
		}
		p.next(SpanMap, "map it")
	}
}

// BenchmarkTimeline is what a run of 24 volumes pays at its end.
func BenchmarkTimeline(b *testing.B) {
	s := &spans{now: time.Now}
	s.reset(time.Now())
	for range 24 {
		p := s.phases(&volumes.Device{Identity: "vol-0123456789abcdef0", Path: "/dev/nvme1n1"}, "/mnt")
		for range 12 {
			p.next(SpanMap, "map it")
		}
	}
	for b.Loop() {
		s.timeline("run", Status{}, time.Now())
	}
}
