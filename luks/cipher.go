package luks

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoCipher reports a kernel that cannot encrypt as the volumes do.
var ErrNoCipher = errors.New("the kernel has no AES-XTS")

// kernelCipher is what the kernel calls the cipher of our volumes, without the IV.
const kernelCipher = "xts(aes)"

// CheckCipher returns the driver by which the kernel computes the cipher of our volumes, as "xts-aes-aesni"; "" where it does not tell before
// a volume is open. The error is [ErrNoCipher].
func CheckCipher() (driver string, err error) {
	found := askCipher()
	text, err := os.ReadFile("/proc/crypto")
	if err != nil {
		return "", fmt.Errorf("cannot tell the kernel's ciphers: %w", err)
	}
	driver = cipherDriver(string(text))
	if errors.Is(found, unix.ENOENT) && driver == "" {
		return "", fmt.Errorf("%w: it knows no %s", ErrNoCipher, kernelCipher)
	}
	return driver, nil
}

// askCipher has the kernel look for the cipher, and load the module that has it, by its interface for programs (AF_ALG). That may be
// missing where dm-crypt is not.
func askCipher() error {
	fd, err := unix.Socket(unix.AF_ALG, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("no AF_ALG: %v", err) // whatever it is, it says nothing of the cipher
	}
	defer unix.Close(fd)
	return unix.Bind(fd, &unix.SockaddrALG{Type: "skcipher", Name: kernelCipher})
}

// cipherDriver returns the driver with the highest priority for the cipher in the text of /proc/crypto, which the kernel would take.
func cipherDriver(text string) (driver string) {
	best := -1
	for block := range strings.SplitSeq(text, "\n\n") {
		fields := map[string]string{}
		for line := range strings.Lines(block) {
			name, value, _ := strings.Cut(line, ":")
			fields[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
		priority, err := strconv.Atoi(fields["priority"])
		if fields["name"] == kernelCipher && fields["internal"] != "yes" && err == nil && priority > best {
			best, driver = priority, fields["driver"]
		}
	}
	return driver
}
