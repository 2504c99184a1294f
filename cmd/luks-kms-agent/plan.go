package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
)

func newPlan(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what run would do with every disk, and why",
		Long: `Show every disk with its identity, what was found on it, what run would do with
it, and the evidence. Nothing is written, and KMS is not asked.`,
		Example: `  sudo luks-kms-agent plan
  sudo luks-kms-agent plan --json |
    jq '.actions[] | select(.action == "refuse")'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			plan, err := node.Plan(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), newPlanJSON(plan))
			}
			return printPlan(cmd.OutOrStdout(), plan)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printPlan(w io.Writer, p agent.Plan) error {
	_, err := io.WriteString(w, screenOf(w).plan(p))
	return err
}

// plan is a table with the reason of each row below it, or a block for each disk where a table does not fit.
func (s screen) plan(p agent.Plan) string {
	rows := [][]string{{"ACTION", "DEVICE", "MOUNT POINT", "FOUND", "CLASS", "IDENTITY", "SIZE"}}
	for _, a := range p.Actions {
		rows = append(rows, []string{string(a.Verb), dash(a.Device.Path), dash(a.Volume.MountPoint), found(a),
			dash(string(a.Device.Class)), dash(a.Device.Identity), size(a.Device.Size)})
	}
	var b strings.Builder
	say := func(line string) { b.WriteString(line + "\n") }
	table, longest, indent := align(rows)
	fits := longest <= s.width && len(p.Actions) > 0
	if fits {
		say(s.paint(bold, table[0]))
	}
	if !fits {
		indent = blockIndent
	}
	for i, a := range p.Actions {
		verb := string(a.Verb)
		if fits {
			say(s.paint(verbColor(a.Verb), verb) + strings.TrimPrefix(table[i+1], verb))
		} else {
			where := dash(a.Device.Path)
			if a.Volume.MountPoint != "" {
				where += " on " + a.Volume.MountPoint
			}
			say(s.paint(verbColor(a.Verb), fmt.Sprintf("%-*s", len(blockIndent), verb)) + clean(where))
			if a.Device.Path != "" {
				facts := []string{found(a), size(a.Device.Size)}
				if disk := strings.TrimSpace(string(a.Device.Class) + " " + a.Device.Identity); disk != "" {
					facts = append([]string{disk}, facts...)
				}
				say(s.wrap(indent, strings.Join(facts, ", ")))
			}
		}
		color := style("")
		if a.Verb == agent.Leave || a.Verb == agent.Nothing {
			color = dim
		}
		say(s.paint(color, s.wrap(indent, a.Reason)))
	}
	if n := len(p.QuarantineKeys) + len(p.QuarantineVolumes); n > 0 {
		say(counted(n, "record", "records") + " of another instance would be moved to quarantine.")
	}
	if !p.Changes() {
		say("Nothing would be changed.")
	}
	return b.String()
}

// blockIndent is as wide as the longest verb or state, and a gap.
const blockIndent = "         "

// verbColor shows what changes a disk, and what somebody has to look at.
func verbColor(v agent.Verb) style {
	switch v {
	case agent.Format:
		return yellow
	case agent.Refuse:
		return red
	case agent.Unlock, agent.Adopt, agent.Mount, agent.Nothing:
		return green
	}
	return dim
}

// found says in a word what is on a disk.
func found(a agent.Action) string {
	d := a.Device
	switch {
	case d.Path == "":
		return "-"
	case d.Err != nil:
		return "unreadable"
	case a.OpenAs != "":
		return "open"
	case len(d.Uses) > 0:
		return "in use"
	case d.Header == nil:
		return "-"
	case d.Header.Kind == luks.KindNone && d.Content == nil:
		return "-"
	case d.Header.Kind == luks.KindNone && d.Content.Blank:
		return "blank"
	case d.Header.Kind == luks.KindNone && d.Content.Type == "":
		return "unknown"
	case d.Header.Kind == luks.KindNone:
		return d.Content.Type
	case d.Header.Ours:
		return "ours"
	}
	return string(d.Header.Kind)
}

// size prints bytes in the unit that people name disks by.
func size(n int64) string {
	if n == 0 {
		return "-"
	}
	unit := unitOf(n)
	if unit.name == "MiB" {
		return fmt.Sprintf("%.0f MiB", float64(n)/unit.bytes)
	}
	return fmt.Sprintf("%.1f %s", float64(n)/unit.bytes, unit.name)
}

// unit is a unit of storage.
type unit struct {
	name  string
	bytes float64
}

func unitOf(n int64) unit {
	switch {
	case n >= 10<<40:
		return unit{"TiB", 1 << 40}
	case n >= 1<<30:
		return unit{"GiB", 1 << 30}
	}
	return unit{"MiB", 1 << 20}
}

// planJSON is the plan for programs.
type planJSON struct {
	Version           int          `json:"version"`
	Changes           bool         `json:"changes"`
	QuarantineKeys    []string     `json:"quarantine_keys,omitempty"`
	QuarantineVolumes []string     `json:"quarantine_volumes,omitempty"`
	Actions           []actionJSON `json:"actions"`
}

type actionJSON struct {
	Device     string   `json:"device,omitempty"`
	Class      string   `json:"class,omitempty"`
	Identity   string   `json:"identity,omitempty"`
	Model      string   `json:"model,omitempty"`
	Serial     string   `json:"serial,omitempty"`
	Size       int64    `json:"size,omitempty"` // bytes
	Found      string   `json:"found"`
	Action     string   `json:"action"`
	Refusal    string   `json:"refusal,omitempty"`
	Reason     string   `json:"reason"`
	UUID       string   `json:"uuid,omitempty"`
	KeyID      string   `json:"key_id,omitempty"`
	Filesystem string   `json:"filesystem,omitempty"`
	MountPoint string   `json:"mount_point,omitempty"`
	Replaces   []string `json:"replaces,omitempty"`
}

func newPlanJSON(p agent.Plan) planJSON {
	out := planJSON{Version: 1, Changes: p.Changes(), QuarantineKeys: p.QuarantineKeys, QuarantineVolumes: p.QuarantineVolumes, Actions: []actionJSON{}}
	for _, a := range p.Actions {
		d := a.Device
		out.Actions = append(out.Actions, actionJSON{
			Device: d.Path, Class: string(d.Class), Identity: d.Identity, Model: d.Model, Serial: d.Serial, Size: d.Size,
			Found: found(a), Action: string(a.Verb), Refusal: string(a.Refusal), Reason: a.Reason,
			UUID: a.Volume.UUID, KeyID: a.Volume.KeyID, Filesystem: a.Volume.Filesystem, MountPoint: a.Volume.MountPoint, Replaces: a.Replaces,
		})
	}
	return out
}
