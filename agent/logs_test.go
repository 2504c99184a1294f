package agent

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/logs"
	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

const logBucket = "node-logs"

// withLogs is a machine that archives the logs in a directory.
func withLogs(t testing.TB) (m *machine, s *s3test.S3, dir string) {
	t.Helper()
	m = newMachine(t)
	m.kms.Trust(m.imds)
	m.kms.AllowContext()
	s = s3test.New(t, s3test.Options{KMS: m.kms.URL()})
	s.NewBucket(logBucket, s3test.Bucket{})
	dir = t.TempDir()
	m.archiveLogsTo(s, dir)
	return m, s, dir
}

// archiveLogsTo configures that.
func (m *machine) archiveLogsTo(s *s3test.S3, dir string) {
	m.cfg.Logs = LogsConfig{
		Bucket: logBucket, Prefix: "logs/", Cluster: "c-1", KMSKey: m.kms.NewKey(kmstest.KeySpec{}), Endpoint: s.URL(),
		Files: []string{filepath.Join(dir, "*.log*")}, Spool: filepath.Join(m.dir, "spool"), MaxSpool: 16,
	}
}

func appendTo(t testing.TB, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// archived is what the bucket has, decrypted and decompressed, in the order of the names.
func (m *machine) archived(s *s3test.S3) (text string) {
	m.t.Helper()
	n := m.node()
	v, err := n.vault(m.t.Context(), m.cfg.Logs.options())
	if err != nil {
		m.t.Fatal(err)
	}
	for _, name := range s.Keys(logBucket) {
		data, _, err := v.Get(m.t.Context(), name)
		if err != nil {
			m.t.Fatal(err)
		}
		zip, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			m.t.Fatal(err)
		}
		plain, err := io.ReadAll(zip)
		if err != nil {
			m.t.Fatal(err)
		}
		text += string(plain)
	}
	return text
}

func TestArchiveLogs(t *testing.T) {
	m, s, dir := withLogs(t)
	appendTo(t, filepath.Join(dir, "a.log"), "1\n2\n")
	done, err := m.node().ArchiveLogs(t.Context())
	if err != nil || done.Pieces != 1 || done.Lines != 2 || done.Waiting != 0 || done.Lost != nil {
		t.Fatalf("%+v, %v", done, err)
	}
	name := s.Keys(logBucket)[0]
	if want := "logs/c-1/node/" + kmstest.InstanceID + "/files" + dir + `/a\.log/\d{8}T\d{6}Z-[0-9a-f]{8}-000001-00000000000000000000\.gz`; !regexp.MustCompile("^" + want + "$").MatchString(name) {
		t.Errorf("the object is %s, want %s", name, want)
	}
	if done, err = m.node().ArchiveLogs(t.Context()); err != nil || done.Pieces != 0 {
		t.Errorf("nothing new: %+v, %v", done, err)
	}
	appendTo(t, filepath.Join(dir, "a.log"), "3\n")
	if err := os.Rename(filepath.Join(dir, "a.log"), filepath.Join(dir, "a.log.1")); err != nil {
		t.Fatal(err)
	}
	appendTo(t, filepath.Join(dir, "a.log"), "4\n")
	if done, err = m.node().ArchiveLogs(t.Context()); err != nil || done.Lines != 2 {
		t.Errorf("rotated: %+v, %v", done, err)
	}
	if text := m.archived(s); text != "1\n2\n3\n4\n" {
		t.Errorf("%q", text)
	}
	objects, err := m.node().VerifyLogs(t.Context(), false)
	if err != nil || len(objects) != 3 {
		t.Errorf("%+v, %v", objects, err)
	}
	for _, o := range objects {
		if o.Err != nil || o.Encryption.Algorithm != "aws:kms" || o.Encryption.KeyARN != m.cfg.Logs.KMSKey {
			t.Errorf("%+v", o)
		}
	}
	for _, c := range m.kms.Calls() {
		if c.KeyID == m.cfg.Logs.KMSKey && !strings.HasPrefix(c.Context["aws:s3:arn"], "arn:aws:s3:::"+logBucket+"/logs/c-1/node/") {
			t.Errorf("%+v", c)
		}
	}
	// One that somebody else put there without the key is seen.
	s.Add(logBucket, "logs/c-1/node/"+kmstest.InstanceID+"/files/x.gz", []byte("x"), nil)
	objects, err = m.node().VerifyLogs(t.Context(), true)
	var e *archive.Error
	if err != nil || len(objects) != 4 || !slices.ContainsFunc(objects, func(o LogObject) bool { return errors.As(o.Err, &e) && e.Reason == archive.ReasonEncryption }) {
		t.Errorf("%+v, %v", objects, err)
	}
	m.cfg.Logs = LogsConfig{}
	if _, err := m.node().ArchiveLogs(t.Context()); !errors.Is(err, ErrNoLogs) {
		t.Errorf("%v", err)
	}
}

