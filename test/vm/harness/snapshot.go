package harness

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
)

const (
	// snapshotArguments are the guest's kernel's in a machine of a snapshot. The boot ends with logins: multi-user.target wants the
	// agent, which starts after the resume.
	snapshotArguments = " systemd.unit=logins.service story.snapshot"
	// slots is how many data disks a resumed node can have: the machine that is resumed is the one that was saved.
	slots = 8
)

// snapshot is a booted guest that the agent has not run in.
type snapshot struct {
	boot  string // its boot disk, qcow2
	state string // of the machine, in QEMU's format
}

// takeSnapshot boots a guest without data disks and files, and saves it. QEMU cannot save its NVMe disk, so the boot disk is on virtio.
func (a *Assets) takeSnapshot() (s snapshot, err error) {
	dir := filepath.Join(a.dir, "snapshot")
	logs := filepath.Join(a.Logs, "snapshot")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.RemoveAll(logs), os.MkdirAll(logs, 0o755)); err != nil {
		return s, err
	}
	defer func() {
		if err == nil {
			err = os.RemoveAll(logs)
		} else {
			err = fmt.Errorf("cannot take a snapshot of a booted guest (its console: %s): %w", logs, err)
		}
	}()
	s = snapshot{boot: filepath.Join(dir, "boot.qcow2"), state: filepath.Join(dir, "state")}
	manifest, err := encodeManifest(channel.Manifest{})
	if err != nil {
		return s, err
	}
	manifestImage := filepath.Join(dir, "manifest.img")
	if err := errors.Join(createOverlay("raw", a.Root, s.boot), os.WriteFile(manifestImage, manifest, 0o600)); err != nil {
		return s, err
	}
	initrd := filepath.Join(dir, "initrd")
	if err := a.makeInitramfs(initrd); err != nil {
		return s, err
	}
	h := hardware{
		initrd: initrd,
		socket: filepath.Join(dir, "channel"), monitor: filepath.Join(dir, "monitor"), snapshot: true,
		console: filepath.Join(logs, "console.log"), said: filepath.Join(logs, "qemu.log"), boot: s.boot,
		imds: "127.0.0.1:1", kms: "127.0.0.1:1", kmsTLS: "127.0.0.1:1", // nothing in there asks them
		drives: append([]drive{{serial: channel.ManifestSerial, image: manifestImage}}, emptySlots(0)...),
	}
	m, err := a.start(h)
	if err != nil {
		return s, err
	}
	defer m.kill()
	// Logins, and nothing else that is under way; and what disks are made with, which takes every copy seconds.
	const ready = `modprobe -a nvmet_tcp nvme_tcp loop
		until systemctl -q is-active logins.service && test -z "$(systemctl list-jobs --no-legend)"; do sleep 1; done
		udevadm settle; systemctl --failed --no-legend; sync`
	response, err := m.ask(channel.Request{Op: channel.Exec, Command: ready, Timeout: 8 * time.Minute}, 9*time.Minute)
	if err != nil {
		return s, err
	}
	if failed := strings.TrimSpace(string(response.Stdout)); response.Code != 0 || failed != "" {
		return s, fmt.Errorf("it did not boot well (%d): %s%s", response.Code, failed, response.Stderr)
	}
	return s, save(h.monitor, s.state)
}

// virtioModules are what the kernel needs for a boot disk on virtio, each after those that it uses.
var virtioModules = []string{"virtio/virtio_ring", "virtio/virtio", "virtio/virtio_pci_legacy_dev", "virtio/virtio_pci_modern_dev", "virtio/virtio_pci", "block/virtio_blk"}

// makeInitramfs makes an archive of the guest program, as the first process, and the modules that it loads.
func (a *Assets) makeInitramfs(file string) error {
	release, err := a.debugfs("ls -p /lib/modules")
	if err != nil {
		return err
	}
	// /INODE/MODE/UID/GID/NAME/SIZE/
	var kernel string
	for line := range strings.Lines(release) {
		if fields := strings.Split(line, "/"); len(fields) > 5 && !strings.HasPrefix(fields[5], ".") {
			kernel = fields[5]
		}
	}
	guest, err := os.ReadFile(a.Guest)
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	addToArchive(&archive, "init", 0o100755, guest)
	addToArchive(&archive, "modules", 0o040755, nil)
	for i, module := range virtioModules {
		dumped := file + ".module"
		if _, err := a.debugfs("dump /lib/modules/" + kernel + "/kernel/drivers/" + module + ".ko " + dumped); err != nil {
			return err
		}
		b, err := os.ReadFile(dumped)
		if err != nil {
			return err
		}
		addToArchive(&archive, fmt.Sprintf("modules/%d", i), 0o100644, b)
	}
	addToArchive(&archive, "TRAILER!!!", 0, nil)
	return os.WriteFile(file, archive.Bytes(), 0o600)
}

