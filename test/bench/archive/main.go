// Command archive measures what archiving logs and sending an escrow cost, and writes docs/benchmarks-archive.md.
//
//	go run ./test/bench/archive [-mib 1024] [-rounds 5] [-agent bin/luks-kms-agent] [-dir build] [-page docs/benchmarks-archive.md]
//
// `luks-kms-agent logs archive` and `gzip -6 | upload` take turns with the same log. Each is a process by itself, as are the servers: what their
// peak memory is says the kernel. After each run the S3 is read back: what lies there has to be the log. The exit code is 1 where the agent's peak
// memory was above 64 MiB in any run.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

const (
	mostMemory = 64 // MiB that the agent may have at its peak
	mib        = 1 << 20
	fewer      = 3 // rounds of what only memory is asked of
)

// Parts of the log of which only memory is asked, beside all of it.
var shares = []float64{1.0 / 16, 1.0 / 4}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := command(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "archive:", err)
		os.Exit(1)
	}
}

// command is this program in one of its three roles.
func command(ctx context.Context, args []string) error {
	if len(args) == 1 && args[0] == "serve" {
		return serve(os.Stdin, os.Stdout)
	}
	if len(args) == 2 && args[0] == "upload" {
		var p places
		if err := json.Unmarshal([]byte(args[1]), &p); err != nil {
			return err
		}
		return upload(ctx, os.Stdin, p)
	}
	return bench(ctx, args)
}

func bench(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("archive", flag.ContinueOnError)
	size := flags.Int("mib", 1024, "size of the log in MiB")
	rounds := flags.Int("rounds", 5, "of each comparison")
	agent := flags.String("agent", "bin/luks-kms-agent", "the program, as make build makes it")
	dir := flags.String("dir", "build", "where log and spool are for the time being; on a disk, not below /tmp")
	page := flags.String("page", "docs/benchmarks-archive.md", "the page that is written")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *size < 16 || *rounds < 1 {
		return fmt.Errorf("cannot use %q: want flags only, -mib from 16 and -rounds from 1", args)
	}
	if err := os.MkdirAll(*dir, 0o755); err != nil {
		return fmt.Errorf("cannot make a directory for the log: %w", err)
	}
	here, err := os.MkdirTemp(*dir, "bench-archive-")
	if err == nil {
		here, err = filepath.Abs(here)
	}
	if err != nil {
		return fmt.Errorf("cannot make a directory for the log: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(here)) }()
	program, err := filepath.Abs(*agent)
	if err != nil {
		return err
	}
	r := results{mib: *size, started: time.Now()}
	if r.machine, err = machine(ctx, program); err != nil {
		return err
	}
	b := bencher{dir: here, agent: program}
	if err := b.measure(ctx, &r, *rounds); err != nil {
		return err
	}
	if r.escrow, err = atOnce(ctx, "BenchmarkEscrow", *rounds); err != nil {
		return err
	}
	if r.pieces, err = atOnce(ctx, "BenchmarkLogs", *rounds); err != nil {
		return err
	}
	r.took = time.Since(r.started)
	if err := os.WriteFile(*page, []byte(r.page()), 0o644); err != nil {
		return fmt.Errorf("cannot write the page: %w", err)
	}
	if peak := r.peak(); peak > mostMemory {
		return fmt.Errorf("the agent had %.1f MiB at its peak, more than %d", peak, mostMemory)
	}
	return nil
}

// results are all that is measured.
type results struct {
	mib     int
	started time.Time
	took    time.Duration
	machine string
	lines   []comparison // in turns
	memory  []memory
	escrow  []pair
	pieces  []pair // of logs, with S3 far away
}

// comparison is one round: both subjects with the same log.
type comparison struct{ agent, gzip run }

// memory is what the agent needed for a log.
type memory struct {
	kind  kind
	mib   int
	peaks []float64 // MiB, of each round
}

// peak is the most that the agent ever had.
func (r results) peak() (most float64) {
	for _, m := range r.memory {
		most = max(most, slices.Max(m.peaks))
	}
	return most
}

// measure runs everything but the escrow.
func (b bencher) measure(ctx context.Context, r *results, rounds int) error {
	for _, c := range []struct {
		kind kind
		mib  int
	}{{ordinary, int(float64(r.mib) * shares[0])}, {ordinary, int(float64(r.mib) * shares[1])}, {noise, int(float64(r.mib) * shares[1])}} {
		log, err := b.newLog(c.kind, c.mib)
		if err != nil {
			return err
		}
		m := memory{kind: c.kind, mib: c.mib}
		for range min(fewer, rounds) {
			one, err := b.archive(ctx, log)
			if err != nil {
				return err
			}
			m.peaks = append(m.peaks, one.peak)
		}
		fmt.Fprintf(os.Stderr, "%d MiB, %s: peak memory %.1f MiB\n", m.mib, m.kind, slices.Max(m.peaks))
		r.memory = append(r.memory, m)
	}
	log, err := b.newLog(ordinary, r.mib)
	if err != nil {
		return err
	}
	whole := memory{kind: ordinary, mib: r.mib}
	for i := range rounds {
		var c comparison
		first, second := func() (err error) { c.agent, err = b.archive(ctx, log); return err }, func() (err error) { c.gzip, err = b.gzip(ctx, log); return err }
		if i%2 == 1 {
			first, second = second, first
		}
		if err := errors.Join(first(), second()); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "%d MiB: agent %.1f s, gzip and upload %.1f s, %.2f x; peak memory %.1f MiB\n",
			r.mib, c.agent.took.Seconds(), c.gzip.took.Seconds(), c.ratio(), c.agent.peak)
		r.lines = append(r.lines, c)
		whole.peaks = append(whole.peaks, c.agent.peak)
	}
	r.memory = slices.Insert(r.memory, len(shares), whole)
	return nil
}

// ratio is how many times as long as gzip and upload the agent takes.
func (c comparison) ratio() float64 { return c.agent.took.Seconds() / c.gzip.took.Seconds() }

// pair is one round of something that is sent one after the other and several at once.
type pair struct {
	serial, atOnce               float64 // seconds
	sendingSerial, sendingAtOnce float64 // of these, from the first that is sent
	number                       int     // how many at once
}

// atOnce has one of package agent's own benchmarks run: who sends headers needs disks, and only its tests make some up.
func atOnce(ctx context.Context, name string, rounds int) ([]pair, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^"+name+"$", "-benchtime", "1x", "-count", strconv.Itoa(rounds), "./agent")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("cannot run %s: %w\n%s%s", name, err, out.Bytes(), said.Bytes())
	}
	pairs, err := readPairs(name, out.String())
	if err == nil && len(pairs) != rounds {
		err = fmt.Errorf("cannot read %s: it has %d rounds, want %d:\n%s", name, len(pairs), rounds, out.String())
	}
	return pairs, err
}
