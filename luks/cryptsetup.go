package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Sentinels, for errors.Is.
var (
	ErrWrongKey     = errors.New("the key does not open the volume")
	ErrBusy         = errors.New("device or mapping is in use")
	ErrNotOpen      = errors.New("there is no such mapping")
	ErrNoDMCrypt    = errors.New("the kernel has no dm-crypt")
	ErrNoCryptsetup = errors.New("cryptsetup is missing or too old")
)

// The first release with everything that is asked of it here: --offset for LUKS2 is from 2.1 (its release notes).
const (
	cryptsetupMajor = 2
	cryptsetupMinor = 1
)

// systemDirs are searched after PATH: services may run without a PATH, and users often have none of these in it.
const systemDirs = "/usr/sbin:/sbin:/usr/bin:/bin"

// exitCodes of cryptsetup, from "RETURN CODES" in cryptsetup(8).
var exitCodes = map[int]error{
	1: errors.New("wrong parameters, or a failure without a code of its own"),
	2: ErrWrongKey,
	3: errors.New("out of memory"),
	4: errors.New("wrong device"),
	5: ErrBusy,
}

// cryptsetup runs the program with stdin as its standard input. This is the only place that does, and what it is given there is
// the only way for a key into it: never by argument, never by environment, never by file.
//
// Its text is quoted in errors for people, never parsed.
func cryptsetup(ctx context.Context, stdin []byte, args ...string) error {
	return cryptsetupWith(ctx, stdin, nil, args...)
}

// cryptsetupWith is cryptsetup with a second secret, which the program finds in a pipe of its own, named secondSecret.
func cryptsetupWith(ctx context.Context, stdin, second []byte, args ...string) error {
	if _, err := runCryptsetup(ctx, stdin, second, args...); err != nil {
		return fmt.Errorf("cannot run cryptsetup %s: %w", args[0], err)
	}
	return nil
}

// secondSecret is the first of the files that exec.Cmd hands on besides the standard three.
const secondSecret = "/proc/self/fd/3"

func runCryptsetup(ctx context.Context, stdin, second []byte, args ...string) (_ string, err error) {
	program, err := findProgram("cryptsetup")
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoCryptsetup, err)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	// Nothing of our environment but PATH. LC_ALL=C: so that quoted text is the same everywhere.
	cmd.Env = []string{"LC_ALL=C", "PATH=" + searchPath()}
	// A bytes.Reader writes itself into the pipe: the passphrase is not copied in our memory. Nil would be /dev/null.
	cmd.Stdin = bytes.NewReader(stdin)
	if second != nil {
		pipe, err := filledPipe(second)
		if err != nil {
			return "", err
		}
		defer pipe.Close()
		cmd.ExtraFiles = []*os.File{pipe}
	}
	var stdout, stderr limited
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// A child of it that kept the pipes must not hold us for ever. Not shorter: with 24 volumes on a busy machine some of our own
	// children, which have the pipes of all others until they are exec'ed, take more than 5 s to come so far.
	cmd.WaitDelay = time.Minute

	err = cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if known, ok := exitCodes[exit.ExitCode()]; ok {
			err = fmt.Errorf("%w: %w", err, known) // "exit status 1: wrong parameters …"
		}
	} else if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		err = fmt.Errorf("%w: %w", ErrNoCryptsetup, err)
	}
	if text := stderr.line(); text != "" {
		err = fmt.Errorf("%w (%s)", err, text)
	}
	return "", err
}

// CheckCryptsetup reports whether cryptsetup can be run and is new enough (2.1), by [ErrNoCryptsetup] if not. Only formatting and
// restoring need it.
func CheckCryptsetup(ctx context.Context) error {
	_, err := CryptsetupVersion(ctx)
	return err
}

