package systemd

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/unit"
)

// The packages whose unit files make a node's boot. Nothing of them is installed.
var bootPackages = []string{"systemd", "udev", "cloud-init", "ifupdown", "network-manager", "postgresql-common"}

// What enables the units of each package; Debian's own maintainer scripts and cloud-init's generator make these links.
const cloudInitTarget = "cloud-init.target"

var enabledUnits = map[string][]string{
	"cloud-init":     {"cloud-init-local.service", "cloud-config.service", "cloud-final.service"},
	"ifupdown":       {"networking.service", "ifupdown-wait-online.service"},
	"NetworkManager": {"NetworkManager.service", "NetworkManager-wait-online.service"},
	"networkd":       {"systemd-networkd.service", "systemd-networkd-wait-online.service"},
}

// What the fstab generator makes (systemd 252) of a line with x-systemd.requires=luks-kms-agent.target. systemd reads
// the options again: _netdev and nofail decide which target the mount is Before=.
func fstabMount(where, options, before string) string {
	return "[Unit]\nSourcePath=/etc/fstab\nAfter=luks-kms-agent.target\nRequires=luks-kms-agent.target\n" + before +
		"[Mount]\nWhat=/dev/mapper/luks-x\nWhere=" + where + "\nType=xfs\nOptions=" + options + "\n"
}

// boot is one machine: the unit files of a distribution and ours, in one directory.
type boot struct {
	t   *testing.T
	dir string
}

func newBoot(t *testing.T, packages string, network ...string) *boot {
	b := &boot{t, t.TempDir()}
	for _, lib := range []string{"lib", "usr/lib"} { // before and after the /usr merge of the packages
		for _, p := range bootPackages {
			from := filepath.Join(packages, p, lib, "systemd/system")
			if _, err := os.Stat(from); err == nil {
				b.copyTree(from)
			}
		}
	}
	b.link("multi-user.target.wants", cloudInitTarget)
	if _, err := os.Stat(filepath.Join(b.dir, "cloud-init-main.service")); err == nil { // since cloud-init 24.3
		b.enable("cloud-init-main.service")
		b.enable("cloud-init-network.service")
	} else {
		b.enable("cloud-init.service")
	}
	for _, n := range append([]string{"cloud-init"}, network...) {
		for _, u := range enabledUnits[n] {
			b.enable(u)
		}
	}
	for _, u := range []string{"luks-kms-agent.service", "luks-kms-agent.target", stripeUnit} {
		b.write(u, strings.NewReplacer("/usr/bin/luks-kms-agent run", "/bin/true", "/usr/bin/luks-kms-agent stripe", "/bin/true").Replace(read(t, u)))
	}
	b.enable("luks-kms-agent.service")
	return b
}

