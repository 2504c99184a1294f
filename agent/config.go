package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

// DefaultConfigPath is where the agent looks for its configuration.
const DefaultConfigPath = "/etc/luks-kms-agent/config.yaml"

// DefaultStateDir is where the records are, unless the configuration says otherwise.
const DefaultStateDir = "/var/lib/luks-kms-agent"

// KeyScope says how many volumes share a data key.
type KeyScope string

// The scopes of a data key.
const (
	ScopeNode   KeyScope = "node"   // one data key per node, as Amazon EMR does
	ScopeVolume KeyScope = "volume" // one data key per volume
)

// Policy says what may be done with the volumes of a class.
type Policy string

// The policies of a class.
const (
	PolicyFormat Policy = "format" // format blank volumes, unlock ours
	PolicyUnlock Policy = "unlock" // unlock ours, never format
	PolicyIgnore Policy = "ignore" // leave alone
)

// MultiAttach says what is done with an EBS volume that several instances may
// have at once.
type MultiAttach string

// The ways with Multi-Attach volumes.
const (
	MultiAttachRefuse MultiAttach = "refuse" // refuse volumes that say so
	MultiAttachAllow  MultiAttach = "allow"  // use them all the same
)

// Switch is on or off.
type Switch string

// The positions of a switch.
const (
	On  Switch = "on"
	Off Switch = "off"
)

// Config is the agent's configuration. Its defaults are those of [LoadConfig].
type Config struct {
	Path          string         // the file it was read from
	KMSKey        string         // key ARN, key id, alias or alias ARN
	Region        string         // "": the node's own, from IMDS
	KMSEndpoint   string         // "": AWS's for the region
	IMDSEndpoint  string         // "": IMDS's link-local address
	KeyScope      KeyScope       //
	Filesystem    string         // "xfs" or "ext4", of volumes still to be formatted
	InstanceStore Policy         //
	EBS           Policy         //
	Volumes       []VolumeConfig // volumes named by the operator
	Exclude       []string       // kernel paths, links, serials, volume ids
	RetryLimit    time.Duration  // how long KMS and IMDS are retried
	CallTimeout   time.Duration  // of one request
	Workqueues    string         // dm-crypt's work queues: "auto" (none for writes to disks that do not rotate), "on", "off"
	StateDir      string         // where the records are
	AuditLog      string         // the file of security events
	AllowedKeys   []string       // ARNs of keys whose volumes may be adopted, beside KMSKey
	DeviceWait    time.Duration  // how long a run waits for volumes that are not there; 0: not at all
	MultiAttach   MultiAttach    //
	Stripe        Switch         // whether blank instance-store volumes become one
	Escrow        EscrowConfig   // where copies of headers and records go
	Logs          LogsConfig     // which logs go where
}

// LogsConfig says which logs of the node go to S3, by SSE-KMS under a customer managed key.
type LogsConfig struct {
	Bucket   string   // "": nowhere
	Prefix   string   // of the objects' names: "", or ends with "/"
	Cluster  string   // that the node is of; names have it
	KMSKey   string   // key ARN; "": Config.KMSKey
	Region   string   // of the bucket; "": the node's
	Owner    string   // account that the bucket has to belong to; "": any
	Endpoint string   // "": AWS's for the region
	Files    []string // globs
	Units    []string // whose journal goes there
	Spool    string   // directory
	MaxSpool int64    // MiB
	Rate     int64    // MiB in a second; 0: no bound
}

// EscrowConfig says where the node sends copies of its volumes' headers and records: S3, under a customer managed key.
type EscrowConfig struct {
	Bucket   string // "": nowhere
	Prefix   string // of the objects' names: "", or ends with "/"
	Mode     string // "sse-kms" or "cse-kms"
	KMSKey   string // key ARN; "": Config.KMSKey
	Region   string // of the bucket; "": the node's
	Owner    string // account that the bucket has to belong to; "": any
	Endpoint string // "": AWS's for the region
	Required bool   // no volume is mounted before its copy is confirmed
}

// VolumeConfig is what the configuration says of one volume.
type VolumeConfig struct {
	Name       string // kernel path, /dev/disk link, serial or EBS volume id
	MountPoint string // "": the next of /mnt, /mnt1, …
	Filesystem string // "": Config.Filesystem; "swap" has no mount point
}

