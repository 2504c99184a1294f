package agent

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/archive/logs"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

// DefaultMetricsPath is where monitoring reads how the last run went and how the
// volumes are after the last command. Anybody may read it.
const DefaultMetricsPath = "/run/luks-kms-agent/metrics.prom"

// DefaultLogMetricsPath is where monitoring reads how the archive of logs is doing: a file of its own, because what sends logs
// runs beside the other commands.
const DefaultLogMetricsPath = "/run/luks-kms-agent/logs.prom"

// metricsLimit is how long the metrics may take: no command fails or hangs for them.
const metricsLimit = 5 * time.Second

// States of a volume in the metrics: those of the status, and how the last run left
// one that is not mounted.
var metricStates = []string{"mounted", "open", "locked", "missing", "refused", "failed"}

// The calls that are counted.
var (
	kmsCalls  = []string{"Decrypt", "DescribeKey", "GenerateDataKey", "ReEncrypt"}
	imdsCalls = []string{"Ephemeral", "Identity"}
)

// metric is one metric of the textfile format of Prometheus; all of ours are gauges,
// because they speak of the last run and start anew with each.
type metric struct {
	name, help string
	labels     []string // their names
	samples    []sample
}

type sample struct {
	labels []string // their values
	value  float64
}

func (m *metric) add(value float64, labels ...string) {
	m.samples = append(m.samples, sample{labels, value})
}

// single is a metric without labels.
func single(name, help string, value float64) metric {
	return metric{name: name, help: help, samples: []sample{{nil, value}}}
}

func unixTime(t time.Time) float64 { return float64(t.UnixMilli()) / 1e3 }

// metrics tells a status and, where looked says that the states in it are those of
// now, the volumes.
func metrics(version string, s Status, keys map[string]keycache.KeyRecord, looked bool) []metric {
	build := metric{name: "build_info", help: "The program that wrote this file; 1.", labels: []string{"version"}}
	build.add(1, version)
	success := 0.0
	if s.LastSuccess != nil {
		success = unixTime(*s.LastSuccess)
	}
	all := []metric{build, single("last_success_timestamp_seconds", "When a run or unlock of this boot last ended without a failure; 0: none did.", success)}
	if s.Result != "none" {
		all = append(all, lastRun(s)...)
	}
	if looked {
		all = append(all, ofVolumes(s, keys)...)
	}
	return all
}

func lastRun(s Status) []metric {
	ok := 0.0
	if s.Result == "ok" {
		ok = 1
	}
	calls := metric{name: "last_run_kms_calls", help: "Attempts of KMS calls that were sent.", labels: []string{"operation"}}
	sent := map[string]int{
		"Decrypt": s.KMS.Decrypt, "DescribeKey": s.KMS.DescribeKey, "GenerateDataKey": s.KMS.GenerateDataKey, "ReEncrypt": s.KMS.ReEncrypt,
	}
	retries := metric{name: "last_run_retries", help: "Waits before another attempt of a call to KMS or IMDS.", labels: []string{"operation"}}
	for _, op := range kmsCalls {
		calls.add(float64(sent[op]), op)
	}
	for _, op := range slices.Concat(kmsCalls, imdsCalls) {
		retries.add(float64(s.KMS.RetriesOf[op]), op)
	}
	return []metric{
		single("last_run_success", "Whether the last run or unlock did all that was planned.", ok),
		single("last_run_exit_code", "Its exit code.", float64(s.ExitCode)),
		single("last_run_timestamp_seconds", "When it ended.", unixTime(s.Finished)),
		single("last_run_duration_seconds", "How long it took.", s.Finished.Sub(s.Started).Seconds()),
		calls,
		single("last_run_imds_reads", "Reads of the instance metadata service, session tokens not included.", float64(s.KMS.IMDS)),
		retries,
	}
}

