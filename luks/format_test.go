package luks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"time"
)

func TestFormat(t *testing.T) {
	t.Parallel()

	path := volume(t)
	i := inspected(t, path)
	if !i.Pass() || !i.Ours || i.Kind != KindLUKS2 || i.PrimaryDamaged || i.SecondaryDamaged || i.Size != imageSize || i.Path != path {
		t.Fatalf("%+v", i)
	}
	h := i.Header
	if h.UUID != testUUID || h.Label != "data" || h.Subsystem != "luks-kms-agent" || h.Version != 2 || h.Cipher != "aes-xts-plain64" ||
		h.KeySize != 512 || h.SectorSize != 4096 || h.Offset != 16<<20 || h.SeqID == 0 {
		t.Errorf("%+v", h)
	}
	if want := (Keyslot{ID: 0, KeySize: 512, Cipher: "aes-xts-plain64", KDF: "pbkdf2", Hash: "sha256", Iterations: 1000, Tokens: []string{"luks-kms-agent"}}); len(h.Keyslots) != 1 || !reflect.DeepEqual(h.Keyslots[0], want) {
		t.Errorf("keyslots %+v", h.Keyslots)
	}
	if len(h.Tokens) != 1 || h.Tokens[0] != "luks-kms-agent" {
		t.Errorf("tokens %q", h.Tokens)
	}
	tok := h.Token
	if tok == nil || tok.ID != 0 || tok.KeyARN != testARN || string(tok.WrappedKey) != "what KMS wrapped" || tok.Keyslot != 0 || len(tok.MAC) != 32 || tok.Version != 1 {
		t.Errorf("token %+v", tok)
	}
	if err := i.Verify(rightKey()); err != nil {
		t.Error(err)
	}
	if err := i.Verify(keyOf(1)); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another key: %v", err)
	}
}

// What cryptsetup says of our header.
func TestFormatAsCryptsetupSeesIt(t *testing.T) {
	t.Parallel()

	dump := mustRun(t, nil, "cryptsetup", "luksDump", volume(t))
	words := strings.Join(strings.Fields(dump), " ")
	for _, want := range []string{
		"Version: 2", "UUID: " + testUUID, "Label: data", "Subsystem: luks-kms-agent", "Flags: (no flags)",
		"0: crypt offset: 16777216 [bytes] length: (whole device) cipher: aes-xts-plain64 sector: 4096 [bytes]",
		"0: luks2 Key: 512 bits", "Cipher: aes-xts-plain64 Cipher key: 512 bits PBKDF: pbkdf2 Hash: sha256 Iterations: 1000",
		fmt.Sprintf("Area offset:%d [bytes]", KeyslotsOffset), "Tokens: 0: luks-kms-agent Keyslot: 0", "Digests: 0: pbkdf2 Hash: sha256 Iterations: 1000",
	} {
		if !strings.Contains(words, want) {
			t.Errorf("luksDump lacks %q:\n%s", want, dump)
		}
	}
}

// The break-glass path: the base64 of the data key opens the volume, and it is exactly 44 bytes.
func TestPassphraseIsByteExact(t *testing.T) {
	t.Parallel()

	path := volume(t)
	pass := rightKey().Passphrase()
	if len(pass) != 44 {
		t.Fatalf("the passphrase has %d bytes", len(pass))
	}
	open := []string{"open", "--test-passphrase", "--batch-mode", "--key-file=-", path}
	mustRun(t, pass, "cryptsetup", open...)
	out, err := run(t, append(pass, '\n'), "cryptsetup", open...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Errorf("a passphrase with a line end: %v %s", err, out)
	}
}

// Disks of decimal sizes: cryptsetup refuses sectors of 4096 bytes on them.
func TestFormatUnalignedSize(t *testing.T) {
	t.Parallel()

	path := blank(t, imageSize+512)
	if err := Format(t.Context(), path, testOptions(), rightKey()); err != nil {
		t.Fatal(err)
	}
	i := inspected(t, path)
	if !i.Pass() || i.Header.SectorSize != 512 {
		t.Errorf("%+v %+v", i, i.Header)
	}
}

// What a cut leaves can be formatted again with the same options.
func TestFormatAgain(t *testing.T) {
	t.Parallel()

	path := volume(t)
	mustRun(t, nil, "cryptsetup", "erase", "--batch-mode", path)
	if i := inspected(t, path); i.Kind != KindEmpty || i.Pass() {
		t.Fatalf("%+v", i)
	}
	if err := Format(t.Context(), path, testOptions(), rightKey()); err != nil {
		t.Fatal(err)
	}
}

func TestFormatAtOnce(t *testing.T) {
	t.Parallel()

	var wait sync.WaitGroup
	for n := range 8 {
		path := blank(t, imageSize)
		wait.Go(func() {
			o := testOptions()
			o.UUID = fmt.Sprintf("0a1b2c3d-0000-4000-8000-00000000010%d", n)
			if err := Format(t.Context(), path, o, keyOf(byte(n))); err != nil {
				t.Error(err)
				return
			}
			if i, err := Inspect(path); err != nil || !i.Pass() || i.Header.UUID != o.UUID || i.Verify(keyOf(byte(n))) != nil {
				t.Errorf("volume %d: %v %+v", n, err, i)
			}
		})
	}
	wait.Wait()
}

