package keycache

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestRecordsDocument reads the examples of docs/records.md as strictly as the files, and finds each field in its tables.
func TestRecordsDocument(t *testing.T) {
	text, err := os.ReadFile("../docs/records.md")
	if err != nil {
		t.Fatal(err)
	}
	example := func(name string, into any) string {
		t.Helper()
		found := regexp.MustCompile("(?ms)^```json " + name + "\n(.*?)^```$").FindStringSubmatch(string(text))
		if found == nil {
			t.Fatalf("there is no example of a %s record", name)
		}
		if err := decode([]byte(found[1]), into); err != nil {
			t.Errorf("the example of a %s record: %v", name, err)
		}
		for field := range fieldNames(into) {
			if !strings.Contains(string(text), "`"+field+"`") {
				t.Errorf("field %s of a %s record is not explained", field, name)
			}
		}
		return found[1]
	}
	// As it would be written: nothing is missing, and the form is the files'.
	same := func(name, want string, record any) {
		t.Helper()
		got, err := encode(record)
		if err != nil || string(got) != want {
			t.Errorf("the example of a %s record would be written as\n%s(%v)", name, got, err)
		}
	}
	var k KeyRecord
	want := example("key", &k)
	if err := k.validate(); err != nil {
		t.Errorf("the example of a key record: %v", err)
	}
	same("key", want, k)
	var v VolumeRecord
	want = example("volume", &v)
	if err := v.validate(); err != nil {
		t.Errorf("the example of a volume record: %v", err)
	}
	same("volume", want, v)
	var n BackupNote
	want = example("backup-note", &n)
	if err := n.validate(); err != nil {
		t.Errorf("the example of a backup's note: %v", err)
	}
	same("backup-note", want, n)
	var e EscrowNote
	want = example("escrow-note", &e)
	if err := e.validate(); err != nil {
		t.Errorf("the example of an escrow's note: %v", err)
	}
	same("escrow-note", want, e)
	var m Manifest
	same("manifest", example("manifest", &m), m)
	if v.KeyID != k.ID {
		t.Error("the examples do not belong together")
	}
}
