//go:build vm

package vm_test

import (
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// What the sandbox of the service forbids, each as a command that root may do on this node.
var forbidden = []string{
	"mount -t tmpfs none /media",
	"unshare --mount true",
	"chown 1 /run/probe",
	"chroot / true",
	"modprobe -r dummy",
	"dmesg >/dev/null",
	"cat /run/daemons-own >/dev/null", // a file of another user
	"test -e /proc/1/comm",
	"echo 0 >/proc/sys/kernel/panic",
	"mkdir /sys/fs/cgroup/probe",
	": </dev/loop-control",
	"date -s @$(date +%s) >/dev/null",
}

// TestSandbox: the service as it runs is as closed as its file says, is refused what it does not need, and sees which disks the host uses
// wherever they are mounted: what it must never take for free.
func TestSandbox(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "", ssd1, ssd2, ebs1, ebs2)
	for disk, label := range map[string]string{"ssd2": "root", "ebs1": "home", "ebs2": "late"} {
		n.MakeExt4(disk, label)
	}
	n.Wake()
	n.Sh("mkdir -p /home/x /root/x /root/late && mount LABEL=home /home/x && mount LABEL=root /root/x && echo precious | tee /home/x/file >/root/x/file; " +
		"touch /run/probe; install -m 0600 -o daemon /dev/null /run/daemons-own; modprobe dummy; modprobe loop")

	// Instead of the agent, in its sandbox, runs this script; one disk is mounted while it does.
	var script strings.Builder
	script.WriteString("echo >/run/probing; while [ ! -e /run/late-mounted ]; do sleep 0.1; done\n")
	for _, command := range forbidden {
		script.WriteString("if (" + command + ") 2>>/run/probe-errors; then echo '" + command + "' >>/run/probe-done; fi\n")
	}
	script.WriteString("luks-kms-agent plan --json >/run/plan-inside; grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status >/run/probe-status\n")
	n.Write("/run/probe.sh", 0o755, script.String())
	n.Write("/run/systemd/system/luks-kms-agent.service.d/probe.conf", 0o644, "[Service]\nExecStart=\nExecStart=/bin/bash /run/probe.sh\n")
	n.Sh("systemctl daemon-reload && systemctl start --no-block luks-kms-agent.service")
	n.Await("the script runs", time.Minute, func() bool { return n.Try("test -e /run/probing").Code == 0 })
	n.Sh("mount LABEL=late /root/late && touch /run/late-mounted")
	n.AwaitActive("luks-kms-agent.service", time.Minute)

	if done := n.Sh("cat /run/probe-done 2>/dev/null || true"); done != "" {
		t.Errorf("done in the sandbox:\n%s", done)
	}
	status := strings.Join(strings.Fields(n.Sh("cat /run/probe-status")), " ")
	if want := "CapBnd: 0000000000200000 NoNewPrivs: 1 Seccomp: 2"; status != want { // CAP_SYS_ADMIN is bit 21
		t.Errorf("the process has %s, want %s", status, want)
	}
	plan := n.Sh("luks-kms-agent plan --json")
	if inside := n.Sh("cat /run/plan-inside"); inside != plan {
		t.Errorf("in the sandbox the plan is\n%s\nand outside\n%s", inside, plan)
	}
	for _, point := range []string{"/home/x", "/root/x", "/root/late"} {
		if !strings.Contains(plan, point+" is on ") && !strings.Contains(plan, "mounted on "+point) {
			t.Errorf("the plan does not say what uses the disk at %s:\n%s", point, plan)
		}
	}
	// The script means something: without the sandbox all of it may be done.
	for _, command := range forbidden {
		if r := n.Try(command); r.Code != 0 {
			t.Errorf("outside of the sandbox: %s", r)
		}
	}

	n.Sh("rm -r /run/systemd/system/luks-kms-agent.service.d; umount /media; systemctl daemon-reload; systemctl stop luks-kms-agent.service")
	n.StartServices()
	n.AwaitAgent()
	wantMounted(t, n, "/mnt")
	if got := n.Sh("cat /home/x/file /root/x/file; findmnt -rno TARGET /root/late"); got != "precious\nprecious\n/root/late\n" {
		t.Errorf("of the disks in use is left: %q", got)
	}
	for _, unit := range []string{"luks-kms-agent.service", stripeUnit} {
		t.Log(n.Sh("systemd-analyze security --no-pager --threshold=30 " + unit + " >/run/exposure && tail -n 1 /run/exposure"))
	}
}
