package keycache

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestStripeRecord(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveStripe(); err != nil {
		t.Errorf("none there: %v", err)
	}
	put := StripeRecord{UUID: "5f3c1a52-0a3c-4a53-9d0b-2f6a1d9c7e01", Members: []string{"AWS1", "AWS2"}, Created: time.Date(2026, 11, 26, 1, 2, 3, 0, time.UTC)}
	if err := s.PutStripe(put); err != nil {
		t.Fatal(err)
	}
	put.Version = RecordVersion
	if r, err := s.Load(); err != nil || len(r.Problems) > 0 || r.Stripe == nil || !reflect.DeepEqual(*r.Stripe, put) {
		t.Errorf("loaded %+v, %v", r, err)
	}
	if err := s.PutStripe(put); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second one: %v", err)
	}
	if files, err := s.Leftovers(); err != nil || !reflect.DeepEqual(files, []string{"stripe.json"}) {
		t.Errorf("leftovers %v, %v", files, err)
	}
	if err := s.RemoveStripe(); err != nil {
		t.Error(err)
	}
	if r, err := s.Load(); err != nil || r.Stripe != nil {
		t.Errorf("after it was removed: %+v, %v", r, err)
	}
	for what, bad := range map[string]StripeRecord{
		"no UUID":         {Members: put.Members, Created: put.Created},
		"one disk":        {UUID: put.UUID, Members: []string{"AWS1"}, Created: put.Created},
		"a nameless disk": {UUID: put.UUID, Members: []string{"AWS1", ""}, Created: put.Created},
		"no time":         {UUID: put.UUID, Members: put.Members},
	} {
		if err := s.PutStripe(bad); err == nil {
			t.Errorf("%s was written", what)
		}
	}
	for what, text := range map[string]string{
		"truncated":        `{"version": 1,`,
		"an unknown field": `{"version": 1, "uuid": "5f3c1a52-0a3c-4a53-9d0b-2f6a1d9c7e01", "members": ["a", "b"], "created": "2026-11-26T01:02:03Z", "x": 1}`,
		"a newer version":  `{"version": 2, "uuid": "5f3c1a52-0a3c-4a53-9d0b-2f6a1d9c7e01", "members": ["a", "b"], "created": "2026-11-26T01:02:03Z"}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, "stripe.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := s.Load()
		if err != nil || r.Stripe != nil || len(r.Problems) != 1 || !strings.Contains(r.Problems[0].Error(), "stripe.json") {
			t.Errorf("%s: %+v, %v", what, r, err)
		}
	}
}
