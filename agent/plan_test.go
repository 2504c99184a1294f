package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

const (
	me       = "i-0aaaaaaaaaaaaaaaa"
	stranger = "i-0bbbbbbbbbbbbbbbb"
	gib      = int64(1) << 30
)

var otherKeyARN = strings.Replace(testKey, "0987", "1111", 1)

// world builds facts in the order in which a story tells them.
type world struct{ Facts }

func newWorld() *world {
	return &world{Facts{
		Config: func() Config { c := defaultConfig("config.yaml"); c.KMSKey = testKey; return c }(),
		Records: keycache.Records{
			Keys: map[string]keycache.KeyRecord{}, Volumes: map[string]keycache.VolumeRecord{},
		},
		InstanceID: me,
	}}
}

func (w *world) key(id, instance string) *world {
	w.Records.Keys[id] = keycache.KeyRecord{ID: id, KeyARN: testKey, WrappedKey: []byte(id), InstanceID: instance, Created: time.Unix(1, 0)}
	return w
}

func (w *world) record(uuid string, state keycache.VolumeState, dev volumes.Device, mountPoint string) *world {
	w.Records.Volumes[uuid] = keycache.VolumeRecord{
		UUID: uuid, KeyID: "k1", Class: string(dev.Class), Identity: dev.Identity, Size: dev.Size, State: state,
		Filesystem: "xfs", MountPoint: mountPoint, Mapping: "luks-" + uuid, InstanceID: me,
	}
	return w
}

func (w *world) device(d volumes.Device, h *luks.Inspection, c *volumes.Content) *world {
	w.Devices = append(w.Devices, DeviceFacts{Device: d, Header: h, Content: c})
	return w
}

func ebs(name, id string) volumes.Device {
	return volumes.Device{Name: name, Path: "/dev/" + name, Size: gib, Class: volumes.ClassEBS, Identity: id, Serial: strings.Replace(id, "-", "", 1)}
}

func store(name, serial string) volumes.Device {
	return volumes.Device{Name: name, Path: "/dev/" + name, Size: gib, Class: volumes.ClassInstanceStore, Identity: serial, Serial: serial}
}

func open(d volumes.Device, uuid string, mounts ...string) volumes.Device {
	d.Mappings = []volumes.Mapping{{Name: "luks-" + uuid, Kernel: "dm-0", UUID: "CRYPT-LUKS2-" + strings.ReplaceAll(uuid, "-", "") + "-luks-" + uuid, Mounts: mounts}}
	d.Uses = []volumes.Use{{Kind: volumes.UseHeld, What: "dm-0", Evidence: "dm-0 is on " + d.Name}}
	return d
}

func shared(d volumes.Device) volumes.Device { d.Shared = true; return d }

func none() *luks.Inspection        { return &luks.Inspection{Kind: luks.KindNone} }
func blank() *volumes.Content       { return &volumes.Content{Blank: true} }
func ext4Content() *volumes.Content { return &volumes.Content{Type: "ext4", Detail: "ext4 filesystem"} }

// ours is a header that cryptsetup wrote and the strict check passed; no other
// passes. Reasons make it one that was refused.
func ours(uuid string, reasons ...string) *luks.Inspection {
	made, _ := headers.LoadOrStore(uuid, sync.OnceValue(func() luks.Inspection { return realHeader(uuid) }))
	i := made.(func() luks.Inspection)()
	header, token := *i.Header, *i.Header.Token
	header.Token, i.Header, i.Reasons = &token, &header, reasons
	return &i
}

var headers sync.Map // uuid -> func() luks.Inspection

func realHeader(uuid string) luks.Inspection {
	dir, err := os.MkdirTemp("", "luks-kms-agent-test")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.img")
	key, err := keycache.NewKey(bytes.Repeat([]byte{7}, 32))
	if err == nil {
		err = errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 20<<20))
	}
	if err == nil {
		err = luks.Format(context.Background(), path, luks.FormatOptions{UUID: uuid, Label: "test", KeyARN: testKey, WrappedKey: []byte("wrapped " + uuid)}, key)
	}
	if err != nil {
		panic(err)
	}
	i, err := luks.Inspect(path)
	if err != nil || !i.Pass() {
		panic(fmt.Sprint("a header of our own does not pass: ", i, err))
	}
	return *i
}

func kind(k luks.Kind) *luks.Inspection { return &luks.Inspection{Kind: k} }

// tokenless is what a format leaves that was cut before it wrote its token.
func tokenless(uuid string) *luks.Inspection {
	i := ours(uuid, "no token")
	i.Header.Tokens, i.Header.Token = nil, nil
	return i
}

func foreignLUKS(uuid string) *luks.Inspection {
	return &luks.Inspection{Kind: luks.KindLUKS2, Header: &luks.Header{UUID: uuid}}
}

