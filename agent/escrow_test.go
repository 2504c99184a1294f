package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

const escrowBucket = "escrow"

var escrowModes = []archive.Mode{archive.SSE, archive.CSE}

// withEscrow is a machine with an escrow under a key of its own.
func withEscrow(t testing.TB, mode archive.Mode) (*machine, *s3test.S3) {
	t.Helper()
	m := newMachine(t)
	m.kms.Trust(m.imds) // also what S3 asks, it asks as the node's role
	m.kms.AllowContext()
	s := s3test.New(t, s3test.Options{KMS: m.kms.URL()})
	s.NewBucket(escrowBucket, s3test.Bucket{})
	m.cfg.Escrow.Bucket, m.cfg.Escrow.Mode, m.cfg.Escrow.Endpoint = escrowBucket, string(mode), s.URL()
	m.cfg.Escrow.KMSKey = m.kms.NewKey(kmstest.KeySpec{})
	return m, s
}

func (m *machine) escrow(names ...string) ([]Escrowed, error) {
	m.t.Helper()
	done, err := m.node().Escrow(m.t.Context(), names)
	for _, e := range done {
		err = errors.Join(err, e.Err)
	}
	return done, err
}

// sent are the identities of the volumes that were sent just now.
func sent(done []Escrowed) (identities []string) {
	for _, e := range done {
		if e.Sent && e.Err == nil {
			identities = append(identities, e.Volume.Identity)
		}
	}
	slices.Sort(identities)
	return identities
}

func TestEscrow(t *testing.T) {
	for _, mode := range escrowModes {
		t.Run(string(mode), func(t *testing.T) {
			m, s := withEscrow(t, mode)
			m.disk(volumes.ClassInstanceStore, "ssd1")
			m.disk(volumes.ClassEBS, "vol-1")
			m.runOK()
			sums := m.sums()
			m.news()
			wantPending := func(when string, want map[string]bool) {
				t.Helper()
				for identity, pending := range want {
					v := m.state(identity)
					if v.EscrowPending != pending || v.Escrow.IsZero() != (when == "before") {
						t.Errorf("%s: status of %s: %+v", when, identity, v)
					}
				}
			}
			wantPending("before", map[string]bool{"ssd1": true, "vol-1": true})
			done, err := m.escrow()
			if err != nil || !slices.Equal(sent(done), []string{"ssd1", "vol-1"}) {
				t.Fatalf("%+v, %v", done, err)
			}
			m.untouched(sums)
			wantPending("sent", map[string]bool{"ssd1": false, "vol-1": false})
			m.wantMetrics("sent", map[string]float64{"volume_escrowed vol-1 /mnt1": 1})
			escrowed, _ := m.news()
			if n := len(slices.DeleteFunc(escrowed, func(e string) bool { return e != "header-escrowed ok" })); n != 2 {
				t.Errorf("%d events of two escrows", n)
			}
			// What lies there is the header, and opens with the records in it.
			n := m.node()
			for _, e := range done {
				name := strings.TrimPrefix(e.URL, "s3://"+escrowBucket+"/")
				if !strings.HasPrefix(name, "luks-kms-agent/"+e.Volume.UUID+"/") {
					t.Errorf("the object is %s", name)
				}
				b, err := n.GetEscrow(t.Context(), name)
				if err != nil || b.Volume.UUID != e.Volume.UUID || b.Key.ID != e.Volume.KeyID {
					t.Errorf("%v: %+v", err, b)
				}
				if bytes.Contains(s.Stored(escrowBucket, name), []byte("LUKS\xba\xbe")) {
					t.Error("a header lies in the bucket in the clear")
				}
			}
			verified, err := n.VerifyEscrow(t.Context(), nil)
			for _, v := range verified {
				if v.Err != nil || !v.Current {
					t.Errorf("%+v", v)
				}
			}
			if err != nil || len(verified) != 2 {
				t.Errorf("%d verified, %v", len(verified), err)
			}

			// What is confirmed is not sent again, and asks nobody.
			asked := len(s.Calls()) + len(m.kms.Calls())
			if done, err = m.escrow(); err != nil || len(done) != 2 || sent(done) != nil {
				t.Errorf("again: %+v, %v", done, err)
			}
			if now := len(s.Calls()) + len(m.kms.Calls()); now != asked {
				t.Errorf("%d calls of S3 and KMS for what is safe", now-asked)
			}
			// After a change of the keys it is.
			if _, err := m.rotate("vol-1"); err != nil {
				t.Fatal(err)
			}
			verified, err = m.node().VerifyEscrow(t.Context(), []string{"vol-1"})
			if err != nil || len(verified) != 1 || verified[0].Err != nil || verified[0].Current {
				t.Errorf("after rotate: %+v, %v", verified, err)
			}
			wantPending("after rotate", map[string]bool{"ssd1": false, "vol-1": true})
			if done, err = m.escrow(); err != nil || !slices.Equal(sent(done), []string{"vol-1"}) {
				t.Errorf("after rotate: %+v, %v", done, err)
			}
			if names := s.Keys(escrowBucket); len(names) != 3 {
				t.Errorf("%v: what was there before has to stay", names)
			}
			// Elsewhere, and under another key, it is not there yet.
			m.cfg.Escrow.KMSKey = m.kms.NewKey(kmstest.KeySpec{})
			if done, err = m.escrow("vol-1"); err != nil || !slices.Equal(sent(done), []string{"vol-1"}) {
				t.Errorf("under another key: %+v, %v", done, err)
			}
			// The calls for the disks have no context, those for the escrow that of its mode.
			for _, c := range m.kms.Calls() {
				if escrow := c.KeyID != m.kms.ARN(); escrow != (len(c.Context) == 1) {
					t.Errorf("%s under %s with the context %v", c.Op, c.KeyID, c.Context)
				}
			}
		})
	}
}

