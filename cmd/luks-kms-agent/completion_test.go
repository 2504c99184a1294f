package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
)

// TestCompletion runs testdata/completion: a real bash with bash-completion included. The scripts' folder is in /var/tmp, because a
// configuration with records in /tmp is refused.
func TestCompletion(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "luks-kms-agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	testscript.Run(t, testscript.Params{
		Dir: "testdata/completion", UpdateScripts: *update, WorkdirRoot: dir,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "records": records},
	})
}

// records writes a configuration, and the records of two volumes.
func records(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: records")
	}
	dir := ts.MkAbs("state")
	ts.Check(os.WriteFile(ts.MkAbs("config.yaml"), []byte("kms_key: alias/data\nstate_dir: "+dir+"\n"), 0o600))
	store, err := keycache.OpenStore(dir)
	ts.Check(err)
	now := time.Unix(1, 0).UTC()
	key := keycache.KeyRecord{
		ID: "aaaaaaaa-0000-4000-8000-000000000000", KeyARN: "arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321",
		WrappedKey: []byte("wrapped"), InstanceID: "i-0123456789abcdef0", Region: "us-east-1", Created: now,
	}
	ts.Check(store.PutKey(key))
	for _, v := range []keycache.VolumeRecord{
		{UUID: "aaaaaaaa-0000-4000-8000-000000000001", Class: "ebs", Identity: "vol-0123456789abcdef0", MountPoint: "/mnt", Size: 100 << 30},
		{UUID: "aaaaaaaa-0000-4000-8000-000000000002", Class: "instance-store", Identity: "AWS1234567890ABCDEF0", MountPoint: "/mnt1", Size: 500 << 30},
	} {
		v.KeyID, v.State, v.Filesystem, v.Mapping = key.ID, keycache.StateReady, "xfs", "luks-"+v.UUID
		v.InstanceID, v.Created, v.Changed = key.InstanceID, now, now
		ts.Check(store.PutVolume(v))
	}
}

// TestVolumesAreCompletedEverywhere: whatever command takes VOLUMEs completes them; who may not read the records gets nothing, and no noise.
func TestVolumesAreCompletedEverywhere(t *testing.T) {
	found := 0
	for _, cmd := range commands(newTree()) {
		if !strings.Contains(cmd.Use, "VOLUME") {
			continue
		}
		found++
		for _, config := range []string{filepath.Join(t.TempDir(), "absent.yaml"), t.TempDir()} {
			var out, said strings.Builder
			line := append(append([]string{"__complete"}, strings.Fields(cmd.CommandPath())[1:]...), "--config", config)
			for i := 0; !strings.Contains(argument(cmd.Use, i), "VOLUME"); i++ {
				line = append(line, "another")
			}
			line = append(line, "")
			if code := execute(t.Context(), line, &out, &said); code != exitOK || out.String() != ":4\n" {
				t.Errorf("%v: exit code %d, %q, %s", line, code, &out, &said)
			}
		}
	}
	if found < 2 {
		t.Errorf("%d commands take volumes", found)
	}
}

func TestArgument(t *testing.T) {
	for _, c := range []struct {
		use  string
		i    int
		want string
	}{
		{"run", 0, ""}, {"lock [VOLUME...]", 0, "VOLUME..."}, {"lock [VOLUME...]", 3, "VOLUME..."}, {"import-emr FILE|-", 0, "FILE|-"},
		{"import-emr FILE|-", 1, ""}, {"restore VOLUME FILE", 0, "VOLUME"}, {"restore VOLUME FILE", 1, "FILE"}, {"restore VOLUME FILE", 2, ""},
		{"wipe [--yes] VOLUME...", 1, "VOLUME..."}, {"backup [VOLUME...] --to FILE", 2, "VOLUME..."},
	} {
		if got := argument(c.use, c.i); got != c.want {
			t.Errorf("argument %d of %q is %q, want %q", c.i, c.use, got, c.want)
		}
	}
}

// TestFinish: a command below another has what all have, whoever adds it.
func TestFinish(t *testing.T) {
	root := &cobra.Command{Use: "agent", SilenceErrors: true, SilenceUsage: true}
	root.SetFlagErrorFunc(flagError)
	header := &cobra.Command{Use: "header", Long: "Headers."}
	level := ""
	backup := &cobra.Command{Use: "backup VOLUME FILE", RunE: func(*cobra.Command, []string) error { return nil }}
	backup.Flags().Var(newChoice(&level, "", "low", "high"), "level", "`level`")
	header.AddCommand(backup)
	root.AddCommand(header)
	finish(root, &globalOptions{config: filepath.Join(t.TempDir(), "absent.yaml")})
	run := func(line string) (string, error) {
		var out strings.Builder
		root.SetOut(&out)
		root.SetArgs(strings.Split(line, " "))
		err := root.Execute()
		return out.String(), err
	}
	for line, want := range map[string]string{
		"header bakup":                 `unknown command "bakup" for "agent header": did you mean backup?`,
		"header backup --levl":         "unknown flag: --levl: did you mean --level?",
		"header backup --level middle": `invalid argument "middle" for "--level" flag: allowed: low, high`,
	} {
		if _, err := run(line); exitCode(err) != exitUsage || err.Error() != want {
			t.Errorf("%s: %v, want %s", line, err, want)
		}
	}
	for line, want := range map[string]string{
		"__complete header b":               "backup\n:4\n",
		"__complete header backup /":        ":4\n", // volumes, of which there are none
		"__complete header backup /mnt /":   ":0\n", // files
		"__complete header backup a b c":    ":4\n",
		"__complete header backup --level ": "low\nhigh\n:4\n",
	} {
		if out, err := run(line); err != nil || out != want {
			t.Errorf("%s: %q, %v, want %q", line, out, err, want)
		}
	}
}
