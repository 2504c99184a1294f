package agent

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// hear is journald.
func (m *machine) hear(e systemd.Entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.journal = append(m.journal, e)
	return nil
}

// events reads an audit log strictly.
func events(t testing.TB, path string) []AuditLine {
	t.Helper()
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	var all []AuditLine
	for line := range bytes.Lines(data) {
		dec := json.NewDecoder(bytes.NewReader(line))
		dec.DisallowUnknownFields()
		var a AuditLine
		if err := dec.Decode(&a); err != nil || line[len(line)-1] != '\n' {
			t.Fatalf("line %q: %v", line, err)
		}
		all = append(all, a)
	}
	return all
}

// news returns what the audit log has got since the last call, as "event result", and the lines.
func (m *machine) news() ([]string, []AuditLine) {
	m.t.Helper()
	all := events(m.t, m.cfg.AuditLog)
	lines := all[m.taken:]
	m.taken = len(all)
	return told(lines), lines
}

func told(lines []AuditLine) []string {
	var told []string
	for _, a := range lines {
		told = append(told, string(a.Event)+" "+a.Result)
	}
	return told
}

func (m *machine) wantEvents(want ...string) []AuditLine {
	m.t.Helper()
	got, lines := m.news()
	if !slices.Equal(got, want) {
		m.t.Errorf("events %q, want %q", got, want)
	}
	return lines
}

// wantCall checks that a line has the id of a call of that operation.
func (m *machine) wantCall(a AuditLine, op string) {
	m.t.Helper()
	for _, c := range m.kms.Calls() {
		if c.RequestID == a.KMSRequestID && c.Op == op {
			return
		}
	}
	m.t.Errorf("%s has request %q, which is no %s", a.Event, a.KMSRequestID, op)
}