// TestEscrowIsSentAfterAChange: each command that changes what is in a copy has it sent when it ends, and no other does.
func TestEscrowIsSentAfterAChange(t *testing.T) {
	m, _ := withEscrow(t, archive.SSE)
	d := m.disk(volumes.ClassEBS, "vol-1")
	var paper, file string
	for _, c := range []struct {
		what  string
		do    func() error
		sends int
	}{
		{"the first run", func() error { m.runOK(); return nil }, 1},
		{"escrow put", func() error { _, err := m.escrow(); return err }, 0},
		{"a reboot", func() error { m.reboot(); m.runOK(); return nil }, 0},
		{"rotate", func() error { _, err := m.rotate(); return err }, 1},
		{"recovery-key add", func() (err error) { paper, err = m.addRecovery(false); return err }, 1},
		{"recovery-key test", func() error { return m.testRecovery(paper) }, 0},
		{"recovery-key remove", func() error { return m.removeRecovery() }, 1},
		{"rewrap", func() error { _, err := m.rewrap(m.kms.NewKey(kmstest.KeySpec{})); return err }, 1},
		{"header backup", func() error { files, err := m.backUp(); file = files["vol-1"]; return err }, 0},
		{"lock", func() error { m.lockAll(); return nil }, 0},
		{"header restore", func() error { m.destroy(d); _, err := m.restore(file, "vol-1"); return err }, 1},
		{"rotate while KMS says no", func() error {
			m.kms.Deny("GenerateDataKey")
			defer m.kms.Heal()
			done, err := m.rotate()
			for _, r := range done {
				err = errors.Join(err, r.Err)
			}
			if err == nil {
				return errors.New("KMS was not asked")
			}
			return nil
		}, 0},
		{"rotate without systemd", func() error {
			m.fail = func(step, _ string) error {
				if step == "send" {
					return systemd.ErrNoSystemd
				}
				return nil
			}
			_, err := m.rotate()
			return err
		}, 1},
	} {
		m.sends = 0
		if err := c.do(); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		if m.sends != c.sends {
			t.Errorf("%s: the escrow was to be sent %d times, want %d", c.what, m.sends, c.sends)
		}
	}
	m.cfg.Escrow.Bucket, m.sends = "", 0
	if _, err := m.rotate(); err != nil || m.sends != 0 {
		t.Errorf("without an escrow: sent %d times, %v", m.sends, err)
	}
}