// Rows of the decision table, each as one line of what is expected of the plan.
func TestDecisionTable(t *testing.T) {
	vol := ebs("nvme1n1", "vol-1")
	eph := store("nvme2n1", "AWS1")
	const a, b = "aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000002"
	recorded := func(state keycache.VolumeState, d volumes.Device) *world {
		return newWorld().key("k1", me).record(a, state, d, "/mnt")
	}
	ready, formatting, wiping := keycache.StateReady, keycache.StateFormatting, keycache.StateWiping

	for _, tc := range []struct {
		name  string
		world *world
		want  string // verb [refusal] [mount point] then a part of the reason, after ": "
	}{
		{"blank EBS", newWorld().device(vol, none(), blank()), "format /mnt: proven blank"},
		{"blank instance store", newWorld().device(eph, none(), blank()), "format /mnt: proven blank"},
		{"foreign filesystem", newWorld().device(vol, none(), ext4Content()), "refuse content: ext4 filesystem"},
		{"content not read", newWorld().device(vol, none(), nil), "refuse device: was not read"},
		{"header not read", newWorld().device(vol, nil, nil), "refuse device: was not read"},
		{"foreign LUKS2", newWorld().device(vol, foreignLUKS(b), nil), "refuse content: not ours"},
		{"LUKS1", newWorld().device(vol, kind(luks.KindLUKS1), nil), "refuse content: LUKS1"},
		{"torn without record", newWorld().device(vol, kind(luks.KindTorn), nil), "refuse content: remains"},
		{"no key slots, no record", newWorld().device(vol, kind(luks.KindEmpty), nil), "refuse content: without key slots"},
		{"ours without record", newWorld().device(vol, ours(a), nil), "adopt /mnt: token"},
		{"ours, tampered, without record", newWorld().device(vol, ours(a, "cipher is null"), nil), "refuse header: cipher is null"},

		{"formatting, blank", recorded(formatting, vol).device(vol, none(), blank()), "format /mnt: cut"},
		{"wiping, with its header", recorded(wiping, vol).device(vol, ours(a), nil), "refuse wiping: was begun and not finished"},
		{"wiping, blank instance store", recorded(wiping, eph).device(eph, none(), blank()), "refuse wiping: was begun and not finished"},
		{"wiping, noise", recorded(wiping, vol).device(vol, none(), &volumes.Content{Detail: "noise", NoiseFrom: 1}), "refuse wiping: was begun and not finished"},
		{"formatting, key slots without a header", recorded(formatting, vol).device(vol, none(), &volumes.Content{Detail: "noise", NoiseFrom: 32 << 10}), "format /mnt: cut"},
		{"formatting, noise where a header would be", recorded(formatting, vol).device(vol, none(), &volumes.Content{Detail: "noise", NoiseFrom: 4 << 10}), "refuse content: noise"},
		{"key slots without a header, no record", newWorld().device(vol, none(), &volumes.Content{Detail: "noise", NoiseFrom: 32 << 10}), "refuse content: noise"},
		{"formatting, torn", recorded(formatting, vol).device(vol, kind(luks.KindTorn), nil), "format /mnt: cut"},
		{"formatting, no key slots", recorded(formatting, vol).device(vol, kind(luks.KindEmpty), nil), "format /mnt: cut"},
		{"formatting, our UUID", recorded(formatting, vol).device(vol, ours(a), nil), "format /mnt: cut"},
		{"formatting, our UUID without token", recorded(formatting, vol).device(vol, tokenless(a), nil), "format /mnt: cut"},
		{"formatting, finished, tampered", recorded(formatting, vol).device(vol, ours(a, "cipher is null"), nil), "refuse header: cipher is null"},
		{"formatting, another UUID", recorded(formatting, vol).device(vol, ours(b), nil), "refuse content: holds LUKS volume " + b},
		{"formatting, ext4", recorded(formatting, vol).device(vol, none(), ext4Content()), "refuse content: ext4"},
		{"formatting, LUKS1", recorded(formatting, vol).device(vol, kind(luks.KindLUKS1), nil), "refuse content: LUKS1"},
		{"formatting, our UUID on another disk", recorded(formatting, vol).device(ebs("nvme9n1", "vol-9"), ours(a), nil), "refuse content: on vol-1"},
		{"formatting, resized disk", recorded(formatting, vol).device(func() volumes.Device { d := vol; d.Size = 2 * gib; return d }(), none(), blank()), "refuse content: bytes"},
		{"formatting, left open", recorded(formatting, vol).device(open(vol, a), nil, nil), "format /mnt: cut after it was opened"},
		{"formatting, yet mounted", recorded(formatting, vol).device(open(vol, a, "/data"), nil, nil), "refuse content: mounted on /data"},

		{"ready", recorded(ready, vol).device(vol, ours(a), nil), "unlock /mnt: recorded ready"},
		{"ready, tampered", recorded(ready, vol).device(vol, ours(a, "no digest"), nil), "refuse header: no digest"},
		{"ready, torn", recorded(ready, vol).device(vol, kind(luks.KindTorn), nil), "refuse header: remains"},
		{"ready, no key slots", recorded(ready, vol).device(vol, kind(luks.KindEmpty), nil), "refuse header: without key slots"},
		{"ready, another volume", recorded(ready, vol).device(vol, ours(b), nil), "refuse content: holds LUKS volume " + b},
		{"ready instance store, blank", recorded(ready, eph).device(eph, none(), blank()), "format /mnt: went with a stop"},
		{"ready instance store, foreign", recorded(ready, eph).device(eph, none(), ext4Content()), "refuse content: ext4"},
		{"ready EBS, blank", recorded(ready, vol).device(vol, none(), blank()), "refuse content: the disk is blank"},
		{"ready EBS, foreign", recorded(ready, vol).device(vol, none(), ext4Content()), "refuse content: ext4"},
		{"ready, unread content", recorded(ready, vol).device(vol, none(), nil), "refuse device: was not read"},
		{"ready, restored from a snapshot", recorded(ready, vol).device(ebs("nvme1n1", "vol-2"), ours(a), nil), "unlock /mnt: is now on vol-2"},
		{"ready, key record missing", newWorld().record(a, ready, vol, "/mnt").device(vol, ours(a), nil), "refuse record: k1 is missing"},
		{"ready, open and mounted", recorded(ready, vol).device(open(vol, a, "/mnt"), nil, nil), "nothing /mnt: mounted on /mnt"},
		{"ready, open", recorded(ready, vol).device(open(vol, a), nil, nil), "mount /mnt: not mounted"},

		{"record of another instance, token", newWorld().key("k1", stranger).device(vol, ours(a), nil), "adopt /mnt: token"},
		{"too small", newWorld().device(func() volumes.Device { d := vol; d.Size = 316<<20 - 1; return d }(), none(), blank()), "refuse device: want at least 331350016"},
		{"just large enough", newWorld().device(func() volumes.Device { d := vol; d.Size = 316 << 20; return d }(), none(), blank()), "format /mnt: proven blank"},
		{"Multi-Attach, blank", newWorld().device(shared(vol), none(), blank()), "refuse shared: several instances"},
		{"Multi-Attach, ready", recorded(ready, vol).device(shared(vol), ours(a), nil), "refuse shared: several instances"},
		{"Multi-Attach, ours without record", newWorld().device(shared(vol), ours(a), nil), "refuse shared: several instances"},
		{"Multi-Attach, open and mounted", recorded(ready, vol).device(shared(open(vol, a, "/mnt")), nil, nil), "nothing /mnt: mounted on /mnt"},
		{"Multi-Attach, allowed", func() *world { w := recorded(ready, vol); w.Config.MultiAttach = MultiAttachAllow; return w }().device(shared(vol), ours(a), nil),
			"unlock /mnt: recorded ready"},
		{"shared bit of an instance store", newWorld().device(shared(eph), none(), blank()), "format /mnt: proven blank"},
		{"no class", newWorld().device(volumes.Device{Name: "vdb", Path: "/dev/vdb"}, none(), blank()), "leave: neither"},
		{"in use", newWorld().device(func() volumes.Device {
			d := vol
			d.Uses = []volumes.Use{{Kind: volumes.UseSystem, What: "/", Evidence: "/ is on nvme1n1p1"}}
			return d
		}(), nil, nil), "leave: / is on nvme1n1p1"},
		{"in use though named", newWorld().device(func() volumes.Device {
			d := vol
			d.Named = "vol-1"
			d.Uses = []volumes.Use{{Kind: volumes.UseSystem, What: "/", Evidence: "/ is on nvme1n1p1"}}
			return d
		}(), nil, nil), "refuse content: / is on nvme1n1p1"},
		{"held by something else", newWorld().device(open(vol, b), nil, nil), "leave: dm-0"},
		{"read-only", newWorld().device(func() volumes.Device { d := vol; d.ReadOnly = true; return d }(), none(), blank()), "leave: read-only"},
		{"ready, read-only", recorded(ready, vol).device(func() volumes.Device { d := vol; d.ReadOnly = true; return d }(), ours(a), nil), "refuse device: read-only"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := Decide(tc.world.Facts)
			if len(p.Actions) != 1 {
				t.Fatalf("got %d actions, want 1: %+v", len(p.Actions), p.Actions)
			}
			checkAction(t, p.Actions[0], tc.want)
		})
	}
}

