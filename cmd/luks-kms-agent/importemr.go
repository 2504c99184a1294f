package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newImportEMR() *cobra.Command {
	output, bucket, cluster := "", "", ""
	cmd := &cobra.Command{
		Use:   "import-emr FILE|-",
		Short: "Make a configuration from an EMR security configuration",
		Long: `Read a security configuration of Amazon EMR (JSON) from a file, or from standard
input, and print the agent's configuration that encrypts the local disks under the
same KMS key; with --escrow-bucket also one that keeps copies of LUKS headers in S3, as
EMRFS encrypts what it puts there. With --cluster, the answer of describe-cluster, logs
go where that cluster's go (LogUri), under the key of LogEncryptionKmsKeyId, which no
security configuration has.

What was taken, what was not, and why, is told on standard error. A field that is not
known, or stands twice, is an error; of a cluster, what else it has is not looked at.
Nothing else is read or changed; neither KMS nor EMR is asked.

Exit code 0: the disk part was taken. 2: it cannot be read. 3: there is no local
disk encryption under KMS in it.`,
		Example: `  aws emr describe-security-configuration --name NAME \
    --query SecurityConfiguration --output text |
    luks-kms-agent import-emr - >config.yaml

  sudo luks-kms-agent import-emr emr.json \
    --output /etc/luks-kms-agent/config.yaml

  aws emr describe-cluster --cluster-id ID |
    luks-kms-agent import-emr emr.json --cluster - >config.yaml`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			if names[0] == "-" && cluster == "-" {
				return &usageError{errors.New("cannot read standard input twice: FILE and --cluster are both -")}
			}
			data, err := readInput(cmd.InOrStdin(), names[0])
			if err != nil {
				return err
			}
			var described []byte
			if cluster != "" {
				if described, err = readInput(cmd.InOrStdin(), cluster); err != nil {
					return err
				}
			}
			found, err := agent.ImportEMR(data, bucket)
			if err == nil && cluster != "" {
				err = found.TakeLogs(described)
			}
			for _, n := range found.Notes {
				mark := "not taken"
				if n.Taken {
					mark = "taken"
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "%-9s  %s\n             %s\n", mark, n.Path, n.Text)
			}
			if err != nil {
				return err
			}
			config, err := found.Config()
			if err != nil {
				return err
			}
			if output == "" {
				_, err := cmd.OutOrStdout().Write(config)
				return err
			}
			return writeNew(output, config)
		},
	}
	cmd.Flags().StringVar(&bucket, "escrow-bucket", "", "take mode and key of its S3 encryption for an escrow in this `bucket`")
	cmd.Flags().StringVar(&cluster, "cluster", "", "take where logs go, and their key, from the answer of describe-cluster in this `file` (-: standard input)")
	cmd.Flags().StringVar(&output, "output", "", "write to this `file`, which must not be there yet (default: standard output)")
	return cmd
}

// readInput reads a file, or standard input for "-". A little more than is allowed is enough to see that it is too much.
func readInput(stdin io.Reader, name string) ([]byte, error) {
	in := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", name, bare(err))
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, 2<<20))
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", name, bare(err))
	}
	return data, nil
}

// bare is the cause inside an error that names the file a second time.
func bare(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// writeNew writes a file that was not there before, as a configuration's mode is to be.
func writeNew(name string, text []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if errors.Is(err, fs.ErrExist) {
		return &usageError{fmt.Errorf("cannot write %s: it is there already, and is never overwritten", name)}
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", name, bare(err))
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(name) // half a configuration could mean something else
		return fmt.Errorf("cannot write %s: %w", name, err)
	}
	return nil
}
