package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// serveTang starts Debian's tang on the loopback address, as its socket unit does: a process for each connection.
func serveTang(t harness.TB) (address, thumbprint string, err error) {
	if _, err := os.Stat("/usr/libexec/tangd"); err != nil {
		if err := harness.Install(context.Background(), "tang"); err != nil {
			return "", "", err
		}
	}
	keys, err := os.MkdirTemp("", "luks-kms-agent-tang-")
	if err != nil {
		return "", "", err
	}
	t.Cleanup(func() { _ = os.RemoveAll(keys) })
	if out, err := exec.Command("/usr/libexec/tangd-keygen", keys).CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("cannot make tang's keys: %w: %s", err, out)
	}
	// It serves what its user can read, and by default that is not us.
	found, err := filepath.Glob(keys + "/*.jwk")
	if err != nil || len(found) != 2 {
		return "", "", fmt.Errorf("cannot make tang's keys: %v", found)
	}
	// Of the key that signs; the other one exchanges.
	var shown []byte
	for _, key := range found {
		if exec.Command("jose", "jwk", "use", "-i", key, "-r", "-u", "verify").Run() == nil {
			if shown, err = exec.Command("jose", "jwk", "thp", "-i", key).Output(); err != nil {
				return "", "", err
			}
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", "", err
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				f, err := conn.(*net.TCPConn).File()
				if err != nil {
					return
				}
				defer f.Close()
				cmd := exec.Command("/usr/libexec/tangd", keys)
				cmd.Stdin, cmd.Stdout = f, f
				_ = cmd.Run()
			}()
		}
	}()
	return listener.Addr().String(), strings.TrimSpace(string(shown)), nil
}
