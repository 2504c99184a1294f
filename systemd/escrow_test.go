package systemd

import "testing"

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
