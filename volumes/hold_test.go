package volumes

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// heldDevice is a file in a device's place, with facts that a test can change; only those are not real.
func heldDevice(t *testing.T) (Device, *openFacts, func(*os.File) (openFacts, error)) {
	tr := newTree(t)
	tr.write("dev/sdb", "")
	d := Device{Name: "sdb", Path: "/dev/sdb", Major: 8, Minor: 16, DiskSeq: 7, Size: 1 << 30, Serial: "S1", root: tr.root}
	facts := &openFacts{major: 8, minor: 16, diskSeq: 7, size: 1 << 30, serial: "S1"}
	return d, facts, func(*os.File) (openFacts, error) { return *facts, nil }
}

func TestHoldVerifiesIdentity(t *testing.T) {
	for name, change := range map[string]func(*openFacts){
		"major": func(f *openFacts) { f.major++ }, "minor": func(f *openFacts) { f.minor++ },
		"diskseq": func(f *openFacts) { f.diskSeq++ }, "no diskseq": func(f *openFacts) { f.diskSeq = 0 },
		"size": func(f *openFacts) { f.size-- }, "serial": func(f *openFacts) { f.serial = "S2" },
	} {
		d, facts, read := heldDevice(t)
		h, err := d.hold(t.Context(), read)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.check(read); err != nil {
			t.Errorf("%s: check of the same device: %v", name, err)
		}
		change(facts)
		if err := h.Recheck(); !errors.Is(err, ErrChanged) {
			t.Errorf("%s: recheck: %v", name, err)
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		if _, err := d.hold(t.Context(), read); !errors.Is(err, ErrChanged) {
			t.Errorf("%s: hold: %v", name, err)
		}
		if err := d.check(read); !errors.Is(err, ErrChanged) {
			t.Errorf("%s: check: %v", name, err)
		}
	}
}

func TestHoldExcludes(t *testing.T) {
	d, _, read := heldDevice(t)
	h, err := d.hold(t.Context(), read)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*lockPoll)
	defer cancel()
	if _, err := d.hold(ctx, read); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("second hold: %v", err)
	}
	time.AfterFunc(2*lockPoll, func() { h.Close() })
	second, err := d.hold(t.Context(), read) // waits
	if err != nil {
		t.Fatal(err)
	}
	second.Close()

	// udev's shared lock is waited for, too.
	f, err := os.Open(d.root + d.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 3*lockPoll)
	defer cancel()
	if _, err := d.hold(ctx, read); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hold beside a shared lock: %v", err)
	}
}

// What lies at the path now may be no device at all.
func TestHoldNoDevice(t *testing.T) {
	d, _, _ := heldDevice(t)
	if _, err := d.Hold(t.Context()); !errors.Is(err, ErrChanged) {
		t.Errorf("regular file: %v", err)
	}
	d.Path = "/dev/absent"
	if _, err := d.Hold(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}

func TestHoldFailsClosed(t *testing.T) {
	d, _, _ := heldDevice(t)
	broken := errors.New("cannot ask")
	if _, err := d.hold(t.Context(), func(*os.File) (openFacts, error) { return openFacts{}, broken }); !errors.Is(err, broken) {
		t.Errorf("unknown identity: %v", err)
	}
}
