// Package harness boots EC2-like nodes in QEMU for the stories and the demo: true EC2 disk models and serials, instance
// metadata at its real address, and a KMS that records, refuses and fails on request. Emulation is the default; VM_ACCEL=kvm
// asks for hardware virtualisation.
package harness

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	_ "embed" // image.sh
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed image.sh
var imageScript []byte

//go:embed units
var units embed.FS

// partitionOffset is where image.sh puts the root filesystem on the disk, in bytes.
const partitionOffset = 1 << 20

// Assets are what every node is made of. They are made once per process; the image below them is cached.
type Assets struct {
	Kernel string // vmlinuz
	Root   string // raw boot disk with the agent installed; nodes write to overlays of it
	Guest  string // the program of package guest
	KMS    string // local-kms on the loopback address
	IMDS   string // the EC2 metadata mock
	Logs   string // directory for what is left of stories that failed
	Repo   string // top of the agent's tree

	// Processors is how many a machine has whose node does not say; 0 is 2.
	Processors int

	dir      string
	tree     string                   // what goes onto the boot disk
	snapshot func() (snapshot, error) // takes it when it is first asked for
	making   sync.Mutex               // make's folder build
}

// Close removes what Prepare made for this process.
func (a *Assets) Close() error { return os.RemoveAll(a.dir) }

// programs are the ones that the harness runs, with the distribution package that has each.
var programs = map[string]string{
	"qemu-system-x86_64": "qemu-system-x86",
	"qemu-img":           "qemu-utils",
	"mmdebstrap":         "mmdebstrap",
	"mke2fs":             "e2fsprogs",
	"debugfs":            "e2fsprogs",
	"sfdisk":             "fdisk",
	"make":               "make",
}

// Step reports the beginning of a piece of work; the function it returns reports its end.
type Step func(what string) (done func())

// Package is where the boot disk has the agent's package, from which it was installed.
const Package = "/usr/local/lib/story/luks-kms-agent.deb"

