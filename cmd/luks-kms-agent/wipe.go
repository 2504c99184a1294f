package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newWipe(opts *globalOptions) *cobra.Command {
	yes, identity := false, ""
	cmd := &cobra.Command{
		Use:   "wipe VOLUME",
		Short: "Erase a volume's key slots and header: its data is lost",
		Long: `Erase the key slots and both header copies of a volume, and both ends of its disk,
read that back, and archive its record. The encrypted data stays on the disk, and
nothing opens it any more, but a header backup made earlier together with KMS: destroy
those too, or schedule the KMS key for deletion if nothing else uses it. The key
record stays: it may open other volumes.

The volume must be locked. You are asked to type its identity, such as
vol-0123456789abcdef0; in scripts, give --yes and --identity. It can be interrupted,
and run again; until it is finished nothing else touches the disk. The disk is blank
then, and the next run formats it if the configuration says so.`,
		Example: `  sudo luks-kms-agent wipe /dev/nvme1n1
  sudo luks-kms-agent wipe /mnt1 --yes --identity vol-0123456789abcdef0`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			if yes != (identity != "") {
				return &usageError{errors.New("--yes and --identity go together")}
			}
			if !yes && !isTerminal(cmd.InOrStdin()) {
				return &usageError{errors.New("there is no terminal to ask on: --yes and --identity are missing")}
			}
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			w, err := node.Wipe(cmd.Context(), names[0], func(w agent.Wipe) error {
				printWipe(out, w)
				given := identity
				if !yes {
					fmt.Fprint(out, "All data on it will be lost. Type its identity to go on: ")
					given, _ = bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
				}
				if strings.TrimSpace(given) != w.Volume.Identity {
					return &usageError{fmt.Errorf("nothing was written: %q is not the identity of the volume, %s", strings.TrimSpace(given), w.Volume.Identity)}
				}
				return nil
			})
			if err != nil {
				return err
			}
			fmt.Fprintln(out, "wiped: the disk is proven blank, and the record is archived")
			if w.Formats {
				fmt.Fprintf(out, "The next run formats it, unless %s is in `exclude` or the disk is detached.\n", w.Volume.Identity)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	cmd.Flags().StringVar(&identity, "identity", "", "the volume's `identity`, in place of typing it")
	return cmd
}

func isTerminal(r io.Reader) bool {
	f, ok := r.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func printWipe(w io.Writer, p agent.Wipe) {
	fmt.Fprintf(w, "volume:  %s, LUKS %s, %s, recorded %s\n", p.Volume.Identity, p.Volume.UUID, dash(p.Volume.MountPoint), p.Volume.State)
	fmt.Fprintf(w, "disk:    %s: %s\n", p.Device, p.Found)
	if p.Backup != nil {
		fmt.Fprintf(w, "backup:  %s, of %s, still opens the data with KMS: destroy it, and all copies of it\n", p.Backup.Path, p.Backup.Time.Format(time.RFC3339))
	} else {
		fmt.Fprintln(w, "backup:  none is known here; one that was made elsewhere still opens the data with KMS")
	}
	fmt.Fprintln(w, "         passphrases and recovery keys of this volume are useless without such a backup")
}
