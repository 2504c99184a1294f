package agent

import (
	"context"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/s3test"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// inspected is a machine that a preflight is to look at.
type inspected struct {
	*machine
	// What systemd and cloud-init say; a test changes it before it runs.
	units     systemd.Facts
	cloudInit volumes.CloudInitFacts
	cipher    error
	tool      error // of cryptsetup's version
	replaces  error
	memory    error
}

func newInspected(t *testing.T) *inspected { return inspect(newMachine(t)) }

func inspect(on *machine) *inspected {
	t, m := on.t, &inspected{machine: on}
	m.cfg.RetryLimit = -1
	m.cfg.Path = filepath.Join(m.dir, "config.yaml")
	if err := os.WriteFile(m.cfg.Path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.units = systemd.Facts{
		Version: 252, VersionText: "252 (252.39-1~deb12u1)",
		Service: systemd.UnitFacts{Name: "luks-kms-agent.service", Load: "loaded", File: "enabled", Fragment: "/x", Active: "inactive", LockedMemory: math.MaxUint64},
		Target:  systemd.UnitFacts{Name: "luks-kms-agent.target", Load: "loaded", File: "static"},
	}
	return m
}

// preflight is one as a new process would make it.
func (m *inspected) preflight() *Preflight {
	m.t.Helper()
	return &Preflight{
		path: m.cfg.Path, node: m.node(),
		protect:   func() error { return m.memory },
		systemd:   func(context.Context) (systemd.Facts, error) { return m.units, nil },
		cloudInit: func() (volumes.CloudInitFacts, error) { return m.cloudInit, nil },
		cipher:    func() (string, error) { return "xts-aes-aesni", m.cipher },
		version:   func(context.Context) (string, error) { return "cryptsetup 2.6.1", m.tool },
		replaces:  func(context.Context) error { return m.replaces },
	}
}

// check runs the preflight and returns the checks by name.
func (m *inspected) check() map[string]Check {
	m.t.Helper()
	checks := map[string]Check{}
	for _, c := range m.preflight().Run(m.t.Context()) {
		if (c.Err != nil) != (c.Result == CheckWarning || c.Result == CheckFailure) || c.Detail == "" {
			m.t.Errorf("%s is %s, with the error %v and %q", c.Name, c.Result, c.Err, c.Detail)
		}
		checks[c.Name] = c
	}
	return checks
}

// state is every file below the machine's folder with its size, mode and time of change.
func (m *inspected) state() string {
	m.t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(m.dir, func(path string, _ fs.DirEntry, err error) error {
		if filepath.Dir(m.cfg.AuditLog) == path {
			return fs.SkipDir // it tells of each use of a data key
		}
		if path == m.dir {
			return err // where that is made
		}
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err == nil {
			b.WriteString(path + " " + info.Mode().String() + " " + info.ModTime().String() + "\n")
		}
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return b.String()
}

func TestPreflightTouchesNothing(t *testing.T) {
	m := newInspected(t)
	m.disk(volumes.ClassInstanceStore, "ssd1")
	for _, when := range []string{"before the first run", "after it"} {
		sums, state, calls := m.sums(), m.state(), len(m.kms.Calls())
		for name, c := range m.check() {
			if c.Result != CheckOK {
				t.Errorf("%s: %s is %s: %s", when, name, c.Result, c.Detail)
			}
		}
		m.untouched(sums)
		if now := m.state(); now != state {
			t.Errorf("%s: files were\n%s\nand are\n%s", when, state, now)
		}
		var ops []string
		for _, c := range m.kms.Calls()[calls:] {
			ops = append(ops, c.Op)
		}
		if !slices.Equal(ops, []string{"DescribeKey", "GenerateDataKey", "Decrypt"}) {
			t.Errorf("%s: KMS was asked for %v", when, ops)
		}
		m.cfg.RetryLimit = time.Minute
		m.runOK()
		m.cfg.RetryLimit = -1
	}
}

func TestPreflightFinds(t *testing.T) {
	configured := func(err error) bool {
		var e *ConfigError
		return errors.As(err, &e)
	}
	key := func(s kmstest.KeySpec) func(*inspected) {
		return func(m *inspected) { m.cfg.KMSKey = m.kms.NewKey(s) }
	}
	deny := func(op string) func(*inspected) { return func(m *inspected) { m.kms.Deny(op) } }
	for name, c := range map[string]struct {
		breaks  func(*inspected)
		check   string
		result  CheckResult
		err     func(error) bool
		says    string
		skipped []string // everything else is ok
	}{
		"IMDS off": {func(m *inspected) { m.imds.Set(kmstest.Off) }, "instance metadata", CheckFailure, reason(keycache.ReasonIMDS), "403",
			[]string{"credentials", "region", "KMS endpoint", "KMS key", "data key"}},
		"no role": {func(m *inspected) { m.imds.Set(kmstest.NoRole) }, "credentials", CheckFailure, reason(keycache.ReasonNoCredentials), "404",
			[]string{"KMS key", "data key"}},
		"role fails": {func(m *inspected) { m.imds.Set(kmstest.RoleFails) }, "credentials", CheckFailure, reason(keycache.ReasonNoCredentials), "AssumeRole",
			[]string{"KMS key", "data key"}},
		"key of another region": {func(m *inspected) { m.cfg.KMSKey = strings.Replace(m.cfg.KMSKey, kmstest.Region, "eu-north-1", 1) },
			"region", CheckFailure, reason(keycache.ReasonWrongRegion), "eu-north-1", []string{"KMS endpoint", "KMS key", "data key"}},
		"node in another region": {func(m *inspected) { m.cfg.Region = kmstest.Region; m.imds.SetIdentity("region", "eu-north-1") },
			"region", CheckWarning, is(ErrOtherRegion), "the node in eu-north-1", nil},
		"nobody at the endpoint": {func(m *inspected) { m.cfg.KMSEndpoint = "http://127.0.0.1:1" },
			"KMS endpoint", CheckFailure, reason(keycache.ReasonUnavailable), "cannot reach KMS at http://127.0.0.1:1: dial tcp", []string{"KMS key", "data key"}},
		"no such name": {func(m *inspected) { m.cfg.KMSEndpoint = "https://kms..invalid" },
			"KMS endpoint", CheckFailure, reason(keycache.ReasonUnavailable), "lookup kms..invalid", []string{"KMS key", "data key"}},
		"clock a little off": {func(m *inspected) { m.kms.SetClock(2 * time.Minute) }, "clock", CheckWarning, is(ErrClockOff), "2m0s behind KMS's", nil},
		"clock off": {func(m *inspected) { m.kms.SetClock(-6 * time.Minute) }, "clock", CheckFailure, reason(keycache.ReasonClock), "6m0s ahead of KMS's",
			[]string{"KMS key", "data key"}},

		"DescribeKey denied": {deny("DescribeKey"), "KMS key", CheckWarning, is(ErrMayNotDescribe), "arn:aws:kms", nil},
		"disabled key":       {key(kmstest.KeySpec{State: kmstest.Disabled}), "KMS key", CheckFailure, reason(keycache.ReasonKeyState), "Disabled", []string{"data key"}},
		"key of AWS's":       {key(kmstest.KeySpec{Manager: "AWS"}), "KMS key", CheckFailure, reason(keycache.ReasonAWSManaged), "its manager is AWS", []string{"data key"}},
		"asymmetric key": {key(kmstest.KeySpec{Spec: "RSA_2048", Usage: "ENCRYPT_DECRYPT"}), "KMS key", CheckFailure, reason(keycache.ReasonAsymmetric),
			"RSA_2048", []string{"data key"}},
		"no such key":            {func(m *inspected) { m.cfg.KMSKey = "alias/none" }, "KMS key", CheckFailure, reason(keycache.ReasonNotFound), "alias/none", []string{"data key"}},
		"GenerateDataKey denied": {deny("GenerateDataKey"), "data key", CheckFailure, reason(keycache.ReasonDenied), "cannot generate a data key under arn:", nil},
		"Decrypt denied":         {deny("Decrypt"), "data key", CheckFailure, reason(keycache.ReasonDenied), "cannot decrypt the wrapped key under arn:", nil},
		"another key decrypted": {func(m *inspected) {
			m.kms.Fail(kmstest.Fault{Op: "Decrypt", Rewrite: func(a map[string]any) { a["Plaintext"] = []byte(strings.Repeat("k", 32)) }})
		}, "data key", CheckFailure, is(keycache.ErrOtherKey), "another key", nil},

		"no dm-crypt": {func(m *inspected) {
			m.fail = func(step, _ string) error {
				if step == "kernel" {
					return luks.ErrNoDMCrypt
				}
				return nil
			}
		}, "kernel", CheckFailure, is(luks.ErrNoDMCrypt), "dm-crypt", nil},
		"no AES-XTS":    {func(m *inspected) { m.cipher = luks.ErrNoCipher }, "kernel", CheckFailure, is(luks.ErrNoCipher), "AES-XTS", nil},
		"no cryptsetup": {func(m *inspected) { m.tool = luks.ErrNoCryptsetup }, "cryptsetup version", CheckFailure, is(luks.ErrNoCryptsetup), "too old", nil},
		"cryptsetup without --token-replace": {func(m *inspected) { m.replaces = luks.ErrNoCryptsetup },
			"cryptsetup version", CheckWarning, is(ErrNoReplace), "cryptsetup 2.6.1; this cryptsetup cannot replace tokens", nil},
		"no mkfs": {func(m *inspected) { m.cfg.Filesystem = "nofs" }, "filesystem", CheckFailure, is(volumes.ErrNoProgram), "mkfs.nofs", nil},
		"no mkfs of a volume": {func(m *inspected) { m.cfg.Volumes = []VolumeConfig{{Name: "vol-1", Filesystem: "nofs"}} },
			"filesystem", CheckFailure, is(volumes.ErrNoProgram), "mkfs.nofs", nil},

		"state directory open to others": {func(m *inspected) { m.makeStateDir(0o755) }, "state directory", CheckFailure, isA[*keycache.StoreError], "0755", nil},
		"state directory is a link": {func(m *inspected) {
			if err := os.Symlink(m.dir, m.cfg.StateDir); err != nil {
				m.t.Fatal(err)
			}
		}, "state directory", CheckFailure, configured, "symbolic link", nil},
		"state directory in a file": {func(m *inspected) { m.cfg.StateDir = filepath.Join(m.cfg.Path, "state") },
			"state directory", CheckFailure, is(syscall.ENOTDIR), "not a directory", nil},
		"state directory on a volume that it opens": {func(m *inspected) { m.holdStateDir(volumes.Mapping{Name: "luks-1"}) },
			"state directory", CheckFailure, configured, "only its records can open", nil},
		"state directory elsewhere": {func(m *inspected) { m.holdStateDir() }, "state directory", CheckWarning, is(ErrNotOnBoot), "vol-1", nil},

		"old systemd":           {func(m *inspected) { m.units.Version = 243 }, "systemd", CheckFailure, is(ErrOldSystemd), "needed is 244", []string{"service"}},
		"no service":            {func(m *inspected) { m.units.Service.Load = "not-found" }, "service", CheckFailure, is(ErrNoUnit), "luks-kms-agent.service is not-found", nil},
		"no target":             {func(m *inspected) { m.units.Target.Load = "masked" }, "service", CheckFailure, is(ErrNoUnit), "luks-kms-agent.target is masked", nil},
		"service is off":        {func(m *inspected) { m.units.Service.File = "disabled" }, "service", CheckWarning, is(ErrNotEnabled), "disabled", nil},
		"unit not read":         {func(m *inspected) { m.units.Target.NeedsReload = true }, "service", CheckWarning, is(ErrNotReloaded), "/x", nil},
		"cloud-init":            {func(m *inspected) { m.cloudInit.Installed = true }, "cloud-init", CheckWarning, is(ErrCloudInit), "ephemeral0", nil},
		"cloud-init does":       {func(m *inspected) { m.cloudInit.Line = "/dev/x /mnt" }, "cloud-init", CheckWarning, is(ErrCloudInit), "/dev/x /mnt", nil},
		"memory":                {func(m *inspected) { m.memory = syscall.ENOMEM }, "memory", CheckWarning, is(ErrUnprotected), "cannot allocate memory", nil},
		"memory of the service": {func(m *inspected) { m.units.Service.LockedMemory = 65536 }, "memory", CheckWarning, is(ErrUnprotected), "LimitMEMLOCK=65536", nil},
	} {
		t.Run(name, func(t *testing.T) {
			m := newInspected(t)
			c.breaks(m)
			state := m.state()
			for name, got := range m.check() {
				want := CheckOK
				switch {
				case name == c.check:
					want = c.result
					if !c.err(got.Err) || !strings.Contains(got.Detail, c.says) {
						t.Errorf("%s: %q (%#v), want %q", name, got.Detail, got.Err, c.says)
					}
				case slices.Contains(c.skipped, name):
					want = CheckSkipped
				}
				if got.Result != want {
					t.Errorf("%s is %s, want %s: %s", name, got.Result, want, got.Detail)
				}
			}
			if now := m.state(); now != state {
				t.Errorf("files were\n%s\nand are\n%s", state, now)
			}
		})
	}
}

// TestPreflightOfArchives: the key and the bucket of the escrow and of the logs are looked at, nothing is put there, and no data key is
// asked for under those keys.
func TestPreflightOfArchives(t *testing.T) {
	ofS3 := func(r archive.Reason) func(error) bool {
		return func(err error) bool {
			var e *archive.Error
			return errors.As(err, &e) && e.Reason == r
		}
	}
	nothing := func(err error) bool { return err == nil }
	type at struct { // a section
		m      *inspected
		s      *s3test.S3
		bucket *string
		key    *string
	}
	key := func(k kmstest.KeySpec) func(at) { return func(a at) { *a.key = a.m.kms.NewKey(k) } }
	enforce := func(name string) func(at) {
		return func(a at) {
			role := a.m.shippedPolicy(kmstest.RolePolicy, name, "", shippedLogsKey, a.m.cfg.Logs.KMSKey, shippedEscrowKey, a.m.cfg.Escrow.KMSKey)
			node := a.m.shippedPolicy(kmstest.RolePolicy, "node-role", "")
			a.m.kms.Enforce(&kmstest.Access{Role: []*kmstest.Policy{node, role}})
		}
	}
	for name, c := range map[string]struct {
		breaks func(at)
		check  string // behind the section's name
		result CheckResult
		err    func(error) bool
		says   string
	}{
		"good":              {func(at) {}, "key", CheckOK, nothing, "customer managed, SYMMETRIC_DEFAULT, Enabled"},
		"good bucket":       {func(at) {}, "bucket", CheckOK, nothing, "can be listed"},
		"configure-role":    {enforce("configure-role"), "key", CheckOK, nothing, "customer managed, SYMMETRIC_DEFAULT, Enabled"},
		"the node's role":   {enforce("log-role"), "key", CheckSkipped, nothing, "the role may not call DescribeKey: the key's kind and state are not known (arn:"},
		"disabled key":      {key(kmstest.KeySpec{State: kmstest.Disabled}), "key", CheckFailure, reason(keycache.ReasonKeyState), "Disabled"},
		"key of AWS's":      {key(kmstest.KeySpec{Manager: "AWS"}), "key", CheckFailure, reason(keycache.ReasonAWSManaged), "its manager is AWS"},
		"asymmetric key":    {key(kmstest.KeySpec{Spec: "RSA_2048", Usage: "ENCRYPT_DECRYPT"}), "key", CheckFailure, reason(keycache.ReasonAsymmetric), "RSA_2048"},
		"no such key":       {func(a at) { *a.key = (*a.key)[:len(*a.key)-12] + "000000000000" }, "key", CheckFailure, reason(keycache.ReasonNotFound), "cannot describe"},
		"no such bucket":    {func(a at) { *a.bucket = "others" }, "bucket", CheckFailure, ofS3(archive.ReasonNoBucket), "cannot list s3://others/"},
		"bucket elsewhere":  {func(a at) { a.s.NewBucket(*a.bucket, s3test.Bucket{Region: "eu-west-1"}) }, "bucket", CheckFailure, ofS3(archive.ReasonWrongRegion), "eu-west-1"},
		"somebody's bucket": {func(a at) { a.s.NewBucket(*a.bucket, s3test.Bucket{Owner: "999999999999"}) }, "bucket", CheckWarning, is(ErrMayNotList), "AccessDenied"},
		"may not list":      {func(a at) { a.s.Deny("ListObjectsV2") }, "bucket", CheckWarning, is(ErrMayNotList), "is not authorized to perform: s3:ListBucket"},
	} {
		for _, section := range []string{"escrow", "logs"} {
			t.Run(section+" "+name, func(t *testing.T) {
				plain, s := withEscrow(t, archive.CSE)
				s.NewBucket(logBucket, s3test.Bucket{})
				plain.archiveLogsTo(s, t.TempDir())
				plain.cfg.Escrow.Owner, plain.cfg.Logs.Owner = s3test.Account, s3test.Account
				m := inspect(plain)
				a := at{m, s, &m.cfg.Escrow.Bucket, &m.cfg.Escrow.KMSKey}
				if section == "logs" {
					a = at{m, s, &m.cfg.Logs.Bucket, &m.cfg.Logs.KMSKey}
				}
				c.breaks(a)
				checks := m.check()
				got, ok := checks[section+" "+c.check]
				if !ok || got.Result != c.result || !c.err(got.Err) || !strings.Contains(got.Detail, c.says) {
					t.Errorf("%+v", got)
				}
				for _, other := range checks {
					if alike := other.Result == c.result && strings.HasSuffix(other.Name, " "+c.check); other.Result != CheckOK && !alike {
						t.Errorf("%s is %s: %s", other.Name, other.Result, other.Detail)
					}
				}
				if objects := slices.Concat(s.Keys(escrowBucket), s.Keys(logBucket)); len(objects) > 0 {
					t.Errorf("in the buckets there are %v", objects)
				}
				for _, call := range m.kms.Calls() {
					if call.Op != "DescribeKey" && call.KeyID != m.kms.ARN() {
						t.Errorf("KMS was asked for %s of %s", call.Op, call.KeyID)
					}
				}
			})
		}
	}
}

// TestPreflightAsksNoArchive that is not configured, and none under a clock that is off.
func TestPreflightAsksNoArchive(t *testing.T) {
	plain, s, _ := withLogs(t)
	m := inspect(plain)
	logs := m.cfg.Logs
	m.cfg.Logs = LogsConfig{}
	for name := range m.check() {
		if strings.HasPrefix(name, "escrow") || strings.HasPrefix(name, "logs") {
			t.Errorf("there is a check %s", name)
		}
	}
	m.cfg.Logs = logs
	m.kms.SetClock(-6 * time.Minute)
	checks := m.check()
	for _, name := range []string{"logs key", "logs bucket"} {
		if c := checks[name]; c.Result != CheckSkipped || !strings.Contains(c.Detail, "clock") {
			t.Errorf("%+v", c)
		}
	}
	if calls := s.Calls(); len(calls) > 0 {
		t.Errorf("S3 was asked %+v", calls)
	}
}

func reason(r keycache.Reason) func(error) bool {
	return func(err error) bool {
		var e *keycache.Error
		return errors.As(err, &e) && e.Reason == r
	}
}

func is(want error) func(error) bool { return func(err error) bool { return errors.Is(err, want) } }

// isA says whether an error has that type.
func isA[E error](err error) bool {
	var e E
	return errors.As(err, &e)
}

func (m *inspected) makeStateDir(mode fs.FileMode) {
	m.t.Helper()
	if err := errors.Join(os.Mkdir(m.cfg.StateDir, 0o700), os.Chmod(m.cfg.StateDir, mode)); err != nil {
		m.t.Fatal(err)
	}
}

// holdStateDir puts the state directory on a volume of its own, which may be under mappings.
func (m *inspected) holdStateDir(mappings ...volumes.Mapping) {
	m.disk(volumes.ClassEBS, "vol-1")
	d := &m.devices[0]
	d.Uses = []volumes.Use{{Kind: volumes.UseSystem, What: m.cfg.StateDir}}
	d.Mappings = mappings
}

// TestPreflightWipesItsKeys: both data keys, also where they differ, and when nothing else runs any more.
func TestPreflightWipesItsKeys(t *testing.T) {
	m := newInspected(t)
	m.kms.Fail(kmstest.Fault{Op: "Decrypt", Rewrite: func(a map[string]any) { a["Plaintext"] = []byte(strings.Repeat("k", 32)) }})
	p := m.preflight()
	var wiped []*keycache.Key
	before := -1 // calls of KMS when memory was protected
	p.protect = func() error { before = len(m.kms.Calls()); return nil }
	p.node.wipeKeys = func(keys ...*keycache.Key) error { wiped = append(wiped, keys...); return nil }
	p.Run(t.Context())
	if before != 0 {
		t.Errorf("memory was protected after %d calls of KMS", before)
	}
	if len(wiped) != 2 || wiped[0].Bytes() == nil {
		t.Errorf("%d keys were handed over to be wiped, want 2", len(wiped))
	}
	for _, k := range wiped {
		k.Wipe()
	}
}

// TestPreflightOfABadConfiguration: what does not need the configuration is looked at all the same.
func TestPreflightOfABadConfiguration(t *testing.T) {
	p := NewPreflight(filepath.Join(t.TempDir(), "absent.yaml"), nil, Program{})
	p.protect = func() error { return nil }
	for _, c := range p.Run(t.Context()) {
		switch c.Name {
		case "configuration":
			if c.Result != CheckFailure || !errors.Is(c.Err, fs.ErrNotExist) {
				t.Errorf("%+v", c)
			}
		case "kernel", "cryptsetup version", "systemd", "service", "cloud-init", "memory":
		default:
			if c.Result != CheckSkipped {
				t.Errorf("%s is %s: %s", c.Name, c.Result, c.Detail)
			}
		}
	}
}