func checkAction(t *testing.T, a Action, want string) {
	t.Helper()
	head, reason, _ := strings.Cut(want, ": ")
	got := string(a.Verb)
	if a.Refusal != "" {
		got += " " + string(a.Refusal)
	} else if a.Verb != Leave {
		got += " " + a.Volume.MountPoint
	}
	if got != head || !strings.Contains(a.Reason, reason) {
		t.Errorf("got  %s: %s\nwant %s: …%s…", got, a.Reason, head, reason)
	}
}

func TestUnreadableDiskIsRefusedNotBlank(t *testing.T) {
	w := newWorld()
	w.Devices = []DeviceFacts{{Device: ebs("nvme1n1", "vol-1"), Err: errors.New("input/output error")}}
	checkAction(t, Decide(w.Facts).Actions[0], "refuse device: input/output error")
}

func TestUnreadableRecordStopsFormattingButNotUnlocking(t *testing.T) {
	const a = "aaaaaaaa-0000-4000-8000-000000000001"
	w := newWorld().key("k1", me).record(a, keycache.StateReady, ebs("nvme1n1", "vol-1"), "/mnt").
		device(ebs("nvme1n1", "vol-1"), ours(a), nil).
		device(ebs("nvme2n1", "vol-2"), none(), blank())
	w.Records.Problems = []keycache.RecordError{{Path: "volumes/x.json", ID: "x", Kind: "volume", Err: errors.New("truncated")}}
	p := Decide(w.Facts)
	checkAction(t, p.Actions[0], "refuse record: truncated")
	checkAction(t, p.Actions[1], "unlock /mnt: ready")
	checkAction(t, p.Actions[2], "refuse record: nothing is formatted")
}

