package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
)

func newRun(opts *globalOptions) *cobra.Command {
	asJSON, attached := false, ""
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Format what is blank, open and mount what is ours",
		Long: `Carry out the plan: format data volumes that are proven blank, open and mount
those that were formatted before, refuse everything else with its reason. The
service luks-kms-agent.service runs it at every boot; run again, it changes nothing.

With --attached it is what udev starts for a disk that comes while the node runs, by
luks-kms-agent@.service: only disks that no run of this boot has dealt with are acted
on, and the exit code is about that disk alone. It does nothing while
luks-kms-agent.service is not active.`,
		Example: `  # What the service does at boot
  sudo luks-kms-agent run

  # See first what it would do
  sudo luks-kms-agent plan`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("attached") {
				disk, err := agent.ParseAttached(attached)
				if err != nil {
					return &usageError{fmt.Errorf("--attached: %w", err)}
				}
				return runAttached(cmd, opts, asJSON, disk)
			}
			return carryOut(cmd, opts, asJSON, func(n *agent.Node) (agent.Report, error) { return n.Run(cmd.Context()) })
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&attached, "attached", "", "a `disk` that was attached: kernel name, colon, disk sequence number")
	return cmd
}

// runAttached is run for one disk. What is wrong with other volumes is in its output, and not in its exit code.
func runAttached(cmd *cobra.Command, opts *globalOptions, asJSON bool, disk agent.Attached) error {
	node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
	if err != nil {
		return err
	}
	report, done, err := node.RunAttached(cmd.Context(), disk)
	if done != "" {
		systemd.Status("Nothing to do: " + done)
		if !asJSON {
			fmt.Fprintln(cmd.OutOrStdout(), "nothing to do: "+done)
			return nil
		}
		return printJSON(cmd.OutOrStdout(), report.Status(nil))
	}
	return tell(cmd, asJSON, report, err, report.FailuresOf(disk))
}

// carryOut is what run and unlock share: do the work, tell how it went.
func carryOut(cmd *cobra.Command, opts *globalOptions, asJSON bool, do func(*agent.Node) (agent.Report, error)) error {
	node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
	if err != nil {
		return err
	}
	report, err := do(node)
	return tell(cmd, asJSON, report, err, report.Failures())
}

// tell tells how it went: what stopped it as a whole, or else what failed.
func tell(cmd *cobra.Command, asJSON bool, report agent.Report, err error, failed []error) error {
	if asJSON && !report.Finished.IsZero() { // it is where another command keeps this one from beginning
		// What was done before the error is told too.
		if perr := printJSON(cmd.OutOrStdout(), report.Status(err)); perr != nil && err == nil {
			err = perr
		}
	}
	if err != nil {
		systemd.Status(err.Error())
		return err
	}
	if !asJSON {
		printReport(cmd.OutOrStdout(), report)
	}
	systemd.Status(summary(report))
	return failures(failed)
}

func printReport(w io.Writer, r agent.Report) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DEVICE\tIDENTITY\tACTION\tMOUNT POINT\tRESULT")
	for _, o := range r.Outcomes {
		a := o.Action
		if a.Unrelated() {
			continue
		}
		result := "ok"
		switch {
		case o.Err != nil:
			result = "failed"
		case a.Verb == agent.Leave, a.Verb == agent.Nothing:
			result = a.Reason
		case o.Took >= time.Millisecond:
			result = fmt.Sprintf("ok, %.1f s", o.Took.Seconds())
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", dash(a.Device.Path), dash(a.Device.Identity), a.Verb, dash(a.Volume.MountPoint), result)
	}
	t.Flush()
	fmt.Fprintln(w, summary(r))
}

func summary(r agent.Report) string {
	counts := map[agent.Verb]int{}
	for _, o := range r.Outcomes {
		if o.Err == nil && !o.Action.Unrelated() {
			counts[o.Action.Verb]++
		}
	}
	return fmt.Sprintf("%d formatted, %d unlocked, %d adopted, %d already open, %d left alone, %d failed; KMS: %d GenerateDataKey, %d Decrypt; %.1f s",
		counts[agent.Format], counts[agent.Unlock], counts[agent.Adopt], counts[agent.Nothing]+counts[agent.Mount], counts[agent.Leave],
		len(r.Failures()), r.Calls.GenerateDataKey, r.Calls.Decrypt, r.Finished.Sub(r.Started).Seconds())
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
