//go:build vm

package vm_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// The steps of agent/step.go that mean more to TestPowerCutAtEveryStep than a name.
const (
	stepKeyRecorded = "the key record is durable"
	stepIntent      = "the record says formatting"
	stepReady       = "the record says ready"
	stepWiped       = "the keys are wiped"
)

// TestPowerCutAtEveryStep: the power goes at each step of a first boot, and with it what was not flushed. The next boot makes
// the node whole under one data key, and nothing that was synced on a ready volume is gone.
func TestPowerCutAtEveryStep(t *testing.T) {
	leave := parallel(t)
	n := harness.NewNode(t, assets, "", ssd1, ebs1)
	n.Wake()
	n.HoldAt(harness.Nowhere)
	n.StartServices()
	n.AwaitVolumes()
	steps := n.Steps()
	n.PowerCut()
	t.Logf("steps of a first boot: %q", steps)
	for _, step := range []string{stepKeyRecorded, stepIntent, stepReady, stepWiped} {
		if !slices.Contains(steps, step) {
			t.Errorf("the steps do not have %q", step)
		}
	}
	if len(steps) < 9 {
		t.Fatalf("only %d steps, and there were 9 once", len(steps))
	}
	leave()
	for i, step := range steps {
		c := firstBootCut{step: step, keyRecorded: i >= slices.Index(steps, stepKeyRecorded), writes: step == stepWiped}
		t.Run(step, c.story)
		if step == stepReady {
			c.boots, c.writes = true, true
			t.Run(step+" and files are synced", c.story)
		}
	}
}

// firstBootCut is a cut of a first boot's power at a step.
type firstBootCut struct {
	step        string
	keyRecorded bool // by then
	boots       bool // the node truly boots after the cut, and once more after another one; else it is resumed
	writes      bool // files are written and synced before the cut: that flushes what the agent should have flushed
}

// records is a disk for the state directory: it loses unflushed writes as the data disks do, and makes a node whole on a new
// boot disk, which is quicker to have than a boot.
var records = harness.Loop("records", "/dev/loop7")

// wakeWithRecords resumes a node whose state directory is on the disk for records. Nothing but a flush makes anything durable there:
// the kernel writes late.
func wakeWithRecords(n *harness.Node) {
	n.Wake()
	n.Sh(`set -e
		echo 0 >/proc/sys/vm/dirty_writeback_centisecs
		mkdir /var/lib/luks-kms-agent
		mount -o commit=3600,noauto_da_alloc /dev/loop7 /var/lib/luks-kms-agent
		chmod 0700 /var/lib/luks-kms-agent
		sync -f /var/lib/luks-kms-agent`)
}

func (c firstBootCut) story(t *testing.T) {
	parallel(t)
	disks := []harness.Disk{ssd1, ebs1}
	if !c.boots {
		disks = append(disks, records)
	}
	n := harness.NewNode(t, assets, "", disks...)
	n.LoseUnflushed(rand.Uint64())
	wake := n.Wake
	if !c.boots {
		n.MakeExt4("records", "records")
		wake = func() { wakeWithRecords(n) }
	}
	wake()
	n.HoldAt(c.step)
	n.StartServices()
	n.AwaitHeld(5 * time.Minute)
	if c.step == stepReady {
		n.Await("both volumes are recorded ready", 5*time.Minute, func() bool { return len(readyVolumes(n)) == 2 })
	}
	var files map[string]string
	if c.writes {
		files = writeToReady(n)
		if len(files) != 2 {
			t.Errorf("%d volumes are recorded ready, want 2", len(files))
		}
	}
	n.PowerCut()

	if c.boots {
		n.Boot()
	} else {
		wake()
		n.StartServices()
	}
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt", "/mnt1")
	for uuid, digest := range files {
		r := n.Try("sha256sum <$(findmnt -no TARGET /dev/mapper/luks-" + uuid + ")/ready")
		if r.Stdout != digest {
			t.Errorf("a file on a volume recorded ready was %s before the cut; now %s", digest, r)
		}
	}
	wantOneKey(t, n)
	if c.keyRecorded && n.KMS.Count("GenerateDataKey") != 1 {
		t.Error("another data key was made than the one that was recorded")
	}
	if !c.boots {
		return
	}
	synced := writeFiles(n, "/mnt", "/mnt1")
	n.PowerCut()
	n.Boot()
	n.AwaitVolumes()
	wantFiles(t, n, synced, "after a second power cut", "/mnt", "/mnt1")
}

// writeToReady puts a file onto each volume that is recorded ready, syncs it, and returns the digests by LUKS UUID.
func writeToReady(n *harness.Node) map[string]string {
	files := map[string]string{}
	for _, uuid := range readyVolumes(n) {
		files[uuid] = n.Sh(fmt.Sprintf(`set -e; volume=/dev/mapper/luks-%s
			mkdir -p /srv/$volume; findmnt $volume >/dev/null || mount $volume /srv/$volume
			cd "$(findmnt -no TARGET $volume)"; yes '%s' | head -c 300000 >ready; sync -f ready; sha256sum <ready`, uuid, marker))
	}
	return files
}

// readyVolumes returns the LUKS UUIDs of the volumes that are recorded ready.
func readyVolumes(n *harness.Node) []string {
	return strings.Fields(n.Try(`cd /var/lib/luks-kms-agent/volumes && grep -ls '"state": *"ready"' *.json | sed 's/.json$//'`).Stdout)
}

// wantOneKey checks that there is one key record, and that its key opens every volume.
func wantOneKey(t *testing.T, n *harness.Node) {
	t.Helper()
	keys := n.KeyRecords()
	if len(keys) != 1 {
		t.Errorf("%d key records, want 1", len(keys))
		return
	}
	for point, v := range volumes(t, n) {
		if r := n.TryWith([]byte(n.Unwrap(keys[0])), "cryptsetup open --test-passphrase --key-file=- "+v.Device); r.Code != 0 {
			t.Errorf("the data key does not open the volume of %s: %s", point, r)
		}
	}
}

// TestUnflushedWritesAreLost is about the harness: what was flushed stays, what was not may go, and the log of writes is whole.
func TestUnflushedWritesAreLost(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "", ssd1, ebs1)
	n.LoseUnflushed(1)
	n.Wake() // and the agent stays out of this story
	const disk = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0aaaaaaaaaaaaaaa1"
	const flushed, unflushed, pieces, piece = 16 << 20, 32 << 20, 256, 4096
	write := func(offset int, flags string) {
		n.Sh(fmt.Sprintf("yes | dd of=%s bs=%d count=%d iflag=fullblock oflag=direct,seek_bytes seek=%d conv=nocreat%s", disk, piece, pieces, offset, flags))
	}
	write(flushed, ",fsync")
	write(unflushed, "")
	n.PowerCut()
	cut := n.LastCut()
	if cut.Unflushed != pieces || cut.Lost == 0 || cut.Lost == pieces || len(cut.Unlogged) > 0 {
		t.Errorf("the cut: %+v, want %d unflushed pieces of which some are lost, and all in the log", cut, pieces)
	}
	image, err := os.Open(n.Image("ebs1"))
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	there := func(offset int64) (count int) {
		b := make([]byte, piece)
		for i := range int64(pieces) {
			if _, err := image.ReadAt(b, offset+i*piece); err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(b, bytes.Repeat([]byte("y\n"), piece/2)) {
				count++
			}
		}
		return count
	}
	if kept, of := there(unflushed), there(flushed); kept != pieces-cut.Lost || of != pieces {
		t.Errorf("%d unflushed pieces are there, and %d of %d flushed ones; the cut: %+v", kept, of, pieces, cut)
	}
}
