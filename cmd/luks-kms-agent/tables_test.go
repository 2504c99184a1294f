package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// What the commands print of a node with an EBS volume, an instance store disk and a disk that is refused.
var (
	ebs = keycache.VolumeRecord{
		UUID: "aaaaaaaa-0000-4000-8000-000000000001", KeyID: "bbbbbbbb-0000-4000-8000-000000000001", Class: "ebs", Identity: "vol-0123456789abcdef0",
		Size: 100 << 30, Filesystem: "xfs", MountPoint: "/mnt1", Mapping: "luks-aaaaaaaa-0000-4000-8000-000000000001",
	}
	ssd = keycache.VolumeRecord{
		UUID: "aaaaaaaa-0000-4000-8000-000000000002", KeyID: ebs.KeyID, Class: "instance-store", Identity: "AWS1234567890ABCDEF0",
		Size: 500 << 30, Filesystem: "xfs", MountPoint: "/mnt", Mapping: "luks-aaaaaaaa-0000-4000-8000-000000000002",
	}
	foreign = &agent.RefusedError{Refusal: agent.RefusedContent, Device: "/dev/nvme3n1", Reason: "an ext4 filesystem is on it"}
)

func device(path string, v keycache.VolumeRecord) agent.DeviceFacts {
	return agent.DeviceFacts{Device: volumes.Device{Path: path, Class: volumes.Class(v.Class), Identity: v.Identity, Size: v.Size}}
}

func actions() []agent.Action {
	other := keycache.VolumeRecord{Class: "ebs", Identity: "vol-00000000000000009", Size: 64 << 20}
	return []agent.Action{
		{Verb: agent.Format, Device: device("/dev/nvme2n1", ssd), Volume: ssd, Reason: "it is blank"},
		{Verb: agent.Unlock, Device: device("/dev/nvme1n1", ebs), Volume: ebs, Reason: "recorded ready"},
		{Verb: agent.Refuse, Refusal: agent.RefusedContent, Device: device("/dev/nvme3n1", other), Reason: foreign.Reason},
		{Verb: agent.Leave, Device: device("/dev/nvme0n1", keycache.VolumeRecord{Size: 8 << 30}), Reason: "it holds /"},
	}
}

func report() agent.Report {
	start := time.Date(2026, 1, 31, 8, 15, 30, 0, time.UTC)
	r := agent.Report{Started: start, Finished: start.Add(1800 * time.Millisecond), InstanceID: "i-0123456789abcdef0",
		Calls: keycache.Calls{GenerateDataKey: 1, Decrypt: 1, IMDS: 3}}
	for _, a := range actions() {
		r.Outcomes = append(r.Outcomes, agent.Outcome{Action: a})
	}
	r.Outcomes[0].Took, r.Outcomes[1].Took = 1500*time.Millisecond, 400*time.Millisecond
	r.Outcomes[2].Err = foreign
	return r
}

func locked() []agent.Locked {
	return []agent.Locked{{Volume: ssd, Device: "/dev/nvme2n1"}, {Volume: ebs, Device: "/dev/nvme1n1", Err: errors.New("cannot close luks-…: it is in use")}}
}

func rewrapped() []agent.Rewrapped {
	key := keycache.KeyRecord{ID: ebs.KeyID, KeyARN: "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"}
	from := "arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321"
	return []agent.Rewrapped{
		{Key: key, From: from}, {Key: key, Volume: ssd, Device: "/dev/nvme2n1"},
		{Key: key, Volume: ebs, Err: &agent.RefusedError{Refusal: agent.RefusedDevice, Reason: "volume " + ebs.UUID + " is not attached"}},
	}
}

func rotated() []agent.Rotated {
	now := ebs
	now.KeyID = "7c1f0f6e-9d0b-4c4e-8b1a-5f4f0e2b9a11"
	return []agent.Rotated{
		{Volume: now, Device: "/dev/nvme1n1", From: ebs.KeyID}, {Volume: now, Device: "/dev/nvme3n1"}, {Volume: ssd, Device: "/dev/nvme2n1", Left: true},
		{Volume: ssd, Err: &agent.RefusedError{Refusal: agent.RefusedDevice, Reason: "volume " + ssd.UUID + " is not attached"}},
	}
}

func verified() []agent.Verified {
	return []agent.Verified{
		{UUID: ebs.UUID, Identity: ebs.Identity, Device: "/dev/nvme1n1", Result: agent.ResultOK, Findings: []agent.Finding{{Check: "mac", Result: agent.ResultOK}}},
		{UUID: ssd.UUID, Identity: ssd.Identity, Device: "/dev/nvme2n1", Result: agent.ResultFailed, Findings: []agent.Finding{
			{Check: "mac", Result: agent.ResultFailed, Detail: "the token's MAC does not hold"},
			{Check: "backup", Result: agent.ResultWarning, Detail: "there is no header backup"},
		}},
	}
}

