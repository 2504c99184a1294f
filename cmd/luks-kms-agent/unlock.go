package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newUnlock(opts *globalOptions) *cobra.Command {
	asJSON, byRecoveryKey := false, false
	cmd := &cobra.Command{
		Use:   "unlock [VOLUME...]",
		Short: "Open and mount volumes by hand; never format",
		Long: `Open and mount the named volumes, or all of ours, with the data key that KMS gives
for their record. A volume is named by device, /dev/disk link, serial, EBS volume
id, LUKS UUID, mapping or mount point. Nothing is ever formatted.

With --recovery-key neither KMS nor the metadata service is asked: the key is read
from the terminal without showing it, or else as one line from standard input. The
header has to pass every check, as always. Records of another instance are used too,
and none is written. A volume without record has to be named; where the configuration
does not say where it is mounted, it is only opened.`,
		Example: `  sudo luks-kms-agent unlock
  sudo luks-kms-agent unlock vol-0123456789abcdef0
  sudo luks-kms-agent unlock /mnt1
  sudo luks-kms-agent unlock --recovery-key`,
		RunE: func(cmd *cobra.Command, names []string) error {
			return carryOut(cmd, opts, asJSON, func(n *agent.Node) (agent.Report, error) {
				if !byRecoveryKey {
					return n.Unlock(cmd.Context(), names)
				}
				key, err := readRecoveryKey(cmd)
				if err != nil {
					return agent.Report{}, err
				}
				report, err := n.UnlockRecovery(cmd.Context(), key, names)
				for _, o := range report.Outcomes {
					if o.Err == nil && o.Action.Verb == agent.Unlock && o.Action.Volume.MountPoint == "" && !asJSON {
						fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", o.Action.Device.Path, o.Action.Reason)
					}
				}
				return report, err
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&byRecoveryKey, "recovery-key", false, "open with a recovery key, without KMS")
	return cmd
}
