package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// patience is how long a command works before it says at what.
const patience = time.Second

// progress is one line on a terminal that says what a command is doing, for as long as nothing else is printed. A nil one, of a
// program or a journal that reads, says nothing.
type progress struct {
	w   io.Writer
	now func() time.Time

	mu           sync.Mutex
	begun, since time.Time // of the command's work, and of what it is doing now
	text         string
	drawn        bool
	done         chan struct{} // ends the redrawing; nil before there is any
}

// newProgress is nil where w is no terminal.
func newProgress(w io.Writer) *progress {
	if !screenOf(w).terminal {
		return nil
	}
	return &progress{w: w, now: time.Now}
}

// tell says what the command is doing from now on. It may be called from several goroutines.
func (p *progress) tell(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text, p.since = clean(text), p.now()
	if p.begun.IsZero() {
		p.begun = p.since
	}
	if p.done == nil {
		p.done = make(chan struct{})
		go p.redraw(p.done)
	}
}

func (p *progress) redraw(done chan struct{}) {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			p.mu.Lock()
			p.draw()
			p.mu.Unlock()
		}
	}
}

// draw writes the line over the last one. The caller holds mu.
func (p *progress) draw() {
	now := p.now()
	if p.text == "" || now.Sub(p.begun) < patience {
		return
	}
	took := ""
	if s := int(now.Sub(p.since).Seconds()); s > 0 {
		took = fmt.Sprintf(" %d s", s)
	}
	line := p.text + " …"
	if room := screenOf(p.w).width - 1 - len(took); utf8.RuneCountInString(line) > room {
		line = strings.TrimRight(string([]rune(line)[:max(0, room-2)]), " ") + " …"
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s%s", line, took)
	p.drawn = true
}

// clear takes the line away, until something is told again. The caller holds mu.
func (p *progress) clear() {
	if p.drawn {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	p.text, p.drawn = "", false
}

// stop takes the line away and ends the redrawing.
func (p *progress) stop() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	if p.done != nil {
		close(p.done)
		p.done = nil
	}
}

// over returns a writer that takes the line away before anything is written to w.
func (p *progress) over(w io.Writer) io.Writer {
	if p == nil {
		return w
	}
	return overProgress{w, p}
}

type overProgress struct {
	io.Writer
	p *progress
}

func (o overProgress) Write(b []byte) (int, error) {
	o.p.mu.Lock()
	defer o.p.mu.Unlock()
	o.p.clear()
	return o.Writer.Write(b)
}

// Fd is that of the writer below, for screenOf.
func (o overProgress) Fd() uintptr {
	if f, ok := o.Writer.(interface{ Fd() uintptr }); ok {
		return f.Fd()
	}
	return ^uintptr(0)
}