// addToArchive writes an entry as the kernel reads it: cpio's format "newc".
func addToArchive(archive *bytes.Buffer, name string, mode int, content []byte) {
	align := func() {
		for archive.Len()%4 != 0 {
			archive.WriteByte(0)
		}
	}
	// Magic, inode, mode, uid, gid, links, time, size, four device numbers, length of the name with its NUL, checksum.
	fmt.Fprintf(archive, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", archive.Len(), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	archive.WriteString(name + "\x00")
	align()
	archive.Write(content)
	align()
}

// debugfs reads from the boot disk.
func (a *Assets) debugfs(request string) (string, error) {
	found, err := lookPath("debugfs")
	if err != nil {
		return "", err
	}
	out, err := exec.Command(found, "-R", request, fmt.Sprintf("%s?offset=%d", a.Root, partitionOffset)).Output()
	if err != nil {
		return "", fmt.Errorf("debugfs %q: %w", request, err)
	}
	return string(out), nil
}

// emptySlots returns the slots that a machine with so many data disks does not use.
func emptySlots(used int) []drive {
	var drives []drive
	for i := used; i < slots; i++ {
		drives = append(drives, drive{serial: fmt.Sprintf("slot%d", i)})
	}
	return drives
}

// save writes the state of a machine to a file and ends it, by its QMP monitor.
func save(monitor, state string) error {
	conn, err := net.Dial("unix", monitor)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return err
	}
	q := qmp{json.NewEncoder(conn), json.NewDecoder(conn)}
	var greeting struct{ QMP json.RawMessage }
	if err := q.answers.Decode(&greeting); err != nil {
		return err
	}
	if err := q.do("qmp_capabilities", nil, nil); err != nil {
		return err
	}
	if err := q.do("migrate-set-parameters", map[string]any{"max-bandwidth": 10 << 30}, nil); err != nil {
		return err
	}
	if err := q.do("migrate", map[string]any{"uri": "exec:cat >" + state}, nil); err != nil {
		return err
	}
	for {
		var migration struct {
			Status    string
			ErrorDesc string `json:"error-desc"`
		}
		if err := q.do("query-migrate", nil, &migration); err != nil {
			return err
		}
		switch migration.Status {
		case "completed":
			return q.do("quit", nil, nil)
		case "failed", "cancelled":
			return fmt.Errorf("cannot save the machine: %s %s", migration.Status, migration.ErrorDesc)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// qmp is a connection to QEMU's monitor.
type qmp struct {
	commands *json.Encoder
	answers  *json.Decoder
}

// do carries out one command; out may be nil.
func (q qmp) do(command string, arguments map[string]any, out any) error {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := q.commands.Encode(request); err != nil {
		return err
	}
	for {
		var answer struct {
			Event  string
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		switch err := q.answers.Decode(&answer); {
		case err != nil:
			return fmt.Errorf("cannot let QEMU %s: %w", command, err)
		case answer.Error != nil:
			return fmt.Errorf("cannot let QEMU %s: %s", command, answer.Error.Desc)
		case answer.Event != "":
		case out != nil:
			return json.Unmarshal(answer.Return, out)
		default:
			return nil
		}
	}
}

// Resume is Boot for a story that is about something else than a boot, and takes a tenth of the time: the node is a copy of
// a guest that was booted once for all stories. So its boot disk is on virtio and does not look like an EBS volume, nothing was ordered
// against the agent as a boot does it, and its boot id and uptime are those of every copy. It has a new boot disk: what was
// written to an earlier one is gone. Every later Boot is an ordinary one, from that disk.
func (n *Node) Resume() {
	n.tb.Helper()
	n.Wake()
	n.StartServices()
}

// Wake is Resume up to where the services of the node would start.
func (n *Node) Wake() {
	n.tb.Helper()
	if len(n.disks) > slots {
		n.tb.Fatalf("%d disks, and the machine of the snapshot has %d", len(n.disks), slots)
	}
	s, err := n.assets.snapshot()
	if err != nil {
		n.tb.Fatalf("%v", err)
	}
	if err := errors.Join(os.Remove(n.overlay()), createOverlay("qcow2", s.boot, n.overlay())); err != nil {
		n.tb.Fatalf("cannot create the boot disk: %v", err)
	}
	n.launch(hardware{snapshot: true, incoming: s.state, drives: emptySlots(len(n.disks))})
	n.ShWith(randomSeed(), fmt.Sprintf("/usr/local/lib/story/guest resume %d", time.Now().UnixNano()))
}

// StartServices starts what a boot starts that has come so far as a node that woke.
func (n *Node) StartServices() {
	n.tb.Helper()
	n.Sh("systemctl start --no-block multi-user.target")
}

// randomSeed returns what makes a copy's random numbers its own.
func randomSeed() []byte {
	seed := make([]byte, 32)
	_, _ = rand.Read(seed) // never fails
	return seed
}
