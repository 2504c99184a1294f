package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

// globalOptions are the flags that every command takes.
type globalOptions struct {
	config    string
	logFormat string
	verbose   bool
}

const rootLong = `luks-kms-agent encrypts the data volumes of an EC2 node with LUKS2 under a data
key from AWS KMS. At first boot it formats what is proven blank; at every boot it
opens and mounts what it formatted. It never touches the boot volume.

Exit codes:
  0  all as planned
  1  internal error
  2  usage or configuration
  3  a volume was refused
  4  KMS said no (permissions, key state, key kind)
  5  KMS, IMDS or the records are unavailable for now: try again
  6  device or filesystem error
  7  tampered or damaged LUKS header
  8  a needed program or kernel feature is missing`

func newRoot() *cobra.Command {
	opts := &globalOptions{}
	root := &cobra.Command{
		Use:           "luks-kms-agent",
		Short:         "Encrypt a node's data volumes under a KMS key",
		Long:          rootLong,
		Version:       version,
		Args:          args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	flags := root.PersistentFlags()
	flags.StringVar(&opts.config, "config", agent.DefaultConfigPath, "configuration `file`")
	flags.StringVar(&opts.logFormat, "log-format", "console", "log as `console` or json")
	flags.BoolVarP(&opts.verbose, "verbose", "v", false, "log each step (always so under systemd)")
	root.AddCommand(
		newRun(opts), newPlan(opts), newStatus(opts), newUnlock(opts), newLock(opts), newRewrap(opts), newRecoveryKey(opts), newInspect(), newVersion(),
	)
	return root
}

// execute runs one command line and returns its exit code.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
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
		if err := check(cmd, args); err != nil {
			return &usageError{err}
		}
		return nil
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
	return agent.New(cfg, log)
}

// logger writes to stderr, where journald takes it from. By hand only warnings
// are logged: the command's own output tells the rest.
func (o *globalOptions) logger(stderr io.Writer) (*zap.Logger, error) {
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.ISO8601TimeEncoder
	enc.EncodeDuration = zapcore.StringDurationEncoder
	enc.EncodeLevel = zapcore.LowercaseLevelEncoder
	var encoder zapcore.Encoder
	underSystemd := os.Getenv("INVOCATION_ID") != ""
	switch o.logFormat {
	case "console":
		if underSystemd {
			enc.TimeKey = "" // journald has the time
		}
		enc.ConsoleSeparator = " "
		encoder = zapcore.NewConsoleEncoder(enc)
	case "json":
		encoder = zapcore.NewJSONEncoder(enc)
	default:
		return nil, &usageError{fmt.Errorf("unknown log format %q (allowed: console, json)", o.logFormat)}
	}
	level := zapcore.WarnLevel
	if o.verbose || underSystemd {
		level = zapcore.InfoLevel
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
