package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

var noon = time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)

// volume is the i-th of a node whose volumes are all mounted.
func volume(i int) agent.VolumeStatus {
	no, point := false, "/mnt"
	if i > 0 {
		point = fmt.Sprintf("/mnt%d", i)
	}
	other := 0
	v := agent.VolumeStatus{
		Device: fmt.Sprintf("/dev/nvme%dn1", i+1), Class: "ebs", Identity: fmt.Sprintf("vol-0123456789abcde%02x", i), Size: 100 << 30,
		UUID: fmt.Sprintf("5f1c2a%02x-7d34-4b8e-8c55-2e9f0a6b1c3d", i), MountPoint: point, Filesystem: "xfs", Action: "unlock", Reason: "recorded ready",
		State: "mounted", FilesystemSize: 100<<30 - 16<<20, FilesystemUsed: int64(i+1) << 30, LastUnlock: noon.Add(-3 * time.Hour),
		KeyARN:     "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		KeyCreated: noon.AddDate(0, 0, -12), RecoveryKey: &no, OtherKeySlots: &other,
	}
	v.Mapping = "luks-" + v.UUID
	return v
}

func node(n int) agent.Status {
	well := true
	s := agent.Status{Started: noon.Add(-3*time.Hour - 1800*time.Millisecond), Finished: noon.Add(-3 * time.Hour), Result: "ok",
		KMS: agent.CallsStatus{Decrypt: 1, IMDS: 3}, Well: &well}
	for i := range n {
		s.Volumes = append(s.Volumes, volume(i))
	}
	return s
}

// trouble is a node on which all goes wrong that there is a place for on the screen.
func trouble() agent.Status {
	s := node(6)
	*s.Well, s.Result, s.Quarantined = false, "failed", 2
	s.KMS = agent.CallsStatus{Decrypt: 2, Retries: 4, GenerateDataKey: 1}
	s.Problems = []string{"cannot read key record /var/lib/luks-kms-agent/keys/0b9e6d3c-5b1f-4d0a-9a8e-3f6f2c1d7e55.json: it is truncated"}
	yes, two := true, 2
	v := s.Volumes
	v[0].Mapping, v[1].Class = "data", "explicit"
	v[0].RecoveryKey, v[0].OtherKeySlots, v[0].SecondaryDamaged, v[0].HeaderBackup = &yes, &two, true, noon.AddDate(0, 0, -2)
	v[0].Problems = []string{"the secondary LUKS header is damaged"}
	v[1].State, v[1].FilesystemSize, v[1].RecoveryKey, v[1].OtherKeySlots, v[1].LastUnlock = "locked", 0, nil, nil, time.Time{}
	v[1].Error = "cannot trust the LUKS header of /dev/nvme2n1: segment 0: cipher \"cipher_null-ecb\"; the two header copies differ"
	v[1].Action, v[1].Problems = "unlock", []string{v[1].Error}
	v[2].State, v[2].Device, v[2].FilesystemSize, v[2].RecoveryKey, v[2].OtherKeySlots = "missing", "", 0, nil, nil
	v[2].Problems = []string{"volume " + v[2].UUID + " (ebs " + v[2].Identity + ") is recorded ready, but no disk shows it"}
	v[3].State, v[3].FilesystemSize = "locked", 0
	v[4].Class, v[4].Identity, v[4].RewrapPending = "instance-store", "AWS22222222222222222", true
	v[4].Problems = []string{"its data key is under " + v[4].KeyARN + ", not under the configured key: rewrap is pending"}
	v[5] = agent.VolumeStatus{Device: "/dev/nvme6n1", Class: "ebs", Identity: "vol-0bad\x1b[2J", Size: 8 << 30, Action: "refuse",
		Error: "cannot use /dev/nvme6n1: it holds an ext4 filesystem", Problems: []string{"cannot use /dev/nvme6n1: it holds an ext4 filesystem"}}
	s.Volumes = append(v, agent.VolumeStatus{Device: "/dev/nvme7n1", Class: "ebs", Action: "leave", Reason: "excluded by the configuration"})
	return s
}

// longPlan is a plan with what reads worst.
func longPlan() agent.Plan {
	disk := func(i int, class volumes.Class, identity string) agent.DeviceFacts {
		d := agent.DeviceFacts{Device: volumes.Device{Path: fmt.Sprintf("/dev/nvme%dn1", i), Class: class, Identity: identity, Size: 1900e9}}
		d.Header, d.Content = &luks.Inspection{Kind: luks.KindNone}, &volumes.Content{Blank: true}
		return d
	}
	root := disk(0, "", "")
	root.Uses = []volumes.Use{{Evidence: "/ is on /dev/nvme0n1p1"}}
	foreign := disk(2, volumes.ClassEBS, "vol-0bbbbbbbbbbbbbbb2")
	foreign.Content = &volumes.Content{Type: "ext4"}
	return agent.Plan{QuarantineKeys: []string{"x"}, Actions: []agent.Action{
		{Verb: agent.Format, Device: disk(1, volumes.ClassInstanceStore, "AWS11111111111111111"), Volume: keycache.VolumeRecord{MountPoint: "/mnt"},
			Reason: "blank: no signature, and zeros where they were looked for; it takes the place of 5f1c2a9e-7d34-4b8e-8c55-2e9f0a6b1c3d, which went with a stop of the instance"},
		{Verb: agent.Refuse, Device: foreign, Reason: "no record, and it holds an ext4 filesystem"},
		{Verb: agent.Refuse, Missing: true, Reason: "/dev/sdf is named in the configuration, but there is no such device"},
		{Verb: agent.Leave, Device: root, Reason: "neither an instance-store nor an EBS volume, and not named in the configuration"},
	}}
}

