package keycache

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"strings"
)

// A recovery key is 160 random bits, for people to write down and type. Its text is
//
//	XXXXX-XXXXX-XXXXX-XXXXX-XXXXX-XXXXX-XXXXX-XXXXX
//
// eight groups of four characters of the key and one that checks them, in Crockford's
// alphabet of 32, which has no I, L, O and U. The text, as it stands there, is the
// LUKS passphrase: who has it needs nothing but cryptsetup.
//
// The check is a linear code over GF(2^5), x^5+x^2+1: c = g·x^4 + a·x^4 + b·x^3 +
// c·x^2 + d·x for the characters a, b, c, d of group g (0 to 7). All weights
// differ and none is zero, so one wrong character, or two that changed places, never
// pass; nor do two groups that did, as g is in it.
const (
	recoveryLen     = 20
	recoveryTextLen = recoveryGroups*(groupLen+1) - 1
	recoveryGroups  = 8
	groupLen        = 5
	symbols         = recoveryGroups * groupLen
	symbolBits      = 5
)

const alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

// NewRecoveryKey makes a recovery key of 160 random bits.
func NewRecoveryKey() (*Key, error) {
	b := make([]byte, recoveryLen)
	defer clear(b)
	_, _ = rand.Read(b) // never fails
	return lockKey(b, recoveryTextLen, encodeRecovery)
}

// RecoveryKeyError is a text that is no recovery key. It says where it is wrong and
// never what stands there.
type RecoveryKeyError struct {
	Symbols int   // how many characters it has, but for dashes and white space
	Groups  []int // the groups of five that are wrong, from 1; with a character too many or too few only the first
}

func (e *RecoveryKeyError) Error() string {
	const what = "cannot read the recovery key: "
	switch {
	case e.Symbols == 0:
		return what + "nothing was entered"
	case e.Symbols != symbols && len(e.Groups) > 0:
		return fmt.Sprintf(what+"it has %d characters instead of %d; the first group that is wrong is number %d", e.Symbols, symbols, e.Groups[0])
	case e.Symbols != symbols:
		return fmt.Sprintf(what+"it has %d characters instead of %d", e.Symbols, symbols)
	case len(e.Groups) == 1:
		return fmt.Sprintf(what+"group %d of %d has a typo", e.Groups[0], recoveryGroups)
	}
	return fmt.Sprintf(what+"groups %s of %d have typos", strings.Trim(fmt.Sprint(e.Groups), "[]"), recoveryGroups)
}

// ParseRecoveryKey reads the text of a recovery key and wipes it, also when it
// fails. Capitals and small letters are the same, and so are O and 0, and I, L and 1;
// dashes and white space do not count. An error that is not memory's is a
// *[RecoveryKeyError].
func ParseRecoveryKey(text []byte) (*Key, error) {
	defer clear(text)
	var values [symbols]byte
	defer clear(values[:])
	n := 0
	for _, c := range text {
		if c == '-' || c == ' ' || c >= '\t' && c <= '\r' {
			continue
		}
		if n < symbols {
			values[n] = value(c)
		}
		n++
	}
	e := &RecoveryKeyError{Symbols: n}
	for g := range min(n, symbols) / groupLen {
		if !checks(g, values[g*groupLen:][:groupLen]) {
			e.Groups = append(e.Groups, g+1)
		}
	}
	switch {
	case n > 0 && n < symbols && len(e.Groups) == 0:
		e.Groups = []int{n/groupLen + 1} // the first that is not whole
		return nil, e
	case n != symbols:
		return nil, e
	case len(e.Groups) > 0:
		return nil, e
	}

	key := make([]byte, 0, recoveryLen)
	defer func() { clear(key[:cap(key)]) }()
	bits, have := uint32(0), 0
	for i, v := range values {
		if i%groupLen == groupLen-1 {
			continue
		}
		bits, have = bits<<symbolBits|uint32(v), have+symbolBits
		if have >= 8 {
			have -= 8
			key = append(key, byte(bits>>have))
		}
	}
	return lockKey(key, recoveryTextLen, encodeRecovery)
}

// noSymbol is the value of a character that is not in the alphabet.
const noSymbol = 0xff

func value(c byte) byte {
	if c >= 'a' && c <= 'z' {
		c -= 'a' - 'A'
	}
	switch c {
	case 'O':
		c = '0'
	case 'I', 'L':
		c = '1'
	}
	if i := strings.IndexByte(alphabet, c); i >= 0 {
		return byte(i)
	}
	return noSymbol
}

// checks says whether a group is of the alphabet and its last value checks the others.
func checks(g int, group []byte) bool {
	const last = groupLen - 1
	return bytes.IndexByte(group, noSymbol) < 0 && check(g, group[:last]) == group[last]
}

// check is the check value of a group.
func check(g int, values []byte) byte {
	c := byte(g)
	for i, v := range values {
		if i > 0 {
			c = timesX(c)
		}
		c ^= v
	}
	return timesX(c)
}

// timesX multiplies by x in GF(2^5).
func timesX(v byte) byte {
	v <<= 1
	if v&(1<<symbolBits) != 0 {
		v ^= 1<<symbolBits | 1<<2 | 1
	}
	return v
}

// encodeRecovery writes the text of a recovery key.
func encodeRecovery(text, key []byte) {
	var values [groupLen - 1]byte
	defer clear(values[:])
	bits, have, n := uint32(0), 0, 0
	for g := range recoveryGroups {
		if g > 0 {
			text[n] = '-'
			n++
		}
		for i := range values {
			if have < symbolBits {
				bits, have = bits<<8|uint32(key[0]), have+8
				key = key[1:]
			}
			have -= symbolBits
			values[i] = byte(bits>>have) & (1<<symbolBits - 1)
			text[n] = alphabet[values[i]]
			n++
		}
		text[n] = alphabet[check(g, values[:])]
		n++
	}
}
