package harness

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/search"
)

func TestEnableUnits(t *testing.T) {
	tree := t.TempDir()
	unit := filepath.Join(tree, "usr/lib/systemd/system/a.service")
	if err := writeFile(unit, []byte("[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=x.target y.target\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(filepath.Join(tree, "usr/share/doc/b.service"), []byte("WantedBy=z.target\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := enableUnits(tree); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"x.target", "y.target"} {
		link := filepath.Join(tree, "etc/systemd/system", target+".wants/a.service")
		if got, err := os.Readlink(link); err != nil || got != "/usr/lib/systemd/system/a.service" {
			t.Errorf("%s -> %q, %v", link, got, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(tree, "etc/systemd/system/z.target.wants")); !os.IsNotExist(err) {
		t.Error("a file that is no unit was enabled")
	}
}

func TestSuites(t *testing.T) {
	for _, test := range []struct {
		text, prefix string
		want         bool
	}{
		{"Types: deb\nURIs: http://mirror.invalid/debian\nSuites: bookworm bookworm-updates\n", "Suites:", true},
		{"Types: deb\nSuites: bookworm-security\n", "Suites:", true},
		{"Types: deb\nURIs: http://mirror.invalid/bookworm\nSuites: nodistro\n", "Suites:", false},
		{"Types: deb\nSuites: cloud-sdk-bookworm\n", "Suites:", false},
		{"deb http://mirror.invalid/debian bookworm main", "deb ", true},
		{"deb http://mirror.invalid/x tool-bookworm main", "deb ", false},
		{"deb-src http://mirror.invalid/debian bookworm main", "deb ", false},
	} {
		if got := suites(test.text, test.prefix); got != test.want {
			t.Errorf("%q: %v", test.text, got)
		}
	}
}

func TestManifestFitsItsDisk(t *testing.T) {
	m := channel.Manifest{Files: []channel.File{{Path: "/etc/x", Mode: 0o600, Data: []byte("y")}}}
	b, err := encodeManifest(m)
	if err != nil || len(b) != manifestSize {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	var got channel.Manifest
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&got); err != nil || string(got.Files[0].Data) != "y" {
		t.Errorf("%+v, %v", got, err)
	}
	m.Files[0].Data = make([]byte, manifestSize)
	if _, err := encodeManifest(m); err == nil {
		t.Error("no error for a manifest that is too large")
	}
}

// TestUnitsAreWanted: a story's unit that nothing starts would make its story pass without it.
func TestUnitsAreWanted(t *testing.T) {
	err := fs.WalkDir(units, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		b, err := units.ReadFile(name)
		if err == nil && !bytes.Contains(b, []byte("\nWantedBy=")) {
			t.Errorf("%s is wanted by nothing", name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// sparse returns a file of DiskSize with pieces of text at offsets.
func sparse(t *testing.T, pieces map[int64]string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(DiskSize); err != nil {
		t.Fatal(err)
	}
	for offset, text := range pieces {
		if _, err := f.WriteAt([]byte(text), offset); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func TestDigestSeesEveryByte(t *testing.T) {
	digest := func(pieces map[int64]string, limit int64) string {
		got, err := digestData(sparse(t, pieces), limit)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	const far = 300 << 20
	base := map[int64]string{0: "head", 100000: "body", far: "x"}
	same := map[int64]string{0: "head\x00\x00", 100000: "body", far: "x", 5 << 20: strings.Repeat("\x00", 1<<20)}
	if digest(base, DiskSize) != digest(same, DiskSize) {
		t.Error("zeros that were written make a difference")
	}
	for name, other := range map[string]map[int64]string{
		"another byte":   {0: "head", 100000: "bodi", far: "x"},
		"another place":  {0: "head", 100000: "body", far + digestBlock: "x"},
		"one byte less":  {0: "head", 100000: "body"},
		"one byte more":  {0: "head", 100000: "body", far: "x", DiskSize - 1: "y"},
		"nothing at all": {},
	} {
		if digest(base, DiskSize) == digest(other, DiskSize) {
			t.Errorf("%s makes no difference", name)
		}
	}
	near := map[int64]string{0: "head", 100000: "body"}
	if digest(base, headerLimit) != digest(near, headerLimit) {
		t.Error("what is behind the limit makes a difference")
	}
	if digest(near, 100002) == digest(near, 100001) {
		t.Error("the last byte before the limit makes no difference")
	}
}

const headerLimit = 16 << 20

func TestDataReadsWhatIsBetweenHoles(t *testing.T) {
	f := sparse(t, map[int64]string{0: "head", 64 << 20: "middle", DiskSize - 4: "tail"})
	found, err := search.Find(&data{f: f}, [][]byte{[]byte("head"), []byte("middle"), []byte("tail"), []byte("absent")})
	if err != nil || len(found) != 3 {
		t.Errorf("found %v, %v", found, err)
	}
}

// witness is a TB that notes errors.
type witness struct {
	TB
	errors []string
}

func (w *witness) Helper() {}
func (w *witness) Errorf(format string, args ...any) {
	w.errors = append(w.errors, fmt.Sprintf(format, args...))
}

func TestStoryFailsWhereItsNodeHasBadManners(t *testing.T) {
	w := &witness{}
	n := &Node{tb: w, KMS: proxy.NewKMS("http://127.0.0.1:1/", Region), IMDS: proxy.NewIMDS(&url.URL{Scheme: "http", Host: "127.0.0.1:1"})}
	n.checkManners()
	if len(w.errors) > 0 {
		t.Fatalf("errors without a cause: %v", w.errors)
	}
	call := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(`{"KeyId":"k","EncryptionContext":{"a":"b"}}`))
	call.Header.Set("X-Amz-Target", "TrentService.Decrypt")
	n.KMS.ServeHTTP(httptest.NewRecorder(), call)
	n.IMDS.Set(proxy.Off)
	n.IMDS.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/latest/meta-data/instance-id", nil))
	n.checkManners()
	if len(w.errors) != 2 || !strings.Contains(w.errors[0], "encryption context") || !strings.Contains(w.errors[1], "without a token") {
		t.Errorf("errors: %q", w.errors)
	}
}

func TestFaultsBecomeATable(t *testing.T) {
	const sectors = DiskSize / 512
	d := Disk{Name: "x", Faulty: true}
	for want, faults := range map[string][]Fault{
		fmt.Sprintf("0 %d linear STORAGE 0", sectors): nil,
		fmt.Sprintf("0 %d error", sectors):            {Errors(0, 0)},
		fmt.Sprintf("0 8 linear STORAGE 0\n8 8 flakey STORAGE 8 0 3600 1 error_writes\n16 16 linear STORAGE 16\n32 %d delay STORAGE 32 20", sectors-32): {
			WriteErrors(4096, 8192), Slow(16384, 0, 20*time.Millisecond)},
	} {
		if got := d.table(faults); got != want {
			t.Errorf("%v:\n%s\nwant\n%s", faults, got, want)
		}
	}
	d.Size = 1 << 20
	if got, want := d.table(nil), "0 2048 linear STORAGE 0"; got != want {
		t.Errorf("a disk of 1 MiB: %s, want %s", got, want)
	}
}