func (b *boot) copyTree(from string) {
	b.t.Helper()
	err := filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		to := filepath.Join(b.dir, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(to, 0o755)
		case d.Type()&fs.ModeSymlink != 0:
			dest, err := os.Readlink(p)
			if err != nil {
				return err
			}
			return os.Symlink(dest, to)
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return os.WriteFile(to, text, 0o644)
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *boot) write(name, text string) {
	b.t.Helper()
	p := filepath.Join(b.dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *boot) link(folder, name string) {
	b.t.Helper()
	b.linkTo(folder, name, name)
}

// linkTo is link where the file has another name, as an instance has.
func (b *boot) linkTo(folder, name, file string) {
	b.t.Helper()
	if err := os.MkdirAll(filepath.Join(b.dir, folder), 0o755); err != nil {
		b.t.Fatal(err)
	}
	err := os.Symlink("../"+file, filepath.Join(b.dir, folder, name))
	if err != nil && !os.IsExist(err) {
		b.t.Fatal(err)
	}
}

// enable does what systemctl enable does with [Install].
func (b *boot) enable(name string) {
	b.t.Helper()
	options, err := unit.DeserializeOptions(strings.NewReader(read(b.t, filepath.Join(b.dir, name))))
	if err != nil {
		b.t.Fatal(err)
	}
	enabled := false
	for _, o := range options {
		if o.Section == "Install" && (o.Name == "WantedBy" || o.Name == "RequiredBy") {
			kind := map[string]string{"WantedBy": ".wants", "RequiredBy": ".requires"}[o.Name]
			for _, by := range strings.Fields(o.Value) {
				b.link(by+kind, name)
				enabled = true
			}
		}
	}
	if !enabled {
		b.t.Fatalf("%s cannot be enabled: this test would prove nothing about it", name)
	}
}

// verify loads the boot's default target, with all that it pulls, and returns what systemd-analyze says.
func (b *boot) verify(units ...string) string {
	b.t.Helper()
	args := []string{"verify", "--man=no", "--generators=no", "--recursive-errors=yes"}
	for _, u := range units {
		args = append(args, filepath.Join(b.dir, u))
	}
	cmd := exec.CommandContext(b.t.Context(), "systemd-analyze", args...)
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+b.dir, "LC_ALL=C", "SYSTEMD_LOG_COLOR=0", "SYSTEMD_LOG_TARGET=console")
	// The exit code is not asked for: it is 1 where any unit of the distribution names a program that is not installed here.
	out, err := cmd.CombinedOutput()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		b.t.Fatalf("cannot run systemd-analyze: %v", err)
	}
	return string(out)
}

// cycles are the lines that tell of an ordering cycle.
func cycles(out string) string {
	var found []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "ordering cycle") || strings.Contains(line, "to break") {
			found = append(found, line)
		}
	}
	return strings.Join(found, "")
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// releases are those of Debian whose boots are tried, on a machine of any of them.
var releases = map[string]string{"debian-12": "bookworm", "debian-13": "trixie"}

// distributions returns, for each distribution, a folder with its packages' files: of this machine's own, and of Debian's releases.
func distributions(t *testing.T) map[string]string {
	t.Helper()
	own := osRelease(t)
	packages := map[string]string{own: packageUnits(t, own, func(string) []string { return nil })}
	if releases[own] == "" {
		return packages // its apt, if it has one, knows no mirror of Debian
	}
	for name, suite := range releases {
		if name != own {
			packages[name] = packageUnits(t, name, func(tmp string) []string { return aptOf(t, releases[own], suite, tmp) })
		}
	}
	return packages
}

// aptOf returns the options with which apt downloads packages of another release, from the mirror that it has for its own; what it knows of that
// release is kept in tmp.
func aptOf(t *testing.T, own, suite, tmp string) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		t.Fatalf("apt-get indextargets: %v", err)
	}
	mirror := ""
	for line := range strings.Lines(string(out)) {
		if uri, found := strings.CutPrefix(strings.TrimSpace(line), own+" main "); found {
			mirror = uri
		}
	}
	if mirror == "" {
		t.Fatalf("apt has no mirror of %s:\n%s", own, out)
	}
	list, lists := filepath.Join(tmp, "sources.list"), filepath.Join(tmp, "lists")
	source := "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] " + mirror + " " + suite + " main\n"
	if err := errors.Join(os.WriteFile(list, []byte(source), 0o644), os.MkdirAll(filepath.Join(lists, "partial"), 0o755)); err != nil {
		t.Fatal(err)
	}
	options := []string{"-o", "Dir::Etc::sourcelist=" + list, "-o", "Dir::Etc::sourceparts=-", "-o", "Dir::State::lists=" + lists,
		"-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="}
	if out, err := exec.CommandContext(t.Context(), "apt-get", append(options, "-q", "update")...).CombinedOutput(); err != nil {
		t.Fatalf("apt-get update for %s: %v\n%s", suite, err, out)
	}
	return options
}

