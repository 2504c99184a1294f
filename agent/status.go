package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// DefaultStatusPath is where the outcome of the last run is written. It is on a
// tmpfs: it speaks of this boot only.
const DefaultStatusPath = "/run/luks-kms-agent/status.json"

// statusVersion is the version of the status file's fields.
const statusVersion = 1

// Outcome is how one action went.
type Outcome struct {
	Action Action
	Err    error
	Took   time.Duration
	Opened time.Time // when it opened the volume; zero where it did not
}

// Report is how a run went.
type Report struct {
	Started, Finished time.Time
	InstanceID        string
	Outcomes          []Outcome
	Calls             keycache.Calls
	AuditProblem      string // why events are missing in the audit log, "" where none is
}

// Failures are the errors of the report's outcomes.
func (r Report) Failures() []error {
	var errs []error
	for _, o := range r.Outcomes {
		if o.Err != nil {
			errs = append(errs, o.Err)
		}
	}
	return errs
}

// Status is the outcome of the last run, as the status file has it.
type Status struct {
	Version     int            `json:"version"`
	Started     time.Time      `json:"started"`
	Finished    time.Time      `json:"finished"`
	InstanceID  string         `json:"instance_id,omitempty"`
	Result      string         `json:"result"`          // "ok" or "failed"
	Error       string         `json:"error,omitempty"` // what stopped the run as a whole
	AuditError  string         `json:"audit_error,omitempty"`
	ExitCode    int            `json:"exit_code"`
	LastSuccess *time.Time     `json:"last_success,omitempty"` // when a run of this boot last ended with result "ok"
	KMS         CallsStatus    `json:"kms"`
	Volumes     []VolumeStatus `json:"volumes"`

	// What follows is of now, and not in the file.

	// Well says that every recorded volume is mounted and that there are no problems, here or with a volume.
	Well        *bool    `json:"well,omitempty"`
	Problems    []string `json:"problems,omitempty"`    // that are not of one volume
	Quarantined int      `json:"quarantined,omitempty"` // volume records in quarantine
	KMSKey      string   `json:"kms_key,omitempty"`     // as it is configured
	// Logs is how the archive of logs is doing; nil where none is configured, or nothing was ever sent.
	Logs *LogsStatus `json:"logs,omitempty"`
}

// CallsStatus counts what was asked of AWS.
type CallsStatus struct {
	GenerateDataKey int            `json:"generate_data_key"`
	Decrypt         int            `json:"decrypt"`
	DescribeKey     int            `json:"describe_key"`
	ReEncrypt       int            `json:"re_encrypt,omitempty"`
	IMDS            int            `json:"imds"`
	Retries         int            `json:"retries"`
	RequestIDs      []string       `json:"request_ids,omitempty"`
	RetriesOf       map[string]int `json:"retries_of,omitempty"` // call -> waits
}

// VolumeStatus is one device of the last run, and what is so of it now.
type VolumeStatus struct {
	Device     string  `json:"device,omitempty"`
	Class      string  `json:"class,omitempty"`
	Identity   string  `json:"identity,omitempty"`
	Size       int64   `json:"size,omitempty"` // bytes
	UUID       string  `json:"uuid,omitempty"`
	KeyID      string  `json:"key_id,omitempty"`
	Mapping    string  `json:"mapping,omitempty"`
	MountPoint string  `json:"mount_point,omitempty"`
	Filesystem string  `json:"filesystem,omitempty"`
	Action     string  `json:"action,omitempty"`
	Reason     string  `json:"reason,omitempty"`
	Error      string  `json:"error,omitempty"`
	Seconds    float64 `json:"seconds,omitempty"`
	Missing    bool    `json:"missing,omitempty"` // the run found no disk
	// LastUnlock is when a run of this boot last opened it.
	LastUnlock time.Time `json:"last_unlock,omitzero"`

	// What follows is of now, and not in the file.

	State            string    `json:"state,omitempty"` // "mounted", "open", "locked", "missing" or "" (no record)
	FilesystemSize   int64     `json:"filesystem_size,omitempty"`
	FilesystemUsed   int64     `json:"filesystem_used,omitempty"`
	KeyARN           string    `json:"key_arn,omitempty"` // of its key record
	KeyCreated       time.Time `json:"key_created,omitzero"`
	RewrapPending    bool      `json:"rewrap_pending,omitempty"` // record or token is not under the configured KMS key
	RecoveryKey      *bool     `json:"recovery_key,omitempty"`   // nil where no header was read
	OtherKeySlots    *int      `json:"other_key_slots,omitempty"`
	HeaderBackup     time.Time `json:"header_backup,omitzero"`
	BackupStale      bool      `json:"header_backup_stale,omitempty"` // the header was changed since
	Escrow           time.Time `json:"escrow,omitzero"`               // when the last copy was confirmed
	EscrowPending    bool      `json:"escrow_pending,omitempty"`      // an escrow is configured, and has not what the volume has now
	PrimaryDamaged   bool      `json:"primary_damaged,omitempty"`
	SecondaryDamaged bool      `json:"secondary_damaged,omitempty"`
	Problems         []string  `json:"problems,omitempty"`
}

