package luks

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/luks/lukstest"
)

// maxAllocated is what an inspection may allocate in all, garbage included.
const maxAllocated = 64 << 20

// allocated is what call allocates, together with whatever else runs.
func allocated(call func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	call()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// listOf is item(0), item(1), … with commas between, as many as fit into size bytes.
func listOf(size int, item func(int) string) string {
	var b strings.Builder
	for i := 0; ; i++ {
		s := item(i)
		if b.Len()+len(s)+1 > size {
			return strings.TrimSuffix(b.String(), ",")
		}
		b.WriteString(s + ",")
	}
}

// worstTexts are JSON texts of at most size bytes that cost a decoder most.
func worstTexts(size int) map[string]string {
	n := size - 200
	within := func(section, text string) string {
		sections := map[string]string{"keyslots": "{}", "tokens": "{}", "segments": "{}", "digests": "{}", "config": "{}"}
		sections[section] = text
		return fmt.Sprintf(`{"keyslots":%s,"tokens":%s,"segments":%s,"digests":%s,"config":%s}`,
			sections["keyslots"], sections["tokens"], sections["segments"], sections["digests"], sections["config"])
	}
	members := func(value string) string {
		return "{" + listOf(n, func(i int) string { return fmt.Sprintf(`"%x":%s`, i, value) }) + "}"
	}
	long := func(unit string) string { return `"` + strings.Repeat(unit, n/len(unit)) + `"` }
	list := func(value string) string { return "[" + listOf(n, func(int) string { return value }) + "]" }
	texts := map[string]string{
		"nothing":                     "",
		"nested lists":                strings.Repeat("[", n),
		"nested lists with an end":    `{"a":` + strings.Repeat("[", n/2) + strings.Repeat("]", n/2) + "}",
		"nested objects":              strings.Repeat(`{"a":`, n/5),
		"nested objects with an end":  strings.Repeat(`{"a":`, n/6) + "{}" + strings.Repeat("}", n/6),
		"unknown members":             members("0"),
		"a key twice at the end":      `{"z":0,` + members("0")[1:len(members("0"))-1] + `,"z":0}`,
		"a long key":                  "{" + long("k") + ":0}",
		"a number of many digits":     within("keyslots", `{"0":{"key_size":`+strings.Repeat("9", n)+"}}"),
		"a fraction of many digits":   within("keyslots", `{"0":{"key_size":0.`+strings.Repeat("9", n)+"}}"),
		"a large exponent":            within("tokens", `{"0":{"type":"x","keyslots":[],"n":1e`+strings.Repeat("9", n)+"}}"),
		"flags":                       within("config", `{"flags":`+list(`"x"`)+"}"),
		"empty flags":                 within("config", `{"flags":`+list(`""`)+"}"),
		"a flag of escapes":           within("config", `{"flags":[`+long(`\u001b`)+"]}"),
		"requirements":                within("config", `{"requirements":{"mandatory":`+list(`""`)+"}}"),
		"a requirement of line ends":  within("config", `{"requirements":{"mandatory":[`+long(`\n`)+"]}}"),
		"a token of lists":            within("tokens", `{"0":{"type":"x","keyslots":[],"l":`+list("[]")+"}}"),
		"a token of objects":          within("tokens", `{"0":{"type":"x","keyslots":[],"l":`+list("{}")+"}}"),
		"a token of objects in lists": within("tokens", `{"0":{"type":"x","keyslots":[],"l":`+list(`[{"a":0}]`)+"}}"),
		"a token of slots":            within("tokens", `{"0":{"type":"x","keyslots":`+list(`"1"`)+"}}"),
		"our token of slots":          within("tokens", `{"0":{"type":"luks-kms-agent","keyslots":`+list(`"1"`)+"}}"),
		"a long type of token":        within("tokens", `{"0":{"keyslots":[],"type":`+long("\u2028")+"}}"),
		"tokens":                      within("tokens", members(`{"type":"x","keyslots":[]}`)),
		"our tokens":                  within("tokens", members(`{"type":"luks-kms-agent","keyslots":[]}`)),
		"a digest of slots":           within("digests", `{"0":{"keyslots":`+list(`"1"`)+"}}"),
		"a digest of segments":        within("digests", `{"0":{"segments":`+list(`"0"`)+"}}"),
		"a long digest":               within("digests", `{"0":{"digest":`+long("A")+"}}"),
		"a long salt":                 within("keyslots", `{"0":{"kdf":{"type":"pbkdf2","salt":`+long("A")+"}}}"),
		"a long id in many reasons": within("digests", `{"`+strings.Repeat("9", n/2)+`":{"keyslots":[`+
			listOf(n/2-200, func(i int) string { return fmt.Sprintf(`"%x"`, i) })+"]}}"),
		"a long cipher": within("segments", `{"0":{"encryption":`+long("\u202e")+"}}"),
		"bytes":         strings.Repeat("\xff", n),
	}
	for _, section := range []string{"keyslots", "segments", "digests", "tokens"} {
		texts["members of "+section] = within(section, members("{}"))
	}
	return texts
}

// The worst that could be thought of: an inspection is bounded in memory, and fast.
func TestInspectIsBounded(t *testing.T) {
	most, slowest := uint64(0), time.Duration(0)
	check := func(name string, r io.ReaderAt, size int64) {
		t.Helper()
		begin := time.Now()
		var i *Inspection
		var err error
		n := allocated(func() { i, err = inspect(r, size) })
		took := time.Since(begin)
		if err != nil || i.Pass() || i.Kind == KindLUKS2 && len(i.Reasons) == 0 {
			t.Errorf("%s: %v, %+v", name, err, i)
			return
		}
		if n > maxAllocated {
			t.Errorf("%s: %d MiB allocated", name, n>>20)
		}
		if took > 5*time.Second { // a second; the rest is for a machine that does ten things at once
			t.Errorf("%s: it took %v", name, took)
		}
		most, slowest = max(most, n), max(slowest, took)
		printed := 0
		for _, r := range i.Reasons {
			printed += len(r)
			if len(r) > 2000 || strings.ContainsAny(r, "\x1b\n\x00") {
				t.Errorf("%s: a reason of %d bytes: %q", name, len(r), r[:min(len(r), 300)])
			}
		}
		if len(i.Reasons) > maxReasons+5 || printed > 100<<10 {
			t.Errorf("%s: %d reasons of %d bytes", name, len(i.Reasons), printed)
		}
	}

	const largest = 4 << 20
	both := func(size int, text string) holes {
		return holes{slices.Concat(lukstest.New(0, size, testUUID, []byte(text)), lukstest.New(size, size, testUUID, []byte(text))), 1 << 40}
	}
	texts := worstTexts(maxText)
	for name, text := range texts {
		check(name, both(2*maxText, text), 1<<40)
	}
	// In two copies as large as LUKS2 allows, and in one at each place that a secondary can have, behind a primary that is damaged.
	for _, name := range []string{"members of keyslots", "our token of slots", "nested lists with an end"} {
		large := both(largest, texts[name])
		check(name+", in 4 MiB", large, 1<<40)
		for _, place := range headerSizes {
			text := worstTexts(min(maxText, int(place)-lukstest.Binary-1))[name]
			copy(large.head[place:], lukstest.New(int(place), int(place), testUUID, []byte(text)))
		}
		check(name+", nine secondaries", large, 1<<40)
	}
	// Of that size the text itself: nothing of it is decoded.
	for name, text := range map[string]string{
		"members": `{"keyslots":{` + listOf(largest-5000, func(i int) string { return fmt.Sprintf(`"%x":{}`, i) }) + "}}",
		"lists":   strings.Repeat("[", largest-5000),
	} {
		check(name+" of 4 MiB", both(largest, text), 1<<40)
	}

	// Copies that differ in all that they say.
	check("copies that differ", holes{slices.Concat(lukstest.New(0, largest, testUUID, []byte(texts["members of keyslots"])),
		lukstest.New(largest, largest, strings.Repeat("u", lenUUID), []byte(texts["our tokens"]))), 1 << 40}, 1<<40)

	// LUKS1: every number as large as it gets, and none.
	for _, b := range []byte{0, 0x7f, 0x80, 0xff} {
		head := append([]byte(magicPrimary+"\x00\x01"), bytes.Repeat([]byte{b}, 1024)...)
		for _, size := range []int64{208, 592, 1 << 40, 1<<63 - 1} {
			check(fmt.Sprintf("LUKS1 of bytes %#x on %d bytes", b, size), holes{head[:min(size, int64(len(head)))], size}, size)
		}
	}
	// Sizes at the limits, of a disk and of what is on it.
	good, err := template()
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{0, 1, binarySize - 1, binarySize, 0x4000, 0x8000 - 1, 0x8000, KeyslotsOffset + areaBytes, DataOffset} {
		check(fmt.Sprintf("a disk that ends at %d", size), holes{good[:min(size, headBytes)], size}, size)
	}
	t.Logf("at most %.1f MiB and %v", float64(most)/(1<<20), slowest)
}

// The largest file that ext4 can have, with a header at its start, and with none at all.
func TestInspectHugeFile(t *testing.T) {
	const size = 16<<40 - 1<<20
	good, err := template()
	if err != nil {
		t.Fatal(err)
	}
	for name, head := range map[string][]byte{"zeros": nil, "ours": good} {
		path := filepath.Join(t.TempDir(), "huge")
		if err := makeImage(path, head, size); err != nil {
			t.Fatal(err)
		}
		n := allocated(func() {
			i := inspected(t, path)
			if i.Size != size || i.Pass() != (head != nil) || (i.Kind == KindNone) != (head == nil) {
				t.Errorf("%s: %+v", name, i)
			}
			if head != nil && (i.Verify(rightKey()) != nil || i.checked.length != size-DataOffset) {
				t.Errorf("%s: length %d, %v", name, i.checked.length, i.Verify(rightKey()))
			}
		})
		if n > maxAllocated {
			t.Errorf("%s: %d MiB allocated", name, n>>20)
		}
	}
}