// packageUnits returns a folder with each package's files of a distribution, which it downloads once, with more options of apt's.
func packageUnits(t *testing.T, name string, options func(tmp string) []string) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	list := sha256.Sum256([]byte(strings.Join(bootPackages, " ")))
	dir := filepath.Join(cache, "luks-kms-agent", fmt.Sprintf("boot-units-%s-%x", name, list[:4]))
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "boot-units-*.tmp")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	if err := os.Mkdir(filepath.Join(tmp, "out"), 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = tmp
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	more := options(tmp)
	for _, p := range bootPackages {
		run("apt-get", slices.Concat(more, []string{"download", "-q", p})...)
		debs, err := filepath.Glob(filepath.Join(tmp, p+"_*.deb"))
		if err != nil || len(debs) != 1 {
			t.Fatalf("apt-get download %s left %v (%v)", p, debs, err)
		}
		run("dpkg-deb", "-x", debs[0], filepath.Join(tmp, "out", p))
	}
	if err := os.Rename(filepath.Join(tmp, "out"), dir); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return dir
}

func osRelease(t *testing.T) string {
	t.Helper()
	options := map[string]string{}
	for line := range strings.Lines(read(t, "/etc/os-release")) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		options[k] = strings.Trim(v, `"`)
	}
	return strings.NewReplacer("/", "_", " ", "_").Replace(options["ID"] + "-" + options["VERSION_ID"])
}

var networks = [][]string{{}, {"ifupdown"}, {"networkd"}, {"ifupdown", "networkd"}, {"NetworkManager"}}

const consumerUnit = "[Unit]\nDescription=A consumer\n[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"

// The drop-in that docs/configuration.md tells consumers to use.
const consumerDropIn = "[Unit]\nRequires=luks-kms-agent.target\nAfter=luks-kms-agent.target\n"

// What a node may add to the boot, and whether it may be had without a cycle.
var additions = []struct {
	name  string
	add   func(*boot)
	cycle bool
}{
	{"nothing", func(*boot) {}, false},
	{"fstab mount with _netdev", func(b *boot) {
		b.write("data.mount", fstabMount("/data", "_netdev", "Before=remote-fs.target\n"))
		b.link("remote-fs.target.requires", "data.mount")
		b.link("multi-user.target.wants", "remote-fs.target")
	}, false},
	{"fstab mount with nofail", func(b *boot) {
		b.write("data.mount", fstabMount("/data", "nofail", ""))
		b.link("local-fs.target.wants", "data.mount")
	}, false},
	{"fstab mount with _netdev and nofail", func(b *boot) {
		b.write("data.mount", fstabMount("/data", "_netdev,nofail", ""))
		b.link("remote-fs.target.wants", "data.mount")
		b.link("multi-user.target.wants", "remote-fs.target")
	}, false},
	{"consumer", func(b *boot) {
		b.write("consumer.service", consumerUnit)
		b.write("consumer.service.d/luks-kms-agent.conf", consumerDropIn)
		b.enable("consumer.service")
		b.link("luks-kms-agent.target.wants", "consumer.service")
	}, false},

	{"Debian's PostgreSQL", func(b *boot) {
		b.dropIn("postgresql@.service")
		b.enable("postgresql.service")
		for _, by := range []string{"multi-user.target", "luks-kms-agent.target", "postgresql.service"} { // the last by its generator
			b.linkTo(by+".wants", "postgresql@15-main.service", "postgresql@.service")
		}
	}, false},
	{"every shipped drop-in", func(b *boot) {
		files, err := filepath.Glob(dropIns + "*.service.d")
		if err != nil || len(files) < 7 {
			b.t.Fatalf("drop-ins: %v (%v)", files, err)
		}
		b.write("volume-directories.service", read(b.t, dropIns+"volume-directories.service"))
		b.enable("volume-directories.service")
		for _, file := range files {
			name := strings.TrimSuffix(filepath.Base(file), ".d")
			if strings.Contains(name, "@") {
				continue
			}
			b.write(name, orderings[name]+"[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n")
			b.dropIn(name)
			b.enable(name)
			b.link("luks-kms-agent.target.wants", name)
		}
		b.write("docker.socket", "[Unit]\nPartOf=docker.service\n[Socket]\nListenStream=/run/docker.sock\n[Install]\nWantedBy=sockets.target\n")
		b.dropIn("docker.socket")
		b.enable("docker.socket")
		b.link("luks-kms-agent.target.wants", "docker.socket")
		// What the fstab generator makes of the shipped line.
		b.write("var-lib-containerd.mount", "[Unit]\nAfter=luks-kms-agent.target volume-directories.service\nRequires=luks-kms-agent.target volume-directories.service\n"+
			"[Mount]\nWhat=/mnt/containerd\nWhere=/var/lib/containerd\nType=none\nOptions=bind,nofail,_netdev\n")
		b.link("luks-kms-agent.target.wants", "var-lib-containerd.mount")
	}, false},

	// Known to be bad: these show that the check sees a cycle.
	{"plain fstab mount", func(b *boot) {
		b.write("data.mount", fstabMount("/data", "defaults", "Before=local-fs.target\n"))
		b.link("local-fs.target.requires", "data.mount")
	}, true},
	{"Before=local-fs.target", func(b *boot) {
		b.write("luks-kms-agent.service.d/bad.conf", "[Unit]\nBefore=local-fs.target\n")
	}, true},
	{"After=cloud-final.service of a default service", func(b *boot) {
		b.write("luks-kms-agent.service.d/bad.conf", "[Unit]\nDefaultDependencies=yes\nAfter=cloud-final.service\n")
	}, true},
}