func TestVolumeWithAnUnreadableRecordIsNotAdopted(t *testing.T) {
	const a, b = "aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000002"
	w := newWorld().device(ebs("nvme1n1", "vol-1"), ours(a), nil).device(ebs("nvme2n1", "vol-2"), ours(b), nil)
	w.Records.Problems = []keycache.RecordError{{Path: "volumes/a.json", ID: a, Kind: "volume", Err: errors.New("truncated")}}
	p := Decide(w.Facts)
	checkAction(t, p.Actions[1], "refuse record: cannot be read")
	checkAction(t, p.Actions[2], "adopt /mnt: token")
}

func TestDiskOfAReadyRecordIsNotFormattedForAnother(t *testing.T) {
	const a, b = "aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000002"
	d := ebs("nvme1n1", "vol-1")
	w := newWorld().key("k1", me).record(a, keycache.StateFormatting, d, "/mnt").record(b, keycache.StateReady, d, "/mnt1").
		device(d, ours(a), nil)
	checkAction(t, Decide(w.Facts).Actions[0], "refuse content: volume "+b+" is recorded ready on the same disk")
}

func TestTwinsAreBothRefused(t *testing.T) {
	const a = "aaaaaaaa-0000-4000-8000-000000000001"
	w := newWorld().key("k1", me).record(a, keycache.StateReady, ebs("nvme1n1", "vol-1"), "/mnt").
		device(ebs("nvme1n1", "vol-1"), ours(a), nil).device(ebs("nvme2n1", "vol-2"), ours(a), nil)
	for _, act := range Decide(w.Facts).Actions {
		checkAction(t, act, "refuse content: /dev/nvme1n1 (vol-1) and /dev/nvme2n1 (vol-2) show the same LUKS UUID "+a)
	}
	w.Devices[0] = DeviceFacts{Device: open(ebs("nvme1n1", "vol-1"), a, "/mnt")}
	p := Decide(w.Facts)
	checkAction(t, p.Actions[0], "nothing /mnt: mounted")
	checkAction(t, p.Actions[1], "refuse content: same LUKS UUID")
}

// A copy that a person opened by hand is a twin as well; it is not ours to touch.
func TestTwinOfAMappingWithoutARecord(t *testing.T) {
	const a = "aaaaaaaa-0000-4000-8000-000000000001"
	p := Decide(newWorld().device(ebs("nvme1n1", "vol-1"), ours(a), nil).device(open(ebs("nvme2n1", "vol-2"), a), nil, nil).Facts)
	checkAction(t, p.Actions[0], "refuse content: /dev/nvme1n1 (vol-1) and /dev/nvme2n1 (vol-2) show the same LUKS UUID "+a)
	checkAction(t, p.Actions[1], "leave: dm-0")
}

// Where two disks have one serial, the record of one is not taken for the other's.
func TestDisksOfOneSerialAreNotFormatted(t *testing.T) {
	const a = "aaaaaaaa-0000-4000-8000-000000000001"
	for _, state := range []keycache.VolumeState{keycache.StateReady, keycache.StateFormatting} {
		w := newWorld().key("k1", me).record(a, state, store("", "AWS1"), "/mnt").
			device(store("nvme1n1", "AWS1"), none(), blank()).device(store("nvme2n1", "AWS1"), none(), blank())
		for i, act := range Decide(w.Facts).Actions[:2] {
			checkAction(t, act, fmt.Sprintf("refuse content: it has the same identity as /dev/nvme%dn1: AWS1", 2-i))
		}
	}
	w := newWorld().key("k1", me).record(a, keycache.StateReady, store("", "AWS1"), "/mnt").
		device(open(store("nvme1n1", "AWS1"), a, "/mnt"), nil, nil).device(store("nvme2n1", "AWS1"), none(), blank())
	p := Decide(w.Facts)
	checkAction(t, p.Actions[0], "nothing /mnt: mounted on /mnt")
	checkAction(t, p.Actions[1], "refuse content: recorded ready on the same disk")
}