// TestLogsNeedOnlyGenerateDataKey: the role that archives may make data keys under the log key, and nothing else.
func TestLogsNeedOnlyGenerateDataKey(t *testing.T) {
	m, s, dir := withLogs(t)
	m.kms.Enforce(&kmstest.Access{Role: []*kmstest.Policy{onlyAllows(t, map[string][]string{m.cfg.Logs.KMSKey: {"GenerateDataKey"}})}})
	appendTo(t, filepath.Join(dir, "a.log"), strings.Repeat("0123456789\n", 1<<20)) // more than a piece
	done, err := m.node().ArchiveLogs(t.Context())
	if err != nil || done.Lines != 1<<20 || done.Pieces != 2 {
		t.Fatalf("%+v, %v", done, err)
	}
	if objects, err := m.node().VerifyLogs(t.Context(), false); err != nil || len(objects) != 2 || objects[0].Err != nil {
		t.Errorf("%+v, %v", objects, err)
	}
	m.kms.Enforce(&kmstest.Access{Role: []*kmstest.Policy{onlyAllows(t, map[string][]string{m.cfg.Logs.KMSKey: {"Decrypt"}})}})
	appendTo(t, filepath.Join(dir, "a.log"), "more\n")
	var e *archive.Error
	if _, err := m.node().ArchiveLogs(t.Context()); !errors.As(err, &e) || e.Reason != archive.ReasonKMSDenied {
		t.Errorf("%v", err)
	}
	_ = s
}

// TestLogsWait: what S3 does not take waits, nothing is lost, and all of it is there once it is well.
func TestLogsWait(t *testing.T) {
	for name, c := range map[string]struct {
		fail   func(*machine, *s3test.S3)
		reason archive.Reason
	}{
		"S3 is away":          {func(_ *machine, s *s3test.S3) { s.Fail(s3test.Fault{Code: "SlowDown", Status: 503}) }, archive.ReasonUnavailable},
		"denied":              {func(_ *machine, s *s3test.S3) { s.Deny("PutObject") }, archive.ReasonDenied},
		"KMS says no":         {func(m *machine, _ *s3test.S3) { m.kms.SetState(m.cfg.Logs.KMSKey, kmstest.Disabled) }, archive.ReasonKey},
		"HEAD is denied":      {func(_ *machine, s *s3test.S3) { s.Deny("HeadObject", "GetObject") }, archive.ReasonDenied},
		"S3 does not encrypt": {func(_ *machine, s *s3test.S3) { s.Behave(s3test.Ignores) }, archive.ReasonEncryption},
	} {
		t.Run(name, func(t *testing.T) {
			m, s, dir := withLogs(t)
			want := ""
			c.fail(m, s)
			rounds := 3
			if c.reason == archive.ReasonUnavailable {
				rounds = 1 // the SDK waits between its tries
			}
			for i := range rounds {
				line := fmt.Sprintf("line %d\n", i)
				want += line
				appendTo(t, filepath.Join(dir, "a.log"), line)
				done, err := m.node().ArchiveLogs(t.Context())
				var e *archive.Error
				if !errors.As(err, &e) || e.Reason != c.reason || done.Pieces != 0 || done.Waiting == 0 {
					t.Fatalf("%+v, %v", done, err)
				}
			}
			// Meanwhile the file is rotated away: the spool has it.
			if err := os.Remove(filepath.Join(dir, "a.log")); err != nil {
				t.Fatal(err)
			}
			s.Heal()
			m.kms.SetState(m.cfg.Logs.KMSKey, kmstest.Enabled)
			if name == "S3 does not encrypt" {
				s.NewBucket(logBucket, s3test.Bucket{}) // what lies there in the clear is removed by somebody
			}
			done, err := m.node().ArchiveLogs(t.Context())
			if err != nil || done.Lines != rounds || done.Waiting != 0 {
				t.Errorf("%+v, %v", done, err)
			}
			if got := m.archived(s); got != want {
				t.Errorf("%q, want %q", got, want)
			}
			if name == "S3 is away" && len(done.Lost) != 1 { // it went, and who knows what was in it at last
				t.Errorf("lost: %+v", done.Lost)
			}
		})
	}
}

