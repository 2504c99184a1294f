package volumes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// EverMounted tells whether an xfs or ext4 filesystem was mounted for writing since it was made, so that it may hold somebody's data.
// One whose mkfs was cut was not, nor was swap, which keeps nothing. What cannot be told is an error or true.
func EverMounted(path, fstype string) (bool, error) {
	if fstype == "swap" {
		return false, nil // what is in it is lost at every boot
	}
	fail := func(err error) (bool, error) {
		return false, fmt.Errorf("cannot tell whether %s was in use: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	look := map[string]func(io.ReaderAt) (bool, error){"ext4": ext4Mounted, "xfs": xfsMounted}[fstype]
	if look == nil {
		return true, nil
	}
	mounted, err := look(f)
	if err != nil {
		return fail(err)
	}
	return mounted, nil
}

// ext4Mounted: the kernel writes the time and the number of mounts before a mount succeeds (s_mtime and s_mnt_count, fs/ext4/ext4.h).
func ext4Mounted(r io.ReaderAt) (bool, error) {
	super := make([]byte, 64)
	if _, err := r.ReadAt(super, 1024); err != nil {
		return false, err
	}
	le := binary.LittleEndian
	return le.Uint32(super[44:]) != 0 || le.Uint16(super[52:]) != 0, nil
}

// xfsMounted: mkfs writes one record at the start of the log and zeros behind it, and sb_inprogress until it is done. A mount for
// writing puts blocks of its own right behind that record, before it succeeds (xlog_clear_stale_blocks, fs/xfs/xfs_log_recover.c;
// offsets in the superblock: struct xfs_dsb, fs/xfs/libxfs/xfs_format.h; of the record: struct xlog_rec_header, xfs_log_format.h).
func xfsMounted(r io.ReaderAt) (bool, error) {
	super := make([]byte, 128)
	if _, err := r.ReadAt(super, 0); err != nil {
		return false, err
	}
	be := binary.BigEndian
	blockSize, logStart := uint64(be.Uint32(super[4:])), be.Uint64(super[48:])
	groupBlocks, groupLog := uint64(be.Uint32(super[84:])), super[124]
	if super[126] == 1 {
		return false, nil
	}
	if logStart == 0 || groupLog >= 32 || blockSize == 0 || blockSize > 64<<10 {
		return false, errors.New("its superblock is none that mkfs.xfs makes")
	}
	at := ((logStart>>groupLog)*groupBlocks + logStart&(1<<groupLog-1)) * blockSize
	const record, behind = 16 << 10, 256 << 10 // more than mkfs's record takes; less than a mount writes
	log := make([]byte, record+behind)
	if _, err := r.ReadAt(log, int64(at)); err != nil {
		return false, err
	}
	if len(bytes.Trim(log, "\x00")) == 0 {
		return false, nil // mkfs was cut before the log was on the disk
	}
	const magic, firstCycle = 0xfeedbabe, 1
	made := be.Uint32(log) == magic && be.Uint32(log[4:]) == firstCycle && !bytes.Contains(log[512:record], be.AppendUint32(nil, magic))
	return !made || len(bytes.Trim(log[record:], "\x00")) != 0, nil
}
