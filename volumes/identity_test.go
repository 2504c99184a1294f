package volumes

import (
	"strings"
	"testing"
	"unsafe"
)

func TestParseMappingName(t *testing.T) {
	tests := []struct{ vendor, want string }{
		{"/dev/sdf" + strings.Repeat(" ", 24), "sdf"},
		{"sdf" + strings.Repeat(" ", 29), "sdf"},
		{"xvdba\x00\x00garbage", "xvdba"},
		{"ephemeral0:sdb", "sdb"},
		{"ephemeral1:none", ""},
		{"none", ""},
		{"", ""},
		{strings.Repeat(" ", 32), ""},
		{"\xff\xfe\x01\x02", ""},
		{"sd\x1b[31m", ""},
		{"/dev/../etc", ""},
		{"abcdefghijklmnopqrstuvwxyz012345" + "beyond", "abcdefghijklmnopqrstuvwxyz012345"},
	}
	for _, test := range tests {
		data := make([]byte, identifySize)
		copy(data[vendorOffset:], test.vendor)
		copy(data[4:], "not the vendor's bytes")
		if got := parseMappingName(data); got != test.want {
			t.Errorf("%q: name %q, want %q", test.vendor, got, test.want)
		}
	}
	if got := parseMappingName(make([]byte, vendorOffset)); got != "" {
		t.Errorf("short data: %q", got)
	}
}

// The kernel copies as many bytes as the ioctl's number says.
func TestAdminCommandLayout(t *testing.T) {
	var c adminCmd
	if size := unsafe.Sizeof(c); size != nvmeAdminCmd>>16&0x3fff {
		t.Errorf("size %d", size)
	}
	if unsafe.Offsetof(c.addr) != 24 || unsafe.Offsetof(c.cdw10) != 40 || unsafe.Offsetof(c.timeoutMilliseconds) != 64 {
		t.Errorf("fields are not where linux/nvme_ioctl.h has them")
	}
}

func TestParseShared(t *testing.T) {
	for nmic, want := range map[byte]bool{0: false, 1: true, 0xfe: false, 0xff: true} {
		data := make([]byte, identifySize)
		data[nmicOffset-1], data[nmicOffset], data[nmicOffset+1] = 0xff, nmic, 0xff
		if got := parseShared(data); got != want {
			t.Errorf("NMIC %#x: shared %v, want %v", nmic, got, want)
		}
	}
	if parseShared(nil) {
		t.Error("no answer: shared")
	}
}

func TestNoControllerNoHints(t *testing.T) {
	tr := newTree(t)
	tr.write("dev/nvme1n1", "")
	for _, path := range []string{tr.root + "/dev/nvme1n1", tr.root + "/dev/absent"} {
		if name, shared := askNVMe(path); name != "" || shared {
			t.Errorf("%s: name %q, shared %v", path, name, shared)
		}
	}
}

func TestVolumeID(t *testing.T) {
	for serial, want := range map[string]string{"vol0b": "vol-0b", "vol-0b": "vol-0b", "AWS1": "AWS1", "": ""} {
		if got := volumeID(serial); got != want {
			t.Errorf("%q: %q, want %q", serial, got, want)
		}
	}
}
