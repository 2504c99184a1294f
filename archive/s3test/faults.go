package s3test

import (
	"net/http"
	"time"
)

// Fault is an answer that S3 gives instead of its own, or how it gives its own.
type Fault struct {
	Op       string        // "PutObject", …; "" is every operation
	Code     string        // error code; Status is 400 unless given. 200 is an error in a good answer, as some operations give it
	Status   int           // HTTP status; without Code an empty or Body answer
	Body     string        // sent as it is, instead of Code
	Hang     bool          // no answer until the client goes away
	Cut      bool          // the connection is closed before the request's body is read, and nothing is done
	CutAfter int64         // bytes of the answer's body after which the connection is closed
	Lost     bool          // it is done, and then the connection is closed without an answer
	Delay    time.Duration // before whatever follows
	Slow     int           // bytes of the answer's body in a second
	Times    int           // how often; 0 is for ever
}

// Fail adds a fault. Faults apply in the order in which they were added, each as often as it says.
func (s *S3) Fail(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, &f)
}

// Heal takes all faults and denials away, and makes the server honest and its clock right. Whom it trusts stays.
func (s *S3) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults, s.denied, s.mode, s.ahead = nil, map[string]bool{}, Honest, 0
}

// fault returns the fault that applies to a call of op and uses it up. The caller has locked.
func (s *S3) fault(op string) Fault {
	for i, f := range s.faults {
		if f.Op != "" && f.Op != op {
			continue
		}
		if f.Times == 1 {
			s.faults = append(s.faults[:i:i], s.faults[i+1:]...)
		} else if f.Times > 1 {
			f.Times--
		}
		return *f
	}
	return Fault{}
}

// wait reports whether the client is still there after it.
func (s *S3) wait(r *http.Request, d time.Duration) bool {
	if d == 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.Context().Done():
	case <-s.ctx.Done():
	}
	return false
}

func (s *S3) hang(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-s.ctx.Done():
	}
}

// write writes at so many bytes a second, 0 for no limit.
func (s *S3) write(w http.ResponseWriter, r *http.Request, body []byte, rate int) {
	step := len(body)
	if rate > 0 {
		step = max(rate/20, 1)
	}
	for len(body) > 0 {
		n := min(step, len(body))
		if _, err := w.Write(body[:n]); err != nil {
			return
		}
		if body = body[n:]; rate > 0 {
			_ = http.NewResponseController(w).Flush()
			if !s.wait(r, time.Duration(n)*time.Second/time.Duration(rate)) {
				return
			}
		}
	}
}

// cut closes the connection of a request.
func cut(w http.ResponseWriter) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		_ = conn.Close()
	}
}
