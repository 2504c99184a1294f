package packaging_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/document"
)

var arches = flag.String("arches", runtime.GOARCH, "architectures whose packages TestPackages makes")

// entry is a file of a package.
type entry struct {
	mode   fs.FileMode
	owner  string
	digest string // SHA-256
	conf   bool   // kept by an upgrade where it was changed
}

// TestPackages: two builds of the same tree, in different places and surroundings, are the same bytes; the packages have the files of `make
// install` and no others; and the SBOM names the modules that are linked.
func TestPackages(t *testing.T) {
	for _, program := range []string{"make", "dpkg-deb", "rpm"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("install %s (make test-unit does)", program)
		}
	}
	first, second := copyTree(t), copyTree(t)
	sums := makePackages(t, first, "022", "TZ=UTC")
	if again := makePackages(t, second, "077", "TZ=Pacific/Auckland", "LC_ALL=C.UTF-8"); again != sums {
		t.Errorf("SHA256SUMS are\n%s\nthen\n%s", sums, again)
	}
	packages := filepath.Join(first, "build/packages")
	wantSums(t, packages, sums)
	command, err := document.Command("..", "docs/packages.md", "Packages", "cd build/packages ")
	if err != nil {
		t.Fatal(err)
	}
	check := exec.Command("sh", "-c", command)
	check.Dir = first
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("%s: %v\n%s", command, err, out)
	}

	for _, arch := range strings.Split(*arches, ",") {
		binary := filepath.Join(first, "build/package/luks-kms-agent-"+arch)
		wantStatic(t, binary, arch)
		if arch == runtime.GOARCH {
			if out, err := exec.Command(binary, "version").Output(); err != nil || !strings.HasPrefix(string(out), "luks-kms-agent v1.2.3-4-gc0ffee0 ") {
				t.Errorf("version: %s (%v)", out, err)
			}
		}
		wantModules(t, filepath.Join(packages, "luks-kms-agent_1.2.3+4.gc0ffee0_"+arch+".cdx.json"), binary)

		deb := debFiles(t, filepath.Join(packages, "luks-kms-agent_1.2.3+4.gc0ffee0_"+arch+".deb"))
		wantSame(t, "deb and make install", deb, treeFiles(t, filepath.Join(first, "build/package", arch+"-deb")))
		machine := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch]
		rpm := rpmFiles(t, filepath.Join(packages, "luks-kms-agent-1.2.3+4.gc0ffee0-1."+machine+".rpm"))
		wantSame(t, "rpm and make install", rpm, treeFiles(t, filepath.Join(first, "build/package", arch+"-rpm")))
		// Where zsh looks is all that the distributions do not agree on.
		rpm["/usr/share/zsh/vendor-completions/_luks-kms-agent"] = rpm["/usr/share/zsh/site-functions/_luks-kms-agent"]
		delete(rpm, "/usr/share/zsh/site-functions/_luks-kms-agent")
		wantSame(t, "rpm and deb", rpm, deb)

		if host := said(t, "rpm", "-qp", "--qf", "%{BUILDHOST}", filepath.Join(packages, "luks-kms-agent-1.2.3+4.gc0ffee0-1."+machine+".rpm")); host != "localhost" {
			t.Errorf("the rpm says that it was made on %q", host)
		}
		for path, mode := range map[string]fs.FileMode{
			"/usr/bin/luks-kms-agent": 0o755, "/etc/luks-kms-agent/config.yaml": 0o640, "/usr/lib/systemd/system/luks-kms-agent.target": 0o644,
			// Picked up where there is one.
			"/usr/lib/systemd/system/luks-kms-agent-test@.service": 0o644, "/usr/lib/udev/rules.d/99-test.rules": 0o644,
			"/usr/share/doc/luks-kms-agent/licenses/of/one/LICENSE": 0o644, "/usr/share/doc/luks-kms-agent/drop-ins/test.conf": 0o644,
			"/usr/share/man/man8/luks-kms-agent-run.8.gz": 0o644,
		} {
			if got, ok := deb[path]; !ok || got.mode != mode {
				t.Errorf("%s: %v, want mode %o", path, got, mode)
			}
		}
	}
}