func TestFormatRefusesOptions(t *testing.T) {
	t.Parallel()

	cases := map[string]func(*FormatOptions){
		"no UUID":              func(o *FormatOptions) { o.UUID = "" },
		"upper case UUID":      func(o *FormatOptions) { o.UUID = strings.ToUpper(o.UUID) },
		"path as UUID":         func(o *FormatOptions) { o.UUID = "../../../../../../../../etc/passwd-xx" },
		"long label":           func(o *FormatOptions) { o.Label = strings.Repeat("x", 48) },
		"label with a bell":    func(o *FormatOptions) { o.Label = "\a" },
		"no ARN":               func(o *FormatOptions) { o.KeyARN = "" },
		"ARN with a space":     func(o *FormatOptions) { o.KeyARN = "arn aws" },
		"no wrapped key":       func(o *FormatOptions) { o.WrappedKey = nil },
		"oversize wrapped key": func(o *FormatOptions) { o.WrappedKey = make([]byte, 6145) },
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			path := blank(t, imageSize)
			o := testOptions()
			change(&o)
			if err := Format(t.Context(), path, o, rightKey()); err == nil {
				t.Error("accepted")
			}
			if i := inspected(t, path); i.Kind != KindNone {
				t.Errorf("the disk was written: %s", i.Kind)
			}
		})
	}
}

type oddKey struct{ bytes, pass []byte }

func (k oddKey) Bytes() []byte      { return k.bytes }
func (k oddKey) Passphrase() []byte { return k.pass }

func TestOddKeysAreRefused(t *testing.T) {
	good := rightKey()
	i := inspected(t, volume(t))
	for name, k := range map[string]Key{
		"no bytes":         oddKey{nil, good.Passphrase()},
		"no passphrase":    oddKey{good.Bytes(), nil},
		"with a line end":  oddKey{good.Bytes(), append(good.Passphrase(), '\n')},
		"half of the data": oddKey{good.Bytes()[:16], good.Passphrase()},
	} {
		path := blank(t, imageSize)
		if err := Format(t.Context(), path, testOptions(), k); err == nil || inspected(t, path).Kind != KindNone {
			t.Errorf("%s: formatted: %v", name, err)
		}
		// The caller's mistake: neither another key nor the disk is to blame.
		var header *HeaderError
		if err := i.Verify(k); err == nil || errors.Is(err, ErrWrongKey) || errors.As(err, &header) {
			t.Errorf("%s: verified: %v", name, err)
		}
	}
}

// cryptsetup gets the key by standard input only, and nothing of our environment.
func TestKeyStaysOnStandardInput(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	stub(t, `{ printf '%s\n' "$@"; tr '\0' '\n' < /proc/$$/cmdline; env; } >> `+log+`; exec "$REAL" "$@"`)
	t.Setenv("SECRET_OF_OURS", "x")
	path := blank(t, imageSize)
	if err := Format(t.Context(), path, testOptions(), rightKey()); err != nil {
		t.Fatal(err)
	}
	seen := content(t, log)
	if !bytes.Contains(seen, []byte("luksFormat")) || !bytes.Contains(seen, []byte("LC_ALL=C")) {
		t.Fatalf("the stub was not used:\n%s", seen)
	}
	for _, secret := range [][]byte{rightKey().Passphrase(), rightKey().Bytes(), []byte("SECRET_OF_OURS")} {
		if bytes.Contains(seen, secret) {
			t.Errorf("found %q", secret)
		}
	}
}

