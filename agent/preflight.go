package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// CheckResult is how a check ended.
type CheckResult string

// The results.
const (
	CheckOK      CheckResult = "ok"
	CheckWarning CheckResult = "warning" // a run works, but something is not as it should be
	CheckFailure CheckResult = "failure" // a run, the escrow or the archive of logs would fail
	CheckSkipped CheckResult = "skipped" // it depends on one that failed, or what it would ask is not allowed and not needed
)

// Check is one thing that a run depends on.
type Check struct {
	Name   string
	Result CheckResult
	Detail string // what was found; of a warning or failure, also what is wrong
	Err    error  // what is wrong, nil where nothing is
}

// What a preflight finds that is no failure of anything else.
var (
	ErrOtherRegion    = errors.New("KMS is called in another region than the node's")
	ErrClockOff       = errors.New("the node's clock is wrong")
	ErrMayNotDescribe = errors.New("the role may not call DescribeKey: the key's kind and state are not known")
	ErrMayNotList     = errors.New("the role may not list the bucket")
	ErrNoReplace      = errors.New("this cryptsetup cannot replace tokens")
	ErrNotOnBoot      = errors.New("it is not on the boot volume")
	ErrOldSystemd     = errors.New("this systemd is too old")
	ErrNoUnit         = errors.New("a unit is not installed")
	ErrNotEnabled     = errors.New("the service is not enabled: nothing opens the volumes at boot")
	ErrNotReloaded    = errors.New("systemd has not read the unit file as it is now")
	ErrCloudInit      = errors.New("cloud-init would mount an instance store")
	ErrUnprotected    = errors.New("memory with keys may be swapped or dumped")
)

// clockWarning is the difference between the clocks that is worth a warning: far more than a clock that is kept has, and far less
// than what KMS refuses.
const clockWarning = time.Minute

// Preflight looks at everything that a run depends on, before anything is touched.
type Preflight struct {
	node *Node // nil where the configuration is not good
	err  error // why it is not
	path string

	protect   func() error
	systemd   func(context.Context) (systemd.Facts, error)
	cloudInit func() (volumes.CloudInitFacts, error)
	cipher    func() (string, error)
	version   func(context.Context) (string, error) // of cryptsetup
	replaces  func(context.Context) error           // whether it can replace tokens

	// Found by one check for others, which wait for it.
	identity keycache.Identity
	units    systemd.Facts

	keys []*keycache.Key // to be wiped
}

// NewPreflight reads the configuration; if that fails, the report tells.
func NewPreflight(path string, log *zap.Logger, by Program) *Preflight {
	p := &Preflight{
		path:      path,
		protect:   keycache.ProtectMemory,
		systemd:   systemd.Look,
		cloudInit: func() (volumes.CloudInitFacts, error) { return volumes.CloudInit("/") },
		cipher:    luks.CheckCipher,
		version:   luks.CryptsetupVersion,
		replaces:  luks.CheckReplacesTokens,
	}
	cfg, err := LoadConfig(path)
	if err == nil {
		cfg.RetryLimit = -1 // one try each: somebody is waiting for the answer
		p.node, err = New(cfg, log, by)
	}
	p.err = err
	return p
}

// check is one check, and the names of the others that it waits for.
type check struct {
	name  string
	needs []string // that have not to fail, and not to be skipped
	bars  []string // that have not to fail
	after []string // however they end
	run   func(context.Context) (detail string, err error)
}

// warning marks an error that does not keep a run from its work.
type warning struct{ err error }

func (w warning) Error() string { return w.err.Error() }
func (w warning) Unwrap() error { return w.err }

// skipped is why a check was not made.
type skipped string

func (s skipped) Error() string { return string(s) }

func dependsOn(name string) error { return skipped("depends on " + name) }

