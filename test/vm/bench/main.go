// Command bench measures, in one VM, what it costs to make and to open encrypted volumes: by the agent, by what a user would pick
// instead, and by a program that does only what cannot be left out. All have the same disks and the same passphrase, and take turns.
//
//	go run ./test/vm/bench [-volumes 1,8] [-repeat 5] [-only REGEXP] [-out results.csv] [-io io.csv]
//
// And how fast mappings are read and written, which is in io.go. What has no file is not measured.
//
// The VM is emulated: seconds mean nothing, ratios within one run do.
package main

import (
	"cmp"
	"context"
	"encoding/csv"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// columns of the results; seconds are until all volumes are mounted, ended_seconds until the command ends, memory is in KiB, written is bytes on
// the data volumes.
var columns = []string{
	"phase", "subject", "volumes", "round", "seconds", "ended_seconds", "cpu_seconds", "processes", "largest_kib", "sum_kib", "kms_calls", "imds_calls",
	"written_bytes",
}

func main() {
	volumes := flag.String("volumes", "1,2,4,8,16,24", "numbers of volumes, each at most 24")
	repeat := flag.Int("repeat", 5, "rounds; slow subjects take part in the first three")
	only := flag.String("only", "", "subjects that match this regular expression")
	out := flag.String("out", "", "file for the results as CSV")
	ioOut := flag.String("io", "", "file for the results of reading and writing as CSV")
	machine := flag.String("machine", "", "file for a line about the machine and what was measured")
	flag.Parse()
	wanted, err := regexp.Compile(*only)
	if err != nil || *out == "" && *ioOut == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	var counts []int
	for text := range strings.SplitSeq(*volumes, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > maxVolumes {
			flag.Usage()
			os.Exit(2)
		}
		counts = append(counts, n)
	}
	begin := time.Now()
	ok := harness.Tell("bench", func(t harness.TB) {
		var subjects []ioSubject
		if *ioOut != "" {
			subjects = ioSubjects(wanted)
		}
		b := prepare(t, counts, wanted, *out != "", subjects)
		if *out != "" {
			b.measure(counts, *repeat, wanted)
			inOrder(b.rows)
			if err := save(*out, columns, b.rows); err != nil {
				t.Fatalf("cannot save the results: %v", err)
			}
		}
		if *ioOut != "" {
			rows := b.io(subjects, min(*repeat, slowRounds))
			if err := save(*ioOut, ioColumns, rows); err != nil {
				t.Fatalf("cannot save the results of reading and writing: %v", err)
			}
		}
		if *machine != "" {
			if err := os.WriteFile(*machine, []byte(b.machine(time.Since(begin))), 0o644); err != nil {
				t.Fatalf("cannot describe the machine: %v", err)
			}
		}
	})
	fmt.Printf("bench: %v\n", time.Since(begin).Round(time.Second))
	if !ok {
		os.Exit(1)
	}
}

// bench is the node with its disks, and what was measured.
type bench struct {
	harness.TB
	n    *harness.Node
	rows [][]string
}

const (
	maxVolumes    = 24
	slowVolumes   = 8 // what is slow takes part up to here, and has as many volumes of its own
	firstVolume   = 10
	firstDefaults = firstVolume + maxVolumes
	firstClevis   = firstDefaults + slowVolumes
	stores        = 5
	perStore      = 8
	volumeSize    = harness.DiskSize / perStore
	tangAddress   = "169.254.169.252:80"
)

// prepare boots the node, with a disk for each subject of the I/O part, and makes its volumes where they are asked for.
func prepare(t harness.TB, counts []int, wanted *regexp.Regexp, volumes bool, subjects []ioSubject) *bench {
	step := harness.Announce(os.Stdout)
	assets, err := harness.Prepare(context.Background(), step, "clevis", "clevis-luks", "curl", "fio")
	if err != nil {
		t.Fatalf("cannot get ready: %v", err)
	}
	t.Cleanup(func() {
		if err := assets.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
	var disks []harness.Disk
	for i := range stores {
		disks = append(disks, harness.Loop(fmt.Sprintf("store%d", i), fmt.Sprintf("/dev/loop%d", i)))
	}
	for _, s := range subjects {
		disks = append(disks, s.disk())
	}
	b := &bench{TB: t, n: harness.NewNode(t, assets, "", disks...)}
	tang, thumbprint, err := serveTang(t)
	if err != nil {
		t.Fatalf("cannot start tang: %v", err)
	}
	b.n.Serve(tangAddress, tang)
	done := step("booting the node")
	b.n.Boot()
	b.n.AwaitVolumes()
	done()
	b.n.Write("/root/bench.sh", 0o600, guestScript+ioScript)
	if volumes {
		b.makeVolumes(step, counts, wanted, thumbprint)
	}
	return b
}

// makeVolumes makes 24 volumes under the agent's key, 8 with cryptsetup's defaults, and 8 for clevis, which adds a key slot and a token that
// the agent would not take.
func (b *bench) makeVolumes(step harness.Step, counts []int, wanted *regexp.Regexp, thumbprint string) {
	done := step("making the volumes")
	b.sh(fmt.Sprintf("slice %d %d %d", stores, perStore, volumeSize))
	most := slices.Max(counts)
	for _, n := range counts {
		state := fmt.Sprintf("/var/lib/luks-kms-agent-%d", n)
		if n == most {
			state = "/var/lib/luks-kms-agent"
		}
		b.n.Write(fmt.Sprintf("/root/bench-%d.yaml", n), 0o600, b.n.Config(config(n, state)))
		b.n.Write(fmt.Sprintf("/root/bench-first-%d.yaml", n), 0o600, b.n.Config(config(n, "/var/lib/luks-kms-agent-first")))
	}
	b.sh(fmt.Sprintf("mkfs_bytes; blank %d; agent %d run >/dev/null", most, most))
	for _, n := range counts {
		if n != most {
			b.sh(fmt.Sprintf("records %d", n))
		}
	}
	b.n.Write("/run/bench/key", 0o600, b.n.Unwrap(b.n.KeyRecords()[0]))
	b.sh(fmt.Sprintf("closeall; systemd_setup %d", most))
	done()
	if n := largest(counts, few); n > 0 && wanted.MatchString("reboot: clevis with tang") {
		done = step("making volumes that are bound to tang")
		b.sh(fmt.Sprintf("clevis_setup %d %d http://%s %s", firstClevis, n, strings.TrimSuffix(tangAddress, ":80"), thumbprint))
		done()
	}
	if n := largest(counts, few); n > 0 && wanted.MatchString("reboot: cryptsetup defaults, serial") {
		done = step("making volumes with cryptsetup's defaults")
		b.sh(fmt.Sprintf("defaults_setup %d %d", firstDefaults, n))
		done()
	}
}

// largest returns the largest of counts that is also in at, 0 for none.
func largest(counts, at []int) int {
	most := 0
	for _, n := range counts {
		if slices.Contains(at, n) {
			most = max(most, n)
		}
	}
	return most
}

// config names the first n volumes.
func config(n int, stateDir string) string {
	var text strings.Builder
	fmt.Fprintf(&text, "device_wait: 0s\nstate_dir: %s\nvolumes:\n", stateDir)
	for i := range n {
		fmt.Fprintf(&text, "  - name: /dev/loop%d\n    mount_point: /bench/%d\n    filesystem: ext4\n", firstVolume+i, firstVolume+i)
	}
	return text.String()
}

// sh runs a function of the guest's script.
func (b *bench) sh(command string) string {
	return b.n.ShLong("set -eu; . /root/bench.sh; "+command, 20*time.Minute)
}

// subject is a way to do the job.
type subject struct {
	name, command string        // in bash, with the number of volumes as $n
	latency       time.Duration // added to each answer of KMS
	at            []int         // numbers of volumes at which it takes part; nil: all
	slow          bool          // three rounds only
}

// phase is a time at which volumes are to be mounted, and who does it how.
type phase struct {
	name     string
	setup    string // before each measurement, not measured
	cold     bool   // programs, too, have to be read from the disk first
	full     int    // with more volumes than this, three rounds only; 0: no matter how many
	subjects []subject
}

// What of an hour the subjects are worth.
var (
	one  = []int{1}
	few  = []int{1, slowVolumes}
	some = []int{1, slowVolumes, maxVolumes}
	low  = []int{1, 2, 4, slowVolumes}
)

func phases() []phase {
	const (
		near, far = 20 * time.Millisecond, 100 * time.Millisecond
		ours      = "'--pbkdf pbkdf2 --pbkdf-force-iterations 1000'"
	)
	return []phase{
		{name: "reboot", subjects: []subject{
			{name: "floor", command: "floor_open"},
			{name: "floor and KMS", command: "floor_kms " + harness.KMSEndpoint},
			{name: "agent", command: "agent $n run"},
			{name: "agent, KMS 20 ms away", command: "agent $n run", latency: near, at: some},
			{name: "agent, KMS 100 ms away", command: "agent $n run", latency: far, at: some},
			{name: "cryptsetup pbkdf2, serial", command: fmt.Sprintf("open_serial %d", firstVolume), slow: true},
			{name: "cryptsetup pbkdf2, parallel", command: "open_parallel"},
			{name: "systemd-cryptsetup pbkdf2", command: "open_systemd", slow: true},
			{name: "clevis with tang", command: fmt.Sprintf("open_clevis %d", firstClevis), at: few, slow: true},
			{name: "cryptsetup defaults, serial", command: fmt.Sprintf("open_serial %d", firstDefaults), at: few, slow: true},
		}},
		{name: "reboot", cold: true, subjects: []subject{
			{name: "agent, cold caches", command: "agent $n run", at: few, slow: true},
			{name: "cryptsetup pbkdf2, parallel, cold caches", command: "open_parallel", at: few, slow: true},
		}},
		{name: "first boot", setup: "blank $n; rm -rf /var/lib/luks-kms-agent-first", full: slowVolumes, subjects: []subject{
			{name: "floor", command: "floor_format"},
			{name: "agent", command: "agent first-$n run"},
			{name: "agent, KMS 20 ms away", command: "agent first-$n run", latency: near, at: one, slow: true},
			{name: "agent, KMS 100 ms away", command: "agent first-$n run", latency: far, at: one, slow: true},
			{name: "cryptsetup pbkdf2, serial", command: "make_serial " + ours, at: low, slow: true},
			{name: "cryptsetup pbkdf2, parallel", command: "make_parallel " + ours},
			{name: "cryptsetup defaults, serial", command: "make_serial ''", at: few, slow: true},
		}},
	}
}

const slowRounds = 3

func (b *bench) measure(counts []int, rounds int, wanted *regexp.Regexp) {
	for _, p := range phases() {
		p.subjects = slices.DeleteFunc(p.subjects, func(s subject) bool {
			return !wanted.MatchString(p.name+": "+s.name) || s.at != nil && largest(counts, s.at) == 0
		})
		if !p.cold {
			b.warm(p, slices.Min(counts))
		}
		for round := range rounds {
			for _, n := range counts {
				// Each time in another order: who comes after a run of the same program is faster. The same orders in each run of the benchmark.
				for _, i := range rand.New(rand.NewPCG(uint64(round), uint64(n))).Perm(len(p.subjects)) {
					s := p.subjects[i]
					if (s.at == nil || slices.Contains(s.at, n)) && (round < slowRounds || !s.slow && (p.full == 0 || n <= p.full)) {
						b.one(p, s, n, round)
					}
				}
			}
		}
	}
}

// inOrder sorts what was measured as the subjects are listed, and leaves the rest in the order of measuring.
func inOrder(rows [][]string) {
	place := map[[2]string]int{}
	for _, p := range phases() {
		for _, s := range p.subjects {
			place[[2]string{p.name, s.name}] = len(place)
		}
	}
	slices.SortStableFunc(rows, func(a, b []string) int { return place[[2]string{a[0], a[1]}] - place[[2]string{b[0], b[1]}] })
}

// warm runs each subject once, not measured: before a program runs for the first time emulation has to translate it, which a processor
// has not, and which takes longer than most of what is measured here.
func (b *bench) warm(p phase, n int) {
	for _, s := range p.subjects {
		b.sh(fmt.Sprintf("n=%d; %s; %s >/dev/null; closeall", n, cmp.Or(p.setup, ":"), s.command))
	}
}

// one is one measurement.
func (b *bench) one(p phase, s subject, n, round int) {
	caches := "cool"
	if p.cold {
		caches = "freeze"
	}
	var before, after, mounted int
	if _, err := fmt.Sscan(b.sh(fmt.Sprintf("n=%d; %s; %s; written", n, cmp.Or(p.setup, ":"), caches)), &before); err != nil {
		b.Fatalf("%s: cannot read how much was written before it: %v", s.name, err)
	}
	b.slowKMS(s.latency)
	b.n.KMS.Forget()
	b.n.IMDS.Forget()
	cost := b.n.Meter(fmt.Sprintf("set -eu; . /root/bench.sh; n=%d; %s >/dev/null", n, s.command), 20*time.Minute)
	if _, err := fmt.Sscan(b.sh("written; mounted; closeall"), &after, &mounted); err != nil || mounted != n && s.command != "floor_format" {
		b.Fatalf("%s: %d volumes are mounted, want %d (%v)", s.name, mounted, n, err)
	}
	row := []string{
		p.name, s.name, strconv.Itoa(n), strconv.Itoa(round + 1), fmt.Sprintf("%.3f", cmp.Or(cost.MountedSeconds, cost.Seconds)),
		fmt.Sprintf("%.3f", cost.Seconds), fmt.Sprintf("%.2f", cost.CPUSeconds),
		strconv.Itoa(cost.Processes), strconv.FormatInt(cost.LargestKiB, 10), strconv.FormatInt(cost.SumKiB, 10),
		strconv.Itoa(len(b.n.KMS.Calls())), strconv.Itoa(len(b.n.IMDS.Requests())), strconv.Itoa(after - before),
	}
	b.Logf("%s", strings.Join(row, "\t"))
	b.rows = append(b.rows, row)
}

// machine says what was measured, on what, when, and how long that took.
func (b *bench) machine(took time.Duration) string {
	host := "an unknown processor"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, ok := strings.CutPrefix(line, "model name\t: "); ok {
				host = strings.TrimSpace(name)
				break
			}
		}
	}
	guest := strings.Join(strings.Fields(b.n.Sh(`uname -r; echo ", "; cryptsetup --version | cut -d' ' -f1,2; echo ", systemd"; systemctl --version | sed -n 's/systemd \([0-9]*\) .*/\1/p'; echo ", clevis"; dpkg-query -W -f '${Version}' clevis`)), " ")
	return fmt.Sprintf("Measured on %s with `%s` by QEMU's emulation (TCG) of 2 processors on %d of %s; the guest: Debian 12, Linux %s. The run took %.0f minutes.\n",
		time.Now().UTC().Format(time.DateOnly), strings.TrimSpace(b.n.Sh("luks-kms-agent version")), runtime.NumCPU(), host,
		strings.ReplaceAll(guest, " ,", ","), took.Minutes())
}

func save(file string, columns []string, rows [][]string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	w := csv.NewWriter(f)
	if err := w.WriteAll(slices.Concat([][]string{columns}, rows)); err != nil {
		return err
	}
	return f.Close()
}
