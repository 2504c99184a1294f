package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newLock(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "lock [VOLUME...]",
		Short: "Unmount and close volumes",
		Long: `Unmount and close the named volumes, or all of ours that are open. A volume is
named as for unlock. One that is in use stays open and is reported.`,
		Example: `  sudo luks-kms-agent lock /mnt1
  sudo luks-kms-agent lock`,
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			locked, err := node.Lock(cmd.Context(), names)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), newLockJSON(locked))
			} else {
				err = printLocked(cmd.OutOrStdout(), locked)
			}
			if err != nil {
				return err
			}
			var errs []error
			for _, l := range locked {
				if l.Err != nil {
					errs = append(errs, l.Err)
				}
			}
			return failures(errs)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printLocked(w io.Writer, locked []agent.Locked) error {
	if len(locked) == 0 {
		_, err := fmt.Fprintln(w, "nothing was open")
		return err
	}
	for _, l := range locked {
		if l.Err != nil {
			continue
		}
		if _, err := fmt.Fprintf(w, "locked %s (%s, %s)\n", l.Volume.MountPoint, dash(l.Device), l.Volume.UUID); err != nil {
			return err
		}
	}
	return nil
}

// lockJSON is what lock did, for programs.
type lockJSON struct {
	Version int          `json:"version"`
	Volumes []lockedJSON `json:"volumes"` // those that were open
}

type lockedJSON struct {
	UUID       string `json:"uuid"`
	Identity   string `json:"identity"`
	Device     string `json:"device,omitempty"`
	Mapping    string `json:"mapping,omitempty"`
	MountPoint string `json:"mount_point,omitempty"`
	Locked     bool   `json:"locked"`
	Error      string `json:"error,omitempty"`
}

func newLockJSON(locked []agent.Locked) lockJSON {
	out := lockJSON{Version: 1, Volumes: []lockedJSON{}}
	for _, l := range locked {
		v := lockedJSON{
			UUID: l.Volume.UUID, Identity: l.Volume.Identity, Device: l.Device, Mapping: l.Volume.Mapping, MountPoint: l.Volume.MountPoint,
			Locked: l.Err == nil,
		}
		if l.Err != nil {
			v.Error = l.Err.Error()
		}
		out.Volumes = append(out.Volumes, v)
	}
	return out
}
