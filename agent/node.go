package agent

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// lockWait is how long a command waits for another one that holds the records.
// The boot run may be retrying KMS for longer than that; who waits is told.
const lockWait = 30 * time.Second

// cloud is what the agent asks of AWS; *keycache.Client has it.
type cloud interface {
	Identity(context.Context) (keycache.Identity, error)
	Ephemeral(context.Context) ([]string, error)
	CheckKey(context.Context) (keycache.KeyFacts, error)
	Generate(context.Context) (*keycache.Key, keycache.KeyRecord, error)
	Decrypt(context.Context, keycache.KeyRecord) (*keycache.Key, error)
	ReEncrypt(context.Context, keycache.KeyRecord) (keycache.KeyRecord, error)
	CheckRole(context.Context) (name string, err error)
	Region(context.Context) (string, error)
	CheckEndpoint(context.Context) (keycache.EndpointFacts, error)
	CheckClock() (keycache.ClockFacts, error)
	Calls() keycache.Calls
}

// disks is what the agent asks of the machine's block devices.
type disks interface {
	// Scan lists the disks; ephemeral are IMDS's names of Xen instance store.
	Scan(ctx context.Context, ephemeral []string) (volumes.Scan, error)
	// Hold locks a disk against others and checks that it still is the one seen.
	Hold(context.Context, volumes.Device) (io.Closer, error)
	// Check tells whether the disk still is the one seen.
	Check(volumes.Device) error
}

// mapper makes and removes mappings in the kernel.
type mapper interface {
	// Open verifies the header and the key, and maps the volume.
	Open(context.Context, *luks.Inspection, luks.Key, luks.OpenOptions) error
	// OpenRecovery is Open by a recovery key.
	OpenRecovery(context.Context, *luks.Inspection, luks.Key, luks.OpenOptions) error
	Close(ctx context.Context, name string) error
	// CloseUnfinished removes a mapping that a killed run left without a table in use.
	CloseUnfinished(ctx context.Context, name string) error
	// IsOpen tells whether there is a mapping of that name.
	IsOpen(name string) bool
	// Announce lets systemd look at an open mapping again, before it is mounted.
	Announce(name string) error
	// Path is where an open mapping is read and written.
	Path(name string) string
	// Ready tells whether the kernel can map at all.
	Ready() error
}

// mounter mounts and unmounts; *systemd.Manager has it.
type mounter interface {
	StartMount(context.Context, systemd.Mount) error
	StopMount(ctx context.Context, where string) error
	StartSwap(ctx context.Context, device, description string) error
	StopSwap(ctx context.Context, device string) error
	Close()
}

// Node is one machine under one configuration.
type Node struct {
	// Progress, where not nil, is told what is being done, for a person who waits. It
	// is called by several goroutines, and must not wait.
	Progress func(text string)

	cfg   Config
	log   *zap.Logger
	cloud cloud
	disks disks
	maps  mapper
	// stripes makes and assembles arrays.
	stripes stripes
	// vault opens a bucket, and checkKey looks at a key that is not the volumes', by its ARN.
	vault    func(context.Context, archive.Options) (vault, error)
	checkKey func(ctx context.Context, arn string) (keycache.KeyFacts, error)
	mounts   func(context.Context) (mounter, error)
	// sendEscrow has the escrow's service send what changed, if that is on; changed says that something did.
	sendEscrow func(context.Context) error
	changed    atomic.Bool
	// service is what systemd knows of the agent's service.
	service  func(context.Context) (systemd.UnitFacts, error)
	lockWait time.Duration
	usage    func(mountPoint string) (volumes.Space, error)

	// statusPath is where the outcome of the last run stands for others to read.
	statusPath string
	now        func() time.Time
	spans      *spans
	program    Program
	auditLog   *auditLog
	atStep     func(step)
	wipeKeys   func(...*keycache.Key) error
}

// Program is what only the program knows, and the audit log, the status and the metrics tell.
type Program struct {
	Version string // of the agent
	Command string // as the user names it: run, unlock, …
	// ExitCode is the exit code for all that failed, 0 for nothing. nil: all codes are 0.
	ExitCode func([]error) int
}

