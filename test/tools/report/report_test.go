package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const header = "phase,subject,volumes,round,seconds,ended_seconds,cpu_seconds,processes,largest_kib,sum_kib,kms_calls,imds_calls,written_bytes\n"

const ioHeader = "subject,sector_bytes,workqueues,pattern,block_bytes,jobs,depth,round,bytes_per_second,iops,p99_us\n"

const ioRows = `raw,,,sequential read,4096,1,1,1,4000,10,100
cryptsetup defaults,512,on,sequential read,4096,1,1,1,1000,10,400
agent,4096,off,sequential read,4096,1,1,1,2000,10,200
"agent, work queues on",4096,on,sequential read,4096,1,1,1,1600,10,300
"agent, 512-byte sectors",512,off,sequential read,4096,1,1,1,500,10,800
`

// given returns a directory with results as the benchmark leaves them.
func given(t *testing.T, rows string) string {
	t.Helper()
	dir := t.TempDir()
	for file, text := range map[string]string{
		"results.csv": header + rows,
		"machine.txt": "Measured here.\n",
		"fleet.csv":   "nodes,quota,boot,ready_by_quota,requests_per_node\n10000,50,100,1.09,1.91\n10000,70,100,1.13,1.34\n",
		"io.csv":      ioHeader + ioRows,
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const measured = `reboot,agent,8,1,2,2,1,1,10240,10240,1,4,0
reboot,agent,8,2,1,1,1,1,10240,10240,1,4,0
reboot,agent,8,3,6,6,1,1,10240,10240,2,4,0
reboot,floor and KMS,8,1,1.6,1.6,1,1,10240,10240,1,3,0
reboot,floor and KMS,8,2,1.4,1.4,1,1,10240,10240,1,3,0
reboot,"cryptsetup pbkdf2, serial",8,1,9,9,1,1,10240,10240,0,0,0
reboot,"cryptsetup pbkdf2, parallel",8,1,5,5,1,1,10240,10240,0,0,0
reboot,agent,24,1,4,4,1,1,10240,10240,1,4,0
reboot,"cryptsetup pbkdf2, serial",24,1,57,57,1,1,10240,10240,0,0,0
reboot,"cryptsetup pbkdf2, parallel",24,1,13,13,1,1,10240,10240,0,0,0
reboot,"cryptsetup defaults, serial",8,1,24,24,1,1,10240,10240,0,0,0
`

func TestSpread(t *testing.T) {
	r, err := read(filepath.Join(given(t, measured), "results.csv"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		p                 point
		low, median, high float64
		ok                bool
	}{
		{point{"reboot", agent, 8}, 1, 2, 6, true},
		{point{"reboot", floorKMS, 8}, 1.4, 1.5, 1.6, true}, // of two, the middle
		{point{"reboot", agent, 24}, 4, 4, 4, true},
		{point{"reboot", floor, 8}, 0, 0, 0, false},
	} {
		low, median, high, ok := r.spread(c.p, "seconds")
		if low != c.low || median != c.median || high != c.high || ok != c.ok {
			t.Errorf("%v: got %v, %v, %v, %v, want %v", c.p, low, median, high, ok, c)
		}
	}
	if r.rounds != 3 {
		t.Errorf("got %d rounds, want 3", r.rounds)
	}
}

func TestGoals(t *testing.T) {
	dir := given(t, measured)
	page := filepath.Join(t.TempDir(), "page.md")
	if err := write(dir, page); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| reboot, 8 volumes: fastest peer / agent | at least 3 | 2.50 | missed |",
		"| reboot, 24 volumes: fastest peer / agent | at least 3 | 3.25 | reached |",
		"| reboot, 8 volumes: script with cryptsetup's defaults / agent | at least 12 | 12.0 | reached |",
		"| reboot, 8 volumes: agent / floor and one call of KMS | at most 1.3 | 1.33 | missed |",
		"| reboot, 24 volumes: agent / floor and one call of KMS | at most 1.3 | not measured |  |",
		"| reboot, one more volume (8 to 24): agent / fastest peer | at most 0.5 | 0.25 | reached |",
		"| reboot, 24 volumes: peak memory of the agent, MiB | at most 40 | 10.0 | reached |",
		"| reboot: calls of KMS, most of any run | at most 1 | 2.00 | missed |",
		"time to all ready / (nodes / quota) | at most 1.25 | 1.13 | reached |",
		"requests per ready node | at most 1.5 | 1.34 | reached |",
		"| agent | 2.00 (1.00 – 6.00) | 4.00 (4.00 – 4.00; 1) |",
		"| cryptsetup pbkdf2, parallel | 5.00 (5.00 – 5.00; 1)<br>2.50 × |",
		"## What was slow",
		"| sequential read, 4 KiB, 1 job |",
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the page does not have %q", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", b)
	}
}

// A subject looks the same in all plots, and its variants are told apart by their dashes only.
func TestVariantsShareColourAndMarker(t *testing.T) {
	plain, ok := lookOf(agent)
	if !ok || plain.dashes != nil {
		t.Fatalf("got %v, %v for the agent", plain, ok)
	}
	for suffix := range variants {
		l, ok := lookOf(agent + suffix)
		if !ok || l.colour != plain.colour || l.shape != plain.shape || l.dashes == nil {
			t.Errorf("%q: got %v, %v, want %v with dashes", suffix, l, ok, plain)
		}
	}
	if _, ok := lookOf("somebody else"); ok {
		t.Error("a subject that nobody drew has a look")
	}
}
