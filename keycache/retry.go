package keycache

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	// defaultCallTimeout and defaultRetryLimit stand for a zero in Options.
	defaultCallTimeout = 10 * time.Second
	defaultRetryLimit  = 10 * time.Minute

	// backoffBase doubles with each attempt up to backoffCap; the wait is
	// uniform between 0 and that ("full jitter"). The cap is the SDK's own
	// (retry.DefaultMaxBackoff); the base is ours: one node behind a blip should
	// not wait for seconds.
	backoffBase = 200 * time.Millisecond
	backoffCap  = 20 * time.Second

	// Throttling is another matter: KMS is well and serves others meanwhile, and
	// in a fleet that boots at once every early try takes the place of somebody
	// else's. The wait is uniform between half of throttledWindow and all of it,
	// for the first throttledTries refusals (about a minute) alike: windows that
	// grow leave the quota idle in the end, while the last nodes sit out a long
	// wait. What lasts longer is no fleet that boots: then the window is
	// backoffCap. Measured by test/bench/fleet; docs/benchmarks-fleet.md.
	throttledWindow = 6 * time.Second
	throttledTries  = 13
)

// Retry tells that a call failed in a way that may pass, and that it will be
// tried again after Wait.
type Retry struct {
	Op      string        // "GenerateDataKey", "Decrypt", "DescribeKey", "Identity" or "Ephemeral"
	Attempt int           // the attempt that failed, from 1
	Wait    time.Duration // until the next one
	Err     error         // an *Error
	Elapsed time.Duration // since the call's first attempt
	Limit   time.Duration // Options.RetryLimit: how long attempts are made
}

// Attempt is one try of a call, when it has ended.
type Attempt struct {
	Op     string // as in Retry; or "Credentials", the role's, which are read inside the attempt that needs them
	Number int    // of this call, from 1
	Start  time.Time
	Took   time.Duration
	Err    error
}

// clock is time and chance, for tests.
type clock struct {
	now    func() time.Time
	sleep  func(context.Context, time.Duration) error
	random func(n int64) int64 // uniform in [0, n)
}

func realClock() clock {
	return clock{now: time.Now, sleep: sleep, random: rand.Int64N}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// backoff is the wait after the given attempt, from 1.
func (c clock) backoff(attempt int) time.Duration {
	ceiling := backoffCap
	// 7 doublings pass the cap; more would overflow.
	if attempt < 8 {
		ceiling = min(backoffBase<<(attempt-1), backoffCap)
	}
	return time.Duration(c.random(int64(ceiling) + 1))
}

// throttledBackoff is the wait after the given number of refusals, from 1.
func (c clock) throttledBackoff(refusals int) time.Duration {
	window := throttledWindow
	if refusals > throttledTries {
		window = backoffCap
	}
	return window/2 + time.Duration(c.random(int64(window/2)+1))
}

// retry calls f, each time with its own deadline, until it succeeds, fails for
// good, the limit since start is reached, or ctx ends. The last wait is cut so
// that one more attempt falls on the limit.
func (c *Client) retry(ctx context.Context, start time.Time, op, object string, f func(context.Context) error) error {
	refusals := 0 // attempts that were throttled
	for attempt := 1; ; attempt++ {
		err := c.attempt(ctx, op, attempt, f)
		if err == nil {
			return nil
		}
		e := classify(op, object, err)
		if ctx.Err() != nil {
			// What the caller ended is no judgement of KMS: keep what was
			// wrong, and let errors.Is find the end.
			e.Err = joinContext(e.Err, ctx.Err())
			return e
		}
		if !e.Retryable() {
			return e
		}
		elapsed := c.clock.now().Sub(start)
		if c.limit < 0 || elapsed >= c.limit {
			return e
		}
		wait := c.clock.backoff(attempt)
		if e.throttled() {
			refusals++
			wait = c.clock.throttledBackoff(refusals)
		}
		wait = min(wait, c.limit-elapsed)
		c.note(func(calls *Calls) {
			calls.Retries++
			if calls.RetriesOf == nil {
				calls.RetriesOf = map[string]int{}
			}
			calls.RetriesOf[op]++
		})
		if c.options.OnRetry != nil {
			c.options.OnRetry(Retry{Op: op, Attempt: attempt, Wait: wait, Err: e, Elapsed: elapsed, Limit: c.limit})
		}
		if err := c.clock.sleep(ctx, wait); err != nil {
			e.Err = joinContext(e.Err, err)
			return e
		}
	}
}

func (c *Client) attempt(ctx context.Context, op string, number int, f func(context.Context) error) (err error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	if c.options.OnAttempt != nil {
		start := c.clock.now()
		defer func() {
			c.options.OnAttempt(Attempt{Op: op, Number: number, Start: start, Took: c.clock.now().Sub(start), Err: err})
		}()
	}
	return f(ctx)
}