// New joins the rooms for this machine. It touches nothing.
func New(cfg Config, log *zap.Logger, by Program) (*Node, error) {
	spans := &spans{now: time.Now}
	n := &Node{
		cfg:     cfg,
		log:     log,
		maps:    kernelMapper{},
		stripes: machineStripes{},
		mounts:  func(ctx context.Context) (mounter, error) { return systemd.Connect(ctx) },
		service: func(ctx context.Context) (systemd.UnitFacts, error) {
			facts, err := systemd.Look(ctx)
			return facts.Service, err
		},
		sendEscrow: func(ctx context.Context) error {
			m, err := systemd.Connect(ctx)
			if err != nil {
				return err
			}
			defer m.Close()
			return m.StartWhere(ctx, "luks-kms-agent-escrow.service", "luks-kms-agent-escrow.timer")
		},
		lockWait:   lockWait,
		usage:      volumes.Usage,
		statusPath: DefaultStatusPath,
		now:        time.Now,
		spans:      spans,
		program:    by,
		auditLog:   newAuditLog(cfg.AuditLog, by, log),
		atStep:     stepHook(),
		wipeKeys:   keycache.WipeAll,
	}
	options := keycache.Options{
		KeyID:        cfg.KMSKey,
		Region:       cfg.Region,
		KMSEndpoint:  cfg.KMSEndpoint,
		IMDSEndpoint: cfg.IMDSEndpoint,
		CallTimeout:  cfg.CallTimeout,
		RetryLimit:   cfg.RetryLimit,
		OnAttempt:    spans.attempted,
		OnRetry: func(r keycache.Retry) {
			spans.retried(r)
			log.Warn("waiting for AWS", zap.String("call", r.Op), zap.Int("attempt", r.Attempt),
				zap.Duration("next_try_in", r.Wait), zap.Duration("given_up_after", r.Limit), zap.Error(r.Err))
			n.tell(fmt.Sprintf("Waiting for %s, attempt %d: %v", r.Op, r.Attempt, r.Err))
			systemd.ExtendTimeout(r.Wait + cfg.CallTimeout + time.Minute)
		},
	}
	client, err := keycache.New(options)
	if err != nil {
		return nil, err
	}
	n.checkKey = func(ctx context.Context, arn string) (keycache.KeyFacts, error) {
		o := options
		o.KeyID, o.Region = arn, strings.Split(arn, ":")[3]
		c, err := keycache.New(o)
		if err != nil {
			return keycache.KeyFacts{}, err
		}
		return c.CheckKey(ctx)
	}
	n.vault = func(ctx context.Context, o archive.Options) (vault, error) {
		o.Credentials, o.KMSEndpoint, o.Timeout = client.Credentials(), cfg.KMSEndpoint, escrowTimeout
		if o.Region == "" {
			region, err := client.Region(ctx)
			if err != nil {
				return nil, err
			}
			o.Region = region
		}
		return archive.New(o)
	}
	named := make([]string, len(cfg.Volumes))
	for i, v := range cfg.Volumes {
		named[i] = v.Name
	}
	n.cloud, n.disks = auditedCloud{client, n.auditLog}, machineDisks{stateDir: cfg.StateDir, named: named}
	return n, nil
}

// tell says to systemd and to whoever waits what the command is doing.
func (n *Node) tell(text string) {
	systemd.Status(text)
	n.step("%s", text)
}

// step says to whoever waits what is being done with one volume or key. systemd is
// not told: its one line is about the whole.
func (n *Node) step(format string, args ...any) {
	if n.Progress != nil {
		n.Progress(fmt.Sprintf(format, args...))
	}
}

// machineDisks are the disks of this machine.
type machineDisks struct {
	stateDir string
	named    []string
}

func (m machineDisks) Scan(ctx context.Context, ephemeral []string) (volumes.Scan, error) {
	return volumes.Scanner{StateDir: m.stateDir, Named: m.named, Ephemeral: ephemeral}.Scan(ctx)
}

func (m machineDisks) Hold(ctx context.Context, d volumes.Device) (io.Closer, error) {
	return d.Hold(ctx)
}

func (m machineDisks) Check(d volumes.Device) error { return d.Check() }

// kernelMapper maps through device-mapper.
type kernelMapper struct{}

func (kernelMapper) Open(ctx context.Context, i *luks.Inspection, k luks.Key, o luks.OpenOptions) error {
	return i.Open(ctx, k, o)
}

func (kernelMapper) OpenRecovery(ctx context.Context, i *luks.Inspection, k luks.Key, o luks.OpenOptions) error {
	return i.OpenRecovery(ctx, k, o)
}

func (kernelMapper) Path(name string) string { return "/dev/mapper/" + name }

func (kernelMapper) Close(ctx context.Context, name string) error { return luks.Close(ctx, name) }

func (kernelMapper) CloseUnfinished(ctx context.Context, name string) error {
	return luks.CloseUnfinished(ctx, name)
}

func (kernelMapper) IsOpen(name string) bool { return luks.IsOpen(name) }

func (kernelMapper) Announce(name string) error { return luks.Announce(name) }

func (kernelMapper) Ready() error { return luks.Check() }

// lockRecords opens the state directory for writing and keeps other commands out
// until release is called, which also brings the audit log to the disk.
func (n *Node) lockRecords(ctx context.Context) (*keycache.Store, func(), error) {
	defer n.spans.begin(SpanRecords, "lock", nil)(nil)
	if err := n.checkStateDir(); err != nil {
		return nil, nil, err
	}
	store, err := keycache.OpenStore(n.cfg.StateDir)
	if err != nil {
		return nil, nil, err
	}
	wait, cancel := context.WithTimeout(ctx, n.lockWait)
	defer cancel()
	release, err := store.Lock(wait, func(process string) {
		n.log.Warn("waiting for another command", zap.String("process", process), zap.Duration("given_up_after", n.lockWait))
		n.tell("Waiting for another command, process " + process)
	})
	if err != nil {
		return nil, nil, err
	}
	return store, func() { n.auditLog.finish(); release(); n.escrowChanges() }, nil
}

// checkStateDir refuses a state directory that a symlink leads somewhere else:
// where the records really are must be what the scan protects.
func (n *Node) checkStateDir() error {
	dir := n.cfg.StateDir
	for existing := dir; ; existing = filepath.Dir(existing) {
		real, err := filepath.EvalSymlinks(existing)
		if os.IsNotExist(err) && existing != "/" {
			continue
		}
		if err != nil {
			return &keycache.StoreError{Path: dir, Err: err}
		}
		if real != existing {
			return &ConfigError{Path: n.cfg.Path, Err: fmt.Errorf("state_dir is %s, but %s is a symbolic link to %s: name the real place", dir, existing, real)}
		}
		return nil
	}
}
