package main

import (
	"path/filepath"
	"strings"
	"testing"
)

const passing = `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"quiet\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.1}
{"Action":"pass","Package":"p","Test":"TestA/b","Elapsed":0.1}
{"Action":"pass","Package":"p","Elapsed":0.2}
{"Action":"start","Package":"empty"}
{"Action":"skip","Package":"empty"}
`

func TestCounts(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     string
		good     bool
		says     string
	}{
		{"passing", passing, "2 passed, 0 failed", true, "ok   p 0.2s"},
		{"nothing ran", "", "0 passed, 0 failed", false, ""},
		{"failing", passing + `{"Action":"start","Package":"q"}
{"Action":"output","Package":"q","Test":"TestC","Output":"it broke\n"}
{"Action":"fail","Package":"q","Test":"TestC"}
{"Action":"fail","Package":"q"}
`, "2 passed, 1 failed", false, "it broke"},
		{"skipping", passing + `{"Action":"skip","Package":"p","Test":"TestD"}` + "\n", "2 passed, 0 failed, 1 skipped", false, "SKIPPED p TestD"},
		{"not building", passing + `{"ImportPath":"q","Action":"build-output","Output":"undefined: x\n"}
{"ImportPath":"q","Action":"build-fail"}
{"Action":"start","Package":"q"}
{"Action":"fail","Package":"q","FailedBuild":"q"}
`, "2 passed, 1 failed", false, "undefined: x"},
		{"cut off", passing + `{"Action":"start","Package":"q"}` + "\n" + `{"Action":"pass","Package":"q","Test":"TestE"}`, "3 passed, 1 failed", false, "it never ended"},
		{"no events", "go: cannot find main module\n", "0 passed, 0 failed", false, "cannot find main module"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			got, err := read(strings.NewReader(c.in), &out, false)
			if err != nil || got.String() != c.want || got.good() != c.good || !strings.Contains(out.String(), c.says) {
				t.Errorf("got %q (good: %v, error %v), want %q (%v); printed\n%s", got, got.good(), err, c.want, c.good, out.String())
			}
			if strings.Contains(out.String(), "quiet") {
				t.Error("the output of a test that passed was printed")
			}
		})
	}
}

// What failed in the middle of hours is printed once more at the end.
func TestLiveEndsWithWhatFailed(t *testing.T) {
	var out strings.Builder
	const events = `{"Action":"start","Package":"q"}
{"Action":"output","Package":"q","Test":"TestC","Output":"it broke\n"}
{"Action":"fail","Package":"q","Test":"TestC"}
{"Action":"fail","Package":"q"}
`
	_, err := read(strings.NewReader(events+passing), &out, true)
	if want := "it broke\nFAIL q 0.0s\nquiet\nok   p 0.2s\nFAILED TestC\nit broke\n"; err != nil || out.String() != want {
		t.Errorf("printed (%v)\n%s\nwant\n%s", err, out.String(), want)
	}
}

func TestSum(t *testing.T) {
	file := filepath.Join(t.TempDir(), "counts")
	for range 2 {
		if _, err := run(strings.NewReader(passing), new(strings.Builder), file, true, nil); err != nil {
			t.Fatal(err)
		}
	}
	var out strings.Builder
	c, err := run(nil, &out, "", false, []string{file})
	if err != nil || out.String() != "4 passed, 0 failed\n" || !c.good() {
		t.Errorf("got %q (%v)", out.String(), err)
	}
	if _, err := run(nil, &out, "", false, []string{file + "x"}); err == nil {
		t.Error("a missing file was taken for no tests")
	}
}