func (p *Preflight) checks() []check {
	const (
		configuration, metadata, credentials, region, endpoint = "configuration", "instance metadata", "credentials", "region", "KMS endpoint"
		kmsKey, dataKey, kernel, cryptsetup, filesystem        = "KMS key", "data key", "kernel", "cryptsetup version", "filesystem"
		stateDir, manager, service, cloudInit, memory          = "state directory", "systemd", "service", "cloud-init", "memory"
		clock                                                  = "clock"
	)
	inRegion := []string{configuration}
	if p.node != nil && p.node.cfg.Region == "" {
		inRegion = append(inRegion, metadata)
	}
	checks := []check{
		{name: configuration, run: p.configuration},
		{name: metadata, needs: []string{configuration}, run: p.metadata},
		{name: credentials, needs: []string{metadata}, run: p.credentials},
		{name: region, needs: inRegion, after: []string{metadata}, run: p.region},
		{name: endpoint, needs: []string{region}, run: p.endpoint},
		{name: clock, needs: []string{configuration}, after: []string{metadata, endpoint}, run: p.clock},
		{name: kmsKey, needs: []string{credentials, endpoint}, bars: []string{clock}, run: p.kmsKey},
		{name: dataKey, needs: []string{kmsKey}, run: p.dataKey},
		{name: kernel, run: p.kernel},
		{name: cryptsetup, run: p.cryptsetup},
		{name: filesystem, needs: []string{configuration}, run: p.filesystem},
		{name: stateDir, needs: []string{configuration}, run: p.stateDir},
		{name: manager, run: p.manager},
		{name: service, needs: []string{manager}, run: p.service},
		{name: cloudInit, run: p.cloudInits},
		{name: memory, after: []string{manager}, run: p.memory},
	}
	if p.node == nil {
		return checks
	}
	add := func(section string, o archive.Options, prefix string) {
		if o.Bucket == "" {
			return
		}
		checks = append(checks,
			check{name: section + " key", needs: []string{credentials, endpoint}, bars: []string{clock},
				run: func(ctx context.Context) (string, error) { return p.archiveKey(ctx, o.KeyARN) }},
			check{name: section + " bucket", needs: []string{credentials, region}, bars: []string{clock},
				run: func(ctx context.Context) (string, error) { return p.bucket(ctx, o, prefix) }})
	}
	add("escrow", p.node.cfg.Escrow.options(), p.node.cfg.Escrow.Prefix)
	add("logs", p.node.cfg.Logs.options(), p.node.cfg.Logs.Prefix)
	return checks
}

// Run makes the checks, those that do not depend on each other at the same time, and returns them in an order that is
// always the same. It writes to no disk and no record; one data key is made, proven and wiped.
func (p *Preflight) Run(ctx context.Context) []Check {
	protected := p.protect() // before there is a key
	p.protect = func() error { return protected }
	checks := p.checks()
	made := make([]Check, len(checks))
	done := map[string]chan struct{}{}
	index := map[string]int{}
	for i, c := range checks {
		done[c.name], index[c.name] = make(chan struct{}), i
	}
	for i, c := range checks {
		go func() {
			defer close(done[c.name])
			made[i].Name = c.name
			for _, name := range slices.Concat(c.needs, c.bars, c.after) {
				<-done[name]
			}
			for _, name := range c.needs {
				switch on := made[index[name]]; on.Result {
				case CheckFailure:
					made[i].judge("", dependsOn(name))
					return
				case CheckSkipped:
					made[i].judge("", skipped(on.Detail)) // the cause is the same
					return
				}
			}
			for _, name := range c.bars {
				if made[index[name]].Result == CheckFailure {
					made[i].judge("", dependsOn(name))
					return
				}
			}
			made[i].judge(c.run(ctx))
		}()
	}
	for _, ended := range done {
		<-ended
	}
	if len(p.keys) > 0 {
		if err := p.node.wipeKeys(p.keys...); err != nil {
			p.node.log.Warn("keys may be in memory until the process ends", zap.Error(err))
		}
	}
	return made
}

func (c *Check) judge(detail string, err error) {
	c.Result, c.Detail = CheckOK, detail
	if err == nil {
		return
	}
	var (
		mild  warning
		skips skipped
	)
	switch {
	case errors.As(err, &skips):
		c.Result, c.Detail = CheckSkipped, err.Error()
		return
	case errors.As(err, &mild):
		c.Result, err = CheckWarning, mild.err
	default:
		c.Result = CheckFailure
	}
	c.Err = err
	if c.Detail != "" {
		c.Detail += "; "
	}
	c.Detail += err.Error()
}

func (p *Preflight) configuration(context.Context) (string, error) {
	if p.err != nil {
		return "", p.err
	}
	info, err := os.Stat(p.path)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s, mode %04o, key %s", p.path, info.Mode().Perm(), p.node.cfg.KMSKey), nil
}

func (p *Preflight) metadata(ctx context.Context) (string, error) {
	identity, err := p.node.cloud.Identity(ctx)
	if err != nil {
		return "", err
	}
	p.identity = identity
	return fmt.Sprintf("IMDSv2: %s, %s, %s", identity.InstanceID, identity.InstanceType, identity.AvailabilityZone), nil
}

func (p *Preflight) credentials(ctx context.Context) (string, error) {
	role, err := p.node.cloud.CheckRole(ctx)
	if err != nil {
		return "", err
	}
	return "of role " + role, nil
}