// TestEscrowBringsBack: the boot volume is lost and the headers are destroyed; another instance has the disks now.
func TestEscrowBringsBack(t *testing.T) {
	for _, mode := range escrowModes {
		t.Run(string(mode), func(t *testing.T) {
			m, s := withEscrow(t, mode)
			disks := []volumes.Device{m.disk(volumes.ClassEBS, "vol-1"), m.disk(volumes.ClassEBS, "vol-2")}
			m.runOK()
			if _, err := m.escrow(); err != nil {
				t.Fatal(err)
			}
			sums := m.sums()
			was := m.records().Volumes
			m.reboot()
			m.destroy(disks[0]) // the other one shows its header
			m.cfg.StateDir += "-new"
			m.imds.SetIdentity("instanceId", "i-0fedcba9876543210")

			n := m.node()
			all, err := n.EscrowObjects(t.Context(), nil)
			if err != nil || len(all) != 2 || all[0].Encryption.Mode != mode || all[0].Identity == "" || all[0].Instance != kmstest.InstanceID {
				t.Fatalf("%+v, %v", all, err)
			}
			found, err := n.EscrowFor(t.Context(), nil)
			if err != nil || len(found) != 2 {
				t.Fatalf("%+v, %v", found, err)
			}
			for _, o := range found {
				file := filepath.Join(t.TempDir(), "copy")
				for range 2 { // the second time it is there
					if err := n.FetchEscrow(t.Context(), o.Name, file); err != nil {
						t.Fatal(err)
					}
				}
				if r, err := m.restore(file, ""); err != nil || len(r.Records) == 0 {
					t.Fatalf("%+v, %v", r, err)
				}
			}
			m.untouched(sums)
			if found, err := n.EscrowFor(t.Context(), nil); err != nil || len(found) != 0 {
				t.Errorf("what is recorded is to be restored again: %+v, %v", found, err)
			}
			m.runOK()
			for uuid, v := range m.records().Volumes {
				if v.MountPoint != was[uuid].MountPoint || m.mounts[v.MountPoint] == "" {
					t.Errorf("%+v, was %+v", v, was[uuid])
				}
			}
			if m.kms.Count("GenerateDataKey") != 1+2 { // the node's, and one for each object
				t.Errorf("a new data key was made: %+v", m.kms.Calls())
			}
			_, err = n.EscrowFor(t.Context(), []string{"vol-9"})
			if unknown := (*UnknownVolumeError)(nil); !errors.As(err, &unknown) {
				t.Errorf("%v", err)
			}
			_ = s
		})
	}
}

// TestEscrowOfAForgedHeader: what does not open under the data key is no copy of anything.
func TestEscrowOfAForgedHeader(t *testing.T) {
	m, s := withEscrow(t, archive.SSE)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	// A token's MAC covers what decides how a volume is opened; this header is whole, and somebody else's work.
	for _, a := range lukstest.Attacks() {
		if a.Name == "data moved" { // only the MAC sees it
			if err := a.Do(d.Path); err != nil {
				t.Fatal(err)
			}
		}
	}
	if done, err := m.escrow(); err == nil || sent(done) != nil || len(s.Keys(escrowBucket)) != 0 {
		t.Errorf("%+v, %v", done, err)
	}
}

