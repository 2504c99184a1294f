package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
)

// appear bounds the wait for a device; under emulation on a busy machine one can take many seconds.
const appear = time.Minute

// setup makes what the manifest says. Real EC2 disks cannot be had from QEMU, which can set an NVMe disk's serial but
// not its model, so each disk is exported with nvmet and connected over TCP on the loopback address: the kernel's own
// NVMe target reports whatever model and serial it is told.
func setup() error {
	manifest, err := readManifest()
	if err != nil {
		return err
	}
	if len(manifest.Tree) > 0 {
		tar := exec.Command("tar", "-C", "/", "-xzp")
		tar.Stdin = bytes.NewReader(manifest.Tree)
		if out, err := tar.CombinedOutput(); err != nil {
			return fmt.Errorf("tar: %s: %w", strings.TrimSpace(string(out)), err)
		}
	}
	for _, file := range manifest.Files {
		if err := put(file.Path, file.Mode, file.Data); err != nil {
			return err
		}
	}
	for _, d := range manifest.Disks {
		if d.Away {
			continue
		}
		if err := show(d); err != nil {
			return err
		}
	}
	return nil
}

func readManifest() (channel.Manifest, error) {
	var manifest channel.Manifest
	if err := modprobe("virtio_blk"); err != nil {
		return manifest, err
	}
	disk, err := virtioDisk(channel.ManifestSerial)
	if err != nil {
		return manifest, err
	}
	f, err := os.Open(disk)
	if err != nil {
		return manifest, err
	}
	defer f.Close()
	if err := json.NewDecoder(f).Decode(&manifest); err != nil {
		return manifest, fmt.Errorf("cannot read the manifest on %s: %w", disk, err)
	}
	return manifest, nil
}

// eachDisk does something about disks of the manifest as it is now: the host may have changed it since the boot.
func eachDisk(names []string, do func(channel.Disk) error) error {
	manifest, err := readManifest()
	if err != nil {
		return err
	}
	for _, name := range names {
		i := slices.IndexFunc(manifest.Disks, func(d channel.Disk) bool { return d.Virtio == name })
		if i < 0 {
			return fmt.Errorf("the manifest has no disk %s", name)
		}
		if err := do(manifest.Disks[i]); err != nil {
			return err
		}
	}
	return nil
}

// show makes one disk from its storage.
func show(d channel.Disk) error {
	storage, err := virtioDisk(d.Virtio)
	if err == nil && d.Table != "" {
		storage, err = mapTable(d, storage)
	}
	if err == nil && d.SectorSize != 0 {
		storage, err = resector(d, storage)
	}
	switch {
	case err != nil:
	case d.Loop != "":
		err = loop(d.Loop, storage)
	default:
		err = connect(d, storage)
	}
	if err != nil {
		return fmt.Errorf("cannot make disk %s: %w", d.Virtio, err)
	}
	return nil
}

// detach takes an NVMe disk away, whoever uses it, and with it what was made below it.
func detach(d channel.Disk) error {
	if err := disconnect(d); err != nil {
		return fmt.Errorf("cannot detach disk %s: %w", d.Virtio, err)
	}
	storage, err := virtioDisk(d.Virtio)
	if err != nil {
		return err
	}
	if d.SectorSize != 0 {
		err = runProgram("losetup", "--detach", loopOn(storage))
	}
	if d.Table != "" {
		err = errors.Join(err, runProgram("dmsetup", "remove", "--retry", d.Virtio))
	}
	return err
}

// reload gives a disk that has a table the one that the manifest says now, while it is in use.
func reload(d channel.Disk) error {
	storage, err := virtioDisk(d.Virtio)
	if err != nil {
		return err
	}
	// Neither frozen nor flushed: it is to fail under whoever uses it. udev need not know.
	return errors.Join(
		withTable(d, storage, "load"),
		runProgram("dmsetup", "suspend", "--nolockfs", "--noflush", d.Virtio),
		runProgram("dmsetup", "resume", "--noudevsync", d.Virtio),
	)
}

// withTable lets dmsetup do something with a disk's table.
func withTable(d channel.Disk, storage, command string) error {
	cmd := exec.Command("dmsetup", command, d.Virtio)
	cmd.Stdin = strings.NewReader(strings.ReplaceAll(d.Table, channel.Storage, storage) + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("dmsetup %s: %s: %w", command, strings.TrimSpace(string(out)), err)
	}
	return nil
}

