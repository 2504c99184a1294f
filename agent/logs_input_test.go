package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// TestLogsOfBadInput: whatever is wrong with the bucket, the key or the way there, the message names the place and the cause, what was read waits in the spool
// beside what comes meanwhile, and once it is well all of it is there once.
//
// What the client does by itself, for the escrow too, is tried in archive: a fault that passes while it tries again (TestFaults: a clock that is off, 503 twice,
// a slow server), an answer that ends early (TestCutAnswers), a second PUT into a bucket with Object Lock (TestObjectLock), malformed options (TestCheck). Each
// permission that is missing: TestLogsNeedWhatIsDocumented. A key that is disabled, and a server that does not encrypt: TestLogsWait.
func TestLogsOfBadInput(t *testing.T) {
	const object = "s3://" + logBucket + "/logs/c-1/node/" + kmstest.InstanceID + "/files/"
	type change func(*machine, *s3test.S3)
	fault := func(f s3test.Fault) change { return func(_ *machine, s *s3test.S3) { s.Fail(f) } }
	bucket := func(b s3test.Bucket) change { return func(_ *machine, s *s3test.S3) { s.NewBucket(logBucket, b) } }
	logs := func(edit func(*LogsConfig)) change { return func(m *machine, _ *s3test.S3) { edit(&m.cfg.Logs) } }
	key := func(from, to string) change {
		return logs(func(l *LogsConfig) { l.KMSKey = strings.Replace(l.KMSKey, from, to, 1) })
	}
	ours := "" // the key, while AWS's is in its place
	for name, c := range map[string]struct {
		fail, heal change // heal beside what S3, KMS and IMDS do by themselves
		reason     archive.Reason
		says       []string
		patience   time.Duration // of who stops it, as a shutdown does; 0 is for ever
	}{
		"no such bucket": {logs(func(l *LogsConfig) { l.Bucket = "others" }), logs(func(l *LogsConfig) { l.Bucket = logBucket }),
			archive.ReasonNoBucket, []string{"cannot put s3://others/logs/", "NoSuchBucket"}, 0},
		"no name of a bucket": {logs(func(l *LogsConfig) { l.Bucket = "Others" }), logs(func(l *LogsConfig) { l.Bucket = logBucket }),
			archive.ReasonInvalid, []string{`cannot use bucket Others: "Others" is no bucket's name`}, 0},
		"a bucket of another region": {bucket(s3test.Bucket{Region: "eu-west-1"}), bucket(s3test.Bucket{}),
			archive.ReasonWrongRegion, []string{object, "the bucket is in region eu-west-1, not " + s3test.Region}, 0},
		"a bucket of another account": {func(m *machine, s *s3test.S3) {
			m.cfg.Logs.Owner = s3test.Account
			s.NewBucket(logBucket, s3test.Bucket{Owner: "999999999999"})
		}, bucket(s3test.Bucket{}), archive.ReasonDenied, []string{object, "AccessDenied"}, 0},
		"a key of another region": {key(s3test.Region, "eu-west-1"), key("eu-west-1", s3test.Region),
			archive.ReasonWrongRegion, []string{"cannot use bucket " + logBucket, "its region is " + s3test.Region, ":kms:eu-west-1:", "S3 takes keys of its own region only"}, 0},
		"a key that is not there": {key(":key/", ":key/0"), key(":key/0", ":key/"), archive.ReasonKey, []string{object, "KMS.NotFoundException"}, 0},
		"AWS's key": {logs(func(l *LogsConfig) { ours, l.KMSKey = l.KMSKey, "alias/aws/s3" }), logs(func(l *LogsConfig) { l.KMSKey = ours }),
			archive.ReasonAWSManaged, []string{"cannot use bucket " + logBucket, "alias/aws/s3 is an AWS managed key"}, 0},
		"something else is locked there": {func(m *machine, s *s3test.S3) {
			s.NewBucket(logBucket, s3test.Bucket{ObjectLock: true})
			s.Deny("PutObject")
			if _, err := m.node().ArchiveLogs(t.Context()); err == nil {
				t.Fatal("S3 said no, and nothing said so")
			}
			s.Heal()
			positions, err := os.ReadFile(filepath.Join(m.cfg.Logs.Spool, "positions.json"))
			name := regexp.MustCompile(`"name": "(files/[^"]+)"`).FindSubmatch(positions) // only the spool knows it
			if err != nil || name == nil {
				t.Fatalf("%s, %v", positions, err)
			}
			s.Add(logBucket, "logs/c-1/node/"+kmstest.InstanceID+"/"+string(name[1]), []byte("theirs"), nil)
		}, bucket(s3test.Bucket{}), archive.ReasonExists, []string{object, "PreconditionFailed"}, 0},
		"Object Lock that wants more": {fault(s3test.Fault{Op: "PutObject", Code: "InvalidRequest"}), nil, archive.ReasonInvalid, []string{object, "InvalidRequest"}, 0},
		"a clock that stays off": {fault(s3test.Fault{Code: "RequestTimeTooSkewed", Status: 403}), nil,
			archive.ReasonClock, []string{object, "RequestTimeTooSkewed"}, 0},
		"503 SlowDown": {fault(s3test.Fault{Code: "SlowDown", Status: 503}), nil, archive.ReasonUnavailable, []string{object, "SlowDown"}, 0},
		"KMS throttles": {func(m *machine, _ *s3test.S3) {
			m.kms.Fail(kmstest.Fault{Op: "GenerateDataKey", Code: "ThrottlingException"})
		}, nil,
			archive.ReasonUnavailable, []string{object, "SlowDown", "KMS"}, 0},
		"connections are cut":    {fault(s3test.Fault{Cut: true}), nil, archive.ReasonUnavailable, []string{object, ": Put \"http://"}, 0},
		"the answers are lost":   {fault(s3test.Fault{Op: "PutObject", Lost: true}), nil, archive.ReasonUnavailable, []string{object, ": Put \"http://"}, 0},
		"the HEAD is cut":        {fault(s3test.Fault{Op: "HeadObject", Cut: true}), nil, archive.ReasonUnavailable, []string{"cannot read the properties of " + object, ": Head \"http://"}, 0},
		"no answer, at shutdown": {fault(s3test.Fault{Hang: true}), nil, archive.ReasonUnavailable, []string{object, "context deadline exceeded"}, 5 * time.Second},
		"too slow, at shutdown":  {fault(s3test.Fault{Delay: time.Minute}), nil, archive.ReasonUnavailable, []string{object, "context deadline exceeded"}, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			m, s, dir := withLogs(t)
			file := filepath.Join(dir, "a.log")
			appendTo(t, file, "1\n2\n")
			c.fail(m, s)
			ctx := t.Context()
			if c.patience > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, c.patience)
				defer cancel()
			}
			done, err := m.node().ArchiveLogs(ctx)
			var e *archive.Error
			if !errors.As(err, &e) || e.Reason != c.reason || done.Pieces != 0 || done.Waiting == 0 || done.Lost != nil {
				t.Fatalf("%+v, %v, want %s", done, err, c.reason)
			}
			for _, says := range c.says {
				if !strings.Contains(e.Error(), says) {
					t.Errorf("%q does not say %q", e, says)
				}
			}
			appendTo(t, file, "3\n")
			s.Heal()
			m.kms.Heal()
			if c.heal != nil {
				c.heal(m, s)
			}
			done, err = m.node().ArchiveLogs(t.Context())
			if err != nil || done.Pieces != 2 || done.Lines != 3 || done.Waiting != 0 || done.Lost != nil {
				t.Errorf("once it is well: %+v, %v", done, err)
			}
			if done, err = m.node().ArchiveLogs(t.Context()); err != nil || done.Pieces != 0 {
				t.Errorf("again: %+v, %v", done, err)
			}
			if got := m.archived(s); got != "1\n2\n3\n" || len(s.Keys(logBucket)) != 2 {
				t.Errorf("there is %q in %v", got, s.Keys(logBucket))
			}
		})
	}
}

