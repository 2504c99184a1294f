package volumes

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// stripeName is the name that every stripe has in its members' superblocks, by which it is told from other people's arrays.
const stripeName = "luks-kms-agent"

// stripePath is the link to the stripe that udev, or mdadm where there is no udev, makes.
const stripePath = "/dev/md/" + stripeName

// Member says of which stripe a disk is part; the zero value: of none.
type Member struct {
	Stripe string // UUID of the array
	Disks  int    // how many disks the stripe has
	Array  string // kernel name of the array that the disk is in now, "" where it is in none
}

// The superblock of an md array in version 1.2 (linux/raid/md_p.h, struct mdp_superblock_1): little endian, 4 KiB from the start of
// each member.
const (
	mdOffset     = 4096
	mdLength     = 96 // as far as it is read here
	mdMagic      = 0xa92b4efc
	mdMajor      = 1
	mdUUID       = 16
	mdName       = 32
	mdNameLength = 32
	mdLevel      = 72
	mdDisks      = 92
)

// readMember reads of which stripe of ours a disk is part. It is a hint, as [askNVMe]: what cannot be read is no member, and whether the
// superblock is whole is mdadm's to judge.
func readMember(path string) Member {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return Member{}
	}
	defer f.Close()
	var sb [mdLength]byte
	if _, err := f.ReadAt(sb[:], mdOffset); err != nil {
		return Member{}
	}
	return parseMember(sb[:])
}

func parseMember(sb []byte) Member {
	number := func(offset int) uint32 { return binary.LittleEndian.Uint32(sb[offset:]) }
	name, _, _ := bytes.Cut(sb[mdName:mdName+mdNameLength], []byte{0})
	_, plain, withHost := strings.Cut(string(name), ":") // "HOST:NAME", where mdadm was told a host
	if !withHost {
		plain = string(name)
	}
	id, err := uuid.FromBytes(sb[mdUUID : mdUUID+16])
	if number(0) != mdMagic || number(4) != mdMajor || number(mdLevel) != 0 || plain != stripeName || err != nil {
		return Member{}
	}
	return Member{Stripe: id.String(), Disks: int(number(mdDisks))}
}

// stripes adds the arrays that are stripes of ours: RAID0 that runs, over as many whole instance-store disks as it has, which all say that
// they are part of it. Any other array stays left out, as the scan always has it.
func (t *table) stripes(devices []Device) ([]Device, error) {
	for i := range devices {
		d := &devices[i]
		if d.Class != ClassInstanceStore {
			continue
		}
		d.Member = readMember(t.root + d.Path)
		for _, above := range t.above[d.Name] {
			if n := t.nodes[above]; n != nil && n.isArray() && d.Member.Stripe != "" {
				d.Member.Array = above
			}
		}
	}
	for _, n := range t.sorted() {
		if !n.isArray() || n.size == 0 || n.gone {
			continue
		}
		level, err := readOptional(n.dir + "/md/level")
		if err != nil {
			return nil, fmt.Errorf("cannot read the level of %s: %w", n.name, err)
		}
		var members []Device
		for _, d := range devices {
			if d.Member.Stripe != "" && d.Member.Array == n.name {
				members = append(members, d)
			}
		}
		if level != "raid0" || len(members) == 0 || len(members) != len(n.slaves) || len(members) != members[0].Member.Disks ||
			slices.ContainsFunc(members, func(d Device) bool { return d.Member != members[0].Member }) {
			continue
		}
		array, err := t.device(n, nil)
		if err != nil {
			return nil, err
		}
		array.Class, array.Identity = ClassInstanceStore, members[0].Member.Stripe
		for _, d := range members {
			array.Members = append(array.Members, d.Name)
		}
		devices = append(devices, array)
	}
	return devices, nil
}

// isArray says whether a node is an md array.
func (n *node) isArray() bool { return n.hasPrefix("md") || strings.HasPrefix(n.name, "md_") }

// MakeStripe makes a RAID0 array with that UUID of disks, each of which the caller holds and has proven blank, and returns when it runs. It
// never forces: mdadm refuses a disk that is in use or, since it asks and nobody answers, one with a signature. A cut may leave some of the disks with a superblock,
// and others without. Errors: ErrNoProgram.
func MakeStripe(ctx context.Context, id string, members []Device) error {
	// --homehost=any: an array of this name is the node's own, whatever the node is called by then.
	return mdadm(ctx, "make", id, slices.Concat([]string{"--create", stripePath, "--homehost=any", "--name=" + stripeName, "--metadata=1.2", "--level=0",
		"--uuid=" + id, "--raid-devices=" + strconv.Itoa(len(members))}, Paths(members)))
}

// AssembleStripe starts the array of that UUID, of members that a scan found. An array of it that does not run, as mdadm's udev rules leave one that they
// have not found all disks of, is given up first. Errors: ErrNoProgram.
func AssembleStripe(ctx context.Context, id string, members []Device) error {
	for _, d := range members {
		if err := StopArray(ctx, d); err != nil {
			return err
		}
	}
	return mdadm(ctx, "assemble", id, slices.Concat([]string{"--assemble", stripePath, "--homehost=any", "--uuid=" + id}, Paths(members)))
}

// StopArray gives up the array that a disk was seen in, which does not run. Errors: ErrNoProgram.
func StopArray(ctx context.Context, d Device) error {
	if d.Member.Array == "" {
		return nil
	}
	cmd, err := program(ctx, "mdadm", "--stop", "/dev/"+d.Member.Array)
	if err != nil {
		return fmt.Errorf("cannot stop the array %s of %s: %w", d.Member.Array, d.Path, err)
	}
	_ = cmd.Run() // it may have been stopped for another of its disks; where it was not, whoever needs the disk finds it in use
	return nil
}

// ClearMember makes a disk blank that the caller holds, if it still is part of that stripe: [ErrChanged] if it is not.
func ClearMember(ctx context.Context, d Device, id string) error {
	if now := readMember(d.root + d.Path); now.Stripe != id {
		return fmt.Errorf("cannot clear %s: %w: it was part of stripe %s", d.Path, ErrChanged, id)
	}
	return MakeBlank(ctx, d.root+d.Path)
}

func mdadm(ctx context.Context, verb, id string, args []string) error {
	cmd, err := program(ctx, "mdadm", args...)
	if err == nil {
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err = cmd.Run(); err != nil {
			err = commandError("mdadm", err, stderr.Bytes())
		}
	}
	if err != nil {
		return fmt.Errorf("cannot %s stripe %s: %w", verb, id, err)
	}
	return nil
}

// CheckStripe tells whether stripes can be made and assembled: ErrNoProgram where mdadm is missing.
func CheckStripe() error {
	if _, err := program(context.Background(), "mdadm"); err != nil {
		return fmt.Errorf("cannot make or assemble stripes: %w", err)
	}
	return nil
}

// Paths are the paths of devices, in their order.
func Paths(devices []Device) []string {
	var all []string
	for _, d := range devices {
		all = append(all, d.Path)
	}
	return all
}
