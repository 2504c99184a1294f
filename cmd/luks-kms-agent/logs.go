package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newLogs(opts *globalOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "logs",
		Short: "Archive the node's logs in S3 under a KMS key",
		Long: `Archive log files and the journal of units in an S3 bucket, under a customer managed
key (SSE-KMS), so that a node that is gone does not take them along. The section logs
of the configuration says which, and where they go: docs/logs.md.`,
		Example: `  sudo luks-kms-agent logs archive
  sudo luks-kms-agent logs verify`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newLogsArchive(opts), newLogsVerify(opts))
	return cmd
}

func newLogsArchive(opts *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "archive",
		Short: "Send what is new in the logs",
		Long: `Send what is new since the last time, in compressed pieces, each confirmed by what S3
tells of it. What S3 does not take waits in the spool, up to max_spool_mib; then what
is new stays where it is. It can be killed at any point: no line is lost or sent twice
by that. Lines that went with their file before they were read are told of.

luks-kms-agent-logs.timer runs this, and luks-kms-agent-logs-last.service at shutdown.`,
		Example: `  sudo luks-kms-agent logs archive`,
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			done, err := node.ArchiveLogs(cmd.Context())
			out := cmd.OutOrStdout()
			if done.Pieces > 0 || err == nil {
				fmt.Fprintf(out, "%s in %s sent\n", counted(done.Lines, "line", "lines"), counted(done.Pieces, "object", "objects"))
			}
			if done.Waiting > 0 {
				fmt.Fprintf(out, "%d bytes wait in the spool\n", done.Waiting)
			}
			if done.Full {
				fmt.Fprintln(out, "the spool is full: what is new stays where it is")
			}
			for _, l := range done.Lost {
				fmt.Fprintf(out, "lost: %s, %s: %s\n", l.Source, l.Time.Format(time.RFC3339), l.Reason)
			}
			return err
		},
	}
}

func newLogsVerify(opts *globalOptions) *cobra.Command {
	all, asJSON := false, false
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Show how the archived logs are encrypted",
		Long: `Read the encryption properties of each of this node's objects in the archive back, and
compare them with the configuration: the table that the console shows one by one. The
exit code is 4 where one is not encrypted under the key.`,
		Example: `  sudo luks-kms-agent logs verify
  sudo luks-kms-agent logs verify --all-nodes --json`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			objects, err := node.VerifyLogs(cmd.Context(), all)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), newLogsJSON(objects))
			} else {
				err = printLogs(cmd.OutOrStdout(), objects)
			}
			if err != nil {
				return err
			}
			var errs []error
			for _, o := range objects {
				if o.Err != nil {
					errs = append(errs, o.Err)
				}
			}
			return failures(errs)
		},
	}
	cmd.Flags().BoolVar(&all, "all-nodes", false, "of all nodes of the cluster")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// logsJSON is what the archive has, for programs.
type logsJSON struct {
	Version int             `json:"version"`
	Objects []logObjectJSON `json:"objects"`
}

type logObjectJSON struct {
	URL        string    `json:"url"`
	Size       int64     `json:"size"` // bytes, compressed
	Modified   time.Time `json:"modified"`
	Encryption string    `json:"encryption"` // of S3: "aws:kms", "AES256", "" for none
	KeyARN     string    `json:"key_arn,omitempty"`
	Error      string    `json:"error,omitempty"`
}

func newLogsJSON(objects []agent.LogObject) logsJSON {
	out := logsJSON{Version: 1, Objects: []logObjectJSON{}}
	for _, o := range objects {
		row := logObjectJSON{URL: o.URL, Size: o.Size, Modified: o.Modified.UTC(), Encryption: o.Encryption.Algorithm, KeyARN: o.Encryption.KeyARN}
		if o.Err != nil {
			row.Error = o.Err.Error()
		}
		out.Objects = append(out.Objects, row)
	}
	return out
}

func printLogs(w io.Writer, objects []agent.LogObject) error {
	if len(objects) == 0 {
		_, err := fmt.Fprintln(w, "there are no logs in the archive")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SENT\tSIZE\tENCRYPTION\tUNDER\tRESULT\tOBJECT")
	for _, o := range objects {
		result := "ok"
		if o.Err != nil {
			result = "failed"
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\n", o.Modified.UTC().Format(time.RFC3339), o.Size, dash(o.Encryption.Algorithm), dash(o.Encryption.KeyARN), result, o.URL)
	}
	return t.Flush()
}
