package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newSealImage(opts *globalOptions) *cobra.Command {
	var seal agent.SealOptions
	yes, asJSON := false, false
	cmd := &cobra.Command{
		Use:   "seal-image",
		Short: "Make this machine ready to become an image",
		Long: `Take off the boot volume what is this node's, as the last step before an image is
made of it: the records of volumes and data keys, the audit log, what waits to be sent
of other logs, and how the last run went. Each instance of the image then makes a data
key of its own. The configuration stays. No disk is written to, and KMS is not asked.

It refuses while a volume is open: lock first. The records of a volume that is attached
go to quarantine, which no run reads. A record whose volume is not attached may be the
last copy of its wrapped key: it is removed only after it was written to the file that
--save-records names, on another disk than the image's, or with --discard-records.

It can be interrupted, and run again. machine-id, SSH host keys, cloud-init's state and
the journal are not the agent's: packaging/image/cleanup.sh resets those.`,
		Example: `  sudo luks-kms-agent lock
  sudo luks-kms-agent seal-image

  # The builder had volumes that are detached now
  sudo luks-kms-agent seal-image --save-records /media/usb/builder-records.tar`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkSealFlags(cmd, seal, yes); err != nil {
				return err
			}
			node, err := opts.node(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			s, err := node.SealImage(cmd.Context(), seal, func(s agent.Seal) error {
				if !seal.Discard || yes || s.Discards == 0 {
					return nil
				}
				ask := out
				if asJSON {
					ask = cmd.ErrOrStderr()
				}
				printActs(ask, s, false)
				return confirmDiscard(cmd.InOrStdin(), ask, s.Discards)
			})
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(out, newSealJSON(s))
			} else {
				printSeal(out, s)
			}
			return errors.Join(err, failures(s.Refused))
		},
	}
	cmd.Flags().StringVar(&seal.SaveTo, "save-records", "", "write what is removed to a new `FILE`, a tar archive, first")
	cmd.Flags().BoolVar(&seal.Discard, "discard-records", false, "records of volumes that are not attached may be lost")
	cmd.Flags().BoolVar(&yes, "yes", false, "with --discard-records: do not ask")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func checkSealFlags(cmd *cobra.Command, seal agent.SealOptions, yes bool) error {
	switch {
	case seal.Discard && seal.SaveTo != "":
		return &usageError{errors.New("--save-records and --discard-records exclude each other")}
	case yes && !seal.Discard:
		return &usageError{errors.New("--yes is for --discard-records: nothing else is asked")}
	case seal.Discard && !yes && !isTerminal(cmd.InOrStdin()):
		return &usageError{errors.New("there is no terminal to ask on: --yes is missing")}
	}
	return nil
}

func confirmDiscard(in io.Reader, out io.Writer, records int) error {
	fmt.Fprintf(out, "%d records will be gone. A volume whose header is lost too is then lost. Type discard to go on: ", records)
	given, _ := bufio.NewReader(in).ReadString('\n')
	if strings.TrimSpace(given) != "discard" {
		return &usageError{errors.New("nothing was changed: discard was not typed")}
	}
	return nil
}

// sealedVerbs are the verbs in the past.
var sealedVerbs = map[agent.SealVerb]string{
	agent.SealRemove: "removed", agent.SealQuarantine: "quarantined", agent.SealClear: "cleared", agent.SealKeep: "kept",
}

func printActs(w io.Writer, s agent.Seal, done bool) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, a := range s.Acts {
		verb := string(a.Verb)
		if done {
			verb = sealedVerbs[a.Verb]
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", verb, a.Path, a.Why)
	}
	_ = t.Flush()
}

func printSeal(w io.Writer, s agent.Seal) {
	if len(s.Refused) > 0 {
		if s.Changes() {
			fmt.Fprintln(w, "Nothing was changed. This would be done:")
			printActs(w, s, false)
		}
		return
	}
	printActs(w, s, true)
	switch {
	case !s.Changes():
		fmt.Fprintln(w, "sealed: there was nothing to do")
	case s.SavedTo == "":
		fmt.Fprintln(w, "sealed")
	case s.InMemory:
		fmt.Fprintf(w, "sealed; what was removed is in %s, which is in memory: copy it away before this machine is switched off\n", s.SavedTo)
	default:
		fmt.Fprintf(w, "sealed; what was removed is in %s\n", s.SavedTo)
	}
	fmt.Fprintln(w, "Not the agent's, and in the image unless you reset it: machine-id, SSH host keys, cloud-init's state, the journal.")
	fmt.Fprintln(w, "Then switch the machine off: the next run would make records again.")
}

// sealJSON is what seal-image did, for programs.
type sealJSON struct {
	Version  int           `json:"version"`
	Sealed   bool          `json:"sealed"`
	SavedTo  string        `json:"saved_to,omitempty"`
	InMemory bool          `json:"in_memory,omitempty"`
	Results  []sealActJSON `json:"results"`
}

type sealActJSON struct {
	Action string `json:"action"`
	Path   string `json:"path"`
	Reason string `json:"reason"`
}

func newSealJSON(s agent.Seal) sealJSON {
	out := sealJSON{Version: 1, Sealed: len(s.Refused) == 0, Results: []sealActJSON{}}
	if out.Sealed {
		out.SavedTo, out.InMemory = s.SavedTo, s.InMemory
	}
	for _, a := range s.Acts {
		out.Results = append(out.Results, sealActJSON{Action: sealedVerbs[a.Verb], Path: a.Path, Reason: a.Why})
	}
	return out
}
