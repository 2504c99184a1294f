package agent

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// TestStatusDocument reads the example of a status in docs/records.md, and finds each field explained there.
func TestStatusDocument(t *testing.T) {
	text, err := os.ReadFile("../docs/records.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?ms)^```json status\n(.*?)^```$").FindSubmatch(text)
	if found == nil {
		t.Fatal("there is no example of a status")
	}
	dec := json.NewDecoder(bytes.NewReader(found[1]))
	dec.DisallowUnknownFields()
	var s Status
	if err := dec.Decode(&s); err != nil || s.Version != statusVersion || len(s.Volumes) != 1 {
		t.Errorf("the example is version %d with %d volumes: %v", s.Version, len(s.Volumes), err)
	}
	wantFieldsExplained(t, text, Status{}, CallsStatus{}, VolumeStatus{})
}

// TestTimelineDocument does the same for the timeline, and for the kinds of span.
func TestTimelineDocument(t *testing.T) {
	text, err := os.ReadFile("../docs/records.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?ms)^```json timeline\n(.*?)^```$").FindSubmatch(text)
	if found == nil {
		t.Fatal("there is no example of a timeline")
	}
	path := filepath.Join(t.TempDir(), "timeline.json")
	if err := os.WriteFile(path, found[1], 0o600); err != nil {
		t.Fatal(err)
	}
	if line, err := ReadTimeline(path); err != nil || len(line.Spans) != 2 {
		t.Errorf("the example has %d spans: %v", len(line.Spans), err)
	}
	wantFieldsExplained(t, text, Timeline{}, Span{})
	for _, kind := range []SpanKind{SpanRecords, SpanScan, SpanIMDS, SpanCredentials, SpanKMS, SpanWipe, SpanWait, SpanInspect, SpanUnseal, SpanMap, SpanFormat, SpanMkfs, SpanMount} {
		if !bytes.Contains(text, []byte("| `"+string(kind)+"` |")) {
			t.Errorf("kind %s is not explained", kind)
		}
	}
}

// wantFieldsExplained wants every field of the types to stand in the text.
func wantFieldsExplained(t *testing.T, text []byte, types ...any) {
	t.Helper()
	for _, of := range types {
		typ := reflect.TypeOf(of)
		for i := range typ.NumField() {
			field, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if !bytes.Contains(text, []byte("`"+field+"`")) {
				t.Errorf("field %s of %s is not explained", field, typ.Name())
			}
		}
	}
}
