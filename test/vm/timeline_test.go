//go:build vm

package vm_test

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestTimelineAndMetrics: at first boot and at a reboot the node tells where its time went, and a monitor without rights what became of
// the volumes, also when one is locked by hand.
func TestTimelineAndMetrics(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "filesystem: ext4\n", ssd1, ebs1)
	identities := []string{"AWS11111111111111111", "vol-0aaaaaaaaaaaaaaa1"}
	n.Resume()
	n.AwaitVolumes()
	wantTimeline(t, n, "run", identities, agent.SpanKMS, agent.SpanFormat, agent.SpanMkfs, agent.SpanMount, agent.SpanWipe)

	n.Reboot()
	n.AwaitVolumes()
	wantTimeline(t, n, "run", identities, agent.SpanKMS, agent.SpanCredentials, agent.SpanInspect, agent.SpanUnseal, agent.SpanMap, agent.SpanMount)
	m := scrape(t, n)
	for series, want := range map[string]float64{
		"last_run_success": 1, "last_run_exit_code": 0,
		"volumes mounted": 2, "volumes locked": 0, "volumes failed": 0,
		"volume_mounted AWS11111111111111111 /mnt": 1, "volume_mounted vol-0aaaaaaaaaaaaaaa1 /mnt1": 1,
		"last_run_kms_calls Decrypt": 1, "last_run_kms_calls GenerateDataKey": 0, "last_run_retries Decrypt": 0,
	} {
		if got, ok := m[series]; !ok || got != want {
			t.Errorf("after the reboot %s is %g (%t), want %g", series, got, ok, want)
		}
	}
	if now := m["last_success_timestamp_seconds"]; now < m["data_key_created_timestamp_seconds vol-0aaaaaaaaaaaaaaa1 /mnt1"] || now == 0 {
		t.Errorf("the last success was at %f", now)
	}
	if r := n.Try(asNobody + "cat /run/luks-kms-agent/status.json /run/luks-kms-agent/timeline.json"); r.Code == 0 {
		t.Errorf("anybody reads the status: %s", r)
	}

	n.Sh("luks-kms-agent lock /mnt1")
	m = scrape(t, n)
	if m["volumes locked"] != 1 || m["volumes mounted"] != 1 || m["volume_mounted vol-0aaaaaaaaaaaaaaa1 /mnt1"] != 0 || m["last_run_success"] != 1 {
		t.Errorf("after lock: %v", m)
	}
	succeeded := m["last_success_timestamp_seconds"]
	if r := n.Agent("unlock /mnt7"); r.Code != 2 {
		t.Errorf("unlock of nothing: %s", r)
	}
	if m = scrape(t, n); m["last_run_success"] != 0 || m["last_run_exit_code"] != 2 || m["last_success_timestamp_seconds"] != succeeded {
		t.Errorf("after an unlock that failed: %v", m)
	}
	n.Sh("luks-kms-agent unlock /mnt1")
	wantTimeline(t, n, "unlock", identities[1:], agent.SpanUnseal, agent.SpanMap, agent.SpanMount)
	if m = scrape(t, n); m["volumes mounted"] != 2 || m["last_run_success"] != 1 || m["last_success_timestamp_seconds"] <= succeeded {
		t.Errorf("after unlock: %v", m)
	}
}

// wantTimeline prints and draws the timeline of the last run, and wants spans of these kinds, and the volumes, in it.
func wantTimeline(t *testing.T, n *harness.Node, command string, identities []string, kinds ...agent.SpanKind) {
	t.Helper()
	var line agent.Timeline
	if err := json.Unmarshal([]byte(n.Sh("luks-kms-agent timeline --json")), &line); err != nil || line.Command != command || line.InstanceID != harness.InstanceID {
		t.Fatalf("timeline of %q on %q: %v", line.Command, line.InstanceID, err)
	}
	seen := map[agent.SpanKind]bool{}
	for _, s := range line.Spans {
		seen[s.Kind] = true
	}
	for _, kind := range kinds {
		if !seen[kind] {
			t.Errorf("%s: no span of kind %s in %v", command, kind, line.Spans)
		}
	}
	shown, drawn := n.Sh("COLUMNS=100 luks-kms-agent timeline"), n.Sh("luks-kms-agent timeline --svg -")
	t.Logf("\n%s", shown)
	for _, id := range identities {
		if !strings.Contains(shown, id) || !strings.Contains(drawn, id) {
			t.Errorf("%s: %s is not in\n%s\n%s", command, id, shown, drawn)
		}
	}
	for dec := xml.NewDecoder(strings.NewReader(drawn)); ; {
		if _, err := dec.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the drawing is no XML: %v", err)
		}
	}
}

const asNobody = "setpriv --reuid=65534 --regid=65534 --clear-groups "

// scrape reads the metrics as node_exporter does, by name and values of the labels.
func scrape(t *testing.T, n *harness.Node) map[string]float64 {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(n.Sh(asNobody + "cat /run/luks-kms-agent/metrics.prom")))
	if err != nil {
		t.Fatalf("the metrics cannot be read: %v", err)
	}
	values := map[string]float64{}
	for name, family := range families {
		if family.GetType() != dto.MetricType_GAUGE {
			t.Errorf("%s is a %s", name, family.GetType())
		}
		for _, m := range family.GetMetric() {
			series := strings.TrimPrefix(name, "luks_kms_agent_")
			for _, l := range m.GetLabel() {
				series += fmt.Sprint(" ", l.GetValue())
			}
			values[series] = m.GetGauge().GetValue()
		}
	}
	return values
}