// ConfigError is a configuration that cannot be used, and the place of the cause.
type ConfigError struct {
	Path string
	Line int // 0: the file as a whole
	Err  error
}

func (e *ConfigError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("cannot use configuration %s: %v", e.Path, e.Err)
	}
	return fmt.Sprintf("cannot use configuration %s:%d: %v", e.Path, e.Line, e.Err)
}

func (e *ConfigError) Unwrap() error { return e.Err }

// LoadConfig reads the configuration strictly: an unknown, repeated or wrong
// field, and a file that others than its owner (root, or who runs the agent)
// may write, is a *[ConfigError].
func LoadConfig(path string) (Config, error) {
	data, err := readOwned(path)
	if err != nil {
		return Config{}, &ConfigError{Path: path, Err: err}
	}
	return parseConfig(path, data)
}

// readOwned reads a file whose content decides what is formatted, so nobody but
// its owner may be able to write it.
func readOwned(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		var pe *os.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, errors.New("it is not a regular file")
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return nil, fmt.Errorf("it is owned by uid %d, want root", st.Uid)
	case st.Mode&0o022 != 0:
		return nil, fmt.Errorf("its mode %04o lets group or others write it, want 0600, 0640 or 0644", st.Mode&0o7777)
	case st.Size > 1<<20:
		return nil, fmt.Errorf("it has %d bytes, want at most 1 MiB", st.Size)
	}
	data := make([]byte, st.Size)
	n, err := f.ReadAt(data, 0)
	if err != nil && n < len(data) {
		return nil, err
	}
	return data, nil
}

func defaultConfig(path string) Config {
	return Config{
		Path:          path,
		KeyScope:      ScopeNode,
		Filesystem:    "xfs",
		InstanceStore: PolicyFormat,
		EBS:           PolicyFormat,
		RetryLimit:    10 * time.Minute,
		CallTimeout:   10 * time.Second,
		Workqueues:    "auto",
		StateDir:      DefaultStateDir,
		AuditLog:      "/var/log/luks-kms-agent/audit.jsonl",
		DeviceWait:    30 * time.Second,
		MultiAttach:   MultiAttachRefuse,
		Stripe:        Off,
		Escrow:        EscrowConfig{Prefix: "luks-kms-agent/", Mode: string(archive.SSE)},
		Logs:          LogsConfig{Prefix: "logs/", Spool: "/var/spool/luks-kms-agent", MaxSpool: 1024},
	}
}

// parser turns a YAML tree into a Config and remembers where each thing stood.
type parser struct {
	path  string
	cfg   Config
	lines map[string]int // field path ("volumes.0.name") -> line
}

func parseConfig(path string, data []byte) (Config, error) {
	var doc, more yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, yamlError(path, err)
	}
	p := &parser{path: path, cfg: defaultConfig(path), lines: map[string]int{}}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" { // the YAML library has "---" end on a line that is not there
		return Config{}, p.fail(0, "kms_key is missing: it is the one field that must be set")
	}
	// A second document passed over in silence could be the one that says what must not be formatted.
	switch err := dec.Decode(&more); {
	case err == nil:
		return Config{}, p.fail(more.Line, "a second YAML document begins here, want one")
	case !errors.Is(err, io.EOF):
		return Config{}, yamlError(path, err)
	}
	if err := p.top(doc.Content[0]); err != nil {
		return Config{}, err
	}
	if err := p.check(); err != nil {
		return Config{}, err
	}
	return p.cfg, nil
}

var yamlLine = regexp.MustCompile(`^yaml: line (\d+): (.*)$`)

// yamlError moves the line that the YAML library puts into its text to where
// ConfigError has it.
func yamlError(path string, err error) error {
	e := &ConfigError{Path: path, Err: err}
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		fmt.Sscan(m[1], &e.Line)
		e.Err = errors.New(m[2])
	}
	return e
}

func (p *parser) fail(line int, format string, args ...any) error {
	return &ConfigError{Path: p.path, Line: line, Err: fmt.Errorf(format, args...)}
}

type fields map[string]func(*yaml.Node) error

