package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

// globalOptions are the flags that every command takes.
type globalOptions struct {
	config    string
	logLevel  string // "": warn; under systemd and with verbose info
	logFormat string
	verbose   bool
	progress  *progress // nil where nobody watches
	command   string    // that runs, as it was named: for the audit log
}

const rootLong = `luks-kms-agent encrypts the data volumes of an EC2 node with LUKS2 under a data
key from AWS KMS. At first boot it formats what is proven blank; at every boot it
opens and mounts what it formatted. It never touches the boot volume.`

func newRoot(p *progress) *cobra.Command {
	opts := &globalOptions{progress: p}
	root := &cobra.Command{
		Use:     "luks-kms-agent",
		Short:   "Encrypt a node's data volumes under a KMS key",
		Long:    rootLong,
		Version: version,
		Example: `  # What would be done with each disk, and why; changes nothing
  sudo luks-kms-agent plan

  # How the last run went, and how the volumes are now
  sudo luks-kms-agent status`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRun: func(cmd *cobra.Command, _ []string) {
			opts.command = strings.TrimPrefix(cmd.CommandPath(), "luks-kms-agent ")
		},
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(flagError)
	root.SetHelpFunc(printHelp)
	root.SetUsageFunc(func(cmd *cobra.Command) error { printUsage(cmd.OutOrStderr(), cmd); return nil })
	root.SetHelpCommand(newHelp())
	flags := root.PersistentFlags()
	flags.StringVar(&opts.config, "config", agent.DefaultConfigPath, "configuration `file`")
	flags.Var(newChoice(&opts.logLevel, "", "debug", "info", "warn", "error"), "log-level",
		"log from this `level` on: debug, info, warn, error (default warn; under systemd info)")
	flags.Var(newChoice(&opts.logFormat, "console", "console", "json"), "log-format", "log as `format`: console, json")
	flags.BoolVarP(&opts.verbose, "verbose", "v", false, "log each step, as --log-level info")
	root.AddCommand(
		newRun(opts),
		newStripe(opts),
		newPreflight(opts),
		newPlan(opts),
		newStatus(opts),
		newTimeline(agent.DefaultTimelinePath),
		newUnlock(opts),
		newLock(opts),
		newRotate(opts),
		newRewrap(opts),
		newRecoveryKey(opts),
		newHeader(opts),
		newEscrow(opts),
		newLogs(opts),
		newVerify(opts),
		newWipe(opts),
		newSealImage(opts),
		newInspect(),
		newImportEMR(),
		newVersion(),
		newCompletion(),
		newMan(),
	)
	finish(root, opts)
	return root
}

// execute runs one command line and returns its exit code.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	p := newProgress(stderr)
	root := newRoot(p)
	root.SetArgs(args)
	root.SetOut(p.over(stdout))
	root.SetErr(p.over(stderr))
	err := root.ExecuteContext(ctx)
	p.stop()
	if err == nil {
		return exitOK
	}
	printError(stderr, err)
	return exitCode(err)
}

// usageError is a command line that cannot be understood.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// args makes cobra's argument checks usage errors.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		err := check(cmd, args)
		if err == nil {
			return nil
		}
		if cmd.HasSubCommands() && len(args) > 0 {
			err = didYouMean(err, cmd.SuggestionsFor(args[0]), "")
		}
		return &usageError{err}
	}
}

// node loads the configuration and joins the rooms.
func (o *globalOptions) node(stderr io.Writer) (*agent.Node, error) {
	log, err := o.logger(stderr)
	if err != nil {
		return nil, err
	}
	return o.nodeWith(log, nil)
}

// keyNode is node for commands that read data keys: it protects the process's memory
// first. change, where not nil, is what the command line says of the configuration.
func (o *globalOptions) keyNode(stderr io.Writer, change func(*agent.Config)) (*agent.Node, error) {
	log, err := o.logger(stderr)
	if err != nil {
		return nil, err
	}
	// Where that is not allowed the node has to come up all the same; the keys themselves are in pages of their own.
	if err := keycache.ProtectMemory(); err != nil {
		log.Warn("copies of keys may be swapped or dumped while this runs", zap.Error(err))
	}
	return o.nodeWith(log, change)
}

func (o *globalOptions) nodeWith(log *zap.Logger, change func(*agent.Config)) (*agent.Node, error) {
	cfg, err := agent.LoadConfig(o.config)
	if err != nil {
		return nil, err
	}
	if change != nil {
		change(&cfg)
	}
	node, err := agent.New(cfg, log, o.program())
	if err != nil {
		return nil, err
	}
	if o.progress != nil {
		node.Progress = o.progress.tell
	}
	return node, nil
}

func (o *globalOptions) program() agent.Program {
	return agent.Program{Version: version, Command: o.command, ExitCode: func(errs []error) int { return exitCode(failures(errs)) }}
}

// logger writes to stderr, where journald takes it from. By hand only warnings
// are logged: the command's own output tells the rest.
func (o *globalOptions) logger(stderr io.Writer) (*zap.Logger, error) {
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.ISO8601TimeEncoder
	enc.EncodeDuration = zapcore.StringDurationEncoder
	enc.EncodeLevel = zapcore.LowercaseLevelEncoder
	underSystemd := os.Getenv("INVOCATION_ID") != ""
	if underSystemd && o.logFormat != "json" {
		enc.TimeKey = "" // journald has the time
	}
	enc.ConsoleSeparator = " "
	encoder := zapcore.NewConsoleEncoder(enc)
	if o.logFormat == "json" {
		encoder = zapcore.NewJSONEncoder(enc)
	}
	level := zapcore.WarnLevel
	if o.verbose || underSystemd {
		level = zapcore.InfoLevel
	}
	if o.logLevel != "" {
		var err error
		if level, err = zapcore.ParseLevel(o.logLevel); err != nil {
			return nil, &usageError{err}
		}
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.AddSync(stderr), level)), nil
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printError tells what failed, why, and what to do next, each cause once.
func printError(w io.Writer, err error) {
	var failed *failedError
	if !errors.As(err, &failed) {
		printOne(w, err)
		return
	}
	// A cause that many volumes share is told once.
	told := map[string]bool{}
	for _, e := range failed.errs {
		if text := e.Error(); !told[text] {
			told[text] = true
			printOne(w, e)
		}
	}
}

func printOne(w io.Writer, err error) {
	fmt.Fprintf(w, "luks-kms-agent: %v\n", err)
	if h := hint(err); h != "" {
		fmt.Fprintf(w, "  -> %s\n", h)
	}
}
