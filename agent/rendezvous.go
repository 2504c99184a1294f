package agent

import (
	"sync"
	"time"
)

// longestWait is how long a volume that could be used waits for others: more than unsealing 24 of them takes on two slow
// processors, and not long for a person who waits because one disk does not answer.
const longestWait = 3 * time.Second

// A rendezvous has volumes go live at the same time that are opened at the same time, under one key. With each that does, udev starts
// programs to look at it, and they take the processors from the volumes that are still being unsealed.
type rendezvous struct{ busy sync.WaitGroup }

// A place is that of one volume in it.
type place struct {
	at    *rendezvous
	leave func() // when its table is loaded, or it failed; again does nothing
}

func (r *rendezvous) enter() place {
	r.busy.Add(1)
	return place{r, sync.OnceFunc(r.busy.Done)}
}

// wait leaves, and returns when all have left, or after the limit.
func (p place) wait(limit time.Duration) {
	p.leave()
	all := make(chan struct{})
	go func() {
		defer close(all)
		p.at.busy.Wait()
	}()
	select {
	case <-all:
	case <-time.After(limit):
	}
}

// places has one for each volume that the plan unlocks, by its UUID.
func places(p Plan) map[string]place {
	places, byKey := map[string]place{}, map[string]*rendezvous{}
	for _, act := range p.Actions {
		if act.Verb != Unlock {
			continue
		}
		r := byKey[act.Volume.KeyID]
		if r == nil {
			r = &rendezvous{}
			byKey[act.Volume.KeyID] = r
		}
		places[act.Volume.UUID] = r.enter()
	}
	return places
}
