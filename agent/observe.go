package agent

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// observe collects the facts. Disks, headers and IMDS are read at the
// same time; where keys is not nil, KMS is already asked for the keys of the
// volumes that will have to be opened, so that its answer comes while disks are
// being read.
func (n *Node) observe(ctx context.Context, store *keycache.Store, keys *keyring) (Facts, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f := Facts{Config: n.cfg}
	end := n.spans.begin(SpanRecords, "read", nil)
	records, err := store.Load()
	end(err)
	if err != nil {
		return f, err
	}
	f.Records = records
	if keys != nil {
		n.closeUnfinished(ctx, records)
	}

	var identity keycache.Identity
	var errIdentity error
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		if identity, errIdentity = n.cloud.Identity(ctx); errIdentity == nil && keys != nil {
			keys.expect(records, identity.InstanceID, n.maps.IsOpen)
		}
	}()
	scan, err := n.scan(ctx)
	if err != nil {
		return f, err
	}
	if err := n.stateDirOnManaged(scan); err != nil {
		return f, err
	}
	f.Missing, f.Gone = scan.Missing, scan.Gone

	inspected := make(chan []DeviceFacts, 1)
	go func() { inspected <- n.inspect(ctx, scan.Devices) }()
	<-asked
	if errIdentity == nil {
		f.InstanceID = identity.InstanceID
	}
	f.Devices = <-inspected
	return f, errIdentity
}

// closeUnfinished removes what a run that was killed left between loading a table and using it. It would be taken for an open volume.
func (n *Node) closeUnfinished(ctx context.Context, records keycache.Records) {
	defer n.spans.begin(SpanMap, "unfinished mappings", nil)(nil)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, v := range records.Volumes {
		if err := n.maps.CloseUnfinished(ctx, v.Mapping); err != nil {
			n.log.Warn("a mapping without a table stays", zap.Error(err))
		}
	}
}

// scan lists the disks. Only where there are Xen disks does IMDS have to say
// which of them are instance store.
func (n *Node) scan(ctx context.Context) (volumes.Scan, error) {
	scan, err := n.scanOnce(ctx, "disks", nil)
	if err != nil {
		return scan, err
	}
	xen := slices.ContainsFunc(scan.Devices, func(d volumes.Device) bool { return strings.HasPrefix(d.Name, "xvd") })
	if !xen {
		return scan, nil
	}
	ephemeral, err := n.cloud.Ephemeral(ctx)
	if err != nil {
		return scan, err
	}
	return n.scanOnce(ctx, "disks, with IMDS's names", ephemeral)
}

func (n *Node) scanOnce(ctx context.Context, name string, ephemeral []string) (volumes.Scan, error) {
	end := n.spans.begin(SpanScan, name, nil)
	scan, err := n.disks.Scan(ctx, ephemeral)
	end(err)
	return scan, err
}

// stateDirOnManaged refuses records that only they themselves can open: a state
// directory on a volume of a class that the agent manages, reached through a LUKS
// mapping. An encrypted root disk holds the rest of the system too and is fine.
func (n *Node) stateDirOnManaged(scan volumes.Scan) error {
	for _, d := range scan.Devices {
		if d.Class == "" || len(d.Mappings) == 0 {
			continue
		}
		holdsState, holdsRoot := false, false
		for _, u := range d.Uses {
			holdsState = holdsState || u.Kind == volumes.UseSystem && u.What == n.cfg.StateDir
			holdsRoot = holdsRoot || u.Kind == volumes.UseSystem && u.What == "/"
		}
		if holdsState && !holdsRoot {
			return &ConfigError{Path: n.cfg.Path, Err: fmt.Errorf("state_dir %s lies on %s, an encrypted volume that only its records can open", n.cfg.StateDir, d.Path)}
		}
	}
	return nil
}