// newStatus is what a run writes down. last is what stood there: when a volume was opened is kept for as long as the boot lasts.
func newStatus(r Report, err error, last Status) Status {
	s := Status{
		Version: statusVersion, Started: r.Started.UTC(), Finished: r.Finished.UTC(), InstanceID: r.InstanceID, Result: "ok",
		AuditError: r.AuditProblem,
		KMS:        CallsStatus(r.Calls),
		Volumes:    []VolumeStatus{},
	}
	if err != nil {
		s.Result, s.Error = "failed", err.Error()
	}
	for _, o := range r.Outcomes {
		if o.Action.Unrelated() {
			continue
		}
		v := volumeStatus(o.Action)
		v.Seconds = o.Took.Seconds()
		if !o.Opened.IsZero() {
			v.LastUnlock = o.Opened.UTC()
		}
		if o.Err != nil {
			v.Error, s.Result = o.Err.Error(), "failed"
		}
		s.Volumes = append(s.Volumes, v)
	}
	for _, old := range last.Volumes {
		if old.UUID == "" || old.LastUnlock.IsZero() {
			continue
		}
		if v := s.volume(old.UUID); v == nil {
			old.Action, old.Reason, old.Error, old.Seconds = "", "", "", 0
			s.Volumes = append(s.Volumes, old)
		} else if v.LastUnlock.IsZero() {
			v.LastUnlock = old.LastUnlock
		}
	}
	return s
}

// volume finds a volume by its UUID, nil if it is not there.
func (s *Status) volume(uuid string) *VolumeStatus {
	for i := range s.Volumes {
		if s.Volumes[i].UUID == uuid {
			return &s.Volumes[i]
		}
	}
	return nil
}

func volumeStatus(a Action) VolumeStatus {
	v := recordStatus(a.Volume)
	v.Action, v.Reason, v.Missing = string(a.Verb), a.Reason, a.Missing
	if a.Device.Path != "" {
		v.Device, v.Class, v.Identity, v.Size = a.Device.Path, string(a.Device.Class), a.Device.Identity, a.Device.Size
	}
	return v
}

func recordStatus(r keycache.VolumeRecord) VolumeStatus {
	return VolumeStatus{
		Class: r.Class, Identity: r.Identity, Size: r.Size, UUID: r.UUID, KeyID: r.KeyID,
		Mapping: r.Mapping, MountPoint: r.MountPoint, Filesystem: r.Filesystem,
	}
}

// writeStatus replaces the status file as a whole.
func writeStatus(path string, s Status) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(path, append(data, '\n'), 0o600)
}

// ReadStatus reads the status file; fs.ErrNotExist means that nothing ran since
// the boot.
func ReadStatus(path string) (Status, error) {
	var s Status
	data, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(data, &s)
}

// lastStatus is what the last run of this boot wrote; empty where that cannot be read.
func (n *Node) lastStatus() Status {
	s, err := ReadStatus(n.statusPath)
	if err != nil {
		return Status{}
	}
	return s
}

