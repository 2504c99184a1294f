package harness

import (
	"slices"
	"strings"
	"time"
)

// holdingAgent is the agent with the build tag holdsteps, which writes down the steps of a run and stops at one of them.
const holdingAgent = "/usr/local/lib/story/luks-kms-agent-hold"

// Nowhere lets HoldAt only have the steps written down.
const Nowhere = "record"

// HoldAt lets the next run of the agent's service stop for ever at a step. It holds until the power goes.
func (n *Node) HoldAt(step string) {
	n.tb.Helper()
	n.Write("/run/luks-kms-agent.hold", 0o600, step)
	n.Write("/run/systemd/system/luks-kms-agent.service.d/hold.conf", 0o644, "[Service]\nExecStart=\nExecStart="+holdingAgent+" run\n")
	n.Sh("rm -f /run/luks-kms-agent.steps /run/luks-kms-agent.held; systemctl daemon-reload")
}

// AwaitHeld waits until a run has come to the step that HoldAt named.
func (n *Node) AwaitHeld(limit time.Duration) {
	n.tb.Helper()
	n.Await("the agent stands at the step", limit, func() bool {
		if n.has("/run/luks-kms-agent.held") {
			return true
		}
		if n.runs() {
			return false
		}
		state := n.Unit("luks-kms-agent.service")["ActiveState"]
		if state == "active" || state == "failed" {
			n.tb.Fatalf("the run ended before it came to the step: %s", n.Journal())
		}
		return false
	})
}

// Steps returns the steps that the runs since HoldAt came to, each once.
func (n *Node) Steps() []string {
	n.tb.Helper()
	var steps []string
	for line := range strings.Lines(n.Sh("cat /run/luks-kms-agent.steps")) {
		if step := strings.TrimSpace(line); !slices.Contains(steps, step) {
			steps = append(steps, step)
		}
	}
	return steps
}
