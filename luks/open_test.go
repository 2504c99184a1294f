package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/anatol/devmapper.go"
	luksgo "github.com/anatol/luks.go"
	"golang.org/x/sys/unix"
)

type volumeType = luksgo.Volume

// fakeMapper is a kernel with dm-crypt, no mapping and an udev that is quick. Mapping itself is tested in virtual machines: where
// these tests run, there may be no device-mapper.
func fakeMapper(t *testing.T) mapper {
	mapped := map[string]bool{}
	return mapper{
		create: func(v *volumeType, name string) error {
			if mapped[name] {
				return os.NewSyscallError("dm ioctl", unix.EBUSY)
			}
			mapped[name] = true
			return nil
		},
		resume: func(string) error { return nil },
		remove: func(name string) error {
			if !mapped[name] {
				return os.NewSyscallError("dm ioctl", unix.ENXIO)
			}
			delete(mapped, name)
			return nil
		},
		info: func(name string) (*devmapper.DeviceInfo, error) {
			if !mapped[name] {
				return nil, os.NewSyscallError("dm ioctl", unix.ENXIO)
			}
			return &devmapper.DeviceInfo{Name: name, UUID: "CRYPT-LUKS2-x-" + name, DevNo: 0xfd00}, nil
		},
		targets: func() ([]string, error) { return []string{"crypt"}, nil },
		node:    func(string) (uint64, bool) { return 0xfd00, true },
		link:    func(string, uint64) error { return nil },
		unlink:  func(string) {},
	}
}

func TestOpenMapsWhatWasChecked(t *testing.T) {
	path := volume(t)
	keyFile := filepath.Join(t.TempDir(), "volume-key")
	mustRun(t, rightKey().Passphrase(), "cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", keyFile, "--key-file=-", path)
	want := content(t, keyFile)

	i := inspected(t, path)
	// Unsealing reads the disk no more: it may say what it likes.
	head := read(t, path, 0, headBytes)
	write(t, path, 0, bytes.Repeat([]byte("x"), headBytes))
	if err := i.Verify(rightKey()); err != nil {
		t.Fatal(err)
	}
	write(t, path, 0, head)
	var got *volumeType
	var key, alias []byte
	dm := fakeMapper(t)
	create := dm.create
	dm.create = func(v *volumeType, name string) error {
		got, alias, key = v, volumeKey(v), bytes.Clone(volumeKey(v))
		return create(v, name)
	}
	wipedBefore := false
	loaded := func() { wipedBefore = bytes.Equal(alias, make([]byte, 64)) }
	if err := i.open(t.Context(), rightKey(), OpenOptions{Name: "luks-" + testUUID, Loaded: loaded}, dm); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(key, want) || len(key) != 64 {
		t.Error("it is not the volume key that cryptsetup finds")
	}
	if !bytes.Equal(alias, make([]byte, 64)) {
		t.Error("the volume key was not wiped")
	}
	if !wipedBefore {
		t.Error("the volume key was wiped only after the mapping was in use")
	}
	if got.BackingDevice != path || got.UUID != testUUID || got.LuksType != "LUKS2" || got.StorageEncryption != "aes-xts-plain64" ||
		got.StorageSectorSize != 4096 || got.StorageOffset != 16<<20 || got.StorageSize != imageSize-16<<20 || got.StorageIvTweak != 0 || len(got.Flags) != 0 {
		t.Errorf("offset %d, size %d, sector %d, flags %q, device %s", got.StorageOffset, got.StorageSize, got.StorageSectorSize, got.Flags, got.BackingDevice)
	}
}

// TestVolumeKeyOfAFailureIsWiped: what was unsealed is wiped also where the volume is then not mapped.
func TestVolumeKeyOfAFailureIsWiped(t *testing.T) {
	path := volume(t)
	i := inspected(t, path)
	var key []byte
	unseal := func() (*volumeType, error) {
		v, err := i.unseal(rightKey(), nil)
		if err == nil {
			key = volumeKey(v)
			flip(t, path, binarySize+7) // the header changes meanwhile
		}
		return v, err
	}
	err := i.openBy(t.Context(), unseal, OpenOptions{Name: "luks-" + testUUID}, fakeMapper(t))
	if err == nil || len(key) != 64 || !bytes.Equal(key, make([]byte, 64)) {
		t.Errorf("%v; a key of %d bytes, wiped: %v", err, len(key), bytes.Equal(key, make([]byte, len(key))))
	}
}

