package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// choice is a flag that has one of a few values.
type choice struct {
	to      *string
	allowed []string
}

func newChoice(to *string, value string, allowed ...string) *choice {
	*to = value
	return &choice{to: to, allowed: allowed}
}

func (c *choice) String() string { return *c.to }
func (c *choice) Type() string   { return "choice" }

func (c *choice) Set(value string) error {
	if !slices.Contains(c.allowed, value) {
		return fmt.Errorf("allowed: %s", strings.Join(c.allowed, ", "))
	}
	*c.to = value
	return nil
}

// flagError makes what is wrong with a flag a usage error that names the flag which may have been meant.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) && unknown.GetSpecifiedShortnames() == "" {
		// Flags are guessed as cobra guesses commands.
		guess := &cobra.Command{SuggestionsMinimumDistance: suggestionDistance}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				guess.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {}})
			}
		})
		err = didYouMean(err, guess.SuggestionsFor(unknown.GetSpecifiedName()), "--")
	}
	return &usageError{err}
}

// suggestionDistance is how many letters a suggestion may be away from what was typed.
const suggestionDistance = 2

// didYouMean adds suggestions, where there are any, to an error.
func didYouMean(err error, suggestions []string, prefix string) error {
	if len(suggestions) == 0 {
		return err
	}
	return fmt.Errorf("%w: did you mean %s%s?", err, prefix, strings.Join(suggestions, " or "+prefix))
}

// finish gives every command what all commands have: suggestions, a refusal of subcommands that there are not, and completion of
// its arguments by the words in its Use line.
func finish(cmd *cobra.Command, opts *globalOptions) {
	cmd.SuggestionsMinimumDistance = suggestionDistance
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = args(cobra.NoArgs)
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
	if cmd.ValidArgsFunction == nil && len(cmd.ValidArgs) == 0 {
		cmd.ValidArgsFunction = completer(opts)
	}
	complete := func(f *pflag.Flag) {
		if c, ok := f.Value.(*choice); ok {
			// The one error is that the flag has a completion already.
			_ = cmd.RegisterFlagCompletionFunc(f.Name, cobra.FixedCompletions(c.allowed, cobra.ShellCompDirectiveNoFileComp))
		}
	}
	cmd.LocalNonPersistentFlags().VisitAll(complete)
	cmd.PersistentFlags().VisitAll(complete)
	for _, sub := range cmd.Commands() {
		finish(sub, opts)
	}
}
