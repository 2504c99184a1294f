// Command luks-kms-agent encrypts an EC2 node's data volumes with LUKS2 under a
// data key from AWS KMS, and opens and mounts them at every boot. Each command
// has a file of its own; what is decided is decided in package agent.
package main

import (
	"context"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// version is set by the linker from `git describe`.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
