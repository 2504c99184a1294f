package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newLock(opts *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "lock [VOLUME...]",
		Short: "Unmount and close volumes",
		Long: `Unmount and close the named volumes, or all of ours that are open. A volume is
named as for unlock. One that is in use stays open and is reported.`,
		Example: `  sudo luks-kms-agent lock /mnt1
  sudo luks-kms-agent lock`,
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			locked, err := node.Lock(cmd.Context(), names)
			if err != nil {
				return err
			}
			var errs []error
			for _, l := range locked {
				if l.Err != nil {
					errs = append(errs, l.Err)
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "locked %s (%s, %s)\n", l.Volume.MountPoint, l.Device, l.Volume.UUID)
			}
			if len(locked) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing was open")
			}
			return failures(errs)
		},
	}
}
