package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// DefaultDisksPath is where the disks are that a run of this boot has dealt with. It comes with the first run, and
// luks-kms-agent@.service starts only where it is.
const DefaultDisksPath = "/run/luks-kms-agent/disks.json"

// attachWait is how long a disk that was attached waits for a command that holds the records: nine others that came at the same time
// may have to be formatted first.
const attachWait = 10 * time.Minute

// Attached is a disk as udev names it: its kernel name and, behind a colon, its disk sequence number, which a disk that comes later
// under the same name does not have. Kernels before 5.15 have no such number.
type Attached struct {
	Name    string
	DiskSeq uint64 // 0: not known
}

// ParseAttached reads NAME[:DISKSEQ].
func ParseAttached(text string) (Attached, error) {
	name, seq, ok := strings.Cut(text, ":")
	a := Attached{Name: strings.TrimPrefix(name, "/dev/")}
	if a.Name == "" {
		return a, fmt.Errorf("%q names no disk", text)
	}
	if ok {
		var err error
		if a.DiskSeq, err = strconv.ParseUint(seq, 10, 64); err != nil || a.DiskSeq == 0 {
			return a, fmt.Errorf("%q is not a disk's sequence number", seq)
		}
	}
	return a, nil
}

func (a Attached) is(d volumes.Device) bool {
	return d.Is(a.Name) && (a.DiskSeq == 0 || a.DiskSeq == d.DiskSeq)
}

// nothingNew ends a run for an attached disk before it asks anybody for anything.
type nothingNew struct{ why string }

func (e *nothingNew) Error() string { return e.why }

// RunAttached is Run for a disk that was attached while the node runs. Who holds the records is waited for; then every disk is dealt
// with that no run of this boot has dealt with yet, so that of many that come together the first does the work and the others find it
// done. What was there before stays as it is: a volume that was locked stays locked.
//
// done is why there is nothing to do, "" where there was something. The report then is of the whole node; what it says of this disk
// has [Report.FailuresOf].
func (n *Node) RunAttached(ctx context.Context, disk Attached) (report Report, done string, err error) {
	service, err := n.service(ctx)
	if err != nil {
		return Report{}, "", err
	}
	// Whoever installs the package, or stops the service, has not asked for disks to be formatted.
	if service.Active == "inactive" || service.Active == "" {
		return Report{}, "luks-kms-agent.service is not active", nil
	}
	n.lockWait = attachWait
	report, err = n.carryOut(ctx, errand{command: "run", attached: &disk, choose: func(p Plan) (Plan, error) { return n.onlyNew(p, disk) }})
	var nothing *nothingNew
	if errors.As(err, &nothing) {
		return Report{}, nothing.why, nil
	}
	return report, "", err
}

// FailuresOf are the errors of the report that are about one disk.
func (r Report) FailuresOf(disk Attached) []error {
	var errs []error
	for _, o := range r.Outcomes {
		if o.Err != nil && o.Action.Device.Path != "" && disk.is(o.Action.Device.Device) {
			errs = append(errs, o.Err)
		}
	}
	return errs
}

// wants says whether a run for an attached disk has anything to do: a *nothingNew if not.
func (n *Node) wants(ctx context.Context, disk Attached) error {
	scan, err := n.disks.Scan(ctx, nil)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(scan.Devices, disk.is)
	switch {
	case i < 0:
		return &nothingNew{disk.Name + " is not there, or cannot be a volume"}
	case n.dealtWith().has(scan.Devices[i]) && scan.Devices[i].DiskSeq != 0:
		return &nothingNew{disk.Name + " was dealt with"}
	}
	return nil
}

// onlyNew takes from a plan what it would do with disks that runs have dealt with, and with those that are not announced. Where the
// kernel does not number disks, the one that was attached is new.
func (n *Node) onlyNew(p Plan, attached Attached) (Plan, error) {
	dealt := n.dealtWith()
	for i := range p.Actions {
		a := &p.Actions[i]
		if a.Verb.acts() && dealt.has(a.Device.Device) && (a.Device.DiskSeq != 0 || !attached.is(a.Device.Device)) {
			a.Verb, a.Reason, a.Replaces = Leave, "left as it was when another disk was attached: "+a.Reason, nil
		}
	}
	return onlyAnnounced(p)
}

