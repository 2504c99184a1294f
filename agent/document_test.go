package agent

import (
	"bytes"
	"encoding/json"
	"os"
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
