package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
)

// fleet is what boots, and against which quota.
type fleet struct {
	nodes int
	quota float64       // Decrypt requests per second that KMS serves the nodes
	boot  time.Duration // in which they boot, each at a moment of its own
	burst time.Duration // of quota that a KMS that was idle serves at once
	seed  uint64        // of the moments
}

// outcome is what became of a fleet.
type outcome struct {
	fleet
	ready    time.Duration // from the start until the last node had its key
	median   time.Duration // from a node's boot until it had its key
	worst    time.Duration
	requests int // Decrypt requests of all nodes
	most     int // of one node
	refused  int // that KMS throttled
	least    int // that no backoff can do without, see leastRequests
	failed   int // nodes that gave up
	other    int // failures that were no throttling: the machine, not the quota
	// late is the longest time from a node's boot to KMS's first answer, of whatever kind. It is the machine's: where
	// it is not small beside boot, the arrivals were slower than they should have been.
	late time.Duration
}

// ideal is when all could be ready at the earliest, but for the burst.
func (f fleet) ideal() time.Duration { return max(f.boot, f.drain()) }

// drain is nodes / quota.
func (f fleet) drain() time.Duration {
	return time.Duration(float64(f.nodes) / f.quota * float64(time.Second))
}

// moments are when the nodes boot, in order.
func (f fleet) moments() []time.Duration {
	random := mathrand.New(mathrand.NewPCG(f.seed, f.seed))
	at := make([]time.Duration, f.nodes)
	for i := range at {
		at[i] = time.Duration(random.Int64N(int64(f.boot)))
	}
	slices.Sort(at)
	return at
}

// leastRequests is a lower bound of the requests until all are ready. A node's first request cannot be held back: it
// knows nothing of the others. Of those, as many are served as the quota allows; every other one is lost, and its node
// needs one more at least. Other requests could only take away from what is served. It is reckoned from the moments at
// which the nodes should boot: on a machine that is late they may need a little less.
func (f fleet) leastRequests() int {
	b := newBucket(f.quota, f.burst)
	n := f.nodes
	for _, at := range f.moments() {
		if !b.take(at) {
			n++
		}
	}
	return n
}

// node is what one node saw.
type node struct {
	took     time.Duration
	first    time.Duration // to KMS's first answer
	requests int
	other    int
	err      error
}

// run boots the fleet and returns when every node has its key or has given up. The servers are those of the tests, and belong
// to t.
func (f fleet) run(ctx context.Context, t testing.TB) (outcome, error) {
	imds := kmstest.NewIMDS(t)
	kms := kmstest.NewKMS(t)
	kms.Trust(imds)
	plaintext := make([]byte, 32)
	_, _ = rand.Read(plaintext) // never fails
	record := keycache.KeyRecord{KeyARN: kms.ARN(), WrappedKey: kms.Wrap(kms.ARN(), plaintext, nil)}

	q := &quota{kms: kms, bucket: newBucket(f.quota, f.burst), start: time.Now()}
	kmsURL, err := serve(t, q)
	if err != nil {
		return outcome{}, err
	}
	imdsURL, err := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/"+kmstest.Role) {
			closeAfter(w) // the credentials are the last thing that is read
		}
		imds.ServeHTTP(w, r)
	}))
	if err != nil {
		return outcome{}, err
	}

	nodes := make([]node, f.nodes)
	start := time.Now()
	var wg sync.WaitGroup
	for i, at := range f.moments() {
		wg.Go(func() {
			select {
			case <-time.After(time.Until(start.Add(at))):
			case <-ctx.Done():
			}
			nodes[i].open(ctx, start.Add(at), record, kmsURL, imdsURL)
		})
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return outcome{}, err
	}
	o := f.sum(nodes, time.Since(start))
	q.mu.Lock()
	defer q.mu.Unlock()
	o.refused = q.refused
	return o, nil
}

// open gets the key as an agent does at boot, which is at that moment.
func (n *node) open(ctx context.Context, boot time.Time, record keycache.KeyRecord, kmsURL, imdsURL string) {
	answered := func() {
		if n.first == 0 {
			n.first = time.Since(boot)
		}
	}
	client, err := keycache.New(keycache.Options{
		KeyID: record.KeyARN, KMSEndpoint: kmsURL, IMDSEndpoint: imdsURL,
		OnRetry: func(r keycache.Retry) {
			var e *keycache.Error
			if errors.As(r.Err, &e) && e.Code == "ThrottlingException" {
				answered()
			} else {
				n.other++
			}
		},
	})
	if err != nil {
		n.err = err
		return
	}
	key, err := client.Decrypt(ctx, record)
	n.took = time.Since(boot)
	n.requests = client.Calls().Decrypt
	if n.err = err; err == nil {
		answered()
		key.Wipe()
	}
}

func (f fleet) sum(nodes []node, ready time.Duration) outcome {
	o := outcome{fleet: f, ready: ready, least: f.leastRequests()}
	var took []time.Duration
	for _, n := range nodes {
		o.requests += n.requests
		o.most = max(o.most, n.requests)
		o.other += n.other
		o.late = max(o.late, n.first)
		took = append(took, n.took)
		if n.err != nil {
			o.failed++
		}
	}
	slices.Sort(took)
	o.median, o.worst = took[len(took)/2], took[len(took)-1]
	return o
}

// serve answers on a port of the loopback address and returns its URL.
func serve(t testing.TB, h http.Handler) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("cannot listen on loopback: %w", err)
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.Serve(l) }() // until it is closed
	t.Cleanup(func() { _ = s.Close() })
	return "http://" + l.Addr().String(), nil
}
