// Command prepare installs and builds everything that the stories need, so that the first of them does not have to: run
// from the tree, as `go run ./test/vm/prepare`.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

func main() {
	ctx, step := context.Background(), harness.Announce(os.Stdout)
	assets, err := harness.Prepare(ctx, step)
	if err == nil {
		_, err = assets.Userland(ctx, step, harness.Trixie)
		err = errors.Join(err, assets.Close())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "prepare:", err)
		os.Exit(1)
	}
}
