package luks

import (
	"bytes"
	"context"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"time"

	luksgo "github.com/anatol/luks.go"
	"golang.org/x/sys/unix"
)

const (
	// maxName is what is left of a device-mapper UUID (DM_UUID_LEN 129, with its NUL) after "CRYPT-LUKS2-", the 32 digits of the
	// volume's UUID and "-". It also is below DM_NAME_LEN. Longer names would be cut without an error.
	maxName = 128 - 12 - 32 - 1

	// nodeTimeout is how long a node may take. It is far more than is ever needed, also at a boot under emulation.
	nodeTimeout = time.Minute

	// memoryHeader is the size of the header that luks.go is given; the smallest that LUKS2 has. Keyslot areas start at twice the
	// size of the header on disk, which is at least this, so they can keep their offsets.
	memoryHeader = 0x4000
)

// OpenOptions says how to map a volume.
type OpenOptions struct {
	Name             string // of the mapping: 1 to 83 of A-Z a-z 0-9 # + - . : = @ _
	NoReadWorkqueue  bool   // where the kernel has it (Linux 5.9); before 6.1.79, 6.6.18, 6.7.6 and 6.8 it can corrupt memory (CVE-2024-26718)
	NoWriteWorkqueue bool   // where the kernel has it (Linux 5.9)
	// Unsealing and Unsealed, if they are there, are called when a processor is free to unseal the key slot, and when the key has shown
	// that it is this volume's and the MAC holds. They are for who measures.
	Unsealing, Unsealed func()
	// Loaded, if it is there, is called when the kernel has the key and the table. Until it returns the volume is not to be seen, and
	// udev does not look at it: who opens several may have udev wait for the last.
	Loaded func()
}

// Verify unseals the slot that our token names and checks the token's MAC. It maps nothing, and it reads nothing more from the disk.
//
// [ErrWrongKey]: k is not this volume's key. *[HeaderError]: the header did not pass; or k is the right key, as it opens the slot or
// makes the MAC hold, but the rest was tampered with or is damaged.
func (i *Inspection) Verify(k Key) error {
	if err := i.verify(k); err != nil {
		return fmt.Errorf("cannot verify %s: %w", i.Path, err)
	}
	return nil
}

func (i *Inspection) verify(k Key) error {
	v, err := i.unseal(k, nil)
	if err != nil {
		return err
	}
	wipe(v)
	return nil
}

// Open verifies the volume like [Inspection.Verify], checks that its header still is on the disk, maps it as /dev/mapper/NAME and makes that
// node, for which it tries for a minute or until ctx ends. It runs no program, and it does not wait for udev, which looks at the mapping
// when it comes to it. On an error nothing stays mapped.
//
// Errors are those of Verify, [ErrBusy] (the name or the device is in use) and [ErrNoDMCrypt].
func (i *Inspection) Open(ctx context.Context, k Key, o OpenOptions) error {
	if err := i.open(ctx, k, o, kernelMapper()); err != nil {
		return fmt.Errorf("cannot open %s as %s: %w", i.Path, o.Name, err)
	}
	return nil
}

func (i *Inspection) open(ctx context.Context, k Key, o OpenOptions, dm mapper) error {
	return i.openBy(ctx, func() (*luksgo.Volume, error) { return i.unseal(k, o.Unsealing) }, o, dm)
}

