package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
)

func newStripe(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
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
			if err != nil {
				systemd.Status(err.Error())
			}
			out := newStripeJSON(done)
			switch {
			case asJSON:
				return errors.Join(err, printJSON(cmd.OutOrStdout(), out))
			case err == nil && len(done) == 0:
				fmt.Fprintln(cmd.OutOrStdout(), "nothing to make or to assemble")
			}
			for _, s := range out.Stripes {
				fmt.Fprintf(cmd.OutOrStdout(), "%s stripe %s of %s\n", s.Result, s.UUID, strings.Join(s.Disks, ", "))
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// stripeJSON is what stripe did, for programs.
type stripeJSON struct {
	Version int           `json:"version"`
	Stripes []stripedJSON `json:"stripes"`
}

type stripedJSON struct {
	UUID   string   `json:"uuid"`
	Disks  []string `json:"disks"` // paths
	Result string   `json:"result"`
}

func newStripeJSON(done []agent.Striped) stripeJSON {
	out := stripeJSON{Version: 1, Stripes: []stripedJSON{}}
	for _, s := range done {
		result := "assembled"
		if s.Made {
			result = "made"
		}
		out.Stripes = append(out.Stripes, stripedJSON{UUID: s.UUID, Disks: s.Disks, Result: result})
	}
	return out
}
