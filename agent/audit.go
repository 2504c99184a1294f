package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// EventKind names a security event. A name never gets another meaning.
type EventKind string

// The security events. docs/audit.md says what each means.
const (
	EventDataKeyMade              EventKind = "data-key-made"
	EventDataKeyUnwrapped         EventKind = "data-key-unwrapped"
	EventDataKeyRewrapped         EventKind = "data-key-rewrapped"
	EventDataKeyRotated           EventKind = "data-key-rotated"
	EventVolumeFormatted          EventKind = "volume-formatted"
	EventVolumeOpened             EventKind = "volume-opened"
	EventVolumeAdopted            EventKind = "volume-adopted"
	EventVolumeRefused            EventKind = "volume-refused"
	EventVolumeLocked             EventKind = "volume-locked"
	EventVolumeWiped              EventKind = "volume-wiped"
	EventRecordsQuarantined       EventKind = "records-quarantined"
	EventRecordArchived           EventKind = "record-archived"
	EventHeaderRestored           EventKind = "header-restored"
	EventHeaderBackedUp           EventKind = "header-backed-up"
	EventHeaderEscrowed           EventKind = "header-escrowed"
	EventHeaderRestoredFromBackup EventKind = "header-restored-from-backup"
	EventKeySlotRemoved           EventKind = "key-slot-removed"
	EventRecoveryKeyAdded         EventKind = "recovery-key-added"
	EventRecoveryKeyUsed          EventKind = "recovery-key-used"
	EventRecoveryKeyRemoved       EventKind = "recovery-key-removed"
	EventStripeMade               EventKind = "stripe-made"
	EventStripeCleared            EventKind = "stripe-cleared"
)

// MessageID is the MESSAGE_ID of an event's journal entries: the UUID, version 5, of its name in a namespace of our own.
func (k EventKind) MessageID() string {
	namespace := uuid.MustParse("ba82e27e-6b3a-4a5e-9d04-5c6f3e0d7c11")
	return strings.ReplaceAll(uuid.NewSHA1(namespace, []byte(k)).String(), "-", "")
}

// Event is a security event as those tell it who make it happen. It has no room for a key: what it names are records,
// disks and KMS's request ids.
type Event struct {
	Kind   EventKind
	Volume keycache.VolumeRecord // as far as it is known
	Device volumes.Device
	Key    keycache.KeyRecord
	// RequestID is that of the KMS call that gave the key which was used here, or that made the record. "" takes the one in Err.
	RequestID string
	From      keycache.KeyRecord // what Key took the place of
	KeySlot   *int
	Records   []string // "keys/<id>", "volumes/<uuid>": those that were moved
	Reason    string
	Err       error // nil: it went well
	// Begun says that the act has yet to be done. The line is on the disk when audit returns: for acts that take away what could
	// tell of them. A line with the result follows.
	Begun bool
}

// auditVersion is the version of a line's fields.
const auditVersion = 1

// AuditLine is one line of the audit log.
type AuditLine struct {
	Version      int       `json:"version"`
	Time         time.Time `json:"time"`
	Event        EventKind `json:"event"`
	Result       string    `json:"result"`
	InstanceID   string    `json:"instance_id,omitempty"`
	BootID       string    `json:"boot_id,omitempty"`
	Command      string    `json:"command,omitempty"`
	PID          int       `json:"pid"`
	AgentVersion string    `json:"agent_version,omitempty"`
	Volume       string    `json:"volume,omitempty"`
	Identity     string    `json:"identity,omitempty"`
	Device       string    `json:"device,omitempty"`
	Mapping      string    `json:"mapping,omitempty"`
	KeyARN       string    `json:"key_arn,omitempty"`
	KeyID        string    `json:"key_id,omitempty"`
	FromKeyARN   string    `json:"from_key_arn,omitempty"`
	FromKeyID    string    `json:"from_key_id,omitempty"`
	KeySlot      *int      `json:"key_slot,omitempty"`
	KMSRequestID string    `json:"kms_request_id,omitempty"`
	Records      []string  `json:"records,omitempty"`
	Refusal      Refusal   `json:"refusal,omitempty"`
	Reason       string    `json:"reason,omitempty"`
	Error        string    `json:"error,omitempty"`
}

// The results of a line.
const (
	auditOK     = "ok"
	auditFailed = "failed"
	auditBegun  = "begun"
)

// audit writes down a security event, in the audit log and in the journal. It never fails: what cannot be written is warned of
// and stands in the status, and the node comes up all the same.
func (n *Node) audit(e Event) {
	n.auditLog.add(e)
	if e.Err == nil && slices.Contains(changesEscrow, e.Kind) {
		n.changed.Store(true)
	}
}

// changesEscrow are the events after which what is in the escrow is not what is on the disk.
var changesEscrow = []EventKind{
	EventDataKeyRewrapped, EventDataKeyRotated, EventVolumeFormatted, EventVolumeAdopted, EventHeaderRestored, EventHeaderRestoredFromBackup,
	EventKeySlotRemoved, EventRecoveryKeyAdded, EventRecoveryKeyRemoved,
}