// dropIns is where those for consumers are.
const dropIns = "../packaging/drop-ins/"

// orderings are what the units of the projects themselves say of the order: docker.service of Docker 28, containerd.service of 2.1, kubelet.service of
// Kubernetes 1.34; the others as Bigtop and Fedora have them.
var orderings = map[string]string{
	"docker.service":                  "[Unit]\nAfter=network-online.target nss-lookup.target docker.socket firewalld.service containerd.service time-set.target\nWants=network-online.target containerd.service\nRequires=docker.socket\n",
	"containerd.service":              "[Unit]\nAfter=network.target dbus.service local-fs.target\n",
	"kubelet.service":                 "[Unit]\nWants=network-online.target\nAfter=network-online.target\n",
	"hadoop-hdfs-datanode.service":    "[Unit]\nAfter=network.target\n",
	"hadoop-yarn-nodemanager.service": "[Unit]\nAfter=network.target\n",
}

// dropIn adds the shipped drop-in of a unit.
func (b *boot) dropIn(name string) {
	file := name + ".d/50-luks-kms-agent.conf"
	b.write(file, read(b.t, dropIns+file))
}

// With systemd's defaults sockets.target, and with it the boot, would wait for KMS.
func TestSocketOfAConsumerHoldsUpNothing(t *testing.T) {
	if got := settings(t, dropIns+"docker.socket.d/50-luks-kms-agent.conf", "Unit", "DefaultDependencies"); !slices.Equal(got, []string{"no"}) {
		t.Errorf("DefaultDependencies=%v", got)
	}
}

func TestBootHasNoOrderingCycle(t *testing.T) {
	for distribution, packages := range distributions(t) {
		for _, network := range networks {
			for _, a := range additions {
				t.Run(fmt.Sprintf("%s/%s/%s", distribution, strings.Join(append([]string{"cloud-init"}, network...), "+"), a.name), func(t *testing.T) {
					t.Parallel()
					b := newBoot(t, packages, network...)
					a.add(b)
					out := b.verify("multi-user.target")
					found := cycles(out)
					if a.cycle && found == "" {
						t.Errorf("no cycle found where there is one; systemd-analyze said:\n%s", out)
					}
					if !a.cycle && found != "" {
						t.Errorf("cycle:\n%s", found)
					}
					for line := range strings.Lines(out) {
						if strings.Contains(line, "50-luks-kms-agent.conf") {
							t.Errorf("a drop-in: %s", line)
						}
					}
				})
			}
		}
	}
}

