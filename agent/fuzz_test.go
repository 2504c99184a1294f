package agent

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/url"
	"path"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"go.yaml.in/yaml/v3"
)

// FuzzConfig: a configuration is taken or refused with its place, and what is taken can neither take the node down, nor show a
// data key, nor lose the records. What that means is said here a second time, in other words than in check.
func FuzzConfig(f *testing.F) {
	key := "kms_key: " + testKey + "\n"
	f.Add([]byte(`
kms_key: alias/data
region: eu-west-1
kms_endpoint: https://vpce-1.kms.eu-west-1.vpce.example
imds_endpoint: "http://[fe80::1%25eth0]:80"
key_scope: volume
filesystem: ext4
instance_store: unlock
ebs: ignore
volumes:
  - name: /dev/loop0
    mount_point: /data
    filesystem: xfs
  - {name: vol-0123456789abcdef0}
exclude: [ /dev/nvme5n1 ]
retry_limit: 90s
call_timeout: 3s
workqueues: off
state_dir: /srv/state
allowed_keys: [ ` + testKey + ` ]
device_wait: 0s
multi_attach: allow
`))
	for _, text := range []string{
		"", "\n", "#", "---", "---\n", "~", "- a\n", "region: us-east-1\n", "\xff\xfek\x00", "\xef\xbb\xbf" + key, "\x00", "? {a: b}\n: c\n",
		"!!binary kms_key: x\n", "<<: {kms_key: x}\n", "kms_key: &k x\nregion: *k\n", "kms_key: &region x\n*region : y\n",
		"kms_key: |\n  x\n", "kms_key: !!str 7\n", "kms_key: 0x7\n", "kms_key: ~\n", "%YAML 1.1\n---\n" + key, key + "...\n", key + "\r\rebs: yes\r",
	} {
		f.Add([]byte(text))
	}
	for _, more := range []string{
		"region: [\n", "kms_keys: x\n", "region: a\nregion: b\n", "region: \"\"\n", "exclude: /dev/sda\n", "key_scope: disk\n", "ebs: yes\n",
		"retry_limit: 10\n", "retry_limit: 100000h\n", "call_timeout: -5s\n", "call_timeout: 1e9s\n", "---\nebs: ignore\n", "...\nebs: ignore\n",
		"kms_endpoint: http://kms.example\n", "kms_endpoint: HTTP://10.0.0.1\n", "kms_endpoint: http://127.0.0.1.example\n", "kms_endpoint: http:127.0.0.1\n",
		"kms_endpoint: http://127.0.0.1@kms.example\n", "imds_endpoint: http://[::ffff:10.0.0.1]\n", "imds_endpoint: http://localhost\n",
		"kms_endpoint: ftp://kms.example\n", "kms_endpoint: kms.example\n", "imds_endpoint: http://2130706433\n",
		"volumes:\n  - mount_point: /data\n", "volumes: [{name: a}, {name: a}]\n", "volumes: {name: a}\n", "volumes: [[]]\n", "volumes: [~]\n",
		"volumes:\n  - {name: a, mount_point: /d}\n  - {name: b, mount_point: /d}\n", "exclude: [a]\nvolumes: [{name: a}]\n",
		"volumes: [&v {name: a}, *v]\n", "volumes: [{name: a, <<: {mount_point: /}}]\n", "allowed_keys: [alias/x]\n",
		"state_dir: /mnt\n", "state_dir: /mnt1/keys\n", "state_dir: /mntx\n", "state_dir: keys\n", "state_dir: /\n", "state_dir: /var/../run/x\n",
		"state_dir: /run\n", "state_dir: /run/x\n", "state_dir: /var/run/x\n", "state_dir: /sys/x\n", "state_dir: \"/a\\0b\"\n",
		"state_dir: /data/keys\nvolumes: [{name: a, mount_point: /data}]\n", "volumes: [{name: a, mount_point: /var/lib/luks-kms-agent/keys}]\n",
	} {
		f.Add([]byte(key + more))
	}
	for _, point := range []string{
		"d", "/", "//", "/d/", "/d/../usr", "/usr", "/bin", "/lib64", "/usr/bin", "/etc/ssh", "/proc/sys", "/sys/fs", "/dev/shm", "/boot", "/usr/local/data",
		`/d\0`, `/d\n`, "/var/lib", "/mnt3",
	} {
		f.Add([]byte(key + "volumes:\n  - {name: a, mount_point: \"" + point + "\"}\n"))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		data = data[:min(len(data), 1<<20)] // readOwned refuses more
		cfg, err := parseConfig("config.yaml", data)
		if err != nil {
			var ce *ConfigError
			if !errors.As(err, &ce) || ce.Err == nil || ce.Path != "config.yaml" {
				t.Fatalf("%#v is no error of the configuration", err)
			}
			if n := lines(data); ce.Line < 0 || ce.Line > n {
				t.Errorf("line %d of %d: %v", ce.Line, n, err)
			}
			return
		}
		taken(t, cfg)
		asWritten(t, cfg, data)
	})
}

