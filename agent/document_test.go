package agent

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
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

// TestDisksDocument does the same for the disks that were dealt with.
func TestDisksDocument(t *testing.T) {
	text, err := os.ReadFile("../docs/records.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?ms)^```json disks\n(.*?)^```$").FindSubmatch(text)
	if found == nil {
		t.Fatal("there is no example of the disks")
	}
	dec := json.NewDecoder(bytes.NewReader(found[1]))
	dec.DisallowUnknownFields()
	var f disksFile
	if err := dec.Decode(&f); err != nil || f.Version != disksVersion || len(f.Disks) != 2 {
		t.Errorf("the example is %+v: %v", f, err)
	}
	wantFieldsExplained(t, text, disksFile{}, dealtDisk{})
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

// TestAuditDocument reads the example of a line in docs/audit.md, and holds its tables against the fields of a line and the events.
func TestAuditDocument(t *testing.T) {
	text, err := os.ReadFile("../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?ms)^```json line\n(.*?)^```$").FindSubmatch(text)
	if found == nil {
		t.Fatal("there is no example of a line")
	}
	dec := json.NewDecoder(bytes.NewReader(found[1]))
	dec.DisallowUnknownFields()
	var line AuditLine
	if err := dec.Decode(&line); err != nil || line.Version != auditVersion || line.Event != EventVolumeOpened {
		t.Errorf("the example is %+v: %v", line, err)
	}
	if again, err := json.Marshal(line); err != nil || !bytes.Equal(append(again, '\n'), found[1]) {
		t.Errorf("the agent would write the example as\n%s", again)
	}

	_, fields, _ := strings.Cut(string(text), "\n## A line\n")
	typ := reflect.TypeFor[AuditLine]()
	var want []string
	for i := range typ.NumField() {
		name, option, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
		kind := map[reflect.Kind]string{reflect.String: "string", reflect.Int: "number", reflect.Struct: "string", reflect.Slice: "array of strings", reflect.Pointer: "number"}[typ.Field(i).Type.Kind()]
		want = append(want, name+" "+kind)
		row := regexp.MustCompile("(?m)^\\| `" + name + "` \\|.*\\| (.*) \\|$").FindStringSubmatch(fields)
		// The command and the version are there where the program says them, which it always does.
		if always := option == "" || name == "command" || name == "agent_version"; row == nil || (row[1] == "never") != always {
			t.Errorf("field %s: the row is %q", name, row)
		}
	}
	var got []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| (string|number|array of strings)").FindAllStringSubmatch(fields, -1) {
		got = append(got, row[1]+" "+row[2])
	}
	if !slices.Equal(got, want) {
		t.Errorf("fields:  %q\nin docs: %q", want, got)
	}

	source, err := os.ReadFile("audit.go")
	if err != nil {
		t.Fatal(err)
	}
	events, documented := map[string]string{}, map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\tEvent\w+ +EventKind = "(.*)"$`).FindAllSubmatch(source, -1) {
		events[string(m[1])] = EventKind(m[1]).MessageID()
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\|.*\\| `([0-9a-f]{32})` \\|$").FindAllSubmatch(text, -1) {
		documented[string(m[1])] = string(m[2])
	}
	if len(events) < 19 || !maps.Equal(events, documented) {
		t.Errorf("events:  %v\nin docs: %v", events, documented)
	}
}
