package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
)

// initramfs is the first process of a machine whose boot disk is on virtio, for which the kernel has modules only: it loads them
// from /modules, in the order of their names, and goes on with the boot disk's init.
func initramfs() error {
	for _, where := range []string{"/dev", "/sys", "/root"} {
		if err := os.MkdirAll(where, 0o755); err != nil {
			return err
		}
	}
	if err := syscall.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("cannot mount /sys: %w", err)
	}
	if err := syscall.Mount("dev", "/dev", "devtmpfs", 0, ""); err != nil {
		return fmt.Errorf("cannot mount /dev: %w", err)
	}
	modules, err := filepath.Glob("/modules/*")
	if err != nil {
		return err
	}
	for _, module := range modules {
		if err := load(module); err != nil {
			return fmt.Errorf("cannot load %s: %w", module, err)
		}
	}
	disk, err := virtioDisk(channel.BootSerial)
	if err != nil {
		return err
	}
	partition, err := await("the partition of the boot disk", func() (string, error) {
		_, err := os.Stat(disk + "1")
		if os.IsNotExist(err) {
			return "", nil
		}
		return disk + "1", err
	})
	if err != nil {
		return err
	}
	if err := syscall.Mount(partition, "/root", "ext4", 0, ""); err != nil {
		return fmt.Errorf("cannot mount %s: %w", partition, err)
	}
	if err := syscall.Chdir("/root"); err != nil {
		return err
	}
	for _, where := range []string{"sys", "dev"} {
		if err := syscall.Mount("/"+where, where, "", syscall.MS_MOVE, ""); err != nil {
			return fmt.Errorf("cannot move /%s: %w", where, err)
		}
	}
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot make %s the root: %w", partition, err)
	}
	if err := syscall.Chroot("."); err != nil {
		return err
	}
	return syscall.Exec("/sbin/init", []string{"/sbin/init"}, os.Environ())
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}
