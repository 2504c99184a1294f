package systemd

import (
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Status sets the one-line status that `systemctl status` shows. Line breaks become spaces, because sd_notify ends a
// field at a line break and what follows would be read as a field of its own.
//
// Status and ExtendTimeout do nothing where NOTIFY_SOCKET is not set, and report no errors: no run may fail
// because systemd did not hear of its progress.
func Status(text string) {
	notify("STATUS=" + strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), " "))
}

// ExtendTimeout asks systemd to let the service start for at least d longer, counted from now
// (EXTEND_TIMEOUT_USEC=, sd_notify(3)). It never shortens the time. Less than a microsecond is not sent.
func ExtendTimeout(d time.Duration) {
	if d < time.Microsecond {
		return
	}
	notify("EXTEND_TIMEOUT_USEC=" + strconv.FormatInt(d.Microseconds(), 10))
}

func notify(state string) {
	// The socket stays set: many messages are sent over a run.
	_, _ = daemon.SdNotify(false, state)
}
