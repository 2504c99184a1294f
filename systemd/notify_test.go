package systemd

import (
	"net"
	"path/filepath"
	"testing"
	"time"
)

// listen gives the test a socket as systemd gives a service, and a function that returns the next message.
func listen(t *testing.T) func() string {
	t.Helper()
	addr := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"}
	socket, err := net.ListenUnixgram("unixgram", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	t.Setenv("NOTIFY_SOCKET", addr.Name)
	return func() string {
		t.Helper()
		buf := make([]byte, 4096)
		if err := socket.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := socket.Read(buf)
		if err != nil {
			t.Fatalf("no message: %v", err)
		}
		return string(buf[:n])
	}
}

func TestNotifySendsWhatSystemdReads(t *testing.T) {
	next := listen(t)

	Status("waiting for KMS: try 3,\nREADY=1\r\nnext in 4 s")
	if got, want := next(), "STATUS=waiting for KMS: try 3, READY=1 next in 4 s"; got != want {
		t.Errorf("Status sent %q, want %q: a line break must not start a field of its own", got, want)
	}

	ExtendTimeout(90*time.Second + 500*time.Microsecond)
	if got, want := next(), "EXTEND_TIMEOUT_USEC=90000500"; got != want {
		t.Errorf("ExtendTimeout sent %q, want %q", got, want)
	}

	ExtendTimeout(0)
	ExtendTimeout(-time.Second)
	Status("4 volumes open")
	if got, want := next(), "STATUS=4 volumes open"; got != want {
		t.Errorf("got %q, want %q, and nothing for an extension by nothing", got, want)
	}
}

func TestNotifyWithoutSystemdIsSilent(t *testing.T) {
	for _, socket := range []string{"", "/nowhere/at/all"} {
		t.Setenv("NOTIFY_SOCKET", socket)
		Status("x")
		ExtendTimeout(time.Minute)
	}
}
