package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
)

// serve answers requests until the machine goes down.
func serve() error {
	port, err := openPort()
	if err != nil {
		return err
	}
	var mu sync.Mutex
	answers := json.NewEncoder(port)
	requests := json.NewDecoder(patient{port})
	for {
		var request channel.Request
		if err := requests.Decode(&request); err != nil {
			return fmt.Errorf("cannot read a request: %w", err)
		}
		go func() {
			response := carryOut(request)
			response.ID = request.ID
			mu.Lock()
			defer mu.Unlock()
			if err := answers.Encode(response); err != nil {
				fmt.Fprintln(os.Stderr, "guest: cannot answer:", err)
			}
		}()
	}
}

// patient reads from a virtio-serial port, which says end of file while the host is not connected.
type patient struct{ port *os.File }

func (p patient) Read(b []byte) (int, error) {
	for {
		n, err := p.port.Read(b)
		if n > 0 || (err != nil && !errors.Is(err, io.EOF)) {
			return n, err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// openPort finds the port by sysfs: it serves before udev has made a link.
func openPort() (*os.File, error) {
	_ = exec.Command("modprobe", "virtio_console").Run()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if b, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(b)) == channel.Port {
				if f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(name)), os.O_RDWR, 0); err == nil {
					return f, nil
				}
			}
		}
	}
	return nil, errors.New("no virtio-serial port " + channel.Port)
}

func carryOut(request channel.Request) channel.Response {
	var response channel.Response
	var err error
	switch request.Op {
	case channel.Exec:
		response, err = execute(request)
	case channel.Put:
		err = put(request.Path, request.Mode, request.Data)
	case channel.Get:
		response.Data, err = os.ReadFile(request.Path)
	default:
		err = fmt.Errorf("unknown operation %q", request.Op)
	}
	if err != nil {
		response.Error = err.Error()
	}
	return response
}

func execute(request channel.Request) (channel.Response, error) {
	cmd := exec.Command("bash", "-c", request.Command)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(request.Stdin), &stdout, &stderr
	cmd.Env = append(os.Environ(), "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C")
	cmd.Dir = "/root"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// A daemon that the command left behind must not keep the answer back.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return channel.Response{}, err
	}
	timer := time.AfterFunc(request.Timeout, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	err := cmd.Wait()
	timedOut := !timer.Stop()
	response := channel.Response{Code: cmd.ProcessState.ExitCode(), Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	if timedOut {
		return response, fmt.Errorf("the command was killed after %v", request.Timeout)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return response, err
	}
	return response, nil
}

func put(path string, mode uint32, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		return err
	}
	if err := os.Chmod(temp, os.FileMode(mode)); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
