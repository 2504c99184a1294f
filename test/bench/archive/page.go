package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// machine is what the figures were measured with, and on.
func machine(ctx context.Context, agent string) (string, error) {
	version, err := exec.CommandContext(ctx, agent, "version").Output()
	if err != nil {
		return "", fmt.Errorf("cannot run the agent (make build makes it): %w", err)
	}
	zip, err := exec.CommandContext(ctx, "gzip", "--version").Output()
	if err != nil {
		return "", fmt.Errorf("cannot run gzip: %w", err)
	}
	first, _, _ := strings.Cut(string(zip), "\n")
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "", err
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	busy, _, _ := strings.Cut(string(load), " ")
	return fmt.Sprintf("`%s` and %s on %d cores of %s, Linux %s, with a load average of %s at the start",
		strings.TrimSpace(string(version)), first, runtime.NumCPU(), model(string(info)), strings.TrimSpace(string(kernel)), busy), nil
}

// model is the processor's, by /proc/cpuinfo; not every architecture tells.
func model(info string) string {
	for line := range strings.Lines(info) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "an unknown " + runtime.GOARCH
}

// readPairs reads what a benchmark printed.
func readPairs(name, text string) (pairs []pair, err error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || !strings.HasPrefix(fields[0], name) {
			continue
		}
		values := map[string]float64{}
		for i := 2; i+1 < len(fields); i += 2 {
			if values[fields[i+1]], err = strconv.ParseFloat(fields[i], 64); err != nil {
				return nil, fmt.Errorf("cannot read %s: %w", name, err)
			}
		}
		p := pair{values["serial-s"], values["at-once-s"], values["serial-sending-s"], values["at-once-sending-s"], int(values["at-once"])}
		if min(p.serial, p.atOnce, p.sendingSerial, p.sendingAtOnce) <= 0 || p.number <= 0 {
			return nil, fmt.Errorf("cannot read %s: %q lacks a figure", name, line)
		}
		pairs = append(pairs, p)
	}
	return pairs, nil
}

// spread is "median (least – most)" of what f tells of each.
func spread[T any](all []T, digits int, f func(T) float64) string {
	var values []float64
	for _, one := range all {
		values = append(values, f(one))
	}
	return fmt.Sprintf("%.*f (%.*f – %.*f)", digits, median(values), digits, slices.Min(values), digits, slices.Max(values))
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	return (values[(len(values)-1)/2] + values[len(values)/2]) / 2
}