// mapTable puts device-mapper on a disk and returns its node.
func mapTable(d channel.Disk, storage string) (string, error) {
	if err := modprobe("dm_mod", "dm_flakey", "dm_delay"); err != nil {
		return "", err
	}
	if err := withTable(d, storage, "create"); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks("/dev/mapper/" + d.Virtio)
}

// resector shows a disk with another logical sector size, through a loop device.
func resector(d channel.Disk, storage string) (string, error) {
	if err := modprobe("loop"); err != nil {
		return "", err
	}
	err := runProgram("losetup", "--find", "--sector-size", strconv.Itoa(d.SectorSize), storage)
	return loopOn(storage), err
}

// loopOn returns the loop device on a disk, "" for none.
func loopOn(storage string) string {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == storage {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(file)))
		}
	}
	return ""
}

// runProgram runs a program; what it said is part of the error.
func runProgram(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %s: %w", name, strings.TrimSpace(string(out)), err)
	}
	return nil
}

func modprobe(modules ...string) error {
	out, err := exec.Command("modprobe", append([]string{"-a"}, modules...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("cannot load %s: %s: %w", strings.Join(modules, " "), strings.TrimSpace(string(out)), err)
	}
	return nil
}

// virtioDisk returns the device node of the virtio disk with a serial.
func virtioDisk(serial string) (string, error) {
	return await("virtio disk "+serial, func() (string, error) {
		names, err := filepath.Glob("/sys/block/vd*/serial")
		for _, name := range names {
			b, err := os.ReadFile(name)
			device := "/dev/" + filepath.Base(filepath.Dir(name))
			if err == nil && strings.Trim(string(b), "\x00\n ") == serial {
				if _, err := os.Stat(device); err == nil {
					return device, nil
				}
			}
		}
		return "", err
	})
}

// await asks until find has something.
func await(what string, find func() (string, error)) (string, error) {
	for deadline := time.Now().Add(appear); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		found, err := find()
		if err != nil || found != "" {
			return found, err
		}
	}
	return "", fmt.Errorf("%s did not appear within %v", what, appear)
}

func loop(device, storage string) error {
	if err := modprobe("loop"); err != nil {
		return err
	}
	return runProgram("losetup", device, storage)
}

const (
	nvmet = "/sys/kernel/config/nvmet"
	port  = nvmet + "/ports/1"
	// hostID and hostNQN name the one host that connects, in the form that the NVMe specification gives for a uuid. Newer kernels want both
	// where one of them is given.
	hostID  = "5709f1c0-d3a8-4d0f-a9d6-fe1a6a7f0b11"
	hostNQN = "nqn.2014-08.org.nvmexpress:uuid:" + hostID
)

// startTarget makes the kernel's NVMe target, once in a boot.
func startTarget() error {
	if _, err := os.Stat(port); err == nil {
		return nil
	}
	if err := modprobe("configfs", "nvmet", "nvmet_tcp", "nvme_tcp"); err != nil {
		return err
	}
	err := syscall.Mount("configfs", "/sys/kernel/config", "configfs", 0, "")
	if err != nil && !errors.Is(err, syscall.EBUSY) {
		return fmt.Errorf("cannot mount configfs: %w", err)
	}
	if err := os.Mkdir(port, 0o755); err != nil {
		return err
	}
	return writeAll(port, "addr_trtype", "tcp", "addr_adrfam", "ipv4", "addr_traddr", "127.0.0.1", "addr_trsvcid", "4420")
}

// places are where nvmet keeps a disk: its subsystem, the one namespace in it, and the link by which the port offers it.
func places(d channel.Disk) (nqn, subsystem, namespace, offer string) {
	nqn = "nqn.2014-08.org.luks-kms-agent:" + d.Virtio
	subsystem = filepath.Join(nvmet, "subsystems", nqn)
	return nqn, subsystem, filepath.Join(subsystem, "namespaces", "1"), filepath.Join(port, "subsystems", nqn)
}

