package keycache

import (
	"bytes"
	"encoding/json"
	"path"
	"reflect"
	"strings"
	"testing"
	"time"
)

// Fixed names, because the inputs in which a fuzz run finds something must mean the same in the next run.
const (
	seedKey    = "0f8fad5b-d9cb-469f-a165-70867728950e"
	seedVolume = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
)

// FuzzKeyRecord: what the decoder takes for a key record is one, and is the same record after it was written again.
func FuzzKeyRecord(f *testing.F) {
	k := goodKey()
	k.ID = seedKey
	plain := seed(f, k)
	k.EncryptionContext = map[string]string{"aws:s3:arn": "arn:aws:s3:::b/<&>", "": "\u2028"}
	seed(f, k)
	for _, e := range []edits{
		{"id": "../../etc"}, {"id": strings.ToUpper(seedKey)}, {"id": "{" + seedKey + "}"}, {"id": "urn:uuid:" + seedKey},
		{"wrapped_key": ""}, {"wrapped_key": nil}, {"wrapped_key": absent}, {"wrapped_key": "%%%"}, {"wrapped_key": "YQ\n=="},
		{"wrapped_key": make([]byte, maxWrapped)}, {"wrapped_key": make([]byte, maxWrapped+1)}, {"wrapped_key": []int{1, 2}},
		{"key_arn": "arn:aws:kms:eu-central-1:111122223333:alias/x"}, {"key_arn": absent}, {"key_arn": k.KeyARN + "\n"},
		{"key_arn": "arn:aws-cn:kms:cn-north-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab"},
		{"region": absent}, {"request_id": nil}, {"encryption_context": map[string]any{}},
		{"encryption_context": map[string]any{"a": nil}}, {"encryption_context": map[string]any{"a": 1}}, {"encryption_context": nil},
	} {
		f.Add(e.of(f, plain))
	}
	f.Add(bytes.Replace(plain, []byte(`"region"`), []byte(`"encryption_context": {"a": "b", "\u0061": "c"}, "region"`), 1))
	fuzzRecord(f, (*KeyRecord).validate, func(r *KeyRecord) { // all that validate does not change
		if len(r.EncryptionContext) == 0 {
			r.EncryptionContext = nil // {} is written as none, and Decrypt is given none for both
		}
		r.Created = r.Created.UTC()
	}, func(t *testing.T, r KeyRecord) {
		if n := len(r.WrappedKey); n == 0 || n > 6144 {
			t.Errorf("%d bytes of wrapped key", n)
		}
		if !strings.HasPrefix(r.KeyARN, "arn:aws") || strings.Count(r.KeyARN, ":") != 5 || !strings.Contains(r.KeyARN, ":key/") {
			t.Errorf("key %q", r.KeyARN)
		}
		named(t, r.ID)
		filled(t, r.InstanceID, r.Region)
		dated(t, r.Created)
	})
}

// FuzzVolumeRecord: what the decoder takes for a volume record is one, and is the same record after it was written again.
func FuzzVolumeRecord(f *testing.F) {
	v := goodVolume(KeyRecord{ID: seedKey, InstanceID: "i-0123456789abcdef0"})
	v.UUID = seedVolume
	plain := seed(f, v)
	v.State = StateReady
	seed(f, v)
	for _, e := range []edits{
		{"uuid": "x"}, {"uuid": seedKey}, {"key_id": "x"}, {"key_id": absent}, {"state": "READY"}, {"state": absent}, {"state": nil},
		{"size": 0}, {"size": -1}, {"size": 1.5}, {"size": 1e3}, {"size": 1e30}, {"size": "1"}, {"class": absent}, {"identity": absent}, {"changed": absent},
		{"mount_point": "mnt"}, {"mount_point": "/mnt/../etc"}, {"mount_point": "/mnt/"}, {"mount_point": "//mnt"}, {"mount_point": "/a\x00b"},
		{"mount_point": absent}, {"mapping": "../sda"}, {"mapping": ".."}, {"mapping": "a\x00b"}, {"mapping": absent}, {"filesystem": nil},
	} {
		f.Add(e.of(f, plain))
	}
	fuzzRecord(f, (*VolumeRecord).validate, func(r *VolumeRecord) { r.Created, r.Changed = r.Created.UTC(), r.Changed.UTC() },
		func(t *testing.T, r VolumeRecord) {
			if r.Size < 1 || r.State != "formatting" && r.State != "ready" {
				t.Errorf("size %d, state %q", r.Size, r.State)
			}
			if r.MountPoint != "" && path.Join("/", r.MountPoint) != r.MountPoint {
				t.Errorf("mount point %q", r.MountPoint)
			}
			if r.Mapping != "" && path.Join("/dev/mapper", r.Mapping) != "/dev/mapper/"+r.Mapping || strings.Contains(r.Mapping, "/") {
				t.Errorf("mapping %q", r.Mapping)
			}
			// The kernel would read these only as far as the NUL.
			if strings.Contains(r.MountPoint+r.Mapping, "\x00") {
				t.Errorf("NUL in %q or %q", r.MountPoint, r.Mapping)
			}
			named(t, r.UUID)
			named(t, r.KeyID)
			filled(t, r.InstanceID, r.Class, r.Identity)
			dated(t, r.Created, r.Changed)
		})
}

