// Command prepare installs and builds everything that the stories need, so that the first of them does not have to: run
// from the tree, as `go run ./test/vm/prepare`.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

func main() {
	assets, err := harness.Prepare(context.Background(), harness.Announce(os.Stdout))
	if err == nil {
		err = assets.Close()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "prepare:", err)
		os.Exit(1)
	}
}
