package agent

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

var keepCompat = flag.String("compat", "", "keep what this build makes as testdata/compat/`NAME`, for later builds to open")

const compatDir = "testdata/compat"

// compatKey is the id of the fixtures' KMS key. It wraps nothing else, and the volumes are empty.
const compatKey = "c0a7c0a7-0000-4000-8000-000000000001"

func compatSecret() [32]byte {
	return sha256.Sum256([]byte("luks-kms-agent fixtures: protects nothing"))
}

// compatNode is a node as an earlier build left it. Beside it are its state directory, the header of each disk, and perhaps a header backup.
type compatNode struct {
	InstanceID string
	Disks      []compatDisk
	// RecoveryKey is that of the disk "vol-recovery", wrapped under compatKey.
	RecoveryKey []byte `json:",omitempty"`
}

type compatDisk struct {
	Class    volumes.Class
	Identity string
	Torn     bool `json:",omitempty"` // the primary copy of its header
}

// TestKeepCompat keeps fixtures of this build where it is told to: go test ./agent -run TestKeepCompat -compat NAME. It always tries that this
// build opens them.
func TestKeepCompat(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "this build")
	if *keepCompat != "" {
		dir = filepath.Join(compatDir, *keepCompat)
		if _, err := os.Stat(dir); err == nil {
			t.Fatalf("%s is there, and is kept", dir)
		}
	}
	t.Run("keep", func(t *testing.T) {
		for variant, make := range map[string]func(*testing.T, *machine) (*machine, compatNode){
			// A volume as made, one that was rotated, one with a recovery key, one with a torn header; a header backup.
			"whole": func(t *testing.T, m *machine) (*machine, compatNode) {
				for _, identity := range []string{"vol-made", "vol-rotated", "vol-recovery", "vol-torn"} {
					m.disk(volumes.ClassEBS, identity)
				}
				m.runOK()
				_, errRotate := m.rotate("vol-rotated")
				recovery, errRecovery := m.addRecovery(false, "vol-recovery")
				files, errBackup := m.backUp("vol-made")
				err := errors.Join(errRotate, errRecovery, errBackup)
				if err == nil {
					err = os.Rename(files["vol-made"], filepath.Join(m.dir, "backup.tar"))
				}
				if err != nil {
					t.Fatal(err)
				}
				m.write(m.devices[3], 0, bytes.Repeat([]byte{0}, 4096))
				return m, compatNode{RecoveryKey: m.kms.Wrap(m.cfg.KMSKey, []byte(recovery), nil), Disks: []compatDisk{3: {Torn: true}}}
			},
			// The power went in the middle of rotate.
			"rotating": func(t *testing.T, m *machine) (cut *machine, _ compatNode) {
				m.disk(volumes.ClassEBS, "vol-rotating")
				m.runOK()
				n := m.node()
				n.atStep = func(s step) {
					if s == stepSlotAdded {
						cut = m.copyTo(filepath.Join(t.TempDir(), "cut"))
					}
				}
				if _, err := n.Rotate(t.Context(), nil); err != nil || cut == nil {
					t.Fatal(err)
				}
				return cut, compatNode{}
			},
			"rewrapped": func(t *testing.T, m *machine) (*machine, compatNode) {
				m.disk(volumes.ClassInstanceStore, "AWS-rewrapped")
				to := m.cfg.KMSKey
				m.cfg.KMSKey = m.kms.ARN()
				m.runOK()
				if _, err := m.rewrap(to); err != nil {
					t.Fatal(err)
				}
				return m, compatNode{}
			},
			"swap": func(t *testing.T, m *machine) (*machine, compatNode) {
				swap := m.disk(volumes.ClassInstanceStore, "AWS-swap")
				m.cfg.Volumes = []VolumeConfig{{Name: swap.Path, Filesystem: swapType}}
				m.runOK()
				return m, compatNode{}
			},
		} {
			t.Run(variant, func(t *testing.T) {
				m := newMachine(t)
				m.cfg.KMSKey = m.kms.ImportKey(compatKey, compatSecret())
				made, node := make(t, m)
				made.keep(filepath.Join(dir, variant), node)
			})
		}
	})
	t.Run("open", func(t *testing.T) { openCompat(t, dir, map[string]int{}) })
}