func (f fields) allowed() string {
	names := make([]string, 0, len(f))
	for n := range f {
		names = append(names, n)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// mapping walks a YAML mapping; where names its place for messages and lines.
func (p *parser) mapping(n *yaml.Node, where string, known fields) error {
	if n.Kind != yaml.MappingNode {
		return p.fail(n.Line, "%s must be a mapping of fields (allowed: %s)", orDocument(where), known.allowed())
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		set, ok := known[key.Value]
		if !ok || key.Kind != yaml.ScalarNode || key.Tag != "!!str" { // an alias has the name of its anchor for a value
			return p.fail(key.Line, "unknown field %q in %s (allowed: %s)", key.Value, orDocument(where), known.allowed())
		}
		if seen[key.Value] {
			return p.fail(key.Line, "field %q stands twice in %s", key.Value, orDocument(where))
		}
		seen[key.Value] = true
		p.lines[join(where, key.Value)] = key.Line
		if val.Kind == yaml.AliasNode {
			return p.fail(val.Line, "field %q is a YAML alias, which is not supported", key.Value)
		}
		if err := set(val); err != nil {
			return err
		}
	}
	return nil
}

func orDocument(where string) string {
	if where == "" {
		return "the configuration"
	}
	return where
}

func join(where, name string) string {
	if where == "" {
		return name
	}
	return where + "." + name
}

func (p *parser) top(n *yaml.Node) error {
	c := &p.cfg
	policy := []string{string(PolicyFormat), string(PolicyUnlock), string(PolicyIgnore)}
	return p.mapping(n, "", fields{
		"kms_key":        p.text("kms_key", &c.KMSKey),
		"region":         p.text("region", &c.Region),
		"kms_endpoint":   p.text("kms_endpoint", &c.KMSEndpoint),
		"imds_endpoint":  p.text("imds_endpoint", &c.IMDSEndpoint),
		"key_scope":      oneOf(p, "key_scope", &c.KeyScope, string(ScopeNode), string(ScopeVolume)),
		"filesystem":     oneOf(p, "filesystem", &c.Filesystem, filesystems...),
		"instance_store": oneOf(p, "instance_store", &c.InstanceStore, policy...),
		"ebs":            oneOf(p, "ebs", &c.EBS, policy...),
		"volumes":        p.volumes,
		"exclude":        p.texts("exclude", &c.Exclude),
		"retry_limit":    p.duration("retry_limit", &c.RetryLimit, time.Second),
		"call_timeout":   p.duration("call_timeout", &c.CallTimeout, time.Second),
		"workqueues":     oneOf(p, "workqueues", &c.Workqueues, "auto", "on", "off"),
		"state_dir":      p.text("state_dir", &c.StateDir),
		"audit_log":      p.text("audit_log", &c.AuditLog),
		"allowed_keys":   p.texts("allowed_keys", &c.AllowedKeys),
		"device_wait":    p.duration("device_wait", &c.DeviceWait, 0),
		"multi_attach":   oneOf(p, "multi_attach", &c.MultiAttach, string(MultiAttachRefuse), string(MultiAttachAllow)),

		"stripe_instance_store": oneOf(p, "stripe_instance_store", &c.Stripe, string(On), string(Off)),

		"escrow": p.escrow,
		"logs":   p.logs,
	})
}

func (p *parser) logs(n *yaml.Node) error {
	l := &p.cfg.Logs
	return p.mapping(n, "logs", fields{
		"bucket":              p.text("logs.bucket", &l.Bucket),
		"prefix":              p.text("logs.prefix", &l.Prefix),
		"cluster":             p.text("logs.cluster", &l.Cluster),
		"kms_key":             p.text("logs.kms_key", &l.KMSKey),
		"region":              p.text("logs.region", &l.Region),
		"bucket_owner":        p.text("logs.bucket_owner", &l.Owner),
		"s3_endpoint":         p.text("logs.s3_endpoint", &l.Endpoint),
		"files":               p.texts("logs.files", &l.Files),
		"units":               p.texts("logs.units", &l.Units),
		"spool_dir":           p.text("logs.spool_dir", &l.Spool),
		"max_spool_mib":       p.number("logs.max_spool_mib", &l.MaxSpool, 16),
		"rate_mib_per_second": p.number("logs.rate_mib_per_second", &l.Rate, 1),
	})
}

func (p *parser) number(name string, to *int64, least int64) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		v, err := strconv.ParseInt(n.Value, 10, 64)
		if n.Kind != yaml.ScalarNode || err != nil || v < least || v > 1<<20 {
			return p.fail(n.Line, "%s is %q (allowed: a number from %d to %d)", name, n.Value, least, 1<<20)
		}
		*to = v
		return nil
	}
}

