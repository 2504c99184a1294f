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

	"go.uber.org/zap"

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
	ExitCode    int            `json:"exit_code"`
	LastSuccess *time.Time     `json:"last_success,omitempty"` // when a run of this boot last ended with result "ok"
	KMS         CallsStatus    `json:"kms"`
	Volumes     []VolumeStatus `json:"volumes"`
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
	// State is "mounted", "open", "locked", "missing" or "" (none of ours). It is
	// looked up when the status is asked for, not written to the file.
	State string `json:"state,omitempty"`
}

func newStatus(r Report, err error) Status {
	s := Status{
		Version: statusVersion, Started: r.Started.UTC(), Finished: r.Finished.UTC(), InstanceID: r.InstanceID, Result: "ok",
		KMS:     CallsStatus(r.Calls),
		Volumes: []VolumeStatus{},
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

// tell writes down how a run went: the status, the timeline and the metrics. None of
// them is needed for anything, so a failure is only logged.
func (n *Node) tell(ctx context.Context, command string, report Report, err error) {
	s := newStatus(report, err)
	if n.Program.ExitCode != nil {
		failed := report.Failures()
		if err != nil {
			failed = []error{err}
		}
		s.ExitCode = n.Program.ExitCode(failed)
	}
	if s.Result == "ok" {
		s.LastSuccess = &s.Finished
	} else if before, err := ReadStatus(n.statusPath); err == nil {
		s.LastSuccess = before.LastSuccess
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
	n.tellMetrics(ctx, true)
}

// beside is where a file of the run directory is: with the status.
func (n *Node) beside(path string) string {
	return filepath.Join(filepath.Dir(n.statusPath), filepath.Base(path))
}

// Status tells how the last run went and how every recorded volume is now. It asks
// neither KMS nor IMDS.
func (n *Node) Status(ctx context.Context) (Status, error) {
	s, _, err := n.currentStatus(ctx, false)
	return s, err
}

// currentStatus is Status, and the key records. What the last run said comes with an
// error too. Where it has just ended and did all, disks are not looked at again: it
// would only be waited for.
func (n *Node) currentStatus(ctx context.Context, justRan bool) (Status, map[string]keycache.KeyRecord, error) {
	s, err := ReadStatus(n.statusPath)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s = Status{Version: statusVersion, Result: "none", Volumes: []VolumeStatus{}}
	case err != nil:
		return Status{Version: statusVersion, Result: "none", Volumes: []VolumeStatus{}}, nil, err
	}
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
	for _, id := range sortedKeys(records.Volumes) {
		rec := records.Volumes[id]
		i := slices.IndexFunc(s.Volumes, func(v VolumeStatus) bool { return v.UUID == id })
		if i < 0 {
			i = len(s.Volumes)
			s.Volumes = append(s.Volumes, recordStatus(rec))
		}
		s.Volumes[i].State, s.Volumes[i].Device = stateOf(rec, scan, s.Volumes[i].Device)
	}
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