// keep writes a fixture. What no key slot uses of a header is noise of cryptsetup's, and zero here: it would be most of the file.
func (m *machine) keep(dir string, node compatNode) {
	m.t.Helper()
	check := func(err error) {
		if err != nil {
			m.t.Helper()
			m.t.Fatal(err)
		}
	}
	check(os.MkdirAll(dir, 0o755))
	torn := node.Disks
	node.Disks = nil
	for i, d := range m.devices {
		node.Disks = append(node.Disks, compatDisk{Class: d.Class, Identity: d.Identity, Torn: i < len(torn) && torn[i].Torn})
		node.InstanceID = m.records().Volumes[m.uuidOf(d)].InstanceID
		header := make([]byte, headerBytes)
		f, err := os.Open(d.Path)
		check(err)
		_, err = io.ReadFull(f, header)
		check(errors.Join(err, f.Close()))
		inspected, err := luks.Inspect(d.Path)
		check(err)
		used := make([]bool, headerBytes)
		for j := range luks.KeyslotsOffset {
			used[j] = true
		}
		for _, area := range keySlotAreas(m.t, header[:luks.KeyslotsOffset], inspected.PrimaryDamaged) {
			for j := area[0]; j < area[0]+area[1]; j++ {
				used[j] = true
			}
		}
		for j := range header {
			if !used[j] {
				header[j] = 0
			}
		}
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		_, err = z.Write(header)
		check(errors.Join(err, z.Close()))
		check(os.WriteFile(filepath.Join(dir, d.Identity+".header.gz"), packed.Bytes(), 0o644))
	}
	text, err := json.MarshalIndent(node, "", "  ")
	check(err)
	check(os.WriteFile(filepath.Join(dir, "node.json"), append(text, '\n'), 0o644))
	check(os.RemoveAll(filepath.Join(m.cfg.StateDir, "lock")))
	out, err := exec.Command("cp", "-r", m.cfg.StateDir, filepath.Join(dir, "state")).CombinedOutput()
	if err != nil {
		m.t.Fatalf("%v: %s", err, out)
	}
	if backup, err := os.ReadFile(filepath.Join(m.dir, "backup.tar")); err == nil {
		check(os.WriteFile(filepath.Join(dir, "backup.tar"), backup, 0o644))
	}
}

func (m *machine) uuidOf(d volumes.Device) string {
	for uuid, v := range m.records().Volumes {
		if v.Identity == d.Identity {
			return uuid
		}
	}
	m.t.Fatalf("there is no record of %s", d.Identity)
	return ""
}

// keySlotAreas are offset and size of each key slot's area, from the JSON of the primary or the secondary of a header's copies. In each the JSON comes
// behind a binary header of 4096 bytes.
func keySlotAreas(t testing.TB, copies []byte, secondary bool) (areas [][2]int) {
	t.Helper()
	half := len(copies) / 2
	one := copies[:half]
	if secondary {
		one = copies[half:]
	}
	text, _, _ := bytes.Cut(one[4096:], []byte{0})
	var header struct {
		Keyslots map[string]struct {
			Area struct{ Offset, Size string }
		}
	}
	if err := json.Unmarshal(text, &header); err != nil || len(header.Keyslots) == 0 {
		t.Fatalf("the JSON of a header: %v", err)
	}
	for _, slot := range header.Keyslots {
		offset, errOffset := strconv.Atoi(slot.Area.Offset)
		size, errSize := strconv.Atoi(slot.Area.Size)
		if err := errors.Join(errOffset, errSize); err != nil {
			t.Fatal(err)
		}
		areas = append(areas, [2]int{offset, size})
	}
	return areas
}

// TestCompat opens what earlier builds made.
func TestCompat(t *testing.T) {
	builds, err := os.ReadDir(compatDir)
	if err != nil {
		t.Fatal(err)
	}
	tried := map[string]int{}
	for _, build := range builds {
		if build.IsDir() {
			t.Run(build.Name(), func(t *testing.T) { openCompat(t, filepath.Join(compatDir, build.Name()), tried) })
		}
	}
	if len(tried) != 4 {
		t.Errorf("no fixture for some way to open a volume: %v", tried)
	}
}

