//go:build vm

package vm_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// TestSecretsAreWiped looks into the memory of the agent: while it has keys, they are kept from swap, core dumps and other
// processes; once it has wiped them, memory has none in any form, but for what docs/threat-model.md says remains.
func TestSecretsAreWiped(t *testing.T) {
	parallel(t)
	const swapFile, cores = "/swapfile", "/var/cores"
	swapped := fmt.Sprintf("a string in memory that may be swapped out %d", time.Now().UnixNano())
	n := harness.NewNode(t, assets, "", ebs1)
	n.Provide(harness.ConfigFile, 0o600, "the service stays out of this story")
	n.Resume()
	if code := n.AwaitAgent(); code != "2" {
		t.Fatalf("the service ended with exit code %s, want 2", code)
	}
	// Over TLS, as with AWS: its buffers have the keys too.
	n.Write("/etc/ssl/certs/ca-certificates.crt", 0o644, n.CertificateOfKMS())
	n.Write(harness.ConfigFile, 0o600, strings.Replace(n.Config(""), harness.KMSEndpoint, harness.KMSTLSEndpoint, 1))
	n.Sh("dd if=/dev/zero of=" + swapFile + " bs=1M count=96 status=none; chmod 600 " + swapFile + "; mkswap -q " + swapFile + "; swapon " + swapFile +
		"; mkdir -p " + cores + "; echo " + cores + "/core.%p >/proc/sys/kernel/core_pattern; echo 0 >/proc/sys/kernel/core_uses_pid")
	// What is not protected, and what has to befall it.
	n.Sh("systemd-run --quiet --unit=control.service -p LimitCORE=infinity -p CapabilityBoundingSet=~CAP_SYS_PTRACE " +
		"bash -c 'text=$(yes \"" + swapped + "\" | head -n 20000); sleep infinity & wait'")
	control := strings.TrimSpace(n.Sh("systemctl show -P MainPID control.service"))

	pid := n.Hold("the volume is open")
	// The search finds keys where they are, so it means something where it finds none.
	if found := strings.Join(n.Memory(pid), "\n"); !strings.Contains(found, "data key") || !strings.Contains(found, "as base64") {
		t.Errorf("while the agent works with keys, its memory has only: %s", found)
	}
	wantLocked(t, n, pid)
	if core := strings.Fields(n.Sh("grep 'Max core file size' /proc/" + pid + "/limits")); core[4] != "0" || core[5] != "0" {
		t.Errorf("the limits of core files are %v", core)
	}
	peep := func(pid string) harness.Result {
		return n.Try("setpriv --bounding-set=-sys_ptrace cat /proc/" + pid + "/environ >/dev/null")
	}
	if r := peep(control); r.Code != 0 {
		t.Fatalf("no process can be read without CAP_SYS_PTRACE: %s", r)
	}
	if r := peep(pid); r.Code == 0 {
		t.Error("another process of root, without CAP_SYS_PTRACE, can read the agent's memory: it is dumpable")
	}
	if found := n.SwapOut(swapFile, swapped, "control.service", "held.service"); len(found) > 0 {
		t.Errorf("in the swap file stands: %v", found)
	}

	// It crashes: there is a traceback, no core, and no key in either.
	n.Sh("kill -ABRT " + control + " " + pid)
	n.Release()
	n.Await("the unprotected process has left a core", time.Minute, func() bool { return n.Try("test -s "+cores+"/core."+control).Code == 0 })
	if left := strings.Fields(n.Sh("ls " + cores)); !slices.Equal(left, []string{"core." + control}) {
		t.Errorf("core files: %v, want that of the unprotected process alone", left)
	}
	if journal := n.Sh("journalctl -b --no-pager -o cat -u held.service"); !strings.Contains(journal, "SIGABRT: abort") || !strings.Contains(journal, "goroutine ") {
		t.Errorf("the agent did not crash as it was meant to:\n%s", journal)
	}
	for _, leak := range n.Leaks() {
		t.Errorf("after a crash: %s", leak)
	}

	// The next run formats anew, the one after it only opens.
	for _, work := range []string{"it formatted", "it unlocked"} {
		pid := n.Hold("the keys are wiped")
		found := n.Memory(pid)
		t.Logf("after %s, memory has: %v", work, found)
		for _, name := range found {
			if !mayRemain(name) {
				t.Errorf("after %s, memory still has the %s", work, name)
			}
		}
		n.Release()
		wantMounted(t, n, "/mnt")
		if work == "it formatted" {
			n.Sh("luks-kms-agent lock")
		}
	}
	for _, leak := range n.Leaks() {
		t.Errorf("leak: %s", leak)
	}
	// Where memory may not be locked the volumes open all the same.
	r := n.Try("luks-kms-agent lock && prlimit --memlock=1048576 setpriv --bounding-set=-ipc_lock luks-kms-agent unlock")
	wantRefusal(t, r, 0, "cannot lock memory", "1 unlocked")
	found := n.BootDiskHolds(swapped)
	n.PowerOff()
	if found := found(); len(found) > 0 {
		t.Errorf("on the raw boot disk stands: %v", found)
	}
}

// mayRemain says whether docs/threat-model.md names a form of a key as one that luks.go leaves in memory.
func mayRemain(name string) bool {
	return strings.HasPrefix(name, "volume key") && strings.HasSuffix(name, "pad")
}

// wantLocked checks that whatever a process can write and shares with nobody is locked into memory.
func wantLocked(t *testing.T, n *harness.Node, pid string) {
	t.Helper()
	mapping, unlocked, seen := "", 0, 0
	for line := range strings.Lines(n.Sh("cat /proc/" + pid + "/smaps")) {
		fields := strings.Fields(line)
		if len(fields) > 1 && strings.Contains(fields[0], "-") {
			mapping = strings.TrimSpace(line)
			continue
		}
		if fields[0] != "VmFlags:" || !strings.HasPrefix(strings.Fields(mapping)[1], "rw") || strings.Contains(mapping, "[v") {
			continue
		}
		seen++
		if !slices.Contains(fields, "lo") {
			unlocked++
			t.Errorf("not locked: %s", mapping)
		}
	}
	if seen < 3 {
		t.Errorf("only %d mappings can be written", seen)
	}
}