func (p *parser) escrow(n *yaml.Node) error {
	e := &p.cfg.Escrow
	return p.mapping(n, "escrow", fields{
		"bucket":       p.text("escrow.bucket", &e.Bucket),
		"prefix":       p.text("escrow.prefix", &e.Prefix),
		"mode":         oneOf(p, "escrow.mode", &e.Mode, string(archive.SSE), string(archive.CSE)),
		"kms_key":      p.text("escrow.kms_key", &e.KMSKey),
		"region":       p.text("escrow.region", &e.Region),
		"bucket_owner": p.text("escrow.bucket_owner", &e.Owner),
		"s3_endpoint":  p.text("escrow.s3_endpoint", &e.Endpoint),
		"required":     p.truth("escrow.required", &e.Required),
	})
}

func (p *parser) truth(name string, to *bool) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		if n.Kind != yaml.ScalarNode || n.Value != "true" && n.Value != "false" {
			return p.fail(n.Line, "%s is %q (allowed: true, false)", name, n.Value)
		}
		*to = n.Value == "true"
		return nil
	}
}

// filesystems are what any volume may have in it, and contents what one may have that the configuration names.
var (
	filesystems = []string{"xfs", "ext4"}
	contents    = append(slices.Clone(filesystems), swapType)
)

const swapType = "swap"

func (p *parser) volumes(n *yaml.Node) error {
	if n.Kind != yaml.SequenceNode {
		return p.fail(n.Line, "volumes must be a list of {name, mount_point, filesystem}")
	}
	for i, item := range n.Content {
		var v VolumeConfig
		where := fmt.Sprintf("volumes.%d", i)
		p.lines[where] = item.Line
		err := p.mapping(item, where, fields{
			"name":        p.text(where+".name", &v.Name),
			"mount_point": p.text(where+".mount_point", &v.MountPoint),
			"filesystem":  oneOf(p, where+".filesystem", &v.Filesystem, contents...),
		})
		if err != nil {
			return err
		}
		p.cfg.Volumes = append(p.cfg.Volumes, v)
	}
	return nil
}

func (p *parser) text(name string, to *string) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" || n.Value == "" {
			return p.fail(n.Line, "%s must be a text, not empty", name)
		}
		*to = n.Value
		return nil
	}
}

func (p *parser) texts(name string, to *[]string) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		if n.Kind != yaml.SequenceNode {
			return p.fail(n.Line, "%s must be a list of texts", name)
		}
		for i, item := range n.Content {
			var s string
			if err := p.text(fmt.Sprintf("%s.%d", name, i), &s)(item); err != nil {
				return err
			}
			*to = append(*to, s)
		}
		return nil
	}
}

func oneOf[T ~string](p *parser, name string, to *T, allowed ...string) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		// YAML reads a bare `on` and `off` as booleans in some versions; the
		// text that was written is what counts.
		if n.Kind != yaml.ScalarNode || !slices.Contains(allowed, n.Value) {
			return p.fail(n.Line, "%s is %q (allowed: %s)", name, n.Value, strings.Join(allowed, ", "))
		}
		*to = T(n.Value)
		return nil
	}
}

func (p *parser) duration(name string, to *time.Duration, least time.Duration) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		d, err := time.ParseDuration(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil || d < least || d > 24*time.Hour {
			return p.fail(n.Line, "%s is %q (allowed: a duration from %v to 24h, as in 90s or 10m)", name, n.Value, least)
		}
		*to = d
		return nil
	}
}

