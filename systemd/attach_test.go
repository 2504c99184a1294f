package systemd

import (
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/unit"
)

const attachedUnit = "luks-kms-agent@.service"

// The unit for an attached disk runs the same program on the same things, so it is allowed the same.
func TestAttachedUnitIsConfinedAsTheService(t *testing.T) {
	own := []string{"ExecStart", "RemainAfterExit", "TimeoutStartSec"}
	confined := func(file string) (lines []string) {
		options, err := unit.DeserializeOptions(strings.NewReader(read(t, file)))
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range options {
			if o.Section == "Service" && !slices.Contains(own, o.Name) {
				lines = append(lines, o.Name+"="+o.Value)
			}
		}
		slices.Sort(lines)
		return lines
	}
	if service, attached := confined(service), confined(attachedUnit); !slices.Equal(service, attached) || len(service) < 10 {
		t.Errorf("the [Service] sections differ:\n%s\n\n%s", strings.Join(service, "\n"), strings.Join(attached, "\n"))
	}
}

func TestAttachedUnitKeepsTheDesign(t *testing.T) {
	wantSettings(t, attachedUnit, []wanted{
		{"Unit", "ConditionPathExists", "/run/luks-kms-agent/disks.json", "at boot there would be a process for each disk"},
		{"Unit", "DefaultDependencies", "no", "the condition would be looked at later than the disk comes, by when the first run may be over"},
		{"Unit", "StartLimitIntervalSec", "0", "systemd would give up while KMS is away"},
		{"Unit", "Conflicts", "shutdown.target", "a run that waits for KMS would hold up the shutdown"},
		{"Unit", "Before", "shutdown.target", "a run that waits for KMS would hold up the shutdown"},
		{"Service", "Type", "oneshot", "it would count as up before the volume is"},
		{"Service", "Restart", "on-failure", "a disk that comes while KMS is away would stay as it is"},
	})
	for name, why := range map[string]string{
		"Unit/After":              "the condition would be looked at when the first run is over, and each disk get a process at boot",
		"Unit/Requires":           "it would start the service where nobody enabled it",
		"Unit/Wants":              "it would start the service where nobody enabled it",
		"Unit/BindsTo":            "a run that works on other disks too would be killed",
		"Service/RemainAfterExit": "it would stay up when the disk is gone",
		"Install/WantedBy":        "only udev starts it",
	} {
		section, name, _ := strings.Cut(name, "/")
		if got := settings(t, attachedUnit, section, name); len(got) > 0 {
			t.Errorf("%s=%v: %s", name, got, why)
		}
	}
	for distribution, packages := range distributions(t) {
		b := newBoot(t, packages)
		b.write("luks-kms-agent@nvme1n1:22.service", strings.ReplaceAll(read(t, attachedUnit), "/usr/bin/luks-kms-agent run", "/bin/true"))
		for line := range strings.Lines(b.verify("luks-kms-agent@nvme1n1:22.service")) {
			if strings.Contains(line, "luks-kms-agent") {
				t.Errorf("%s: %s", distribution, line)
			}
		}
	}
}

// rulesOf gives a udev event to a file of rules, of the few kinds that ours has, and returns what is set.
func rulesOf(t *testing.T, file string, event map[string]string) (set []string) {
	t.Helper()
	label := ""
	for line := range strings.Lines(read(t, file)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		matches := true
		for _, token := range strings.Split(line, ", ") {
			i := strings.Index(token, "=\"")
			if i < 1 || !strings.HasSuffix(token, "\"") {
				t.Fatalf("%s: cannot read %q", file, token)
			}
			key, value := token[:i], token[i+2:len(token)-1]
			key, op := strings.TrimRight(key, "=!+"), key[len(strings.TrimRight(key, "=!+")):]+"="
			found := slices.ContainsFunc(strings.Split(value, "|"), func(pattern string) bool {
				ok, err := path.Match(pattern, event[key])
				return err == nil && ok
			})
			switch {
			case key == "LABEL":
				if label == value {
					label = ""
				}
			case label != "":
			case op == "==":
				matches = matches && found
			case op == "!=":
				matches = matches && !found
			case !matches:
			case key == "GOTO":
				label = value
			default:
				set = append(set, key+op+strings.NewReplacer("%k", event["KERNEL"], "$env{DISKSEQ}", event["ENV{DISKSEQ}"]).Replace(value))
			}
		}
	}
	if label != "" {
		t.Errorf("%s: no label %s", file, label)
	}
	return set
}

func TestUdevRuleStartsARunForEachDisk(t *testing.T) {
	event := func(kernel string, other map[string]string) map[string]string {
		e := map[string]string{"ACTION": "add", "SUBSYSTEM": "block", "ENV{DEVTYPE}": "disk", "KERNEL": kernel, "ENV{DISKSEQ}": "22"}
		maps.Copy(e, other)
		return e
	}
	for _, c := range []struct {
		event map[string]string
		want  string
	}{
		{event("nvme1n1", nil), "luks-kms-agent@nvme1n1:22.service"},
		{event("xvdf", nil), "luks-kms-agent@xvdf:22.service"},
		{event("sdb", nil), "luks-kms-agent@sdb:22.service"},
		{event("vdb", map[string]string{"ENV{DISKSEQ}": ""}), "luks-kms-agent@vdb.service"},
		{event("nvme1n1", map[string]string{"ACTION": "change"}), ""}, // a namespace that grew; udevadm trigger
		{event("nvme1n1", map[string]string{"ACTION": "remove"}), ""},
		{event("nvme1n1p1", map[string]string{"ENV{DEVTYPE}": "partition"}), ""},
		{event("nvme1", map[string]string{"SUBSYSTEM": "nvme", "ENV{DEVTYPE}": ""}), ""},
		{event("dm-0", nil), ""}, {event("md127", nil), ""}, {event("loop3", nil), ""}, {event("zram0", nil), ""}, {event("ram0", nil), ""},
		{event("sr0", nil), ""}, {event("nbd0", nil), ""}, {event("fd0", nil), ""},
	} {
		want := []string(nil)
		if c.want != "" {
			want = []string{"TAG+=systemd", "ENV{SYSTEMD_WANTS}+=" + c.want}
		}
		if got := rulesOf(t, "90-luks-kms-agent.rules", c.event); !slices.Equal(got, want) {
			t.Errorf("%v: %v, want %v", c.event, got, want)
		}
	}
}
