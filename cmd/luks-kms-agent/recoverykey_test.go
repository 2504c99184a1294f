package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	qr "github.com/piglig/go-qr"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
)

// recoveryText is a recovery key of nobody.
const recoveryText = "HWEKR-RPX91-W9R0V-2GPPZ-REWFD-J3KTX-CM9AN-PD6DR"

// terminal is a pseudo terminal: what a person sees and types, and what the program reads.
func terminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return person, program
}

func echoes(t *testing.T, terminal *os.File) bool {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return state.Lflag&unix.ECHO != 0
}

func awaitNoEcho(t *testing.T, terminal *os.File) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); echoes(t, terminal); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the terminal echoes")
		}
	}
}

func TestRecoveryKeyIsTypedUnseen(t *testing.T) {
	person, program := terminal(t)
	cmd := &cobra.Command{}
	cmd.SetContext(t.Context())
	cmd.SetIn(program)
	cmd.SetErr(program)
	read := make(chan error, 1)
	go func() {
		k, err := readRecoveryKey(cmd)
		if err == nil && string(k.Passphrase()) != recoveryText {
			err = errors.New("another key was read")
		}
		k.Wipe()
		read <- err
	}()
	awaitNoEcho(t, program)
	if _, err := person.WriteString(strings.ToLower(recoveryText) + "\n"); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
	if !echoes(t, program) {
		t.Error("the terminal is left without echo")
	}
	const end = "that is all"
	if _, err := program.WriteString(end); err != nil {
		t.Fatal(err)
	}
	var shown []byte
	for b := make([]byte, 1000); !bytes.HasSuffix(shown, []byte(end)); {
		n, err := person.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		shown = append(shown, b[:n]...)
	}
	if got := string(shown); got != "Recovery key (it is not shown): \r\n"+end {
		t.Errorf("the terminal shows %q", got)
	}
}

func TestInterruptedTypingRestoresTheTerminal(t *testing.T) {
	_, program := terminal(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		awaitNoEcho(t, program)
		cancel()
	}()
	if _, err := readHidden(ctx, int(program.Fd())); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if !echoes(t, program) {
		t.Error("the terminal is left without echo")
	}
}

func TestRecoveryKeyFromAPipe(t *testing.T) {
	cmd := &cobra.Command{}
	for in, want := range map[string]string{
		recoveryText:                      "",
		recoveryText + "\nanother line\n": "",
		"":                                "nothing was entered",
		strings.Repeat("0", 5000):         "longer than 256 bytes",
		strings.Replace(recoveryText, "X", "Y", 1): "group 2 of 8 has a typo",
	} {
		cmd.SetIn(io.MultiReader(strings.NewReader(in[:len(in)/2]), strings.NewReader(in[len(in)/2:])))
		k, err := readRecoveryKey(cmd)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%d bytes: %v, want %q", len(in), err, want)
		}
		k.Wipe()
	}
}

// What is drawn is read back as a camera would see it.
func TestRecoveryKeyAsQRCode(t *testing.T) {
	k, err := keycache.ParseRecoveryKey([]byte(recoveryText))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Wipe()
	var out bytes.Buffer
	if err := showRecoveryKey(&out, k, true); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if lines[0] != recoveryText {
		t.Errorf("the first line is %q", lines[0])
	}
	const scale = 4
	var rows [][]bool
	for _, line := range lines[1:] {
		line, start := strings.CutPrefix(line, "\x1b[30;47m")
		line, end := strings.CutSuffix(line, "\x1b[0m")
		if !start || !end {
			t.Fatalf("the colours of %q are not set and reset", line)
		}
		var top, bottom []bool
		for _, c := range line {
			top, bottom = append(top, c == '█' || c == '▀'), append(bottom, c == '█' || c == '▄')
		}
		rows = append(rows, top, bottom)
	}
	if len(lines) > 25 || len(rows[0]) > 80 {
		t.Errorf("%d lines of %d do not fit on a terminal of 24 by 80", len(lines), len(rows[0]))
	}
	picture := image.NewGray(image.Rect(0, 0, len(rows[0])*scale, len(rows)*scale))
	for y := range picture.Rect.Dy() {
		for x := range picture.Rect.Dx() {
			if !rows[y/scale][x/scale] {
				picture.SetGray(x, y, color.Gray{Y: 0xff})
			}
		}
	}
	if text, err := qr.Decode(picture); err != nil || text != recoveryText {
		t.Errorf("it reads %q, %v", text, err)
	}
}

func TestRecoveryExitCodesAndRemedies(t *testing.T) {
	_, typo := keycache.ParseRecoveryKey([]byte("X"))
	for _, c := range []struct {
		err  error
		code int
		says string
	}{
		{typo, exitUsage, "eight groups"},
		{fmt.Errorf("x: %w", luks.ErrWrongRecoveryKey), exitRefused, "recovery-key test"},
		{fmt.Errorf("x: %w", luks.ErrNoRecoveryKey), exitRefused, "recovery-key list"},
		{&agent.RecoveryKeyThereError{Device: "/dev/x"}, exitRefused, "--replace"},
	} {
		if got := exitCode(c.err); got != c.code || !strings.Contains(hint(c.err), c.says) {
			t.Errorf("%v: exit code %d, %q", c.err, got, hint(c.err))
		}
	}
}