// check holds the fields against one another.
func (p *parser) check() error {
	c := &p.cfg
	if c.KMSKey == "" {
		return p.fail(0, "kms_key is missing: it is the one field that must be set")
	}
	for name, endpoint := range map[string]string{"kms_endpoint": c.KMSEndpoint, "imds_endpoint": c.IMDSEndpoint, "escrow.s3_endpoint": c.Escrow.Endpoint, "logs.s3_endpoint": c.Logs.Endpoint} {
		if err := keycache.CheckEndpoint(endpoint); err != nil {
			return p.fail(p.lines[name], "%s: %w", name, err)
		}
	}
	for _, arn := range c.AllowedKeys {
		if !strings.HasPrefix(arn, "arn:") || !strings.Contains(arn, ":key/") {
			return p.fail(p.lines["allowed_keys"], "allowed_keys has %q, want key ARNs (arn:aws:kms:REGION:ACCOUNT:key/ID)", arn)
		}
	}
	names, points := map[string]bool{}, map[string]bool{}
	for i, v := range c.Volumes {
		where := fmt.Sprintf("volumes.%d", i)
		if v.Name == "" {
			return p.fail(p.lines[where], "%s has no name", where)
		}
		if names[v.Name] {
			return p.fail(p.lines[where+".name"], "volume %q is named twice", v.Name)
		}
		names[v.Name] = true
		if slices.Contains(c.Exclude, v.Name) {
			return p.fail(p.lines[where+".name"], "volume %q is both in volumes and in exclude", v.Name)
		}
		if v.MountPoint == "" {
			continue
		}
		line := p.lines[where+".mount_point"]
		if v.Filesystem == swapType {
			return p.fail(line, "mount_point is %q, but the volume is swap, which is mounted nowhere", v.MountPoint)
		}
		if err := checkMountPoint(v.MountPoint); err != nil {
			return p.fail(line, "mount_point is %q: %v", v.MountPoint, err)
		}
		if points[v.MountPoint] {
			return p.fail(line, "mount_point %q is used twice", v.MountPoint)
		}
		points[v.MountPoint] = true
	}
	dir := c.StateDir
	if !cleanPath(dir) || dir == "/" {
		return p.fail(p.lines["state_dir"], "state_dir is %q, want a clean absolute path", dir)
	}
	for _, memory := range []string{"/dev", "/proc", "/run", "/sys", "/tmp", "/var/run"} {
		if under(dir, memory) {
			return p.fail(p.lines["state_dir"], "state_dir is %q, which does not survive a reboot: the wrapped keys would be lost", dir)
		}
	}
	for i, v := range c.Volumes {
		if under(v.MountPoint, dir) && v.MountPoint != dir {
			return p.fail(p.lines[fmt.Sprintf("volumes.%d.mount_point", i)], "mount_point %s would hide records in state_dir %s", v.MountPoint, dir)
		}
		if v.MountPoint != "" && under(dir, v.MountPoint) {
			return p.fail(p.lines["state_dir"], "state_dir %s lies under %s, a mount point of a volume that only its records can open", dir, v.MountPoint)
		}
	}
	if automaticMountPoint.MatchString("/" + strings.Split(dir, "/")[1]) {
		return p.fail(p.lines["state_dir"], "state_dir %s lies under a mount point of a volume that only its records can open", dir)
	}
	if err := errors.Join(p.checkEscrow(), p.checkLogs()); err != nil {
		return err
	}
	return p.checkAuditLog()
}

// checkEscrow wants what is to be put in S3 to be put there at all.
func (p *parser) checkEscrow() error {
	line, given := p.lines["escrow"]
	if !given {
		return nil
	}
	c := &p.cfg
	e := &c.Escrow
	if e.Bucket == "" {
		return p.fail(line, "escrow.bucket is missing: it says where the copies go")
	}
	return p.checkBucket("escrow", &e.KMSKey, &e.Prefix, func() archive.Options { return e.options() })
}

// checkLogs is checkEscrow for logs.
func (p *parser) checkLogs() error {
	line, given := p.lines["logs"]
	if !given {
		return nil
	}
	c := &p.cfg
	l := &c.Logs
	switch {
	case l.Bucket == "":
		return p.fail(line, "logs.bucket is missing: it says where the logs go")
	case !clusterName.MatchString(l.Cluster):
		return p.fail(line, "logs.cluster is %q, want a name of letters, digits, dots, dashes and underscores", l.Cluster)
	case len(l.Files)+len(l.Units) == 0:
		return p.fail(line, "logs has neither files nor units: there is nothing to archive")
	}
	for _, glob := range l.Files {
		if _, err := filepath.Match(glob, "/"); err != nil || !filepath.IsAbs(glob) {
			return p.fail(p.lines["logs.files"], "logs.files has %q, want absolute paths, with * and ? where you like", glob)
		}
	}
	for _, unit := range l.Units {
		if strings.HasPrefix(unit, "-") || !strings.Contains(unit, ".") {
			return p.fail(p.lines["logs.units"], "logs.units has %q, want names of units, as in kubelet.service", unit)
		}
	}
	if !cleanPath(l.Spool) || under(l.Spool, c.StateDir) || filepath.Dir(l.Spool) == "/" {
		return p.fail(p.lines["logs.spool_dir"], "logs.spool_dir is %q, want a clean absolute path of a directory of its own, not below state_dir", l.Spool)
	}
	return p.checkBucket("logs", &l.KMSKey, &l.Prefix, func() archive.Options { return l.options() })
}

