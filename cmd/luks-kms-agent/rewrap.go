package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newRewrap(opts *globalOptions) *cobra.Command {
	to := ""
	cmd := &cobra.Command{
		Use:   "rewrap",
		Short: "Bring the data keys under another KMS key",
		Long: `Let KMS wrap each data key of this node anew, under the key that is configured or
the one that --to names, and write what it gives into the key records and into the
tokens of the volumes. Data keys, key slots and what is on the volumes stay as they
are; volumes may be open and in use. It can be interrupted, and run again: what is
done is not done again.

Needed once, besides what run needs: kms:ReEncryptFrom on the old key and
kms:ReEncryptTo on the new one, and kms:Decrypt on both.

Keep the old KMS key until rewrap has ended without an error on every node, and set
kms_key to the new one: volumes that are made later are made under that.`,
		Example: `  sudo luks-kms-agent rewrap --to arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab
  sudo luks-kms-agent rewrap --to alias/data-2027`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := opts.keyNode(cmd.ErrOrStderr(), func(c *agent.Config) {
				if to != "" {
					c.KMSKey = to
				}
			})
			if err != nil {
				return err
			}
			done, err := node.Rewrap(cmd.Context())
			if err != nil {
				return err
			}
			printRewrapped(cmd.OutOrStdout(), done)
			var errs []error
			for _, r := range done {
				if r.Err != nil {
					errs = append(errs, r.Err)
				}
			}
			return failures(errs)
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "KMS `key`: a key ARN, a key id, alias/NAME or an alias ARN (default: kms_key)")
	return cmd
}

func printRewrapped(w io.Writer, done []agent.Rewrapped) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tOF\tUNDER\tRESULT")
	for _, r := range done {
		what, of := "key record", r.Key.ID
		if r.IsToken() {
			what, of = "token", fmt.Sprintf("%s (%s)", r.Volume.UUID, dash(r.Device))
		}
		result := "already there"
		switch {
		case r.Err != nil:
			result = "failed"
		case r.From != "":
			result = "rewrapped"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", what, dash(of), dash(r.Key.KeyARN), result)
	}
	t.Flush()
}