// page is the whole page.
func (r results) page() string {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	say("# Logs and escrow: time and memory\n\nWritten by `make bench-archive`; the text is in `test/bench/archive/page.go`.\n\n")
	say("Measured on %s with %s. The run took %.0f min.\n\n", r.started.UTC().Format("2006-01-02"), r.machine, r.took.Minutes())
	say("**Only ratios mean anything**: the machine has other work beside this, so both sides of a comparison take turns, each round in the other order. In the tables: median (least – most).\n\n")

	say("## Time\n\n")
	say("A log of %d MiB, made up of lines as Hadoop, Spark, the kubelet and a web server write them, goes from the page cache into an S3 on the same machine, by SSE-KMS. After each run it is read back, decrypted and compared.\n\n", r.mib)
	say("- **agent**: `luks-kms-agent logs archive`, the program as it is shipped, with an empty spool. It compresses and syncs pieces of 8 MiB, and then puts up to four at a time and confirms each by a HEAD.\n")
	say("- **gzip and upload**: `gzip -6` into an upload of one object, in parts of 8 MiB, 10 at a time, as `aws s3 cp -` does it. No spool, no positions, no confirmation: after a kill it begins anew.\n\n")
	say("| | agent | gzip and upload | agent / gzip and upload |\n| --- | --- | --- | --- |\n")
	row := func(what string, digits int, f func(run) float64) {
		say("| %s | %s | %s | %s |\n", what, spread(r.lines, digits, func(c comparison) float64 { return f(c.agent) }), spread(r.lines, digits, func(c comparison) float64 { return f(c.gzip) }),
			spread(r.lines, 2, func(c comparison) float64 { return f(c.agent) / f(c.gzip) }))
	}
	row("time, s", 1, func(r run) float64 { return r.took.Seconds() })
	row("CPU time, s", 1, func(r run) float64 { return r.cpu.Seconds() })
	row("MiB of log a second", 0, func(r run) float64 { return float64(r.bytes) / mib / r.took.Seconds() })
	row("log / what is stored", 2, func(r run) float64 { return float64(r.bytes) / float64(r.Bytes) })
	row("objects", 0, func(r run) float64 { return float64(r.Objects) })
	row("peak memory, MiB", 1, func(r run) float64 { return r.peak })
	say("\n%d rounds. CPU time and memory are those of the subject's processes together; S3, KMS and IMDS are a process of their own.\n\n", len(r.lines))

	say("## Memory\n\nPeak memory of `luks-kms-agent logs archive`, as the kernel counts it (`ru_maxrss`), for logs of several sizes, and for one of random bytes, which no compression makes smaller: its pieces are the largest that there are.\n\n")
	say("| log | peak memory, MiB | rounds |\n| --- | --- | --- |\n")
	for _, m := range r.memory {
		what := fmt.Sprintf("%d MiB", m.mib)
		if m.kind == noise {
			what += " of random bytes"
		}
		say("| %s | %s | %d |\n", what, spread(m.peaks, 1, func(v float64) float64 { return v }), len(m.peaks))
	}
	verdict := "reached"
	if r.peak() > mostMemory {
		verdict = "missed"
	}
	say("\nGoal: at most %d MiB in every run, or the benchmark fails. Measured: %.1f, %s.\n\n", mostMemory, r.peak(), verdict)

	table := func(pairs []pair, first string) {
		say("| | at once | one after the other | one after the other / at once |\n| --- | --- | --- | --- |\n")
		for _, row := range []struct {
			what           string
			atOnce, serial func(pair) float64
		}{
			{"all of it, s", func(p pair) float64 { return p.atOnce }, func(p pair) float64 { return p.serial }},
			{"of this, from the first " + first + " that is sent, s", func(p pair) float64 { return p.sendingAtOnce }, func(p pair) float64 { return p.sendingSerial }},
		} {
			say("| %s | %s | %s | %s |\n", row.what, spread(pairs, 2, row.atOnce), spread(pairs, 2, row.serial), spread(pairs, 2, func(p pair) float64 { return row.serial(p) / row.atOnce(p) }))
		}
	}
	say("## Logs to an S3 that is far away\n\n")
	say("`luks-kms-agent logs archive`, but for its start: 24 small logs are compressed, and the pieces sent by SSE-KMS and confirmed, two calls each, to an S3 that takes 50 ms for each call. %d are sent at a time, as long as they have no more than 8 MiB together; beside that, the same one after the other.\n\n", r.pieces[0].number)
	table(r.pieces, "piece")
	say("\n%d rounds.\n\n", len(r.pieces))

	say("## Escrow of 24 volumes\n\n")
	say("`luks-kms-agent escrow put`, but for its start: 24 headers are read and proven, sent by SSE-KMS and confirmed, two calls each, to an S3 that takes 50 ms for each call. %d are sent at a time; beside that, the same one after the other.\n\n", r.escrow[0].number)
	table(r.escrow, "header")
	say("\n%d rounds. Before that each header is read and proven to open, and after it each is noted in the records and synced: one after the other in both.\n\n", len(r.escrow))

	say("## What it means\n\n")
	var cpu []float64
	for _, c := range r.lines {
		cpu = append(cpu, c.agent.cpu.Seconds()/c.gzip.cpu.Seconds())
	}
	least, most := r.memory[0], r.memory[len(shares)]
	say("The agent takes %s times as long as gzip and an upload, and %.2f times their CPU time. Its memory does not follow the log: %.1f MiB for %d MiB of it, %.1f for %d. ",
		spread(r.lines, 2, comparison.ratio), median(cpu), median(least.peaks), least.mib, median(most.peaks), most.mib)
	var whole, sending []float64
	for _, p := range r.escrow {
		whole, sending = append(whole, p.serial/p.atOnce), append(sending, p.sendingSerial/p.sendingAtOnce)
	}
	say("With S3 50 ms away, 24 headers are sent and noted %.1f times as fast as one after the other, and the whole of it is %.1f times as fast: the rest is work of processor and disk.\n\n", median(sending), median(whole))

	say("## What is not measured\n\n")
	say("- S3, its network and TLS: on a real one the time that the agent waits for its pieces counts, and it does not compress meanwhile.\n")
	say("- Disks: the log is in the page cache. The spool is synced, to whatever disk the tree is on.\n")
	say("- `aws s3 cp` itself, and its start: the upload is a program of ours.\n")
	say("- The journal, rotations, and lines longer than a piece.\n")
	return b.String()
}