// clusterName is what a part of an object's name may be.
var clusterName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// checkBucket is what escrow and logs have in common.
func (p *parser) checkBucket(section string, key, prefix *string, options func() archive.Options) error {
	line := p.lines[section]
	if *key == "" {
		*key = p.cfg.KMSKey
		if !strings.HasPrefix(*key, "arn:") || !strings.Contains(*key, ":key/") {
			return p.fail(line, "%s.kms_key is missing, and kms_key is %q, which is no key ARN", section, *key)
		}
	}
	if strings.HasPrefix(*prefix, "/") || strings.Contains(*prefix, "//") || strings.Contains(*prefix, "..") {
		return p.fail(p.lines[section+".prefix"], "%s.prefix is %q, want names of folders, as in nodes/%s/", section, *prefix, section)
	}
	if !strings.HasSuffix(*prefix, "/") {
		*prefix += "/"
	}
	o := options()
	if o.Region == "" {
		o.Region = p.cfg.Region
	}
	if err := o.Check(); err != nil {
		return p.fail(line, "%s: %w", section, err)
	}
	return nil
}

// options are what package archive needs of it, but for the credentials and a region that is the node's.
func (l LogsConfig) options() archive.Options {
	return archive.Options{Bucket: l.Bucket, Region: l.Region, Owner: l.Owner, Mode: archive.SSE, KeyARN: l.KMSKey, Endpoint: l.Endpoint}
}

// options are what package archive needs of it, but for the credentials and a region that is the node's.
func (e EscrowConfig) options() archive.Options {
	return archive.Options{Bucket: e.Bucket, Region: e.Region, Owner: e.Owner, Mode: archive.Mode(e.Mode), KeyARN: e.KMSKey, Endpoint: e.Endpoint}
}

// checkAuditLog wants a place that is there before any volume is, and outlives the boot.
func (p *parser) checkAuditLog() error {
	c, line := &p.cfg, p.lines["audit_log"]
	log := c.AuditLog
	if !cleanPath(log) || filepath.Dir(log) == "/" {
		return p.fail(line, "audit_log is %q, want a clean absolute path of a file in a directory of its own", log)
	}
	for _, memory := range []string{"/dev", "/proc", "/run", "/sys", "/tmp", "/var/run"} {
		if under(log, memory) {
			return p.fail(line, "audit_log is %q, which does not survive a reboot", log)
		}
	}
	if under(log, c.StateDir) {
		return p.fail(line, "audit_log %s lies in state_dir %s, where nothing but records may be", log, c.StateDir)
	}
	for _, v := range c.Volumes {
		if v.MountPoint != "" && under(log, v.MountPoint) {
			return p.fail(line, "audit_log %s lies under %s, a mount point of a volume that is not there yet when events happen", log, v.MountPoint)
		}
	}
	if automaticMountPoint.MatchString("/" + strings.Split(log, "/")[1]) {
		return p.fail(line, "audit_log %s lies under a mount point of a volume that is not there yet when events happen", log)
	}
	return nil
}

// automaticMountPoint matches the mount points that [Decide] gives out.
var automaticMountPoint = regexp.MustCompile(`^/mnt[0-9]*$`)

func checkMountPoint(path string) error {
	if !cleanPath(path) {
		return errors.New("want a clean absolute path")
	}
	// What is mounted over one of these hides programs or settings from the rest of the boot.
	system := errors.New("it belongs to the system")
	switch path {
	case "/", "/bin", "/boot", "/boot/efi", "/lib", "/lib32", "/lib64", "/libx32", "/root", "/run", "/sbin", "/usr", "/var",
		"/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/sbin":
		return system
	}
	for _, dir := range []string{"/dev", "/etc", "/proc", "/sys"} {
		if under(path, dir) {
			return system
		}
	}
	return nil
}

// cleanPath says whether a path is absolute and the kernel takes it as it is written.
func cleanPath(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && !strings.Contains(path, "\x00")
}

// under says whether path is dir or lies below it.
func under(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