// systemd-analyze says nothing at all about our own units, so every directive is known and allowed.
func TestUnitsAreValid(t *testing.T) {
	for distribution, packages := range distributions(t) {
		t.Run(distribution, func(t *testing.T) {
			b := newBoot(t, packages)
			b.write("consumer.service", consumerUnit)
			for line := range strings.Lines(b.verify("luks-kms-agent.service", "luks-kms-agent.target")) {
				if strings.Contains(line, "luks-kms-agent") {
					t.Errorf("%s", line)
				}
			}
			b.write("luks-kms-agent.service.d/bad.conf", "[Service]\nRestartForceExitStatus=5\nNoSuchDirective=1\n")
			out := b.verify("luks-kms-agent.service")
			if !strings.Contains(out, "NoSuchDirective") {
				t.Errorf("a wrong directive was not seen; systemd-analyze said:\n%s", out)
			}
		})
	}
}

// settings returns all values of a directive.
func settings(t *testing.T, file, section, name string) []string {
	t.Helper()
	options, err := unit.DeserializeOptions(strings.NewReader(read(t, file)))
	if err != nil {
		t.Fatal(err)
	}
	var values []string
	for _, o := range options {
		if o.Section == section && o.Name == name {
			values = append(values, strings.Fields(o.Value)...)
		}
	}
	return values
}

// wanted is a value of a directive, and what would be without it.
type wanted struct{ section, name, value, why string }

func wantSettings(t *testing.T, file string, rows []wanted) {
	t.Helper()
	for _, c := range rows {
		if got := settings(t, file, c.section, c.name); !slices.Contains(got, c.value) {
			t.Errorf("%s=%v has no %s: %s", c.name, got, c.value, c.why)
		}
	}
}