// writeDown writes down how a run went: the status, the timeline and the metrics. None of
// them is needed for anything, so a failure is only logged.
func (n *Node) writeDown(ctx context.Context, command string, report Report, err error) {
	last := n.lastStatus()
	s := newStatus(report, err, last)
	if n.program.ExitCode != nil {
		failed := report.Failures()
		if err != nil {
			failed = []error{err}
		}
		s.ExitCode = n.program.ExitCode(failed)
	}
	if s.Result == "ok" {
		s.LastSuccess = &s.Finished
	} else {
		s.LastSuccess = last.LastSuccess
	}
	if err := writeStatus(n.statusPath, s); err != nil {
		n.log.Warn("cannot write the status", zap.Error(err))
	}
	data, err := json.Marshal(n.spans.timeline(command, s, report.Finished))
	if err == nil {
		err = replaceFile(n.beside(DefaultTimelinePath), append(data, '\n'), 0o600)
	}
	if err != nil {
		n.log.Warn("cannot write the timeline", zap.Error(err))
	}
	n.tellMetrics(ctx, s, true)
}

// beside is where a file of the run directory is: with the status.
func (n *Node) beside(path string) string {
	return filepath.Join(filepath.Dir(n.statusPath), filepath.Base(path))
}

// Status tells how the last run went and how every recorded volume is now. It asks
// neither KMS nor IMDS, needs no key and takes no lock. The error is for what leaves
// nothing to tell; what else is wrong is in the status.
func (n *Node) Status(ctx context.Context) (Status, error) {
	s, _, err := n.currentStatus(ctx, n.lastRun(), false)
	return s, err
}

// lastRun is how the last run went, or that none did, or that this cannot be read.
func (n *Node) lastRun() Status {
	s, err := ReadStatus(n.statusPath)
	if err != nil {
		s = Status{Version: statusVersion, Result: "none", Volumes: []VolumeStatus{}}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.Problems = append(s.Problems, fmt.Sprintf("cannot read how the last run went: %v", err))
	}
	return s
}

// currentStatus is Status after the run that s tells of, and the key records. What that said comes with an
// error too. Where it has just ended and did all, disks are not looked at again: it
// would only be waited for.
func (n *Node) currentStatus(ctx context.Context, s Status, justRan bool) (Status, map[string]keycache.KeyRecord, error) {
	store, err := keycache.ViewStore(n.cfg.StateDir)
	if err != nil {
		return s, nil, err
	}
	records, err := store.Load()
	if err != nil {
		return s, nil, err
	}
	if justRan && s.mountedAll(records) {
		return s, records.Keys, nil
	}
	scan, err := n.disks.Scan(ctx, nil)
	if err != nil {
		return s, nil, err
	}
	if s.AuditError != "" {
		s.Problems = append(s.Problems, s.AuditError)
	}
	if s.Error != "" {
		s.Problems = append(s.Problems, s.Error)
	}
	for _, p := range records.Problems {
		s.Problems = append(s.Problems, p.Error())
	}
	for _, m := range scan.Missing {
		s.Problems = append(s.Problems, fmt.Sprintf("%s is named in the configuration, but %s", m.Name, m.Reason))
	}
	s.KMSKey, s.Quarantined = n.cfg.KMSKey, store.Quarantined()
	if s.Logs, err = n.logsStatus(); err != nil {
		s.Problems = append(s.Problems, err.Error())
	}

	facts := Facts{Config: n.cfg, InstanceID: s.InstanceID, Records: records, Gone: scan.Gone, Devices: n.headers(scan.Devices, records)}
	for _, id := range sortedKeys(records.Volumes) {
		v := s.volume(id)
		if v == nil {
			s.Volumes = append(s.Volumes, recordStatus(records.Volumes[id]))
			v = s.volume(id)
		}
		n.describe(v, records.Volumes[id], facts, store)
	}
	// Of a volume that has no record any more only a run can tell.
	s.Volumes = slices.DeleteFunc(s.Volumes, func(v VolumeStatus) bool { return v.State == "" && v.Action == "" })
	well := len(s.Problems) == 0 && (len(records.Volumes) > 0 || s.Result == "ok")
	for i := range s.Volumes {
		v := &s.Volumes[i]
		there := slices.ContainsFunc(scan.Devices, func(d volumes.Device) bool { return d.Path == v.Device })
		if v.State == "" && v.Error != "" && there { // what has no disk is told of above, as it is now
			v.Problems = []string{v.Error}
		}
		well = well && len(v.Problems) == 0 && (v.State == "" || v.State == "mounted")
	}
	s.Well = &well
	return s, records.Keys, nil
}

