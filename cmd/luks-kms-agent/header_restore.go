package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newHeaderRestore(opts *globalOptions) *cobra.Command {
	yes := false
	cmd := &cobra.Command{
		Use:   "restore FILE [VOLUME] --yes",
		Short: "Put the LUKS header in a backup back onto its volume",
		Long: `Put the LUKS header in a backup back onto the disk that it was read from, and write
the volume's records again where they are lost. The volume must be locked. Nothing is
written unless the header passes every check and opens under the data key that KMS
gives for it, MAC included, and the disk holds this volume or what is left of it.
What is overwritten is saved beside the backup. At last the volume is opened, its
filesystem looked for, and the volume closed; unlock then mounts it.

Without --yes it shows what it found and would do. It can be interrupted, and run
again: a header that is half written is never opened.`,
		Example: `  # What is in it, and what would be written where
  sudo luks-kms-agent header restore /root/headers/vol-01.header.tar

  sudo luks-kms-agent header restore /root/headers/vol-01.header.tar --yes`,
		Args: args(cobra.RangeArgs(1, 2)),
		RunE: func(cmd *cobra.Command, given []string) error {
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			return restoreHeader(cmd, node, given[0], strings.Join(given[1:], ""), yes)
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "write")
	return cmd
}

// restoreHeader restores the backup in a file, and tells what was found and done; without yes it writes nothing.
func restoreHeader(cmd *cobra.Command, node *agent.Node, file, name string, yes bool) error {
	out := cmd.OutOrStdout()
	r, err := node.RestoreHeader(cmd.Context(), file, name, func(r agent.Restore) error {
		printRestore(out, r)
		if !yes {
			return &usageError{errors.New("nothing was written: --yes is missing")}
		}
		return nil
	})
	if r.Saved != "" {
		fmt.Fprintf(out, "overwritten: saved as %s\n", r.Saved)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "restored, opened, found a filesystem, and closed: `luks-kms-agent unlock` mounts it")
	return nil
}

func printRestore(w io.Writer, r agent.Restore) {
	m := r.Manifest
	fmt.Fprintf(w, "backup:      %s of %s, LUKS volume %s, under %s\n", m.Time.Format(time.RFC3339), m.Identity, m.UUID, m.KeyARN)
	fmt.Fprintf(w, "disk:        %s: %s\n", r.Device, r.Found)
	if r.Same {
		fmt.Fprintln(w, "             the header in the backup is there already")
	}
	if len(r.Records) > 0 {
		fmt.Fprintf(w, "records:     lost, to be written again: %s\n", strings.Join(r.Records, ", "))
	}
}
