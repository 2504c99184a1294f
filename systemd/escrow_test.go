package systemd

import "testing"

func TestLogUnitsKeepTheDesign(t *testing.T) {
	wantSettings(t, "luks-kms-agent-logs.service", []wanted{
		{"Service", "Type", "oneshot", "the timer would start it again while it sends"},
		{"Service", "CapabilityBoundingSet", "CAP_DAC_READ_SEARCH", "logs of others are closed to it"},
	})
	wantSettings(t, "luks-kms-agent-logs-last.service", []wanted{
		{"Unit", "After", "network-online.target", "the network would be gone before the last lines are sent"},
		{"Service", "RemainAfterExit", "yes", "nothing would be stopped at shutdown"},
		{"Service", "ExecStop", "archive", "nothing would be sent at shutdown"},
		{"Service", "TimeoutStopSec", "90s", "a shutdown would wait for S3 for as long as the default is"},
		{"Install", "WantedBy", "multi-user.target", "it could not be enabled"},
	})
	wantSettings(t, "luks-kms-agent-logs.timer", []wanted{
		{"Timer", "OnUnitInactiveSec", "5min", "what is new would not be sent"},
		{"Timer", "RandomizedDelaySec", "1min", "the nodes of a fleet would ask S3 in step"},
		{"Install", "WantedBy", "timers.target", "it could not be enabled"},
	})
}

func TestEscrowUnitsKeepTheDesign(t *testing.T) {
	const service, timer = "luks-kms-agent-escrow.service", "luks-kms-agent-escrow.timer"
	wantSettings(t, service, []wanted{
		{"Unit", "After", "luks-kms-agent.service", "it would wait for the lock of the first run, and give up"},
		{"Unit", "Wants", "network-online.target", "S3 is not reached at boot"},
		{"Unit", "ConditionPathExists", "/etc/luks-kms-agent/config.yaml", "it would fail every five minutes on a node that is not set up"},
		{"Service", "Type", "oneshot", "the timer would start it again while it sends"},
		{"Service", "ExecStart", "escrow", "nothing would be sent"},
	})
	wantSettings(t, timer, []wanted{
		{"Timer", "OnActiveSec", "1s", "a new volume would not be safe soon after the boot"},
		{"Timer", "OnUnitInactiveSec", "5min", "what S3 did not take, and what was changed, would not be sent again"},
		{"Timer", "RandomizedDelaySec", "30s", "the nodes of a fleet would ask S3 in step"},
		{"Install", "WantedBy", "timers.target", "it could not be enabled"},
	})
	for _, before := range settings(t, service, "Unit", "Before") {
		t.Errorf("Before=%s: nothing waits for the escrow, unless the configuration wants it", before)
	}
}
