package luks

import (
	"encoding/hex"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"github.com/anatol/devmapper.go"
	luksgo "github.com/anatol/luks.go"
	"golang.org/x/sys/unix"
)

const sector = 512 // device-mapper's unit, bytes

// createMapping makes the mapping of a volume and loads its table; a resume makes it the one in use. luks.go's SetupMapper does both, but
// there the volume key is text, of which luks.go and devmapper.go leave three copies in memory. Here it stands in one buffer that is
// wiped, and the kernel is told to wipe its own.
func createMapping(v *luksgo.Volume, name string) error {
	// As cryptsetup names it (dm_prepare_uuid in its lib/libdevmapper.c).
	uuid := fmt.Sprintf("CRYPT-%s-%s-%s", v.LuksType, strings.ReplaceAll(v.UUID, "-", ""), name)
	if err := devmapper.Create(name, uuid); err != nil {
		return err
	}
	err := loadTable(v, name)
	if err != nil {
		_ = devmapper.Remove(name) // the first error is the one that matters
	}
	return err
}

// loadTable gives a mapping its table (DM_TABLE_LOAD, include/uapi/linux/dm-ioctl.h).
func loadTable(v *luksgo.Volume, name string) error {
	request := tableRequest(v, name)
	defer clear(request)
	control, err := os.Open(controlNode)
	if err != nil {
		return err
	}
	defer control.Close()
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), unix.DM_TABLE_LOAD, uintptr(unsafe.Pointer(unsafe.SliceData(request))))
	runtime.KeepAlive(request)
	if errno != 0 {
		return os.NewSyscallError("ioctl(DM_TABLE_LOAD)", errno)
	}
	return nil
}

// tableRequest is struct dm_ioctl, one struct dm_target_spec, and the parameters of dm-crypt with a NUL
// (Documentation/admin-guide/device-mapper/dm-crypt.rst). It holds the volume key; the caller wipes it.
func tableRequest(v *luksgo.Volume, name string) []byte {
	options := make([]string, 0, len(v.Flags)+1)
	for _, f := range v.Flags {
		// dm-crypt's names of the flags are LUKS's, with other dashes.
		options = append(options, strings.ReplaceAll(f, "-", "_"))
	}
	if v.StorageSectorSize != sector {
		options = append(options, "sector_size:"+strconv.FormatUint(v.StorageSectorSize, 10))
	}
	key := volumeKey(v)
	before := v.StorageEncryption + " "
	after := fmt.Sprintf(" %d %s %d %d", v.StorageIvTweak, v.BackingDevice, v.StorageOffset/sector, len(options))
	if len(options) > 0 {
		after += " " + strings.Join(options, " ")
	}

	const head = unix.SizeofDmIoctl + unix.SizeofDmTargetSpec
	length := head + len(before) + hex.EncodedLen(len(key)) + len(after) + 1
	length = (length + 7) &^ 7
	request := make([]byte, length)

	ioctl := (*unix.DmIoctl)(unsafe.Pointer(&request[0]))
	ioctl.Version = [3]uint32{4, 0, 0}
	ioctl.Data_size, ioctl.Data_start = uint32(length), unix.SizeofDmIoctl
	ioctl.Target_count = 1
	ioctl.Flags = unix.DM_SECURE_DATA_FLAG
	copy(ioctl.Name[:], name)
	spec := (*unix.DmTargetSpec)(unsafe.Pointer(&request[unix.SizeofDmIoctl]))
	spec.Length = v.StorageSize / sector
	spec.Next = uint32(length - unix.SizeofDmIoctl)
	copy(spec.Target_type[:], "crypt")

	text := request[head:]
	text = text[copy(text, before):]
	text = text[hex.Encode(text, key):]
	copy(text, after)
	return request
}