// auditOutcome writes down an action that went wrong and of which no event tells yet.
func (n *Node) auditOutcome(o Outcome) {
	a := o.Action
	if o.Err == nil || a.told {
		return
	}
	e := Event{Volume: a.Volume, Device: a.Device.Device, Key: a.Key, Err: o.Err}
	switch kind, _ := refusalOf(o.Err); {
	case kind != "":
		e.Kind = EventVolumeRefused
	case a.Verb == Format:
		e.Kind = EventVolumeFormatted
	case a.Verb == Unlock:
		e.Kind = EventVolumeOpened
	case a.Verb == Adopt:
		e.Kind = EventVolumeAdopted
	default:
		return
	}
	n.audit(e)
}

// refusalOf tells whether an error is that a volume was refused, and why.
func refusalOf(err error) (kind Refusal, why string) {
	var refused *RefusedError
	var header *luks.HeaderError
	switch {
	case errors.As(err, &refused):
		return refused.Refusal, refused.Reason
	case errors.As(err, &header), errors.Is(err, luks.ErrWrongKey):
		return RefusedHeader, err.Error()
	case errors.Is(err, volumes.ErrChanged):
		return RefusedDevice, err.Error()
	case errors.Is(err, volumes.ErrNotEmpty):
		return RefusedContent, err.Error()
	}
	return "", ""
}

// auditedCloud has an event for each data key that KMS gives out or refuses.
type auditedCloud struct {
	cloud
	to *auditLog
}

func (c auditedCloud) Identity(ctx context.Context) (keycache.Identity, error) {
	id, err := c.cloud.Identity(ctx)
	if err == nil {
		c.to.identify(id.InstanceID)
	}
	return id, err
}

func (c auditedCloud) Generate(ctx context.Context) (*keycache.Key, keycache.KeyRecord, error) {
	key, rec, err := c.cloud.Generate(ctx)
	c.to.add(Event{Kind: EventDataKeyMade, Key: rec, RequestID: rec.RequestID, Err: err})
	return key, rec, err
}

func (c auditedCloud) Decrypt(ctx context.Context, rec keycache.KeyRecord) (*keycache.Key, error) {
	key, err := c.cloud.Decrypt(ctx, rec)
	c.to.add(Event{Kind: EventDataKeyUnwrapped, Key: rec, RequestID: key.RequestID(), Err: err})
	return key, err
}

// auditLog is the file of events, and the journal. A line is one write to the end of the file, at once; what was written is
// synced by finish, and before add returns where an event asks for it.
type auditLog struct {
	path    string
	by      Program
	boot    string
	log     *zap.Logger
	now     func() time.Time
	journal func(systemd.Entry) error
	fsync   func(*os.File) error

	mu       sync.Mutex
	instance string
	file     *os.File    // nil: not open
	opened   os.FileInfo // of file
	fresh    bool        // its name may not be durable
	dirty    bool        // written to since the last sync
	torn     bool        // its last line has no end
	lost     int         // events that are not in the file
	err      error       // why
}

func newAuditLog(path string, by Program, log *zap.Logger) *auditLog {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return &auditLog{path: path, by: by, boot: strings.TrimSpace(string(boot)), log: log, now: time.Now,
		journal: systemd.Journal, fsync: (*os.File).Sync}
}

// identify says which instance later events are of.
func (l *auditLog) identify(instance string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.instance = instance
}

func (l *auditLog) add(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	line := l.line(e)
	var text bytes.Buffer
	enc := json.NewEncoder(&text) // ends the line
	enc.SetEscapeHTML(false)
	err := enc.Encode(line)
	if err == nil {
		err = l.write(text.Bytes())
	}
	if err == nil && e.Begun {
		err = l.sync()
	}
	errJournal := l.journal(entry(line, text.Bytes()))
	if err == nil {
		return
	}
	l.lost++
	l.failed(err)
	if errJournal != nil {
		l.log.Warn("an event is neither in the audit log nor in the journal", zap.String("event", string(line.Event)), zap.String("result", line.Result),
			zap.String("volume", line.Volume), zap.String("key", line.KeyID), zap.String("request", line.KMSRequestID), zap.Error(errJournal))
	}
}

// failed keeps why the file cannot be written, and warns the first time.
func (l *auditLog) failed(err error) {
	if l.err == nil {
		l.log.Warn("cannot write the audit log", zap.String("file", l.path), zap.Error(err))
	}
	l.err = err
}

// problem tells what is wrong with the file, "" where nothing is.
func (l *auditLog) problem() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		return ""
	}
	return fmt.Sprintf("cannot write the audit log %s: %v; events that are in the journal only: %d", l.path, l.err, l.lost)
}

