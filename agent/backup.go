package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// BackedUp is what BackUpHeaders did with one volume.
type BackedUp struct {
	Volume keycache.VolumeRecord
	Device string // path, "" where the volume is not attached
	Path   string // of the backup
	Err    error
}

// BackupPlaceError refuses a place for backups: what lies there is not there when it is needed.
type BackupPlaceError struct {
	Path       string
	UUID       string // of the volume that it lies on
	MountPoint string
}

func (e *BackupPlaceError) Error() string {
	return fmt.Sprintf("cannot back up headers to %s: it lies on volume %s (%s), which nothing opens without its header", e.Path, e.UUID, e.MountPoint)
}

// BackUpHeaders writes the header of each volume, with the records that open it, into a new file: place names it. A volume is
// named as for [Node.Lock] and may be open; none means all. A backup is proven before it counts: it is read
// back, and the header in it opens under the data key that KMS gives for the record. The volumes are not written to.
//
// A failure of one volume never stops the others.
func (n *Node) BackUpHeaders(ctx context.Context, names []string, place func(keycache.VolumeRecord, time.Time) string) (done []BackedUp, err error) {
	w, targets, end, err := n.beginOn(ctx, names)
	if err != nil {
		return nil, err
	}
	defer end()
	for _, t := range targets {
		b := BackedUp{Volume: t.Volume, Device: t.Device.Path}
		if b.Path, b.Err = filepath.Abs(place(t.Volume, n.now())); b.Err == nil {
			b.Err = w.backUp(ctx, t, b.Path)
		}
		done = append(done, b)
	}
	for _, p := range w.facts.Records.Problems {
		done = append(done, BackedUp{Err: &p})
	}
	return done, ctx.Err()
}

// BackupName is how a backup is called where nobody named it.
func BackupName(v keycache.VolumeRecord, at time.Time) string {
	plain := strings.Map(func(r rune) rune {
		if r == '.' || r == '-' || r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' {
			return r
		}
		return '_'
	}, v.Identity)
	return strings.TrimLeft(plain, ".") + "." + at.UTC().Format("20060102T150405Z") + ".header.tar"
}

func (w *work) backUp(ctx context.Context, t target, path string) error {
	if err := w.checkPlace(path); err != nil {
		return err
	}
	rec, bytes, header, err := w.readHeader(t)
	if err != nil {
		return err
	}
	key, err := w.keys.get(rec)
	if err != nil {
		return err
	}
	if err := header.Verify(key); err != nil {
		return err
	}
	b := keycache.NewBackup(rec, t.Volume, bytes, w.now(), w.program.Version)
	if err := b.Write(path); err != nil {
		return err
	}
	written, err := keycache.ReadBackup(path)
	if err != nil {
		return err
	}
	proven, err := luks.InspectHeader(path, written.Header, written.Manifest.Size)
	if err != nil {
		return err
	}
	if err := proven.Verify(key); err != nil {
		return err
	}
	w.reached(stepBackedUp)
	err = w.store.PutBackup(keycache.BackupNote{
		UUID: t.Volume.UUID, Time: b.Manifest.Time, Path: path, HeaderSHA256: b.Manifest.HeaderSHA256, SeqID: header.Header.SeqID,
	})
	if err != nil {
		return err
	}
	w.reached(stepBackupNoted)
	w.audit(Event{Kind: EventHeaderBackedUp, Volume: t.Volume, Device: t.Device, Key: rec, RequestID: key.RequestID(), Reason: path})
	return nil
}

// readHeader reads the header of a volume, and finds the record of the data key that opens it.
func (w *work) readHeader(t target) (keycache.KeyRecord, []byte, *luks.Inspection, error) {
	var none keycache.KeyRecord
	if _, err := w.inspectTarget(t); err != nil {
		return none, nil, nil, err
	}
	if t.Volume.Rotation != nil {
		return none, nil, nil, fmt.Errorf("cannot back up the header of volume %s: %w", t.Volume.UUID, ErrRotating)
	}
	rec, err := w.facts.keyOf(t.Volume)
	if err != nil {
		return none, nil, nil, err
	}
	bytes, header, err := luks.ReadHeader(t.Device.Path)
	return rec, bytes, header, err
}

// checkPlace refuses to put a header where only a header leads.
func (w *work) checkPlace(path string) error {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("cannot back up headers to %s: %w", path, err)
	}
	for _, d := range w.facts.Devices {
		for _, v := range w.facts.Records.Volumes {
			m, _ := ourMapping(d.Device, v)
			for _, where := range m.Mounts {
				if dir == where || strings.HasPrefix(dir, strings.TrimSuffix(where, "/")+"/") {
					return &BackupPlaceError{Path: path, UUID: v.UUID, MountPoint: where}
				}
			}
		}
	}
	return nil
}

// lastBackup tells what is remembered of a volume's last header backup, fs.ErrNotExist where there is none, and whether the header on the
// disk still is the one in it.
func lastBackup(store *keycache.Store, uuid, device string) (note keycache.BackupNote, current bool, err error) {
	if note, err = store.Backup(uuid); err != nil {
		return note, false, err
	}
	header, _, err := luks.ReadHeader(device)
	if err != nil {
		return note, false, err
	}
	return note, keycache.Sum(header) == note.HeaderSHA256, nil
}

// holds says why a disk must not be taken for that of a LUKS volume whose header is to be replaced or wiped: it shows another volume, or what is
// nobody's header. Noise and zeros are what a volume without a header shows.
func holds(ctx context.Context, d volumes.Device, uuid string) error {
	refuse := func(format string, args ...any) error {
		return &RefusedError{Refusal: RefusedContent, Device: d.Path, Reason: fmt.Sprintf(format, args...)}
	}
	header, err := luks.Inspect(d.Path)
	switch {
	case err != nil:
		return err
	case header.Kind == luks.KindLUKS1:
		return refuse("it holds %s", describeKind(header.Kind))
	case header.Header != nil && header.Header.UUID != uuid:
		return refuse("it holds LUKS volume %s, not %s", header.Header.UUID, uuid)
	case header.PrimaryForeign:
		// blkid would see no more than the secondary copy.
		return refuse("something that is not LUKS stands at its start, before a whole secondary header")
	case header.Pass() && !header.PrimaryDamaged:
		return nil
	}
	content, err := volumes.Probe(ctx, d.Path, d.Size)
	if err != nil {
		return err
	}
	if !content.Blank && !content.Noise && content.Type != "crypto_LUKS" {
		return refuse("it holds %s", content.Detail)
	}
	return nil
}

// free refuses a disk that is open, in use or read-only.
func (d DeviceFacts) free() error {
	switch {
	case len(d.Mappings) > 0:
		return &RefusedError{Refusal: RefusedInUse, Device: d.Path, Reason: "it is open as " + d.Mappings[0].Name}
	case len(d.Uses) > 0:
		return &RefusedError{Refusal: RefusedInUse, Device: d.Path, Reason: "it is in use: " + d.Uses[0].Evidence}
	case d.ReadOnly:
		return &RefusedError{Refusal: RefusedDevice, Device: d.Path, Reason: "it is read-only"}
	}
	return nil
}
