package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newVerify(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "verify [VOLUME...]",
		Short: "Prove that volumes would open, without opening them",
		Long: `Prove, without a mapping and without a write, that the named volumes, or all, would
open: both header copies are sound and pass the strict check, and the data key that
KMS gives for the record opens the key slot and makes the MAC hold. Also compared are
token, record, disk and mapping, and the header with its last backup. Volumes may be
open or locked.

A line for each volume, and one for each finding that is not ok. The exit code is
that of the worst failure; warnings, such as a backup that is missing or not current,
leave it 0.`,
		Example: `  sudo luks-kms-agent verify
  sudo luks-kms-agent verify --json |
    jq -r '.volumes[] | select(.result != "ok") | .identity'`,
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			verified, err := node.Verify(cmd.Context(), names)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), verification{Version: 1, Volumes: verified})
			} else {
				printVerified(cmd.OutOrStdout(), verified)
			}
			if err != nil {
				return err
			}
			var errs []error
			for _, v := range verified {
				for _, f := range v.Findings {
					if f.Err != nil {
						errs = append(errs, f.Err)
					}
				}
			}
			return failures(errs)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// verification is what verify --json prints.
type verification struct {
	Version int              `json:"version"`
	Volumes []agent.Verified `json:"volumes"`
}

func printVerified(w io.Writer, verified []agent.Verified) {
	if len(verified) == 0 {
		fmt.Fprintln(w, "there are no volumes")
	}
	for _, v := range verified {
		fmt.Fprintf(w, "%-8s %s (%s, %s)\n", v.Result, dash(v.Identity), dash(v.Device), dash(v.UUID))
		for _, f := range v.Findings {
			if f.Result != agent.ResultOK {
				fmt.Fprintf(w, "  %-8s %s: %s\n", f.Result, f.Check, f.Detail)
			}
		}
	}
}
