package main

import "testing"

func TestLargest(t *testing.T) {
	for _, c := range []struct {
		counts, at []int
		want       int
	}{
		{[]int{1, 2, 4, 8, 16, 24}, few, 8},
		{[]int{1, 2}, few, 1},
		{[]int{2, 24}, few, 0},
		{[]int{24, 8}, some, 24},
	} {
		if got := largest(c.counts, c.at); got != c.want {
			t.Errorf("largest(%v, %v) is %d, want %d", c.counts, c.at, got, c.want)
		}
	}
}

// The subjects whose volumes are made for them have enough of them, and a row of the results says unmistakably whose it is.
func TestPhases(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range phases() {
		for _, s := range p.subjects {
			if name := p.name + ": " + s.name; seen[name] {
				t.Errorf("%s is there twice", name)
			} else {
				seen[name] = true
			}
		}
	}
	if have, want := stores*perStore, maxVolumes+2*slowVolumes; have < want {
		t.Errorf("there is room for %d volumes, want %d", have, want)
	}
	for _, name := range []string{"reboot: clevis with tang", "reboot: cryptsetup defaults, serial"} {
		if !seen[name] {
			t.Errorf("volumes are made for %q, which nobody measures", name)
		}
	}
}
