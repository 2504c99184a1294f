package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// ioColumns are those of the results of reading and writing. sector_bytes and workqueues are what device-mapper says of the mapping, empty
// where there is none.
var ioColumns = []string{
	"subject", "sector_bytes", "workqueues", "pattern", "block_bytes", "jobs", "depth", "round", "bytes_per_second", "iops", "p99_us",
}

// ioSubject is a disk that is read and written, bare or by a mapping.
type ioSubject struct {
	name   string
	serial string // of its virtio disk
	setup  string // in bash; the serial is its last argument
}

// ioSubjects are those that match. The last three differ from the agent's in one thing each.
func ioSubjects(wanted *regexp.Regexp) []ioSubject {
	var list []ioSubject
	for _, s := range []ioSubject{
		{"raw", "raw", ":"},
		{"cryptsetup defaults", "defaults", "io_cryptsetup '' ''"},
		{"agent", "agent", "io_agent auto"},
		{"agent, work queues on", "on", "io_agent on"},
		{"agent, work queues off", "off", "io_agent off"},
		// The agent takes 512 only where it must.
		{"agent, 512-byte sectors", "sectors", "io_cryptsetup '--sector-size 512' --perf-no_write_workqueue"},
	} {
		if wanted.MatchString("io: " + s.name) {
			list = append(list, s)
		}
	}
	return list
}

// disk is away, so that nothing is put on it: the virtio disk is the one that is measured, as it has the fewest layers below.
func (s ioSubject) disk() harness.Disk { return harness.Disk{Name: s.serial, Away: true} }

// ioConfig names one disk; io_agent adds the work queues.
func ioConfig(serial string) string {
	return fmt.Sprintf("device_wait: 0s\nstate_dir: /var/lib/luks-kms-agent-io-%s\nvolumes:\n"+
		"  - name: /dev/disk/by-id/virtio-%s\n    mount_point: /bench/io-%s\n    filesystem: ext4\n", serial, serial, serial)
}

// ioPattern is one way to read or write.
type ioPattern struct {
	name, rw string // ours, and fio's
	block    int    // bytes
	jobs     int
	depth    int // blocks that each job has in flight
}

func ioPatterns() []ioPattern {
	var list []ioPattern
	for _, way := range []ioPattern{
		{name: "sequential read", rw: "read"}, {name: "sequential write", rw: "write"},
		{name: "random read", rw: "randread"}, {name: "random write", rw: "randwrite"},
	} {
		for _, way.block = range []int{4 << 10, 1 << 20} {
			for _, way.jobs = range []int{1, 8} {
				way.depth = 1
				list = append(list, way)
				// What one CPU has to do alone where there are no work queues.
				if way.block == 1<<20 && way.jobs == 1 && !strings.HasPrefix(way.rw, "rand") {
					way.depth = 8
					list = append(list, way)
				}
			}
		}
	}
	return list
}

// ioLimit bounds the time of the rounds: one that would end later, if it took as long as the one before, does not begin.
const ioLimit = 10 * time.Minute

// io reads and writes all subjects in all ways, and returns rows of ioColumns. A round is one run of fio, because fio takes a second to
// start; in it a pattern goes through all subjects, and each round another one begins.
func (b *bench) io(subjects []ioSubject, rounds int) [][]string {
	devices, mappings := map[string]string{}, map[string][]string{}
	for _, s := range subjects {
		b.n.Write("/root/bench-io-"+s.serial+".yaml", 0o600, b.n.Config(ioConfig(s.serial)))
		b.sh(fmt.Sprintf("io_fill %s; %s %s", s.serial, s.setup, s.serial))
		devices[s.name] = strings.TrimSpace(b.sh("io_device " + s.serial))
		mappings[s.name] = mapping(devices[s.name], b.sh("io_options "+devices[s.name]))
	}
	var rows [][]string
	var took time.Duration
	for round, first := 0, time.Now(); round < rounds && time.Since(first)+took < ioLimit; round++ {
		began := time.Now()
		var runs []ioRun
		for _, p := range ioPatterns() {
			for i := range subjects {
				s := subjects[(i+round)%len(subjects)]
				runs = append(runs, ioRun{p, s.name, devices[s.name]})
			}
		}
		b.n.Write("/run/bench/io.fio", 0o600, fioJobs(runs))
		b.sh("fio --output-format=json --output=/run/bench/io.json /run/bench/io.fio")
		results, err := parseFio(b.n.Read("/run/bench/io.json"), runs)
		if err != nil {
			b.Fatalf("cannot read what fio says: %v", err)
		}
		for i, run := range runs {
			r := results[i]
			row := append([]string{run.subject}, mappings[run.subject]...)
			row = append(row, run.name, strconv.Itoa(run.block), strconv.Itoa(run.jobs), strconv.Itoa(run.depth), strconv.Itoa(round+1),
				strconv.FormatInt(r.BytesPerSecond, 10), fmt.Sprintf("%.1f", r.IOPS), strconv.FormatInt(r.Latency.Percentile[p99]/1000, 10))
			b.Logf("%s", strings.Join(row, "\t"))
			rows = append(rows, row)
		}
		took = time.Since(began)
		b.Logf("round %d took %.0f s", round+1, took.Seconds())
	}
	return rows
}

