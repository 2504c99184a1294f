package luks

import (
	"os"
	"regexp"
	"testing"
)

// TestRecordsDocument reads the example of a token in docs/records.md as strictly as one in a header.
func TestRecordsDocument(t *testing.T) {
	text, err := os.ReadFile("../docs/records.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?ms)^```json token\n(.*?)^```$").FindSubmatch(text)
	if found == nil {
		t.Fatal("there is no example of a token")
	}
	if _, err := parseToken(0, found[1]); err != nil {
		t.Errorf("the example of a token: %v", err)
	}
}
