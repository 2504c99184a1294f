package harness

import (
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
)

// Tell tells a story outside of a test, in a program of that name: what it logs is printed. It returns whether nothing failed. An
// interrupt ends the program, and cleans up before.
func Tell(name string, story func(TB)) bool {
	t := &teller{name: name}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupted)
	go func() {
		if _, ok := <-interrupted; ok {
			fmt.Println(name + ": interrupted")
			t.cleanUp()
			os.Exit(130)
		}
	}()
	func() {
		defer func() {
			if cause := recover(); cause != nil {
				if _, ok := cause.(failure); !ok {
					t.Errorf("panic: %v", cause)
				}
			}
		}()
		story(t)
	}()
	t.cleanUp()
	return !t.Failed()
}

// failure ends a story.
type failure struct{}

// teller is the TB of a program.
type teller struct {
	name     string
	mu       sync.Mutex
	failed   bool
	cleanups []func()
}

func (t *teller) cleanUp() {
	t.mu.Lock()
	cleanups := t.cleanups
	t.cleanups = nil
	t.mu.Unlock()
	for _, cleanup := range slices.Backward(cleanups) {
		cleanup()
	}
}

func (t *teller) Helper()                         {}
func (t *teller) Name() string                    { return t.name }
func (t *teller) Logf(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func (t *teller) Errorf(format string, args ...any) {
	fmt.Printf(t.name+": "+format+"\n", args...)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed = true
}

func (t *teller) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	panic(failure{})
}

func (t *teller) Failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failed
}

func (t *teller) Cleanup(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cleanups = append(t.cleanups, f)
}