// inspect reads the headers, and where there is none the content, of the disks
// that may be ours.
func (n *Node) inspect(ctx context.Context, devices []volumes.Device) []DeviceFacts {
	return eachDisk(devices, func(d volumes.Device, f *DeviceFacts) {
		if d.Class != "" && len(d.Uses) == 0 && len(d.Mappings) == 0 && !n.isExcluded(d) {
			p := n.spans.phases(&f.Device, "")
			p.next(SpanInspect, "header, content")
			f.Header, f.Content, f.Err = look(ctx, d)
			p.end(f.Err)
		}
	})
}

// eachDisk looks at the disks, several at the same time.
func eachDisk(devices []volumes.Device, look func(volumes.Device, *DeviceFacts)) []DeviceFacts {
	facts := make([]DeviceFacts, len(devices))
	slots := make(chan struct{}, max(4, runtime.GOMAXPROCS(0)))
	var wg sync.WaitGroup
	for i, d := range devices {
		facts[i].Device = d
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			look(d, &facts[i])
		})
	}
	wg.Wait()
	return facts
}

func (n *Node) isExcluded(d volumes.Device) bool {
	return slices.ContainsFunc(n.cfg.Exclude, d.Is)
}

// look reads what is on a disk. The second look, which runs blkid and reads 32
// MiB, is only for disks without LUKS, so a reboot does neither.
func look(ctx context.Context, d volumes.Device) (*luks.Inspection, *volumes.Content, error) {
	header, err := luks.Inspect(d.Path)
	if err != nil {
		return nil, nil, err
	}
	if header.Kind != luks.KindNone {
		return header, nil, nil
	}
	content, err := volumes.Probe(ctx, d.Path, d.Size)
	if err != nil {
		return nil, nil, err
	}
	return header, &content, nil
}

// keyring asks KMS for each data key at most once and owns all of them.
type keyring struct {
	ctx   context.Context
	cloud cloud
	mu    sync.Mutex
	keys  map[string]*pendingKey // by key record id
	// onDemand says that nothing is asked before it is needed: most volumes stay as they are.
	onDemand bool
}

type pendingKey struct {
	done chan struct{}
	key  *keycache.Key
	err  error
}

func newKeyring(ctx context.Context, c cloud) *keyring {
	return &keyring{ctx: ctx, cloud: c, keys: map[string]*pendingKey{}}
}

// expect starts Decrypt for the keys of this instance's ready volumes that are
// not open yet.
func (k *keyring) expect(r keycache.Records, instanceID string, isOpen func(mapping string) bool) {
	if k.onDemand {
		return
	}
	for _, v := range r.Volumes {
		if v.State != keycache.StateReady || v.InstanceID != instanceID || isOpen(v.Mapping) {
			continue
		}
		for _, id := range keyIDs(v) {
			if rec, ok := r.Keys[id]; ok && rec.InstanceID == instanceID {
				k.start(rec)
			}
		}
	}
}

func (k *keyring) start(rec keycache.KeyRecord) *pendingKey {
	k.mu.Lock()
	defer k.mu.Unlock()
	if p, ok := k.keys[rec.ID]; ok {
		return p
	}
	p := &pendingKey{done: make(chan struct{})}
	k.keys[rec.ID] = p
	go func() {
		defer close(p.done)
		p.key, p.err = k.cloud.Decrypt(k.ctx, rec)
	}()
	return p
}

// get waits for the key of a record. The key stays the keyring's.
func (k *keyring) get(rec keycache.KeyRecord) (*keycache.Key, error) {
	p := k.start(rec)
	<-p.done
	return p.key, p.err
}

// take waits for what is under way and gives every key to the caller, to be wiped.
func (k *keyring) take() []*keycache.Key {
	k.mu.Lock()
	defer k.mu.Unlock()
	var keys []*keycache.Key
	for _, p := range k.keys {
		<-p.done
		if p.key != nil {
			keys = append(keys, p.key)
		}
	}
	return keys
}
