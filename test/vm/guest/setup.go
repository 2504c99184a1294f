package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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
	if err := modprobe("virtio_blk"); err != nil {
		return err
	}
	disk, err := virtioDisk(channel.ManifestSerial)
	if err != nil {
		return err
	}
	f, err := os.Open(disk)
	if err != nil {
		return err
	}
	defer f.Close()
	var manifest channel.Manifest
	if err := json.NewDecoder(f).Decode(&manifest); err != nil {
		return fmt.Errorf("cannot read the manifest on %s: %w", disk, err)
	}
	for _, file := range manifest.Files {
		if err := put(file.Path, file.Mode, file.Data); err != nil {
			return err
		}
	}
	var target target
	for _, d := range manifest.Disks {
		storage, err := virtioDisk(d.Virtio)
		if err != nil {
			return err
		}
		if d.Loop != "" {
			err = loop(d.Loop, storage)
		} else {
			err = target.connect(d, storage)
		}
		if err != nil {
			return fmt.Errorf("cannot make disk %s: %w", d.Virtio, err)
		}
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
	out, err := exec.Command("losetup", device, storage).CombinedOutput()
	if err != nil {
		return fmt.Errorf("losetup: %s: %w", strings.TrimSpace(string(out)), err)
	}
	return nil
}

// target is the kernel's NVMe target; its zero value is ready.
type target struct{ up bool }

const (
	nvmet = "/sys/kernel/config/nvmet"
	port  = nvmet + "/ports/1"
	// hostNQN names the one host that connects, in the form that the NVMe specification gives for a uuid.
	hostNQN = "nqn.2014-08.org.nvmexpress:uuid:5709f1c0-d3a8-4d0f-a9d6-fe1a6a7f0b11"
)

func (t *target) start() error {
	if t.up {
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
	t.up = true
	return writeAll(port, "addr_trtype", "tcp", "addr_adrfam", "ipv4", "addr_traddr", "127.0.0.1", "addr_trsvcid", "4420")
}

// connect exports storage and connects to it.
func (t *target) connect(d channel.Disk, storage string) error {
	if err := t.start(); err != nil {
		return err
	}
	nqn := "nqn.2014-08.org.luks-kms-agent:" + d.Virtio
	subsystem := filepath.Join(nvmet, "subsystems", nqn)
	namespace := filepath.Join(subsystem, "namespaces", "1")
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
	if err := os.Symlink(subsystem, filepath.Join(port, "subsystems", nqn)); err != nil {
		return err
	}
	fabrics, err := os.OpenFile("/dev/nvme-fabrics", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer fabrics.Close()
	_, err = fmt.Fprintf(fabrics, "transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=%s,hostnqn=%s,nr_io_queues=1,ctrl_loss_tmo=-1", nqn, hostNQN)
	if err != nil {
		return fmt.Errorf("cannot connect: %w", err)
	}
	_, err = await("NVMe disk "+d.Serial, func() (string, error) {
		serials, err := filepath.Glob("/sys/block/nvme*n1/device/serial")
		for _, name := range serials {
			if b, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(b)) == d.Serial {
				return name, nil
			}
		}
		return "", err
	})
	return err
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
