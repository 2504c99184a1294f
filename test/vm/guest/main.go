// Command guest is what the stories have inside a VM, and between QEMU and the host's servers:
//
//	guest setup            make the files and disks of the manifest, before the agent starts
//	guest attach NAME…     make disks of the manifest
//	guest detach NAME…     take disks away, whoever uses them
//	guest reload NAME…     give disks the device-mapper table that the manifest says now
//	guest resume NANOTIME  make a node of a copy of a booted guest: clock, random numbers, then setup
//	(process 1)            in an initramfs: find a boot disk on virtio, and go on with its init
//	guest disguise MODEL   let sysfs show another model for the disk that / is on
//	guest network ADDRESS  give eth0 an address and bring it up
//	guest serve            carry out what the host asks over the virtio-serial port
//	guest find FILE PATH…  print which files below the paths hold a needle of FILE
//	guest memory PID       print all memory of a process that it may read
//	guest rusage FILE CMD… run CMD and write its peak resident memory (KiB) to FILE
//	guest meter FILE CMD…  run CMD and write to FILE what it cost the machine, as JSON
//	guest relay HOST:PORT  on the host: connect standard input and output to a server
//	guest leash CMD…       on the host: run CMD, and kill it when standard input ends
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			os.Exit(exit.ExitCode())
		}
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case os.Getpid() == 1:
		return initramfs()
	case len(args) == 1 && args[0] == "setup":
		return setup()
	case len(args) == 2 && args[0] == "resume":
		return resume(args[1])
	case len(args) > 1 && args[0] == "attach":
		return eachDisk(args[1:], show)
	case len(args) > 1 && args[0] == "detach":
		return eachDisk(args[1:], detach)
	case len(args) > 1 && args[0] == "reload":
		return eachDisk(args[1:], reload)
	case len(args) == 2 && args[0] == "disguise":
		return disguise(args[1])
	case len(args) == 2 && args[0] == "network":
		return network(args[1])
	case len(args) == 1 && args[0] == "serve":
		return serve()
	case len(args) == 2 && args[0] == "relay":
		return relay(args[1])
	case len(args) > 2 && args[0] == "find":
		return find(args[1], args[2:])
	case len(args) == 2 && args[0] == "memory":
		return memory(args[1])
	case len(args) > 1 && args[0] == "leash":
		return leash(args[1:])
	case len(args) > 2 && args[0] == "rusage":
		return rusage(args[1], args[2:])
	case len(args) > 2 && args[0] == "meter":
		return meter(args[1], args[2:])
	}
	return errors.New("usage: guest setup | resume NANOTIME | attach NAME… | detach NAME… | reload NAME… | disguise MODEL | network ADDRESS | serve | find FILE PATH… | memory PID | rusage FILE CMD… | meter FILE CMD… | relay HOST:PORT | leash CMD…")
}

// relay carries one connection of the guest to a server on the host. It ends when the server closes, so that the guest
// sees a dropped connection as one.
func relay(address string) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(conn, os.Stdin)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(os.Stdout, conn)
	return err
}

// leash ties a process to the one that started it, however that one ends: a killed test leaves no VM behind.
func leash(args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = cmd.Process.Kill()
	}()
	return cmd.Wait()
}

func rusage(file string, args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return err
	}
	peak := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss
	return errors.Join(os.WriteFile(file, []byte(strconv.FormatInt(peak, 10)+"\n"), 0o600), err)
}