// taken says what every accepted configuration promises.
func taken(t *testing.T, c Config) {
	if c.KMSKey == "" || c.Path != "config.yaml" {
		t.Errorf("key %q, path %q", c.KMSKey, c.Path)
	}
	for _, e := range []string{c.KMSEndpoint, c.IMDSEndpoint} {
		if e != "" && !private(e) {
			t.Errorf("what goes to endpoint %q can be read on the way", e)
		}
	}
	for field, is := range map[string]bool{
		"key_scope":      slices.Contains([]KeyScope{"node", "volume"}, c.KeyScope),
		"filesystem":     slices.Contains([]string{"xfs", "ext4"}, c.Filesystem),
		"instance_store": slices.Contains([]Policy{"format", "unlock", "ignore"}, c.InstanceStore),
		"ebs":            slices.Contains([]Policy{"format", "unlock", "ignore"}, c.EBS),
		"workqueues":     slices.Contains([]string{"auto", "on", "off"}, c.Workqueues),
		"retry_limit":    c.RetryLimit >= time.Second && c.RetryLimit <= 24*time.Hour,
		"call_timeout":   c.CallTimeout >= time.Second && c.CallTimeout <= 24*time.Hour,
		"device_wait":    c.DeviceWait >= 0 && c.DeviceWait <= 24*time.Hour,
		"multi_attach":   slices.Contains([]MultiAttach{"refuse", "allow"}, c.MultiAttach),
	} {
		if !is {
			t.Errorf("%s is out of bounds in %+v", field, c)
		}
	}
	for _, arn := range c.AllowedKeys {
		if !strings.HasPrefix(arn, "arn:") || strings.HasPrefix(arn, "alias/") {
			t.Errorf("allowed key %q", arn)
		}
	}
	// By their parts, because "/mnt" is above "/mnt/x" but not above "/mntx".
	state := strings.Split(c.StateDir, "/")
	if !plain(c.StateDir) || lost[state[1]] || c.StateDir == "/var/run" || strings.HasPrefix(c.StateDir, "/var/run/") {
		t.Errorf("state directory %q", c.StateDir)
	}
	if first := strings.TrimPrefix(state[1], "mnt"); first != state[1] && strings.Trim(first, "0123456789") == "" {
		t.Errorf("state directory %q is under a mount point that the plan gives out", c.StateDir)
	}
	names, points := map[string]bool{}, map[string]bool{}
	for _, v := range c.Volumes {
		if v.Name == "" || names[v.Name] || slices.Contains(c.Exclude, v.Name) {
			t.Errorf("volume %q in %+v", v.Name, c)
		}
		names[v.Name] = true
		if !slices.Contains([]string{"", "xfs", "ext4"}, v.Filesystem) {
			t.Errorf("filesystem %q", v.Filesystem)
		}
		if v.MountPoint == "" {
			continue
		}
		parts := strings.Split(v.MountPoint, "/")
		whole := len(parts) == 2 && slices.Contains([]string{"bin", "boot", "lib", "lib32", "lib64", "libx32", "root", "run", "sbin", "usr", "var"}, parts[1])
		below := slices.Contains([]string{"dev", "etc", "proc", "sys"}, parts[1])
		programs := len(parts) == 3 && parts[1] == "usr" && slices.Contains([]string{"bin", "lib", "lib32", "lib64", "libx32", "sbin"}, parts[2])
		if !plain(v.MountPoint) || whole || below || programs || v.MountPoint == "/boot/efi" || points[v.MountPoint] {
			t.Errorf("mount point %q in %+v", v.MountPoint, c)
		}
		points[v.MountPoint] = true
		// What is mounted on or above the state directory, or on a directory in it, hides records.
		if n := min(len(parts), len(state)); slices.Equal(parts[:n], state[:n]) {
			t.Errorf("mount point %q hides records in %q", v.MountPoint, c.StateDir)
		}
	}
}

