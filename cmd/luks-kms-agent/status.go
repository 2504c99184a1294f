package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newStatus(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how the last run went and how the volumes are now",
		Long: `Show how the last run of this boot went, and for every recorded volume whether it
is mounted, open, locked or missing now. Neither KMS nor IMDS is asked. The same
is kept for other programs in ` + agent.DefaultStatusPath + `, but for the state of now.`,
		Example: `  sudo luks-kms-agent status
  sudo luks-kms-agent status --json |
    jq -r '.volumes[] | [.state, .mount_point] | @tsv'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			status, err := node.Status(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), status)
			}
			return printStatus(cmd.OutOrStdout(), status)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printStatus(w io.Writer, s agent.Status) error {
	switch s.Result {
	case "none":
		fmt.Fprintln(w, "Nothing has run since the boot.")
	default:
		fmt.Fprintf(w, "Last run: %s, %s, in %.1f s\n", s.Result, s.Finished.Format(time.RFC3339), s.Finished.Sub(s.Started).Seconds())
	}
	if s.Error != "" {
		fmt.Fprintf(w, "Error: %s\n", s.Error)
	}
	if len(s.Volumes) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "STATE\tDEVICE\tIDENTITY\tSIZE\tMOUNT POINT\tMAPPING\tLAST ACTION\tNOTE")
	for _, v := range s.Volumes {
		note := v.Reason
		if v.Error != "" {
			note = v.Error
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", dash(v.State), dash(v.Device), dash(v.Identity), size(v.Size),
			dash(v.MountPoint), dash(v.Mapping), dash(v.Action), dash(note))
	}
	return t.Flush()
}
