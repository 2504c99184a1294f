package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

// recoveryListVersion is the version of the fields of `recovery-key list --json`.
const recoveryListVersion = 1

type recoveryList struct {
	Version int                  `json:"version"`
	Volumes []recoveryListVolume `json:"volumes"`
}

type recoveryListVolume struct {
	Device       string            `json:"device,omitempty"`
	UUID         string            `json:"uuid,omitempty"`
	MountPoint   string            `json:"mount_point,omitempty"`
	RecoveryKeys []recoveryListKey `json:"recovery_keys"`
	UnknownSlots []int             `json:"unknown_slots"`
	Error        string            `json:"error,omitempty"`
}

type recoveryListKey struct {
	Token   int    `json:"token"`
	Slot    int    `json:"slot"`              // -1: none, its removal was cut
	Created string `json:"created,omitempty"` // UTC, RFC 3339
	Problem string `json:"problem,omitempty"`
}

func newRecoveryKeyList(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "list [VOLUME...]",
		Short: "List the recovery keys of volumes",
		Long: `Tell which of the named volumes, or of all that are recorded, have a recovery key,
since when, and in which key slot; and which other key slots are there that no token
names: a passphrase that somebody added, or what an add that was cut off left. KMS is
not asked, and that a key still opens its volume only test can tell.`,
		Example: `  sudo luks-kms-agent recovery-key list
  sudo luks-kms-agent recovery-key list --json /mnt`,
		RunE: func(cmd *cobra.Command, names []string) error {
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			results, err := node.ListRecovery(cmd.Context(), names)
			if err != nil {
				return err
			}
			list := newRecoveryList(results)
			if asJSON {
				if err := printJSON(cmd.OutOrStdout(), list); err != nil {
					return err
				}
				return failures(recoveryErrors(results))
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "DEVICE\tVOLUME\tMOUNT POINT\tRECOVERY KEY")
			for _, v := range list.Volumes {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", dash(v.Device), dash(v.UUID), dash(v.MountPoint), v.text())
			}
			t.Flush()
			return failures(recoveryErrors(results))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newRecoveryList(results []agent.RecoveryResult) recoveryList {
	list := recoveryList{Version: recoveryListVersion, Volumes: []recoveryListVolume{}}
	for _, r := range results {
		v := recoveryListVolume{Device: r.Device, UUID: r.Volume.UUID, MountPoint: r.Volume.MountPoint,
			RecoveryKeys: []recoveryListKey{}, UnknownSlots: append([]int{}, r.Other...)}
		if r.Err != nil {
			v.Error = r.Err.Error()
		}
		for _, k := range r.Keys {
			key := recoveryListKey{Token: k.ID, Slot: k.Keyslot, Problem: k.Problem}
			if !k.Created.IsZero() {
				key.Created = k.Created.Format("2006-01-02T15:04:05Z07:00")
			}
			v.RecoveryKeys = append(v.RecoveryKeys, key)
		}
		list.Volumes = append(list.Volumes, v)
	}
	return list
}

func (v recoveryListVolume) text() string {
	if v.Error != "" {
		return "failed"
	}
	var parts []string
	for _, k := range v.RecoveryKeys {
		part := fmt.Sprintf("key slot %d, since %s", k.Slot, k.Created)
		if k.Problem != "" {
			part = fmt.Sprintf("token %d cannot be used: %s", k.Token, k.Problem)
		}
		parts = append(parts, part)
	}
	if len(parts) == 0 {
		parts = []string{"none"}
	}
	for _, slot := range v.UnknownSlots {
		parts = append(parts, fmt.Sprintf("unknown slot %d, named by no token", slot))
	}
	return strings.Join(parts, "; ")
}
