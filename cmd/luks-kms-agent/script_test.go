package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// update makes the scripts' expected output that of today: make update-golden.
var update = flag.Bool("update", false, "rewrite the expected output in testdata")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"luks-kms-agent": main,
		"carry-out":      printProtection,
		"report":         printReportAsJSON,
	})
}

// The scripts never `run`, `plan`, `lock` or `unlock` with a configuration that
// is good: the disks of the machine that runs the tests are not theirs.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: *update,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      exits,
			"disk":       disk,
			"our-volume": ourVolume,
			"cipher":     cipher,
			"attacks":    attacks,
		},
	})
}

// printProtection carries out nothing, and prints how the memory of the process is protected where keys would be read.
func printProtection() {
	if err := os.WriteFile("config.yaml", []byte("kms_key: alias/data\n"), 0o600); err != nil {
		panic(err)
	}
	cmd := &cobra.Command{}
	err := carryOut(cmd, &globalOptions{config: "config.yaml", logFormat: "console"}, false, func(*agent.Node) (agent.Report, error) {
		dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		fmt.Println("dumpable", dumpable)
		return agent.Report{}, err
	})
	if err != nil {
		panic(err)
	}
}

func TestMemoryIsProtectedBeforeAKeyIsRead(t *testing.T) {
	testscript.Run(t, testscript.Params{Files: []string{script(t, "exec carry-out\nstdout 'dumpable 0'\n")}})
}

// printReportAsJSON is run --json of a report in which a volume is refused; stopped by an error where there is an argument.
func printReportAsJSON() {
	if err := os.WriteFile("config.yaml", []byte("kms_key: alias/data\n"), 0o600); err != nil {
		panic(err)
	}
	var stop error
	if len(os.Args) > 1 {
		stop = fmt.Errorf("%s: %w", os.Args[1], keycache.ErrLocked)
	}
	cmd := &cobra.Command{}
	cmd.SetOut(os.Stdout)
	err := carryOut(cmd, &globalOptions{config: "config.yaml"}, true, func(*agent.Node) (agent.Report, error) { return report(), stop })
	printError(os.Stderr, err)
	os.Exit(exitCode(err))
}

// script is a script in a file of its own.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script.txtar")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestNothingIsIgnored: an argument that a command does not know may have been meant to narrow what it does.
func TestNothingIsIgnored(t *testing.T) {
	for _, command := range []string{"run", "plan", "status"} {
		var out, said strings.Builder
		code := execute(t.Context(), []string{"--config", filepath.Join(t.TempDir(), "absent"), command, "/dev/x"}, &out, &said)
		if code != exitUsage || !strings.Contains(said.String(), `unknown command "/dev/x"`) {
			t.Errorf("%s: exit code %d, %s", command, code, &said)
		}
	}
}

// exits runs the rest of its line and wants an exit code: exits 3 luks-kms-agent …
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND…")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := "0"
	if err != nil {
		var exit *exec.ExitError
		if !asExit(err, &exit) {
			ts.Fatalf("%v", err)
		}
		code = strings.TrimPrefix(exit.String(), "exit status ")
	}
	if code != args[0] {
		ts.Fatalf("exit code is %s, want %s", code, args[0])
	}
}

func asExit(err error, to **exec.ExitError) bool {
	exit, ok := err.(*exec.ExitError)
	*to = exit
	return ok
}

// disk makes an empty image of 40 MiB.
func disk(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		ts.Check(os.WriteFile(ts.MkAbs(name), nil, 0o600))
		ts.Check(os.Truncate(ts.MkAbs(name), 40<<20))
	}
}

// ourVolume formats an image as the agent does.
func ourVolume(ts *testscript.TestScript, neg bool, args []string) {
	disk(ts, neg, args)
	key, err := keycache.NewKey(make([]byte, 32))
	ts.Check(err)
	defer key.Wipe()
	ts.Check(luks.Format(context.Background(), ts.MkAbs(args[0]), luks.FormatOptions{
		UUID: "aaaaaaaa-0000-4000-8000-000000000001", Label: "vol-0123456789abcdef0",
		KeyARN:     "arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321",
		WrappedKey: []byte("wrapped"),
	}, key))
}

// cipher writes another cipher over the segment's in both headers; the checksums
// are then wrong, so cryptsetup-like tools see damage and so do we.
func cipher(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	data, err := os.ReadFile(path)
	ts.Check(err)
	text := strings.ReplaceAll(string(data[:32<<10]), `"aes-xts-plain64"`, `"cipher_null-ecb"`)
	copy(data, text)
	ts.Check(os.WriteFile(path, data, 0o600))
}

// attacks makes each attack on a copy of a volume of ours and wants inspect to refuse it with exit code 7 and the reason. The attacks
// that only the MAC sees need the key: inspect lets them pass, `run` refuses them (agent's TestAttacksInRun).
func attacks(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: attacks VOLUME")
	}
	head := []byte(ts.ReadFile(args[0]))[:1<<20]
	refused := 0
	for _, a := range lukstest.Attacks() {
		path := ts.MkAbs("attacked.img")
		ts.Check(os.WriteFile(path, head, 0o600))
		ts.Check(os.Truncate(path, 17<<20))
		ts.Check(a.Do(path))
		before, err := os.ReadFile(path)
		ts.Check(err)
		want := "0"
		if a.Reason != "" {
			want = "7"
			refused++
		}
		exits(ts, false, []string{want, "luks-kms-agent", "inspect", "attacked.img"})
		if !strings.Contains(ts.ReadFile("stdout"), a.Reason) || !strings.Contains(ts.ReadFile("stderr"), a.Reason) {
			ts.Fatalf("%s: nothing says %q", a.Name, a.Reason)
		}
		after, err := os.ReadFile(path)
		ts.Check(err)
		if !bytes.Equal(before, after) {
			ts.Fatalf("%s: the image was changed", a.Name)
		}
	}
	if refused < 20 {
		ts.Fatalf("only %d attacks are refused", refused)
	}
}
