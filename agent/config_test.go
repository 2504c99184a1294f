package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const testKey = "arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321"

func writeConfig(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSmallestConfigIsOneLine(t *testing.T) {
	cfg, err := LoadConfig(writeConfig(t, "kms_key: "+testKey+"\n", 0o644))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.KMSKey != testKey || cfg.KeyScope != ScopeNode || cfg.Filesystem != "xfs" || cfg.InstanceStore != PolicyFormat ||
		cfg.EBS != PolicyFormat || cfg.RetryLimit != 10*time.Minute || cfg.StateDir != "/var/lib/luks-kms-agent" {
		t.Errorf("unexpected defaults: %+v", cfg)
	}
}

func TestEveryFieldIsRead(t *testing.T) {
	cfg, err := LoadConfig(writeConfig(t, `
kms_key: alias/data
region: eu-west-1
kms_endpoint: https://vpce-1.kms.eu-west-1.vpce.example
imds_endpoint: http://169.254.169.254
key_scope: volume
filesystem: ext4
instance_store: unlock
ebs: ignore
volumes:
  - name: /dev/loop0
    mount_point: /data
    filesystem: xfs
  - name: vol-0123456789abcdef0
exclude: [ /dev/nvme5n1 ]
retry_limit: 90s
call_timeout: 3s
workqueues: off
state_dir: /srv/state
audit_log: /srv/log/audit.jsonl
allowed_keys:
  - `+testKey+`
device_wait: 0s
multi_attach: allow
stripe_instance_store: on
escrow:
  bucket: my-escrow
  prefix: nodes/
  mode: cse-kms
  kms_key: `+testKey+`
  region: eu-west-1
  bucket_owner: "111122223333"
  s3_endpoint: https://s3.example
  required: true
logs:
  bucket: my-logs
  prefix: l/
  cluster: c-1
  kms_key: `+testKey+`
  region: us-east-1
  bucket_owner: "111122223333"
  s3_endpoint: https://s3.example
  files: [ /var/log/*.log ]
  units: [ kubelet.service ]
  spool_dir: /srv/spool
  max_spool_mib: 64
  rate_mib_per_second: 8
`, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Path = ""
	want := Config{
		KMSKey: "alias/data", Region: "eu-west-1", KMSEndpoint: "https://vpce-1.kms.eu-west-1.vpce.example",
		IMDSEndpoint: "http://169.254.169.254", KeyScope: ScopeVolume, Filesystem: "ext4", InstanceStore: PolicyUnlock, EBS: PolicyIgnore,
		Volumes: []VolumeConfig{{"/dev/loop0", "/data", "xfs"}, {Name: "vol-0123456789abcdef0"}},
		Exclude: []string{"/dev/nvme5n1"}, RetryLimit: 90 * time.Second, CallTimeout: 3 * time.Second,
		Workqueues: "off", StateDir: "/srv/state", AuditLog: "/srv/log/audit.jsonl", AllowedKeys: []string{testKey}, MultiAttach: MultiAttachAllow, Stripe: On,
		Escrow: EscrowConfig{Bucket: "my-escrow", Prefix: "nodes/", Mode: "cse-kms", KMSKey: testKey, Region: "eu-west-1", Owner: "111122223333", Endpoint: "https://s3.example", Required: true},
		Logs:   LogsConfig{Bucket: "my-logs", Prefix: "l/", Cluster: "c-1", KMSKey: testKey, Region: "us-east-1", Owner: "111122223333", Endpoint: "https://s3.example", Files: []string{"/var/log/*.log"}, Units: []string{"kubelet.service"}, Spool: "/srv/spool", MaxSpool: 64, Rate: 8},
	}
	if got, want := fmt.Sprintf("%+v", cfg), fmt.Sprintf("%+v", want); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestBadConfigNamesThePlaceAndWhatIsAllowed(t *testing.T) {
	key := "kms_key: " + testKey + "\n"
	for _, tc := range []struct {
		name, text string
		line       int
		want       string
	}{
		{"empty", "", 0, "kms_key is missing"},
		{"no key", "region: us-east-1\n", 0, "kms_key is missing"},
		{"not a mapping", "- a\n", 1, "must be a mapping"},
		{"not YAML", key + "region: [\n", 2, "did not find expected node content"},
		{"unknown field", key + "kms_keys: x\n", 2, `unknown field "kms_keys" in the configuration (allowed: allowed_keys, audit_log, call_timeout`},
		{"repeated field", key + "region: a\nregion: b\n", 3, `field "region" stands twice`},
		{"unknown volume field", key + "volumes:\n  - name: /dev/loop0\n    mount: /data\n", 4, `unknown field "mount" in volumes.0 (allowed: filesystem, mount_point, name)`},
		{"number for text", key + "region: 7\n", 2, "region must be a text"},
		{"empty text", key + "region: \"\"\n", 2, "region must be a text"},
		{"text for list", key + "exclude: /dev/sda\n", 2, "exclude must be a list"},
		{"wrong scope", key + "key_scope: disk\n", 2, `key_scope is "disk" (allowed: node, volume)`},
		{"wrong filesystem", key + "filesystem: btrfs\n", 2, "allowed: xfs, ext4)"},
		{"swap for every volume", key + "filesystem: swap\n", 2, "allowed: xfs, ext4)"},
		{"wrong filesystem of a volume", key + "volumes:\n  - {name: a, filesystem: btrfs}\n", 3, "allowed: xfs, ext4, swap)"},
		{"swap that is mounted", key + "volumes:\n  - {name: a, filesystem: swap, mount_point: /data}\n", 3, "the volume is swap, which is mounted nowhere"},
		{"wrong policy", key + "\nebs: yes\n", 3, "allowed: format, unlock, ignore"},
		{"number for duration", key + "retry_limit: 10\n", 2, "allowed: a duration"},
		{"endless duration", key + "retry_limit: 100000h\n", 2, "allowed: a duration"},
		{"negative duration", key + "device_wait: -1s\n", 2, "allowed: a duration from 0s to 24h"},
		{"wrong way with Multi-Attach", key + "multi_attach: true\n", 2, "allowed: refuse, allow"},
		{"alias node", "kms_key: &k " + testKey + "\nregion: *k\n", 2, "YAML alias"},
		{"clear-text KMS", key + "kms_endpoint: http://kms.example\n", 2, "plain http is allowed for loopback"},
		{"endpoint scheme", key + "kms_endpoint: ftp://kms.example\n", 2, "allowed: https, http"},
		{"endpoint without host", key + "kms_endpoint: kms.example\n", 2, "is no URL of a server"},
		{"nameless volume", key + "volumes:\n  - mount_point: /data\n", 3, "has no name"},
		{"volume twice", key + "volumes:\n  - name: a\n  - name: a\n", 4, "named twice"},
		{"mount point twice", key + "volumes:\n  - {name: a, mount_point: /d}\n  - {name: b, mount_point: /d}\n", 4, "used twice"},
		{"relative mount point", key + "volumes:\n  - {name: a, mount_point: d}\n", 3, "clean absolute path"},
		{"system mount point", key + "volumes:\n  - {name: a, mount_point: /usr}\n", 3, "belongs to the system"},
		{"excluded volume", key + "exclude: [a]\nvolumes:\n  - name: a\n", 4, "both in volumes and in exclude"},
		{"state in memory", key + "state_dir: /run/keys\n", 2, "does not survive a reboot"},
		{"relative state", key + "state_dir: keys\n", 2, "clean absolute path"},
		{"state on a volume", key + "state_dir: /mnt1/keys\n", 2, "only its records can open"},
		{"state on a named volume", key + "state_dir: /data/keys\nvolumes:\n  - {name: a, mount_point: /data}\n", 2, "only its records can open"},
		{"no audit log", key + "audit_log: \"\"\n", 2, "must be a text, not empty"},
		{"audit log in the root", key + "audit_log: /audit.jsonl\n", 2, "in a directory of its own"},
		{"relative audit log", key + "audit_log: log/audit.jsonl\n", 2, "clean absolute path"},
		{"audit log in memory", key + "audit_log: /run/luks/audit.jsonl\n", 2, "does not survive a reboot"},
		{"audit log among records", key + "audit_log: /var/lib/luks-kms-agent/audit.jsonl\n", 2, "nothing but records may be"},
		{"audit log on a volume", key + "audit_log: /mnt/log/audit.jsonl\n", 2, "is not there yet when events happen"},
		{"audit log on a named volume", key + "audit_log: /data/audit.jsonl\nvolumes:\n  - {name: a, mount_point: /data}\n", 2, "is not there yet when events happen"},
		{"allowed alias", key + "allowed_keys: [alias/x]\n", 2, "want key ARNs"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := writeConfig(t, tc.text, 0o600)
			_, err := LoadConfig(path)
			var ce *ConfigError
			if !errors.As(err, &ce) {
				t.Fatalf("got %v, want a *ConfigError", err)
			}
			if ce.Line != tc.line || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got line %d: %v\nwant line %d: …%s…", ce.Line, err, tc.line, tc.want)
			}
			if tc.line > 0 && !strings.Contains(err.Error(), fmt.Sprintf("%s:%d: ", path, tc.line)) {
				t.Errorf("%v does not name the place", err)
			}
		})
	}
}

func TestUnsafeConfigFileIsRefused(t *testing.T) {
	text := "kms_key: " + testKey + "\n"
	for _, mode := range []os.FileMode{0o620, 0o602, 0o666, 0o777} {
		if _, err := LoadConfig(writeConfig(t, text, mode)); err == nil || !strings.Contains(err.Error(), "lets group or others write") {
			t.Errorf("mode %04o: got %v", mode, err)
		}
	}
	if os.Geteuid() == 0 {
		path := writeConfig(t, text, 0o600)
		if err := os.Chown(path, 12345, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadConfig(path); err == nil || !strings.Contains(err.Error(), "owned by uid 12345") {
			t.Errorf("foreign owner: got %v", err)
		}
	}
	if _, err := LoadConfig(t.TempDir()); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("directory: got %v", err)
	}
	if _, err := LoadConfig("/nonexistent/config.yaml"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: got %v", err)
	}
}