// CryptsetupVersion returns the first line that cryptsetup --version prints, "cryptsetup 2.6.1", if [CheckCryptsetup] has nothing
// against it.
func CryptsetupVersion(ctx context.Context) (string, error) {
	// In newer releases followed by "flags: …".
	text, err := runCryptsetup(ctx, nil, nil, "--version")
	if err != nil {
		return "", fmt.Errorf("cannot run cryptsetup --version: %w", err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(text, "cryptsetup %d.%d", &major, &minor); err != nil {
		return "", fmt.Errorf("cannot read the version of cryptsetup: %w (it printed %q)", ErrNoCryptsetup, text)
	}
	if major < cryptsetupMajor || major == cryptsetupMajor && minor < cryptsetupMinor {
		return "", fmt.Errorf("%w: it is %d.%d, needed is %d.%d", ErrNoCryptsetup, major, minor, cryptsetupMajor, cryptsetupMinor)
	}
	line, _, _ := strings.Cut(text, "\n")
	version, _, _ := strings.Cut(line, " flags:")
	return printable([]byte(version)), nil
}

// luksFormat writes a new header. The flags come one to a line, each with its reason.
func luksFormat(ctx context.Context, path string, o FormatOptions, sectorSize int, k Key) error {
	return cryptsetup(ctx, k.Passphrase(), "luksFormat",
		"--batch-mode",    // no question: whether it may has been decided by the caller
		"--type", "luks2", // LUKS1 has no tokens; the default depends on the build
		"--cipher", cipher, // the one cipher that the strict check accepts
		"--key-size", "512", // bits: AES-256, twice for XTS
		"--hash", "sha256", // of the anti-forensic splitter and the digest
		"--pbkdf", "pbkdf2", // the passphrase is a random key of 256 bits: argon2 would cost a second and 300 MB at each boot, and guard nothing
		"--pbkdf-force-iterations", fmt.Sprint(minIterations), // for the same reason; also makes it not measure the machine
		"--sector-size", fmt.Sprint(sectorSize), // else it depends on the device and the release
		"--offset", fmt.Sprint(DataOffset/512), // in sectors of 512; else it depends on the device's optimal I/O size
		"--luks2-keyslots-size", fmt.Sprint(keyslotsSize), // else all up to the data, which it fills with noise
		"--key-slot", "0", // the one that the token names
		"--uuid", o.UUID, // preset: the caller's record has it before the header does
		"--label", o.Label,
		"--subsystem", Subsystem,
		"--key-file=-", // the passphrase is all of standard input: no prompt, nothing cut at a line end
		"--", path,     // a path is never an option
	)
}

// importToken writes a token. The JSON is no secret.
func importToken(ctx context.Context, path string, id int, text []byte) error {
	return cryptsetup(ctx, text, "token", "import",
		"--batch-mode",
		"--token-id", fmt.Sprint(id), // fails if it is taken
		"--json-file=-", // standard input
		"--", path)
}

// removeToken removes a token, not its key slot.
func removeToken(ctx context.Context, path string, id int) error {
	return cryptsetup(ctx, nil, "token", "remove",
		"--batch-mode",
		"--token-id", fmt.Sprint(id),
		"--", path)
}

// importOverToken writes a token in place of one, in one step: no header that others read is without a token.
func importOverToken(ctx context.Context, path string, id int, text []byte) error {
	return cryptsetup(ctx, text, "token", "import",
		"--batch-mode",
		"--token-id", fmt.Sprint(id),
		"--token-replace",
		"--json-file=-", // standard input
		"--", path)
}

// CheckReplacesTokens reports whether cryptsetup can do what [ReplaceToken] asks of it, by [ErrNoCryptsetup] if not. It says so
// itself: which release learnt it is in no release notes.
func CheckReplacesTokens(ctx context.Context) error {
	// --test-args reads the command line and ends.
	if _, err := runCryptsetup(ctx, nil, nil, "--test-args", "token", "import", "--token-id", "0", "--token-replace", "/dev/null"); err != nil {
		return fmt.Errorf("%w: it cannot replace a token: %w", ErrNoCryptsetup, err)
	}
	return nil
}

// luksAddKey writes a key slot that another passphrase opens, next to that of the data key k. The flags are those of luksFormat, for
// the same reasons.
func luksAddKey(ctx context.Context, path string, slot int, k Key, passphrase []byte) error {
	return cryptsetupWith(ctx, k.Passphrase(), passphrase, "luksAddKey",
		"--batch-mode",
		"--type", "luks2",
		"--hash", "sha256",
		"--pbkdf", "pbkdf2",
		"--pbkdf-force-iterations", fmt.Sprint(minIterations),
		"--key-slot", fmt.Sprint(slot), // of the new one; fails if it is taken
		"--key-file=-", // what opens the volume now
		"--", path, secondSecret)
}

// luksKillSlot removes a key slot, if the data key k opens another.
func luksKillSlot(ctx context.Context, path string, slot int, k Key) error {
	return cryptsetup(ctx, k.Passphrase(), "luksKillSlot",
		"--type", "luks2",
		"--key-file=-", // with a key file, and without --batch-mode, it proves that another slot stays that can be opened
		"--", path, fmt.Sprint(slot))
}

// testPassphrase reports whether a passphrase opens one key slot, by [ErrWrongKey] if not.
func testPassphrase(ctx context.Context, path string, slot int, passphrase []byte) error {
	return cryptsetup(ctx, passphrase, "open",
		"--batch-mode",
		"--type", "luks2",
		"--test-passphrase", // maps nothing
		"--key-slot", fmt.Sprint(slot),
		"--key-file=-",
		"--", path)
}

// repair lets cryptsetup write the primary copy again from the secondary. By itself it refuses where it finds another signature
// on the device.
func repair(ctx context.Context, path string) error {
	return cryptsetup(ctx, nil, "repair",
		"--batch-mode", // no question; it reads the secondary that Inspect accepted
		"--type", "luks2",
		"--", path)
}

// filledPipe is a pipe that holds a secret and ends after it. The secret is shorter than any pipe, so this does not wait for a reader.
func filledPipe(secret []byte) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	if _, err := w.Write(secret); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// findProgram looks in PATH and then in the system's directories. A relative directory in PATH is skipped.
func findProgram(name string) (string, error) {
	for _, dir := range filepath.SplitList(searchPath()) {
		if !filepath.IsAbs(dir) {
			continue
		}
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}

func searchPath() string {
	if p := os.Getenv("PATH"); p != "" {
		return p + ":" + systemDirs
	}
	return systemDirs
}

// limited keeps the first bytes that are written to it, so that no program can fill our memory.
type limited struct{ b []byte }

func (l *limited) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), 2048-len(l.b))]...)
	return len(p), nil
}

func (l *limited) String() string { return string(l.b) }

// line is the text as one printable line.
func (l *limited) line() string {
	return printable([]byte(strings.Join(strings.Fields(string(l.b)), " ")))
}
