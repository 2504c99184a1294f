package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTerminal returns the program's side of a new terminal of so many columns. What is written to it is read and dropped.
func openTerminal(t *testing.T, columns uint16) *os.File {
	t.Helper()
	terminal, master := openPair(t, columns)
	go func() { _, _ = io.Copy(io.Discard, master) }()
	return terminal
}

// openPair returns both sides of a new terminal.
func openPair(t *testing.T, columns uint16) (terminal, master *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatalf("no terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	if err := unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns}); err != nil {
		t.Fatal(err)
	}
	return terminal, master
}

func TestProgress(t *testing.T) {
	terminal, master := openPair(t, 40)
	p := newProgress(terminal)
	now := noon
	p.now = func() time.Time { return now }
	p.done = make(chan struct{}) // the test draws
	draw := func() { p.mu.Lock(); p.draw(); p.mu.Unlock() }

	p.tell("Looking at disks")
	draw() // too early
	now = now.Add(1500 * time.Millisecond)
	p.tell("Formatting /dev/nvme1n1")
	draw()
	now = now.Add(3 * time.Second)
	draw()
	p.tell("Waiting for Decrypt, attempt 2: something that is long\nand has lines")
	now = now.Add(12 * time.Second)
	draw()
	fmt.Fprintln(p.over(terminal), "done")
	draw() // nothing to say
	p.stop()
	terminal.Close()

	const erase = "\r\x1b[K"
	want := erase + "Formatting /dev/nvme1n1 …" + erase + "Formatting /dev/nvme1n1 … 3 s" +
		erase + "Waiting for Decrypt, attempt 2: … 12 s" + erase + "done\r\n"
	got := make([]byte, len(want))
	if n, err := io.ReadFull(master, got); err != nil || string(got) != want {
		t.Errorf("got %q, want %q (%v)", got[:n], want, err)
	}
	if n, err := master.Read(make([]byte, 1)); n > 0 {
		t.Errorf("there is more behind %q (%v)", got, err)
	}
}

// TestProgressRedraws lets the line be drawn by itself, while several goroutines tell.
func TestProgressRedraws(t *testing.T) {
	terminal, master := openPair(t, 80)
	p := newProgress(terminal)
	p.begun = time.Now().Add(-time.Minute)
	for i := range 4 {
		go p.tell(fmt.Sprintf("Opening /dev/nvme%dn1", i))
	}
	line := make([]byte, 256)
	if n, err := io.ReadAtLeast(master, line, len("\r\x1b[KOpening /dev/nvme")); err != nil || !strings.Contains(string(line[:n]), "Opening /dev/nvme") {
		t.Errorf("%q, %v", line[:n], err)
	}
	p.stop()
}