func TestRecordsOfAnotherInstanceAreQuarantined(t *testing.T) {
	w := newWorld().key("k1", stranger).key("k2", me)
	w.Records.Volumes["v1"] = keycache.VolumeRecord{UUID: "v1", KeyID: "k1", InstanceID: stranger, State: keycache.StateReady}
	p := Decide(w.Facts)
	if !slices.Equal(p.QuarantineKeys, []string{"k1"}) || !slices.Equal(p.QuarantineVolumes, []string{"v1"}) || !p.Changes() {
		t.Errorf("got %+v", p)
	}
	if len(p.Actions) != 0 {
		t.Errorf("a stranger's volume is missed: %+v", p.Actions)
	}
}

func TestMountPointsAreStable(t *testing.T) {
	const a = "aaaaaaaa-0000-4000-8000-000000000001"
	w := newWorld().key("k1", me).record(a, keycache.StateReady, ebs("nvme9n1", "vol-9"), "/mnt1")
	w.Config.Volumes = []VolumeConfig{{Name: "/dev/nvme4n1", MountPoint: "/data"}}
	w.device(ebs("nvme1n1", "vol-1"), none(), blank()).
		device(store("nvme2n1", "AWS2"), none(), blank()).
		device(store("nvme3n1", "AWS3"), none(), blank()).
		device(ebs("nvme4n1", "vol-4"), none(), blank()).
		device(ebs("nvme9n1", "vol-9"), ours(a), nil)
	got := map[string]string{}
	for _, act := range Decide(w.Facts).Actions {
		got[act.Device.Identity] = act.Volume.MountPoint
	}
	want := map[string]string{"AWS2": "/mnt", "AWS3": "/mnt2", "vol-1": "/mnt3", "vol-4": "/data", "vol-9": "/mnt1"}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestMountPointsFollowEC2Names(t *testing.T) {
	first, second := ebs("nvme1n1", "vol-1"), ebs("nvme2n1", "vol-2")
	first.EC2Name, second.EC2Name = "sdg", "sdf"
	got := Decide(newWorld().device(first, none(), blank()).device(second, none(), blank()).Facts)
	if got.Actions[0].Device.EC2Name != "sdf" || got.Actions[0].Volume.MountPoint != "/mnt" {
		t.Errorf("sdf is not the first: %+v", got.Actions[0])
	}
}

func TestReplacedInstanceStoreKeepsItsMountPoint(t *testing.T) {
	const a = "aaaaaaaa-0000-4000-8000-000000000001"
	w := newWorld().key("k1", me).record(a, keycache.StateReady, store("nvme1n1", "AWS-old"), "/mnt5").
		device(store("nvme1n1", "AWS-new"), none(), blank())
	p := Decide(w.Facts)
	if len(p.Actions) != 1 || !slices.Equal(p.Actions[0].Replaces, []string{a}) {
		t.Fatalf("got %+v", p.Actions)
	}
	checkAction(t, p.Actions[0], "format /mnt5: takes the place of "+a)
}

// What becomes swap takes the place of swap, and a filesystem that of a filesystem; swap is never given a mount point, nor a
// filesystem the place of swap.
func TestReplacedSwap(t *testing.T) {
	const a, b = "aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000002"
	lost := func() *world {
		w := newWorld().key("k1", me).record(a, keycache.StateReady, store("nvme1n1", "AWS-1"), "/mnt5").record(b, keycache.StateReady, store("nvme2n1", "AWS-2"), volumes.SwapPoint)
		rec := w.Records.Volumes[b]
		rec.Filesystem = "swap"
		w.Records.Volumes[b] = rec
		w.Config.Volumes = []VolumeConfig{{Name: "/dev/nvme1n1", Filesystem: "swap"}}
		return w
	}
	disk1, disk2 := store("nvme1n1", "AWS-3"), store("nvme2n1", "AWS-4")
	disk1.Named = "/dev/nvme1n1"
	p := Decide(lost().device(disk1, none(), blank()).device(disk2, none(), blank()).Facts)
	if len(p.Actions) != 2 {
		t.Fatalf("got %+v", p.Actions)
	}
	checkAction(t, p.Actions[0], "format [SWAP]: takes the place of "+b)
	checkAction(t, p.Actions[1], "format /mnt5: takes the place of "+a)

	// Only swap is lost, and no swap is wanted any more.
	w := lost()
	delete(w.Records.Volumes, a)
	w.Config.Volumes = nil
	checkAction(t, Decide(w.device(disk2, none(), blank()).Facts).Actions[0], "format /mnt: takes the place of "+b)

	// A mount point in the configuration does not make a filesystem of it.
	w = lost()
	delete(w.Records.Volumes, a)
	w.Config.Volumes = []VolumeConfig{{Name: "/dev/nvme2n1", MountPoint: "/data"}}
	old := store("nvme2n1", "AWS-2")
	old.Named = "/dev/nvme2n1"
	checkAction(t, Decide(w.device(old, ours(b), nil).Facts).Actions[0], "unlock [SWAP]: recorded ready")
}

func TestLostVolumesAreNamed(t *testing.T) {
	const a = "aaaaaaaa-0000-4000-8000-000000000001"
	w := newWorld().key("k1", me).record(a, keycache.StateReady, ebs("nvme1n1", "vol-1"), "/mnt")
	w.Missing = []volumes.Missing{{Name: "/dev/loop7", Reason: "it is not there"}}
	p := Decide(w.Facts)
	checkAction(t, p.Actions[0], "refuse device: /dev/loop7")
	checkAction(t, p.Actions[1], "refuse device: no disk shows it")
	// A blank EBS volume is no replacement for a lost one.
	p = Decide(w.device(ebs("nvme3n1", "vol-3"), none(), blank()).Facts)
	if len(p.Actions) != 3 || len(p.Actions[0].Replaces) > 0 {
		t.Errorf("got %+v", p.Actions)
	}
}

func TestPolicies(t *testing.T) {
	const a = "aaaaaaaa-0000-4000-8000-000000000001"
	w := newWorld().key("k1", me).record(a, keycache.StateReady, ebs("nvme1n1", "vol-1"), "/mnt").
		device(ebs("nvme1n1", "vol-1"), ours(a), nil).device(ebs("nvme2n1", "vol-2"), none(), blank()).
		device(store("nvme3n1", "AWS3"), none(), blank())
	w.Config.EBS, w.Config.InstanceStore = PolicyUnlock, PolicyIgnore
	w.Config.Exclude = nil
	p := Decide(w.Facts)
	checkAction(t, p.Actions[0], "leave: instance_store: ignore")
	checkAction(t, p.Actions[1], "unlock /mnt: ready")
	checkAction(t, p.Actions[2], "leave: ebs: unlock")
	w.Devices[1].Named = "vol-2"
	checkAction(t, Decide(w.Facts).Actions[2], "format /mnt1: proven blank")
	w.Config.Exclude = []string{"vol-1"}
	checkAction(t, Decide(w.Facts).Actions[1], "leave: excluded by the configuration (vol-1)")
}

func TestKeysByScope(t *testing.T) {
	w := newWorld().key("k1", me).device(ebs("nvme1n1", "vol-1"), none(), blank()).device(ebs("nvme2n1", "vol-2"), none(), blank())
	ids := func() (got []string) {
		for _, a := range Decide(w.Facts).Actions {
			got = append(got, a.Volume.KeyID)
		}
		return got
	}
	if got := ids(); !slices.Equal(got, []string{"k1", "k1"}) {
		t.Errorf("node scope: got %q", got)
	}
	w.Config.KeyScope = ScopeVolume
	if got := ids(); !slices.Equal(got, []string{"k1", ""}) {
		t.Errorf("volume scope: got %q", got)
	}
	w.Config.KeyScope = ScopeNode
	w.Config.KMSKey = otherKeyARN
	if got := ids(); !slices.Equal(got, []string{"", ""}) {
		t.Errorf("another KMS key: got %q", got)
	}
}

func TestAdoptionAsksOnlyAboutAllowedKeys(t *testing.T) {
	other := otherKeyARN
	in := ours("aaaaaaaa-0000-4000-8000-000000000001")
	in.Header.Token.KeyARN = other
	w := newWorld().device(ebs("nvme1n1", "vol-1"), in, nil)
	checkAction(t, Decide(w.Facts).Actions[0], "refuse content: does not allow")
	w.Config.AllowedKeys = []string{other}
	checkAction(t, Decide(w.Facts).Actions[0], "adopt /mnt: token")
	w.Config.AllowedKeys, w.Config.KMSKey = nil, "alias/data"
	checkAction(t, Decide(w.Facts).Actions[0], "refuse content: does not allow")
}

// The invariants of the decision table, over worlds that nobody thought of.
func TestPlanInvariants(t *testing.T) {
	uuids := []string{"aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000002", "cccccccc-0000-4000-8000-000000000003"}
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		pick := func(label string, n int) int { return rapid.IntRange(0, n-1).Draw(t, label) }
		if pick("key", 4) > 0 {
			w.key("k1", []string{me, stranger}[pick("key instance", 2)])
		}
		if pick("problem", 8) == 0 {
			w.Records.Problems = []keycache.RecordError{{Path: "p", ID: "k1", Kind: "key", Err: errors.New("corrupt")}}
		}
		policies := []Policy{PolicyFormat, PolicyFormat, PolicyUnlock, PolicyIgnore}
		w.Config.EBS, w.Config.InstanceStore = policies[pick("EBS", 4)], policies[pick("instance store", 4)]
		w.Config.KeyScope = []KeyScope{ScopeNode, ScopeVolume}[pick("scope", 2)]
		if pick("exclude", 4) == 0 {
			w.Config.Exclude = []string{fmt.Sprintf("vol-%d", pick("excluded", 5))}
		}
		for i := range rapid.IntRange(0, 4).Draw(t, "devices") {
			name := fmt.Sprintf("nvme%dn1", i+1)
			d := ebs(name, fmt.Sprintf("vol-%d", pick("identity", 5)))
			if pick("class", 2) == 0 {
				d = store(name, fmt.Sprintf("AWS%d", pick("serial", 5)))
			}
			uuid := uuids[pick("uuid", 3)]
			d.ReadOnly, d.Shared = pick("ro", 8) == 0, pick("shared", 8) == 0
			switch pick("size", 8) {
			case 0:
				d.Size = 20 << 20
			case 1:
				d.Size = 2 * gib // another one than its record has
			}
			if pick("named", 8) == 0 {
				d.Named = d.Identity
			}
			f := DeviceFacts{Device: d}
			switch pick("content", 14) {
			case 0:
				f.Header, f.Content = none(), blank()
			case 1:
				f.Header, f.Content = none(), ext4Content()
			case 2:
				f.Header = ours(uuid)
			case 3:
				f.Header = []*luks.Inspection{ours(uuid, "bad"), tokenless(uuid)}[pick("token", 2)]
			case 4:
				f.Header = kind(luks.KindTorn)
			case 5:
				f.Header = kind(luks.KindEmpty)
			case 6:
				f.Err = errors.New("input/output error")
			case 7:
				f.Header = foreignLUKS(uuid)
			case 8:
				f.Device = open(d, uuid, []string{"/mnt", "/data"}[:pick("mounts", 3)]...)
			case 9:
				f.Uses = []volumes.Use{{Kind: volumes.UseSystem, What: "/", Evidence: "/ is here"}}
			case 10:
				f.Header, f.Content = none(), &volumes.Content{Detail: "noise", NoiseFrom: int64(16<<10) << pick("noise", 3)}
			case 11:
				f.Header = ours(uuid)
				f.Header.PrimaryDamaged = true
			case 12:
				f.Header = ours(uuid)
				f.Header.Header.Token.KeyARN = otherKeyARN
			case 13:
				f.Header = kind(luks.KindLUKS1)
			}
			w.Devices = append(w.Devices, f)
		}
		for range rapid.IntRange(0, 3).Draw(t, "records") {
			d := ebs("", fmt.Sprintf("vol-%d", pick("identity", 5)))
			if pick("class", 2) == 0 {
				d = store("", fmt.Sprintf("AWS%d", pick("serial", 5)))
			}
			which := pick("uuid", 3)
			uuid := uuids[which]
			w.record(uuid, []keycache.VolumeState{keycache.StateReady, keycache.StateFormatting}[pick("state", 2)], d, automaticName(which))
			if pick("instance", 4) == 0 {
				rec := w.Records.Volumes[uuid]
				rec.InstanceID = stranger
				w.Records.Volumes[uuid] = rec
			}
		}

		p := Decide(w.Facts)
		if fmt.Sprint(Decide(w.Facts)) != fmt.Sprint(p) {
			t.Fatal("equal facts gave different plans")
		}
		devices, points := map[string]bool{}, map[string]bool{}
		for _, a := range p.Actions {
			if a.Reason == "" {
				t.Fatalf("%s without a reason", a.Verb)
			}
			if a.Device.Path != "" {
				if devices[a.Device.Path] {
					t.Fatalf("two actions for %s", a.Device.Path)
				}
				devices[a.Device.Path] = true
			}
			checkSafe(t, w.Facts, a)
			if a.Verb == Format && !a.Resume {
				if points[a.Volume.MountPoint] || a.Volume.MountPoint == "" {
					t.Fatalf("mount point %q is given out twice or not at all: %s", a.Volume.MountPoint, brief(p))
				}
				points[a.Volume.MountPoint] = true
			}
		}
		if len(devices) != len(w.Devices) {
			t.Fatalf("%d devices, actions for %d", len(w.Devices), len(devices))
		}
		refused := slices.ContainsFunc(p.Actions, func(a Action) bool { return a.Verb == Refuse })
		if again := Decide(succeeded(w.Facts, p)); !refused && again.Changes() {
			t.Fatalf("a second run after success would change something: %s\nthe first did: %s", brief(again), brief(p))
		}
	})
}