// A whole life: each event is there, with the ids to find it elsewhere; the journal has the same; and no key is in either.
func TestAuditOfALife(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassInstanceStore, "AWS1")
	m.runOK()
	rec := func() (keycache.VolumeRecord, keycache.KeyRecord) {
		for _, v := range m.records().Volumes {
			return v, m.records().Keys[v.KeyID]
		}
		t.Fatal("no record")
		panic("")
	}
	v, k := rec()
	lines := m.wantEvents("data-key-made ok", "data-key-unwrapped ok", "volume-opened ok", "volume-formatted ok")
	m.wantCall(lines[0], "GenerateDataKey")
	for _, a := range lines[1:] {
		m.wantCall(a, "Decrypt")
	}
	for _, a := range lines {
		if a.Version != 1 || a.InstanceID != kmstest.InstanceID || a.Command != "run" || a.AgentVersion != "test" || a.PID != os.Getpid() ||
			len(a.BootID) != 36 || a.KeyID != k.ID || a.KeyARN != k.KeyARN || time.Since(a.Time).Abs() > time.Hour || a.Time.Location() != time.UTC {
			t.Errorf("%+v", a)
		}
	}
	for _, a := range lines[2:] {
		if a.Volume != v.UUID || a.Device != d.Path || a.Identity != "AWS1" || a.Mapping != v.Mapping {
			t.Errorf("%+v", a)
		}
	}
	m.runOK() // nothing to do
	m.wantEvents()

	m.reboot()
	m.runOK()
	for _, a := range m.wantEvents("data-key-unwrapped ok", "volume-opened ok") {
		m.wantCall(a, "Decrypt")
	}

	to := m.kms.NewKey(kmstest.KeySpec{})
	if _, err := m.rewrap(to); err != nil {
		t.Fatal(err)
	}
	lines = m.wantEvents("data-key-unwrapped ok", "data-key-unwrapped ok", "record-archived ok", "data-key-rewrapped ok", "data-key-rewrapped ok")
	for i, a := range lines[3:] {
		m.wantCall(a, "ReEncrypt")
		if a.KeyARN != to || a.FromKeyARN != k.KeyARN || a.KeyID != k.ID || (a.Volume == "") != (i == 0) {
			t.Errorf("%+v", a)
		}
	}
	m.cfg.KMSKey = to

	before := m.forms()
	if _, err := m.rotate(); err != nil {
		t.Fatal(err)
	}
	lines = m.wantEvents("data-key-unwrapped ok", "data-key-made ok", "data-key-unwrapped ok", "key-slot-removed ok", "data-key-rotated ok", "record-archived ok")
	old := k
	v, k = rec()
	if a := lines[4]; a.KeyID != k.ID || a.FromKeyID != old.ID || a.FromKeyARN != to || a.KeyARN != to || a.Volume != v.UUID {
		t.Errorf("%+v", a)
	}
	if a := lines[3]; a.KeySlot == nil || *a.KeySlot != 0 || a.Device != d.Path {
		t.Errorf("%+v", a)
	}
	if lines[5].KeyID != old.ID {
		t.Errorf("%+v", lines[5])
	}

	if _, err := m.node().Lock(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if a := m.wantEvents("volume-locked ok")[0]; a.Volume != v.UUID || a.InstanceID != kmstest.InstanceID || a.Device != d.Path {
		t.Errorf("%+v", a)
	}

	m.write(d, 4096+20, []byte("garbage"))
	m.runOK()
	m.wantEvents("data-key-unwrapped ok", "header-restored begun", "header-restored ok", "volume-opened ok")

	// Another instance adopts it.
	m.reboot()
	m.imds.SetIdentity("instanceId", "i-0fedcba9876543210")
	m.runOK()
	lines = m.wantEvents("records-quarantined ok", "data-key-unwrapped ok", "volume-opened ok", "volume-adopted ok")
	if !slices.Equal(lines[0].Records, []string{"keys/" + k.ID, "volumes/" + v.UUID}) || lines[0].Reason == "" || lines[3].InstanceID != "i-0fedcba9876543210" {
		t.Errorf("%+v", lines)
	}
	keys := append(before, m.forms()...)

	// Its header is replaced by one under another key.
	m.reboot()
	other, err := keycache.NewKey(make([]byte, 32))
	if err == nil {
		err = luks.Format(t.Context(), d.Path, luks.FormatOptions{UUID: v.UUID, KeyARN: k.KeyARN, WrappedKey: k.WrappedKey}, other)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.run()
	if a := m.wantEvents("data-key-unwrapped ok", "volume-refused failed")[1]; a.Refusal != RefusedHeader || a.Reason == "" || a.Error != "" || a.Volume != v.UUID {
		t.Errorf("%+v", a)
	}

	// A stop takes the disk away and gives another.
	m.reboot()
	m.devices = nil
	m.disk(volumes.ClassInstanceStore, "AWS2")
	m.runOK()
	lines = m.wantEvents("data-key-unwrapped ok", "record-archived ok", "volume-opened ok", "volume-formatted ok")
	if lines[1].Volume != v.UUID || lines[3].Volume == v.UUID || lines[1].Reason == "" {
		t.Errorf("%+v", lines)
	}

	// KMS says no.
	m.reboot()
	m.kms.Deny("Decrypt")
	m.run()
	lines = m.wantEvents("data-key-unwrapped failed", "volume-opened failed")
	for _, a := range lines {
		m.wantCall(a, "Decrypt")
		if !strings.Contains(a.Error, "AccessDenied") {
			t.Errorf("%+v", a)
		}
	}
	m.kms.Heal()

	m.wantJournal()
	keys = append(keys, m.forms()...)
	for what, text := range map[string][]byte{"audit log": read(t, m.cfg.AuditLog), "journal": []byte(fmt.Sprint(m.journal))} {
		if holdsKey(text, keys) {
			t.Errorf("a key is in the %s", what)
		}
	}
	// The search finds a key that is there: in base64, in hex.
	for _, i := range []int{1, 2} {
		l := newAuditLog(filepath.Join(t.TempDir(), "log", "audit.jsonl"), Program{}, zap.NewNop())
		l.journal = func(systemd.Entry) error { return nil }
		l.add(Event{Kind: EventVolumeOpened, Reason: string(keys[i])})
		if text := read(t, l.path); !holdsKey(text, keys) || len(keys) < 3*16 {
			t.Errorf("form %d is not found among %d", i, len(keys))
		}
	}
}

// holdsKey says whether one of the forms is in a text.
func holdsKey(text []byte, forms [][]byte) bool {
	return slices.ContainsFunc(forms, func(form []byte) bool { return bytes.Contains(text, form) })
}

// forms are the data keys that KMS gives for the records now, in every form.
func (m *machine) forms() [][]byte {
	m.t.Helper()
	var forms [][]byte
	for _, rec := range m.records().Keys {
		key, err := m.node().cloud.(auditedCloud).cloud.Decrypt(m.t.Context(), rec)
		if err != nil {
			m.t.Fatal(err)
		}
		raw, text := bytes.Clone(key.Bytes()), bytes.Clone(key.Passphrase())
		key.Wipe()
		lower := hex.EncodeToString(raw)
		list := fmt.Sprint(raw)
		forms = append(forms, raw, text, []byte(lower), []byte(strings.ToUpper(lower)), []byte(strings.TrimRight(string(text), "=")),
			[]byte(base64.URLEncoding.EncodeToString(raw)), []byte(list[1:len(list)-1]), []byte(strings.ReplaceAll(list, " ", ",")[1:len(list)-1]),
			[]byte(strconv.Quote(string(raw))[1:20]), []byte(base64.StdEncoding.EncodeToString(text)), []byte(hex.EncodeToString(text)))
		quoted, err := json.Marshal(string(raw))
		if err != nil {
			m.t.Fatal(err)
		}
		forms = append(forms, quoted[1:len(quoted)-1])
		for _, pad := range []byte{0x36, 0x5c} {
			for _, b := range [][]byte{raw, text} {
				padded := bytes.Clone(b)
				for i := range padded {
					padded[i] ^= pad
				}
				forms = append(forms, padded)
			}
		}
	}
	return forms
}

// wantJournal checks that the journal has what the audit log has, by field.
func (m *machine) wantJournal() {
	m.t.Helper()
	lines := events(m.t, m.cfg.AuditLog)
	if len(lines) != len(m.journal) {
		m.t.Fatalf("%d lines, %d entries in the journal", len(lines), len(m.journal))
	}
	for i, a := range lines {
		e := m.journal[i]
		for name, want := range map[string]string{
			"EVENT": string(a.Event), "RESULT": a.Result, "VOLUME": a.Volume, "KMS_REQUEST_ID": a.KMSRequestID, "KEY_ID": a.KeyID, "ERROR": a.Error,
			"DEVICE": a.Device, "PID": fmt.Sprint(a.PID), "INSTANCE_ID": a.InstanceID, "REFUSAL": string(a.Refusal), "REASON": a.Reason,
		} {
			if got := e.Fields["LUKS_KMS_AGENT_"+name]; got != want {
				m.t.Errorf("%s of entry %d is %q, want %q", name, i, got, want)
			}
		}
		if e.MessageID != a.Event.MessageID() || len(e.MessageID) != 32 || e.Warning != (a.Result == "failed") || !strings.Contains(e.Message, string(a.Event)) {
			m.t.Errorf("%+v", e)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Each volume that is refused is told once, with the kind and the reason, also one that a run waits for in vain.
func TestAuditOfRefusals(t *testing.T) {
	m := newMachine(t)
	gone := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.news()
	m.devices = nil
	foreign := m.disk(volumes.ClassEBS, "vol-2")
	m.write(foreign, 4096, []byte("somebody's"))
	m.cfg.DeviceWait = 700 * time.Millisecond
	m.run()
	_, lines := m.news()
	refused := map[string]Refusal{}
	for _, a := range lines {
		if a.Event == EventVolumeRefused {
			if refused[a.Identity] != "" || a.Reason == "" || a.Result != "failed" || a.Error != "" {
				t.Errorf("%+v", a)
			}
			refused[a.Identity] = a.Refusal
		}
	}
	if len(refused) != 2 || refused[gone.Identity] != RefusedDevice || refused[foreign.Identity] != RefusedContent {
		t.Errorf("refused: %v", refused)
	}
}

// What has happened before a cut is in the log after it.
func TestAuditIsThereAtEveryStep(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	made, unwrapped, opened := "data-key-made ok", "data-key-unwrapped ok", "volume-opened ok"
	want := map[step][]string{
		stepKeyMade: {made}, stepKeyRecorded: {made}, stepKeyProven: {made, unwrapped}, stepIntent: {made, unwrapped}, stepFormatted: {made, unwrapped},
		stepOpened: {made, unwrapped, opened}, stepCleared: {made, unwrapped, opened}, stepFilesystem: {made, unwrapped, opened}, stepReady: {made, unwrapped, opened},
	}
	cuts := m.cuts()
	for at, c := range cuts {
		if got := told(events(t, c.cfg.AuditLog)); !slices.Equal(got, want[at]) || want[at] == nil {
			t.Errorf("at the step %q: %q, want %q", at, got, want[at])
		}
	}
	if len(cuts) != len(want) {
		t.Errorf("%d steps, want %d", len(cuts), len(want))
	}
	// And the cut ones go on in the same file.
	c := cuts[stepIntent]
	c.runOK()
	if got := told(events(t, c.cfg.AuditLog)); !slices.Equal(got, []string{made, unwrapped, unwrapped, opened, "volume-formatted ok"}) {
		t.Errorf("after a cut: %q", got)
	}
}

// What takes away its own trace is on the disk before it is done.
func TestAuditOfARestoreIsDurableBeforeIt(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.write(d, 4096+20, []byte("garbage"))
	n := m.node()
	durable, begun := "", false
	n.auditLog.fsync = func(f *os.File) error {
		durable = string(read(t, m.cfg.AuditLog))
		if i, err := luks.Inspect(d.Path); err == nil && i.PrimaryDamaged {
			begun = strings.Contains(durable, `"header-restored","result":"begun"`)
		}
		return f.Sync()
	}
	if r, err := n.Run(t.Context()); err != nil || len(r.Failures()) > 0 {
		t.Fatal(err, r.Failures())
	}
	if !begun {
		t.Error("the header was restored before that was on the disk")
	}
	if durable != string(read(t, m.cfg.AuditLog)) {
		t.Error("the end of the log was not synced")
	}
}

// A log that cannot be written costs a warning and no volume.
func TestFailingAuditLogStopsNothing(t *testing.T) {
	for name, spoil := range map[string]func(m *machine) error{
		"its directory cannot be made": func(m *machine) error {
			m.cfg.AuditLog = filepath.Join(m.dir, "file", "log", "audit.jsonl")
			return os.WriteFile(filepath.Join(m.dir, "file"), nil, 0o600)
		},
		"a symbolic link": func(m *machine) error {
			return os.Symlink(filepath.Join(m.dir, "elsewhere"), m.cfg.AuditLog)
		},
		"a FIFO":      func(m *machine) error { return exec.Command("mkfifo", "-m", "600", m.cfg.AuditLog).Run() },
		"a directory": func(m *machine) error { return os.Mkdir(m.cfg.AuditLog, 0o700) },
		"a device":    func(m *machine) error { m.cfg.AuditLog = "/dev/full"; return nil },
		"others write": func(m *machine) error {
			return errors.Join(os.WriteFile(m.cfg.AuditLog, nil, 0o600), os.Chmod(m.cfg.AuditLog, 0o666))
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			if err := errors.Join(os.Mkdir(filepath.Dir(m.cfg.AuditLog), 0o700), spoil(m)); err != nil {
				t.Fatal(err)
			}
			m.disk(volumes.ClassEBS, "vol-1")
			r := m.runOK()
			if len(m.mounts) != 1 || !strings.Contains(r.AuditProblem, "cannot write the audit log "+m.cfg.AuditLog) || !strings.Contains(r.AuditProblem, "only: 4") {
				t.Errorf("mounts %v, %q", m.mounts, r.AuditProblem)
			}
			if len(m.journal) != 4 {
				t.Errorf("the journal has %+v", m.journal)
			}
			if s, err := ReadStatus(m.node().statusPath); err != nil || s.AuditError != r.AuditProblem || s.Result != "ok" {
				t.Errorf("status %+v, %v", s, err)
			}
			if _, err := os.Stat(filepath.Join(m.dir, "elsewhere")); err == nil {
				t.Error("the link was followed")
			}
		})
	}
}

// The file is the one that has the name at each event, and half a line in it is ended first.
func TestAuditLogIsRotatedAndTorn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log", "audit.jsonl")
	l := newAuditLog(path, Program{}, zap.NewNop())
	l.journal = func(systemd.Entry) error { return nil }
	add := func(uuid string) { l.add(Event{Kind: EventVolumeOpened, Volume: keycache.VolumeRecord{UUID: uuid}}) }
	volumes := func(path string) string {
		var all []string
		for line := range strings.Lines(string(read(t, path))) {
			var a AuditLine
			if json.Unmarshal([]byte(line), &a) != nil {
				a.Volume = "(" + strings.TrimSpace(line) + ")"
			}
			all = append(all, a.Volume)
		}
		return strings.Join(all, " ")
	}
	add("1")
	info, err := os.Stat(path)
	if dir, errDir := os.Stat(filepath.Dir(path)); errors.Join(err, errDir) != nil || info.Mode().Perm() != 0o600 || dir.Mode().Perm() != 0o700 {
		t.Errorf("made with modes %v, %v", info.Mode(), dir.Mode())
	}
	// logrotate: rename, and create at once or never.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	add("2")
	if err := errors.Join(os.Rename(path, path+".2"), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	add("3")
	l.finish()
	for _, c := range [][2]string{{path + ".1", "1"}, {path + ".2", "2"}, {path, "3"}} {
		if got := volumes(c[0]); got != c[1] {
			t.Errorf("%s has %s, want %s", c[0], got, c[1])
		}
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(`{"version":1,"volume":"half`), 0o600); err != nil {
		t.Fatal(err)
	}
	add("4")
	add("5")
	l.finish()
	if got := volumes(path); got != `({"version":1,"volume":"half) 4 5` {
		t.Errorf("after a torn line: %s", got)
	}
	if p := l.problem(); p != "" {
		t.Error(p)
	}
}

// No field of an event or of a line can carry a key but by a string that somebody made of it.
func TestEventsHaveNoRoomForAKey(t *testing.T) {
	for _, c := range []struct {
		of   any
		also []reflect.Type
	}{
		{AuditLine{}, []reflect.Type{reflect.TypeFor[time.Time](), reflect.TypeFor[[]string](), reflect.TypeFor[*int]()}},
		{Event{}, []reflect.Type{
			reflect.TypeFor[keycache.VolumeRecord](), reflect.TypeFor[volumes.Device](), reflect.TypeFor[keycache.KeyRecord](),
			reflect.TypeFor[[]string](), reflect.TypeFor[*int](), reflect.TypeFor[error](), reflect.TypeFor[bool](),
		}},
	} {
		typ := reflect.TypeOf(c.of)
		for i := range typ.NumField() {
			f := typ.Field(i)
			if k := f.Type.Kind(); k != reflect.String && k != reflect.Int && !slices.Contains(c.also, f.Type) {
				t.Errorf("%s.%s is a %s", typ.Name(), f.Name, f.Type)
			}
		}
	}
}

// BenchmarkAuditOfAReboot is what the audit log adds to a reboot with eight volumes: nine events and one sync.
func BenchmarkAuditOfAReboot(b *testing.B) {
	path := filepath.Join(b.TempDir(), "log", "audit.jsonl")
	v := keycache.VolumeRecord{UUID: "5f1c2a9e-7d34-4b8e-8c55-2e9f0a6b1c3d", Mapping: "luks-5f1c2a9e-7d34-4b8e-8c55-2e9f0a6b1c3d", Identity: "vol-0123456789abcdef0"}
	for b.Loop() {
		l := newAuditLog(path, Program{Version: "test", Command: "run"}, zap.NewNop())
		l.add(Event{Kind: EventDataKeyUnwrapped})
		for range 8 {
			l.add(Event{Kind: EventVolumeOpened, Volume: v})
		}
		l.finish()
	}
}

// The verbs of an operator tell of what they did, and what destroys says so before it does.
func TestAuditOfTheVerbs(t *testing.T) {
	m := newMachine(t)
	d := m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.news()
	unwrapped := "data-key-unwrapped ok"
	files, err := m.backUp()
	if err != nil {
		t.Fatal(err)
	}
	if l := m.wantEvents(unwrapped, "header-backed-up ok"); l[1].Reason != files["vol-1"] || l[1].Identity != "vol-1" {
		t.Errorf("%+v", l)
	}
	text, err := m.addRecovery(false, "vol-1")
	if err != nil {
		t.Fatal(err)
	}
	if l := m.wantEvents(unwrapped, "recovery-key-added ok"); l[1].KeySlot == nil || *l[1].KeySlot != 1 {
		t.Errorf("%+v", l)
	}
	m.reboot()
	if _, err := m.unlockRecovery(text); err != nil {
		t.Fatal(err)
	}
	m.wantEvents("recovery-key-used ok")
	if bytes.Contains(read(t, m.cfg.AuditLog), []byte(text)) {
		t.Error("the recovery key is in the audit log")
	}
	if err := m.removeRecovery("vol-1"); err != nil {
		t.Fatal(err)
	}
	m.wantEvents(unwrapped, "recovery-key-removed ok")
	m.reboot()
	m.destroy(d)
	if _, err := m.restore(files["vol-1"], ""); err != nil {
		t.Fatal(err)
	}
	m.wantEvents(unwrapped, "header-restored-from-backup begun", "header-restored-from-backup ok")
	if _, err := m.wipe("vol-1"); err != nil {
		t.Fatal(err)
	}
	m.wantEvents("volume-wiped begun", "volume-wiped ok")
}
