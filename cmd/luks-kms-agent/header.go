package main

import "github.com/spf13/cobra"

func newHeader(opts *globalOptions) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "header",
		Short: "Back up and restore LUKS headers",
		Long: `Back up and restore LUKS headers. A volume whose two header copies are destroyed is
lost for good without a backup: the volume key is nowhere else.`,
		Example: `  sudo luks-kms-agent header backup --to /root/headers
  sudo luks-kms-agent header restore /root/headers/vol-01.header.tar --yes`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newHeaderBackup(opts), newHeaderRestore(opts))
	return cmd
}
