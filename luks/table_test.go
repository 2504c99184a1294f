package luks

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel takes it in the stories; here it is held against the text that cryptsetup loads (`dmsetup table`).
func TestTableRequest(t *testing.T) {
	for _, c := range []struct {
		options OpenOptions
		flags   []any
		want    string // behind the offset
	}{
		{OpenOptions{}, nil, "1 sector_size:4096"},
		{OpenOptions{NoReadWorkqueue: true, NoWriteWorkqueue: true}, nil, "3 no_read_workqueue no_write_workqueue sector_size:4096"},
		{OpenOptions{}, []any{"allow-discards", "same-cpu-crypt", "submit-from-crypt-cpus"},
			"4 allow_discards same_cpu_crypt submit_from_crypt_cpus sector_size:4096"},
	} {
		path := volume(t)
		if c.flags != nil {
			edit(t, path, func(m tree) { m.At("config")["flags"] = c.flags })
		}
		var request []byte
		var key string
		dm := fakeMapper(t)
		create := dm.create
		dm.create = func(v *volumeType, name string) error {
			key, request = hex.EncodeToString(volumeKey(v)), tableRequest(v, name)
			return create(v, name)
		}
		c.options.Name = "luks-" + testUUID
		if err := inspected(t, path).open(t.Context(), rightKey(), c.options, dm); err != nil {
			t.Fatal(err)
		}
		head := (*unix.DmIoctl)(unsafe.Pointer(&request[0]))
		spec := (*unix.DmTargetSpec)(unsafe.Pointer(&request[unix.SizeofDmIoctl]))
		text, rest, _ := strings.Cut(string(request[unix.SizeofDmIoctl+unix.SizeofDmTargetSpec:]), "\x00")
		if want := fmt.Sprintf("aes-xts-plain64 %s 0 %s 32768 %s", key, path, c.want); text != want {
			t.Errorf("the table is %s,\nwant %s", text, want)
		}
		if strings.Trim(rest, "\x00") != "" || len(request)%8 != 0 || int(head.Data_size) != len(request) || int(spec.Next) != len(request)-unix.SizeofDmIoctl {
			t.Errorf("%d bytes are behind the table; sizes %d and %d of %d", len(rest), head.Data_size, spec.Next, len(request))
		}
		if head.Flags&unix.DM_SECURE_DATA_FLAG == 0 {
			t.Error("the kernel is not told to wipe its copy")
		}
		if name := string(bytes.TrimRight(head.Name[:], "\x00")); name != c.options.Name || head.Target_count != 1 || head.Data_start != unix.SizeofDmIoctl {
			t.Errorf("mapping %q, %d targets at %d", name, head.Target_count, head.Data_start)
		}
		if kind := string(bytes.TrimRight(spec.Target_type[:], "\x00")); kind != "crypt" || spec.Sector_start != 0 || spec.Length != (imageSize-16<<20)/512 {
			t.Errorf("target %q from sector %d, %d sectors", kind, spec.Sector_start, spec.Length)
		}
	}
}
