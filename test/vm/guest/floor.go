package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/anatol/devmapper.go"
	luksgo "github.com/anatol/luks.go"
	"golang.org/x/sys/unix"
)

// floor opens and mounts volumes and does nothing that could be left out: it reads the key slot, derives, merges, checks
// the digest, makes the mapping and mounts. No check of the header, no record, no KMS, no wait for udev, no systemd. Each argument is
// DEVICE=MOUNTPOINT; the passphrase is standard input.
func floor(args []string) error {
	passphrase, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	return all(args, func(device, point string) error {
		d, err := luksgo.Open(device)
		if err != nil {
			return err
		}
		defer d.Close()
		v, err := d.UnsealVolume(0, passphrase)
		if err != nil {
			return err
		}
		name := "floor" + strings.ReplaceAll(point, "/", "-")
		if err := v.SetupMapper(name); err != nil {
			return err
		}
		info, err := devmapper.InfoByName(name)
		if err != nil {
			return err
		}
		return unix.Mount(fmt.Sprintf("/dev/dm-%d", unix.Minor(info.DevNo)), point, "ext4", 0, "")
	})
}

// floorFormat writes and flushes as many bytes as a first boot has to: a header with its key slot, and what mkfs writes. Each argument
// is DEVICE=BYTES, BYTES being what mkfs writes.
func floorFormat(args []string) error {
	const header = 2*16<<10 + 256000 // both copies, and the slot
	return all(args, func(device, amount string) error {
		n, err := strconv.Atoi(amount)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(device, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(make([]byte, header))
		if err == nil {
			err = f.Sync()
		}
		if err == nil {
			_, err = f.WriteAt(make([]byte, n), 16<<20)
		}
		return errors.Join(err, f.Sync(), f.Close())
	})
}

// all does the same for all arguments LEFT=RIGHT at once.
func all(args []string, do func(left, right string) error) error {
	errs := make([]error, len(args))
	var wg sync.WaitGroup
	for i, arg := range args {
		wg.Go(func() {
			left, right, ok := strings.Cut(arg, "=")
			if !ok {
				errs[i] = fmt.Errorf("%q is not LEFT=RIGHT", arg)
				return
			}
			if err := do(left, right); err != nil {
				errs[i] = fmt.Errorf("%s: %w", left, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
