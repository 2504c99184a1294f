package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newCompletion() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print the completion script of a shell",
		Long: `Print the script that completes commands, flags and the names of volumes in bash
(package bash-completion), zsh or fish. The package has it in place for all
three. Names of volumes are completed for root only: nobody else may read the
records.`,
		Example: `  # In this shell only
  source <(luks-kms-agent completion bash)

  # For every shell of the machine
  luks-kms-agent completion bash |
    sudo tee /usr/share/bash-completion/completions/luks-kms-agent`,
		ValidArgs: []cobra.Completion{"bash", "zsh", "fish"},
		Args:      args(cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs)),
		RunE: func(cmd *cobra.Command, shell []string) error {
			switch root, out := cmd.Root(), cmd.OutOrStdout(); shell[0] {
			case "bash":
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			default:
				return root.GenFishCompletion(out, true)
			}
		},
	}
}

// completer completes each argument by its word in the Use line: VOLUME by the records; FILE, DEVICE and DIRECTORY by the shell.
func completer(opts *globalOptions) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		switch word := argument(cmd.Use, len(args)); {
		case strings.Contains(word, "VOLUME"):
			return volumeNames(opts, args, typed), cobra.ShellCompDirectiveNoFileComp
		case strings.Contains(word, "FILE"), strings.Contains(word, "DEVICE"):
			return nil, cobra.ShellCompDirectiveDefault
		case strings.Contains(word, "DIRECTORY"):
			return nil, cobra.ShellCompDirectiveFilterDirs
		}
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
}

// argument is the word that stands in a Use line for the argument number i, from 0; "" where there is no such argument. Flags
// that have to be given stand last there, with their values.
func argument(use string, i int) string {
	var words []string
	for _, word := range strings.Fields(use)[1:] {
		if strings.HasPrefix(word, "-") {
			break
		}
		if word = strings.Trim(word, "[]"); !strings.HasPrefix(word, "-") {
			words = append(words, word)
		}
	}
	if last := len(words) - 1; last >= 0 && i > last && strings.HasSuffix(words[last], "...") {
		return words[last]
	}
	if i >= len(words) {
		return ""
	}
	return words[i]
}

// volumeNames are the names of recorded volumes that begin as typed and are not among the arguments yet. Who may not read the
// records is given none: a completion says nothing of errors.
func volumeNames(opts *globalOptions, args []string, typed string) []cobra.Completion {
	cfg, err := agent.LoadConfig(opts.config)
	if err != nil {
		return nil
	}
	volumes, err := agent.RecordedVolumes(cfg)
	if err != nil {
		return nil
	}
	var names []cobra.Completion
	for _, v := range volumes {
		own := []string{v.MountPoint, v.Identity, v.UUID}
		if slices.ContainsFunc(args, func(arg string) bool { return slices.Contains(own, arg) }) {
			continue
		}
		about := []string{
			fmt.Sprintf("%s, %s, %s", v.Identity, size(v.Size), v.Filesystem),
			fmt.Sprintf("%s, %s, %s", v.MountPoint, size(v.Size), v.Filesystem),
			fmt.Sprintf("%s, %s", v.MountPoint, v.Identity),
		}
		for i, name := range own {
			if name != "" && strings.HasPrefix(name, typed) {
				names = append(names, cobra.CompletionWithDesc(name, about[i]))
			}
		}
	}
	return names
}