// lost are the top directories that are empty after a reboot.
var lost = map[string]bool{"dev": true, "proc": true, "run": true, "sys": true, "tmp": true}

// plain says whether the kernel takes a path as it is written, and it is not the root.
func plain(name string) bool {
	return len(name) > 1 && path.Join("/", name) == name && !strings.Contains(name, "\x00")
}

// private says whether requests to an endpoint are encrypted or do not leave the node.
func private(endpoint string) bool {
	u, err := url.Parse(endpoint)
	if err != nil || u.Hostname() == "" {
		return false
	}
	host, _, _ := strings.Cut(u.Hostname(), "%")
	ip := net.ParseIP(host)
	return u.Scheme == "https" || u.Scheme == "http" && ip != nil && (ip.IsLoopback() || ip.IsLinkLocalUnicast())
}

// asWritten holds a configuration against what the YAML library reads by itself: a field that stands in the file and was
// passed over, say "ebs: ignore", would have volumes formatted.
func asWritten(t *testing.T, c Config, data []byte) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var m map[string]any
	if err := dec.Decode(&m); err != nil {
		t.Fatalf("taken, but no mapping of names: %v", err)
	}
	var more any
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		t.Errorf("a second document was passed over: %v, %v", more, err)
	}
	for name := range m {
		if !slices.Contains(strings.Fields(`kms_key region kms_endpoint imds_endpoint key_scope filesystem instance_store ebs volumes exclude
			retry_limit call_timeout workqueues state_dir allowed_keys device_wait multi_attach`), name) {
			t.Errorf("unknown field %q was taken", name)
		}
	}
	for name, has := range map[string]string{
		"kms_key": c.KMSKey, "region": c.Region, "kms_endpoint": c.KMSEndpoint, "ebs": string(c.EBS), "instance_store": string(c.InstanceStore),
		"state_dir": c.StateDir, "key_scope": string(c.KeyScope), "filesystem": c.Filesystem,
	} {
		if is, ok := m[name]; ok && is != has {
			t.Errorf("%s is %q, read as %q", name, is, has)
		}
	}
	for name, has := range map[string]int{"volumes": len(c.Volumes), "exclude": len(c.Exclude), "allowed_keys": len(c.AllowedKeys)} {
		if list, _ := m[name].([]any); len(list) != has {
			t.Errorf("%s has %d entries, %d were read", name, len(list), has)
		}
	}
}

// lines counts as YAML 1.1 does (section 5.4, which has more line breaks than editors), in any encoding that it allows.
func lines(data []byte) int {
	text := string(data)
	for bom, high := range map[string]int{"\xff\xfe": 1, "\xfe\xff": 0} {
		if strings.HasPrefix(text, bom) {
			var units []uint16
			for i := 0; i+1 < len(data); i += 2 {
				units = append(units, uint16(data[i+high])<<8|uint16(data[i+1-high]))
			}
			text = string(utf16.Decode(units))
		}
	}
	n := 1
	for _, r := range strings.ReplaceAll(text, "\r\n", "\n") {
		if strings.ContainsRune("\n\r\u0085\u2028\u2029", r) {
			n++
		}
	}
	return n
}
