package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// run is one run of a subject.
type run struct {
	took  time.Duration
	cpu   time.Duration // of its processes
	peak  float64       // MiB, of its processes together
	bytes int64         // of the log
	stored
}

// bencher runs the subjects.
type bencher struct {
	dir   string
	agent string // the program
}

// testLog is what is archived.
type testLog struct {
	path   string
	size   int64
	sha256 string
}

// newLog writes a log, and has it in the page cache after that.
func (b bencher) newLog(k kind, mebibytes int) (log testLog, err error) {
	log.path = filepath.Join(b.dir, "node.log")
	f, err := os.Create(log.path)
	if err != nil {
		return log, fmt.Errorf("cannot write the log: %w", err)
	}
	sum := sha256.New()
	err = errors.Join(writeLog(io.MultiWriter(f, sum), k, int64(mebibytes)*mib, 1), f.Sync(), f.Close())
	if err != nil {
		return log, fmt.Errorf("cannot write the log: %w", err)
	}
	facts, err := os.Stat(log.path)
	if err != nil {
		return log, err
	}
	log.size, log.sha256 = facts.Size(), hex.EncodeToString(sum.Sum(nil))
	return log, nil
}

// archive is a run of the agent, which has never seen the log.
func (b bencher) archive(ctx context.Context, log testLog) (r run, err error) {
	state, err := os.MkdirTemp(b.dir, "state-")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(state)) }()
	return b.with(ctx, log, func(p places) (run, error) {
		config := filepath.Join(state, "config.yaml")
		text := fmt.Sprintf("kms_key: %s\nkms_endpoint: %s\nimds_endpoint: %s\nstate_dir: %s/state\naudit_log: %s/log/audit.jsonl\n", p.Key, p.KMS, p.IMDS, state, state) +
			fmt.Sprintf("logs:\n  bucket: %s\n  cluster: bench\n  s3_endpoint: %s\n  spool_dir: %s/spool\n  files: [%q]\n", bucket, p.S3, state, log.path)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			return r, err
		}
		return together(exec.CommandContext(ctx, b.agent, "--config", config, "logs", "archive"))
	})
}

// gzip is a run of what a user would pick.
func (b bencher) gzip(ctx context.Context, log testLog) (r run, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	return b.with(ctx, log, func(p places) (run, error) {
		where, err := json.Marshal(p)
		if err != nil {
			return r, err
		}
		zip, upload := exec.CommandContext(ctx, "gzip", "-6"), exec.CommandContext(ctx, self, "upload", string(where))
		in, err := os.Open(log.path)
		if err != nil {
			return r, err
		}
		defer in.Close()
		from, to, err := os.Pipe()
		if err != nil {
			return r, err
		}
		zip.Stdin, zip.Stdout, upload.Stdin = in, to, from
		return together(zip, upload)
	})
}

// with runs a subject while the servers are there, and compares what lies there then with the log.
func (b bencher) with(ctx context.Context, log testLog, subject func(places) (run, error)) (r run, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	servers := exec.CommandContext(ctx, self, "serve")
	servers.Stderr = os.Stderr
	in, err := servers.StdinPipe()
	if err != nil {
		return r, err
	}
	out, err := servers.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := servers.Start(); err != nil {
		return r, fmt.Errorf("cannot start the servers: %w", err)
	}
	var p places
	told := json.NewDecoder(out)
	if err = told.Decode(&p); err == nil {
		r, err = subject(p)
	}
	err = errors.Join(err, in.Close())
	if err == nil {
		err = told.Decode(&r.stored)
	}
	if err = errors.Join(err, servers.Wait()); err != nil {
		return r, err
	}
	if r.bytes = log.size; r.SHA256 != log.sha256 {
		return r, fmt.Errorf("what was stored is not the log: %d objects of %d bytes", r.Objects, r.Bytes)
	}
	return r, nil
}

// together runs processes of which each reads what the one before writes.
//
// Their peak memory is ru_maxrss, which is at least what this process had when it started them: it is to stay small.
func together(processes ...*exec.Cmd) (r run, err error) {
	start := time.Now()
	var errs []error
	for i, p := range processes {
		p.Env = []string{"PATH=" + os.Getenv("PATH")} // nothing that changes how Go collects garbage
		p.Stderr = os.Stderr
		if err := p.Start(); err != nil {
			errs = append(errs, fmt.Errorf("cannot start %s: %w", p.Path, err))
			processes = processes[:i]
			break
		}
	}
	for _, p := range processes {
		for _, end := range []any{p.Stdin, p.Stdout} {
			if f, ok := end.(*os.File); ok {
				f.Close() // the process has it, and its end must show
			}
		}
	}
	for _, p := range processes {
		if err := p.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("cannot run %s: %w", p.Path, err))
			continue
		}
		r.cpu += p.ProcessState.UserTime() + p.ProcessState.SystemTime()
		r.peak += float64(p.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) / 1024
	}
	r.took = time.Since(start)
	return r, errors.Join(errs...)
}