// mapping is sector_bytes and workqueues of ioColumns.
func mapping(device, options string) []string {
	if !strings.HasPrefix(device, "/dev/dm-") {
		return []string{"", ""}
	}
	sector, queues := "512", "on"
	for option := range strings.FieldsSeq(options) {
		if size, ok := strings.CutPrefix(option, "sector_size:"); ok {
			sector = size
		}
	}
	switch {
	case strings.Contains(options, "no_read_workqueue"):
		queues = "off"
	case strings.Contains(options, "no_write_workqueue"):
		queues = "for reads only"
	}
	return []string{sector, queues}
}

// ioRun is one measurement.
type ioRun struct {
	ioPattern
	subject, device string
}

// fioJobs has a section for each run, one after the other. Each job has a piece of its own, in which it goes round.
func fioJobs(runs []ioRun) string {
	const global = `[global]
direct=1
time_based=1
runtime=1100ms
size=16m
offset_increment=16m
group_reporting=1
# From the submission on, in which a mapping without work queues encrypts.
clat_percentiles=0
lat_percentiles=1
`
	var text strings.Builder
	text.WriteString(global)
	for i, r := range runs {
		engine := "psync"
		if r.depth > 1 {
			engine = "libaio"
		}
		fmt.Fprintf(&text, "[%d]\nstonewall\nfilename=%s\nioengine=%s\nrw=%s\nbs=%d\nnumjobs=%d\niodepth=%d\n",
			i, r.device, engine, r.rw, r.block, r.jobs, r.depth)
	}
	return text.String()
}

// fioResult is what fio says of the reads or the writes of all jobs of a section.
type fioResult struct {
	BytesPerSecond int64   `json:"bw_bytes"`
	IOPS           float64 `json:"iops"`
	Latency        struct {
		Percentile map[string]int64 // nanoseconds
	} `json:"lat_ns"`
}

// p99 is fio's name of it.
const p99 = "99.000000"

// parseFio returns a result for each run.
func parseFio(b []byte, runs []ioRun) ([]fioResult, error) {
	var said struct {
		Jobs []struct {
			Name        string `json:"jobname"`
			Error       int
			Read, Write fioResult
		}
	}
	if err := json.Unmarshal(b, &said); err != nil {
		return nil, err
	}
	if len(said.Jobs) != len(runs) {
		return nil, fmt.Errorf("it has %d results, not %d", len(said.Jobs), len(runs))
	}
	var results []fioResult
	for i, job := range said.Jobs {
		r := job.Write
		if strings.HasSuffix(runs[i].rw, "read") {
			r = job.Read
		}
		if job.Name != strconv.Itoa(i) || job.Error != 0 || r.BytesPerSecond == 0 || r.Latency.Percentile[p99] == 0 {
			return nil, fmt.Errorf("result %d is of section %s, with error %d and %d bytes per second", i, job.Name, job.Error, r.BytesPerSecond)
		}
		results = append(results, r)
	}
	return results, nil
}

// ioScript is what the guest has to do for it. Disks are named by their serial.
const ioScript = `
io_disk() { readlink -f /dev/disk/by-id/virtio-$1; }
# Where fio reads and writes, and the key slots: what was never written would be read from a hole of the image. Zeros are blank for the agent.
io_fill() { dd if=/dev/zero of=$(io_disk $1) bs=4M count=40 oflag=direct status=none; }
io_agent() { # WORKQUEUES DISK
	echo "workqueues: $1" >>/root/bench-io-$2.yaml
	echo 0 >/sys/block/$(basename $(io_disk $2))/queue/rotational # as EC2's; a virtio disk says that it rotates
	mkdir -p /bench/io-$2
	agent io-$2 run >/dev/null
	umount /bench/io-$2
}
io_cryptsetup() { # FORMAT_OPTIONS OPEN_OPTIONS DISK
	local key=/run/bench/io-key
	[ -e $key ] || (umask 077; mkdir -p /run/bench; head -c 32 /dev/urandom >$key)
	cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $1 --key-file $key $(io_disk $3)
	cryptsetup open --type luks2 --key-file $key $2 $(io_disk $3) io-$3
}
# The mapping on a disk, or the disk itself.
io_device() { local d h; d=$(basename $(io_disk $1)); h=$(ls /sys/block/$d/holders); echo /dev/${h:-$d}; }
# Optional parameters come behind start, length, target, cipher, key, offset of IVs, device, offset and their number. The key is not shown.
io_options() { case $1 in /dev/dm-*) dmsetup table $1 | cut -d' ' -f10- ;; esac; }
`