// TestFetchOverwritesNothing: a file that is there is somebody's.
func TestFetchOverwritesNothing(t *testing.T) {
	m, s := withEscrow(t, archive.SSE)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	if _, err := m.escrow(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := m.node().FetchEscrow(t.Context(), s.Keys(escrowBucket)[0], file)
	if got, rerr := os.ReadFile(file); !errors.Is(err, fs.ErrExist) || string(got) != "mine" {
		t.Errorf("%q, %v: %v", got, rerr, err)
	}
}

// TestEscrowIsCut: whatever a cut or S3 leaves undone is done the next time, under the same name.
func TestEscrowIsCut(t *testing.T) {
	for name, fail := range map[string]func(*machine, *s3test.S3){
		"S3 is away":          func(_ *machine, s *s3test.S3) { s.Deny("PutObject") },
		"HEAD is denied":      func(_ *machine, s *s3test.S3) { s.Deny("HeadObject") },
		"S3 does not encrypt": func(_ *machine, s *s3test.S3) { s.Behave(s3test.Ignores) },
		"the key is disabled": func(m *machine, _ *s3test.S3) { m.kms.SetState(m.cfg.Escrow.KMSKey, kmstest.Disabled) },
		"the power goes":      nil,
	} {
		t.Run(name, func(t *testing.T) {
			m, s := withEscrow(t, archive.SSE)
			m.disk(volumes.ClassEBS, "vol-1")
			m.runOK()
			note := func() keycache.EscrowNote {
				store, err := keycache.ViewStore(m.cfg.StateDir)
				if err != nil {
					t.Fatal(err)
				}
				for uuid := range m.records().Volumes {
					n, err := store.Escrow(uuid)
					if err != nil {
						t.Fatal(err)
					}
					return n
				}
				return keycache.EscrowNote{}
			}
			if fail == nil {
				n := m.node()
				ctx, cancel := context.WithCancel(t.Context())
				n.atStep = func(at step) {
					if at == stepEscrowNoted {
						cancel()
					}
				}
				_, _ = n.Escrow(ctx, nil)
			} else {
				fail(m, s)
				for range 2 {
					if done, err := m.escrow(); err == nil || sent(done) != nil {
						t.Fatalf("%+v, %v", done, err)
					}
				}
			}
			first := note()
			if !first.Confirmed.IsZero() {
				t.Fatal("what is not there is noted as confirmed")
			}
			s.Heal()
			m.kms.SetState(m.cfg.Escrow.KMSKey, kmstest.Enabled)
			time.Sleep(time.Second) // a name of its own would have another time
			done, err := m.escrow()
			if fail != nil && name == "S3 does not encrypt" {
				// It lies there in the clear, under the name that this volume's copy has: that is for somebody to see.
				if e := (*archive.Error)(nil); !errors.As(err, &e) || e.Reason != archive.ReasonEncryption {
					t.Errorf("%v", err)
				}
			} else if err != nil || len(sent(done)) != 1 || note().Confirmed.IsZero() {
				t.Errorf("%+v, %v", done, err)
			}
			if note().Object != first.Object || len(s.Keys(escrowBucket)) != 1 {
				t.Errorf("%v, %s was %s", s.Keys(escrowBucket), note().Object, first.Object)
			}
		})
	}
}

// TestEscrowRequired: no volume is used before its copy is confirmed, and none is lost by that.
func TestEscrowRequired(t *testing.T) {
	for _, mode := range escrowModes {
		t.Run(string(mode), func(t *testing.T) {
			m, s := withEscrow(t, mode)
			m.cfg.Escrow.Required = true
			m.disk(volumes.ClassEBS, "vol-1")
			s.Deny("PutObject")
			failed := func(r Report) *EscrowRequiredError {
				t.Helper()
				for _, err := range r.Failures() {
					if e := (*EscrowRequiredError)(nil); errors.As(err, &e) {
						return e
					}
				}
				t.Fatal("no volume is held back")
				return nil
			}
			for range 2 { // the first makes the volume, the second finds it
				e := failed(m.run())
				denied := (*archive.Error)(nil)
				if !errors.As(e, &denied) || denied.Reason != archive.ReasonDenied || len(m.mounts) != 0 || len(m.open) != 0 {
					t.Fatalf("%v; mounted %v, open %v", e, m.mounts, m.open)
				}
			}
			s.Heal()
			m.runOK()
			if done, err := m.escrow(); err != nil || sent(done) != nil {
				t.Errorf("what the run sent is not what there is: %+v, %v", done, err)
			}
			if len(m.mounts) != 1 || len(s.Keys(escrowBucket)) != 1 || len(m.records().Volumes) != 1 {
				t.Errorf("mounted %v, escrow %v", m.mounts, s.Keys(escrowBucket))
			}
			// A reboot asks S3 nothing.
			m.reboot()
			s.Fail(s3test.Fault{Cut: true})
			asked := len(s.Calls())
			m.runOK()
			if len(m.mounts) != 1 || len(s.Calls()) != asked {
				t.Errorf("mounted %v after %d calls of S3", m.mounts, len(s.Calls())-asked)
			}
			// Closed by somebody who did not unmount it, changed, and not sent: it waits; where it is open, too.
			s.Heal()
			if _, err := m.rotate(); err != nil {
				t.Fatal(err)
			}
			m.reboot()
			s.Behave(s3test.Ignores)
			if mode == archive.SSE {
				if e := failed(m.run()); e == nil || len(m.mounts) != 0 {
					t.Errorf("mounted %v although the copy is in the clear: %v", m.mounts, e)
				}
			}
		})
	}
}

// TestRecoveryKeyIsNotHeldBack: it is for the day on which AWS does not answer.
func TestRecoveryKeyIsNotHeldBack(t *testing.T) {
	m, s := withEscrow(t, archive.SSE)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	text, err := m.addRecovery(false)
	if err != nil {
		t.Fatal(err)
	}
	m.reboot()
	m.cfg.Escrow.Required = true
	s.Fail(s3test.Fault{Cut: true})
	if did, err := m.unlockRecovery(text); err != nil || len(m.mounts) != 1 {
		t.Errorf("%v, mounted %v: %v", did, m.mounts, err)
	}
}

func TestNoEscrow(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	if _, err := m.escrow(); !errors.Is(err, ErrNoEscrow) {
		t.Errorf("%v", err)
	}
	if _, err := m.node().EscrowObjects(t.Context(), nil); !errors.Is(err, ErrNoEscrow) {
		t.Errorf("%v", err)
	}
}

// TestEscrowOfAnother: an object that somebody put in the place of a copy does not restore anything.
func TestEscrowOfAnother(t *testing.T) {
	m, s := withEscrow(t, archive.CSE)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	if _, err := m.escrow(); err != nil {
		t.Fatal(err)
	}
	m.reboot()
	name := s.Keys(escrowBucket)[0]
	s.Add(escrowBucket, name, []byte("in the clear"), map[string]string{"identity": "vol-1", "class": string(volumes.ClassEBS)})
	file := filepath.Join(t.TempDir(), "copy")
	var e *archive.Error
	if err := m.node().FetchEscrow(t.Context(), name, file); !errors.As(err, &e) || e.Reason != archive.ReasonEncryption {
		t.Errorf("%v", err)
	}
	verified, err := m.node().VerifyEscrow(t.Context(), nil)
	if err != nil || len(verified) != 1 || !errors.As(verified[0].Err, &e) {
		t.Errorf("%+v, %v", verified, err)
	}
	m.runOK()
	if m.mounts["/mnt"] == "" {
		t.Error(d.Path + " does not open any more")
	}
}

func TestEscrowConfiguration(t *testing.T) {
	const key = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	good := "kms_key: " + key + "\nescrow:\n  bucket: my-escrow\n"
	cfg, err := parseConfig("c", []byte(good))
	if want := (EscrowConfig{Bucket: "my-escrow", Prefix: "luks-kms-agent/", Mode: "sse-kms", KMSKey: key}); err != nil || cfg.Escrow != want {
		t.Errorf("%+v, %v", cfg.Escrow, err)
	}
	cfg, err = parseConfig("c", []byte(good+"  prefix: a/b\n  mode: cse-kms\n  region: eu-west-1\n  bucket_owner: \"111122223333\"\n  required: true\n  s3_endpoint: https://s3.example\n"))
	if want := (EscrowConfig{Bucket: "my-escrow", Prefix: "a/b/", Mode: "cse-kms", KMSKey: key, Region: "eu-west-1", Owner: "111122223333", Required: true, Endpoint: "https://s3.example"}); err != nil || cfg.Escrow != want {
		t.Errorf("%+v, %v", cfg.Escrow, err)
	}
	for text, says := range maps.All(map[string]string{
		"kms_key: " + key + "\nescrow: {}\n":                                "c:2: escrow.bucket is missing",
		"kms_key: alias/a\nescrow:\n  bucket: b-b\n":                        "c:2: escrow.kms_key is missing, and kms_key is \"alias/a\"",
		good + "  mode: sse-s3\n":                                           "c:4: escrow.mode is \"sse-s3\"",
		good + "  required: yes\n":                                          "c:4: escrow.required is \"yes\"",
		good + "  prefix: /a\n":                                             "c:4: escrow.prefix is \"/a\"",
		good + "  region: eu-west-1\n":                                      "key " + key + " is us-east-1",
		good + "  kms_key: alias/aws/s3\n":                                  "AWS managed key",
		good + "  s3_endpoint: http://s3.example\n":                         "c:4: escrow.s3_endpoint",
		good + "  bucket_owner: \"12\"\n":                                   "12 digits",
		strings.Replace(good, "my-escrow", "My_Escrow", 1):                  "is no bucket's name",
		good + "  buckets: x\n":                                             "c:4: unknown field \"buckets\" in escrow",
		"kms_key: " + key + "\nregion: eu-west-1\nescrow:\n  bucket: b-b\n": "",
	}) {
		if _, err := parseConfig("c", []byte(text)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %q", text, err, says)
		}
	}
}

// TestRequiredWhileRotating: between two data keys nothing can be sent; the copy from before still opens by the old one, so the node comes up.
func TestRequiredWhileRotating(t *testing.T) {
	m, s := withEscrow(t, archive.SSE)
	m.cfg.Escrow.Required = true
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	var cut *machine
	n := m.node()
	n.atStep = func(at step) {
		if at == stepSlotAdded {
			cut = m.copyTo(filepath.Join(t.TempDir(), "cut"))
		}
	}
	if _, err := n.Rotate(t.Context(), nil); err != nil || cut == nil {
		t.Fatalf("%v, %v", cut, err)
	}
	puts := s.Count("PutObject")
	cut.runOK()
	if len(cut.mounts) != 1 || s.Count("PutObject") != puts {
		t.Errorf("mounted %v after %d PUTs", cut.mounts, s.Count("PutObject")-puts)
	}
	// Where nothing was ever confirmed there is nothing to fall back on.
	cut.reboot()
	cut.cfg.Escrow.Bucket = "another"
	r := cut.run()
	if err := errors.Join(r.Failures()...); !errors.Is(err, ErrRotating) || len(cut.mounts) != 0 {
		t.Errorf("mounted %v: %v", cut.mounts, err)
	}
}

// TestNewestCopyThatCounts: what somebody put there without encryption is passed over, and does not keep an older copy from being found.
func TestNewestCopyThatCounts(t *testing.T) {
	m, s := withEscrow(t, archive.SSE)
	d := m.disk(volumes.ClassEBS, "vol-1")
	other := m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	if _, err := m.escrow(); err != nil {
		t.Fatal(err)
	}
	m.reboot()
	uuid := m.uuidOf(d)
	theirs := "luks-kms-agent/" + uuid + "/29991231T235959Z-00000000.header.tar"
	s.Add(escrowBucket, theirs, []byte("in the clear"), map[string]string{"identity": "vol-1", "class": string(volumes.ClassEBS)})
	s.Add(escrowBucket, "luks-kms-agent/"+uuid+"/readme", []byte("x"), nil)
	n := m.node()
	all, err := n.EscrowObjects(t.Context(), []string{uuid})
	var e *archive.Error
	if err != nil || len(all) != 2 || !errors.As(all[0].Err, &e) || e.Reason != archive.ReasonEncryption || all[1].Err != nil {
		t.Fatalf("%+v, %v", all, err)
	}
	want := all[1]
	for _, when := range []string{"with its header", "without"} {
		if when == "without" {
			m.destroy(d)
		}
		heads := s.Count("HeadObject")
		found, err := n.EscrowFor(t.Context(), []string{"vol-1"})
		if err != nil || len(found) != 1 || found[0].Name != want.Name {
			t.Errorf("%s: %+v, %v", when, found, err)
		}
		if asked := s.Count("HeadObject") - heads; when == "with its header" && asked != 2 {
			t.Errorf("%d objects were looked at", asked)
		}
	}
	// By its URL, whichever it is.
	if found, err := n.EscrowFor(t.Context(), []string{want.URL}); err != nil || len(found) != 1 || found[0].Name != want.Name {
		t.Errorf("%+v, %v", found, err)
	}
	if _, err := n.EscrowFor(t.Context(), []string{"s3://" + escrowBucket + "/" + theirs}); !errors.As(err, &e) || e.Reason != archive.ReasonEncryption {
		t.Errorf("%v", err)
	}
	if _, err := n.EscrowFor(t.Context(), []string{"s3://elsewhere/" + want.Name}); err == nil {
		t.Error("an object of another bucket was found")
	}

	// A volume that is away keeps the copy that it has, and is no failure every five minutes.
	m.detach(other)
	done, err := m.escrow("vol-2")
	if err != nil || len(done) != 1 || done[0].Sent || done[0].URL == "" {
		t.Errorf("%+v, %v", done, err)
	}
}

// BenchmarkEscrow sends 24 headers to an S3 that takes 50 ms for each call, one after the other and as many at a time as Escrow does.
func BenchmarkEscrow(b *testing.B) {
	m, s := withEscrow(b, archive.SSE)
	for i := range 24 {
		m.disk(volumes.ClassEBS, fmt.Sprintf("vol-%02d", i))
	}
	m.runOK()
	s.Fail(s3test.Fault{Delay: 50 * time.Millisecond})
	sendAll := func(atOnce int) (whole, sending time.Duration) {
		m.cfg.Escrow.KMSKey = m.kms.NewKey(kmstest.KeySpec{}) // under another key nothing is there yet
		n := m.node()
		start := time.Now()
		var first time.Time
		var once sync.Once
		n.Progress = func(text string) {
			if strings.HasPrefix(text, "Sending") {
				once.Do(func() { first = time.Now() })
			}
		}
		v, err := n.openVault(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		copies, err := n.sendPending(b.Context(), v, nil, atOnce)
		end := time.Now()
		if err != nil || len(copies) != 24 {
			b.Fatalf("%d sent, %v", len(copies), err)
		}
		for _, p := range copies {
			if p.Err != nil || !p.Sent {
				b.Fatalf("%s: sent %v, %v", p.Volume.Identity, p.Sent, p.Err)
			}
		}
		return end.Sub(start), end.Sub(first)
	}
	compareAtOnce(b, escrowsAtOnce, sendAll)
}

// compareAtOnce has it sent one after the other and several at a time, by turns. sendAll tells how long all of it took, and from the first on.
func compareAtOnce(b *testing.B, most int, sendAll func(atOnce int) (whole, sending time.Duration)) {
	sendAll(most) // not measured: what is done once only
	var all [4]time.Duration
	for b.Loop() {
		for i, atOnce := range []int{1, most} {
			whole, sending := sendAll(atOnce)
			all[i] += whole
			all[i+2] += sending
		}
	}
	for i, unit := range []string{"serial-s", "at-once-s", "serial-sending-s", "at-once-sending-s"} {
		b.ReportMetric(all[i].Seconds()/float64(b.N), unit)
	}
	b.ReportMetric(float64(most), "at-once")
}
