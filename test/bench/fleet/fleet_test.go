package main

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestBucketEnforcesItsRate: whatever is asked, and however often, no more is granted than the rate and one burst.
func TestBucketEnforcesItsRate(t *testing.T) {
	const rate, burst = 50, 2 * time.Second
	for _, perSecond := range []int{10, 49, 50, 51, 500, 5000} {
		b := newBucket(rate, burst)
		granted := 0
		const seconds = 60
		for i := range seconds * perSecond {
			if b.take(time.Duration(i) * time.Second / time.Duration(perSecond)) {
				granted++
			}
		}
		want := min(seconds*perSecond, int(rate*(seconds+burst.Seconds())))
		if granted < want-1 || granted > want {
			t.Errorf("%d per second: %d of %d are granted, want %d", perSecond, granted, seconds*perSecond, want)
		}
	}
	// What was not used is kept up to one burst.
	b := newBucket(rate, burst)
	for _, at := range []time.Duration{0, time.Hour} {
		granted := 0
		for range 1000 {
			if b.take(at) {
				granted++
			}
		}
		if granted != rate*int(burst.Seconds()) {
			t.Errorf("at %v: %d are granted at once", at, granted)
		}
	}
}

func TestLeastRequests(t *testing.T) {
	like := fleet{nodes: 10000, boot: 10 * time.Second, burst: time.Second, seed: 1}
	for quota, want := range map[float64]float64{250: 1.725, 500: 1.45, 700: 1.23, 2000: 1} {
		f := like
		f.quota = quota
		if got := float64(f.leastRequests()) / float64(f.nodes); math.Abs(got-want) > 0.01 {
			t.Errorf("quota %v: %v requests per node, want %v", quota, got, want)
		}
	}
}

// TestSmallFleet: of 60 nodes that boot within half a second KMS serves half at once. The others do not storm: all are ready soon, and
// none of them asks again and again.
func TestSmallFleet(t *testing.T) {
	t.Parallel()
	f := fleet{nodes: 60, quota: 40, boot: 500 * time.Millisecond, burst: 250 * time.Millisecond, seed: 1}
	o, err := f.run(t.Context(), t)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", o)
	if o.failed != 0 || o.other != 0 {
		t.Errorf("%d nodes gave up, %d errors that are not the quota's", o.failed, o.other)
	}
	// Doubling from 200 ms took 150 requests.
	if o.refused == 0 || o.requests != f.nodes+o.refused || o.requests > 2*f.nodes || o.most > 4 {
		t.Errorf("%d requests, %d of one node, %d refused; about %d are needed", o.requests, o.most, o.refused, o.least)
	}
	if o.worst > 15*time.Second || o.median > o.worst || o.ready < o.worst || o.ready > f.boot+o.worst {
		t.Errorf("all ready after %v; a node needed %v, the slowest %v", o.ready, o.median, o.worst)
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "fleet.csv")
	var out strings.Builder
	if err := bench(t.Context(), []string{"-nodes", "3", "-quota", "100,200", "-boot", "50ms", "-csv", file}, &out); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"table": out.String(), "CSV": string(text)} {
		lines := strings.Split(strings.TrimSpace(text), "\n")
		if len(lines) != 3 {
			t.Fatalf("the %s has %d lines:\n%s", what, len(lines), text)
		}
		for _, line := range lines {
			if cells := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == ',' }); len(cells) != len(header()) {
				t.Errorf("a line of the %s has %d columns: %s", what, len(cells), line)
			}
		}
	}
	for _, args := range [][]string{{"-nodes", "0"}, {"-nodes", "x"}, {"-quota", "-1"}, {"-quota", "NaN"}, {"-boot", "0s"}, {"-burst", "-1s"}, {"x"}} {
		if err := bench(t.Context(), args, &out); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
	fleets, err := sweep("100,1000", "", fleet{boot: 10 * time.Second})
	if err != nil || len(fleets) != 10 || fleets[0].quota != 2.5 || fleets[9].quota != 200 {
		t.Errorf("the sweep is %+v (%v)", fleets, err)
	}
	if m := (fleet{nodes: 1000, boot: 10 * time.Second}).moments(); !slices.IsSorted(m) || m[0] < 0 || m[999] >= 10*time.Second || m[500] < 4*time.Second || m[500] > 6*time.Second {
		t.Errorf("1000 nodes boot from %v by %v to %v", m[0], m[500], m[999])
	}
}
