package systemd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The calls that succeed need a disk of the kernel's, in VMs.
func TestSwapFails(t *testing.T) {
	absent := filepath.Join(t.TempDir(), "absent")
	if err := StartSwap(absent); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EPERM) || !strings.HasPrefix(err.Error(), "cannot use "+absent+" as swap: swapon: ") {
		t.Errorf("swapon: %v", err)
	}
	if err := StopSwap(absent); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EPERM) || !strings.HasPrefix(err.Error(), "cannot take "+absent+" back from swap: swapoff: ") {
		t.Errorf("swapoff: %v", err)
	}
	if err := StartSwap("a\x00b"); err == nil {
		t.Error("a path with a NUL byte was taken")
	}
	if used, err := isSwap(os.DevNull); err != nil || used {
		t.Errorf("%s is swap: %v, %v", os.DevNull, used, err)
	}
}
