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
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// columns of the results; memory is in KiB, written is bytes on the data volumes.
var columns = []string{
	"phase", "subject", "volumes", "round", "seconds", "cpu_seconds", "processes", "largest_kib", "sum_kib", "kms_calls", "imds_calls", "written_bytes",
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
	ok := harness.Tell("bench", func(t harness.TB) {
		var subjects []ioSubject
		if *ioOut != "" {
			subjects = ioSubjects(wanted)
		}
		b := prepare(t, wanted, *out != "", subjects)
		if *out != "" {
			b.measure(counts, *repeat, wanted)
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
			if err := os.WriteFile(*machine, []byte(b.machine(*repeat)), 0o644); err != nil {
				t.Fatalf("cannot describe the machine: %v", err)
			}
		}
	})
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
	maxVolumes  = 24
	slowVolumes = 8 // cryptsetup's default key derivation takes part up to here
	stores      = 4
	perStore    = 8
	volumeSize  = harness.DiskSize / perStore
	tangAddress = "169.254.169.252:80"
)

// prepare boots the node, with a disk for each subject of the I/O part, and makes its volumes where they are asked for.
func prepare(t harness.TB, wanted *regexp.Regexp, volumes bool, subjects []ioSubject) *bench {
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
		b.makeVolumes(step, wanted, thumbprint)
	}
	return b
}

// makeVolumes makes 24 volumes under the agent's key, which clevis may open too, and 8 with cryptsetup's defaults.
func (b *bench) makeVolumes(step harness.Step, wanted *regexp.Regexp, thumbprint string) {
	done := step("making the volumes")
	b.sh(fmt.Sprintf("slice %d %d %d", stores, perStore, volumeSize))
	for i := range maxVolumes {
		n := i + 1
		state := fmt.Sprintf("/var/lib/luks-kms-agent-%d", n)
		if n == maxVolumes {
			state = "/var/lib/luks-kms-agent"
		}
		b.n.Write(fmt.Sprintf("/root/bench-%d.yaml", n), 0o600, b.n.Config(config(n, state)))
		b.n.Write(fmt.Sprintf("/root/bench-first-%d.yaml", n), 0o600, b.n.Config(config(n, "/var/lib/luks-kms-agent-first")))
	}
	b.sh("mkfs_bytes; blank 24; agent 24 run >/dev/null; records")
	b.n.Write("/run/bench/key", 0o600, b.n.Unwrap(b.n.KeyRecords()[0]))
	b.sh("closeall; systemd_setup 24")
	done()
	if wanted.MatchString("reboot: clevis with tang") {
		done = step("binding the volumes to tang")
		b.sh("clevis_setup 24 http://" + strings.TrimSuffix(tangAddress, ":80") + " " + thumbprint)
		done()
	}
	if wanted.MatchString("reboot: cryptsetup defaults, serial") {
		done = step("making volumes with cryptsetup's defaults")
		b.sh("defaults_setup")
		done()
	}
}

