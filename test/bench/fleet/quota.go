package main

import (
	"encoding/json"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"
)

// bucket is a request quota: it fills at a rate, holds no more than so many tokens, and is full at the start. A request that
// finds it empty costs nothing: of KMS it is only said that requests above the quota are refused.
// https://docs.aws.amazon.com/kms/latest/developerguide/throttling.html
type bucket struct {
	rate  float64 // tokens per second
	size  float64 // tokens
	level float64
	last  time.Duration
}

func newBucket(rate float64, burst time.Duration) *bucket {
	// Where less than one token fits, nothing would ever be served.
	size := max(1, rate*burst.Seconds())
	return &bucket{rate: rate, size: size, level: size}
}

// take says whether a request at that moment is within the quota. Moments do not go back.
func (b *bucket) take(at time.Duration) bool {
	b.level = min(b.size, b.level+b.rate*(at-b.last).Seconds())
	b.last = at
	if b.level < 1 {
		return false
	}
	b.level--
	return true
}

// quota stands before a KMS and refuses what is above its account's quota, as KMS does.
type quota struct {
	kms   http.Handler
	start time.Time

	mu      sync.Mutex
	bucket  *bucket
	refused int
}

func (q *quota) take() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.bucket.take(time.Since(q.start)) {
		return true
	}
	q.refused++
	return false
}

func (q *quota) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	closeAfter(w)
	if q.take() {
		q.kms.ServeHTTP(w, r)
		return
	}
	_, _ = io.Copy(io.Discard, r.Body)
	w.Header().Set("X-Amzn-RequestId", uuid.NewString())
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.WriteHeader(http.StatusBadRequest)
	_ = json.NewEncoder(w).Encode(map[string]string{
		"__type":  "ThrottlingException",
		"message": "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.",
	})
}

// closeAfter ends the connection with this answer. A node keeps its own for 90 s, and both ends of all of them are open
// files of this one process.
func closeAfter(w http.ResponseWriter) { w.Header().Set("Connection", "close") }
