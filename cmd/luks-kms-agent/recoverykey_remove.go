package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newRecoveryKeyRemove(opts *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "remove VOLUME...",
		Short: "Take the recovery key of volumes away",
		Long: `Remove the recovery key of the named volumes: its key slot, then its token. KMS has
to give the data key and the data key has to open the volume first, so that a volume
never loses its last key. No other key slot is touched. Volumes may be open.

A header backup from before, or a snapshot, is still opened by the key.`,
		Example: `  sudo luks-kms-agent recovery-key remove /mnt`,
		Args:    args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			results, err := node.RemoveRecovery(cmd.Context(), names)
			for _, r := range results {
				if r.Err == nil {
					fmt.Fprintf(cmd.OutOrStdout(), "removed from %s (%s)\n", r.Volume.UUID, r.Device)
				}
			}
			return failures(append(recoveryErrors(results), nonNil(err)...))
		},
	}
}
