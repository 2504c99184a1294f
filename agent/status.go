package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
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
	Version    int            `json:"version"`
	Started    time.Time      `json:"started"`
	Finished   time.Time      `json:"finished"`
	InstanceID string         `json:"instance_id,omitempty"`
	Result     string         `json:"result"`          // "ok" or "failed"
	Error      string         `json:"error,omitempty"` // what stopped the run as a whole
	AuditError string         `json:"audit_error,omitempty"`
	KMS        CallsStatus    `json:"kms"`
	Volumes    []VolumeStatus `json:"volumes"`
}

// CallsStatus counts what was asked of AWS.
type CallsStatus struct {
	GenerateDataKey int      `json:"generate_data_key"`
	Decrypt         int      `json:"decrypt"`
	DescribeKey     int      `json:"describe_key"`
	ReEncrypt       int      `json:"re_encrypt,omitempty"`
	IMDS            int      `json:"imds"`
	Retries         int      `json:"retries"`
	RequestIDs      []string `json:"request_ids,omitempty"`
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
	// State is "mounted", "open", "locked", "missing" or "" (none of ours). It is
	// looked up when the status is asked for, not written to the file.
	State string `json:"state,omitempty"`
}

func newStatus(r Report, err error) Status {
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
		if o.Err != nil {
			v.Error, s.Result = o.Err.Error(), "failed"
		}
		s.Volumes = append(s.Volumes, v)
	}
	return s
}

func volumeStatus(a Action) VolumeStatus {
	v := recordStatus(a.Volume)
	v.Action, v.Reason = string(a.Verb), a.Reason
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

// writeStatus replaces the status file as a whole. It is derived, so it is not
// synced; a reader sees the old one or the new one.
func writeStatus(path string, s Status) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
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

// Status tells how the last run went and how every recorded volume is now. It asks
// neither KMS nor IMDS.
func (n *Node) Status(ctx context.Context) (Status, error) {
	s, err := ReadStatus(n.statusPath)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s = Status{Version: statusVersion, Result: "none", Volumes: []VolumeStatus{}}
	case err != nil:
		return s, err
	}
	store, err := keycache.ViewStore(n.cfg.StateDir)
	if err != nil {
		return s, err
	}
	records, err := store.Load()
	if err != nil {
		return s, err
	}
	scan, err := n.disks.Scan(ctx, nil)
	if err != nil {
		return s, err
	}
	for _, id := range sortedKeys(records.Volumes) {
		rec := records.Volumes[id]
		i := slices.IndexFunc(s.Volumes, func(v VolumeStatus) bool { return v.UUID == id })
		if i < 0 {
			i = len(s.Volumes)
			s.Volumes = append(s.Volumes, recordStatus(rec))
		}
		s.Volumes[i].State, s.Volumes[i].Device = stateOf(rec, scan, s.Volumes[i].Device)
	}
	return s, nil
}

// stateOf tells how a recorded volume is now, and on which device.
func stateOf(rec keycache.VolumeRecord, scan volumes.Scan, device string) (state, path string) {
	state = "missing"
	for _, d := range scan.Devices {
		if m, ok := ourMapping(d, rec); ok {
			if len(m.Mounts) > 0 {
				return "mounted", d.Path
			}
			return "open", d.Path
		}
		if d.Path == device || sameDisk(rec, d) {
			state, path = "locked", d.Path
		}
	}
	return state, path
}