// openBy maps the volume that unseal returns when everything that Verify promises is done.
func (i *Inspection) openBy(ctx context.Context, unseal func() (*luksgo.Volume, error), o OpenOptions, dm mapper) error {
	if err := checkName(o.Name); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	v, err := unseal()
	if err != nil {
		return err
	}
	defer wipe(v)
	if o.Unsealed != nil {
		o.Unsealed()
	}
	if err := i.unchanged(); err != nil {
		return err
	}

	// By number, not by path: it is the device that was read, whatever a link says by now; and a path could have a space, which
	// would be another field of the table.
	v.BackingDevice = i.device
	v.Flags = slices.Clone(i.checked.flags)
	for flag, wanted := range map[string]bool{flagNoRead: o.NoReadWorkqueue, flagNoWrite: o.NoWriteWorkqueue} {
		if wanted && !slices.Contains(v.Flags, flag) {
			v.Flags = append(v.Flags, flag)
		}
	}
	slices.Sort(v.Flags)
	if _, err := dm.info(o.Name); err == nil {
		return fmt.Errorf("%w: %s is mapped already", ErrBusy, o.Name)
	}
	err = dm.create(v, o.Name)
	if errors.Is(err, unix.EINVAL) && len(v.Flags) > len(i.checked.flags) {
		// Before Linux 5.9 dm-crypt refuses the whole table for these two. They only make it faster.
		v.Flags = slices.Clone(i.checked.flags)
		err = dm.create(v, o.Name)
	}
	wipe(v)
	if err != nil {
		return dm.explain(err)
	}
	if o.Loaded != nil {
		o.Loaded()
	}
	if err = dm.resume(o.Name); err != nil {
		err = dm.explain(err)
	} else {
		err = dm.makeNode(ctx, o.Name)
	}
	if err != nil {
		if undo := dm.undo(o.Name); undo != nil {
			return fmt.Errorf("%w (and the mapping could not be removed: %w)", err, undo)
		}
		return err
	}
	return nil
}

// unchanged reads the header again. Between the inspection and the key lies an answer of KMS, so maybe minutes, in which somebody may have
// written to the disk, or another disk have taken its name.
func (i *Inspection) unchanged() error {
	if same, err := i.rereads(); same || err != nil {
		return err
	}
	now, err := inspectPath(i.Path)
	switch {
	case err != nil:
		return err
	case now.device != i.device, now.Size != i.Size:
		return &HeaderError{i.Path, []string{"it is not the device that was inspected"}}
	case now.Kind != i.Kind, now.PrimaryDamaged != i.PrimaryDamaged, !equalHeaders(i, now):
		return &HeaderError{i.Path, append([]string{"the header changed after it was inspected"}, now.Reasons...)}
	}
	return nil
}

