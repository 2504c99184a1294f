package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

// memory prints all memory of a process that it may read and ever used, page after page.
func memory(pid string) error {
	maps, err := os.ReadFile("/proc/" + pid + "/maps")
	if err != nil {
		return err
	}
	mem, err := os.Open("/proc/" + pid + "/mem")
	if err != nil {
		return err
	}
	defer mem.Close()
	pagemap, err := os.Open("/proc/" + pid + "/pagemap")
	if err != nil {
		return err
	}
	defer pagemap.Close()
	page := int64(os.Getpagesize())
	content, entry := make([]byte, page), make([]byte, 8)
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if strings.Contains(line, "[v") {
			continue // vvar, vdso, vsyscall: the kernel's
		}
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
		if !strings.HasPrefix(mode, "r") {
			continue
		}
		for at := from; at < to; at += page {
			if _, err := pagemap.ReadAt(entry, at/page*8); err != nil {
				return err
			}
			// Present, or in swap (Documentation/admin-guide/mm/pagemap.rst).
			if binary.NativeEndian.Uint64(entry)>>62 == 0 {
				continue
			}
			if _, err := mem.ReadAt(content, at); err != nil {
				if errors.Is(err, io.EOF) || errors.Is(err, syscall.EIO) {
					continue // of a file, behind its end
				}
				return err
			}
			if _, err := os.Stdout.Write(content); err != nil {
				return err
			}
		}
	}
	return nil
}