// TestOpenRefusesWhatChanged: between the inspection and the key somebody had the time to write to the disk.
func TestOpenRefusesWhatChanged(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(path string)
		want   string
	}{
		{"tampered", func(path string) {
			edit(t, path, func(m tree) { m.At("segments", "0")["encryption"] = "cipher_null-ecb" })
		}, "the header changed after it was inspected; segment 0: cipher"},
		{"another header that passes", func(path string) {
			edit(t, path, func(m tree) { m.At("segments", "0")["sector_size"] = 512 })
		}, "the header changed"},
		{"another volume", func(path string) {
			o := testOptions()
			o.UUID = "11111111-2222-4333-8444-555555555555"
			write(t, path, 0, make([]byte, headBytes))
			if err := Format(t.Context(), path, o, rightKey()); err != nil {
				t.Fatal(err)
			}
		}, "the header changed"},
		{"the key slot", func(path string) { flip(t, path, KeyslotsOffset+7) }, "the header changed"},
		{"the primary copy", func(path string) { flip(t, path, binarySize+7) }, "the header changed"},
		{"wiped", func(path string) { write(t, path, 0, make([]byte, headBytes)) }, "the header changed"},
		{"another size", func(path string) {
			if err := os.Truncate(path, imageSize+4096); err != nil {
				t.Fatal(err)
			}
		}, "it is not the device that was inspected"},
	} {
		path := volume(t)
		i := inspected(t, path)
		test.change(path)
		dm := fakeMapper(t)
		dm.create = func(*volumeType, string) error {
			t.Errorf("%s: it was mapped", test.name)
			return nil
		}
		err := i.open(t.Context(), rightKey(), OpenOptions{Name: "x"}, dm)
		if got := reasons(t, err); !strings.HasPrefix(got, test.want) {
			t.Errorf("%s: %s", test.name, got)
		}
	}

	// Another disk under the path, with the same header: a snapshot of it. Its number tells.
	i := inspected(t, volume(t))
	i.device = "259:7"
	if got := reasons(t, i.open(t.Context(), rightKey(), OpenOptions{Name: "x"}, fakeMapper(t))); got != "it is not the device that was inspected" {
		t.Errorf("another device: %s", got)
	}
}

func TestOpenFixedSize(t *testing.T) {
	path := volume(t)
	edit(t, path, func(m tree) { m.At("segments", "0")["size"] = "8192" })
	i := inspected(t, path)
	mac, err := i.checked.mac(rightKey(), 1) // as if it had been formatted so
	if err != nil {
		t.Fatal(err)
	}
	i.checked.token.MAC = mac
	v, err := i.unseal(rightKey(), nil)
	if err != nil || v.StorageSize != 8192 {
		t.Errorf("%v %+v", err, v)
	}
}

func TestOpenFlags(t *testing.T) {
	t.Parallel()

	both := OpenOptions{NoReadWorkqueue: true, NoWriteWorkqueue: true}
	for _, c := range []struct {
		persistent []any
		ask        OpenOptions
		want       []string
	}{
		{nil, OpenOptions{}, nil},
		{nil, OpenOptions{NoWriteWorkqueue: true}, []string{"no-write-workqueue"}},
		{nil, OpenOptions{NoReadWorkqueue: true}, []string{"no-read-workqueue"}},
		{nil, both, []string{"no-read-workqueue", "no-write-workqueue"}},
		{[]any{"allow-discards"}, OpenOptions{}, []string{"allow-discards"}},
		{[]any{"allow-discards", "no-write-workqueue"}, both, []string{"allow-discards", "no-read-workqueue", "no-write-workqueue"}},
		{[]any{"no-read-workqueue", "no-write-workqueue"}, both, []string{"no-read-workqueue", "no-write-workqueue"}},
	} {
		path := volume(t)
		if c.persistent != nil {
			edit(t, path, func(m tree) { m.At("config")["flags"] = c.persistent })
		}
		var got []string
		dm := fakeMapper(t)
		create := dm.create
		dm.create = func(v *volumeType, name string) error { got = slices.Clone(v.Flags); return create(v, name) }
		c.ask.Name = "x"
		if err := inspected(t, path).open(t.Context(), rightKey(), c.ask, dm); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%v %+v: %q %v", c.persistent, c.ask, got, err)
		}
	}
}