// TestScreens holds what a person sees at 80 and 120 columns against testdata/screens; make update-golden writes it anew.
func TestScreens(t *testing.T) {
	nothing := node(0)
	nothing.Result, nothing.Well = "none", new(bool)
	for name, show := range map[string]func(screen) string{
		"status-fresh":   func(s screen) string { return s.status(nothing, noon) },
		"status-1":       func(s screen) string { return s.status(node(1), noon) },
		"status-3":       func(s screen) string { return s.status(node(3), noon) },
		"status-24":      func(s screen) string { return s.status(node(24), noon) },
		"status-trouble": func(s screen) string { return s.status(trouble(), noon) },
		"plan":           func(s screen) string { return s.plan(longPlan()) },
	} {
		for _, width := range []int{80, 120} {
			got := show(screen{width: width, terminal: true})
			for line := range strings.Lines(got) {
				if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > width {
					t.Errorf("%s at %d has a line of %d: %s", name, width, n, line)
				}
			}
			if strings.ContainsRune(got, 0x1b) {
				t.Errorf("%s at %d has an escape that nobody asked for", name, width)
			}
			file := filepath.Join("testdata", "screens", fmt.Sprintf("%s-%d.txt", name, width))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil || !bytes.Equal(want, []byte(got)) {
				t.Errorf("%s is not what is shown (%v):\n%s", file, err, got)
			}
			// Colour changes nothing but colour.
			plain := show(screen{width: width, terminal: true, color: true})
			for _, code := range []string{"0", string(bold), string(dim), string(red), string(green), string(yellow)} {
				plain = strings.ReplaceAll(plain, "\x1b["+code+"m", "")
			}
			if plain != got {
				t.Errorf("%s at %d is another text in colour:\n%s", name, width, plain)
			}
		}
		// A program that reads lines finds each reason whole.
		if text := show(screen{width: 80}); strings.Contains(name, "trouble") && !strings.Contains(text, trouble().Volumes[1].Error+"\n") {
			t.Errorf("%s: a reason is broken where no terminal is:\n%s", name, text)
		}
	}
}

func TestScreenOfNoTerminal(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, w := range []io.Writer{f, &bytes.Buffer{}} {
		if s := screenOf(w); s != (screen{width: 80}) {
			t.Errorf("%T: %+v", w, s)
		}
	}
	if newProgress(&bytes.Buffer{}) != nil {
		t.Error("progress where nobody watches")
	}
}

// TestColour asks a real terminal.
func TestColour(t *testing.T) {
	terminal := openTerminal(t, 100)
	for _, tc := range []struct {
		term, no string
		want     bool
	}{{"xterm", "", true}, {"dumb", "", false}, {"", "", false}, {"xterm", "1", false}} {
		t.Setenv("TERM", tc.term)
		t.Setenv("NO_COLOR", tc.no)
		if s := screenOf(terminal); s.color != tc.want || s.width != 100 || !s.terminal {
			t.Errorf("TERM=%q NO_COLOR=%q: %+v", tc.term, tc.no, s)
		}
	}
}

func TestRedraw(t *testing.T) {
	s := screen{width: 80, height: 5, terminal: true}
	if got := s.redraw("1\n2\n3\n4\n5\n6\n"); got != "\x1b[H\x1b[2J1\n2\n3\n… 3 more lines\n" {
		t.Errorf("too long: %q", got)
	}
	if got := s.redraw("1\n2\n3\n4\n"); got != "\x1b[H\x1b[2J1\n2\n3\n4\n" {
		t.Errorf("just fits: %q", got)
	}
	if got := (screen{width: 80}).redraw("1\n"); got != "1\n\n" {
		t.Errorf("on a pipe: %q", got)
	}
}

func TestWatch(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out, errs strings.Builder
	looks := 0
	err := watch(ctx, &out, &errs, time.Millisecond, func() (string, error) {
		looks++
		switch looks {
		case 2:
			return "", errors.New("a disk went")
		case 4:
			cancel()
		}
		return fmt.Sprintf("look %d\n", looks), nil
	})
	if err != nil || out.String() != "look 1\nlook 3\n" || errs.String() != "luks-kms-agent: a disk went\n" {
		t.Errorf("%v, %q, %q", err, &out, &errs)
	}
	if err := watch(t.Context(), &out, &errs, time.Millisecond, func() (string, error) { return "", errors.ErrUnsupported }); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("the first look failed: %v", err)
	}
}