// ofVolumes has one series for each volume that has a name, and counts all. Two with
// the same labels would make the whole file unreadable, so the second is only counted.
func ofVolumes(s Status, keys map[string]keycache.KeyRecord) []metric {
	labels := []string{"identity", "mount_point"}
	counts := metric{name: "volumes", help: "Volumes that are recorded, named or wanted, by state.", labels: []string{"state"}}
	mounted := metric{name: "volume_mounted", help: "Whether the volume is mounted.", labels: labels}
	took := metric{name: "last_run_volume_duration_seconds", help: "How long the last run took over the volume.", labels: labels}
	created := metric{name: "data_key_created_timestamp_seconds", help: "When the record of the volume's data key was made.", labels: labels}
	escrowed := metric{name: "volume_escrowed", help: "Whether the escrow has confirmed what the volume's header and records are now.", labels: labels}
	count, seen := map[string]int{}, map[string]bool{}
	for _, v := range s.Volumes {
		state := metricState(v)
		if state == "" {
			continue
		}
		count[state]++
		id := v.Identity
		if id == "" {
			id = v.Device
		}
		if id == "" || seen[id+"\x00"+v.MountPoint] {
			continue
		}
		seen[id+"\x00"+v.MountPoint] = true
		is := 0.0
		if state == "mounted" {
			is = 1
		}
		mounted.add(is, id, v.MountPoint)
		if v.Action != "" {
			took.add(v.Seconds, id, v.MountPoint)
		}
		if v.EscrowPending || !v.Escrow.IsZero() {
			safe := 1.0
			if v.EscrowPending {
				safe = 0
			}
			escrowed.add(safe, id, v.MountPoint)
		}
		if key, ok := keys[v.KeyID]; ok {
			created.add(unixTime(key.Created), id, v.MountPoint)
		}
	}
	for _, state := range metricStates {
		counts.add(float64(count[state]), state)
	}
	return []metric{counts, mounted, took, created, escrowed}
}

// metricState is one of metricStates, or "" for a disk that is none of ours.
func metricState(v VolumeStatus) string {
	switch {
	case v.State == "mounted", v.State == "missing":
		return v.State
	case v.Missing:
		return "missing"
	case v.Error != "" && v.Action == string(Refuse):
		return "refused"
	case v.Error != "":
		return "failed"
	}
	return v.State
}

// text is the textfile format: https://prometheus.io/docs/instrumenting/exposition_formats/
func text(all []metric) []byte {
	var b bytes.Buffer
	escape := strings.NewReplacer("\\", "\\\\", "\"", "\\\"", "\n", "\\n")
	for _, m := range all {
		name := "luks_kms_agent_" + m.name
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s gauge\n", name, m.help, name)
		for _, s := range m.samples {
			var labels []string
			for i, value := range s.labels {
				labels = append(labels, m.labels[i]+`="`+escape.Replace(strings.ToValidUTF8(value, "\uFFFD"))+`"`)
			}
			b.WriteString(name)
			if len(labels) > 0 {
				b.WriteString("{" + strings.Join(labels, ",") + "}")
			}
			fmt.Fprintf(&b, " %s\n", strconv.FormatFloat(s.value, 'f', -1, 64))
		}
	}
	return b.Bytes()
}

// tellMetrics writes the metrics after the run that s tells of. Where records or disks cannot be read it leaves the
// volumes out: a state that is not known is not told.
func (n *Node) tellMetrics(ctx context.Context, s Status, justRan bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), metricsLimit)
	defer cancel()
	s, keys, err := n.currentStatus(ctx, s, justRan)
	if err != nil {
		n.log.Warn("the metrics do not tell the volumes", zap.Error(err))
	}
	path := n.beside(DefaultMetricsPath)
	// Monitoring runs as a user of its own. There is no secret in it.
	if err := replaceFile(path, text(metrics(n.program.Version, s, keys, err == nil)), 0o644); err != nil {
		n.log.Warn("cannot write the metrics", zap.Error(err))
	}
}

// logMetrics tell how the archive of logs is doing.
func logMetrics(sum logs.Summary, ok bool) []metric {
	success, last := 0.0, 0.0
	if ok {
		success = 1
	}
	if !sum.Success.IsZero() {
		last = unixTime(sum.Success)
	}
	return []metric{
		single("logs_last_run_success", "Whether the last `logs archive` sent all there was.", success),
		single("logs_last_success_timestamp_seconds", "When it last did; 0: never.", last),
		single("logs_waiting_bytes", "Pieces of logs that wait in the spool, compressed.", float64(sum.Waiting)),
		single("logs_losses", "How many times lines went with their file before they were read, since the spool was made.", float64(sum.Losses)),
	}
}

func (n *Node) tellLogMetrics(sum logs.Summary, ok bool) {
	if err := replaceFile(n.beside(DefaultLogMetricsPath), text(logMetrics(sum, ok)), 0o644); err != nil {
		n.log.Warn("cannot write the metrics", zap.Error(err))
	}
}
