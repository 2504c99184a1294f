package main

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newEscrowGet(opts *globalOptions) *cobra.Command {
	to := ""
	cmd := &cobra.Command{
		Use:   "get [VOLUME...] --to DIR",
		Short: "Fetch the newest copy of each volume into a file",
		Long: `Fetch the newest copy of the named disks, or of all that this node has no records
of, from the escrow, decrypt it, and write it to a new file in the directory. A disk is
named by device, link, serial or EBS volume id; an older copy by its URL in the list.
A file is what header backup writes, and header restore takes. None is overwritten.`,
		Example: `  sudo luks-kms-agent escrow get vol-0123456789abcdef0 --to /root`,
		RunE: func(cmd *cobra.Command, names []string) error {
			if to == "" {
				return errNoPlace
			}
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			objects, err := node.EscrowFor(cmd.Context(), names)
			if err != nil {
				return err
			}
			return fetchEach(cmd, node, objects, to, func(string) error { return nil })
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "`directory` for the files")
	return cmd
}

var errNoPlace = &usageError{errors.New("--to is missing: it says in which directory the copies go")}

func newEscrowRestore(opts *globalOptions) *cobra.Command {
	to, yes := "", false
	cmd := &cobra.Command{
		Use:   "restore [VOLUME...] --to DIR --yes",
		Short: "Make the records, and headers, anew from the escrow",
		Long: `For each named disk, or all that this node has no records of: fetch the newest copy
from the escrow, as get does, and restore it, as header restore does. That is the way
back after a lost boot volume: the records are written again, and a header that is
damaged or gone is put back. The volumes must be locked. Nothing is written unless the
header passes every check and opens under the data key that KMS gives for it.

Without --yes it fetches, and shows what it found and would do. It can be interrupted,
and run again. unlock then mounts the volumes.`,
		Example: `  # What would be done
  sudo luks-kms-agent escrow restore --to /root

  sudo luks-kms-agent escrow restore --to /root --yes`,
		RunE: func(cmd *cobra.Command, names []string) error {
			if to == "" {
				return errNoPlace
			}
			node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
			if err != nil {
				return err
			}
			objects, err := node.EscrowFor(cmd.Context(), names)
			if err != nil {
				return err
			}
			return fetchEach(cmd, node, objects, to, func(file string) error { return restoreHeader(cmd, node, file, "", yes) })
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "`directory` for the files")
	cmd.Flags().BoolVar(&yes, "yes", false, "write")
	return cmd
}

// fetchEach writes each object to a file, and does with it what it is for. One failure does not stop the others.
func fetchEach(cmd *cobra.Command, node *agent.Node, objects []agent.EscrowObject, dir string, then func(file string) error) error {
	var errs []error
	for _, o := range objects {
		file := filepath.Join(dir, o.UUID+"."+path.Base(o.Name))
		err := node.FetchEscrow(cmd.Context(), o.Name, file)
		if err == nil {
			fmt.Fprintf(cmd.OutOrStdout(), "%s (%s): %s\n", dash(o.Identity), o.UUID, file)
			err = then(file)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	if len(objects) == 0 {
		fmt.Fprintln(cmd.OutOrStdout(), "there is no disk without records that the escrow has something of")
	}
	return failures(errs)
}
