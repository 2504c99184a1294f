package main

import (
	"errors"
	"fmt"
	"io"

	qr "github.com/piglig/go-qr"
	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

type recoveryAddOptions struct {
	replace, qr, forceStdout bool
}

func newRecoveryKeyAdd(opts *globalOptions) *cobra.Command {
	var add recoveryAddOptions
	cmd := &cobra.Command{
		Use:   "add VOLUME...",
		Short: "Make a recovery key and show it once",
		Long: `Make one recovery key for the named volumes and show it, once, on standard output,
which has to be a terminal. A volume is named as for unlock; it may be open and in
use. KMS is asked for the data key, which is needed to add another.

The key is shown when it is proven to open the volumes, and counts as theirs, for
list and for unlock --recovery-key, just after that. Write it down, and try what you
wrote with test. If the command was cut off in between, list shows a key slot that
no token names; run add again.

A volume has one recovery key. With --replace a new one takes the place of the old,
which opens the volume until the new one does.`,
		Example: `  sudo luks-kms-agent recovery-key add /mnt /mnt1
  sudo luks-kms-agent recovery-key add --qr vol-0123456789abcdef0
  sudo luks-kms-agent recovery-key add --replace /mnt`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error { return runRecoveryKeyAdd(cmd, opts, add, names) },
	}
	cmd.Flags().BoolVar(&add.replace, "replace", false, "replace the recovery key that a volume has")
	cmd.Flags().BoolVar(&add.qr, "qr", false, "show the key as a QR code too")
	cmd.Flags().BoolVar(&add.forceStdout, "force-stdout", false, "write the key to standard output although it is not a terminal")
	return cmd
}

func runRecoveryKeyAdd(cmd *cobra.Command, opts *globalOptions, add recoveryAddOptions, names []string) error {
	out := cmd.OutOrStdout()
	if !add.forceStdout && !screenOf(out).terminal {
		return &usageError{errors.New("cannot show a recovery key: standard output is not a terminal, and what goes into a file or a log stays there (--force-stdout does it all the same)")}
	}
	node, err := opts.keyNode(cmd.ErrOrStderr(), nil)
	if err != nil {
		return err
	}
	results, err := node.AddRecovery(cmd.Context(), names, add.replace, func(k *keycache.Key) error {
		return showRecoveryKey(out, k, add.qr)
	})
	added := false
	for _, r := range results {
		if r.Err == nil && err == nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "added to %s (%s), key slot %d\n", r.Volume.UUID, r.Device, r.Slot)
			added = true
		}
	}
	if added {
		fmt.Fprintln(cmd.ErrOrStderr(), "Write the key down now, it is not shown again; try what you wrote with `luks-kms-agent recovery-key test`; then back up the headers again.")
	}
	return failures(append(recoveryErrors(results), nonNil(err)...))
}

func nonNil(err error) []error {
	if err == nil {
		return nil
	}
	return []error{err}
}

// showRecoveryKey writes the key from the memory that it is in.
func showRecoveryKey(w io.Writer, k *keycache.Key, asQR bool) error {
	if _, err := w.Write(k.Passphrase()); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(w); err != nil || !asQR {
		return err
	}
	// The library makes copies, which are searched for and wiped with the key at the end.
	code, err := qr.EncodeText(string(k.Passphrase()), qr.Medium)
	if err != nil {
		return fmt.Errorf("cannot make a QR code: %w", err)
	}
	return drawQR(w, code)
}

// quiet is how many modules of nothing a reader wants around a QR code, ISO/IEC 18004.
const quiet = 4

// drawQR draws two rows of a QR code in one line of text, dark on light whatever the colours of the terminal are.
func drawQR(w io.Writer, code *qr.QrCode) error {
	size := code.Size()
	for y := -quiet; y < size+quiet; y += 2 {
		line := "\x1b[30;47m"
		for x := -quiet; x < size+quiet; x++ {
			// Outside of the code Module says light.
			switch top, bottom := code.Module(x, y), code.Module(x, y+1); {
			case top && bottom:
				line += "█"
			case top:
				line += "▀"
			case bottom:
				line += "▄"
			default:
				line += " "
			}
		}
		if _, err := fmt.Fprintln(w, line+"\x1b[0m"); err != nil {
			return err
		}
	}
	return nil
}
