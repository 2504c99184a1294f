package main

import (
	"fmt"
	"io"
	"text/tabwriter"

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
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DEVICE\tIDENTITY\tCLASS\tSIZE\tFOUND\tACTION\tMOUNT POINT\tREASON")
	for _, a := range p.Actions {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", dash(a.Device.Path), dash(a.Device.Identity), dash(string(a.Device.Class)),
			size(a.Device.Size), found(a), a.Verb, dash(a.Volume.MountPoint), a.Reason)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if n := len(p.QuarantineKeys) + len(p.QuarantineVolumes); n > 0 {
		fmt.Fprintf(w, "%d records of another instance would be moved to quarantine.\n", n)
	}
	if !p.Changes() {
		fmt.Fprintln(w, "Nothing would be changed.")
	}
	return nil
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
	switch {
	case n == 0:
		return "-"
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	}
	return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
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
