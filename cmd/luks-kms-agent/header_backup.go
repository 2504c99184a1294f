package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

func newHeaderBackup(opts *globalOptions) *cobra.Command {
	to := ""
	cmd := &cobra.Command{
		Use:   "backup [VOLUME...] --to DIR|FILE",
		Short: "Write the LUKS header of each volume, and its records, to a file",
		Long: `Write the LUKS header of the named volumes, or of all, each with the records that
open it, to a new file. A volume is named as for unlock and may be in use. Each file
is read back, and the header in it opened with the data key that KMS gives, before
it counts. No file is ever overwritten.

Back up again after each change of key slots and after rewrap; verify tells when.
A backup is worth as much as the header: whoever has one and may call kms:Decrypt
on the key opens the volume, also when key slots were removed since, or the volume
wiped. Keep it away from the node, readable to those only who may read the data.`,
		Example: `  sudo luks-kms-agent header backup --to /root/headers
  sudo luks-kms-agent header backup /mnt1 --to /root/mnt1.header.tar`,
		RunE: func(cmd *cobra.Command, names []string) error {
			place, err := backupPlace(to, len(names))
			if err != nil {
				return err
			}
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			done, err := node.BackUpHeaders(cmd.Context(), names, place)
			if err != nil {
				return err
			}
			var errs []error
			for _, b := range done {
				if b.Err != nil {
					errs = append(errs, b.Err)
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s (%s, %s): %s\n", b.Volume.Identity, b.Device, b.Volume.UUID, b.Path)
			}
			if len(done) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "there are no volumes")
			}
			return failures(errs)
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "`directory`, or, for one volume, the new file")
	return cmd
}

// backupPlace names the files: in a directory, or the one that was named.
func backupPlace(to string, volumes int) (func(keycache.VolumeRecord, time.Time) string, error) {
	if to == "" {
		return nil, &usageError{errors.New("--to is missing: it says where the backup goes")}
	}
	if info, err := os.Stat(to); err == nil && info.IsDir() {
		return func(v keycache.VolumeRecord, at time.Time) string {
			return filepath.Join(to, agent.BackupName(v, at))
		}, nil
	}
	if volumes != 1 {
		return nil, &usageError{fmt.Errorf("%s is not a directory: a file can be named only for one volume that is named too", to)}
	}
	return func(keycache.VolumeRecord, time.Time) string { return to }, nil
}
