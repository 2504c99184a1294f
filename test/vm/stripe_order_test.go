//go:build vm && soak

package vm_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestStripeOrder measures what docs/stripe.md says of the two orders, md below LUKS and LUKS below md: alternately, in one VM, with the same
// disks, programs and cipher. The passphrase is the test's own and protects nothing.
func TestStripeOrder(t *testing.T) {
	disks := []harness.Disk{ssd1, ssd2, harness.InstanceStore("ssd3", "AWS33333333333333333"), harness.InstanceStore("ssd4", "AWS44444444444444444")}
	n := harness.NewNode(t, assets, "instance_store: ignore\n", disks...)
	n.Provide("/etc/udev/rules.d/64-md-raid-assembly.rules", 0o644, "# none: mdadm is asked\n")
	n.Boot()
	n.AwaitAgent()
	n.Write("/root/measure", 0o700, stripeOrder)
	out := n.ShLong("bash /root/measure", 30*time.Minute)
	t.Logf("\n%s", out)
	took, ratios := map[string]float64{}, map[string][]float64{}
	for line := range strings.Lines(out) {
		var order, what string
		var seconds float64
		if _, err := fmt.Sscan(line, &order, &what, &seconds); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		took[order+what] = seconds
		if order == "above" {
			ratios[what] = append(ratios[what], seconds/took["below"+what])
		}
	}
	for what, r := range ratios {
		slices.Sort(r)
		t.Logf("%-8s md above LUKS takes %.2f times what it takes below it (median of %.2f)", what, r[len(r)/2], r)
	}
}

// What each line of its output is: order, what was measured, seconds.
var stripeOrder = strings.TrimSpace(`
set -euo pipefail
disks=$(lsblk -dnpo NAME,MODEL | awk '/Instance Storage/ {print $1}')
key=/run/key; printf test >$key
format() { cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file $key "$1"; }
unlock() { cryptsetup open --key-file $key --perf-no_write_workqueue "$1" "$2"; }
timed() { local what=$1 begin end; shift; begin=$(date +%s%N); "$@" >/dev/null 2>&1; end=$(date +%s%N); echo "$order $what $(( (end - begin) / 1000000 ))" | awk '{printf "%s %s %.2f\n", $1, $2, $3 / 1000}'; }
make_below() { mdadm --create /dev/md/t --run --level=0 --raid-devices=4 $disks; format /dev/md/t; unlock /dev/md/t t; mkfs.xfs -q -K /dev/mapper/t; }
open_below() { mdadm --assemble /dev/md/t $disks; unlock /dev/md/t t; mount /dev/mapper/t /mnt; }
close_below() { umount /mnt || true; cryptsetup close t; mdadm --stop /dev/md/t; }
open_each() { local d; for d in $disks; do unlock $d t-${d##*/} & done; wait; }
mapped() { local d; for d in $disks; do echo /dev/mapper/t-${d##*/}; done; }
make_above() { local d; for d in $disks; do format $d; done; open_each; mdadm --create /dev/md/t --run --level=0 --raid-devices=4 $(mapped); mkfs.xfs -q -K /dev/md/t; }
open_above() { open_each; mdadm --assemble /dev/md/t $(mapped); mount /dev/md/t /mnt; }
close_above() { local m; umount /mnt || true; mdadm --stop /dev/md/t; for m in $(mapped); do cryptsetup close $m; done; }
for round in 1 2 3 4 5; do
  for order in below above; do
    for d in $disks; do dd if=/dev/zero of=$d bs=1M count=32 oflag=direct status=none; done
    timed make make_$order
    close_$order >/dev/null 2>&1
    udevadm settle
    timed open open_$order
    timed write-1M dd if=/dev/zero of=/mnt/file bs=1M count=256 oflag=direct
    timed read-1M dd if=/mnt/file of=/dev/null bs=1M iflag=direct
    timed write-4k dd if=/dev/zero of=/mnt/file bs=4k count=4000 oflag=direct conv=notrunc
    timed read-4k dd if=/mnt/file of=/dev/null bs=4k count=4000 iflag=direct
    close_$order >/dev/null 2>&1
  done
done
`) + "\n"