func TestLogsConfiguration(t *testing.T) {
	const key = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	good := "kms_key: " + key + "\nlogs:\n  bucket: my-logs\n  cluster: c-1\n"
	files := "  files: [/var/log/*.log*]\n"
	cfg, err := parseConfig("c", []byte(good+files))
	want := LogsConfig{Bucket: "my-logs", Prefix: "logs/", Cluster: "c-1", KMSKey: key, Files: []string{"/var/log/*.log*"}, Spool: "/var/spool/luks-kms-agent", MaxSpool: 1024}
	if err != nil || fmt.Sprint(cfg.Logs) != fmt.Sprint(want) {
		t.Errorf("%+v, %v", cfg.Logs, err)
	}
	for text, says := range maps.All(map[string]string{
		"kms_key: " + key + "\nlogs: {}\n":                            "c:2: logs.bucket is missing",
		good:                                                          "c:2: logs has neither files nor units",
		good + "  files: [var/log/x]\n":                               "c:5: logs.files has \"var/log/x\"",
		good + "  files: [\"/var/[\"]\n":                              "c:5: logs.files has \"/var/[\"",
		good + "  units: [--root]\n":                                  "c:5: logs.units has \"--root\"",
		good + files + "  max_spool_mib: 1\n":                         "c:6: logs.max_spool_mib is \"1\"",
		good + files + "  rate_mib_per_second: fast\n":                "c:6: logs.rate_mib_per_second is \"fast\"",
		good + files + "  spool_dir: spool\n":                         "c:6: logs.spool_dir is \"spool\"",
		good + files + "  spool_dir: /var/lib/luks-kms-agent/spool\n": "not below state_dir",
		good + files + "  kms_key: alias/x\n":                         "is no key ARN",
		good + files + "  s3_endpoint: http://s3.example\n":           "c:6: logs.s3_endpoint",
		strings.Replace(good, "c-1", "a/b", 1) + files:                "c:2: logs.cluster is \"a/b\"",
	}) {
		if _, err := parseConfig("c", []byte(text)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %q", text, err, says)
		}
	}
}

