package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Subjects of test/vm/bench that the goals are about.
const (
	agent          = "agent"
	floor          = "floor"
	floorKMS       = "floor and KMS"
	serial         = "cryptsetup pbkdf2, serial"
	parallel       = "cryptsetup pbkdf2, parallel"
	systemd        = "systemd-cryptsetup pbkdf2"
	clevis         = "clevis with tang"
	cryptsetupsOwn = "cryptsetup defaults, serial"
)

// peers are what a user would pick instead.
var peers = []string{serial, parallel, systemd, clevis}

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
	reboot := func(subject string, n int) func(*results) (float64, error) {
		return at("reboot", subject, "seconds", n)
	}
	firstBoot := func(subject string, n int) func(*results) (float64, error) {
		return at("first boot", subject, "seconds", n)
	}
	memory := func(n int) func(*results) (float64, error) { return at("reboot", agent, "largest_kib", n) }
	return []goal{
		{"reboot, 8 volumes: fastest peer / agent", 3, true, over(fastest(8), reboot(agent, 8))},
		{"reboot, 24 volumes: fastest peer / agent", 3, true, over(fastest(24), reboot(agent, 24))},
		{"reboot, 8 volumes: script with cryptsetup's defaults / agent", 12, true, over(reboot(cryptsetupsOwn, 8), reboot(agent, 8))},
		{"reboot, 8 volumes: agent / floor and one call of KMS", 1.3, false, over(reboot(agent, 8), reboot(floorKMS, 8))},
		{"reboot, 24 volumes: agent / floor and one call of KMS", 1.3, false, over(reboot(agent, 24), reboot(floorKMS, 24))},
		{"first boot, 8 volumes: script with cryptsetup's defaults / agent", 10, true, over(firstBoot(cryptsetupsOwn, 8), firstBoot(agent, 8))},
		{"reboot, one more volume (8 to 24): agent / fastest peer", 0.5, false, over(
			func(r *results) (float64, error) { return r.slope(agent) },
			func(r *results) (float64, error) { return r.leastSlope() },
		)},
		{"reboot, 24 volumes: peak memory of the agent, MiB", 40, false, func(r *results) (float64, error) {
			kib, err := memory(24)(r)
			return kib / 1024, err
		}},
		{"reboot: peak memory of the agent, 24 volumes / 1", 1.3, false, over(memory(24), memory(1))},
		{"reboot: calls of KMS, most of any run", 1, false, func(r *results) (float64, error) { return r.most("reboot", agent, "kms_calls") }},
		{"first boot: calls of KMS, DescribeKey included, most of any run", 3, false, func(r *results) (float64, error) {
			return r.most("first boot", agent, "kms_calls")
		}},
		{"[fleet](benchmarks-fleet.md) of 10,000 nodes: time to all ready / (nodes / quota)", 1.25, false, fleetFigure("ready_by_quota")},
		{"[fleet](benchmarks-fleet.md) of 10,000 nodes: requests per ready node", 1.5, false, fleetFigure("requests_per_node")},
	}
}

// most is the largest value of a column, at any number of volumes.
func (r *results) most(phase, subject, column string) (float64, error) {
	most := math.Inf(-1)
	for _, n := range r.volumes {
		if _, _, high, ok := r.spread(point{phase, subject, n}, column); ok {
			most = max(most, high)
		}
	}
	if math.IsInf(most, -1) {
		return 0, errNotMeasured
	}
	return most, nil
}

// fleetFigure is one of the fleet's reference.
func fleetFigure(column string) func(*results) (float64, error) {
	return func(r *results) (float64, error) {
		v, ok := r.fleet[column]
		if !ok {
			return 0, errNotMeasured
		}
		return v, nil
	}
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
