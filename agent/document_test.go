package agent

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
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
	for _, of := range []any{Status{}, CallsStatus{}, VolumeStatus{}} {
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
