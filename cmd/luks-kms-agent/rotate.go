package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newRotate(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "rotate [VOLUME...]",
		Short: "Give volumes a new data key",
		Long: `Give the named volumes, or all of this node, a new data key: KMS makes it, each
volume gets a key slot that it opens, the token names that, and when the new key has
been proven the slot of the old one is removed. What is on the volumes is not
encrypted anew, and they may be open and in use. Key slots of others stay.

It can be interrupted: at every moment a recorded key opens each volume. Run again,
it goes on with what was begun. Back up records and headers anew afterwards: a
header from before still is opened by the old data key.

To change only the KMS key that wraps the data keys: rewrap.`,
		Example: `  sudo luks-kms-agent rotate
  sudo luks-kms-agent rotate /mnt1 vol-0123456789abcdef0`,
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			done, err := node.Rotate(cmd.Context(), names)
			if asJSON {
				if perr := printJSON(cmd.OutOrStdout(), rotatedJSON(done)); perr != nil && err == nil {
					err = perr
				}
			} else if len(done) > 0 {
				printRotated(cmd.OutOrStdout(), done)
			}
			var errs []error
			for _, r := range done {
				if r.Err != nil {
					errs = append(errs, r.Err)
				}
			}
			if err != nil {
				errs = append(errs, err)
			}
			return failures(errs)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// rotatedResult is how it went with one volume, in a word.
func rotatedResult(r agent.Rotated) string {
	switch {
	case r.Err != nil:
		return "failed"
	case r.Left:
		return "not begun: an earlier rotate came first, run it again"
	case r.From == "":
		return "has the new data key already"
	}
	return "rotated"
}

func rotatedJSON(done []agent.Rotated) any {
	type row struct {
		Device   string `json:"device,omitempty"`
		UUID     string `json:"uuid,omitempty"`
		Identity string `json:"identity,omitempty"`
		From     string `json:"from_key_id,omitempty"`
		KeyID    string `json:"key_id,omitempty"`
		Result   string `json:"result"`
		Error    string `json:"error,omitempty"`
	}
	rows := []row{}
	for _, r := range done {
		out := row{Device: r.Device, UUID: r.Volume.UUID, Identity: r.Volume.Identity, From: r.From, KeyID: r.Volume.KeyID, Result: rotatedResult(r)}
		if r.Err != nil {
			out.Error = r.Err.Error()
		}
		rows = append(rows, out)
	}
	return struct {
		Version int   `json:"version"`
		Volumes []row `json:"volumes"`
	}{1, rows}
}

func printRotated(w io.Writer, done []agent.Rotated) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "DEVICE\tIDENTITY\tDATA KEY\tRESULT")
	for _, r := range done {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", dash(r.Device), dash(r.Volume.Identity), dash(r.Volume.KeyID), rotatedResult(r))
	}
	t.Flush()
}