// A formatter that does not do what it was asked for is found out.
func TestFormatChecksWhatWasWritten(t *testing.T) {
	// instead is a cryptsetup that formats with another value of one argument.
	instead := func(asked, done string) string {
		return `if [ "$1" = luksFormat ]; then for a; do shift; case $a in ` + asked + `) a=` + done + `;; esac; set -- "$@" "$a"; done; fi; exec "$REAL" "$@"`
	}
	for name, c := range map[string]struct{ script, want string }{
		"another UUID":        {instead(testUUID, "0a1b2c3d-0000-4000-8000-000000000002"), "not the header that was asked for"},
		"another label":       {instead("data", "other"), "not the header that was asked for"},
		"another subsystem":   {instead("luks-kms-agent", "other"), ""}, // seen before there is a token
		"another sector size": {instead("4096", "512"), "not the header that was asked for"},
		"another offset":      {instead("32768", "32776"), "not the header that was asked for"},
		"another cipher": {
			`if [ "$1" = luksFormat ]; then for a; do shift; case $a in aes-xts-plain64) a=aes-cbc-essiv:sha256;; 512) a=256;; esac; set -- "$@" "$a"; done; fi; exec "$REAL" "$@"`,
			`cipher "aes-cbc-essiv:sha256"`},
		"another token": {
			`if [ "$1" = token ]; then sed s/us-east-1/us-east-2/ | "$REAL" "$@"; else exec "$REAL" "$@"; fi`,
			"not the header that was asked for"},
		"another wrapped key": {
			`if [ "$1" = token ]; then sed 's/"wrapped_key":"[^"]*"/"wrapped_key":"AAAA"/' | "$REAL" "$@"; else exec "$REAL" "$@"; fi`,
			"not the header that was asked for"},
		"a keyslot more": {
			`"$REAL" "$@" || exit; if [ "$1" = token ]; then for p; do :; done; echo other | "$REAL" luksAddKey --batch-mode --pbkdf pbkdf2 ` +
				`--pbkdf-force-iterations 1000 --unbound --key-size 512 "$p" -; fi`,
			"not the header that was asked for"},
		"one copy": {
			`"$REAL" "$@" || exit; if [ "$1" = token ]; then for p; do :; done; dd if=/dev/zero of="$p" bs=4096 seek=4 count=1 conv=notrunc status=none; fi`,
			"not the header that was asked for"},
		"no token":   {`[ "$1" = token ] || exec "$REAL" "$@"`, "no luks-kms-agent token"},
		"wrong pass": {`if [ "$1" = luksFormat ]; then (cat; echo) | "$REAL" "$@"; else exec "$REAL" "$@"; fi`, "does not open keyslot 0"},
	} {
		t.Run(name, func(t *testing.T) {
			stub(t, c.script)
			err := Format(t.Context(), blank(t, imageSize), testOptions(), rightKey())
			if r := reasons(t, err); !strings.Contains(r, c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestFormatOnADiskThatLies: writes that succeed and are lost are the disk's fault, not somebody's attack.
func TestFormatOnADiskThatLies(t *testing.T) {
	stub(t, `cat >/dev/null`)
	err := Format(t.Context(), blank(t, imageSize), testOptions(), rightKey())
	var header *HeaderError
	if !errors.Is(err, unix.EIO) || errors.As(err, &header) {
		t.Errorf("%v", err)
	}
}

func TestCryptsetupExitCodes(t *testing.T) {
	for code, want := range map[int]error{2: ErrWrongKey, 5: ErrBusy} {
		stub(t, fmt.Sprintf("cat >/dev/null; echo 'told   in\n\tprose\033[0m' >&2; exit %d", code))
		err := cryptsetup(t.Context(), []byte("x"), "verb")
		if !errors.Is(err, want) || !strings.Contains(err.Error(), "told in prose") || strings.Contains(err.Error(), "\033") {
			t.Errorf("exit %d: %v", code, err)
		}
	}
	for _, code := range []int{1, 3, 4, 99} {
		stub(t, fmt.Sprintf("exit %d", code))
		err := cryptsetup(t.Context(), nil, "verb")
		if err == nil || errors.Is(err, ErrWrongKey) || errors.Is(err, ErrBusy) || errors.Is(err, ErrNoCryptsetup) {
			t.Errorf("exit %d: %v", code, err)
		}
	}
}

func TestCryptsetupOutputIsBounded(t *testing.T) {
	stub(t, "cat >/dev/null; yes | head -c 3000000 >&2; exit 1")
	if err := cryptsetup(t.Context(), nil, "verb"); err == nil || len(err.Error()) > 4096 {
		t.Errorf("%d bytes", len(err.Error()))
	}
}

func TestCryptsetupEndsWithItsContext(t *testing.T) {
	stub(t, "exec sleep 60")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if err := cryptsetup(ctx, nil, "verb"); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
}

func TestCheckCryptsetup(t *testing.T) {
	if err := CheckCryptsetup(t.Context()); err != nil {
		t.Errorf("the real one: %v", err)
	}
	for _, script := range []string{"echo cryptsetup 1.7.4", "echo cryptsetup 2.0.6 flags: x", "echo something", "true"} {
		stub(t, script)
		if err := CheckCryptsetup(t.Context()); !errors.Is(err, ErrNoCryptsetup) {
			t.Errorf("%s: %v", script, err)
		}
	}
	stub(t, "echo cryptsetup 3.0.0 flags: UDEV BLKID; echo more")
	if version, err := CryptsetupVersion(t.Context()); err != nil || version != "cryptsetup 3.0.0" {
		t.Errorf("%q, %v", version, err)
	}
	// A program whose interpreter is missing is missing.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cryptsetup"), []byte("#!"+dir+"/none\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if err := CheckCryptsetup(t.Context()); !errors.Is(err, ErrNoCryptsetup) {
		t.Error(err)
	}
}

func TestFindProgram(t *testing.T) {
	if _, err := findProgram("no-such-program"); !errors.Is(err, exec.ErrNotFound) {
		t.Error(err)
	}
	t.Setenv("PATH", "")
	if p, err := findProgram("sh"); err != nil || !filepath.IsAbs(p) {
		t.Errorf("without PATH: %q %v", p, err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bin", "here"), []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	t.Setenv("PATH", "bin")
	if p, err := findProgram("here"); err == nil {
		t.Errorf("found %q through a relative directory", p)
	}
}
