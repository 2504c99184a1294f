package keycache

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

func newKey(t *testing.T) (*Key, []byte) {
	t.Helper()
	raw := make([]byte, 32)
	_, _ = rand.Read(raw)
	k, err := NewKey(bytes.Clone(raw))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k, raw
}

func TestKeyHoldsBytesAndPassphrase(t *testing.T) {
	raw := bytes.Repeat([]byte{0xfb}, 32)
	in := bytes.Clone(raw)
	k, err := NewKey(in)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Wipe()
	if !bytes.Equal(k.Bytes(), raw) {
		t.Error("Bytes is not what NewKey got")
	}
	if got := string(k.Passphrase()); got != base64.StdEncoding.EncodeToString(raw) || len(got) != 44 {
		t.Errorf("the passphrase is no standard base64 of the key (%d bytes)", len(got))
	}
	if !bytes.Equal(in, make([]byte, 32)) {
		t.Error("NewKey left the key in its argument")
	}
	if cap(k.Bytes()) != 32 || cap(k.Passphrase()) != 44 {
		t.Error("a borrowed slice reaches beyond its part")
	}
}

func TestNewKeyRefusesOtherLengthsAndWipesThem(t *testing.T) {
	for _, n := range []int{0, 16, 31, 33, 44, 64} {
		in := bytes.Repeat([]byte{7}, n)
		if k, err := NewKey(in); err == nil || k != nil {
			t.Errorf("NewKey took %d bytes", n)
		}
		if !bytes.Equal(in, make([]byte, n)) {
			t.Errorf("NewKey left its argument of %d bytes", n)
		}
	}
}

func TestKeyOfNoCallHasNoRequestID(t *testing.T) {
	k, _ := newKey(t)
	for _, key := range []*Key{nil, {}, k} {
		if id := key.RequestID(); id != "" {
			t.Errorf("%q", id)
		}
	}
}

func TestKeyEqual(t *testing.T) {
	a, raw := newKey(t)
	b, _ := newKey(t)
	same, err := NewKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !a.Equal(same) || !a.Equal(a) {
		t.Error("equal keys differ")
	}
	same.Wipe()
	for name, other := range map[string]*Key{"another": b, "wiped": same, "nil": nil, "zero": {}} {
		if a.Equal(other) || other.Equal(a) {
			t.Errorf("the key equals the %s one", name)
		}
	}
	if same.Equal(same) {
		t.Error("a wiped key equals itself")
	}
}

func TestWipeZeroesBeforeItUnmaps(t *testing.T) {
	k, _ := newKey(t)
	called := 0
	k.m.unmap = func(page []byte) error {
		called++
		if !bytes.Equal(page, make([]byte, len(page))) {
			t.Error("the page is given back with the key in it")
		}
		return unix.Munmap(page)
	}
	k.Wipe()
	k.Wipe()
	if called != 1 {
		t.Errorf("unmapped %d times", called)
	}
	if k.Bytes() != nil || k.Passphrase() != nil {
		t.Error("a wiped key still gives bytes")
	}
	(*Key)(nil).Wipe()
	(&Key{}).Wipe()
}

func TestKeyIsLockedAndLeftOutOfDumps(t *testing.T) {
	k, _ := newKey(t)
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(smaps), fmt.Sprintf("%08x-", addressOf(k.Bytes())))
	if !ok {
		t.Fatal("the key has no mapping that starts with it")
	}
	_, flags, _ := strings.Cut(after, "VmFlags:")
	flags, _, _ = strings.Cut(flags, "\n")
	for _, want := range []string{" lo ", " dd "} { // locked, do not dump
		if !strings.Contains(flags+" ", want) {
			t.Errorf("the mapping has no flag%q: %s", want, flags)
		}
	}
}

func addressOf(b []byte) uintptr {
	var addr uintptr
	_, _ = fmt.Sscanf(fmt.Sprintf("%p", b), "0x%x", &addr)
	return addr
}

// leaks lists the ways in which out shows the key.
func leaks(out string, raw []byte) []string {
	var found []string
	for name, form := range map[string]string{
		"raw":     string(raw),
		"hex":     hex.EncodeToString(raw),
		"HEX":     strings.ToUpper(hex.EncodeToString(raw)),
		"base64":  base64.StdEncoding.EncodeToString(raw),
		"decimal": strings.Trim(fmt.Sprint(raw), "[]"),
		"quoted":  strings.Trim(fmt.Sprintf("%q", raw), `"`),
		"b64 hex": hex.EncodeToString([]byte(base64.StdEncoding.EncodeToString(raw))),
		"b64 dec": strings.Trim(fmt.Sprint([]byte(base64.StdEncoding.EncodeToString(raw))), "[]"),
		"syntax":  strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", raw), "[]byte{"), "}"),
	} {
		if strings.Contains(out, form) {
			found = append(found, name)
		}
	}
	return found
}

