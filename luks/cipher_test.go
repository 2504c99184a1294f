package luks

import "testing"

func TestCipherDriver(t *testing.T) {
	const text = `name         : xts(aes)
driver       : xts(ecb(aes-generic))
priority     : 100
internal     : no

name         : xts(aes)
driver       : __xts-aes-aesni
priority     : 900
internal     : yes

name         : xts(aes)
driver       : xts-aes-aesni
priority     : 401
internal     : no

name         : cbc(aes)
driver       : cbc-aes-aesni
priority     : 999
internal     : no
`
	if got := cipherDriver(text); got != "xts-aes-aesni" {
		t.Errorf("the driver is %q", got)
	}
	if got := cipherDriver("name : cbc(aes)\npriority : 3\n"); got != "" {
		t.Errorf("the driver is %q", got)
	}
}

func TestThisKernelHasTheCipher(t *testing.T) {
	if driver, err := CheckCipher(); err != nil {
		t.Errorf("%q, %v", driver, err)
	}
}