func sealed() agent.Seal {
	return agent.Seal{Acts: []agent.SealAct{
		{Verb: agent.SealQuarantine, Path: "/var/lib/luks-kms-agent/volumes/" + ssd.UUID + ".json", Why: "its volume is attached: /dev/nvme2n1"},
		{Verb: agent.SealRemove, Path: "/var/lib/luks-kms-agent/volumes/" + ebs.UUID + ".json", Why: "no volume of it is attached"},
		{Verb: agent.SealKeep, Path: "/root/vol.header.tar", Why: "header backup of volume " + ebs.UUID + ": bring it to another disk"},
		{Verb: agent.SealClear, Path: "/var/log/luks-kms-agent/audit.jsonl", Why: "audit log"},
	}, SavedTo: "/run/records.tar", InMemory: true}
}

func restored() agent.Restore {
	return agent.Restore{
		Manifest: keycache.Manifest{Time: noon, Identity: ebs.Identity, UUID: ebs.UUID, KeyARN: "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"},
		Device:   "/dev/nvme1n1", Found: "no LUKS header", Saved: "/root/vol.header.tar.before-20260131T120000.000Z", Records: []string{"key", "volume"},
	}
}

func TestTables(t *testing.T) {
	for name, print := range map[string]func(*bytes.Buffer) error{
		"run":     func(b *bytes.Buffer) error { printReport(b, report()); return nil },
		"lock":    func(b *bytes.Buffer) error { return printLocked(b, locked()) },
		"rewrap":  func(b *bytes.Buffer) error { return printRewrapped(b, rewrapped()) },
		"rotate":  func(b *bytes.Buffer) error { return printRotated(b, rotated()) },
		"verify":  func(b *bytes.Buffer) error { printVerified(b, verified()); return nil },
		"restore": func(b *bytes.Buffer) error { printRestore(b, restored()); return nil },
		"seal-image": func(b *bytes.Buffer) error {
			s := sealed()
			printSeal(b, s)
			s.SavedTo, s.Refused = "", []error{foreign}
			printSeal(b, s)
			printSeal(b, agent.Seal{})
			return nil
		},
		"wipe": func(b *bytes.Buffer) error {
			printWipe(b, agent.Wipe{Volume: ebs, Device: "/dev/nvme1n1", Found: "LUKS volume " + ebs.UUID, Backup: &keycache.BackupNote{Path: "/root/vol.header.tar", Time: noon}})
			printWipe(b, agent.Wipe{Volume: ssd, Device: "/dev/nvme2n1", Found: "no LUKS header"})
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			if err := print(&b); err != nil {
				t.Fatal(err)
			}
			golden(t, "tables/"+name+".txt", b.String())
		})
	}
}

// TestOutputDocument: docs/output.md shows what is printed, has its version, and explains each field.
func TestOutputDocument(t *testing.T) {
	text, err := os.ReadFile("../../docs/output.md")
	if err != nil {
		t.Fatal(err)
	}
	for name, into := range map[string]any{
		"plan": &planJSON{}, "preflight": &preflightJSON{}, "lock": &lockJSON{}, "rewrap": &rewrapJSON{}, "rotate": &rotateJSON{}, "stripe": &stripeJSON{}, "seal-image": &sealJSON{}, "verify": &verification{}, "recovery-key list": &recoveryList{}, "inspect": &inspection{}, "version": &versionJSON{},
	} {
		_, section, ok := strings.Cut(string(text), "\n## "+name)
		section, _, _ = strings.Cut(section, "\n## ")
		example := regexp.MustCompile("(?ms)^```json\n(.*?)^```$").FindStringSubmatch(section)
		if !ok || example == nil {
			t.Errorf("there is no section with an example of %s", name)
			continue
		}
		dec := json.NewDecoder(strings.NewReader(example[1]))
		dec.DisallowUnknownFields()
		if err := dec.Decode(into); err != nil {
			t.Errorf("the example of %s: %v", name, err)
		}
		var again bytes.Buffer
		if err := printJSON(&again, into); err != nil || again.String() != example[1] {
			t.Errorf("the example of %s would be printed as\n%s", name, &again)
		}
		for _, field := range fields(reflect.TypeOf(into).Elem()) {
			if !strings.Contains(section, "`"+field+"`") {
				t.Errorf("field %s of %s is not explained", field, name)
			}
		}
	}
}

// fields are the JSON names of a struct and of what is in it.
func fields(t reflect.Type) []string {
	for t.Kind() == reflect.Slice || t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	var names []string
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		if name != "-" {
			names = append(append(names, name), fields(t.Field(i).Type)...)
		}
	}
	return names
}

// TestReportsAreDocumented: every command with --json has its section.
func TestReportsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/output.md")
	if err != nil {
		t.Fatal(err)
	}
	headings := regexp.MustCompile(`(?m)^## (.*)$`).FindAllStringSubmatch(string(text), -1)
	for _, cmd := range commands(newTree()) {
		if cmd.Flags().Lookup("json") == nil {
			continue
		}
		name := strings.TrimPrefix(cmd.CommandPath(), "luks-kms-agent ")
		if !slices.ContainsFunc(headings, func(h []string) bool { return slices.Contains(strings.Split(h[1], ", "), name) }) {
			t.Errorf("docs/output.md has no section for %s --json", name)
		}
	}
}
