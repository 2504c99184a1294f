package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/systemd"
)

func newStripe(opts *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "stripe",
		Short: "Make or assemble the stripe of instance-store volumes",
		Long: `Assemble the stripe (RAID 0, by mdadm) that an earlier call made, when all its disks
are there. Where there is none, and the configuration says
stripe_instance_store: on, make one of all instance-store volumes that are proven
blank, if there are two or more. For run, the stripe is a disk as any other: it is
formatted, opened and mounted as one.

luks-kms-agent-stripe.service runs it at every boot before luks-kms-agent.service.`,
		Example: `  # Which disks would become part of the stripe
  sudo luks-kms-agent plan

  # What the two services do at boot
  sudo luks-kms-agent stripe && sudo luks-kms-agent run`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			done, err := node.Stripe(cmd.Context())
			for _, s := range done {
				verb := "assembled"
				if s.Made {
					verb = "made"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s stripe %s of %s\n", verb, s.UUID, strings.Join(s.Disks, ", "))
			}
			if err != nil {
				systemd.Status(err.Error())
				return err
			}
			if len(done) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing to make or to assemble")
			}
			return nil
		},
	}
}
