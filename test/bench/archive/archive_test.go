package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain lets this program start itself in its other roles.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "serve" || os.Args[1] == "upload") {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestLog: a log is as long as it has to be, the same each time, and as easy to compress as one of services.
func TestLog(t *testing.T) {
	t.Parallel()
	for k, want := range map[kind][2]float64{ordinary: {5, 12}, noise: {0.9, 1.01}} {
		var log, again, zipped bytes.Buffer
		for _, to := range []*bytes.Buffer{&log, &again} {
			if err := writeLog(to, k, 2*mib, 1); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(log.Bytes(), again.Bytes()) {
			t.Errorf("%s: two logs of a seed are not the same", k)
		}
		if n := log.Len(); n > 2*mib || n < 2*mib-2048 || log.Bytes()[n-1] != '\n' {
			t.Errorf("%s: it has %d bytes", k, n)
		}
		zip := gzip.NewWriter(&zipped)
		if _, err := zip.Write(log.Bytes()); err != nil || zip.Close() != nil {
			t.Fatal(err)
		}
		if ratio := float64(log.Len()) / float64(zipped.Len()); ratio < want[0] || ratio > want[1] {
			t.Errorf("%s: gzip makes it %.2f times smaller", k, ratio)
		}
	}
}

// TestSmallLog: both subjects put the log there, or it would be an error, and memory and time are told.
func TestSmallLog(t *testing.T) {
	t.Parallel()
	build, err := filepath.Abs("../../../build") // the agent takes no state_dir below /tmp
	if err == nil {
		err = os.MkdirAll(build, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(build, "bench-archive-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	b := bencher{dir: dir, agent: filepath.Join(dir, "luks-kms-agent")}
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", b.agent, "../../../cmd/luks-kms-agent").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r := results{mib: 20, started: time.Now(), escrow: []pair{{4, 1, 3, 1, 4}}, pieces: []pair{{5, 1, 5, 1, 4}}}
	if r.machine, err = machine(t.Context(), b.agent); err != nil {
		t.Fatal(err)
	}
	if err := b.measure(t.Context(), &r, 2); err != nil {
		t.Fatal(err)
	}
	for _, c := range r.lines {
		for _, one := range []run{c.agent, c.gzip} {
			if one.took <= 0 || one.cpu <= 0 || one.peak < 1 || one.bytes < 19*mib || one.Bytes < mib || one.Bytes > one.bytes/4 {
				t.Errorf("%+v", one)
			}
		}
		if c.agent.Objects != 3 || c.gzip.Objects != 1 {
			t.Errorf("%d and %d objects", c.agent.Objects, c.gzip.Objects)
		}
	}
	if r.peak() > mostMemory {
		t.Errorf("the agent had %.1f MiB", r.peak())
	}
	for _, want := range []string{"A log of 20 MiB", "| 1 MiB |", "| 5 MiB |", "| 20 MiB |", "| 5 MiB of random bytes |", "in every run, or the benchmark fails. Measured: " + fmt.Sprintf("%.1f", r.peak()) + ", reached", "| 4.00 (4.00 – 4.00) |", "| 5.00 (5.00 – 5.00) |"} {
		if !strings.Contains(r.page(), want) {
			t.Errorf("the page has no %q:\n%s", want, r.page())
		}
	}
	r.memory[0].peaks = append(r.memory[0].peaks, 65)
	if !strings.Contains(r.page(), "Measured: 65.0, missed") {
		t.Error("65 MiB are not too many")
	}
}

func TestReadPairs(t *testing.T) {
	t.Parallel()
	line := "BenchmarkEscrow-2   \t       1\t10335816113 ns/op\t         4.000 at-once\t         2.047 at-once-s\t         8.288 serial-s\t         6.5 serial-sending-s\t   1.5 at-once-sending-s\n"
	pairs, err := readPairs("BenchmarkEscrow", "goos: linux\n"+line+line+"PASS\n")
	if err != nil || len(pairs) != 2 || pairs[1] != (pair{8.288, 2.047, 6.5, 1.5, 4}) {
		t.Errorf("%v, %v", pairs, err)
	}
	if _, err := readPairs("BenchmarkEscrow", strings.Replace(line, "serial-s", "s", 1)); err == nil {
		t.Error("a line without a figure is taken")
	}
}

func TestArguments(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-mib", "1"}, {"-rounds", "0"}, {"x"}, {"-agent", filepath.Join(t.TempDir(), "absent"), "-dir", t.TempDir()}} {
		if err := command(t.Context(), args); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
}