// mountedAll tells whether the run left every recorded volume mounted, and notes it.
func (s Status) mountedAll(records keycache.Records) bool {
	done := []Verb{Format, Unlock, Adopt, Mount, Nothing}
	var mounted []int
	for i, v := range s.Volumes {
		if _, ok := records.Volumes[v.UUID]; ok && v.Error == "" && slices.Contains(done, Verb(v.Action)) {
			mounted = append(mounted, i)
		}
	}
	if len(mounted) < len(records.Volumes) {
		return false
	}
	for _, i := range mounted {
		s.Volumes[i].State = "mounted"
	}
	return true
}

// headers reads the headers of the disks that may be ours, open ones too.
func (n *Node) headers(devices []volumes.Device, records keycache.Records) []DeviceFacts {
	return eachDisk(devices, func(d volumes.Device, f *DeviceFacts) {
		open := false
		for _, rec := range records.Volumes {
			_, ours := ourMapping(d, rec)
			open = open || ours
		}
		if open || len(records.Volumes) > 0 && d.Class != "" && len(d.Uses) == 0 && !n.isExcluded(d) {
			f.Header, f.Err = luks.Inspect(d.Path)
		}
	})
}

// describeEscrow fills in whether a volume's header and records are off the node.
func (n *Node) describeEscrow(v *VolumeStatus, rec keycache.VolumeRecord, disk DeviceFacts, store *keycache.Store) error {
	if n.cfg.Escrow.Bucket == "" || rec.State != keycache.StateReady {
		return nil
	}
	v.EscrowPending = true
	note, err := store.Escrow(rec.UUID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	e := n.cfg.Escrow
	v.Escrow = note.Confirmed
	// As with header backups: every change of a header raises its number.
	changed := disk.Header != nil && disk.Header.Header != nil && disk.Header.Header.SeqID != note.SeqID || rec.Changed.After(note.Time)
	v.EscrowPending = note.Confirmed.IsZero() || changed || note.Bucket != e.Bucket || note.Mode != e.Mode || note.KeyARN != e.KMSKey
	return nil
}

// describe fills in how a recorded volume is now.
func (n *Node) describe(v *VolumeStatus, rec keycache.VolumeRecord, f Facts, store *keycache.Store) {
	problem := func(format string, args ...any) { v.Problems = append(v.Problems, fmt.Sprintf(format, args...)) }
	disk, mounts, others := f.find(rec, v.Device)
	v.Class, v.Identity, v.Size, v.KeyID = rec.Class, rec.Identity, rec.Size, rec.KeyID
	if disk.Path != "" {
		v.Class, v.Identity, v.Size = string(disk.Class), disk.Identity, disk.Size
	}
	v.Mapping, v.MountPoint, v.Filesystem = rec.Mapping, rec.MountPoint, rec.Filesystem
	switch note, err := store.Backup(rec.UUID); {
	case err == nil:
		// Every change of a header raises its number, so this is as good as to read all of it.
		v.HeaderBackup = note.Time
		v.BackupStale = disk.Header != nil && disk.Header.Header != nil && disk.Header.Header.SeqID != note.SeqID
	case !errors.Is(err, fs.ErrNotExist):
		problem("%v", err)
	}
	if err := n.describeEscrow(v, rec, disk, store); err != nil {
		problem("%v", err)
	}

	switch {
	case mounts != nil && len(*mounts) > 0:
		v.State = "mounted"
		if !slices.Contains(*mounts, rec.MountPoint) {
			problem("it is mounted on %s, not on %s", strings.Join(*mounts, ", "), rec.MountPoint)
		}
		if (*mounts)[0] == volumes.SwapPoint {
			break
		}
		if space, err := n.usage((*mounts)[0]); err == nil {
			v.FilesystemUsed, v.FilesystemSize = space.Used, space.Total
		} else {
			problem("%v", err)
		}
	case mounts != nil:
		v.State = "open"
	case disk.Path != "":
		v.State = "locked"
	default:
		v.State = "missing"
	}
	v.Device = disk.Path
	gone, open := stillOpen(f.Gone, rec)
	if open {
		problem("%s, and was not locked since", describeGone(gone))
	}
	switch {
	case v.State == "mounted": // what an earlier run could not do is done
	case open && v.State == "missing":
	case v.Error != "":
		problem("%s", v.Error)
	case v.State == "missing":
		problem("no disk shows it")
	}
	for _, other := range others {
		if v.State == "mounted" || v.Error == "" { // else the error says it
			problem("%s shows the same LUKS UUID", other)
		}
	}
	if rec.State == keycache.StateFormatting {
		problem("its format was not finished")
	}
	if rec.State == keycache.StateWiping {
		problem("its wipe was not finished: run wipe again")
	}
	if rec.Rotation != nil {
		problem("its data key is being replaced: run rotate to end that")
	}
	if f.InstanceID != "" && rec.InstanceID != f.InstanceID {
		problem("its record is of instance %s: the next run moves it to quarantine", rec.InstanceID)
	}
	v.describeHeader(disk, rec, problem)
	v.describeKey(disk, rec, f, problem)
}

// find returns the disk of a recorded volume: the one that it is open on, else one that shows its header, last if it does, else the one
// that the record was made for. mounts is nil where the volume is not open. others are the paths of further disks with its header.
func (f Facts) find(rec keycache.VolumeRecord, last string) (disk DeviceFacts, mounts *[]string, others []string) {
	var open, shown, same []DeviceFacts
	for _, d := range f.Devices {
		m, ours := ourMapping(d.Device, rec)
		switch {
		case ours:
			open, mounts = append(open, d), &m.Mounts
		case d.Header != nil && d.Header.Header != nil && d.Header.Header.UUID == rec.UUID:
			shown = append(shown, d)
		case sameDisk(rec, d.Device):
			same = append(same, d)
		}
	}
	if i := slices.IndexFunc(shown, func(d DeviceFacts) bool { return d.Path == last }); i > 0 {
		shown[0], shown[i] = shown[i], shown[0]
	}
	all := slices.Concat(open, shown)
	if len(all) == 0 && len(same) > 0 {
		return same[0], nil, nil
	}
	for i, d := range all {
		if i > 0 {
			others = append(others, d.Path)
		}
	}
	if len(all) > 0 {
		disk = all[0]
	}
	return disk, mounts, others
}

// describeHeader tells what the header on the volume's disk says. It is an untrusted disk's word, and read without a key.
func (v *VolumeStatus) describeHeader(disk DeviceFacts, rec keycache.VolumeRecord, problem func(string, ...any)) {
	switch h := disk.Header; {
	case disk.Path == "":
	case disk.Err != nil:
		problem("%v", disk.Err)
	case h == nil:
		problem("its header was not read: the disk is in use or excluded")
	case rec.State == keycache.StateFormatting:
	case h.Header == nil || h.Header.UUID != rec.UUID:
		problem("its disk does not show its LUKS header")
	case !h.Pass():
		problem("its LUKS header cannot be trusted: %s", strings.Join(h.Reasons, "; "))
	default:
		recovery, other := false, 0
		for _, slot := range h.Header.Keyslots {
			switch {
			case h.Header.Token != nil && slot.ID == h.Header.Token.Keyslot:
			case slices.Contains(slot.Tokens, luks.RecoveryTokenType):
				recovery = true
			default:
				other++
			}
		}
		v.RecoveryKey, v.OtherKeySlots = &recovery, &other
		if v.PrimaryDamaged = h.PrimaryDamaged; v.PrimaryDamaged {
			problem("the primary LUKS header is damaged; the next unlock restores it from the secondary")
		}
		if v.SecondaryDamaged = h.SecondaryDamaged; v.SecondaryDamaged {
			problem("the secondary LUKS header is damaged")
		}
	}
}

// describeKey tells about the volume's data key, from its record and the token.
func (v *VolumeStatus) describeKey(disk DeviceFacts, rec keycache.VolumeRecord, f Facts, problem func(string, ...any)) {
	key, ok := f.Records.Keys[rec.KeyID]
	if !ok {
		problem("%s", (&decision{Facts: Facts{InstanceID: rec.InstanceID, Records: f.Records}}).keyProblem(rec.KeyID))
		return
	}
	v.KeyARN, v.KeyCreated = key.KeyARN, key.Created
	under := []string{key.KeyARN}
	if v.RecoveryKey != nil && disk.Header.Header.Token != nil {
		under = append(under, disk.Header.Header.Token.KeyARN)
	}
	for _, arn := range under {
		if f.Config.sameKMSKey(arn) {
			continue
		}
		v.RewrapPending = true
		if !slices.Contains(f.Config.AllowedKeys, arn) {
			problem("its data key is under %s, not under the configured key: rewrap is pending", arn)
			return
		}
	}
}