// TestLogsStatus: status and metrics tell how the archive is doing, and an image gets none of the node's spool.
func TestLogsStatus(t *testing.T) {
	m, s, dir := withLogs(t)
	m.impatient()
	look := func() *LogsStatus {
		t.Helper()
		status, err := m.node().Status(t.Context())
		if err != nil || len(status.Problems) > 0 {
			t.Fatalf("%v, %v", status.Problems, err)
		}
		return status.Logs
	}
	m.runOK()
	if l := look(); l != nil {
		t.Errorf("before the first: %+v", l)
	}
	appendTo(t, filepath.Join(dir, "a.log"), "1\n2\n")
	s.Fail(s3test.Fault{Status: 503, Code: "SlowDown"})
	if _, err := m.node().ArchiveLogs(t.Context()); err == nil {
		t.Fatal("S3 was away, and nothing said so")
	}
	l := look()
	if l == nil || l.LastSuccess != nil || l.Waiting == 0 {
		t.Errorf("S3 is away: %+v", l)
	}
	wantMetrics(t, m, "logs_last_run_success 0", "logs_last_success_timestamp_seconds 0", fmt.Sprintf("logs_waiting_bytes %d", l.Waiting), "logs_losses 0")
	// Somebody seals an image while logs are archived, and after.
	release, err := logs.Lock(m.cfg.Logs.Spool)
	if err != nil {
		t.Fatal(err)
	}
	if seal, err := m.seal(SealOptions{Discard: true}); err != nil || len(seal.Refused) != 1 || !errors.Is(seal.Refused[0], logs.ErrLocked) {
		t.Errorf("sealed while logs were archived: %v, %v", seal.Refused, err)
	}
	release()
	s.Heal()
	appendTo(t, filepath.Join(dir, "b.log"), "1\n")
	if _, err := m.node().ArchiveLogs(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "b.log")); err != nil {
		t.Fatal(err)
	}
	if done, err := m.node().ArchiveLogs(t.Context()); err != nil || len(done.Lost) != 1 {
		t.Fatalf("%+v, %v", done, err)
	}
	if l = look(); l == nil || l.Waiting != 0 || l.Losses != 1 || l.LastSuccess == nil || time.Since(*l.LastSuccess) > time.Minute {
		t.Errorf("all is sent, and one is lost: %+v", l)
	}
	wantMetrics(t, m, "logs_last_run_success 1", "logs_last_success_timestamp_seconds "+strconv.FormatFloat(unixTime(*l.LastSuccess), 'f', -1, 64), "logs_waiting_bytes 0", "logs_losses 1")

	before := s.Keys(logBucket)
	appendTo(t, filepath.Join(dir, "a.log"), "3\n")
	s.Fail(s3test.Fault{Status: 503, Code: "SlowDown"})
	if _, err := m.node().ArchiveLogs(t.Context()); err == nil {
		t.Fatal("S3 was away, and nothing said so")
	}
	s.Heal()
	if _, err := m.node().Lock(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if seal, err := m.seal(SealOptions{Discard: true}); err != nil || len(seal.Refused) > 0 {
		t.Fatalf("%v, %v", seal.Refused, err)
	}
	if left := below(t, m.cfg.Logs.Spool); len(left) > 0 {
		t.Errorf("in the image: %v", left)
	}
	// A spool that begins anew, under the same instance id: all of it is sent, under names that nobody has.
	if _, err := m.node().ArchiveLogs(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := s.Keys(logBucket); len(after) != len(before)+1 {
		t.Errorf("%q, before %q", after, before)
	}
	// What cannot be read is told, and nobody sends what is not known.
	if err := os.WriteFile(filepath.Join(m.cfg.Logs.Spool, "positions.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	status, err := m.node().Status(t.Context())
	if err != nil || len(status.Problems) != 1 || !strings.Contains(status.Problems[0], "positions.json: unexpected end of JSON input") {
		t.Errorf("%v, %v", status.Problems, err)
	}
}

// wantMetrics wants lines of the file of metrics of the log archive.
func wantMetrics(t *testing.T, m *machine, lines ...string) {
	t.Helper()
	text, err := os.ReadFile(m.node().beside(DefaultLogMetricsPath))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines {
		if !strings.Contains(string(text), "\nluks_kms_agent_"+l+"\n") {
			t.Errorf("the metrics do not have %q:\n%s", l, text)
		}
	}
}

// busyVault knows what is on its way to S3 at a time.
type busyVault struct {
	vault
	wait int // so many pieces wait for each other
	all  chan struct{}

	mu                             sync.Mutex
	pieces, bytes, most, mostBytes int
}

func (v *busyVault) Put(ctx context.Context, name string, data []byte, metadata map[string]string) (archive.Object, error) {
	v.mu.Lock()
	v.pieces, v.bytes = v.pieces+1, v.bytes+len(data)
	v.most, v.mostBytes = max(v.most, v.pieces), max(v.mostBytes, v.bytes)
	if v.pieces == v.wait {
		close(v.all)
	}
	v.mu.Unlock()
	if v.wait > 0 {
		select {
		case <-v.all:
		case <-time.After(20 * time.Second):
		}
	}
	o, err := v.vault.Put(ctx, name, data, metadata)
	v.mu.Lock()
	v.pieces, v.bytes = v.pieces-1, v.bytes-len(data)
	v.mu.Unlock()
	return o, err
}

// TestPiecesAreSentTogether, but not more of them than there is memory for; and where one is not taken the others count.
func TestPiecesAreSentTogether(t *testing.T) {
	busy := func(m *machine, wait int) (*Node, *busyVault) {
		n, v := m.node(), &busyVault{wait: wait, all: make(chan struct{})}
		open := n.vault
		n.vault = func(ctx context.Context, o archive.Options) (_ vault, err error) {
			v.vault, err = open(ctx, o)
			return v, err
		}
		return n, v
	}
	m, s, dir := withLogs(t)
	var want strings.Builder
	for i := range piecesAtOnce {
		appendTo(t, filepath.Join(dir, fmt.Sprintf("small%d.log", i)), fmt.Sprintf("line %d\n", i))
		fmt.Fprintf(&want, "line %d\n", i)
	}
	n, v := busy(m, piecesAtOnce)
	if done, err := n.ArchiveLogs(t.Context()); err != nil || done.Pieces != piecesAtOnce || v.most != piecesAtOnce {
		t.Errorf("%+v, %v, at most %d at a time", done, err, v.most)
	}
	if text := m.archived(s); text != want.String() {
		t.Errorf("in the archive is %q", text)
	}

	// Noise: no two of these fit.
	noise := make([]byte, 5<<20)
	for i := range 3 {
		if _, err := rand.Read(noise); err != nil {
			t.Fatal(err)
		}
		appendTo(t, filepath.Join(dir, fmt.Sprintf("large%d.log", i)), base64.StdEncoding.EncodeToString(noise)+"\n")
	}
	n, v = busy(m, 0)
	if done, err := n.ArchiveLogs(t.Context()); err != nil || done.Pieces != 3 || v.mostBytes > pieceMemory || v.most != 1 {
		t.Errorf("%+v, %v, at most %d bytes of %d pieces at a time", done, err, v.mostBytes, v.most)
	}

	// One of four is not taken.
	for i := range piecesAtOnce {
		appendTo(t, filepath.Join(dir, fmt.Sprintf("small%d.log", i)), fmt.Sprintf("more %d\n", i))
	}
	before := len(s.Keys(logBucket))
	s.Fail(s3test.Fault{Op: "PutObject", Code: "AccessDenied", Status: 403, Times: 1})
	done, err := m.node().ArchiveLogs(t.Context())
	if e := (*archive.Error)(nil); !errors.As(err, &e) || e.Reason != archive.ReasonDenied || done.Pieces != piecesAtOnce-1 || done.Waiting == 0 {
		t.Errorf("%+v, %v", done, err)
	}
	if done, err := m.node().ArchiveLogs(t.Context()); err != nil || done.Pieces != 1 || done.Waiting != 0 || len(s.Keys(logBucket)) != before+piecesAtOnce {
		t.Errorf("%+v, %v, %d objects", done, err, len(s.Keys(logBucket))-before)
	}
	text := m.archived(s)
	for i := range piecesAtOnce {
		if got := strings.Count(text, fmt.Sprintf("more %d\n", i)); got != 1 {
			t.Errorf("line %d is in the archive %d times", i, got)
		}
	}
}

// BenchmarkLogs sends 24 pieces to an S3 that takes 50 ms for each call, one after the other and as many at a time as ArchiveLogs does.
func BenchmarkLogs(b *testing.B) {
	m, s, dir := withLogs(b)
	round := 0
	sendAll := func(atOnce int) (whole, sending time.Duration) {
		round++
		for i := range 24 {
			appendTo(b, filepath.Join(dir, fmt.Sprintf("%02d.log", i)), strings.Repeat(fmt.Sprintf("round %d of a line of a log\n", round), 1000))
		}
		n := m.node()
		start := time.Now()
		var first time.Time
		n.Progress = func(text string) {
			if first.IsZero() && strings.HasPrefix(text, "Sending") {
				first = time.Now()
			}
		}
		if done, err := n.archiveLogs(b.Context(), atOnce); err != nil || done.Pieces != 24 {
			b.Fatalf("%+v, %v", done, err)
		}
		end := time.Now()
		return end.Sub(start), end.Sub(first)
	}
	s.Fail(s3test.Fault{Delay: 50 * time.Millisecond})
	compareAtOnce(b, piecesAtOnce, sendAll)
}