func (p *Preflight) region(ctx context.Context) (string, error) {
	region, err := p.node.cloud.Region(ctx)
	switch {
	case err != nil:
		return "", err
	case p.identity.Region != "" && p.identity.Region != region:
		return fmt.Sprintf("KMS in %s, the node in %s", region, p.identity.Region), warning{ErrOtherRegion}
	}
	return region, nil
}

func (p *Preflight) endpoint(ctx context.Context) (string, error) {
	f, err := p.node.cloud.CheckEndpoint(ctx)
	if err != nil {
		return "", err
	}
	texts := make([]string, len(f.Addresses))
	for i, a := range f.Addresses {
		texts[i] = a.String()
	}
	detail := fmt.Sprintf("%s at %s", f.URL, strings.Join(texts, ", "))
	switch {
	case f.TLS == "":
		return detail + ", plain http on this machine or link", nil
	case !slices.ContainsFunc(f.Addresses, func(a netip.Addr) bool { return !a.IsPrivate() }):
		detail += " (private: a VPC endpoint)"
	}
	return fmt.Sprintf("%s, %s, certificate of %s by %s until %s", detail, f.TLS, f.Holder, f.Issuer, f.NotAfter.Format(time.DateOnly)), nil
}

func (p *Preflight) clock(context.Context) (string, error) {
	f, err := p.node.cloud.CheckClock()
	switch {
	case err != nil:
		return "", err
	case f.Server == "":
		return "", skipped(f.String())
	case f.Ahead.Abs() >= clockWarning:
		return f.String(), warning{ErrClockOff}
	}
	return f.String(), nil
}

func (p *Preflight) kmsKey(ctx context.Context) (string, error) {
	f, err := p.node.cloud.CheckKey(ctx)
	switch {
	case err != nil:
		return f.ARN, err
	case !f.Checked:
		return "", warning{fmt.Errorf("%w (%s)", ErrMayNotDescribe, p.node.cfg.KMSKey)}
	}
	return keyDetail(f), nil
}

func keyDetail(f keycache.KeyFacts) string {
	return fmt.Sprintf("%s, customer managed, %s, %s", f.ARN, f.Spec, f.State)
}

// archiveKey looks at the key of the escrow or the logs. It is for whoever configures: the node's role does not need DescribeKey there,
// so that it may not is no warning.
func (p *Preflight) archiveKey(ctx context.Context, arn string) (string, error) {
	f, err := p.node.checkKey(ctx, arn)
	switch {
	case err != nil:
		return f.ARN, err
	case !f.Checked:
		return "", skipped(fmt.Sprintf("%v (%s)", ErrMayNotDescribe, arn))
	}
	return keyDetail(f), nil
}

// bucket puts nothing there: what is in an archive stays.
func (p *Preflight) bucket(ctx context.Context, o archive.Options, prefix string) (string, error) {
	v, err := p.node.vault(ctx, o)
	if err != nil {
		return "", err
	}
	err = v.CheckBucket(ctx, prefix)
	var e *archive.Error
	switch {
	case errors.As(err, &e) && e.Reason == archive.ReasonDenied:
		return "", warning{fmt.Errorf("%w: %w", ErrMayNotList, err)}
	case err != nil:
		return "", err
	}
	return fmt.Sprintf("%s can be listed", v.URL(prefix)), nil
}

// dataKey proves what the first boot and every other one need of KMS. Nothing of it is kept.
func (p *Preflight) dataKey(ctx context.Context) (string, error) {
	key, rec, err := p.node.cloud.Generate(ctx)
	if err != nil {
		return "", err
	}
	p.keys = append(p.keys, key)
	proven, err := p.node.cloud.Decrypt(ctx, rec)
	if err != nil {
		return "", err
	}
	p.keys = append(p.keys, proven)
	if !proven.Equal(key) {
		return "", keycache.ErrOtherKey
	}
	return "GenerateDataKey and Decrypt give the same key; it was thrown away", nil
}

func (p *Preflight) kernel(context.Context) (string, error) {
	ready := luks.Check
	if p.node != nil {
		ready = p.node.maps.Ready
	}
	if err := ready(); err != nil {
		return "", err
	}
	driver, err := p.cipher()
	switch {
	case err != nil:
		return "dm-crypt", err
	case driver == "":
		return "dm-crypt; the kernel does not tell its ciphers before one is used", nil
	}
	return "dm-crypt, AES-XTS by " + driver, nil
}

