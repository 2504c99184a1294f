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

// TestRecoveryTokenInRecordsDocument does the same for the example of a recovery token.
func TestRecoveryTokenInRecordsDocument(t *testing.T) {
	text, err := os.ReadFile("../docs/records.md")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?ms)^```json recovery-token\n(.*?)^```$").FindSubmatch(text)
	if found == nil {
		t.Fatal("there is no example of a recovery token")
	}
	if r := parseRecoveryToken(0, found[1]); r.Problem != "" || r.Keyslot != 1 {
		t.Errorf("the example of a recovery token: %+v", r)
	}
}
