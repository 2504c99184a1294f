//go:build vm && soak

package vm_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

var (
	cuts = flag.Int("cuts", 50, "how many power cuts TestSoak makes")
	seed = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of the moments at which TestSoak cuts")
)

// How long after the data key was asked for a first boot writes to disks, and how long a reboot takes, both under
// emulation and rounded up: a cut later than that finds the node idle, which is a moment as good as any.
const (
	firstBootLasts = 30 * time.Second
	rebootLasts    = 25 * time.Second
	cutsPerNode    = 3
)

// soak counts what became of the power cuts.
type soak struct {
	random                           *rand.Rand
	cuts, converged, refused, losses int
}

// TestSoak cuts the power at random moments: once while a node's disks are formatted, then at reboots, after files were written
// and synced. The next boot must make a whole node of what the cut left, with every synced file, or refuse with its reason.
func TestSoak(t *testing.T) {
	t.Logf("seed %d", *seed)
	s := &soak{random: rand.New(rand.NewPCG(*seed, 0))}
	for node := 1; s.cuts < *cuts && !t.Failed(); node++ {
		t.Run(fmt.Sprintf("node%d", node), func(t *testing.T) { s.node(t) })
	}
	t.Logf("%-6s %-10s %-8s %s", "cuts", "converged", "refused", "lost")
	t.Logf("%-6d %-10d %-8d %d", s.cuts, s.converged, s.refused, s.losses)
	if s.losses > 0 {
		t.Errorf("%d cuts lost data", s.losses)
	}
}

// node takes one node from blank disks through its cuts.
func (s *soak) node(t *testing.T) {
	points := []string{"/mnt", "/mnt1", "/mnt2"}
	n := harness.NewNode(t, assets, "", ssd1, ebs1, ebs2)
	files := ""
	for cut := 0; cut < cutsPerNode && s.cuts < *cuts; cut++ {
		n.On()
		limit := rebootLasts
		if cut == 0 {
			n.Await("a data key is asked for", 3*time.Minute, func() bool { return n.KMS.Count("GenerateDataKey") > 0 })
			limit = firstBootLasts
		}
		moment := time.Duration(s.random.Int64N(int64(limit)))
		time.Sleep(moment)
		n.PowerCut()
		s.cuts++
		n.Shuffle()
		n.Boot()
		switch code := n.AwaitAgent(); code {
		case "0":
			s.converged++
		case "3", "6", "7":
			s.refused++
			t.Logf("cut %d after %v: refused (exit code %s):\n%s", s.cuts, moment, code, n.Journal())
			if files != "" {
				s.losses++ // what was ready and had files must open
			}
			return
		default:
			t.Fatalf("cut %d after %v: exit code %s:\n%s", s.cuts, moment, code, n.Journal())
		}
		wantMounted(t, n, points...)
		if files != "" {
			if got := digestFiles(n, points...); got != files {
				s.losses++
				t.Errorf("cut %d after %v: files\n%s\nbefore\n%s", s.cuts, moment, got, files)
			}
		}
		if keys := n.KeyRecords(); len(keys) != 1 {
			t.Errorf("cut %d after %v: %d key records, want 1", s.cuts, moment, len(keys))
		}
		files = writeFiles(n, points...)
		t.Logf("cut %d after %v: converged", s.cuts, moment)
		n.PowerCut()
	}
}
