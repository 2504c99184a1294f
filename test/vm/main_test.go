//go:build vm

// Package vm_test has the stories: what a node goes through, told with the verbs of package harness. They need no root,
// run under emulation, and are kept out of `go test ./...` by the build tag vm.
package vm_test

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// assets are shared by all stories: made before the first, gone after the last.
var assets *harness.Assets

func TestMain(m *testing.M) {
	var err error
	if assets, err = harness.Prepare(context.Background(), harness.Announce(os.Stdout)); err != nil {
		fmt.Fprintln(os.Stderr, "cannot prepare the stories:", err)
		os.Exit(1)
	}
	code := m.Run()
	if err := assets.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}
