// Command aws stands for the AWS CLI in the stories, where the real one cannot be had on every machine. It has what the project's
// documents use, reads the environment as the real one does, and is strict: what it does not know fails, as a usage error of the
// real one does (exit code 252).
//
//	aws kms decrypt --key-id K --ciphertext-blob fileb://FILE --query Plaintext --output text
//	aws kms describe-key --key-id K --query KeyMetadata.KeyState --output text
//	aws kms enable-key --key-id K
//	aws kms cancel-key-deletion --key-id K --query KeyId --output text
//
// AWS_ENDPOINT_URL_KMS, AWS_REGION or AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// Exit codes of the AWS CLI, version 2 (its user guide, "Return codes").
const (
	exitUsage         = 252 // a command line that cannot be parsed, or is not one
	exitConfiguration = 253 // no region or no credentials
	exitService       = 254 // the service answered with an error
	exitGeneral       = 255
)

func main() {
	err := run(context.Background(), os.Args[1:], os.Getenv, os.Stdout)
	if err == nil {
		return
	}
	code := exitGeneral
	var exit *exitError
	var service interface{ ErrorCode() string }
	switch {
	case errors.As(err, &exit):
		code = exit.code
	case errors.As(err, &service):
		code = exitService
	}
	fmt.Fprintf(os.Stderr, "\n%v\n", err)
	os.Exit(code)
}

// exitError is a failure with an exit code of its own.
type exitError struct {
	code int
	text string
}

func (e *exitError) Error() string { return e.text }

func usage(format string, args ...any) error {
	return &exitError{exitUsage, "usage: aws [options] <command> <subcommand> [<subcommand> ...] [parameters]\n\naws: error: " + fmt.Sprintf(format, args...)}
}

// command is one that the documents use. Its options are all required: in the documents they are all there.
type command struct {
	options []string
	query   string // the only one
	call    func(context.Context, *kms.Client, map[string]string) (string, error)
}

func commands() map[string]command {
	return map[string]command{
		"decrypt": {[]string{"--key-id", "--ciphertext-blob"}, "Plaintext",
			func(ctx context.Context, c *kms.Client, o map[string]string) (string, error) {
				file, ok := strings.CutPrefix(o["--ciphertext-blob"], "fileb://")
				if !ok {
					// The real one takes it for base64.
					return "", &exitError{exitGeneral, "Invalid base64: \"" + o["--ciphertext-blob"] + "\""}
				}
				blob, err := os.ReadFile(file)
				if err != nil {
					return "", &exitError{exitUsage, fmt.Sprintf("Error parsing parameter '--ciphertext-blob': Unable to load paramfile fileb://%s: %v", file, err)}
				}
				out, err := c.Decrypt(ctx, &kms.DecryptInput{KeyId: aws.String(o["--key-id"]), CiphertextBlob: blob})
				if err != nil {
					return "", err
				}
				return base64.StdEncoding.EncodeToString(out.Plaintext), nil
			}},
		"describe-key": {[]string{"--key-id"}, "KeyMetadata.KeyState",
			func(ctx context.Context, c *kms.Client, o map[string]string) (string, error) {
				out, err := c.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String(o["--key-id"])})
				if err != nil {
					return "", err
				}
				return string(out.KeyMetadata.KeyState), nil
			}},
		"enable-key": {[]string{"--key-id"}, "",
			func(ctx context.Context, c *kms.Client, o map[string]string) (string, error) {
				_, err := c.EnableKey(ctx, &kms.EnableKeyInput{KeyId: aws.String(o["--key-id"])})
				return "", err
			}},
		"cancel-key-deletion": {[]string{"--key-id"}, "KeyId",
			func(ctx context.Context, c *kms.Client, o map[string]string) (string, error) {
				out, err := c.CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: aws.String(o["--key-id"])})
				if err != nil {
					return "", err
				}
				return aws.ToString(out.KeyId), nil
			}},
	}
}

func run(ctx context.Context, args []string, env func(string) string, stdout io.Writer) error {
	if len(args) < 2 || args[0] != "kms" {
		return usage("argument command: only kms is here, the arguments are %q", args)
	}
	cmd, ok := commands()[args[1]]
	if !ok {
		return usage("argument operation: Invalid choice: %q", args[1])
	}
	options, err := parse(cmd, args[2:])
	if err != nil {
		return err
	}
	client, err := connect(env)
	if err != nil {
		return err
	}
	text, err := cmd.call(ctx, client, options)
	if err != nil {
		return fmt.Errorf("cannot %s: %w", args[1], err)
	}
	if text != "" {
		_, err = fmt.Fprintln(stdout, text)
	}
	return err
}

// parse reads options with their values. A command that prints must be asked for the one value, as text: what the real one prints
// otherwise is not made up here.
func parse(cmd command, args []string) (map[string]string, error) {
	required := append([]string(nil), cmd.options...)
	if cmd.query != "" {
		required = append(required, "--query", "--output")
	}
	known := strings.Join(required, " ") + " "
	options := map[string]string{}
	for len(args) > 0 {
		name := args[0]
		if !strings.HasPrefix(name, "--") || !strings.Contains(known, name+" ") {
			return nil, usage("Unknown options: %s", name)
		}
		if len(args) == 1 || strings.HasPrefix(args[1], "--") || args[1] == "" {
			return nil, usage("argument %s: expected one argument", name)
		}
		if _, twice := options[name]; twice {
			return nil, usage("argument %s: given twice", name)
		}
		options[name], args = args[1], args[2:]
	}
	for _, name := range required {
		if options[name] == "" {
			return nil, usage("the following arguments are required: %s", name)
		}
	}
	if cmd.query != "" && (options["--query"] != cmd.query || options["--output"] != "text") {
		return nil, usage("only --query %s --output text is here", cmd.query)
	}
	return options, nil
}

func connect(env func(string) string) (*kms.Client, error) {
	region := env("AWS_REGION")
	if region == "" {
		region = env("AWS_DEFAULT_REGION")
	}
	if region == "" {
		return nil, &exitError{exitConfiguration, `You must specify a region. You can also configure your region by running "aws configure".`}
	}
	id, secret := env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY")
	if id == "" || secret == "" {
		return nil, &exitError{exitConfiguration, `Unable to locate credentials. You can configure credentials by running "aws configure".`}
	}
	o := kms.Options{Region: region, Credentials: credentials.NewStaticCredentialsProvider(id, secret, env("AWS_SESSION_TOKEN"))}
	if endpoint := env("AWS_ENDPOINT_URL_KMS"); endpoint != "" {
		o.BaseEndpoint = aws.String(endpoint)
	}
	return kms.New(o), nil
}
