package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

func newRecoveryKey(opts *globalOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "recovery-key",
		Short: "Add, test, remove and list keys that open volumes without KMS",
		Long: `A recovery key is a second key to a volume: 160 random bits, for a person to write
down and keep away from the node. It opens the volume without KMS and without this
program's records: with unlock --recovery-key, or with cryptsetup, to which its text
is the passphrase. Whoever has it and the disk can read the data.`,
		Example: `  sudo luks-kms-agent recovery-key add /mnt
  sudo luks-kms-agent recovery-key test
  sudo luks-kms-agent unlock --recovery-key`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newRecoveryKeyAdd(opts), newRecoveryKeyTest(opts), newRecoveryKeyRemove(opts), newRecoveryKeyList(opts))
	return cmd
}

// maxTyped is more than anybody needs for a recovery key, in bytes.
const maxTyped = 256

// readRecoveryKey asks for a recovery key where standard input is a terminal, without showing what is typed; else it reads one line.
func readRecoveryKey(cmd *cobra.Command) (*keycache.Key, error) {
	var typed []byte
	var err error
	if f, ok := cmd.InOrStdin().(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		fmt.Fprint(cmd.ErrOrStderr(), "Recovery key (it is not shown): ")
		typed, err = readHidden(cmd.Context(), int(f.Fd()))
		fmt.Fprintln(cmd.ErrOrStderr())
	} else {
		typed, err = readLine(cmd.InOrStdin())
	}
	if err != nil {
		clear(typed)
		return nil, fmt.Errorf("cannot read the recovery key: %w", err)
	}
	return keycache.ParseRecoveryKey(typed)
}

// readHidden reads a line from a terminal that does not echo it. The terminal is as it was afterwards, also where ctx ends, which is
// how an interrupt comes.
func readHidden(ctx context.Context, fd int) ([]byte, error) {
	before, err := term.GetState(fd)
	if err != nil {
		return nil, err
	}
	type answer struct {
		typed []byte
		err   error
	}
	done := make(chan answer, 1)
	go func() {
		typed, err := term.ReadPassword(fd)
		done <- answer{typed, err}
	}()
	select {
	case a := <-done:
		if errors.Is(a.err, io.EOF) {
			a.err = nil // nothing was entered, which says so itself
		}
		return a.typed, a.err
	case <-ctx.Done():
		return nil, errors.Join(context.Cause(ctx), term.Restore(fd, before))
	}
}

// readLine reads up to the end of a line, in memory that nothing else copies.
func readLine(r io.Reader) ([]byte, error) {
	line := make([]byte, 0, maxTyped)
	for len(line) < maxTyped {
		n, err := r.Read(line[len(line):maxTyped])
		line = line[:len(line)+n]
		if i := bytes.IndexByte(line, '\n'); i >= 0 {
			clear(line[i:])
			return line[:i], nil
		}
		if errors.Is(err, io.EOF) {
			return line, nil
		}
		if err != nil {
			return line, err
		}
	}
	clear(line)
	return nil, fmt.Errorf("the line is longer than %d bytes", maxTyped)
}

// recoveryErrors are the errors of results.
func recoveryErrors(results []agent.RecoveryResult) []error {
	var errs []error
	for _, r := range results {
		if r.Err != nil {
			errs = append(errs, r.Err)
		}
	}
	return errs
}
