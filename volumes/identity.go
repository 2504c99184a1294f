package volumes

import (
	"os"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Models of EC2's NVMe controllers (EC2 user guide, "Amazon EBS volumes and NVMe" and "SSD instance
// store volumes").
const (
	modelInstanceStore = "Amazon EC2 NVMe Instance Storage"
	modelEBS           = "Amazon Elastic Block Store"
)

// classify tells EC2's volumes by NVMe model, or on Xen by name and IMDS.
func classify(d *Device, ephemeral []string) {
	switch {
	case strings.HasPrefix(d.Name, "nvme") && d.Model == modelInstanceStore:
		d.Class, d.Identity = ClassInstanceStore, d.Serial
	case strings.HasPrefix(d.Name, "nvme") && d.Model == modelEBS:
		d.Class, d.Identity = ClassEBS, volumeID(d.Serial)
	case strings.HasPrefix(d.Name, "xvd"):
		// Xen tells nothing about a disk: what IMDS does not call ephemeral is EBS, and the mapping's
		// name differs from the kernel's in the prefix only.
		d.Class, d.Identity = ClassEBS, d.Name
		for _, e := range ephemeral {
			if name := strings.TrimPrefix(e, "/dev/"); name != "" && unitOf(name) == unitOf(d.Name) {
				d.Class, d.Identity = ClassInstanceStore, name
			}
		}
	}
}

// volumeID puts back the dash that EBS leaves out of the serial.
func volumeID(serial string) string {
	if rest, ok := strings.CutPrefix(serial, "vol"); ok && !strings.HasPrefix(rest, "-") {
		return "vol-" + rest
	}
	return serial
}

// unitOf is what sdb, xvdb and hdb have in common.
func unitOf(name string) string {
	for _, prefix := range []string{"xvd", "sd", "hd"} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			return rest
		}
	}
	return name
}

// Identify (NVMe base specification, "Identify command"): opcode 06h, 4096 bytes. Those of Identify Controller (CNS 01h)
// from 3072 are the vendor's; EC2 keeps the mapping's name in the first 32. Byte 30 of Identify Namespace (CNS 00h) is
// NMIC, whose bit 0 says that more than one controller may be attached to the namespace.
const (
	identifyOpcode     = 0x06
	identifyNamespace  = 0x00
	identifyController = 0x01
	identifySize       = 4096
	vendorOffset       = 3072
	vendorLength       = 32
	nmicOffset         = 30
	nmicShared         = 1 << 0

	nvmeAdminCmd = 0xc0484e41 // NVME_IOCTL_ADMIN_CMD, _IOWR('N', 0x41, 72 bytes), linux/nvme_ioctl.h
	nvmeID       = 0x4e40     // NVME_IOCTL_ID, _IO('N', 0x40): the namespace's number
)

// adminCmd is struct nvme_passthru_cmd of linux/nvme_ioctl.h.
type adminCmd struct {
	opcode, flags             uint8
	_                         uint16
	nsid, cdw2, cdw3          uint32
	metadata, addr            uint64
	metadataLength, length    uint32
	cdw10, cdw11, cdw12       uint32
	cdw13, cdw14, cdw15       uint32
	timeoutMilliseconds, done uint32
}

// askNVMe asks a disk's controller for what only it tells. Both facts are hints, and need CAP_SYS_ADMIN: whatever fails
// leaves name "" and shared false.
func askNVMe(path string) (name string, shared bool) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", false
	}
	defer f.Close()
	name = parseMappingName(identify(f, identifyController, 0))
	if number, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), nvmeID, 0); errno == 0 {
		shared = parseShared(identify(f, identifyNamespace, uint32(number)))
	}
	return name, shared
}

// identify returns the answer to one Identify command, or nil.
func identify(f *os.File, cns, namespace uint32) []byte {
	data := make([]byte, identifySize)
	var pin runtime.Pinner // the command carries the address as a number, which keeps nothing alive
	pin.Pin(&data[0])
	defer pin.Unpin()
	cmd := adminCmd{
		opcode: identifyOpcode, nsid: namespace, cdw10: cns, timeoutMilliseconds: 2000,
		addr: uint64(uintptr(unsafe.Pointer(&data[0]))), length: identifySize,
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), nvmeAdminCmd, uintptr(unsafe.Pointer(&cmd))); errno != 0 {
		return nil
	}
	return data
}

// parseShared reads out of Identify Namespace data whether several controllers may be attached.
func parseShared(identify []byte) bool {
	return len(identify) > nmicOffset && identify[nmicOffset]&nmicShared != 0
}

// parseMappingName reads the name out of Identify Controller data: padded with blanks or zeros, with or
// without "/dev/", and for instance store as "ephemeral0:sdb" or "ephemeral0:none".
func parseMappingName(identify []byte) string {
	if len(identify) < vendorOffset+vendorLength {
		return ""
	}
	text, _, _ := strings.Cut(string(identify[vendorOffset:vendorOffset+vendorLength]), "\x00")
	name := strings.TrimSpace(text)
	if virtual, mapped, ok := strings.Cut(name, ":"); ok && strings.HasPrefix(virtual, "ephemeral") {
		name = mapped
	}
	name = strings.TrimPrefix(name, "/dev/")
	if name == "none" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return "" // another vendor's bytes: print nothing strange
	}
	return name
}
