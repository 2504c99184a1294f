package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
)

func newPreflight(opts *globalOptions) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use:   "preflight",
		Short: "Check everything that run depends on, and touch nothing",
		Long: `Check what run depends on: the configuration, instance metadata and the role, KMS
and its key (one data key is made, decrypted and thrown away), the clock, the
kernel, the programs, the state directory, systemd and cloud-init; of escrow and
logs the key and the bucket, where nothing is put. Each check is ok, a warning (run
works all the same), a failure, or skipped as it depends on one that failed. Nothing
is written to a disk or a record. What is on the disks is for plan to tell.

The exit code is 0 unless a check fails; then it is the most urgent of theirs.`,
		Example: `  sudo luks-kms-agent preflight
  sudo luks-kms-agent preflight --json |
    jq '.checks[] | select(.result == "failure")'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := opts.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			made := agent.NewPreflight(opts.config, log, opts.program()).Run(cmd.Context())
			out := cmd.OutOrStdout()
			if asJSON {
				err = printJSON(out, newPreflightJSON(made))
			} else {
				err = printPreflight(out, made, preflightWidth(out))
			}
			if err != nil {
				return err
			}
			return unready(made)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// unreadyError ends a preflight with checks that failed. Each was printed with its remedy.
type unreadyError struct{ failed, code int }

func (e *unreadyError) Error() string {
	if e.failed == 1 {
		return "this node is not ready: a check failed"
	}
	return fmt.Sprintf("this node is not ready: %d checks failed", e.failed)
}

// unready is nil where nothing failed.
func unready(made []agent.Check) error {
	var errs []error
	for _, c := range made {
		if c.Result == agent.CheckFailure {
			errs = append(errs, c.Err)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return &unreadyError{failed: len(errs), code: exitCode(failures(errs))}
}

// remedy is what to do about a check, "" where there is nothing to do. That no volume was touched goes without saying here, and that the
// service would try again does not help who stands before it.
func remedy(c agent.Check) string {
	if c.Err == nil {
		return ""
	}
	text := hint(c.Err)
	for _, end := range []string{triesAgain, "No volume was touched."} {
		text = strings.TrimSpace(strings.TrimSuffix(text, end))
	}
	return text
}

// preflightHint is the hint for what only preflight finds.
func preflightHint(err error) string {
	switch {
	case errors.Is(err, agent.ErrOtherRegion):
		return "If that is not meant: drop `region`, and use a key of the node's region. Else each boot depends on the other region."
	case errors.Is(err, agent.ErrClockOff):
		return "Set the node's clock (chrony or systemd-timesyncd; EC2's time service is 169.254.169.123). KMS refuses signatures that are 5 minutes off."
	case errors.Is(err, agent.ErrMayNotDescribe):
		return "Optional: allow kms:DescribeKey on the key to the node's role; then a wrong key is named before it is used."
	case errors.Is(err, agent.ErrMayNotList):
		return "Allow s3:ListBucket on the bucket to the node's role, for `escrow list` and `logs verify`; and see that bucket_owner is the account that has it."
	case errors.Is(err, agent.ErrNoReplace):
		return "Only `luks-kms-agent rewrap` needs it: install a newer cryptsetup before the KMS key is replaced."
	case errors.Is(err, agent.ErrNotOnBoot):
		return "Without that volume nothing opens: keep state_dir on the boot volume, unless this one is as lasting."
	case errors.Is(err, agent.ErrOldSystemd):
		return "Use a distribution with systemd 244 or newer."
	case errors.Is(err, agent.ErrNoUnit):
		return "Install the package, which has the unit files (`systemctl unmask` if they are masked), then `systemctl daemon-reload`."
	case errors.Is(err, agent.ErrNotEnabled):
		return "Run `systemctl enable luks-kms-agent.service`."
	case errors.Is(err, agent.ErrNotReloaded):
		return "Run `systemctl daemon-reload`."
	case errors.Is(err, agent.ErrCloudInit):
		return "Install /etc/cloud/cloud.cfg.d/90_luks-kms-agent.cfg (packaging/), see that no later file there has `mounts`, and take the line out of /etc/fstab."
	case errors.Is(err, agent.ErrUnprotected):
		return "Give the service LimitMEMLOCK=infinity, as its unit file has it; by hand, run as root (`ulimit -l unlimited`). Volumes open all the same."
	case errors.Is(err, luks.ErrNoCipher):
		return "Load the kernel modules aes and xts, or use a kernel that has them."
	}
	return ""
}

// preflightWidth is that of a terminal, and 0 for what programs read, where lines are not broken.
func preflightWidth(w io.Writer) int {
	on := screenOf(w)
	if !on.terminal {
		return 0
	}
	return min(max(on.width, 80), 120)
}

func printPreflight(w io.Writer, made []agent.Check, width int) error {
	names := 0
	counts := map[agent.CheckResult]int{}
	for _, c := range made {
		names = max(names, len(c.Name))
		counts[c.Result]++
	}
	for _, c := range made {
		head := fmt.Sprintf("%-7s  %-*s  ", c.Result, names, c.Name)
		text := wrap(c.Detail, width-len(head))
		if r := remedy(c); r != "" {
			for i, line := range wrap(r, width-len(head)-3) {
				text = append(text, map[bool]string{true: "-> ", false: "   "}[i == 0]+line)
			}
		}
		for _, line := range text {
			if _, err := fmt.Fprintln(w, head+line); err != nil {
				return err
			}
			head = strings.Repeat(" ", len(head))
		}
	}
	_, err := fmt.Fprintf(w, "%d ok, %s, %s, %d skipped\n", counts[agent.CheckOK],
		several(counts[agent.CheckWarning], "warning"), several(counts[agent.CheckFailure], "failure"), counts[agent.CheckSkipped])
	return err
}

func several(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// wrap breaks a text between words, into lines of at most so many characters; a longer word has a line of its own. Where there is no
// width there is one line.
func wrap(text string, width int) []string {
	lines := []string{""}
	for word := range strings.FieldsSeq(text) {
		last := &lines[len(lines)-1]
		switch {
		case *last == "":
			*last = word
		case width > 0 && utf8.RuneCountInString(*last)+1+utf8.RuneCountInString(word) > width:
			lines = append(lines, word)
		default:
			*last += " " + word
		}
	}
	return lines
}

// preflightJSON is the report for programs.
type preflightJSON struct {
	Version  int         `json:"version"`
	Ready    bool        `json:"ready"`
	ExitCode int         `json:"exit_code"`
	Checks   []checkJSON `json:"checks"`
}

type checkJSON struct {
	Name     string `json:"name"`
	Result   string `json:"result"`
	Detail   string `json:"detail"`
	Remedy   string `json:"remedy,omitempty"`
	ExitCode int    `json:"exit_code,omitempty"` // of a failure
}

func newPreflightJSON(made []agent.Check) preflightJSON {
	out := preflightJSON{Version: 1, Ready: true}
	if err := unready(made); err != nil {
		out.Ready, out.ExitCode = false, exitCode(err)
	}
	for _, c := range made {
		check := checkJSON{Name: c.Name, Result: string(c.Result), Detail: c.Detail, Remedy: remedy(c)}
		if c.Result == agent.CheckFailure {
			check.ExitCode = exitCode(c.Err)
		}
		out.Checks = append(out.Checks, check)
	}
	return out
}
