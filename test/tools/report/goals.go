package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Subjects of test/vm/bench that the goals are about.
const (
	agent    = "agent"
	floor    = "floor"
	defaults = "cryptsetup defaults, serial"
	serial   = "cryptsetup pbkdf2, serial"
)

// peers are what a user would pick instead.
var peers = []string{serial, "cryptsetup pbkdf2, parallel", "systemd-cryptsetup pbkdf2", "clevis with tang"}

// A goal is a ratio and what it has to be.
type goal struct {
	what    string
	limit   float64
	atLeast bool
	measure func(*results) (float64, error)
}

func goals() []goal {
	at := func(phase, subject, column string, n int) func(*results) (float64, error) {
		return func(r *results) (float64, error) {
			m, ok := r.median(point{phase, subject, n}, column)
			if !ok {
				return 0, errNotMeasured
			}
			return m, nil
		}
	}
	over := func(a, b func(*results) (float64, error)) func(*results) (float64, error) {
		return func(r *results) (float64, error) {
			x, err := a(r)
			if err != nil {
				return 0, err
			}
			y, err := b(r)
			return x / y, err
		}
	}
	fastest := func(n int) func(*results) (float64, error) {
		return func(r *results) (float64, error) { return r.fastest("reboot", n) }
	}
	var list []goal
	for _, n := range []int{8, 24} {
		list = append(list, goal{fmt.Sprintf("reboot, %d volumes: fastest peer / agent", n), 3, true, over(fastest(n), at("reboot", agent, "seconds", n))})
	}
	return append(list,
		goal{"reboot, 8 volumes: cryptsetup's defaults / agent", 12, true, over(at("reboot", defaults, "seconds", 8), at("reboot", agent, "seconds", 8))},
		goal{"reboot, 8 volumes: agent / floor", 1.3, false, over(at("reboot", agent, "seconds", 8), at("reboot", floor, "seconds", 8))},
		goal{"reboot, 24 volumes: agent / floor", 1.3, false, over(at("reboot", agent, "seconds", 24), at("reboot", floor, "seconds", 24))},
		goal{"first boot, 8 volumes: cryptsetup's defaults / agent", 10, true, over(at("first boot", defaults, "seconds", 8), at("first boot", agent, "seconds", 8))},
		goal{"reboot, one more volume (8 to 24): agent / fastest peer", 0.5, false, over(
			func(r *results) (float64, error) { return r.slope(agent) },
			func(r *results) (float64, error) { return r.leastSlope() },
		)},
		goal{"reboot, 24 volumes: peak memory of the agent, MiB", 40, false, func(r *results) (float64, error) {
			kib, err := at("reboot", agent, "largest_kib", 24)(r)
			return kib / 1024, err
		}},
		goal{"reboot: peak memory at 24 volumes / at 1", 1.3, false, over(at("reboot", agent, "largest_kib", 24), at("reboot", agent, "largest_kib", 1))},
		goal{"reboot: calls of KMS", 1, false, at("reboot", agent, "kms_calls", 24)},
		goal{"first boot: calls of KMS, with DescribeKey", 3, false, at("first boot", agent, "kms_calls", 24)},
	)
}

// fastest is the time of the fastest peer.
func (r *results) fastest(phase string, n int) (float64, error) {
	best := math.Inf(1)
	for _, p := range peers {
		if m, ok := r.median(point{phase, p, n}, "seconds"); ok {
			best = min(best, m)
		}
	}
	if math.IsInf(best, 1) {
		return 0, errNotMeasured
	}
	return best, nil
}

// slope is what one more volume costs between 8 and 24, seconds.
func (r *results) slope(subject string) (float64, error) {
	low, okLow := r.median(point{"reboot", subject, 8}, "seconds")
	high, okHigh := r.median(point{"reboot", subject, 24}, "seconds")
	if !okLow || !okHigh {
		return 0, errNotMeasured
	}
	return (high - low) / 16, nil
}

func (r *results) leastSlope() (float64, error) {
	var slopes []float64
	for _, p := range peers {
		if s, err := r.slope(p); err == nil {
			slopes = append(slopes, s)
		}
	}
	if len(slopes) == 0 {
		return 0, errNotMeasured
	}
	return slices.Min(slopes), nil
}

// goals has a row for each goal.
func (r *results) goals() string {
	var b strings.Builder
	b.WriteString("| what | goal | measured | |\n| --- | --- | --- | --- |\n")
	for _, g := range goals() {
		bound, verdict := "at most", "missed"
		if g.atLeast {
			bound = "at least"
		}
		m, err := g.measure(r)
		measured := digits(m)
		switch {
		case err != nil:
			measured, verdict = err.Error(), ""
		case g.atLeast == (m >= g.limit) || m == g.limit:
			verdict = "reached"
		}
		fmt.Fprintf(&b, "| %s | %s %v | %s | %s |\n", g.what, bound, g.limit, measured, verdict)
	}
	return b.String()
}