func TestKeyNeverPrints(t *testing.T) {
	k, raw := newKey(t)
	type public struct {
		K *Key
		V Key
		A any
	}
	type private struct {
		k *Key
		v Key
	}

	verbs := []string{"%v", "%+v", "%#v", "%s", "%x", "%X", "%q", "%d", "%t", "%08.3f", "% x", "%U", "%c", "%b", "%o", "%e"}
	for _, verb := range verbs {
		for name, v := range map[string]any{"pointer": k, "value": *k} {
			if got := fmt.Sprintf(verb, v); got != "[key]" {
				t.Errorf("%s of a %s prints %q", verb, name, got)
			}
		}
		holders := map[string]any{
			"struct": public{k, *k, k}, "struct pointer": &public{k, *k, *k}, "slice": []*Key{k}, "values": []Key{*k},
			"map": map[string]*Key{"k": k}, "pointer to pointer": &k, "private": private{k, *k}, "private pointer": &private{k, *k},
		}
		for name, v := range holders {
			got := fmt.Sprintf(verb, v)
			if f := leaks(got, raw); f != nil {
				t.Errorf("%s of a %s shows the key as %v", verb, name, f)
			}
			if !strings.Contains(name, "pr") && !strings.Contains(name, "pointer to") && !strings.Contains(got, "[key]") {
				t.Errorf("%s of a %s shows no [key]: %s", verb, name, got)
			}
		}
	}

	if got := k.String() + k.GoString(); got != "[key][key]" {
		t.Errorf("String and GoString: %q", got)
	}

	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "p", k, "v", *k, "s", public{k, *k, k}, "t", private{k, *k})
	slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "p", k, "v", *k, "s", public{k, *k, k}, "t", private{k, *k})
	for _, enc := range []zapcore.Encoder{zapcore.NewJSONEncoder(zapcore.EncoderConfig{}), zapcore.NewConsoleEncoder(zapcore.EncoderConfig{})} {
		z := zap.New(zapcore.NewCore(enc, zapcore.AddSync(&log), zapcore.DebugLevel))
		z.Info("m", zap.Any("p", k), zap.Any("v", *k), zap.Any("s", public{k, *k, k}), zap.Reflect("r", k),
			zap.Stringer("st", k), zap.Any("l", []*Key{k}), zap.Any("t", private{k, *k}), zap.Inline(zapcore.ObjectMarshalerFunc(func(e zapcore.ObjectEncoder) error {
				return e.AddReflected("o", k)
			})))
		z.Sugar().Infow("m", "k", k, "v", *k)
	}

	marshal := map[string]func(any) ([]byte, error){"json": json.Marshal, "yaml": yaml.Marshal, "xml": xml.Marshal}
	for name, f := range marshal {
		values := []any{k, *k, []*Key{k}, []Key{*k}}
		if name != "xml" { // which has no form for an interface field of this kind
			values = append(values, public{k, *k, k}, map[string]any{"k": k, "v": *k})
		}
		for _, v := range values {
			out, err := f(v)
			if err != nil {
				t.Errorf("%s of %T: %v", name, v, err)
			}
			if !bytes.Contains(out, []byte("[key]")) {
				t.Errorf("%s of %T: %s", name, v, out)
			}
			log.Write(out)
		}
	}
	if f := leaks(log.String(), raw); f != nil {
		t.Errorf("a logger or marshaller shows the key as %v", f)
	}
	if n := strings.Count(log.String(), "[key]"); n < 40 {
		t.Errorf("[key] is shown %d times only:\n%s", n, log.String())
	}
}

func TestProtectMemory(t *testing.T) {
	out, err := child(t, "protect", "").Output()
	if err != nil {
		t.Fatal(err)
	}
	got := string(out)
	for _, want := range []string{"core 0 0\n", "dumpable 0\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	// Without CAP_IPC_LOCK and with a small RLIMIT_MEMLOCK the kernel must
	// refuse, and the error must say what is missing.
	if strings.Contains(got, "error <nil>\n") {
		_, locked, _ := strings.Cut(got, "VmLck:")
		var kib int
		if _, err := fmt.Sscan(locked, &kib); err != nil || kib < 1024 {
			t.Errorf("only %d KiB are locked (%v)", kib, err)
		}
		var rss int
		_, resident, _ := strings.Cut(got, "VmRSS:")
		if _, err := fmt.Sscan(resident, &rss); err != nil || rss > 40<<10 {
			t.Errorf("%d KiB are resident: the address space was locked without MCL_ONFAULT (%v)", rss, err)
		}
	} else if !strings.Contains(got, "error cannot lock memory: ") {
		t.Errorf("unexpected error in:\n%s", got)
	}
}
