package systemd

import (
	"slices"
	"testing"
)

const stripeUnit = "luks-kms-agent-stripe.service"

func TestStripeUnitKeepsTheDesign(t *testing.T) {
	wantSettings(t, "luks-kms-agent.service", []wanted{
		{"Unit", "Wants", stripeUnit, "nobody would assemble the stripe, at boot or when the service is tried again"},
		{"Unit", "After", stripeUnit, "the disks of the stripe would be looked at one by one"},
	})
	wantSettings(t, stripeUnit, []wanted{
		{"Unit", "Before", "luks-kms-agent.service", "the disks of the stripe would be looked at one by one"},
		{"Unit", "DefaultDependencies", "no", "multi-user.target would wait for IMDS"},
		{"Unit", "After", "local-fs.target", "the records lie on the boot volume"},
		{"Unit", "Conflicts", "shutdown.target", "a run that waits for IMDS would hold up the shutdown"},
		{"Unit", "Before", "shutdown.target", "a run that waits for IMDS would hold up the shutdown"},
		{"Unit", "Wants", "modprobe@raid0.service", "the sandbox loads no modules"},
		{"Service", "Type", "oneshot", "the service would start before the stripe is assembled"},
		{"Service", "RemainAfterExit", "yes", "each start of the service would wait for it"},
		{"Service", "CapabilityBoundingSet", "CAP_MKNOD", "mdadm could not open the array"},
		{"Service", "DeviceAllow", "m", "mdadm could not open the array"},
	})
	for _, name := range []string{"After", "Wants"} {
		if slices.Contains(settings(t, stripeUnit, "Unit", name), "network-online.target") {
			t.Errorf("%s=network-online.target: a stripe that was made needs no network", name)
		}
	}
	if got := settings(t, stripeUnit, "Service", "Restart"); len(got) > 0 {
		t.Errorf("Restart=%v: the service starts it anew when it is tried again itself", got)
	}
}
