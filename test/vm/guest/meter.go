package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
)

// meter runs a command and writes what it cost the whole machine: also programs that systemd or udev started for it count.
func meter(file string, args []string) error {
	exits, err := watchExits()
	if err != nil {
		return err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	busy, err := busyTime()
	if err != nil {
		return err
	}
	lastMount, err := watchMounts()
	if err != nil {
		return err
	}
	begin := time.Now()
	failed := cmd.Run()
	cost := channel.Cost{Seconds: time.Since(begin).Seconds()}
	if last := lastMount(); !last.IsZero() {
		cost.MountedSeconds = last.Sub(begin).Seconds()
	}
	after, err := busyTime()
	if err != nil {
		return err
	}
	cost.CPUSeconds = (after - busy).Seconds()
	ended, err := exits()
	if err != nil {
		return err
	}
	cost.Processes = len(ended)
	cost.LargestKiB, cost.SumKiB = peaks(ended)
	b, err := json.Marshal(cost)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(file, b, 0o600), failed)
}

// watchMounts notes when something is mounted, until the function that it returns is called: it says when that was for the last time.
func watchMounts() (stop func() time.Time, err error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	count := func() int {
		_, _ = f.Seek(0, io.SeekStart)
		b, _ := io.ReadAll(f)
		return bytes.Count(b, []byte("\n"))
	}
	var last time.Time
	most := count()
	stopping, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		defer f.Close()
		for {
			// proc(5): a change of the mounts is an exceptional event.
			changed := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
			n, err := unix.Poll(changed, 50)
			now := time.Now()
			if err == nil && n > 0 {
				if c := count(); c > most {
					last, most = now, c
				}
				continue
			}
			select {
			case <-stopping:
				return
			default:
			}
		}
	}()
	return func() time.Time {
		close(stopping)
		<-done
		return last
	}, nil
}

// busyTime is what all processors together have worked since the boot.
func busyTime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	// cpu user nice system idle iowait irq softirq steal …, in ticks of 10 ms (proc(5)).
	var user, nice, system, idle, iowait, irq, softirq int64
	if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq); err != nil {
		return 0, fmt.Errorf("cannot read /proc/stat: %w", err)
	}
	return time.Duration(user+nice+system+irq+softirq) * 10 * time.Millisecond, nil
}

// process is one that has ended.
type process struct {
	start, end time.Time
	peakKiB    int64 // of its resident memory
}

// peaks are the largest process, and the most that processes that lived at the same time had, if each had its peak then.
func peaks(processes []process) (largest, sum int64) {
	for _, p := range processes {
		largest = max(largest, p.peakKiB)
		var together int64
		for _, other := range processes {
			if !other.start.After(p.start) && other.end.After(p.start) {
				together += other.peakKiB
			}
		}
		sum = max(sum, together)
	}
	return largest, sum
}

// The kernel's words for statistics of tasks that end: include/uapi/linux/genetlink.h and taskstats.h.
const (
	getFamily, familyID, familyName = 3, 1, 2 // CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME
	taskstatsGet, registerCPUs      = 1, 3    // TASKSTATS_CMD_GET, TASKSTATS_CMD_ATTR_REGISTER_CPUMASK
	aggregatePID, stats             = 4, 3    // TASKSTATS_TYPE_AGGR_PID, TASKSTATS_TYPE_STATS
	lastOfGroup                     = 0x20    // AGROUP, in ac_flag

	// Offsets in struct taskstats: ac_flag, ac_etime (µs), hiwater_rss (KiB).
	offFlag, offElapsed, offPeak, lenStats = 8, 144, 200, 208
)

// watchExits collects what the kernel says of each process that ends from now until the function that it returns is called.
func watchExits() (stop func() ([]process, error), err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, err
	}
	// A run may end hundreds.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}); err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	if err := generic(fd, unix.GENL_ID_CTRL, getFamily, familyName, "TASKSTATS"); err != nil {
		return nil, err
	}
	var family uint16
	err = receive(fd, func(attributes []byte) {
		each(attributes, func(kind uint16, value []byte) {
			if kind == familyID && len(value) >= 2 {
				family = binary.NativeEndian.Uint16(value)
			}
		})
	})
	if err != nil || family == 0 {
		return nil, fmt.Errorf("cannot find the kernel's taskstats (%v)", err)
	}
	possible, err := os.ReadFile("/sys/devices/system/cpu/possible")
	if err != nil {
		return nil, err
	}
	if err := generic(fd, family, taskstatsGet, registerCPUs, strings.TrimSpace(string(possible))); err != nil {
		return nil, err
	}

	var mu sync.Mutex
	var ended []process
	var failed error
	stopping, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		defer unix.Close(fd)
		for {
			err := receive(fd, func(attributes []byte) {
				now := time.Now()
				each(attributes, func(kind uint16, value []byte) {
					if kind != aggregatePID {
						return
					}
					each(value, func(kind uint16, s []byte) {
						if kind != stats || len(s) < lenStats || s[offFlag]&lastOfGroup == 0 {
							return
						}
						p := process{end: now, peakKiB: int64(binary.NativeEndian.Uint64(s[offPeak:]))}
						p.start = now.Add(-time.Duration(binary.NativeEndian.Uint64(s[offElapsed:])) * time.Microsecond)
						if p.peakKiB > 0 { // kernel threads have no memory
							mu.Lock()
							ended = append(ended, p)
							mu.Unlock()
						}
					})
				})
			})
			switch {
			case errors.Is(err, unix.EAGAIN):
				select {
				case <-stopping:
					return // nothing has come for a while
				default:
				}
			case err != nil && !errors.Is(err, unix.EINTR):
				mu.Lock()
				failed = fmt.Errorf("cannot read the kernel's taskstats: %w", err)
				mu.Unlock()
				return
			}
		}
	}()
	return func() ([]process, error) {
		close(stopping)
		<-done
		return ended, failed
	}, nil
}

// generic sends a request of generic netlink with one attribute, a text.
func generic(fd int, family uint16, command byte, attribute uint16, text string) error {
	ne := binary.NativeEndian
	value := append([]byte(text), 0)
	attr := ne.AppendUint16(ne.AppendUint16(nil, uint16(4+len(value))), attribute)
	attr = append(attr, value...)
	attr = append(attr, make([]byte, (4-len(attr)%4)%4)...)
	b := ne.AppendUint32(nil, uint32(16+4+len(attr)))
	b = ne.AppendUint16(ne.AppendUint16(b, family), unix.NLM_F_REQUEST)
	b = ne.AppendUint32(ne.AppendUint32(b, 1), 0)
	b = append(b, command, 1, 0, 0)
	return unix.Sendto(fd, slices.Concat(b, attr), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// receive gives the attributes of each message of one datagram to f.
func receive(fd int, f func(attributes []byte)) error {
	b := make([]byte, 64<<10)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		return err
	}
	for b = b[:n]; len(b) >= 20; {
		length := int(binary.NativeEndian.Uint32(b))
		if length < 16 || length > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR {
			if code := int32(binary.NativeEndian.Uint32(b[16:])); code != 0 {
				return unix.Errno(-code)
			}
		} else if length > 20 {
			f(b[20:length])
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return nil
}

// each gives the attributes of a message to f.
func each(b []byte, f func(kind uint16, value []byte)) {
	for len(b) >= 4 {
		length := int(binary.NativeEndian.Uint16(b))
		if length < 4 || length > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^unix.NLA_F_NESTED, bytes.Clone(b[4:length]))
		b = b[min(len(b), (length+3)&^3):]
	}
}