// TestLogsAreCutInTheMiddle: of several pieces those that S3 has are not sent again, and those behind the cut are, in their order.
func TestLogsAreCutInTheMiddle(t *testing.T) {
	m, s, dir := withLogs(t)
	want := ""
	for i := range 4 {
		line := fmt.Sprintf("line %d\n", i)
		want += line
		appendTo(t, filepath.Join(dir, fmt.Sprintf("%d.log", i)), line)
	}
	s.Fail(s3test.Fault{Op: "PutObject", Delay: time.Millisecond, Times: 2}) // two go through
	s.Fail(s3test.Fault{Op: "PutObject", Cut: true})
	done, err := m.node().ArchiveLogs(t.Context())
	var e *archive.Error
	if !errors.As(err, &e) || e.Reason != archive.ReasonUnavailable || done.Pieces != 2 || done.Waiting == 0 {
		t.Fatalf("%+v, %v", done, err)
	}
	there := s.Keys(logBucket)
	s.Heal()
	puts := s.Count("PutObject")
	if done, err = m.node().ArchiveLogs(t.Context()); err != nil || done.Pieces != 2 || done.Waiting != 0 || s.Count("PutObject") != puts+2 {
		t.Errorf("%+v, %v, after %d PUTs", done, err, s.Count("PutObject")-puts)
	}
	if got := m.archived(s); got != want || len(there) != 2 || len(s.Keys(logBucket)) != 4 {
		t.Errorf("there is %q in %v, was in %v", got, s.Keys(logBucket), there)
	}
}