// fuzzRecord holds for both kinds. canonical takes out differences between two values that are the same record; judge says
// in words of its own what validate promises.
func fuzzRecord[R any](f *testing.F, validate func(*R) error, canonical func(*R), judge func(*testing.T, R)) {
	f.Fuzz(func(t *testing.T, data []byte) {
		data = data[:min(len(data), maxRecord)] // the store reads no more
		before := bytes.Clone(data)
		var got R
		if decode(data, &got) != nil || validate(&got) != nil {
			return
		}
		if !bytes.Equal(data, before) {
			t.Fatal("the input was changed")
		}
		judge(t, got)
		written, err := encode(got)
		if err != nil {
			t.Fatalf("it cannot be written: %v", err)
		}
		// A byte becomes six at most (as \u003c); a record must not swell each time that it is written.
		if len(written) > 6*len(data)+1024 {
			t.Errorf("%d bytes became %d", len(data), len(written))
		}
		var again R
		if err := decode(written, &again); err != nil {
			t.Fatalf("it cannot be read again: %v in %s", err, written)
		}
		if err := validate(&again); err != nil {
			t.Fatalf("it is no record any more: %v in %s", err, written)
		}
		canonical(&got)
		canonical(&again)
		if !reflect.DeepEqual(got, again) {
			t.Errorf("%+v became %+v", got, again)
		}
		// Anything cut off or added makes it no record, at the end, or a name in front that is unknown, there already, or another
		// spelling.
		whole := bytes.TrimSpace(data)
		for _, bad := range [][]byte{whole[:len(whole)-1], whole[:len(whole)/2], append(bytes.Clone(whole), '0'), append(bytes.Clone(whole), whole...),
			append([]byte(`{"colour":1,`), whole[1:]...), append([]byte(`{"version":1,`), whole[1:]...), append([]byte(`{"Version":1,`), whole[1:]...)} {
			if decode(bad, new(R)) == nil {
				t.Errorf("taken too: %q", bad)
			}
		}
	})
}

// seed adds a record, and each corruption that knows nothing of its fields.
func seed(f *testing.F, record any) []byte {
	data, err := encode(record)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte{})
	f.Add([]byte("null"))
	f.Add(make([]byte, 100))
	f.Add(data[:len(data)/2])
	f.Add(data[:len(data)-2])
	for _, tail := range []string{"garbage", "\x00\x00", "}", string(data)} {
		f.Add(append(bytes.Clone(data), tail...))
	}
	f.Add([]byte("[" + string(data) + "]"))
	f.Add([]byte(strings.Repeat(`{"version":`, 3000)))
	for _, to := range []string{
		`"version": 2, "new": {}`, `"version": 1, "version": 1`, `"Version": 1`, `"version": 1e0`, `"vers\u0069on": 1`,
		`"version": 1, "x": ` + strings.Repeat("[", 3000),
	} {
		f.Add(bytes.Replace(data, []byte(`"version": 1`), []byte(to), 1))
	}
	f.Add(bytes.Replace(data, []byte(`"instance_id"`), []byte(`"Instance_ID"`), 1))
	for _, e := range []edits{
		{"colour": "red"}, {"version": 0}, {"version": absent}, {"version": nil}, {"version": "1"}, {"instance_id": absent}, {"instance_id": "\xff"},
		{"created": absent}, {"created": "0001-01-01T00:00:00Z"}, {"created": "2026-01-02T03:04:05+02:00"}, {"created": "2026-01-02T03:04:05-00:00"},
		{"created": "9999-12-31T23:59:59-23:59"}, {"created": "0000-01-01T00:00:00+23:59"}, {"created": 1},
	} {
		f.Add(e.of(f, data))
	}
	return data
}

// edits are new values of fields; absent takes a field out.
type edits map[string]any

var absent = struct{}{}

func (e edits) of(f *testing.F, data []byte) []byte {
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		f.Fatal(err)
	}
	for name, value := range e {
		if m[name] = value; value == any(absent) {
			delete(m, name)
		}
	}
	out, err := json.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	return out
}

// named checks what becomes a file name.
func named(t *testing.T, id string) {
	t.Helper()
	if len(id) != 36 || strings.Trim(id, "0123456789abcdef-") != "" || strings.Count(id, "-") != 4 {
		t.Errorf("id %q", id)
	}
}

func filled(t *testing.T, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if s == "" {
			t.Errorf("a text is missing in %q", texts)
		}
	}
}

func dated(t *testing.T, times ...time.Time) {
	t.Helper()
	for _, at := range times {
		if at.IsZero() {
			t.Error("a time is missing")
		}
		if _, offset := at.Zone(); offset != 0 {
			t.Errorf("%v is local to some place", at)
		}
	}
}
