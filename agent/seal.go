package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/archive/logs"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

// Reasons why an image is not sealed.
var (
	// ErrUnsaved refuses to remove what may be the last copy of a wrapped key.
	ErrUnsaved = errors.New("they may be the last copies of their wrapped keys")
	// ErrInImage refuses to save records where they go into the image.
	ErrInImage = errors.New("it is on the filesystem of the state directory, and would go into the image")
)

// SealOptions say what may become of records of which no volume is attached.
type SealOptions struct {
	SaveTo  string // a file to keep them in
	Discard bool   // or they may go
}

// SealVerb is what becomes of one file or folder.
type SealVerb string

// What SealImage does.
const (
	SealRemove     SealVerb = "remove"     // a record, or a note of one
	SealQuarantine SealVerb = "quarantine" // a record
	SealClear      SealVerb = "clear"      // a log, or how the last run went
	SealKeep       SealVerb = "keep"       // it stays in the image
)

// SealAct is one of them, and why.
type SealAct struct {
	Verb SealVerb
	Path string
	Why  string
}

// Seal is what SealImage is to do, or did.
type Seal struct {
	Acts []SealAct
	// Refused is why nothing was done. Acts are then what would be.
	Refused []error
	// Discards counts the records that would go without being saved, archived ones among them.
	Discards int
	SavedTo  string // "" where nothing was to be saved
	InMemory bool   // SavedTo does not outlive the power

	removal                 keycache.Removal
	asideVolumes, asideKeys []string // for quarantine
	mustSave                bool     // the removal has more than notes
}

// Changes says whether anything is, or was, to be done.
func (s Seal) Changes() bool {
	return slices.ContainsFunc(s.Acts, func(a SealAct) bool { return a.Verb != SealKeep })
}

// SealImage takes off the boot volume what is this node's, so that it can become an image: the records, the audit log and how the last run
// went. It is refused while a volume is open, or while anything that says which are ours cannot be read.
//
// A record of which no volume is attached is removed, once it is saved or may be discarded; one whose volume is attached goes to
// quarantine, with the others under its data key. confirm is told what there is, and nothing is changed unless it returns nil.
// It may be cut at any point, and repeated: a record is saved, or moved, before it is removed.
//
// There is no event of it: the audit log is one of the things that go.
func (n *Node) SealImage(ctx context.Context, opts SealOptions, confirm func(Seal) error) (Seal, error) {
	store, release, err := n.lockRecords(ctx)
	if err != nil {
		return Seal{}, err
	}
	defer release()
	facts := Facts{Config: n.cfg}
	if facts.Records, err = store.Load(); err != nil {
		return Seal{}, err
	}
	n.closeUnfinished(ctx, facts.Records)
	scan, err := n.scan(ctx)
	if err != nil {
		return Seal{}, err
	}
	facts.Devices = n.inspect(ctx, scan.Devices)

	s := Seal{Refused: facts.unsealable(n.maps.IsOpen)}
	if _, err := os.Stat(n.cfg.Logs.Spool); err == nil {
		release, err := logs.Lock(n.cfg.Logs.Spool)
		if err != nil {
			s.Refused = append(s.Refused, err)
		} else {
			defer release()
		}
	}
	s.sort(facts, n.cfg.StateDir)
	if err := s.addLeftovers(store, n.cfg.StateDir); err != nil {
		return s, err
	}
	if err := s.addTraces(n); err != nil {
		return s, err
	}
	if err := s.choose(opts, n.cfg.StateDir); err != nil {
		return s, err
	}
	if len(s.Refused) > 0 {
		return s, nil
	}
	if err := confirm(s); err != nil {
		return s, err
	}
	return s, n.seal(store, s)
}