// Prepare installs what is missing, builds the servers, and makes the boot disk, on which dpkg installs the agent's package. Packages are
// of Debian, and on the boot disk besides those that every story needs.
func Prepare(ctx context.Context, step Step, packages ...string) (*Assets, error) {
	repo, err := findRepo()
	if err != nil {
		return nil, err
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	if err := installPackages(ctx, step); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "luks-kms-agent-vm-")
	if err != nil {
		return nil, err
	}
	a := &Assets{
		Repo: repo, dir: dir,
		Logs:  filepath.Join(cache, "logs"),
		Root:  filepath.Join(dir, "root.img"),
		Guest: filepath.Join(dir, "guest"),
		KMS:   filepath.Join(cache, "tools", "kms"),
		IMDS:  filepath.Join(cache, "tools", "imds"),
		tree:  filepath.Join(dir, "tree"),
	}
	a.snapshot = sync.OnceValues(a.takeSnapshot)
	if err := a.prepare(ctx, step, cache, packages); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

func (a *Assets) prepare(ctx context.Context, step Step, cache string, packages []string) error {
	unlock, err := lockCache(cache)
	if err != nil {
		return err
	}
	defer unlock()

	done := step("building the servers for tests")
	tools := filepath.Join(a.Repo, "test", "tools")
	err = errors.Join(
		command(ctx, tools, "go", "build", "-trimpath", "-o", a.KMS, "./kms"),
		command(ctx, tools, "go", "build", "-trimpath", "-o", a.IMDS, "github.com/aws/amazon-ec2-metadata-mock/cmd"),
		command(ctx, a.Repo, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-o", a.Guest, "./test/vm/guest"),
	)
	if err != nil {
		return err
	}
	done()

	done = step("building the agent")
	story := filepath.Join(a.tree, "usr/local/lib/story")
	err = errors.Join(
		a.BuildPackage(ctx, "deb", filepath.Join(a.tree, Package)),
		// Not in PATH: a story links the AWS CLI where it plays an administrator, and starts the agent that stops at steps by name; the
		// benchmark does so with what it measures the agent against.
		command(ctx, a.Repo, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-o", filepath.Join(story, "aws"), "./test/vm/awscli"),
		command(ctx, a.Repo, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-o", filepath.Join(story, "floor"), "./test/vm/floor"),
		command(ctx, a.Repo, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-tags", "holdsteps", "-ldflags", "-s -w",
			"-o", filepath.Join(story, "luks-kms-agent-hold"), "./cmd/luks-kms-agent"),
		a.addStoryFiles(a.tree),
	)
	if err != nil {
		return err
	}
	done()
	return a.makeBootDisk(ctx, step, cache, bookworm, packages)
}

// The releases of Debian that nodes are made of: 12, of which all stories are, and the next.
const (
	bookworm = "bookworm"
	Trixie   = "trixie"
)

// Userland returns what nodes of another release of Debian are made of: its kernel, and a boot disk of its programs, onto which its dpkg
// put the same package of the agent. [Assets.Close] removes it too.
func (a *Assets) Userland(ctx context.Context, step Step, suite string) (*Assets, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	unlock, err := lockCache(cache)
	if err != nil {
		return nil, err
	}
	defer unlock()
	dir := filepath.Join(a.dir, suite)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	b := &Assets{
		Repo: a.Repo, Guest: a.Guest, KMS: a.KMS, IMDS: a.IMDS, Logs: a.Logs, Root: filepath.Join(dir, "root.img"), Processors: a.Processors,
		dir: dir, tree: a.tree,
		snapshot: func() (snapshot, error) { return snapshot{}, fmt.Errorf("there is no snapshot of %s: boot it", suite) },
	}
	return b, b.makeBootDisk(ctx, step, cache, suite, nil)
}

// makeBootDisk makes the boot disk of a release of Debian, with the agent on it, and finds its kernel.
func (a *Assets) makeBootDisk(ctx context.Context, step Step, cache, suite string, packages []string) error {
	image, err := buildImage(ctx, step, cache, suite, strings.Join(packages, " "))
	if err != nil {
		return err
	}
	a.Kernel = filepath.Join(image, "vmlinuz")
	defer step("installing the agent on the boot disk of " + suite)()
	if err := command(ctx, a.dir, "cp", "--sparse=always", filepath.Join(image, "root.img"), a.Root); err != nil {
		return err
	}
	if err := inject(ctx, a.Root, a.tree); err != nil {
		return err
	}
	return a.installPackage()
}

// BuildPackage makes the agent's package for the stories' machine, deb or rpm; variables are more of make's.
func (a *Assets) BuildPackage(ctx context.Context, format, file string, variables ...string) error {
	a.making.Lock()
	defer a.making.Unlock()
	dir, err := os.MkdirTemp(a.dir, "package-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	arguments := append([]string{"package", "ARCHES=amd64", "FORMATS=" + format, "PACKAGES=" + dir}, variables...)
	if err := command(ctx, a.Repo, "make", arguments...); err != nil {
		return err
	}
	made, err := filepath.Glob(filepath.Join(dir, "*."+format))
	if err != nil || len(made) != 1 {
		return fmt.Errorf("make package left %q: %w", made, err)
	}
	return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.Rename(made[0], file))
}

//go:embed install.sh
var installScript []byte

// installPackage lets dpkg install the package on the boot disk, in a boot whose only process is the script that does so: root rights
// that the host does not have to give.
func (a *Assets) installPackage() error {
	dir := filepath.Join(a.dir, "install")
	logs := filepath.Join(a.Logs, "install")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.RemoveAll(logs), os.MkdirAll(logs, 0o755)); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	h := hardware{
		socket: filepath.Join(dir, "channel"), console: filepath.Join(logs, "console.log"), said: filepath.Join(logs, "qemu.log"),
		boot: filepath.Join(dir, "boot.qcow2"), init: installInit,
		imds: "127.0.0.1:1", kms: "127.0.0.1:1", kmsTLS: "127.0.0.1:1", // nothing in there asks them
	}
	if err := createOverlay("raw", a.Root, h.boot); err != nil {
		return err
	}
	m, err := a.start(h)
	if err != nil {
		return err
	}
	defer m.kill()
	ended := m.awaitEnd(3 * time.Minute)
	console, err := os.ReadFile(h.console)
	if err != nil {
		return err
	}
	if !ended || !bytes.Contains(console, []byte("\ninstalled")) {
		return fmt.Errorf("cannot install the agent's package on the boot disk (console: %s):\n%s", logs, lastLines(console, 20))
	}
	if out, err := exec.Command("qemu-img", "commit", "-q", h.boot).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img commit: %w: %s", err, out)
	}
	return os.RemoveAll(logs)
}

// installInit is where the boot disk has install.sh.
const installInit = "/usr/local/lib/story/install"

// addStoryFiles adds the guest program, install.sh and the stories' units to the tree that goes onto the boot disk, and enables
// every service of these as `systemctl enable` would.
func (a *Assets) addStoryFiles(tree string) error {
	guest, err := os.ReadFile(a.Guest)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(tree, "usr/local/lib/story/guest"), guest, 0o755); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(tree, installInit), installScript, 0o755); err != nil {
		return err
	}
	names, err := fs.Glob(units, "units/*")
	if err != nil {
		return err
	}
	for _, name := range names {
		b, err := units.ReadFile(name)
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(tree, "etc/systemd/system", path.Base(name)), b, 0o644); err != nil {
			return err
		}
	}
	return enableUnits(tree)
}

