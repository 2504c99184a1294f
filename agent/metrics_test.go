package agent

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v3"

	"github.com/luks-kms-agent/luks-kms-agent/archive/logs"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// parse reads metrics with Prometheus's own parser.
func parse(t testing.TB, text []byte) map[string]*dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return families
}

// metrics are those that the machine's last command left; values by name and the values of the labels.
func (m *machine) metrics() map[string]float64 {
	m.t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, "run", "metrics.prom"))
	if err != nil {
		m.t.Fatal(err)
	}
	values := map[string]float64{}
	for name, family := range parse(m.t, text) {
		for _, metric := range family.GetMetric() {
			series := strings.TrimPrefix(name, "luks_kms_agent_")
			for _, l := range metric.GetLabel() {
				series += " " + l.GetValue()
			}
			values[series] = metric.GetGauge().GetValue()
		}
	}
	return values
}

func (m *machine) wantMetrics(when string, want map[string]float64) {
	m.t.Helper()
	got := m.metrics()
	for series, value := range want {
		if v, ok := got[series]; !ok || v != value {
			m.t.Errorf("%s: %s is %g (%t), want %g", when, series, v, ok, value)
		}
	}
}

// TestMetrics: what a monitor sees follows a node through a boot, a lock, a loss and a run that fails.
func TestMetrics(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS1")
	m.disk(volumes.ClassEBS, "vol-1")
	n := m.node()
	if _, err := n.Lock(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if got := m.metrics(); len(got) != 2+len(metricStates) || got["last_success_timestamp_seconds"] != 0 {
		t.Errorf("before any run: %v", got)
	}

	m.runOK()
	m.wantMetrics("first boot", map[string]float64{
		"build_info test": 1, "volumes mounted": 2, "volumes locked": 0, "volume_mounted AWS1 /mnt": 1, "volume_mounted vol-1 /mnt1": 1,
		"last_run_success": 1, "last_run_exit_code": 0, "last_run_kms_calls GenerateDataKey": 1, "last_run_imds_reads": 3, "last_run_retries Identity": 0,
	})
	first := m.metrics()
	n = m.node()
	n.tellMetrics(t.Context(), n.lastRun(), false)
	if looked := m.metrics(); !maps.Equal(looked, first) {
		t.Errorf("without a look at the disks the run tells\n%v, with one\n%v", first, looked)
	}
	now := float64(time.Now().Unix())
	for _, series := range []string{"last_run_timestamp_seconds", "last_success_timestamp_seconds", "data_key_created_timestamp_seconds vol-1 /mnt1"} {
		if at := first[series]; at > now+1 || at < now-60 {
			t.Errorf("%s is %f at %f", series, at, now)
		}
	}

	if _, err := m.node().Lock(t.Context(), []string{"vol-1"}); err != nil {
		t.Fatal(err)
	}
	m.wantMetrics("lock", map[string]float64{
		"volumes mounted": 1, "volumes locked": 1, "volume_mounted vol-1 /mnt1": 0, "last_run_success": 1,
		"last_success_timestamp_seconds": first["last_success_timestamp_seconds"],
	})

	if _, err := m.node().Lock(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if r, err := m.node().Unlock(t.Context(), []string{"vol-1"}); err != nil || len(r.Failures()) > 0 {
		t.Fatalf("%v, %v", r.Failures(), err)
	}
	m.wantMetrics("unlock of one", map[string]float64{"volumes mounted": 1, "volumes locked": 1, "volume_mounted AWS1 /mnt": 0, "last_run_success": 1})
	succeeded := m.metrics()["last_success_timestamp_seconds"]

	// One disk is gone, another is none of ours, and the last one does not mount.
	m.reboot()
	foreign := m.disk(volumes.ClassEBS, "vol-2")
	m.write(foreign, 0, bytes.Repeat([]byte("foreign "), 1024))
	m.devices = m.devices[1:]
	m.cfg.Volumes = []VolumeConfig{{Name: "vol-2"}}
	n = m.node()
	n.program = Program{Version: "v9", ExitCode: func(errs []error) int { return len(errs) }}
	m.fail = func(step, what string) error {
		if step == "mount" {
			return os.ErrPermission
		}
		return nil
	}
	if r, err := n.Run(t.Context()); err != nil || len(r.Failures()) != 3 {
		t.Fatalf("%v, %v", r.Failures(), err)
	}
	m.wantMetrics("a bad boot", map[string]float64{
		"build_info v9": 1, "volumes mounted": 0, "volumes missing": 1, "volumes failed": 1, "volume_mounted vol-1 /mnt1": 0,
		"last_run_success": 0, "last_run_exit_code": 3, "last_success_timestamp_seconds": succeeded,
	})

	info, err := os.Stat(filepath.Join(m.dir, "run", "metrics.prom"))
	if err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("monitoring may not read it: %v, %v", info.Mode(), err)
	}
	for _, private := range []string{"status.json", "timeline.json"} {
		if info, err := os.Stat(filepath.Join(m.dir, "run", private)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", private, info.Mode(), err)
		}
	}
}

// TestMetricsOfHostileNames: what disks call themselves cannot make the file unreadable, nor a series twice.
func TestMetricsOfHostileNames(t *testing.T) {
	name := "a\"} 1\nluks_kms_agent_volumes{state=\"mounted\"} 9\\\xff"
	s := Status{Result: "ok", Volumes: []VolumeStatus{
		{Identity: name, MountPoint: "/mnt", State: "mounted"}, {Identity: name, MountPoint: "/mnt", State: "locked"}, {State: "missing"},
	}}
	families := parse(t, text(metrics("v\n1", s, nil, true)))
	if m := families["luks_kms_agent_volume_mounted"].GetMetric(); len(m) != 1 || m[0].GetLabel()[0].GetValue() != strings.ToValidUTF8(name, "\uFFFD") {
		t.Errorf("%v", m)
	}
	total := 0.0
	for _, m := range families["luks_kms_agent_volumes"].GetMetric() {
		total += m.GetGauge().GetValue()
	}
	if total != 3 {
		t.Errorf("%g volumes are counted, want 3", total)
	}
}

func TestMetricStates(t *testing.T) {
	for _, c := range []struct {
		v    VolumeStatus
		want string
	}{
		{VolumeStatus{State: "mounted", Error: "x"}, "mounted"}, // mended by hand since
		{VolumeStatus{State: "open"}, "open"},
		{VolumeStatus{State: "open", Action: "unlock", Error: "x"}, "failed"},
		{VolumeStatus{State: "locked"}, "locked"},
		{VolumeStatus{State: "locked", Action: "refuse", Error: "x"}, "refused"},
		{VolumeStatus{State: "missing", Action: "refuse", Error: "x"}, "missing"},
		{VolumeStatus{Action: "refuse", Error: "x", Missing: true}, "missing"},
		{VolumeStatus{Action: "refuse", Error: "x"}, "refused"},
		{VolumeStatus{Action: "format", Error: "x"}, "failed"},
		{VolumeStatus{Action: "leave"}, ""},
	} {
		if got := metricState(c.v); got != c.want {
			t.Errorf("%+v is %q, want %q", c.v, got, c.want)
		}
	}
}

// TestMetricsDocument holds the table in docs/metrics.md, and the names in the alert rules, against what is written.
func TestMetricsDocument(t *testing.T) {
	created := map[string]keycache.KeyRecord{"k": {Created: time.Now()}}
	all := slices.Concat(
		metrics("v1", Status{Result: "ok", Volumes: []VolumeStatus{{Identity: "vol-1", KeyID: "k", State: "mounted", Action: "unlock", EscrowPending: true}}}, created, true),
		logMetrics(logs.Summary{}, true))
	want := map[string][]string{}
	for _, m := range all {
		want["luks_kms_agent_"+m.name] = m.labels
		if len(m.samples) == 0 {
			t.Errorf("%s has no sample", m.name)
		}
	}
	doc, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| `(luks_kms_agent_[a-z_]+)` \\| (.*?) \\|").FindAllSubmatch(doc, -1)
	for _, row := range rows {
		name, labels := string(row[1]), []string(nil)
		for _, l := range regexp.MustCompile("`([a-z_]+)`").FindAllSubmatch(row[2], -1) {
			labels = append(labels, string(l[1]))
		}
		if has, ok := want[name]; !ok || !slices.Equal(has, labels) {
			t.Errorf("docs/metrics.md: %s has labels %v; written (%t): %v", name, labels, ok, has)
		}
		delete(want, name)
	}
	for name := range want {
		t.Errorf("docs/metrics.md does not have %s", name)
	}
	for _, state := range metricStates {
		if !bytes.Contains(doc, []byte("`"+state+"`")) {
			t.Errorf("docs/metrics.md does not explain the state %s", state)
		}
	}

	var alerts struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	data, err := os.ReadFile("../packaging/prometheus/alerts.yaml")
	if err == nil {
		err = yaml.Unmarshal(data, &alerts)
	}
	if err != nil || len(alerts.Groups) != 1 || len(alerts.Groups[0].Rules) < 6 {
		t.Fatalf("the alert rules: %v", err)
	}
	named := regexp.MustCompile(`luks_kms_agent_[a-z_]+`)
	for _, rule := range alerts.Groups[0].Rules {
		names := named.FindAllString(rule.Expr, -1)
		if len(names) == 0 {
			t.Errorf("%s asks for nothing of ours", rule.Alert)
		}
		for _, name := range names {
			if !slices.ContainsFunc(all, func(m metric) bool { return "luks_kms_agent_"+m.name == name }) {
				t.Errorf("%s: there is no metric %s", rule.Alert, name)
			}
		}
	}
}