// openCompat opens the volumes of all fixtures in a directory in each way in which they may be opened, and counts the ways.
func openCompat(t *testing.T, dir string, tried map[string]int) {
	variants, err := filepath.Glob(filepath.Join(dir, "*", "node.json"))
	if err != nil || len(variants) == 0 {
		t.Fatalf("no fixture in %s (%v)", dir, err)
	}
	for _, file := range variants {
		from := filepath.Dir(file)
		node := readCompat(t, from)
		ways := map[string]func(*testing.T, *machine){
			"by its records": func(t *testing.T, m *machine) {
				before := m.sums()
				r := m.runOK()
				for _, o := range r.Outcomes {
					if o.Action.Verb != Unlock {
						t.Errorf("%s: %s, %s", o.Action.Device.Identity, o.Action.Verb, o.Action.Reason)
					}
				}
				for i, d := range node.Disks {
					if sums := m.sums(); (sums[d.Identity] != before[d.Identity]) != d.Torn {
						t.Errorf("disk %d, %s, was written to, or not mended", i, d.Identity)
					}
				}
				if problems := m.records().Problems; len(problems) > 0 {
					t.Errorf("records: %v", problems)
				}
				m.wantInUse(node)
				if _, err := m.rotate(); err != nil { // or goes on with one that was cut
					t.Errorf("rotate: %v", err)
				}
				m.reboot()
				m.runOK()
				m.wantInUse(node)
			},
			"by its token": func(t *testing.T, m *machine) {
				m.cfg.StateDir = filepath.Join(m.dir, "other state")
				for _, o := range m.runOK().Outcomes {
					if o.Action.Verb != Adopt {
						t.Errorf("%s: %s, %s", o.Action.Device.Identity, o.Action.Verb, o.Action.Reason)
					}
				}
				m.wantInUse(node)
			},
		}
		if len(node.RecoveryKey) > 0 {
			ways["by its recovery key"] = func(t *testing.T, m *machine) {
				text, err := m.kms.Unwrap(m.cfg.KMSKey, node.RecoveryKey)
				if err != nil {
					t.Fatal(err)
				}
				asked := m.noAWS()
				done, err := m.unlockRecovery(string(text), "vol-recovery")
				if err != nil || done["vol-recovery"] != Unlock || asked() != 0 {
					t.Errorf("%v, %v", done, err)
				}
			}
		}
		if kept, err := os.ReadFile(filepath.Join(from, "backup.tar")); err == nil {
			ways["by its header backup"] = func(t *testing.T, m *machine) {
				backup := filepath.Join(m.dir, "backup.tar") // what it replaces is saved beside it
				if err := os.WriteFile(backup, kept, 0o600); err != nil {
					t.Fatal(err)
				}
				m.destroy(m.devices[0])
				if _, err := m.restore(backup, ""); err != nil {
					t.Errorf("restore: %v", err)
				}
				m.runOK()
			}
		} else if !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for how, open := range ways {
			tried[how]++
			t.Run(filepath.Base(from)+"/"+how, func(t *testing.T) { open(t, compatMachine(t, from, node)) })
		}
	}
}

// wantInUse wants every disk of a fixture mounted, or to be swap.
func (m *machine) wantInUse(node compatNode) {
	m.t.Helper()
	if len(m.mounts)+len(m.swaps) != len(node.Disks) {
		m.t.Errorf("mounts %v, swap %v", m.mounts, m.swaps)
	}
}

func readCompat(t *testing.T, dir string) (node compatNode) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "node.json"))
	if err == nil {
		err = json.Unmarshal(text, &node)
	}
	if err != nil {
		t.Fatal(err)
	}
	return node
}

// compatMachine is a machine with a fixture's disks and records. Its volumes have fresh filesystems, as a fixture has only headers.
func compatMachine(t *testing.T, dir string, node compatNode) *machine {
	m := newMachine(t)
	m.cfg.KMSKey = m.kms.ImportKey(compatKey, compatSecret())
	m.imds.SetIdentity("instanceId", node.InstanceID)
	if out, err := exec.Command("cp", "-r", filepath.Join(dir, "state"), m.cfg.StateDir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// git keeps no modes but 0644 and 0755.
	if out, err := exec.Command("chmod", "-R", "go=", m.cfg.StateDir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, d := range node.Disks {
		disk := m.disk(d.Class, d.Identity)
		packed, err := os.Open(filepath.Join(dir, d.Identity+".header.gz"))
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(packed)
		if err != nil {
			t.Fatal(err)
		}
		header, err := io.ReadAll(z)
		if err := errors.Join(err, z.Close(), packed.Close()); err != nil {
			t.Fatal(err)
		}
		m.write(disk, 0, header)
		plain := fmt.Sprintf("%s.%x", disk.Path, sha256.Sum256(volumeKeyDigest.Find(header[:32<<10])))
		f, err := os.Create(plain)
		if err == nil {
			err = errors.Join(f.Truncate(disk.Size-luks.DataOffset), f.Close())
		}
		if err == nil {
			uuid := m.uuidOf(disk)
			err = volumes.MakeFilesystem(t.Context(), plain, m.records().Volumes[uuid].Filesystem, "", uuid)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return m
}