// onlyAnnounced takes from a plan what it would do with disks that udev is not done with. They get a run of their own, when the links are
// there by which the configuration may name or exclude them.
func onlyAnnounced(p Plan) (Plan, error) {
	for i := range p.Actions {
		if a := &p.Actions[i]; a.Verb.acts() && a.Device.Unannounced {
			a.Verb, a.Reason, a.Replaces = Leave, "udev is not done with it: "+a.Reason, nil
		}
	}
	return p, nil
}

// cameMeanwhile says whether there is a disk, announced, of which the report does not tell.
func (n *Node) cameMeanwhile(ctx context.Context, report Report) (bool, error) {
	scan, err := n.scanOnce(ctx, "disks that came meanwhile", nil)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(scan.Devices, func(d volumes.Device) bool {
		told := slices.ContainsFunc(report.Outcomes, func(o Outcome) bool { return o.isAbout(d) })
		return !told && !d.Unannounced
	}), nil
}

// disksVersion is the version of the file of disks.
const disksVersion = 1

// disksFile are the disks that runs of this boot have dealt with, and that are still there.
type disksFile struct {
	Version int         `json:"version"`
	Disks   []dealtDisk `json:"disks"`
}

type dealtDisk struct {
	Name    string `json:"name"`
	DiskSeq uint64 `json:"diskseq,omitempty"`
}

func (f *disksFile) has(d volumes.Device) bool {
	return f != nil && slices.Contains(f.Disks, dealtDisk{d.Name, d.DiskSeq})
}

// dealtWith reads the file of disks; nil where there is none that can be read: no run has ended in this boot.
func (n *Node) dealtWith() *disksFile {
	f := &disksFile{}
	data, err := os.ReadFile(n.beside(DefaultDisksPath))
	if err == nil {
		err = json.Unmarshal(data, f)
	}
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			n.log.Warn("cannot read which disks were dealt with", zap.Error(err))
		}
		return nil
	}
	return f
}

// noteDisks writes down which of the disks that are there have been dealt with: those that were before, or about which nothing went
// wrong now.
func (n *Node) noteDisks(there []volumes.Device, outcomes []Outcome) {
	before, now := n.dealtWith(), &disksFile{Version: disksVersion, Disks: []dealtDisk{}}
	for _, d := range there {
		dealt := before.has(d)
		for _, o := range outcomes {
			if o.isAbout(d) {
				dealt = o.Err == nil
			}
		}
		if dealt {
			now.Disks = append(now.Disks, dealtDisk{d.Name, d.DiskSeq})
		}
	}
	n.writeDisks(now)
}

// isAbout says whether an outcome is about this very disk.
func (o Outcome) isAbout(d volumes.Device) bool {
	return o.Action.Device.Name == d.Name && o.Action.Device.DiskSeq == d.DiskSeq
}

func (n *Node) writeDisks(f *disksFile) {
	data, err := json.Marshal(f)
	if err == nil {
		err = replaceFile(n.beside(DefaultDisksPath), append(data, '\n'), 0o600)
	}
	if err != nil {
		n.log.Warn("cannot write which disks were dealt with: those that are attached wait for a run", zap.Error(err))
	}
}

// noteLocked has volumes that a person locked stay locked when another disk is attached.
func (n *Node) noteLocked(locked []Locked, there []volumes.Device) {
	f := n.dealtWith()
	if f == nil {
		return
	}
	for _, l := range locked {
		for _, d := range there {
			if l.Err == nil && d.Path == l.Device && !f.has(d) {
				f.Disks = append(f.Disks, dealtDisk{d.Name, d.DiskSeq})
			}
		}
	}
	n.writeDisks(f)
}

// stillOpen finds the mapping of a record whose disk was taken away from under it.
func stillOpen(gone []volumes.Mapping, rec keycache.VolumeRecord) (volumes.Mapping, bool) {
	return ourMapping(volumes.Device{Mappings: gone}, rec)
}

// describeGone says how a volume is whose disk was taken away from under it.
func describeGone(m volumes.Mapping) string {
	if len(m.Mounts) == 0 {
		return fmt.Sprintf("its disk was taken away while it was open as %s", m.Name)
	}
	return fmt.Sprintf("its disk was taken away while it was mounted on %s", strings.Join(m.Mounts, ", "))
}