func (n *Node) seal(store *keycache.Store, s Seal) error {
	if len(s.removal.Files()) > 0 {
		if err := store.Remove(s.removal, s.SavedTo); err != nil {
			return err
		}
		n.reached(stepSealRemoved)
	}
	if len(s.asideKeys)+len(s.asideVolumes) > 0 {
		if err := store.Quarantine(s.asideKeys, s.asideVolumes, "the image was sealed while the volume was attached"); err != nil {
			return err
		}
		n.reached(stepSealQuarantined)
	}
	dirs := map[string]bool{}
	for _, a := range s.Acts {
		if a.Verb != SealClear {
			continue
		}
		if err := os.Remove(a.Path); err != nil {
			return fmt.Errorf("cannot remove %s: %w", a.Path, bareError(err))
		}
		dirs[filepath.Dir(a.Path)] = true
		n.reached(stepSealCleared)
	}
	for _, dir := range sortedKeys(dirs) {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// unsealable is all that speaks against sealing.
func (f Facts) unsealable(isOpen func(mapping string) bool) []error {
	var refused []error
	for _, p := range f.Records.Problems {
		refused = append(refused, &p)
	}
	for _, d := range f.Devices {
		if d.Class != "" && d.Err != nil {
			refused = append(refused, &RefusedError{Refusal: RefusedDevice, Device: d.Path, Reason: fmt.Sprintf("which volume is on it cannot be read: %v", d.Err)})
		}
	}
	for _, uuid := range sortedKeys(f.Records.Volumes) {
		if err := f.sealable(f.Records.Volumes[uuid], isOpen); err != nil {
			refused = append(refused, err)
		}
	}
	return refused
}

// sealable refuses a volume without whose record, while it is attached, the next run might do what it must not.
func (f Facts) sealable(v keycache.VolumeRecord, isOpen func(mapping string) bool) error {
	attached := f.showing(v)
	for _, d := range attached {
		if m, ok := ourMapping(d.Device, v); ok {
			reason := fmt.Sprintf("volume %s (%s) is open as %s", v.UUID, v.Identity, m.Name)
			if len(m.Mounts) > 0 {
				reason += " and mounted on " + strings.Join(m.Mounts, ", ")
			}
			return &RefusedError{Refusal: RefusedInUse, Device: d.Path, Reason: reason}
		}
	}
	switch {
	case isOpen(v.Mapping):
		return &RefusedError{Refusal: RefusedInUse, Reason: fmt.Sprintf("volume %s (%s) is open as %s, and its disk is gone", v.UUID, v.Identity, v.Mapping)}
	case len(attached) == 0:
		return nil
	case v.State == keycache.StateWiping:
		return &RefusedError{Refusal: RefusedWiping, Device: attached[0].Path, Reason: fmt.Sprintf("a wipe of volume %s was begun and not finished", v.UUID)}
	case v.Rotation != nil:
		return fmt.Errorf("cannot set the record of volume %s aside: %w", v.UUID, ErrRotating)
	case v.State == keycache.StateFormatting || f.locate(v).Device.Path != "":
		return nil
	}
	d := attached[0]
	if d.Err != nil {
		return nil // that is told of the disk
	}
	if _, excluded := (&decision{Facts: f}).excluded(d.Device); excluded {
		return nil // no run touches it
	}
	if len(d.Uses) > 0 {
		return &RefusedError{Refusal: RefusedInUse, Device: d.Path, Reason: "it is in use: " + d.Uses[0].Evidence}
	}
	return &RefusedError{Refusal: RefusedHeader, Device: d.Path,
		Reason: fmt.Sprintf("volume %s is recorded ready on it, and its header is not there: without the record the next run may format the disk", v.UUID)}
}

// showing are the disks that may be a volume: it is open on them, they show its header, or they have its identity.
func (f Facts) showing(v keycache.VolumeRecord) []DeviceFacts {
	return slices.DeleteFunc(slices.Clone(f.Devices), func(d DeviceFacts) bool {
		_, open := ourMapping(d.Device, v)
		header := d.Header != nil && d.Header.Header != nil && d.Header.Header.UUID == v.UUID
		return !open && !header && !sameDisk(v, d.Device)
	})
}

// sort parts the records: those that an attached volume needs, and all that belong to these, are for quarantine, and the others go.
func (s *Seal) sort(f Facts, stateDir string) {
	why := map[string]string{} // of key and volume records, by id
	for id, k := range f.Records.Keys {
		for _, d := range f.Devices {
			if d.Header != nil && d.Header.Header != nil && d.Header.Header.Token != nil && bytes.Equal(d.Header.Header.Token.WrappedKey, k.WrappedKey) {
				why[id] = "its data key is that of the volume on " + d.Path
			}
		}
	}
	for id, v := range f.Records.Volumes {
		if disks := f.showing(v); len(disks) > 0 {
			why[id] = "its volume is attached: " + disks[0].Path
		}
	}
	for again := true; again; {
		again = false
		for id, v := range f.Records.Volumes {
			together := append(keyIDs(v), id)
			i := slices.IndexFunc(together, func(id string) bool { return why[id] != "" })
			if i < 0 {
				continue
			}
			for _, other := range together {
				if why[other] == "" {
					why[other], again = "it belongs to "+together[i]+", which has an attached volume", true
				}
			}
		}
	}
	add := func(folder, id string, aside, gone *[]string) {
		a := SealAct{Verb: SealQuarantine, Path: filepath.Join(stateDir, folder, id+".json"), Why: why[id]}
		if a.Why == "" {
			a.Verb, a.Why = SealRemove, "no volume of it is attached"
			*gone = append(*gone, id)
		} else {
			*aside = append(*aside, id)
		}
		s.Acts = append(s.Acts, a)
	}
	for _, id := range sortedKeys(f.Records.Volumes) {
		add("volumes", id, &s.asideVolumes, &s.removal.Volumes)
	}
	for _, id := range sortedKeys(f.Records.Keys) {
		add("keys", id, &s.asideKeys, &s.removal.Keys)
	}
}

// addLeftovers adds what else the store has.
func (s *Seal) addLeftovers(store *keycache.Store, stateDir string) (err error) {
	if s.removal.Leftovers, err = store.Leftovers(); err != nil {
		return err
	}
	for _, file := range s.removal.Leftovers {
		why := "archived"
		switch {
		case strings.HasPrefix(file, "backups/"):
			why = "note of a header backup"
		case strings.HasPrefix(file, "escrow/"):
			why = "note of an escrow"
		case !strings.Contains(file, "/"):
			why = "a stripe of this node that was not finished"
		default:
			s.mustSave = true
		}
		s.Acts = append(s.Acts, SealAct{Verb: SealRemove, Path: filepath.Join(stateDir, file), Why: why})
		uuid := strings.TrimSuffix(filepath.Base(file), ".json")
		if note, err := store.Backup(uuid); err == nil && why != "archived" {
			if _, err := os.Lstat(note.Path); err == nil {
				s.Acts = append(s.Acts, SealAct{Verb: SealKeep, Path: note.Path, Why: "header backup of volume " + uuid + ": bring it to another disk"})
			}
		}
	}
	s.Discards = len(s.removal.Files())
	s.mustSave = s.mustSave || len(s.removal.Keys)+len(s.removal.Volumes) > 0
	folders, err := store.QuarantineFolders()
	for _, folder := range folders {
		s.Acts = append(s.Acts, SealAct{Verb: SealKeep, Path: filepath.Join(stateDir, folder), Why: "records that were set aside; no run reads them"})
	}
	return err
}

// addTraces adds the logs, and what tells of the last run.
func (s *Seal) addTraces(n *Node) error {
	dir := filepath.Dir(n.cfg.AuditLog)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot read %s: %w", dir, bareError(err))
	}
	for _, e := range entries {
		// As logrotate names them: audit.jsonl, audit.jsonl.1, audit.jsonl-20260131, and each .gz.
		rest, ok := strings.CutPrefix(e.Name(), filepath.Base(n.cfg.AuditLog))
		if ok && (rest == "" || rest[0] == '.' || rest[0] == '-') && !e.IsDir() {
			s.Acts = append(s.Acts, SealAct{Verb: SealClear, Path: filepath.Join(dir, e.Name()), Why: "audit log"})
		}
	}
	pieces, err := logs.Files(n.cfg.Logs.Spool)
	if err != nil {
		return err
	}
	for _, path := range pieces {
		s.Acts = append(s.Acts, SealAct{Verb: SealClear, Path: path, Why: "of the archive of logs"})
	}
	for _, file := range []string{DefaultStatusPath, DefaultTimelinePath, DefaultMetricsPath, DefaultLogMetricsPath} {
		if _, err := os.Lstat(n.beside(file)); err == nil {
			s.Acts = append(s.Acts, SealAct{Verb: SealClear, Path: n.beside(file), Why: "how the last run went"})
		}
	}
	return nil
}

// choose sees to it that no record goes that was neither saved nor given up.
func (s *Seal) choose(opts SealOptions, stateDir string) error {
	switch {
	case s.Discards == 0:
		return nil
	case opts.SaveTo == "":
		if s.mustSave && !opts.Discard {
			s.Refused = append(s.Refused, fmt.Errorf("cannot remove the records in %s: %w", stateDir, ErrUnsaved))
		}
		return nil
	}
	path, err := filepath.Abs(opts.SaveTo)
	if err != nil {
		return err
	}
	var there, store unix.Stat_t
	var on unix.Statfs_t
	dir := filepath.Dir(path)
	if err := errors.Join(unix.Stat(dir, &there), unix.Stat(stateDir, &store), unix.Statfs(dir, &on)); err != nil {
		return fmt.Errorf("cannot save records to %s: %w", path, err)
	}
	if there.Dev == store.Dev {
		s.Refused = append(s.Refused, fmt.Errorf("cannot save records to %s: %w", path, ErrInImage))
	}
	s.SavedTo, s.InMemory, s.Discards = path, on.Type == unix.TMPFS_MAGIC || on.Type == unix.RAMFS_MAGIC, 0
	return nil
}