// What the design stands on and what no verifier can know to be wanted.
func TestServiceKeepsTheDesign(t *testing.T) {
	const service = "luks-kms-agent.service"
	wantSettings(t, service, []wanted{
		{"Unit", "DefaultDependencies", "no", "multi-user.target, and with it logins, would wait for KMS"},
		{"Unit", "After", "network-online.target", "IMDS and KMS need the network"},
		{"Unit", "After", "local-fs.target", "the records lie on the boot volume"},
		{"Unit", "Wants", "luks-kms-agent.target", "a restart after KMS returns would not start the consumers"},
		{"Unit", "Before", "luks-kms-agent.target", "consumers would start before their volumes"},
		{"Unit", "Conflicts", "shutdown.target", "a run that waits for KMS would hold up the shutdown"},
		{"Unit", "Before", "shutdown.target", "a run that waits for KMS would hold up the shutdown"},
		{"Unit", "StartLimitIntervalSec", "0", "systemd would give up while KMS is away"},
		{"Service", "Type", "oneshot", "the target would be reached before the volumes are open"},
		{"Service", "RemainAfterExit", "yes", "the service would be inactive as soon as it is done"},
		{"Service", "Restart", "on-failure", "exit code 5 would not be tried again"},
		{"Service", "NotifyAccess", "main", "STATUS= and EXTEND_TIMEOUT_USEC= would be dropped"},
		{"Service", "LimitMEMLOCK", "infinity", "mlockall would fail"},
		{"Service", "LimitCORE", "0", "a crash would write keys to disk"},
		{"Service", "RuntimeDirectoryPreserve", "yes", "status.json would go when the service stops"},
		{"Unit", "Wants", "modprobe@dm_crypt.service", "nobody would load dm_crypt"},
		{"Unit", "After", "modprobe@dm_crypt.service", "the agent would not find dm-crypt"},
		{"Service", "CapabilityBoundingSet", "CAP_SYS_ADMIN", "device-mapper would refuse"},
		{"Service", "DeviceAllow", "block-*", "disks could not be opened"},
		{"Service", "DeviceAllow", "/dev/mapper/control", "device-mapper could not be asked"},
		{"Service", "ReadWritePaths", "/sys/devices/virtual", "udev could not be told to look at a mapping again"},
		{"Service", "SystemCallErrorNumber", "EPERM", "a program would be killed without a word"},
		{"Service", "RestrictAddressFamilies", "AF_ALG", "cryptsetup could not encrypt a keyslot"},
		{"Service", "RestrictAddressFamilies", "AF_NETLINK", "libdevmapper could not talk to udev"},
		{"Install", "WantedBy", "multi-user.target", "nothing would start it"},
	})
	// Exactly the exit codes that another try cannot mend (docs: exit codes; 5 is the retryable one).
	if got, want := settings(t, service, "Service", "RestartPreventExitStatus"), strings.Fields("1 2 3 4 6 7 8"); !slices.Equal(got, want) {
		t.Errorf("RestartPreventExitStatus=%v, want %v", got, want)
	}
	options, err := unit.DeserializeOptions(strings.NewReader(read(t, service)))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range options {
		switch {
		case strings.HasPrefix(o.Name, "ExecStop"):
			t.Errorf("%s: stopping the service must not touch a volume", o.Name)
		case strings.HasPrefix(o.Name, "Condition"):
			t.Errorf("%s: a service that is skipped counts as started, and consumers would run without volumes", o.Name)
		case slices.Contains(hidesDisksOrMounts, o.Name):
			t.Errorf("%s hides disks, mounts or semaphores that the agent needs", o.Name)
		}
	}
	for _, name := range []string{"Requires", "After"} {
		if got := settings(t, "luks-kms-agent.target", "Unit", name); !slices.Equal(got, []string{service}) {
			t.Errorf("target: %s=%v, want %s: it would be reached although a volume is not open", name, got, service)
		}
	}
}

// hidesDisksOrMounts has nothing of what the unit sets: that those settings hide none is proven by the story TestSandbox.
var hidesDisksOrMounts = []string{
	"PrivateDevices", "PrivateIPC", "PrivateUsers", "PrivateNetwork", "MountFlags", "PrivateTmp", "ProcSubset",
	"ProtectSystem", "ProtectHome", "ProtectKernelModules", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths",
	"TemporaryFileSystem", "BindPaths", "BindReadOnlyPaths", "RootDirectory", "RootImage", "MountImages", "ExtensionImages", "DynamicUser",
}

// serviceFiles are all services that are shipped.
func serviceFiles(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.service")
	if err != nil || !slices.Contains(files, "luks-kms-agent.service") {
		t.Fatalf("services: %v (%v)", files, err)
	}
	return files
}

// TestExposure holds each service to the figure of docs/hardening.md.
func TestExposure(t *testing.T) {
	for _, file := range serviceFiles(t) {
		// "./": else systemd-analyze looks for an installed unit. In tenths.
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=30", "./"+file).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		t.Logf("%s", lines[len(lines)-1])
		if err != nil {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
	}
}

// TestSandboxIsTheSame: what runs the agent's code runs it in the same sandbox.
func TestSandboxIsTheSame(t *testing.T) {
	const begin, end = "# Sandbox. ", "# End of the sandbox.\n"
	sandbox := func(file string) string {
		_, rest, begins := strings.Cut(read(t, file), begin)
		block, after, ends := strings.Cut(rest, end)
		if !begins || !ends || strings.Contains(after, begin) {
			t.Fatalf("%s has not one sandbox, from %q to %q", file, begin, end)
		}
		return block
	}
	want := sandbox("luks-kms-agent.service")
	for _, file := range serviceFiles(t) {
		if sandbox(file) != want {
			t.Errorf("%s has another sandbox than luks-kms-agent.service", file)
		}
	}
}
