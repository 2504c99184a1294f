package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newRewrap(opts *globalOptions) *cobra.Command {
	to, asJSON := "", false
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
		Example: `  # Under the key that kms_key names now
  sudo luks-kms-agent rewrap

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
			if err != nil && len(done) == 0 {
				return err
			}
			// What was done before it was interrupted is told too.
			print := printRewrapped
			if asJSON {
				print = func(w io.Writer, done []agent.Rewrapped) error { return printJSON(w, newRewrapJSON(done)) }
			}
			if perr := print(cmd.OutOrStdout(), done); err == nil {
				err = perr
			}
			if err != nil {
				return err
			}
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
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printRewrapped(w io.Writer, done []agent.Rewrapped) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tOF\tUNDER\tRESULT")
	for _, r := range done {
		what, of := "key record", r.Key.ID
		if r.IsToken() {
			what, of = "token", fmt.Sprintf("%s (%s)", r.Volume.UUID, dash(r.Device))
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", what, dash(of), dash(r.Key.KeyARN), rewrapResult(r))
	}
	return t.Flush()
}

// rewrapResult says in words how one rewrap went.
func rewrapResult(r agent.Rewrapped) string {
	switch {
	case r.Err != nil:
		return "failed"
	case r.From != "":
		return "rewrapped"
	}
	return "already there"
}

// rewrapJSON is what rewrap did, for programs.
type rewrapJSON struct {
	Version int             `json:"version"`
	Results []rewrappedJSON `json:"results"`
}

type rewrappedJSON struct {
	What   string `json:"what"`             // "key record", "token"
	KeyID  string `json:"key_id,omitempty"` // of the key record
	UUID   string `json:"uuid,omitempty"`   // of the token's volume
	Device string `json:"device,omitempty"`
	KeyARN string `json:"key_arn,omitempty"` // under which it is now
	From   string `json:"from,omitempty"`    // under which it was, where it was rewrapped
	Result string `json:"result"`            // "rewrapped", "already there", "failed"
	Error  string `json:"error,omitempty"`
}

func newRewrapJSON(done []agent.Rewrapped) rewrapJSON {
	out := rewrapJSON{Version: 1, Results: []rewrappedJSON{}}
	for _, r := range done {
		v := rewrappedJSON{
			What: "key record", KeyID: r.Key.ID, UUID: r.Volume.UUID, Device: r.Device, KeyARN: r.Key.KeyARN, From: r.From, Result: rewrapResult(r),
		}
		if r.IsToken() {
			v.What = "token"
		}
		if r.Err != nil {
			v.Error = r.Err.Error()
		}
		out.Results = append(out.Results, v)
	}
	return out
}