// A kernel before 5.9 does not know the two flags.
func TestOpenOnOldKernels(t *testing.T) {
	var tried [][]string
	dm := fakeMapper(t)
	create := dm.create
	dm.create = func(v *volumeType, name string) error {
		tried = append(tried, slices.Clone(v.Flags))
		if len(v.Flags) > 0 {
			return os.NewSyscallError("dm ioctl", unix.EINVAL)
		}
		return create(v, name)
	}
	if err := inspected(t, volume(t)).open(t.Context(), rightKey(), OpenOptions{Name: "x", NoReadWorkqueue: true, NoWriteWorkqueue: true}, dm); err != nil || len(tried) != 2 {
		t.Errorf("%v, tried %q", err, tried)
	}
}

func TestOpenErrors(t *testing.T) {
	i := inspected(t, volume(t))
	fail := func(err error) func(*mapper) {
		return func(dm *mapper) { dm.create = func(*volumeType, string) error { return err } }
	}
	for _, c := range []struct {
		name   string
		change func(*mapper)
		key    testKey
		want   error
	}{
		{"wrong key", fail(errors.New("mapped with a wrong key")), keyOf(7), ErrWrongKey},
		{"device busy", fail(os.NewSyscallError("dm ioctl", unix.EBUSY)), rightKey(), ErrBusy},
		{"name taken", func(dm *mapper) {
			dm.info = func(string) (*devmapper.DeviceInfo, error) { return &devmapper.DeviceInfo{}, nil }
			dm.remove = func(string) error { panic("removed the mapping of another") }
		}, rightKey(), ErrBusy},
		{"no control node", fail(&os.PathError{Op: "open", Path: controlNode, Err: unix.ENOENT}), rightKey(), ErrNoDMCrypt},
		{"nothing behind the control node", fail(&os.PathError{Op: "open", Path: controlNode, Err: unix.ENODEV}), rightKey(), ErrNoDMCrypt},
		{"no target", func(dm *mapper) {
			fail(os.NewSyscallError("dm ioctl", unix.EINVAL))(dm)
			dm.targets = func() ([]string, error) { return []string{"linear"}, nil }
		}, rightKey(), ErrNoDMCrypt},
		{"another table error", fail(os.NewSyscallError("dm ioctl", unix.EINVAL)), rightKey(), unix.EINVAL},
	} {
		dm := fakeMapper(t)
		c.change(&dm)
		err := i.open(t.Context(), c.key, OpenOptions{Name: "x"}, dm)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		if c.want == unix.EINVAL && errors.Is(err, ErrNoDMCrypt) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// The node that counts is that of the mapping, not one that an earlier mapping of the name left.
func TestOpenMakesTheNode(t *testing.T) {
	t.Parallel()

	i := inspected(t, volume(t))
	dm := fakeMapper(t)
	links := 0
	dm.node = func(string) (uint64, bool) {
		switch {
		case links < 3:
			return 0, false
		case links < 6:
			return 0xfd07, true // stale
		}
		return 0xfd00, true
	}
	dm.link = func(name string, devno uint64) error {
		if links++; name != "x" || devno != 0xfd00 {
			t.Errorf("a link from %s to %#x", name, devno)
		}
		return nil
	}
	if err := i.open(t.Context(), rightKey(), OpenOptions{Name: "x"}, dm); err != nil || links != 6 {
		t.Errorf("%v after %d", err, links)
	}

	dm = fakeMapper(t)
	dm.node = func(string) (uint64, bool) { return 0, false }
	broken := errors.New("no room in /dev")
	dm.link = func(string, uint64) error { return broken }
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := i.open(ctx, rightKey(), OpenOptions{Name: "x"}, dm); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, err := dm.info("x"); !errors.Is(err, unix.ENXIO) {
		t.Error("the mapping stayed")
	}

	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	dm.create = func(*volumeType, string) error { panic("mapped") }
	if err := i.open(cancelled, rightKey(), OpenOptions{Name: "x"}, dm); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestNames(t *testing.T) {
	for _, good := range []string{"luks-" + testUUID, "a", "A.b_c+d:e=f@g#h-0", strings.Repeat("x", 83)} {
		if err := checkName(good); err != nil {
			t.Error(err)
		}
	}
	i := inspected(t, volume(t))
	for _, bad := range []string{"", ".", "..", "control", "a/b", "../x", "a b", "ä", "a\x00", "a\\b", strings.Repeat("x", 84)} {
		if checkName(bad) == nil {
			t.Errorf("%q", bad)
		}
		if err := i.open(t.Context(), rightKey(), OpenOptions{Name: bad}, fakeMapper(t)); err == nil {
			t.Errorf("opened as %q", bad)
		}
		if err := Close(t.Context(), bad); err == nil {
			t.Errorf("closed %q", bad)
		}
	}
}

// The header for luks.go is never cut.
func TestBuildPrimaryRefusesWhatDoesNotFit(t *testing.T) {
	room := memoryHeader - binarySize - 1 // and a NUL
	for name, c := range map[string]struct {
		uuid string
		text int
		fits bool
	}{"all room": {testUUID, room, true}, "text": {testUUID, room + 1, false}, "UUID": {strings.Repeat("0", lenUUID), 2, false}} {
		if _, err := buildPrimary(memoryHeader, c.uuid, make([]byte, c.text)); (err == nil) != c.fits {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What luks.go made of the header is held against what was judged.
func TestCompare(t *testing.T) {
	t.Parallel()

	i := inspected(t, volume(t))
	for name, change := range map[string]func(*volumeType){
		"cipher":   func(v *volumeType) { v.StorageEncryption = "cipher_null-ecb" },
		"offset":   func(v *volumeType) { v.StorageOffset += 4096 },
		"size":     func(v *volumeType) { v.StorageSize -= 4096 },
		"sector":   func(v *volumeType) { v.StorageSectorSize = 512 },
		"iv_tweak": func(v *volumeType) { v.StorageIvTweak = 1 },
		"UUID":     func(v *volumeType) { v.UUID = "" },
		"type":     func(v *volumeType) { v.LuksType = "LUKS1" },
		"no key":   func(v *volumeType) { wipe(v) },
		// What another release of luks.go would look like in which the key is somewhere else.
		"no place for a key": func(v *volumeType) {
			*v = volumeType{LuksType: v.LuksType, UUID: v.UUID, StorageEncryption: v.StorageEncryption, StorageIvTweak: v.StorageIvTweak,
				StorageSectorSize: v.StorageSectorSize, StorageOffset: v.StorageOffset, StorageSize: v.StorageSize}
		},
	} {
		v, err := i.unseal(rightKey(), nil)
		if err != nil {
			t.Fatal(err)
		}
		change(v)
		if i.checked.compare(v) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	i.checked.offset += 4096 // unsealing does compare
	if r := reasons(t, i.Verify(rightKey())); !strings.Contains(r, "not the one that was checked") {
		t.Error(r)
	}
}

// A panic in luks.go is an error of this volume. The value that makes one is let past the check by hand.
func TestPanicsStayInside(t *testing.T) {
	i := inspected(t, volume(t))
	i.checked.slot.KDF = jsonKDF{Type: "argon2id", Salt: i.checked.slot.KDF.Salt, Memory: 64, CPUs: 1}
	if err := i.Verify(rightKey()); err == nil || !strings.Contains(err.Error(), "panicked") {
		t.Errorf("%v", err)
	}
}

// Unsealing leaves no file descriptors behind.
func TestUnsealClosesItsFiles(t *testing.T) {
	i := inspected(t, volume(t))
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := count()
	for n := range 20 {
		_ = i.Verify(keyOf(byte(n % 2)))
	}
	if after := count(); after > before {
		t.Errorf("%d before, %d after", before, after)
	}
}

// Opening runs no program: there is none to find, and it works.
func TestUnsealRunsNoProgram(t *testing.T) {
	path := volume(t)
	stub(t, "echo ran >> "+path+".ran; exit 1")
	if err := inspected(t, path).open(t.Context(), rightKey(), OpenOptions{Name: "x"}, fakeMapper(t)); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path + ".ran"); err == nil {
		t.Error("cryptsetup was run")
	}
}

func TestErrorsNameTheDeviceAndNoSecret(t *testing.T) {
	path := volume(t)
	err := inspected(t, path).Verify(keyOf(9))
	if err == nil || !strings.HasPrefix(err.Error(), "cannot verify "+path) {
		t.Error(err)
	}
	flip(t, path, 40000)
	err = inspected(t, path).Verify(rightKey())
	for _, verb := range []string{"%v", "%+v", "%#v"} {
		if s := fmt.Sprintf(verb, err); strings.Contains(s, string(rightKey().Passphrase())) {
			t.Error(s)
		}
	}
}

func TestClose(t *testing.T) {
	open := func(busy int) (mapper, *int) {
		dm := fakeMapper(t)
		if err := dm.create(nil, "x"); err != nil {
			t.Fatal(err)
		}
		tries, remove := 0, dm.remove
		dm.remove = func(name string) error {
			if tries++; tries <= busy {
				return os.NewSyscallError("dm ioctl", unix.EBUSY)
			}
			return remove(name)
		}
		return dm, &tries
	}
	dm, tries := open(3)
	if err := dm.close(t.Context(), "x"); err != nil || *tries != 4 {
		t.Errorf("%v after %d", err, *tries)
	}
	if err := dm.close(t.Context(), "x"); !errors.Is(err, ErrNotOpen) {
		t.Error(err)
	}

	dm, _ = open(1 << 30)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := dm.close(ctx, "x"); !errors.Is(err, ErrBusy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}

	// It went away between two tries.
	dm, _ = open(0)
	dm.remove = func(string) error { return os.NewSyscallError("dm ioctl", unix.ENXIO) }
	if err := dm.close(t.Context(), "x"); !errors.Is(err, ErrNotOpen) {
		t.Error(err)
	}

	dm, tries = open(0)
	dm.info = func(string) (*devmapper.DeviceInfo, error) { return &devmapper.DeviceInfo{UUID: "LVM-abc"}, nil }
	if err := dm.close(t.Context(), "x"); err == nil || *tries != 0 {
		t.Errorf("a mapping that is not LUKS2: %v", err)
	}

	dm, _ = open(0)
	dm.info = func(string) (*devmapper.DeviceInfo, error) {
		return nil, &os.PathError{Op: "open", Path: controlNode, Err: unix.ENOENT}
	}
	if err := dm.close(t.Context(), "x"); !errors.Is(err, ErrNoDMCrypt) {
		t.Error(err)
	}
	dm.info = func(string) (*devmapper.DeviceInfo, error) {
		return nil, &os.PathError{Op: "open", Path: controlNode, Err: unix.EACCES}
	}
	if err := dm.close(t.Context(), "x"); !errors.Is(err, os.ErrPermission) || errors.Is(err, ErrNotOpen) {
		t.Error(err)
	}
}

func TestCheckCrypt(t *testing.T) {
	none := &os.PathError{Op: "open", Path: controlNode, Err: unix.ENOENT}
	for _, c := range []struct {
		name          string
		before, after []string
		errBefore     error
		errAfter      error
		errLoad       error
		loads         int
		ok            bool
	}{
		{"there", []string{"linear", "crypt"}, nil, nil, nil, nil, 0, true},
		{"loaded", []string{"linear"}, []string{"crypt", "linear"}, nil, nil, nil, 1, true},
		{"loaded with device-mapper", nil, []string{"crypt"}, none, nil, nil, 1, true},
		{"built in, no modprobe", []string{}, []string{"crypt"}, nil, nil, errors.New("no modprobe"), 1, true},
		{"no module", []string{"linear"}, []string{"linear"}, nil, nil, errors.New("not found"), 1, false},
		{"no device-mapper", nil, nil, none, none, errors.New("not found"), 1, false},
		{"modprobe lies", []string{}, []string{}, nil, nil, nil, 1, false},
	} {
		loads := 0
		err := checkCrypt(func() ([]string, error) {
			if loads == 0 {
				return c.before, c.errBefore
			}
			return c.after, c.errAfter
		}, func() error { loads++; return c.errLoad })
		if loads != c.loads || (err == nil) != c.ok || !c.ok && !errors.Is(err, ErrNoDMCrypt) {
			t.Errorf("%s: %v after %d loads", c.name, err, loads)
		}
	}
	// Not being allowed to ask is not the kernel's lack.
	denied := &os.PathError{Op: "open", Path: controlNode, Err: syscall.EACCES}
	err := checkCrypt(func() ([]string, error) { return nil, denied }, func() error { panic("loaded") })
	if errors.Is(err, ErrNoDMCrypt) || !errors.Is(err, os.ErrPermission) {
		t.Error(err)
	}
}

func TestTargetNames(t *testing.T) {
	entry := func(next uint32, name string, size int) []byte {
		b := make([]byte, size)
		b[0], b[1] = byte(next), byte(next>>8)
		copy(b[16:], name)
		return b
	}
	list := append(entry(32, "linear", 32), append(entry(40, "crypt", 40), entry(0, "striped", 24)...)...)
	if got := targetNames(list); !slices.Equal(got, []string{"linear", "crypt", "striped"}) {
		t.Errorf("%q", got)
	}
	for _, bad := range [][]byte{nil, make([]byte, 16), make([]byte, 17), entry(0xffff, "a", 20), entry(1, "a", 20), entry(0, "no end", 22)} {
		if n := len(targetNames(bad)); n > 1 {
			t.Errorf("%d names", n)
		}
	}
}

// A node that nobody made, one of an earlier mapping, one of udev's, and what is left of a run that was killed.
func TestLinkNode(t *testing.T) {
	dev := t.TempDir()
	dir := filepath.Join(dev, "mapper")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// Files with numbers in them stand for block devices.
	numberOf := func(path string) (uint64, bool) {
		b, err := os.ReadFile(path)
		n, bad := strconv.ParseUint(string(b), 0, 64)
		return n, err == nil && bad == nil
	}
	node := func(name, number string) {
		if err := os.WriteFile(filepath.Join(dev, name), []byte(number), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	leadsTo := func(name, want string) {
		t.Helper()
		if got, err := os.Readlink(filepath.Join(dir, name)); got != want {
			t.Errorf("%s leads to %q, want %q (%v)", name, got, want, err)
		}
	}
	link := func(name string, devno uint64) error { return linkNode(dir, name, devno, numberOf) }

	if err := link("x", 0xfd03); err == nil {
		t.Error("a link to a node that is not there")
	}
	leadsTo("x", "")
	node("dm-3", "0xfd03")
	node("dm-4", "0xfd04")
	if err := os.Symlink("../dm-9", filepath.Join(dir, ".#luks-kms-agent-x")); err != nil {
		t.Fatal(err)
	}
	for _, devno := range []uint64{0xfd03, 0xfd03, 0xfd04} {
		if err := link("x", devno); err != nil {
			t.Error(err)
		}
		leadsTo("x", fmt.Sprintf("../dm-%d", devno&0xff))
	}
	node("dm-5", "0xfd99")
	if err := link("x", 0xfd05); err == nil {
		t.Error("a link to another device")
	}
	leadsTo("x", "../dm-4")
	// udev's own link may have another form.
	if err := os.Symlink("./../dm-3", filepath.Join(dir, "y")); err != nil {
		t.Fatal(err)
	}
	if err := link("y", 0xfd03); err != nil {
		t.Error(err)
	}
	leadsTo("y", "./../dm-3")

	unlinkNode(dir, "x")
	leadsTo("x", "../dm-4")
	if err := os.Remove(filepath.Join(dev, "dm-4")); err != nil {
		t.Fatal(err)
	}
	unlinkNode(dir, "x")
	leadsTo("x", "")
	unlinkNode(dir, "x")
	node("mapper/file", "0xfd03")
	unlinkNode(dir, "file")
	if _, ok := numberOf(filepath.Join(dir, "file")); !ok {
		t.Error("what is no link was removed")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 {
		t.Errorf("%v is left (%v)", left, err)
	}
}

func TestBlockNumber(t *testing.T) {
	for _, path := range []string{t.TempDir(), "/dev/null", "/none"} {
		if _, ok := blockNumber(path); ok {
			t.Errorf("%s is a block device", path)
		}
	}
}

// TestLoadedIsBeforeUse: who opens several volumes has the time between the table and its use, in which no key is kept for them.
func TestLoadedIsBeforeUse(t *testing.T) {
	var steps []string
	var key []byte
	dm := fakeMapper(t)
	create := dm.create
	dm.create = func(v *volumeType, name string) error {
		steps, key = append(steps, "create"), volumeKey(v)
		return create(v, name)
	}
	dm.resume = func(string) error {
		steps = append(steps, "resume")
		return nil
	}
	loaded := func() {
		steps = append(steps, "loaded")
		if !bytes.Equal(key, make([]byte, 64)) {
			t.Error("the volume key is kept while others are waited for")
		}
	}
	says := func(step string) func() { return func() { steps = append(steps, step) } }
	o := OpenOptions{Name: "x", Unsealing: says("unsealing"), Unsealed: says("unsealed"), Loaded: loaded}
	i := inspected(t, volume(t))
	want := []string{"unsealing", "unsealed", "create", "loaded", "resume"}
	if err := i.open(t.Context(), rightKey(), o, dm); err != nil || !slices.Equal(steps, want) {
		t.Errorf("%v, in the order %q", err, steps)
	}
	o.Name, steps = "y", nil
	if err := i.open(t.Context(), keyOf(1), o, dm); !errors.Is(err, ErrWrongKey) || !slices.Equal(steps, want[:1]) {
		t.Errorf("%v, in the order %q", err, steps)
	}
}

// TestNothingStaysWhereTheTableIsNotUsed: a resume that fails leaves no mapping, also where udev holds it for a moment.
func TestNothingStaysWhereTheTableIsNotUsed(t *testing.T) {
	dm := fakeMapper(t)
	dm.resume = func(string) error { return os.NewSyscallError("dm ioctl", unix.EIO) }
	remove, held := dm.remove, true
	dm.remove = func(name string) error {
		if held {
			held = false
			return os.NewSyscallError("dm ioctl", unix.EBUSY)
		}
		return remove(name)
	}
	err := inspected(t, volume(t)).open(t.Context(), rightKey(), OpenOptions{Name: "x"}, dm)
	if _, there := dm.info("x"); !errors.Is(err, unix.EIO) || there == nil {
		t.Errorf("%v, and it is mapped: %v", err, there == nil)
	}
}

// TestCloseUnfinished: only a mapping of LUKS2 without a table in use is one that a killed run left.
func TestCloseUnfinished(t *testing.T) {
	for _, test := range []struct {
		name   string
		uuid   string
		flags  uint32
		err    error
		closed bool
	}{
		{name: "a table that is loaded", uuid: "CRYPT-LUKS2-x-y", flags: unix.DM_SUSPEND_FLAG | unix.DM_INACTIVE_PRESENT_FLAG, closed: true},
		{name: "no table", uuid: "CRYPT-LUKS2-x-y", closed: true},
		{name: "open", uuid: "CRYPT-LUKS2-x-y", flags: unix.DM_ACTIVE_PRESENT_FLAG},
		{name: "suspended", uuid: "CRYPT-LUKS2-x-y", flags: unix.DM_ACTIVE_PRESENT_FLAG | unix.DM_SUSPEND_FLAG},
		{name: "open, with another table loaded", uuid: "CRYPT-LUKS2-x-y", flags: unix.DM_ACTIVE_PRESENT_FLAG | unix.DM_INACTIVE_PRESENT_FLAG},
		{name: "another's", uuid: "LVM-x"},
		{name: "none", err: os.NewSyscallError("dm ioctl", unix.ENXIO)},
	} {
		dm := fakeMapper(t)
		dm.info = func(name string) (*devmapper.DeviceInfo, error) {
			return &devmapper.DeviceInfo{Name: name, UUID: test.uuid, Flags: test.flags}, test.err
		}
		closed := false
		dm.remove = func(string) error {
			closed = true
			return nil
		}
		if err := dm.closeUnfinished(t.Context(), "y"); err != nil || closed != test.closed {
			t.Errorf("%s: %v, closed: %v", test.name, err, closed)
		}
	}
}