func (p *Preflight) cryptsetup(ctx context.Context) (string, error) {
	version, err := p.version(ctx)
	if err != nil {
		return "", err
	}
	if err := p.replaces(ctx); err != nil {
		return version, warning{fmt.Errorf("%w: %w", ErrNoReplace, err)}
	}
	return version, nil
}

func (p *Preflight) filesystem(context.Context) (string, error) {
	wanted := []string{p.node.cfg.Filesystem}
	for _, v := range p.node.cfg.Volumes {
		if v.Filesystem != "" && !slices.Contains(wanted, v.Filesystem) {
			wanted = append(wanted, v.Filesystem)
		}
	}
	for _, fstype := range wanted {
		if err := volumes.CheckMakeFilesystem(fstype); err != nil {
			return "", err
		}
	}
	found := "mkfs." + strings.Join(wanted, ", mkfs.")
	if p.node.cfg.Stripe == On {
		if err := p.node.stripes.Ready(); err != nil {
			return "", err
		}
		found += ", mdadm"
	}
	return found, nil
}

func (p *Preflight) stateDir(ctx context.Context) (string, error) {
	n := p.node
	if err := n.checkStateDir(); err != nil {
		return "", err
	}
	f, err := keycache.CheckDir(n.cfg.StateDir)
	if err != nil {
		return "", err
	}
	scan, err := n.disks.Scan(ctx, nil)
	if err != nil {
		return "", err
	}
	if err := n.stateDirOnManaged(scan); err != nil {
		return "", err
	}
	detail := n.cfg.StateDir
	if !f.Exists {
		detail += " (will be made)"
	}
	detail += fmt.Sprintf(", %d MiB free", f.Free>>20)
	for _, d := range scan.Devices {
		holds := func(what string) bool {
			return slices.ContainsFunc(d.Uses, func(u volumes.Use) bool { return u.Kind == volumes.UseSystem && u.What == what })
		}
		// A directory of the root filesystem has no use of its own.
		if holds(n.cfg.StateDir) && !holds("/") {
			return detail, warning{fmt.Errorf("%w: it is on %s", ErrNotOnBoot, d.Path)}
		}
	}
	return detail + ", on the boot volume", nil
}

func (p *Preflight) manager(ctx context.Context) (string, error) {
	f, err := p.systemd(ctx)
	if err != nil {
		return "", err
	}
	p.units = f
	if f.Version < systemd.OldestVersion {
		return f.VersionText, fmt.Errorf("%w: needed is %d", ErrOldSystemd, systemd.OldestVersion)
	}
	return f.VersionText, nil
}

func (p *Preflight) service(context.Context) (string, error) {
	service, target := p.units.Service, p.units.Target
	for _, u := range []systemd.UnitFacts{service, target} {
		if u.Load != "loaded" {
			return "", fmt.Errorf("%w: %s is %s", ErrNoUnit, u.Name, u.Load)
		}
	}
	detail := fmt.Sprintf("%s: %s, %s", service.Fragment, service.File, service.Active)
	switch {
	case service.NeedsReload || target.NeedsReload:
		return detail, warning{ErrNotReloaded}
	case !strings.HasPrefix(service.File, "enabled"):
		return detail, warning{ErrNotEnabled}
	}
	return detail, nil
}

func (p *Preflight) cloudInits(context.Context) (string, error) {
	f, err := p.cloudInit()
	switch {
	case err != nil:
		return "", warning{err}
	case f.Line != "":
		return "", warning{fmt.Errorf("%w: /etc/fstab has %q", ErrCloudInit, f.Line)}
	case !f.Installed:
		return "not installed", nil
	case f.Disabled:
		return "disabled", nil
	case f.Mounts != "":
		return "", warning{fmt.Errorf("%w: %s has a mount point for ephemeral0", ErrCloudInit, f.Mounts)}
	case f.LeftAlone == "":
		return "", warning{fmt.Errorf("%w: nothing keeps it from ephemeral0", ErrCloudInit)}
	}
	return "ephemeral0 is left alone by " + f.LeftAlone, nil
}

func (p *Preflight) memory(context.Context) (string, error) {
	if err := p.protect(); err != nil {
		return "", warning{fmt.Errorf("%w: %w", ErrUnprotected, err)}
	}
	if limit := p.units.Service.LockedMemory; p.units.Service.Load == "loaded" && limit != math.MaxUint64 {
		return "", warning{fmt.Errorf("%w: the service has LimitMEMLOCK=%d", ErrUnprotected, limit)}
	}
	return "locked, and left out of core dumps", nil
}
