package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newEscrow(opts *globalOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "escrow",
		Short: "Keep copies of LUKS headers and key records in S3",
		Long: `Keep a copy of each volume's LUKS header, with the records that open it, in an S3
bucket, encrypted under a customer managed key. With it the volumes of a node whose
boot volume is lost open again on another one: docs/escrow.md tells how.

The section escrow of the configuration says where copies go and who encrypts them:
S3 (sse-kms) or this node (cse-kms). A copy counts once S3 has told that it is there,
whole, and encrypted under that very key. None is ever overwritten or deleted.`,
		Example: `  sudo luks-kms-agent escrow put
  sudo luks-kms-agent escrow list
  sudo luks-kms-agent escrow restore --to /root --yes`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newEscrowPut(opts), newEscrowList(opts), newEscrowGet(opts), newEscrowVerify(opts), newEscrowRestore(opts))
	return cmd
}

func newEscrowPut(opts *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "put [VOLUME...]",
		Short: "Send what is not in the escrow yet",
		Long: `Send the LUKS header of the named volumes, or of all, each with the records that
open it, to the escrow. What is there already, and was confirmed, is not sent again.
A volume is named as for unlock and may be in use. What is sent opens with the data
key that KMS gives. luks-kms-agent-escrow.timer runs this.

A failure of one volume does not stop the others; run it again, or let the timer.`,
		Example: `  sudo luks-kms-agent escrow put
  sudo luks-kms-agent escrow put /mnt1`,
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			done, err := node.Escrow(cmd.Context(), names)
			if err != nil {
				return err
			}
			var errs []error
			for _, e := range done {
				if e.Err != nil {
					errs = append(errs, e.Err)
					continue
				}
				what := "is in"
				if e.Sent {
					what = "sent to"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s (%s, %s): %s %s\n", e.Volume.Identity, e.Device, e.Volume.UUID, what, e.URL)
			}
			if len(done) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "there are no volumes")
			}
			return failures(errs)
		},
	}
}

func newEscrowList(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "list [UUID...]",
		Short: "List the copies in the escrow",
		Long: `List the copies that the escrow has of the volumes with these LUKS UUIDs, or of all
volumes of all nodes that send theirs to this bucket and prefix; the newest of each
volume first. Shown is what S3 tells of each: the mode, and the key that it is
encrypted under. One that is not encrypted as the configuration wants it is no copy
that get and restore take.`,
		Example: `  sudo luks-kms-agent escrow list
  sudo luks-kms-agent escrow list --json |
    jq -r '.objects[] | [.uuid, .identity, .url] | @tsv'`,
		RunE: func(cmd *cobra.Command, uuids []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			objects, err := node.EscrowObjects(cmd.Context(), uuids)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), newEscrowJSON(objects))
			}
			return printEscrow(cmd.OutOrStdout(), objects)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// escrowJSON is what the escrow has, for programs.
type escrowJSON struct {
	Version int                `json:"version"`
	Objects []escrowObjectJSON `json:"objects"`
}

type escrowObjectJSON struct {
	URL        string    `json:"url"`
	UUID       string    `json:"uuid"`
	Class      string    `json:"class,omitempty"`
	Identity   string    `json:"identity,omitempty"`
	InstanceID string    `json:"instance_id,omitempty"` // that sent it
	Size       int64     `json:"size"`                  // bytes in the bucket
	Modified   time.Time `json:"modified"`
	Mode       string    `json:"mode"`       // "sse-kms", "cse-kms", "" for neither
	Encryption string    `json:"encryption"` // of S3: "aws:kms", "AES256", "" for none
	KeyARN     string    `json:"key_arn,omitempty"`
	Error      string    `json:"error,omitempty"`
}

func newEscrowJSON(objects []agent.EscrowObject) escrowJSON {
	out := escrowJSON{Version: 1, Objects: []escrowObjectJSON{}}
	for _, o := range objects {
		row := escrowObjectJSON{
			URL: o.URL, UUID: o.UUID, Class: o.Class, Identity: o.Identity, InstanceID: o.Instance, Size: o.Size, Modified: o.Modified.UTC(),
			Mode: string(o.Encryption.Mode), Encryption: o.Encryption.Algorithm, KeyARN: o.Encryption.KeyARN,
		}
		if o.Err != nil {
			row.Error = o.Err.Error()
		}
		out.Objects = append(out.Objects, row)
	}
	return out
}

func printEscrow(w io.Writer, objects []agent.EscrowObject) error {
	if len(objects) == 0 {
		_, err := fmt.Fprintln(w, "the escrow has nothing of them")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VOLUME\tOF\tSENT\tENCRYPTION\tUNDER\tOBJECT")
	for _, o := range objects {
		encryption := string(o.Encryption.Mode)
		switch {
		case o.Err != nil && o.Metadata == nil:
			encryption = "unknown"
		case encryption == "" && o.Encryption.Algorithm != "":
			encryption = o.Encryption.Algorithm
		case encryption == "":
			encryption = "none"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", o.UUID, dash(o.Identity), o.Modified.UTC().Format(time.RFC3339), encryption, dash(o.Encryption.KeyARN), o.URL)
	}
	return t.Flush()
}

func newEscrowVerify(opts *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "verify [VOLUME...]",
		Short: "Read the copies back and prove that they open",
		Long: `Read the last copy of the named volumes, or of all, back from the escrow, and prove
that it is worth something: it is encrypted as it has to be, whole, and the header in
it opens with the data key that KMS gives for the record in it, MAC included. Told is
also whether the volume has changed since. Nothing is written.`,
		Example: `  sudo luks-kms-agent escrow verify`,
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			verified, err := node.VerifyEscrow(cmd.Context(), names)
			if err != nil {
				return err
			}
			var errs []error
			for _, v := range verified {
				result := "ok"
				switch {
				case v.Err != nil:
					errs = append(errs, v.Err)
					result = "failed"
				case !v.Current:
					result = "ok, but the volume has changed since"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s (%s): %s: %s\n", v.Volume.Identity, v.Volume.UUID, dash(v.URL), result)
			}
			if len(verified) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "there are no volumes")
			}
			return failures(errs)
		},
	}
}