// copyTree copies what a package is made of, and some of what others may add.
func copyTree(t *testing.T) string {
	t.Helper()
	to := t.TempDir()
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains([]string{".git", "bin", "build"}, d.Name()) {
			return fs.SkipDir
		}
		if !d.Type().IsRegular() {
			return nil
		}
		info, errInfo := d.Info()
		text, errRead := os.ReadFile(path)
		if err := errors.Join(errInfo, errRead); err != nil {
			return err
		}
		return write(filepath.Join(to, strings.TrimPrefix(path, "..")), text, info.Mode().Perm())
	})
	for _, path := range []string{
		"systemd/luks-kms-agent-test@.service", "systemd/99-test.rules", "packaging/licenses/of/one/LICENSE", "packaging/drop-ins/test.conf",
	} {
		err = errors.Join(err, write(filepath.Join(to, path), []byte("# a test\n"), 0o644))
	}
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func write(path string, text []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, text, mode)
}

// makePackages runs `make package` in a tree and returns SHA256SUMS.
func makePackages(t *testing.T, tree, umask string, environment ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "umask "+umask+" && exec make package ARCHES='"+strings.ReplaceAll(*arches, ",", " ")+"'")
	cmd.Dir = tree
	// A tree without git, as of an archive.
	cmd.Env = append(os.Environ(), append(environment, "VERSION=v1.2.3-4-gc0ffee0", "SOURCE_DATE_EPOCH=1700000000", "MAKEFLAGS=", "MAKELEVEL=")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make package: %v\n%s", err, out)
	}
	return read(t, filepath.Join(tree, "build/packages/SHA256SUMS"))
}

// wantSums checks that SHA256SUMS is right and complete.
func wantSums(t *testing.T, dir, sums string) {
	t.Helper()
	var want strings.Builder
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name() != "SHA256SUMS" {
			fmt.Fprintf(&want, "%x  %s\n", sha256.Sum256([]byte(read(t, filepath.Join(dir, f.Name())))), f.Name())
		}
	}
	if sums != want.String() {
		t.Errorf("SHA256SUMS is\n%s\nwant\n%s", sums, want.String())
	}
}

// wantStatic checks that nothing but the kernel loads the program, and that its stack is not executable: with an interpreter, as Go's
// position-independent programs have one, LD_PRELOAD would put code into the process that has the keys.
func wantStatic(t *testing.T, binary, arch string) {
	t.Helper()
	f, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]; f.Machine != want {
		t.Errorf("%s is for %v", binary, f.Machine)
	}
	stack := false
	for _, p := range f.Progs {
		switch {
		case p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC:
			t.Errorf("%s has %v", binary, p.Type)
		case p.Type == elf.PT_GNU_STACK:
			stack = p.Flags&elf.PF_X == 0
		case p.Flags&(elf.PF_W|elf.PF_X) == elf.PF_W|elf.PF_X:
			t.Errorf("%s has memory that can be written and executed", binary)
		}
	}
	if !stack {
		t.Errorf("%s may have an executable stack", binary)
	}
}

// wantModules checks that the SBOM has the modules of the program, with their versions, and nothing else.
func wantModules(t *testing.T, sbom, binary string) {
	t.Helper()
	var bom struct {
		SpecVersion, SerialNumber string
		Metadata                  struct{ Timestamp string }
		Components                []struct{ Name, Version string }
	}
	if err := json.Unmarshal([]byte(read(t, sbom)), &bom); err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"std " + info.GoVersion}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		want = append(want, m.Path+" "+m.Version)
	}
	var got []string
	for _, c := range bom.Components {
		got = append(got, c.Name+" "+c.Version)
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) || len(got) < 10 {
		t.Errorf("%s has\n%q\nand the program\n%q", sbom, got, want)
	}
	if bom.SpecVersion == "" || bom.SerialNumber != "" || bom.Metadata.Timestamp != "2023-11-14T22:13:20Z" {
		t.Errorf("%s: %+v", sbom, bom)
	}
}

