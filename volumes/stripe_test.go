package volumes

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
)

const (
	stripeA = "5f3c1a52-0a3c-4a53-9d0b-2f6a1d9c7e01"
	stripeB = "5f3c1a52-0a3c-4a53-9d0b-2f6a1d9c7e02"
)

// memberBlock is what mdadm writes of an array, as far as it is read.
func memberBlock(id, name string, level, disks uint32) []byte {
	sb := make([]byte, mdLength)
	u := uuid.MustParse(id)
	copy(sb[mdUUID:], u[:])
	copy(sb[mdName:mdName+mdNameLength], name)
	for offset, v := range map[int]uint32{0: mdMagic, 4: mdMajor, mdLevel: level, mdDisks: disks} {
		binary.LittleEndian.PutUint32(sb[offset:], v)
	}
	return sb
}

// member gives a disk of the tree a superblock.
func (tr *tree) member(name string, sb []byte) {
	tr.write("dev/"+name, strings.Repeat("\x00", mdOffset)+string(sb))
}

func TestParseMember(t *testing.T) {
	changed := func(offset int, v uint32) []byte {
		sb := memberBlock(stripeA, stripeName, 0, 3)
		binary.LittleEndian.PutUint32(sb[offset:], v)
		return sb
	}
	for _, test := range []struct {
		name string
		sb   []byte
		want Member
	}{
		{"ours", memberBlock(stripeA, stripeName, 0, 3), Member{Stripe: stripeA, Disks: 3}},
		{"ours, with a host", memberBlock(stripeA, "ip-10-0-0-1:"+stripeName, 0, 2), Member{Stripe: stripeA, Disks: 2}},
		{"another name", memberBlock(stripeA, "scratch", 0, 2), Member{}},
		{"a name that only ends so", memberBlock(stripeA, "my-"+stripeName, 0, 2), Member{}},
		{"a mirror", memberBlock(stripeA, stripeName, 1, 2), Member{}},
		{"linear", changed(mdLevel, 0xffffffff), Member{}},
		{"no superblock", make([]byte, mdLength), Member{}},
		{"another version", changed(4, 2), Member{}},
	} {
		if got := parseMember(test.sb); got != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
}

// stripeTree is a node with two instance-store disks that are part of the stripe, md127.
func stripeTree(t *testing.T) *tree {
	tr := newTree(t)
	tr.boot()
	for i, name := range []string{"nvme1n1", "nvme2n1"} {
		tr.nvme(name, "259:"+string(rune('3'+i)), modelInstanceStore, "AWS"+name)
		tr.member(name, memberBlock(stripeA, stripeName, 0, 2))
	}
	return tr
}

func (tr *tree) array(name string, under ...string) {
	tr.disk(name, "9:127", "md/level", "raid0")
	tr.on(name, under...)
}

func TestStripe(t *testing.T) {
	t.Parallel()
	tr := stripeTree(t)
	for _, name := range []string{"nvme1n1", "nvme2n1"} {
		if got, want := tr.scan().device(t, name).Member, (Member{Stripe: stripeA, Disks: 2}); got != want {
			t.Errorf("not assembled: %s is %+v, want %+v", name, got, want)
		}
	}
	tr.array("md127", "nvme1n1", "nvme2n1")
	tr.link("dev/md/luks-kms-agent", "../md127")
	tr.dm("dm-0", "253:0", "luks-1", "CRYPT-LUKS2-1-luks-1", "md127")
	tr.mount("253:0", "/mnt", "xfs", "/dev/mapper/luks-1", "rw")
	scan := tr.scan()
	d := scan.device(t, "md127")
	if d.Class != ClassInstanceStore || d.Identity != stripeA || !slices.Equal(d.Members, []string{"nvme1n1", "nvme2n1"}) || len(d.Mappings) != 1 || !slices.Equal(d.Mappings[0].Mounts, []string{"/mnt"}) {
		t.Errorf("the stripe is %+v", d)
	}
	if m := scan.device(t, "nvme2n1"); m.Member.Array != "md127" || len(m.Uses) == 0 {
		t.Errorf("a disk of it is %+v", m)
	}

	// With a disk taken away, what is on the stripe is gone, and the stripe none that anything may be done with.
	tr.remove("sys/class/block/nvme2n1")
	tr.remove(disksDir + "nvme2n1")
	tr.remove("dev/nvme2n1")
	scan = tr.scan()
	if len(scan.Gone) != 1 || scan.Gone[0].Name != "luks-1" || names(scan) != "nvme0n1 nvme1n1" {
		t.Errorf("with a disk taken away: gone %+v, devices %s", scan.Gone, names(scan))
	}
}

// What is not wholly ours is not listed, and so never touched.
func TestArrayThatIsNoStripeOfOurs(t *testing.T) {
	t.Parallel()
	for name, build := range map[string]func(*tree){
		"an EBS volume in it": func(tr *tree) {
			tr.nvme("nvme3n1", "259:5", modelEBS, "vol0b")
			tr.member("nvme3n1", memberBlock(stripeA, stripeName, 0, 3))
			tr.array("md127", "nvme1n1", "nvme2n1", "nvme3n1")
		},
		"a partition of the boot volume in it": func(tr *tree) { tr.array("md127", "nvme1n1", "nvme2n1", "nvme0n1p1") },
		"a disk of another stripe in it": func(tr *tree) {
			tr.member("nvme2n1", memberBlock(stripeB, stripeName, 0, 2))
			tr.array("md127", "nvme1n1", "nvme2n1")
		},
		"not all of its disks": func(tr *tree) { tr.array("md127", "nvme1n1") },
		"it does not run": func(tr *tree) {
			tr.array("md127", "nvme1n1", "nvme2n1")
			tr.write(disksDir+"md127/size", "0\n")
		},
		"another level": func(tr *tree) {
			tr.array("md127", "nvme1n1", "nvme2n1")
			tr.write(disksDir+"md127/md/level", "linear\n")
		},
		"somebody else's name": func(tr *tree) {
			for _, name := range []string{"nvme1n1", "nvme2n1"} {
				tr.member(name, memberBlock(stripeA, "scratch", 0, 2))
			}
			tr.array("md127", "nvme1n1", "nvme2n1")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := stripeTree(t)
			build(tr)
			for _, d := range tr.scan().Devices {
				if d.Name == "md127" {
					t.Errorf("it is listed: %+v", d)
				}
			}
		})
	}
}

// A disk is cleared only while it shows the stripe that it was seen to be part of.
func TestClearMember(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	write := func(id string) []byte {
		content := append(make([]byte, mdOffset), memberBlock(id, stripeName, 0, 2)...)
		content = append(content, make([]byte, 1<<20)...)
		if err := os.WriteFile(image, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return content
	}
	before := write(stripeB)
	if err := ClearMember(t.Context(), Device{Path: image}, stripeA); !errors.Is(err, ErrChanged) {
		t.Errorf("another stripe's disk: %v", err)
	}
	if after, err := os.ReadFile(image); err != nil || !slices.Equal(after, before) {
		t.Errorf("it was written to (%v)", err)
	}
	write(stripeA)
	if err := ClearMember(t.Context(), Device{Path: image}, stripeA); err != nil {
		t.Error(err)
	}
	if content, err := Probe(t.Context(), image, 0); err != nil || !content.Blank {
		t.Errorf("cleared: %+v, %v", content, err)
	}
}
