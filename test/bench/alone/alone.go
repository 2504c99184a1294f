// Package alone lets a program have servers that are made for tests: kmstest's and s3test's.
package alone

import (
	"errors"
	"fmt"
	"testing"
)

// owner stands for the test that the servers belong to.
type owner struct {
	testing.TB // never called but for what is here
	cleanups   []func()
	err        error
}

func (o *owner) Cleanup(f func()) { o.cleanups = append(o.cleanups, f) }

func (o *owner) Errorf(format string, args ...any) { o.err = fmt.Errorf(format, args...) }

// With calls f with servers that end with it. What they complain of is an error too.
func With(f func(testing.TB) error) error {
	o := &owner{}
	err := f(o)
	for i := len(o.cleanups) - 1; i >= 0; i-- {
		o.cleanups[i]()
	}
	return errors.Join(err, o.err)
}