// brief is a plan as a person wants to read it.
func brief(p Plan) string {
	var b strings.Builder
	for _, a := range p.Actions {
		fmt.Fprintf(&b, "\n%s %s (%s) %s: %s", a.Verb, a.Device.Path, a.Device.Identity, a.Volume.MountPoint, a.Reason)
	}
	return b.String()
}

// succeeded is the world after a plan was carried out.
func succeeded(f Facts, p Plan) Facts {
	after := Facts{Config: f.Config, InstanceID: f.InstanceID, Records: keycache.Records{
		Keys: maps.Clone(f.Records.Keys), Volumes: maps.Clone(f.Records.Volumes), Problems: f.Records.Problems,
	}}
	for _, id := range p.QuarantineKeys {
		delete(after.Records.Keys, id)
	}
	for _, id := range p.QuarantineVolumes {
		delete(after.Records.Volumes, id)
	}
	for _, a := range p.Actions {
		for _, old := range a.Replaces {
			if a.Verb == Format {
				delete(after.Records.Volumes, old)
			}
		}
		if a.Device.Path == "" {
			continue
		}
		dev := a.Device
		if a.Verb.acts() {
			v := a.Volume
			if v.UUID == "" {
				v.UUID = "new volume on " + dev.Path
			}
			if v.KeyID == "" {
				v.KeyID = "new key"
				after.Records.Keys[v.KeyID] = keycache.KeyRecord{ID: v.KeyID, KeyARN: testKey, InstanceID: f.InstanceID}
			}
			v.State, v.Identity, v.Class, v.Mapping = keycache.StateReady, dev.Identity, string(dev.Class), "luks-"+v.UUID
			after.Records.Volumes[v.UUID] = v
			dev = DeviceFacts{Device: open(dev.Device, v.UUID, v.MountPoint)}
		}
		after.Devices = append(after.Devices, dev)
	}
	return after
}

