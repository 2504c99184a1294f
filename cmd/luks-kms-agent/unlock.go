package main

import (
	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newUnlock(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "unlock [VOLUME...]",
		Short: "Open and mount volumes by hand; never format",
		Long: `Open and mount the named volumes, or all of ours, with the data key that KMS gives
for their record. A volume is named by device, /dev/disk link, serial, EBS volume
id, LUKS UUID, mapping or mount point. Nothing is ever formatted.`,
		Example: `  sudo luks-kms-agent unlock
  sudo luks-kms-agent unlock vol-0123456789abcdef0
  sudo luks-kms-agent unlock /mnt1`,
		RunE: func(cmd *cobra.Command, names []string) error {
			return carryOut(cmd, opts, asJSON, func(n *agent.Node) (agent.Report, error) { return n.Unlock(cmd.Context(), names) })
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
