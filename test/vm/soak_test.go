//go:build vm && soak

package vm_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

var (
	cuts  = flag.Int("cuts", 50, "how many power cuts TestSoak makes; TestSoakRotate makes a fifth of that")
	nodes = flag.Int("nodes", 2, "how many nodes TestSoak has at a time; not more than -parallel")
	seed  = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of the moments at which TestSoak cuts")
)

// How long the agent works, under emulation beside another node and rounded up: at a first boot from when the data key was asked
// for, at a reboot from power on, and when volumes are locked and opened again. A later cut finds the node idle, which is a
// moment as good as any.
const (
	firstBootLasts = 40 * time.Second
	rebootLasts    = 50 * time.Second
	reopenLasts    = 15 * time.Second
	cutsPerNode    = 5
)

// tally counts what became of the power cuts.
type tally struct {
	sync.Mutex
	cuts, converged, refused int
	unflushed                int // cuts that took unflushed writes
	lost                     int // cuts after which a synced file was gone, or a volume that was recorded ready did not open
}

// TestSoak cuts the power at random moments: while a node's disks are formatted, while it boots again, and while it closes and opens
// its volumes, after files were written and synced. Half of the nodes lose what was not flushed. The next boot must make a
// whole node of what the cut left, with every synced file, or refuse with its reason.
func TestSoak(t *testing.T) {
	t.Logf("seed %d", *seed)
	var total tally
	begun := time.Now()
	t.Run("nodes", func(t *testing.T) {
		for lane := range *nodes {
			t.Run(fmt.Sprint(lane), func(t *testing.T) {
				t.Parallel()
				s := &soak{tally: &total, random: rand.New(rand.NewPCG(*seed, uint64(lane)))}
				s.left = (*cuts + lane) / *nodes
				for node := 1; s.left > 0 && !t.Failed(); node++ {
					t.Run(fmt.Sprint(node), s.node)
				}
			})
		}
	})
	t.Logf("%-6s %-10s %-8s %-23s %s", "cuts", "converged", "refused", "took unflushed writes", "lost")
	t.Logf("%-6d %-10d %-8d %-23d %d", total.cuts, total.converged, total.refused, total.unflushed, total.lost)
	t.Logf("%.0f s per cut", time.Since(begun).Seconds()/float64(max(1, total.cuts)))
	if total.lost > 0 {
		t.Errorf("%d cuts lost data", total.lost)
	}
}

// soak is one node after another.
type soak struct {
	*tally
	random *rand.Rand
	left   int // cuts to make
}

// node takes one node from blank disks through its cuts.
func (s *soak) node(t *testing.T) {
	n := harness.NewNode(t, assets, "", ssd1, ebs1, ebs2)
	if s.random.IntN(2) == 0 {
		n.LoseUnflushed(s.random.Uint64())
	}
	points := []string{"/mnt", "/mnt1", "/mnt2"}
	files := ""
	for cut := range min(cutsPerNode, s.left) {
		what := s.cut(n, cut == 0)
		ready := readyVolumes(n)
		n.PowerCut()
		s.left--
		n.Shuffle()
		n.Boot()
		code := n.AwaitAgent()
		if code != "0" && !slices.Contains([]string{"3", "6", "7"}, code) {
			t.Fatalf("after a cut %s: exit code %s:\n%s", what, code, n.Journal())
		}
		lost := s.missing(n, ready, files, points)
		s.count(n.LastCut(), code == "0", lost)
		if lost != "" {
			t.Errorf("after a cut %s: %s\n%s", what, lost, n.Journal())
		}
		if code != "0" {
			t.Logf("after a cut %s: refused (exit code %s):\n%s", what, code, n.Journal())
			return
		}
		wantMounted(t, n, points...)
		wantOneKey(t, n)
		files = writeFiles(n, points...)
		t.Logf("after a cut %s: converged", what)
	}
}

// cut lets the node do something and comes back at a random moment of it, when the power is to go.
func (s *soak) cut(n *harness.Node, first bool) (what string) {
	lasts := reopenLasts
	switch {
	case first:
		n.Resume()
		n.Await("a data key is asked for", 3*time.Minute, func() bool { return n.KMS.Count("GenerateDataKey") > 0 })
		what, lasts = "of a first boot", firstBootLasts
	case s.random.IntN(3) == 0:
		n.PowerCut()
		n.On()
		what, lasts = "of a boot", rebootLasts
	default:
		n.Sh("systemd-run --no-block sh -c 'luks-kms-agent lock; luks-kms-agent run'")
		what = "of lock and run"
	}
	moment := time.Duration(s.random.Int64N(int64(lasts)))
	time.Sleep(moment)
	return fmt.Sprintf("%v into the work %s", moment.Round(time.Millisecond), what)
}

// missing says what is gone of what was safe before the cut, "" for nothing.
func (s *soak) missing(n *harness.Node, ready []string, files string, points []string) string {
	open := n.Sh("dmsetup ls --target crypt")
	for _, uuid := range ready {
		if !strings.Contains(open, uuid) {
			return "volume " + uuid + " was recorded ready and is not open"
		}
	}
	if files == "" {
		return ""
	}
	if r := n.Try("sha256sum " + strings.Join(points, "/plaintext-file ") + "/plaintext-file"); r.Stdout != files {
		return fmt.Sprintf("the files were\n%s, and now %s", files, r)
	}
	return ""
}

func (s *soak) count(cut harness.Cut, converged bool, lost string) {
	s.Lock()
	defer s.Unlock()
	s.cuts++
	if converged {
		s.converged++
	} else {
		s.refused++
	}
	if cut.Lost > 0 {
		s.unflushed++
	}
	if lost != "" {
		s.tally.lost++
	}
}
