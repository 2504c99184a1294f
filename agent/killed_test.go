package agent

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/luks-kms-agent/luks-kms-agent/keycache/kmstest"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// kills is how often rotate and rewrap are killed at a random moment: make soak does it more often.
var kills = flag.Int("kills", 4, "kill rotate and rewrap `N` times at random moments")

// killable names in the environment of a child the file that says what it has to do.
const killable = "LUKS_KMS_AGENT_TEST_CHILD"

// child is what a process that is going to be killed has to do, and where.
type child struct {
	Dir     string
	Config  Config
	Devices []volumes.Device
	Rotate  bool // else Rewrap
}

func TestMain(m *testing.M) {
	path := os.Getenv(killable)
	if path == "" {
		os.Exit(m.Run())
	}
	if err := beKilled(path); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func beKilled(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var c child
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	m := &machine{dir: c.Dir, cfg: c.Config, devices: c.Devices, open: map[string]string{}, unfinished: map[string]bool{},
		mounts: map[string]string{}, held: map[string]bool{}, fail: func(string, string) error { return nil }}
	n, err := New(c.Config, zap.NewNop(), Program{Version: "test", Command: "killed"})
	if err != nil {
		return err
	}
	n.disks, n.maps, n.auditLog.journal = m, m, m.hear
	var errs []error
	if c.Rotate {
		done, err := n.Rotate(context.Background(), nil)
		for _, d := range done {
			err = errors.Join(err, d.Err)
		}
		errs = append(errs, err)
	} else {
		done, err := n.Rewrap(context.Background())
		for _, d := range done {
			err = errors.Join(err, d.Err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// killAt runs a command of the agent in a process of its own and kills that and its children after a time. It reports whether the
// command had not ended by then, and how long it ran.
func (m *machine) killAt(rotate bool, after time.Duration) (killed bool, took time.Duration) {
	m.t.Helper()
	path := filepath.Join(m.dir, "child.json")
	data, err := json.Marshal(child{Dir: m.dir, Config: m.cfg, Devices: m.devices, Rotate: rotate})
	if err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), killable+"="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said strings.Builder
	cmd.Stderr = &said
	start := time.Now()
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			m.t.Fatalf("%v: %s", err, said.String())
		}
		return false, time.Since(start)
	case <-time.After(after):
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil {
			m.t.Fatal(err)
		}
		<-ended
		events(m.t, m.cfg.AuditLog) // what happened is there, in whole lines
		return true, time.Since(start)
	}
}

// TestKilledAtRandomMoments: wherever rotate or rewrap is killed, a recorded key opens each volume, and what is run next ends the work.
func TestKilledAtRandomMoments(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.disk(volumes.ClassEBS, "vol-2")
	m.runOK()
	for _, d := range m.devices {
		m.addTheirs(d, 1)
	}
	m.reboot()
	lasts := map[bool]time.Duration{}
	kmsKeys := []string{m.kms.ARN(), m.kms.NewKey(kmstest.KeySpec{})}
	toggle := func() { kmsKeys[0], kmsKeys[1] = kmsKeys[1], kmsKeys[0]; m.cfg.KMSKey = kmsKeys[0] }
	for _, rotate := range []bool{true, false} {
		if !rotate {
			toggle()
		}
		_, lasts[rotate] = m.killAt(rotate, time.Minute)
	}
	table := []string{fmt.Sprintf("%-4s %-7s %9s  %-24s %-24s", "cut", "command", "after, ms", "vol-1: slots, token", "vol-2: slots, token")}
	for cut := 1; cut <= *kills; cut++ {
		rotate := cut%2 == 1
		name := map[bool]string{true: "rotate", false: "rewrap"}[rotate]
		if !rotate {
			toggle()
		}
		after := rand.N(lasts[rotate])
		killed, _ := m.killAt(rotate, after)
		if !killed {
			cut-- // it had ended: that was no cut
			continue
		}
		row := fmt.Sprintf("%-4d %-7s %9d ", cut, name, after.Milliseconds())
		for _, d := range m.devices {
			_, header := m.opener(d) // ends the test if there is none
			row += fmt.Sprintf(" %-24s", fmt.Sprintf("%d slots, token at %d", len(header.Keyslots), header.Token.Keyslot))
		}
		table = append(table, row)
		m.runOK() // a copy of the header that was cut is restored
		m.reboot()
		if rotate {
			if _, err := m.rotateIfPending(); err != nil {
				t.Errorf("cut %d: %v", cut, err)
			}
		} else if _, err := m.rewrap(m.cfg.KMSKey); err != nil {
			t.Errorf("cut %d: %v", cut, err)
		}
		for _, d := range m.devices {
			rec, header := m.opener(d)
			if len(header.Keyslots) != 2 || luks.OpensKeySlot(t.Context(), d.Path, 1, m.theirs()) != nil || rec.KeyARN != m.cfg.KMSKey && !rotate {
				t.Errorf("cut %d: %s: key under %s, slots %+v", cut, d.Identity, rec.KeyARN, header.Keyslots)
			}
		}
	}
	t.Logf("rotate lasts %v, rewrap %v\n%s\nvolumes without a recorded key that opens them: 0", lasts[true], lasts[false], strings.Join(table, "\n"))
}

// rotateIfPending goes on with what a rotate that was cut began.
func (m *machine) rotateIfPending() (bool, error) {
	m.t.Helper()
	for _, v := range m.records().Volumes {
		if v.Rotation != nil {
			_, err := m.rotate()
			return true, err
		}
	}
	return false, nil
}