// connect exports storage and connects to it.
func connect(d channel.Disk, storage string) error {
	if err := startTarget(); err != nil {
		return err
	}
	nqn, subsystem, namespace, offer := places(d)
	if err := errors.Join(os.Mkdir(subsystem, 0o755), os.Mkdir(namespace, 0o755)); err != nil {
		return err
	}
	if err := writeAll(subsystem, "attr_allow_any_host", "1", "attr_model", d.Model, "attr_serial", d.Serial); err != nil {
		return err
	}
	// The same identifier at every boot and in every order, as a real namespace has.
	digest := sha256.Sum256([]byte(d.Serial))
	uuid := fmt.Sprintf("5709f1c0-d3a8-4d0f-a9d6-%012x", digest[:6])
	if err := writeAll(namespace, "device_path", storage, "device_uuid", uuid, "enable", "1"); err != nil {
		return err
	}
	if err := os.Symlink(subsystem, offer); err != nil {
		return err
	}
	fabrics, err := os.OpenFile("/dev/nvme-fabrics", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer fabrics.Close()
	_, err = fmt.Fprintf(fabrics, "transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=%s,hostnqn=%s,hostid=%s,nr_io_queues=1,ctrl_loss_tmo=-1", nqn, hostNQN, hostID)
	if err != nil {
		return fmt.Errorf("cannot connect: %w", err)
	}
	_, err = await("NVMe disk "+d.Serial, func() (string, error) { return fileWith("/sys/block/nvme*n1/device/serial", d.Serial) })
	return err
}

// disconnect undoes connect.
func disconnect(d channel.Disk) error {
	controller, err := fileWith("/sys/class/nvme/nvme*/serial", d.Serial)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(controller), "delete_controller"), []byte("1"), 0); err != nil {
		return err
	}
	_, subsystem, namespace, offer := places(d)
	return errors.Join(os.Remove(offer), writeAll(namespace, "enable", "0"), os.Remove(namespace), os.Remove(subsystem))
}

// fileWith returns the file among those of a pattern that holds a serial, "" for none.
func fileWith(pattern, serial string) (string, error) {
	files, err := filepath.Glob(pattern)
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == serial {
			return file, nil
		}
	}
	return "", err
}

// writeAll writes attributes below dir: a name, its value, a name, …
func writeAll(dir string, pairs ...string) error {
	for i := 0; i < len(pairs); i += 2 {
		if err := os.WriteFile(filepath.Join(dir, pairs[i]), []byte(pairs[i+1]), 0); err != nil {
			return err
		}
	}
	return nil
}

// disguise mounts a file with a model over the ones that sysfs shows of the QEMU NVMe disk that / is on.
func disguise(model string) error {
	const shown = "/run/boot-disk-model"
	if err := put(shown, 0o444, fmt.Appendf(nil, "%-40s\n", model)); err != nil {
		return err
	}
	// The controller's and, with multipath, the subsystem's.
	models, err := filepath.Glob("/sys/class/nvme*/nvme*/model")
	if err != nil {
		return err
	}
	disguised := 0
	for _, link := range models {
		attribute, err := filepath.EvalSymlinks(link)
		if err != nil {
			return err
		}
		if b, err := os.ReadFile(attribute); err != nil || !strings.HasPrefix(string(b), "QEMU NVMe") {
			continue
		}
		if err := syscall.Mount(shown, attribute, "", syscall.MS_BIND, ""); err != nil {
			return fmt.Errorf("cannot mount over %s: %w", attribute, err)
		}
		disguised++
	}
	if disguised == 0 {
		return errors.New("found no QEMU NVMe disk")
	}
	return nil
}

// network gives the one network card its address.
func network(address string) error {
	if err := modprobe("virtio_net"); err != nil {
		return err
	}
	_, err := await("eth0", func() (string, error) {
		_, err := os.Stat("/sys/class/net/eth0")
		if errors.Is(err, os.ErrNotExist) {
			return "", nil
		}
		return "eth0", err
	})
	if err != nil {
		return err
	}
	for _, arguments := range [][]string{{"address", "add", address, "dev", "eth0"}, {"link", "set", "eth0", "up"}} {
		if out, err := exec.Command("ip", arguments...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %s: %w", strings.Join(arguments, " "), strings.TrimSpace(string(out)), err)
		}
	}
	return nil
}