// rereads tells whether the same device shows the same bytes as the inspection saw.
func (i *Inspection) rereads() (same bool, err error) {
	f, device, size, err := openPath(i.Path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if device != i.device || size != i.Size || len(i.read) == 0 {
		return false, nil
	}
	for _, e := range i.read {
		now := make([]byte, len(e.data))
		if err := readFull(f, now, e.at); err != nil || !bytes.Equal(now, e.data) {
			return false, err
		}
	}
	return sameArea(f, i.area, i.checked.areaOffset)
}

// unseal returns the volume with its key, which the caller wipes. Everything that Verify promises is done when it returns. started, if
// not nil, is called when a processor is free for it.
func (i *Inspection) unseal(k Key, started func()) (*luksgo.Volume, error) {
	if err := i.refusal(); err != nil {
		return nil, err
	}
	if err := checkKey(k); err != nil {
		return nil, err
	}
	c := i.checked
	mac, err := c.mac(k, c.token.Version)
	if err != nil {
		return nil, err
	}
	return i.unsealSlot(c.own(), i.area, k, mac, started)
}

// unsealSlot unseals one slot with its own area and key, and holds the MAC of its token against the one that the key makes. started is as for
// unseal.
func (i *Inspection) unsealSlot(p place, area *os.File, k Key, mac []byte, started func()) (*luksgo.Volume, error) {
	macHolds := hmac.Equal(mac, p.mac)
	v, err := i.checked.unsealInMemory(p, area, k, started)
	wrongKey := errors.Is(err, luksgo.ErrPassphraseDoesNotMatch)
	switch {
	case err != nil && !wrongKey:
		return nil, fmt.Errorf("cannot unseal keyslot %d: %w", p.id, err)
	case wrongKey && macHolds:
		return nil, &HeaderError{i.Path, []string{fmt.Sprintf("the key is right, as the token's MAC holds, but it does not open keyslot %d: the keyslot is damaged or was changed", p.id)}}
	case wrongKey:
		return nil, ErrWrongKey
	}
	if !macHolds {
		wipe(v)
		return nil, &HeaderError{i.Path, []string{"the token's MAC does not hold, though the key opens the keyslot: the header was changed, or the token is another volume's"}}
	}
	if err := i.checked.compare(v); err != nil {
		wipe(v)
		return nil, &HeaderError{i.Path, []string{err.Error()}}
	}
	return v, nil
}

// unsealing has a place for each processor: unsealing is computing, and more of it at a time only takes more memory.
var unsealing = make(chan struct{}, runtime.GOMAXPROCS(0))

// unsealInMemory lets luks.go unseal a header that is made here from judged values: one keyslot, its digest, one segment, no token.
// It is written in front of the keyslot's area, which keeps its offset.
func (c *checked) unsealInMemory(p place, area *os.File, k Key, started func()) (v *luksgo.Volume, err error) {
	slot := strconv.Itoa(p.id)
	digest := c.digest
	digest.Keyslots = []string{slot}
	segment := c.segment
	// A fixed size: luks.go would take "dynamic" from the size of the file.
	segment.Size = strconv.FormatInt(c.length, 10)
	text, err := json.Marshal(metadata{
		Keyslots: map[string]jsonKeyslot{slot: p.slot},
		Tokens:   map[string]json.RawMessage{},
		Segments: map[string]jsonSegment{"0": segment},
		Digests:  map[string]jsonDigest{c.digestID: digest},
		Config:   jsonConfig{JSONSize: strconv.Itoa(memoryHeader - binarySize), KeyslotsSize: "0"},
	})
	if err != nil {
		return nil, err
	}
	header, err := buildPrimary(memoryHeader, c.uuid, text)
	if err != nil {
		return nil, err
	}

	if _, err := area.WriteAt(header, 0); err != nil {
		return nil, err
	}

	// The strict check leaves nothing that is known to make luks.go panic. If there is something, it costs this volume, not the
	// process, which opens others at the same time.
	unsealing <- struct{}{}
	defer func() { <-unsealing }()
	if started != nil {
		started()
	}
	defer func() {
		if p := recover(); p != nil {
			v, err = nil, fmt.Errorf("luks.go panicked: %v", p)
		}
	}()
	d, err := luksgo.Open(fmt.Sprintf("/proc/self/fd/%d", area.Fd()))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.UnsealVolume(p.id, k.Passphrase())
}

// compare holds what luks.go understood against what was judged.
func (c *checked) compare(v *luksgo.Volume) error {
	key := volumeKey(v)
	switch {
	case v.LuksType != "LUKS2", v.UUID != c.uuid,
		v.StorageEncryption != cipher, v.StorageIvTweak != 0,
		v.StorageSectorSize != uint64(c.segment.SectorSize),
		v.StorageOffset != uint64(c.offset), v.StorageSize != uint64(c.length),
		len(key) != keyBytes, bytes.Equal(key, make([]byte, keyBytes)):
		return errors.New("the unsealed volume is not the one that was checked")
	}
	return nil
}

// volumeKey is the key inside a luks.go volume, the very bytes. luks.go neither exports nor wipes it. Reflection may read, not
// set, an unexported slice; its elements are writable.
func volumeKey(v *luksgo.Volume) []byte {
	f := reflect.ValueOf(v).Elem().FieldByName("key")
	if f.Kind() != reflect.Slice || f.Type().Elem().Kind() != reflect.Uint8 {
		return nil // another release of luks.go; compare refuses it
	}
	return f.Bytes()
}

func wipe(v *luksgo.Volume) { clear(volumeKey(v)) }

// checkName allows what udev puts under /dev/mapper unchanged (the list of libdevmapper's name mangling).
func checkName(name string) error {
	if name == "" || len(name) > maxName || name == "." || name == ".." || name == "control" {
		return fmt.Errorf("%q is not a name of a mapping", name)
	}
	for _, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', bytes.IndexByte([]byte("#+-.:=@_"), c) >= 0:
		default:
			return fmt.Errorf("%q is not a name of a mapping", name)
		}
	}
	return nil
}

// makeNode makes the node of the mapping that is there now, as libdevmapper does where udev is not at work: a link to the kernel's
// own node, the same that udev makes later. To wait for udev would take longer than all the rest.
func (dm mapper) makeNode(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		info, err := dm.info(name)
		if err != nil {
			return fmt.Errorf("cannot ask for the mapping: %w", err)
		}
		failed := dm.link(name, info.DevNo)
		// By number: a stale node of an earlier mapping of this name may still be there.
		if number, ok := dm.node(name); ok && number == info.DevNo {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("its node did not appear: %w", context.Cause(ctx)), failed)
		case <-time.After(pause):
		}
	}
}