// treeFiles are the files that `make install` made, as a package has them.
func treeFiles(t *testing.T, tree string) map[string]entry {
	t.Helper()
	files := map[string]entry{}
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, tree)
		files[name] = entry{info.Mode(), "root:root", digest([]byte(read(t, path))), strings.HasPrefix(name, "/etc/")}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func debFiles(t *testing.T, deb string) map[string]entry {
	t.Helper()
	conffiles := strings.Fields(said(t, "dpkg-deb", "--info", deb, "conffiles"))
	files := map[string]entry{}
	for archive := tar.NewReader(strings.NewReader(said(t, "dpkg-deb", "--fsys-tarfile", deb))); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		var content bytes.Buffer
		if _, err := io.Copy(&content, archive); err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(h.Name, ".")
		files[name] = entry{h.FileInfo().Mode(), h.Uname + ":" + h.Gname, digest(content.Bytes()), slices.Contains(conffiles, name)}
	}
}

func rpmFiles(t *testing.T, rpm string) map[string]entry {
	t.Helper()
	files := map[string]entry{}
	const format = "[%{FILENAMES}\t%{FILEMODES}\t%{FILEUSERNAME}:%{FILEGROUPNAME}\t%{FILEDIGESTS}\t%{FILEFLAGS:fflags}\n]"
	for line := range strings.Lines(said(t, "rpm", "-qp", "--qf", format, rpm)) {
		var mode uint32
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if _, err := fmt.Sscan(f[1], &mode); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if mode&0o170000 == 0o040000 {
			continue
		}
		if mode&0o170000 != 0o100000 {
			t.Errorf("%s has the mode %o", f[0], mode)
		}
		files[f[0]] = entry{fs.FileMode(mode & 0o7777), f[2], f[3], f[4] == "cn"} // configuration, noreplace
	}
	return files
}

func digest(content []byte) string { return fmt.Sprintf("%x", sha256.Sum256(content)) }

func said(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, stderr.String())
	}
	return string(out)
}

func wantSame(t *testing.T, what string, got, want map[string]entry) {
	t.Helper()
	all := maps.Clone(want)
	maps.Copy(all, got)
	for _, path := range slices.Sorted(maps.Keys(all)) {
		if got[path] != want[path] {
			t.Errorf("%s: %s is %v, and %v", what, path, got[path], want[path])
		}
	}
}

// Versions of packages are ordered as the builds were made, by dpkg and by rpm.
func TestPackageVersions(t *testing.T) {
	const day = 24 * 60 * 60
	var last string
	for i, describe := range []string{
		"fffffff", "0000000", "0000000-dirty", // one commit after the other, before the first tag
		"v0.9.0-rc1", "v0.9.0-rc1-2-gfffffff", "v0.9.0-rc1-10-g0000000", "v0.9.0-rc1-10-g0000000-dirty", "v0.9.0-rc2", "v0.9.0", "v0.9.0-dirty",
		"v0.9.0-5-gfffffff", "v0.9.0-5-gfffffff-dirty", "v0.9.0-12-g0000000", "v0.9.1", "v0.10.0", "v1.0.0",
	} {
		version := strings.TrimSpace(said(t, "./version.sh", describe, fmt.Sprint(1700000000+min(i, 1)*day)))
		if strings.ContainsAny(version, "-_ v") || cmp.Compare(version, last) == 0 {
			t.Errorf("%s becomes %q", describe, version)
		}
		if last != "" {
			if err := exec.Command("dpkg", "--compare-versions", last, "lt", version).Run(); err != nil {
				t.Errorf("dpkg: %s is not before %s", last, version)
			}
			if out := said(t, "rpm", "--eval", fmt.Sprintf("%%{lua:print(rpm.vercmp(%q,%q))}", last, version)); strings.TrimSpace(out) != "-1" {
				t.Errorf("rpm: %s is not before %s: %s", last, version, out)
			}
		}
		last = version
	}
}