// checkSafe holds one action against the rules that no action may break.
func checkSafe(t *rapid.T, f Facts, a Action) {
	d := a.Device
	boot := slices.ContainsFunc(d.Uses, func(u volumes.Use) bool { return u.Kind == volumes.UseSystem })
	if a.Verb.acts() && a.Verb != Mount && (boot || d.ReadOnly || d.Err != nil) {
		t.Fatalf("%s of a disk that is in use, read-only or unreadable: %+v", a.Verb, a)
	}
	if a.Verb.acts() && a.OpenAs == "" && d.Shared && d.Class == volumes.ClassEBS {
		t.Fatalf("%s of a Multi-Attach volume: %+v", a.Verb, a)
	}
	if slices.Contains(f.Config.Exclude, d.Identity) && d.Identity != "" && a.Verb != Leave {
		t.Fatalf("%s of a disk that is excluded: %+v", a.Verb, a)
	}
	switch rec := f.Records.Volumes[a.Volume.UUID]; a.Verb {
	case Unlock:
		if rec.State != keycache.StateReady || rec.InstanceID != f.InstanceID || !d.Header.Pass() || d.Header.Header.UUID != rec.UUID {
			t.Fatalf("unlock of what is not a ready volume with a header that passes: %+v", a)
		}
	case Adopt:
		if !d.Header.Pass() || a.Key.KeyARN != testKey || rec.InstanceID == f.InstanceID {
			t.Fatalf("adoption of what does not pass, is recorded, or is under a key that is not allowed: %+v", a)
		}
	}
	if a.Verb != Format {
		return
	}
	if len(f.Records.Problems) > 0 {
		t.Fatalf("format while a record cannot be read: %+v", a)
	}
	isBlank := d.Content != nil && d.Content.Blank
	for uuid, rec := range f.Records.Volumes {
		if rec.InstanceID != f.InstanceID || rec.State != keycache.StateReady {
			continue
		}
		shows := d.Header != nil && d.Header.Header != nil && d.Header.Header.UUID == uuid
		_, isOpen := ourMapping(d.Device, rec)
		if shows || isOpen {
			t.Fatalf("format of ready volume %s: %+v", uuid, a)
		}
		if sameDisk(rec, d.Device) && !(isBlank && d.Class == volumes.ClassInstanceStore) {
			t.Fatalf("format of the disk of ready volume %s: %+v", uuid, a)
		}
	}
	if a.Resume {
		rec, ok := f.Records.Volumes[a.Volume.UUID]
		if !ok || rec.State != keycache.StateFormatting || rec.InstanceID != f.InstanceID {
			t.Fatalf("resumed without a formatting record: %+v", a)
		}
		if a.OpenAs == "" && (!sameDisk(rec, d.Device) || rec.Size != d.Size) {
			t.Fatalf("resumed on another disk: %+v", a)
		}
		if h := d.Header; h != nil && h.Header != nil && len(h.Header.Tokens) > 0 && !h.Pass() {
			t.Fatalf("resumed over a finished header that fails the check: %+v", a)
		}
		return
	}
	policy := map[volumes.Class]Policy{volumes.ClassEBS: f.Config.EBS, volumes.ClassInstanceStore: f.Config.InstanceStore}[d.Class]
	if !isBlank || policy != PolicyFormat && d.Named == "" {
		t.Fatalf("format of what is not proven blank, or against policy: %+v", a)
	}
}

func BenchmarkDecide(b *testing.B) {
	w := newWorld().key("k1", me)
	for i := range 24 {
		uuid, d := fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012d", i), ebs(fmt.Sprintf("nvme%dn1", i+1), fmt.Sprintf("vol-%d", i))
		w.record(uuid, keycache.StateReady, d, automaticName(i)).device(open(d, uuid), nil, nil)
	}
	for b.Loop() {
		if p := Decide(w.Facts); len(p.Actions) != 24 {
			b.Fatal("not 24 actions")
		}
	}
}