func (l *auditLog) line(e Event) AuditLine {
	a := AuditLine{
		Version: auditVersion, Time: l.now().UTC(), Event: e.Kind, Result: auditOK,
		InstanceID: l.instance, BootID: l.boot, Command: l.by.Command, PID: os.Getpid(), AgentVersion: l.by.Version,
		Volume: e.Volume.UUID, Identity: e.Device.Identity, Device: e.Device.Path, Mapping: e.Volume.Mapping,
		KeyARN: e.Key.KeyARN, KeyID: e.Key.ID, FromKeyARN: e.From.KeyARN, FromKeyID: e.From.ID, KeySlot: e.KeySlot, KMSRequestID: e.RequestID,
		Records: e.Records, Reason: e.Reason,
	}
	if a.InstanceID == "" {
		a.InstanceID = e.Volume.InstanceID
	}
	if a.Identity == "" {
		a.Identity = e.Volume.Identity
	}
	if a.KeyID == "" {
		a.KeyID = e.Volume.KeyID
	}
	switch {
	case e.Begun:
		a.Result = auditBegun
	case e.Err != nil:
		a.Result, a.Error = auditFailed, e.Err.Error()
		var kms *keycache.Error
		if errors.As(e.Err, &kms) && a.KMSRequestID == "" {
			a.KMSRequestID = kms.RequestID
		}
		if e.Kind == EventVolumeRefused {
			a.Refusal, a.Reason = refusalOf(e.Err)
			a.Error = ""
		}
	}
	return a
}

// entry is the journal's entry of a line: its fields are those of the line.
func entry(line AuditLine, text []byte) systemd.Entry {
	words := []string{"audit:", string(line.Event), line.Result}
	for _, w := range []string{line.Volume, line.Device, line.Reason, line.Error} {
		if w != "" {
			words = append(words, w)
		}
	}
	e := systemd.Entry{
		MessageID: line.Event.MessageID(), Message: strings.Join(words, " "), Warning: line.Result == auditFailed, Fields: map[string]string{},
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		return e
	}
	for name, raw := range fields {
		var value string
		if json.Unmarshal(raw, &value) != nil {
			value = string(raw) // a number or a list
		}
		e.Fields["LUKS_KMS_AGENT_"+strings.ToUpper(name)] = value
	}
	return e
}

// write appends a line to the file that has the name now: logrotate may have put another one there.
func (l *auditLog) write(line []byte) error {
	if l.file != nil {
		if there, err := os.Lstat(l.path); err != nil || !os.SameFile(there, l.opened) {
			if err := l.close(); err != nil {
				return err
			}
		}
	}
	if l.file == nil {
		if err := l.open(); err != nil {
			return bareError(err)
		}
	}
	if l.torn {
		// A power cut, or a disk that was full, left half a line. It stays, and does not take this one with it.
		line = append([]byte{'\n'}, line...)
	}
	n, err := l.file.Write(line)
	if n > 0 {
		l.dirty, l.torn = true, line[n-1] != '\n'
	}
	return bareError(err)
}

func (l *auditLog) open() error {
	flags := os.O_RDWR | os.O_APPEND | os.O_CREATE | unix.O_NOFOLLOW | unix.O_NONBLOCK // a FIFO must not hang the boot
	f, err := os.OpenFile(l.path, flags, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		dir := filepath.Dir(l.path)
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		f, err = os.OpenFile(l.path, flags, 0o600)
	}
	if errors.Is(err, unix.ELOOP) {
		return errors.New("it is a symbolic link")
	}
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil {
		err = checkAuditFile(info)
	}
	last := []byte{'\n'}
	if err == nil && info.Size() > 0 {
		_, err = f.ReadAt(last, info.Size()-1)
	}
	if err != nil {
		_ = f.Close()
		return err
	}
	l.file, l.opened, l.fresh, l.torn = f, info, info.Size() == 0, last[0] != '\n'
	return nil
}

// checkAuditFile refuses a file into which others can write. Whether they may read it is the operator's to say.
func checkAuditFile(info os.FileInfo) error {
	if !info.Mode().IsRegular() {
		return errors.New("it is not a regular file")
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int64(st.Uid) != int64(os.Geteuid()) {
		return fmt.Errorf("it is owned by user %d, not by %d", st.Uid, os.Geteuid())
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("its mode %04o lets group or others write it", perm)
	}
	return nil
}

// sync brings what was written to the disk.
func (l *auditLog) sync() error {
	if l.file == nil || !l.dirty {
		return nil
	}
	if err := l.fsync(l.file); err != nil {
		return bareError(err)
	}
	l.dirty = false
	if !l.fresh {
		return nil
	}
	l.fresh = false
	dir := filepath.Dir(l.path)
	return errors.Join(syncDir(dir), syncDir(filepath.Dir(dir)))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (l *auditLog) close() error {
	err := l.sync()
	if l.file != nil {
		err = errors.Join(err, l.file.Close())
	}
	l.file, l.dirty = nil, false
	return err
}

// finish brings all events to the disk. Events may follow.
func (l *auditLog) finish() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.close(); err != nil {
		l.failed(err)
	}
}

// bareError is the cause inside an error of package os: the path is known.
func bareError(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
