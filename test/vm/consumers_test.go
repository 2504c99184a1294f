//go:build vm

package vm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// standIn is a service of that name with what its distribution's unit says of the order, which writes to its directories when it
// starts and notes there what is mounted when it is stopped.
func standIn(name, unit string, dirs ...string) string {
	list := strings.Join(dirs, " ")
	return fmt.Sprintf(`[Unit]
%s
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'for d in %s; do mkdir -p $d && date >$d/%s.started || exit 1; done'
ExecStop=/bin/sh -c 'for d in %s; do findmnt -rno TARGET >$d/%s.stopped; done'
[Install]
WantedBy=multi-user.target
`, unit, list, name, list, name)
}

// consumers are stand-ins for each way in which a service depends on volumes: what they write where.
var consumers = []struct {
	unit, ordering string
	template       string // file of the unit, where it is an instance
	dirs           []string
	mounts         []string // what it needs
	lazily         bool     // started by its socket alone
}{
	{unit: "kubelet.service", ordering: "Wants=network-online.target\nAfter=network-online.target", dirs: []string{"/mnt/kubelet"}, mounts: []string{"/mnt"}},
	{unit: "hadoop-yarn-nodemanager.service", ordering: "After=network.target", dirs: []string{"/mnt/yarn", "/mnt1/yarn"}, mounts: []string{"/mnt", "/mnt1"}},
	{unit: "containerd.service", ordering: "After=network.target local-fs.target", dirs: []string{"/var/lib/containerd"}, mounts: []string{"/var/lib/containerd"}},
	{unit: "postgresql@15-main.service", template: "postgresql@.service", ordering: "RequiresMountsFor=/var/lib/postgresql/%I\nAfter=network.target",
		dirs: []string{"/mnt/postgresql"}, mounts: []string{"/mnt"}},
	{unit: "docker.service", ordering: "Requires=docker.socket\nAfter=network-online.target docker.socket", dirs: []string{"/mnt/docker"}, mounts: []string{"/mnt"}, lazily: true},
}

// TestConsumers: services of each kind with the drop-ins of packaging/drop-ins. At a boot without KMS none of them starts and none writes to the
// boot disk, whatever asks for it, and the boot does without; when KMS is back they start by themselves, after their volumes. At the shutdown each
// stops before its volumes are unmounted.
func TestConsumers(t *testing.T) {
	parallel(t)
	n := harness.NewNode(t, assets, "", ssd1, ebs1)
	n.Resume()
	n.AwaitVolumes()
	wantMounted(t, n, "/mnt", "/mnt1")
	installConsumers(t, n)
	running := func() {
		t.Helper()
		for _, c := range consumers {
			n.AwaitActive(c.unit, time.Minute)
		}
	}
	n.Sh("systemctl start multi-user.target luks-kms-agent.target")
	n.AwaitActive("docker.socket", time.Minute)
	n.Sh(useDocker)
	running()
	n.PowerOff()

	n.KMS.Inject(down)
	n.Boot() // logins are possible
	n.Await("the agent says that it retries", time.Minute, func() bool {
		return strings.Contains(n.Unit("luks-kms-agent.service")["StatusText"], "Waiting for Decrypt")
	})
	if r := n.Try(useDocker); r.Code == 0 {
		t.Error("docker's socket listens without its volumes")
	}
	n.Sh("systemctl start --no-block docker.service kubelet.service") // they wait
	wantIdle(t, n)
	n.KMS.Inject()
	n.AwaitVolumes()
	n.AwaitActive("docker.socket", time.Minute)
	running()
	for _, c := range consumers {
		started := monotonic(t, n, c.unit, "ExecMainStartTimestampMonotonic")
		for _, where := range c.mounts {
			if mounted := monotonic(t, n, "$(systemd-escape --path --suffix=mount "+where+")", "ActiveEnterTimestampMonotonic"); mounted == 0 || started < mounted {
				t.Errorf("%s started at %d, %s was mounted at %d", c.unit, started, where, mounted)
			}
		}
		for _, dir := range c.dirs {
			saw := strings.Fields(string(n.Read(dir + "/" + c.unit + ".stopped")))
			for _, where := range c.mounts {
				if !slices.Contains(saw, where) {
					t.Errorf("when %s was stopped %s was not mounted any more: %v", c.unit, where, saw)
				}
			}
		}
	}
	if failed := n.Sh("journalctl -b -1 -o cat | grep -i 'failed unmounting' || true"); failed != "" {
		t.Errorf("at the shutdown: %s", failed)
	}

	// What stops with the target lets its volumes go.
	n.Sh("systemctl stop docker.socket luks-kms-agent.target")
	wantIdle(t, n)
	if r := n.Agent("lock"); r.Code != 0 {
		t.Errorf("lock after the target was stopped: %s", r)
	}
}

// useDocker connects to its socket, which starts it.
const useDocker = "exec 3<>/dev/tcp/127.0.0.1/2375"

// wantIdle checks that no consumer runs.
func wantIdle(t *testing.T, n *harness.Node) {
	t.Helper()
	for _, c := range consumers {
		if state := n.Unit(c.unit)["ActiveState"]; state != "inactive" && state != "failed" {
			t.Errorf("%s is %s without its volumes", c.unit, state)
		}
	}
	if written := n.Sh("mkdir -p /run/boot-disk && mount --bind / /run/boot-disk && cd /run/boot-disk && find mnt mnt1 var/lib/containerd -type f 2>/dev/null; cd / && umount /run/boot-disk"); written != "" {
		t.Errorf("on the boot disk there is %s", written)
	}
}

func monotonic(t *testing.T, n *harness.Node, unit, property string) (at int64) {
	t.Helper()
	text := n.Sh("systemctl show --value -p " + property + " " + unit)
	if _, err := fmt.Sscan(text, &at); err != nil {
		t.Fatalf("%s of %s is %q", property, unit, text)
	}
	return at
}

// installConsumers puts units, drop-ins and fstab onto the node as docs/consumers.md says.
func installConsumers(t *testing.T, n *harness.Node) {
	t.Helper()
	const units = "/etc/systemd/system/"
	from := filepath.Join(assets.Repo, "packaging", "drop-ins")
	shipped := func(name string) string {
		text, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	enable := ""
	for _, c := range consumers {
		file := c.unit
		if c.template != "" {
			file = c.template
		}
		n.Write(units+file, 0o644, standIn(c.unit, c.ordering, c.dirs...))
		n.Write(units+file+".d/50-luks-kms-agent.conf", 0o644, shipped(file+".d/50-luks-kms-agent.conf"))
		switch {
		case c.lazily:
		case c.template != "":
			enable += "systemctl enable -q " + c.unit + "; systemctl add-wants -q luks-kms-agent.target " + c.unit + "; "
		default:
			enable += "systemctl enable -q " + c.unit + "; "
		}
	}
	n.Write(units+"docker.socket", 0o644, "[Unit]\nPartOf=docker.service\n[Socket]\nListenStream=127.0.0.1:2375\n[Install]\nWantedBy=sockets.target\n")
	n.Write(units+"docker.socket.d/50-luks-kms-agent.conf", 0o644, shipped("docker.socket.d/50-luks-kms-agent.conf"))
	n.Write(units+"volume-directories.service", 0o644, shipped("volume-directories.service"))
	n.Write("/etc/fstab", 0o644, shipped("fstab"))
	n.Sh("systemctl daemon-reload; " + enable + "systemctl enable -q docker.socket; systemctl enable -q volume-directories.service; systemctl daemon-reload")
}
