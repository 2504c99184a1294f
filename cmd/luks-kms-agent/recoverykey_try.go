package main

import (
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/luks"
)

func newRecoveryKeyTest(opts *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "test [VOLUME...]",
		Short: "Tell which volumes a recovery key opens",
		Long: `Read a recovery key, from the terminal without showing it or else one line of
standard input, and tell which of the named volumes, or of all that are recorded, it
opens. Nothing is opened or changed, and KMS is not asked. Capitals, dashes and
spaces do not matter; a typo is told by its group.

It fails where a named volume does not open; without names, where none does.`,
		Example: `  sudo luks-kms-agent recovery-key test
  sudo luks-kms-agent recovery-key test /mnt`,
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			key, err := readRecoveryKey(cmd)
			if err != nil {
				return err
			}
			results, err := node.TestRecovery(cmd.Context(), key, names)
			if err != nil {
				return err
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "DEVICE\tVOLUME\tMOUNT POINT\tRESULT")
			opens := 0
			for _, r := range results {
				result := "opens"
				switch {
				case errors.Is(r.Err, luks.ErrWrongRecoveryKey):
					result = "does not open"
				case errors.Is(r.Err, luks.ErrNoRecoveryKey):
					result = "has no recovery key"
				case r.Err != nil:
					result = "failed"
				default:
					opens++
				}
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", dash(r.Device), dash(r.Volume.UUID), dash(r.Volume.MountPoint), result)
			}
			t.Flush()
			if len(names) == 0 && opens > 0 {
				return nil
			}
			errs := recoveryErrors(results)
			if len(results) == 0 {
				errs = append(errs, fmt.Errorf("cannot test the recovery key: no volume is recorded: %w", luks.ErrNoRecoveryKey))
			}
			return failures(errs)
		},
	}
}