func enableUnits(tree string) error {
	return filepath.WalkDir(tree, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || !strings.Contains(file, "/systemd/system/") {
			return err
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		inside, err := filepath.Rel(tree, file)
		if err != nil {
			return err
		}
		for _, line := range strings.Split(string(b), "\n") {
			targets, found := strings.CutPrefix(line, "WantedBy=")
			if !found {
				continue
			}
			for _, target := range strings.Fields(targets) {
				wants := filepath.Join(tree, "etc/systemd/system", target+".wants")
				if err := os.MkdirAll(wants, 0o755); err != nil {
					return err
				}
				if err := os.Symlink("/"+inside, filepath.Join(wants, filepath.Base(file))); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// inject copies a tree into the root filesystem of a raw disk image, owned by root whoever runs this.
func inject(ctx context.Context, image, tree string) error {
	var script bytes.Buffer
	err := filepath.WalkDir(tree, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		inside, err := filepath.Rel(tree, file)
		if err != nil || inside == "." {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if path.Dir(inside) == "lib" || inside == "lib" {
			return fmt.Errorf("cannot install /%s: /lib is a link on the boot disk", inside)
		}
		switch {
		case entry.IsDir():
			// mkdir fails where the directory is there already, which is as good.
			fmt.Fprintf(&script, "mkdir %s\n", inside)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(file)
			if err != nil {
				return err
			}
			fmt.Fprintf(&script, "symlink %s %s\n", inside, target)
		default:
			fmt.Fprintf(&script, "rm %s\nwrite %s %s\nsif %s mode 0%o\nsif %s uid 0\nsif %s gid 0\n",
				inside, file, inside, inside, 0o100000|info.Mode().Perm(), inside, inside)
		}
		return nil
	})
	if err != nil {
		return err
	}
	commands := tree + ".debugfs"
	if err := os.WriteFile(commands, script.Bytes(), 0o600); err != nil {
		return err
	}
	return command(ctx, tree, "debugfs", "-w", "-f", commands, fmt.Sprintf("%s?offset=%d", image, partitionOffset))
}

// buildImage makes the boot disk without the agent, or finds it in the cache under the hash of its inputs.
func buildImage(ctx context.Context, step Step, cache, suite, packages string) (string, error) {
	sources, err := aptSources(suite)
	if err != nil {
		return "", err
	}
	aptConf := aptSettings(ctx)
	hash := sha256.New()
	for _, input := range [][]byte{imageScript, []byte(suite), sources, []byte(packages)} {
		fmt.Fprintf(hash, "%d\n", len(input))
		hash.Write(input)
	}
	dir := filepath.Join(cache, fmt.Sprintf("image-%x", hash.Sum(nil)[:8]))
	if _, err := os.Stat(filepath.Join(dir, "root.img")); err == nil {
		return dir, nil
	}
	defer step("building the VM image of " + suite + " (once)")()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	inputs, err := os.MkdirTemp("", "luks-kms-agent-image-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(inputs)
	script := filepath.Join(inputs, "image.sh")
	settings := filepath.Join(inputs, "apt.conf")
	list := ""
	err = errors.Join(writeFile(script, imageScript, 0o644), writeFile(settings, aptConf, 0o644))
	if len(sources) > 0 {
		list = filepath.Join(inputs, suite+".sources")
		err = errors.Join(err, writeFile(list, sources, 0o644))
	}
	// apt drops its privileges to read these.
	err = errors.Join(err, os.Chmod(inputs, 0o755))
	if err != nil {
		return "", err
	}
	if err := asRoot(ctx, "sh", script, dir, suite, list, settings, packages); err != nil {
		return "", fmt.Errorf("cannot build the VM image: %w", err)
	}
	return dir, nil
}

// aptSources returns the machine's own apt sources, for a suite, so that its choice of mirror is honoured, or nothing on a machine that
// is not of bookworm.
func aptSources(suite string) ([]byte, error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil || !bytes.Contains(release, []byte("VERSION_CODENAME="+bookworm)) {
		return nil, nil // not Debian 12: mmdebstrap knows Debian's mirror
	}
	files, err := filepath.Glob("/etc/apt/sources.list.d/*.sources")
	if err != nil {
		return nil, err
	}
	var deb822, oneLine bytes.Buffer
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for _, stanza := range strings.Split(string(b), "\n\n") {
			if suites(stanza, "Suites:") {
				fmt.Fprintf(&deb822, "%s\n\n", strings.TrimSpace(stanza))
			}
		}
	}
	if deb822.Len() > 0 {
		return bytes.ReplaceAll(deb822.Bytes(), []byte(bookworm), []byte(suite)), nil
	}
	files, err = filepath.Glob("/etc/apt/sources.list.d/*.list")
	if err != nil {
		return nil, err
	}
	for _, file := range append(files, "/etc/apt/sources.list") {
		b, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, line := range strings.Split(string(b), "\n") {
			if suites(line, "deb ") {
				fmt.Fprintln(&oneLine, line)
			}
		}
	}
	return bytes.ReplaceAll(oneLine.Bytes(), []byte(bookworm), []byte(suite)), nil
}

// suites says whether a stanza or line of apt's sources names a suite of bookworm on a line with a prefix.
func suites(text, prefix string) bool {
	for _, line := range strings.Split(text, "\n") {
		if !strings.HasPrefix(line, prefix) {
			continue
		}
		for _, word := range strings.Fields(line) {
			if strings.TrimSuffix(strings.TrimSuffix(word, "-updates"), "-security") == bookworm {
				return true
			}
		}
	}
	return false
}

// aptSettings returns how this machine's apt downloads: proxies and what it accepts of a mirror.
func aptSettings(ctx context.Context) []byte {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "--no-empty").Output()
	if err != nil {
		return nil
	}
	var settings bytes.Buffer
	for _, line := range strings.Split(string(out), "\n") {
		for _, prefix := range []string{"Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until", "Acquire::Check-Date"} {
			if strings.HasPrefix(line, prefix) {
				fmt.Fprintln(&settings, line)
			}
		}
	}
	return settings.Bytes()
}

func installPackages(ctx context.Context, step Step) error {
	missing := map[string]bool{}
	for program, pkg := range programs {
		if _, err := lookPath(program); err != nil {
			missing[pkg] = true
		}
	}
	if _, err := os.Stat("/usr/share/keyrings/debian-archive-keyring.gpg"); err != nil {
		missing["debian-archive-keyring"] = true
	}
	if len(missing) == 0 {
		return nil
	}
	names := slices.Sorted(maps.Keys(missing))
	defer step("installing " + strings.Join(names, ", "))()
	return Install(ctx, names...)
}

// Install installs Debian's packages on the host.
func Install(ctx context.Context, packages ...string) error {
	if err := asRoot(ctx, "apt-get", "-q", "update"); err != nil {
		return err
	}
	arguments := append([]string{"DEBIAN_FRONTEND=noninteractive", "apt-get", "-qy", "install", "--no-install-recommends"}, packages...)
	return asRoot(ctx, "env", arguments...)
}

// lookPath finds a program also where an unprivileged user's PATH does not look.
func lookPath(name string) (string, error) {
	if found, err := exec.LookPath(name); err == nil {
		return found, nil
	}
	return exec.LookPath("/usr/sbin/" + name)
}

// asRoot runs a program as root, with sudo where needed.
func asRoot(ctx context.Context, name string, args ...string) error {
	if os.Geteuid() == 0 {
		return command(ctx, "/", name, args...)
	}
	return command(ctx, "/", "sudo", append([]string{name}, args...)...)
}

// command runs a program; what it said is part of the error.
func command(ctx context.Context, dir, name string, args ...string) error {
	found, err := lookPath(name)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, found, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, lastLines(out, 40))
	}
	return nil
}

func lastLines(b []byte, n int) string {
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

func writeFile(file string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, data, mode)
}

func cacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(base, "luks-kms-agent")
	return dir, os.MkdirAll(dir, 0o755)
}

// lockCache keeps two runs from building the same image at once.
func lockCache(cache string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// findRepo goes up from the working directory to the agent's module.
func findRepo() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(b, []byte("module github.com/luks-kms-agent/luks-kms-agent\n")) {
			return dir, nil
		}
		if dir == "/" {
			return "", errors.New("not inside the tree of luks-kms-agent")
		}
	}
}

// Announce is a Step that writes a line when a piece of work begins and, where it took more than a second, one with how
// long it took when it ends.
func Announce(w io.Writer) Step {
	return func(what string) func() {
		begun := time.Now()
		fmt.Fprintf(w, "- %s …\n", what)
		return func() {
			if took := time.Since(begun); took > time.Second {
				fmt.Fprintf(w, "  %.0f s\n", took.Seconds())
			}
		}
	}
}
