package systemd

import "github.com/coreos/go-systemd/v22/journal"

// Entry is one structured entry of the journal.
type Entry struct {
	MessageID string // 128 bits in hex: of the kind of entry (systemd.journal-fields(7), MESSAGE_ID)
	Message   string // the line that people read
	Warning   bool   // priority 4 (warning) instead of 5 (notice)
	Fields    map[string]string
}

// Journal sends an entry to journald. The error says that it is not there: no
// systemd, or another namespace.
func Journal(e Entry) error {
	fields := map[string]string{"MESSAGE_ID": e.MessageID, "SYSLOG_IDENTIFIER": "luks-kms-agent"}
	for name, value := range e.Fields {
		fields[name] = value
	}
	priority := journal.PriNotice
	if e.Warning {
		priority = journal.PriWarning
	}
	return journal.Send(e.Message, priority, fields)
}
