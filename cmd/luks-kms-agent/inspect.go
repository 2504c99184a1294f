package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

func newInspect() *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "inspect DEVICE|FILE",
		Short: "Show what is on a disk or image and whether it would be trusted",
		Long: `Read a block device or an image file and tell whether it is blank, a LUKS volume
(and then whether its header passes the strict check), or something else. Nothing
is written, no key is needed, and neither KMS nor IMDS is asked. Exit code 0 for
blank and for a passing header, 3 for foreign or unknown content, 7 for a LUKS header
that is refused.`,
		Example: `  sudo luks-kms-agent inspect /dev/nvme1n1
  luks-kms-agent inspect --json disk.img`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			found, err := inspect(cmd.Context(), names[0])
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), found)
			} else {
				err = found.print(cmd.OutOrStdout())
			}
			if err != nil {
				return err
			}
			return found.failure(names[0])
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// inspection is what inspect prints.
type inspection struct {
	Version int      `json:"version"`
	Content string   `json:"content"` // blank, luks1, luks2, foreign, unknown
	Ours    bool     `json:"ours"`
	Verdict string   `json:"verdict"` // pass, fail
	Reasons []string `json:"reasons"`

	PrimaryDamaged   bool        `json:"primary_damaged,omitempty"`
	SecondaryDamaged bool        `json:"secondary_damaged,omitempty"`
	Header           *headerJSON `json:"header,omitempty"`
}

// headerJSON is a LUKS header for programs.
type headerJSON struct {
	UUID        string        `json:"uuid"`
	Label       string        `json:"label,omitempty"`
	Subsystem   string        `json:"subsystem,omitempty"`
	LUKSVersion int           `json:"luks_version"`
	Cipher      string        `json:"cipher"`
	KeySize     int           `json:"key_size"`    // of the volume key, bits
	SectorSize  int           `json:"sector_size"` // bytes
	Offset      int64         `json:"offset"`      // of the data, bytes
	SeqID       uint64        `json:"seqid"`
	Keyslots    []keyslotJSON `json:"keyslots"`
	Tokens      []string      `json:"tokens"` // their types
	Token       *tokenJSON    `json:"token,omitempty"`
}

type keyslotJSON struct {
	ID         int    `json:"id"`
	KeySize    int    `json:"key_size"` // bits
	Cipher     string `json:"cipher"`
	KDF        string `json:"kdf"`
	Hash       string `json:"hash,omitempty"`
	Iterations int    `json:"iterations"`
}

// tokenJSON is our token without its wrapped key.
type tokenJSON struct {
	ID      int    `json:"id"`
	Keyslot int    `json:"keyslot"`
	KeyARN  string `json:"key_arn"`
}

func newHeaderJSON(h *luks.Header) *headerJSON {
	if h == nil {
		return nil
	}
	out := &headerJSON{
		UUID: h.UUID, Label: h.Label, Subsystem: h.Subsystem, LUKSVersion: h.Version, Cipher: h.Cipher, KeySize: h.KeySize, SectorSize: h.SectorSize,
		Offset: h.Offset, SeqID: h.SeqID, Keyslots: []keyslotJSON{}, Tokens: append([]string{}, h.Tokens...),
	}
	for _, s := range h.Keyslots {
		out.Keyslots = append(out.Keyslots, keyslotJSON(s))
	}
	if t := h.Token; t != nil {
		out.Token = &tokenJSON{ID: t.ID, Keyslot: t.Keyslot, KeyARN: t.KeyARN}
	}
	return out
}

func inspect(ctx context.Context, path string) (inspection, error) {
	i, err := luks.Inspect(path)
	if err != nil {
		return inspection{}, err
	}
	out := inspection{
		Version: 1,
		Content: string(luks.KindLUKS2), Ours: i.Ours, Verdict: "fail", Reasons: i.Reasons,
		PrimaryDamaged: i.PrimaryDamaged, SecondaryDamaged: i.SecondaryDamaged, Header: newHeaderJSON(i.Header),
	}
	switch i.Kind {
	case luks.KindNone:
		content, err := volumes.Probe(ctx, path, i.Size)
		if err != nil {
			return inspection{}, err
		}
		switch {
		case content.Blank:
			out.Content, out.Verdict = "blank", "pass"
		case content.Type != "":
			out.Content = "foreign"
		default:
			out.Content = "unknown"
		}
		if !content.Blank {
			out.Reasons = []string{content.Detail}
		}
	case luks.KindLUKS1:
		out.Content = string(luks.KindLUKS1)
	default:
		if i.Pass() {
			out.Verdict = "pass"
		}
	}
	if out.Reasons == nil {
		out.Reasons = []string{}
	}
	return out, nil
}

func (i inspection) print(w io.Writer) error {
	ours := "not ours"
	if i.Ours {
		ours = "ours"
	}
	fmt.Fprintf(w, "content: %s (%s)\nverdict: %s\n", i.Content, ours, i.Verdict)
	for _, r := range i.Reasons {
		fmt.Fprintf(w, "  %s\n", r)
	}
	if i.PrimaryDamaged {
		fmt.Fprintln(w, "the primary header is damaged; these facts are the secondary's")
	}
	if i.SecondaryDamaged {
		fmt.Fprintln(w, "the secondary header is damaged")
	}
	h := i.Header
	if h == nil {
		return nil
	}
	fmt.Fprintf(w, "uuid: %s\nlabel: %s\nsubsystem: %s\ncipher: %s, %d-bit key, %d-byte sectors, data at byte %d\n",
		h.UUID, dash(h.Label), dash(h.Subsystem), h.Cipher, h.KeySize, h.SectorSize, h.Offset)
	for _, s := range h.Keyslots {
		fmt.Fprintf(w, "key slot %d: %s, %s %s, %d iterations\n", s.ID, s.Cipher, s.KDF, s.Hash, s.Iterations)
	}
	if h.Token != nil {
		fmt.Fprintf(w, "token: key slot %d under %s\n", h.Token.Keyslot, h.Token.KeyARN)
	}
	return nil
}

// failure is the error, and so the exit code, of what was found.
func (i inspection) failure(path string) error {
	switch {
	case i.Verdict == "pass":
		return nil
	case i.Content == "foreign" || i.Content == "unknown":
		return &agent.RefusedError{Refusal: agent.RefusedContent, Device: path, Reason: "its content is " + i.Content}
	}
	return &luks.HeaderError{Path: path, Reasons: i.Reasons}
}