// config names the first n volumes.
func config(n int, stateDir string) string {
	var text strings.Builder
	fmt.Fprintf(&text, "device_wait: 0s\nstate_dir: %s\nvolumes:\n", stateDir)
	for i := range n {
		fmt.Fprintf(&text, "  - name: /dev/loop%d\n    mount_point: /bench/%d\n    filesystem: ext4\n", 10+i, 10+i)
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
	slow          bool          // three rounds only
	few           bool          // at 1 and 8 volumes only
}

// phase is a time at which volumes are to be mounted, and who does it how.
type phase struct {
	name     string
	setup    string // before each measurement, not measured
	subjects []subject
}

func phases() []phase {
	return []phase{
		{name: "reboot", subjects: []subject{
			{name: "floor", command: "floor"},
			{name: "agent", command: "agent $n run"},
			{name: "agent, KMS 20 ms away", command: "agent $n run", latency: 20 * time.Millisecond},
			{name: "agent, KMS 100 ms away", command: "agent $n run", latency: 100 * time.Millisecond},
			{name: "cryptsetup pbkdf2, serial", command: "open_serial 10 $n"},
			{name: "cryptsetup pbkdf2, parallel", command: "open_parallel"},
			{name: "systemd-cryptsetup pbkdf2", command: "open_systemd"},
			{name: "clevis with tang", command: "open_clevis", slow: true},
			{name: "cryptsetup defaults, serial", command: "open_serial 34 $n", slow: true, few: true},
		}},
		{name: "first boot", setup: "blank $n; rm -rf /var/lib/luks-kms-agent-first", subjects: []subject{
			{name: "floor", command: "floor_format"},
			{name: "agent", command: "agent first-$n run"},
			{name: "agent, KMS 20 ms away", command: "agent first-$n run", latency: 20 * time.Millisecond},
			{name: "agent, KMS 100 ms away", command: "agent first-$n run", latency: 100 * time.Millisecond},
			{name: "cryptsetup pbkdf2, serial", command: "make_serial '--pbkdf pbkdf2 --pbkdf-force-iterations 1000'"},
			{name: "cryptsetup pbkdf2, parallel", command: "make_parallel '--pbkdf pbkdf2 --pbkdf-force-iterations 1000'"},
			{name: "cryptsetup defaults, serial", command: "make_serial ''", slow: true, few: true},
		}},
	}
}

const slowRounds = 3

func (b *bench) measure(counts []int, rounds int, wanted *regexp.Regexp) {
	for _, p := range phases() {
		for round := range rounds {
			for _, n := range counts {
				// In turn, and each round another one begins.
				for i := range p.subjects {
					s := p.subjects[(i+round)%len(p.subjects)]
					if !wanted.MatchString(p.name+": "+s.name) || s.slow && round >= slowRounds || s.few && n != 1 && n != slowVolumes {
						continue
					}
					b.one(p, s, n, round)
				}
			}
		}
	}
}

// one is one measurement.
func (b *bench) one(p phase, s subject, n, round int) {
	b.sh(fmt.Sprintf("n=%d; %s; sync; echo 3 >/proc/sys/vm/drop_caches; udevadm settle; sleep 0.5", n, cmp.Or(p.setup, ":")))
	b.slowKMS(s.latency)
	b.n.KMS.Forget()
	b.n.IMDS.Forget()
	before := b.sh("written")
	cost := b.n.Meter(fmt.Sprintf("set -eu; . /root/bench.sh; n=%d; %s >/dev/null", n, s.command), 20*time.Minute)
	after := b.sh("written")
	if got := strings.TrimSpace(b.sh("mounted")); got != strconv.Itoa(n) && s.command != "floor_format" {
		b.Fatalf("%s: %s volumes are mounted, want %d", s.name, got, n)
	}
	b.sh("closeall")
	row := []string{
		p.name, s.name, strconv.Itoa(n), strconv.Itoa(round + 1), fmt.Sprintf("%.3f", cost.Seconds), fmt.Sprintf("%.2f", cost.CPUSeconds),
		strconv.Itoa(cost.Processes), strconv.FormatInt(cost.LargestKiB, 10), strconv.FormatInt(cost.SumKiB, 10),
		strconv.Itoa(len(b.n.KMS.Calls())), strconv.Itoa(len(b.n.IMDS.Requests())), strconv.Itoa(number(after) - number(before)),
	}
	b.Logf("%s", strings.Join(row, "\t"))
	b.rows = append(b.rows, row)
}

// machine says what was measured, on what, and when.
func (b *bench) machine(rounds int) string {
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
	return fmt.Sprintf("Measured on %s with `%s` by QEMU's emulation (TCG) of 2 processors on %d of %s; the guest: Debian 12, Linux %s. %d rounds, %d of slow subjects.\n",
		time.Now().UTC().Format(time.DateOnly), strings.TrimSpace(b.n.Sh("luks-kms-agent version")), runtime.NumCPU(), host,
		strings.ReplaceAll(guest, " ,", ","), rounds, min(rounds, slowRounds))
}

func number(text string) int {
	n, _ := strconv.Atoi(strings.TrimSpace(text))
	return n
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
