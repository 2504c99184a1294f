package keycache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// childEnv makes the test binary act as another process of the agent.
const childEnv = "KEYCACHE_TEST_CHILD"

func TestMain(m *testing.M) {
	name, arg, ok := strings.Cut(os.Getenv(childEnv), " ")
	if !ok {
		os.Exit(m.Run())
	}
	if err := children()[name](arg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func children() map[string]func(string) error {
	return map[string]func(string) error{
		"protect": childProtect,
		"lock":    childLock,
		"full":    childFull,
		"cut":     childCut,
		"proxy":   childProxy,
		"copies":  childCopies,
		"remains": childRemains,
	}
}

func child(t *testing.T, name, arg string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childEnv+"="+name+" "+arg)
	cmd.Stderr = os.Stderr
	return cmd
}

// childProtect calls ProtectMemory and prints what the kernel says after it.
func childProtect(string) error {
	var core unix.Rlimit
	err := ProtectMemory()
	if e := unix.Getrlimit(unix.RLIMIT_CORE, &core); e != nil {
		return e
	}
	dumpable, e := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if e != nil {
		return e
	}
	page, e := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if e != nil {
		return e
	}
	page[0] = 1
	status, e := os.ReadFile("/proc/self/status")
	if e != nil {
		return e
	}
	fmt.Printf("core %d %d\ndumpable %d\nerror %v\n%s", core.Cur, core.Max, dumpable, err, status)
	return nil
}

// unheard is for those who do not care for whom a lock waits.
func unheard(string) {}

// childLock holds the lock of a store until its standard input ends.
func childLock(dir string) error {
	s, err := OpenStore(dir)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	release, err := s.Lock(ctx, unheard)
	if err != nil {
		return err
	}
	defer release()
	fmt.Println("locked")
	_, _ = os.Stdin.Read(make([]byte, 1))
	return nil
}

// childFull writes records on what acts as a full disk: no file may grow past
// 300 bytes.
func childFull(dir string) error {
	s, err := OpenStore(dir)
	if err != nil {
		return err
	}
	k := goodKey()
	if err := s.PutKey(k); err != nil {
		return err
	}
	old := goodVolume(k)
	if err := s.PutVolume(old); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGXFSZ)
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 300, Max: 300}); err != nil {
		return err
	}
	want := func(what string, err error) error {
		var se *StoreError
		if !errors.As(err, &se) || !errors.Is(err, unix.EFBIG) {
			return fmt.Errorf("%s on a full disk: %w", what, err)
		}
		return nil
	}
	changed := old
	changed.State = StateReady
	other := goodKey()
	if err := want("PutVolume", s.PutVolume(changed)); err != nil {
		return err
	}
	if err := want("PutKey", s.PutKey(other)); err != nil {
		return err
	}
	_, err = OpenStore(dir)
	if err := want("OpenStore", err); err != nil {
		return err
	}
	r, err := s.Load()
	if err != nil {
		return err
	}
	if len(r.Problems) != 0 || len(r.Keys) != 1 || r.Volumes[old.UUID].State != StateFormatting {
		return fmt.Errorf("the records changed: %+v", r)
	}
	return nil
}

// childCut dies, as in a power cut, at the n-th step of a job on a store.
func childCut(arg string) error {
	var job, dir string
	var at int
	if _, err := fmt.Sscan(arg, &job, &at, &dir); err != nil {
		return err
	}
	s := newStore(dir)
	s.step = func(string) error {
		if at--; at == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}
	return cutJobs()[job](s)
}

// childProxy calls KMS and a metadata service by names that do not exist.
func childProxy(imds string) error {
	o := Options{
		KeyID: "alias/x", Region: "eu-central-1", KMSEndpoint: "https://kms.invalid", IMDSEndpoint: imds,
		CallTimeout: time.Second, RetryLimit: -1,
	}
	c, err := New(o)
	if err != nil {
		return err
	}
	if _, err := c.CheckKey(context.Background()); err == nil {
		return errors.New("kms.invalid answers")
	}
	o.IMDSEndpoint = "https://imds.invalid"
	if c, err = New(o); err != nil {
		return err
	}
	if _, err := c.Identity(context.Background()); err == nil {
		return errors.New("imds.invalid answers")
	}
	return nil
}
