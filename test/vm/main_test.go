//go:build vm

// Package vm_test has the stories: what a node goes through, told with the verbs of package harness. They need no root,
// run under emulation, and are kept out of `go test ./...` by the build tag vm.
package vm_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// assets are shared by all stories: made before the first, gone after the last.
var assets *harness.Assets

var (
	atOnce = flag.Int("at-once", 2, "how many stories work at a time: one for each processor")
	// Emulating two takes a quarter more of the host's time for the same story. Those about what happens at the same time have two, by atTheSameTime.
	processors = flag.Int("processors", 1, "how many a node has where its story does not say")
)

// atTheSameTime gives a node two processors.
func atTheSameTime(n *harness.Node) { n.Processors = 2 }

// places has room for the stories that work at a time. go test's own -parallel has to be more than -at-once: a story that only
// waits for time to pass takes no place.
var places chan struct{}

// parallel makes a story one of those that run beside others, and returns once there is a place for it. A story that goes on in
// parallel subtests, which take places of their own, gives up its own by leave before them; others have it until their end.
func parallel(t *testing.T) (leave func()) {
	t.Helper()
	t.Parallel()
	places <- struct{}{}
	begun := time.Now() // go test's own figure has the wait for the place in it
	leave = sync.OnceFunc(func() {
		<-places
		t.Logf("at work for %v", time.Since(begun).Round(time.Second))
	})
	t.Cleanup(leave)
	return leave
}

func TestMain(m *testing.M) {
	flag.Parse()
	places = make(chan struct{}, *atOnce)
	var err error
	if assets, err = harness.Prepare(context.Background(), harness.Announce(os.Stdout)); err != nil {
		fmt.Fprintln(os.Stderr, "cannot prepare the stories:", err)
		os.Exit(1)
	}
	assets.Processors = *processors
	code := m.Run()
	if err := assets.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}
