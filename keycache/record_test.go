package keycache

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

var someTime = time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)

func goodKey() KeyRecord {
	return KeyRecord{
		Version: RecordVersion, ID: uuid.NewString(),
		KeyARN:     "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
		WrappedKey: []byte("wrapped"), InstanceID: "i-0123456789abcdef0", Region: "eu-central-1", Created: someTime, RequestID: "req-1",
	}
}

func goodVolume(k KeyRecord) VolumeRecord {
	return VolumeRecord{
		Version: RecordVersion, UUID: uuid.NewString(), KeyID: k.ID, Class: "ebs", Identity: "vol-0123456789abcdef0", Size: 1 << 30,
		State: StateFormatting, Filesystem: "xfs", MountPoint: "/mnt", Mapping: "luks-x", InstanceID: k.InstanceID, Created: someTime, Changed: someTime,
	}
}

// storeWith is a store with one key and one ready volume.
func storeWith(t *testing.T) (*Store, KeyRecord, VolumeRecord) {
	t.Helper()
	s, err := OpenStore(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	k := goodKey()
	v := goodVolume(k)
	v.State = StateReady
	if err := errors.Join(s.PutKey(k), s.PutVolume(v)); err != nil {
		t.Fatal(err)
	}
	return s, k, v
}

func load(t *testing.T, s *Store) Records {
	t.Helper()
	r, err := s.Load()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRecordsRoundTrip(t *testing.T) {
	s, k, v := storeWith(t)
	r := load(t, s)
	if len(r.Problems) != 0 || !reflect.DeepEqual(r.Keys[k.ID], k) || !reflect.DeepEqual(r.Volumes[v.UUID], v) {
		t.Errorf("stored %+v %+v, loaded %+v", k, v, r)
	}
	data, err := os.ReadFile(s.keyPath(k.ID))
	if err != nil {
		t.Fatal(err)
	}
	// The names are what docs and people's scripts use.
	for _, want := range []string{`"version": 1`, `"key_arn": "arn:`, `"wrapped_key": "d3JhcHBlZA=="`, `"instance_id"`, `"request_id"`} {
		if !strings.Contains(string(data), want) {
			t.Errorf("no %s in %s", want, data)
		}
	}
	if strings.Contains(string(data), "encryption_context") {
		t.Errorf("an absent context is in %s", data)
	}
}

func TestAnyRecordRoundTrips(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := goodKey()
		k.WrappedKey = rapid.SliceOfN(rapid.Byte(), 1, maxWrapped).Draw(t, "wrapped")
		k.RequestID = rapid.StringMatching(`[ -~]{0,60}`).Draw(t, "request")
		if c := rapid.MapOfN(rapid.StringMatching(`[a-zA-Z:"\\]{1,9}`), rapid.String(), 0, 3).Draw(t, "context"); len(c) > 0 {
			k.EncryptionContext = c
		}
		data, err := encode(k)
		if err != nil {
			t.Fatal(err)
		}
		var got KeyRecord
		if err := decode(data, &got); err != nil {
			t.Fatalf("%v in %s", err, data)
		}
		again, err := encode(got)
		if err != nil || !bytes.Equal(again, data) {
			t.Fatalf("%s became %s (%v)", data, again, err)
		}
		// No prefix of a record is a record.
		cut := rapid.IntRange(0, len(data)-3).Draw(t, "cut")
		if err := decode(data[:cut], &KeyRecord{}); err == nil {
			t.Fatalf("the first %d of %d bytes were taken", cut, len(data))
		}
	})
}

// change edits the JSON of a record.
func change(t *testing.T, data []byte, f func(m map[string]any)) []byte {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	f(m)
	out, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func set(name string, v any) func(*testing.T, []byte) []byte {
	return func(t *testing.T, data []byte) []byte {
		return change(t, data, func(m map[string]any) { m[name] = v })
	}
}

func drop(name string) func(*testing.T, []byte) []byte {
	return func(t *testing.T, data []byte) []byte {
		return change(t, data, func(m map[string]any) { delete(m, name) })
	}
}

func replace(old, repl string) func(*testing.T, []byte) []byte {
	return func(t *testing.T, data []byte) []byte {
		out := bytes.Replace(data, []byte(old), []byte(repl), 1)
		if bytes.Equal(out, data) {
			t.Fatalf("no %q in %s", old, data)
		}
		return out
	}
}

// TestCorruptRecordsAreProblems: each corruption is reported, with its reason,
// under the ID of its name, and costs no other record.
func TestCorruptRecordsAreProblems(t *testing.T) {
	t.Parallel()
	type edit = func(*testing.T, []byte) []byte
	both := map[string]struct {
		edit edit
		want string
	}{
		"empty":            {func(*testing.T, []byte) []byte { return nil }, "truncated"},
		"truncated":        {func(_ *testing.T, d []byte) []byte { return d[:len(d)/2] }, "truncated"},
		"last brace":       {func(_ *testing.T, d []byte) []byte { return d[:len(d)-2] }, "truncated"},
		"zeros":            {func(_ *testing.T, d []byte) []byte { return make([]byte, len(d)) }, "invalid character"},
		"unknown field":    {set("colour", "red"), `unknown field "colour"`},
		"future version":   {set("version", 3), "version 3 is not supported"},
		"future field too": {replace(`"version": 1`, `"version": 3, "new": {}`), "version 3 is not supported"},
		"version zero":     {set("version", 0), "version 0 is not supported"},
		"no version":       {drop("version"), "version is missing"},
		"null version":     {set("version", nil), "version is missing"},
		"text version":     {set("version", "1"), "cannot unmarshal string"},
		"trailing garbage": {func(_ *testing.T, d []byte) []byte { return append(d, "garbage"...) }, "something after"},
		"trailing zeros":   {func(_ *testing.T, d []byte) []byte { return append(d, 0, 0) }, "something after"},
		"two records":      {func(_ *testing.T, d []byte) []byte { return append(d, d...) }, "something after"},
		"array":            {func(_ *testing.T, d []byte) []byte { return append(append([]byte("["), d...), ']') }, "cannot unmarshal array"},
		"null":             {func(*testing.T, []byte) []byte { return []byte("null") }, "version is missing"},
		"case of a name":   {replace(`"instance_id"`, `"Instance_ID"`), `unknown field "Instance_ID"`},
		"field twice":      {replace(`"version": 1`, `"version": 1, "version": 1`), `"version" is there twice`},
		"no instance":      {drop("instance_id"), "instance_id is empty"},
		"no time":          {drop("created"), "created is missing"},
		"local time":       {set("created", "2026-01-02T03:04:05+02:00"), "created is not in UTC"},
		"too large":        {func(_ *testing.T, d []byte) []byte { return append(d, bytes.Repeat([]byte{' '}, maxRecord)...) }, "larger than"},
	}
	keys := map[string]struct {
		edit edit
		want string
	}{
		"name is not id":       {set("id", "99999999-12ab-34cd-56ef-1234567890ab"), "its name is not its id"},
		"id no uuid":           {set("id", "../../etc"), "is not a UUID"},
		"wrapped key empty":    {set("wrapped_key", ""), "wrapped_key is empty"},
		"wrapped key null":     {set("wrapped_key", nil), "wrapped_key is empty"},
		"wrapped key missing":  {drop("wrapped_key"), "wrapped_key is empty"},
		"wrapped key no b64":   {set("wrapped_key", "%%%"), "illegal base64"},
		"wrapped key too long": {set("wrapped_key", make([]byte, maxWrapped+1)), "wrapped_key has 6145 bytes"},
		"alias":                {set("key_arn", "arn:aws:kms:eu-central-1:111122223333:alias/x"), "not the ARN of a KMS key"},
		"no arn":               {drop("key_arn"), "not the ARN"},
		"no region":            {drop("region"), "region is empty"},
		"context twice":        {replace(`"region"`, `"encryption_context": {"a": "b", "a": "c"}, "region"`), `"a" is there twice`},
	}
	volumes := map[string]struct {
		edit edit
		want string
	}{
		"name is not uuid": {set("uuid", "99999999-12ab-34cd-56ef-1234567890ab"), "its name is not its uuid"},
		"key id no uuid":   {set("key_id", "x"), "is not a UUID"},
		"state unknown":    {set("state", "READY"), "none of"},
		"state missing":    {drop("state"), "none of"},
		"size zero":        {set("size", 0), "not positive"},
		"size negative":    {set("size", -1), "not positive"},
		"size fraction":    {set("size", 1.5), "cannot unmarshal number"},
		"mount relative":   {set("mount_point", "mnt"), "not a clean absolute path"},
		"xfs as swap":      {set("mount_point", "[SWAP]"), "does not go with filesystem"},
		"swap mounted":     {set("filesystem", "swap"), "does not go with filesystem"},
		"mount dots":       {set("mount_point", "/mnt/../etc"), "not a clean absolute path"},
		"mapping path":     {set("mapping", "../sda"), "not a name"},
		"no class":         {drop("class"), "class is empty"},
		"no identity":      {drop("identity"), "identity is empty"},
		"no changed":       {drop("changed"), "changed is missing"},
	}
	run := func(kind, name string, edit edit, want string) {
		t.Run(kind+" "+name, func(t *testing.T) {
			t.Parallel()
			s, k, v := storeWith(t)
			path, id := s.volumePath(v.UUID), v.UUID
			if kind == "key" {
				path, id = s.keyPath(k.ID), k.ID
			}
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			bad := edit(t, data)
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			checkProblem(t, s, kind, path, id, want)
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, bad) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
	for name, c := range both {
		run("key", name, c.edit, c.want)
		run("volume", name, c.edit, c.want)
	}
	for name, c := range keys {
		run("key", name, c.edit, c.want)
	}
	for name, c := range volumes {
		run("volume", name, c.edit, c.want)
	}
}

func checkProblem(t *testing.T, s *Store, kind, path, id, want string) {
	t.Helper()
	r := load(t, s)
	if len(r.Problems) != 1 {
		t.Fatalf("problems: %v", r.Problems)
	}
	p := r.Problems[0]
	if p.Kind != kind || p.Path != path || p.ID != id || !strings.Contains(p.Error(), want) {
		t.Errorf("got %s %s %q, want %q", p.Kind, p.ID, p.Error(), want)
	}
	n := map[string]int{"key": len(r.Volumes), "volume": len(r.Keys)}[kind]
	if n != 1 {
		t.Errorf("the other record is not there: %+v", r)
	}
}

// TestStrangeFilesAreProblems: what is no plain file of ours is never read as
// a record.
func TestStrangeFilesAreProblems(t *testing.T) {
	cases := map[string]struct {
		strange func(t *testing.T, path string) error
		want    string
	}{
		"symlink": {func(t *testing.T, path string) error {
			to := filepath.Join(t.TempDir(), "x")
			return errors.Join(os.Rename(path, to), os.Symlink(to, path))
		}, "symbolic link"},
		"dangling symlink": {func(t *testing.T, path string) error {
			return errors.Join(os.Remove(path), os.Symlink("/nonexistent", path))
		}, "symbolic link"},
		"directory": {func(t *testing.T, path string) error {
			return errors.Join(os.Remove(path), os.Mkdir(path, 0o700))
		}, "not a regular file"},
		"fifo": {func(t *testing.T, path string) error {
			// Who waits for a writer waits for ever: one comes, and tells.
			late := time.AfterFunc(3*time.Second, func() {
				if f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
					_ = f.Close()
					t.Error("reading it hangs")
				}
			})
			t.Cleanup(func() { late.Stop() })
			return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600))
		}, "not a regular file"},
		"group may read":   {func(t *testing.T, path string) error { return os.Chmod(path, 0o640) }, "mode 0640"},
		"others may write": {func(t *testing.T, path string) error { return os.Chmod(path, 0o602) }, "mode 0602"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			s, k, _ := storeWith(t)
			if err := c.strange(t, s.keyPath(k.ID)); err != nil {
				t.Fatal(err)
			}
			checkProblem(t, s, "key", s.keyPath(k.ID), k.ID, c.want)
			if err := s.PutKey(k); !errors.Is(err, fs.ErrExist) {
				t.Errorf("PutKey over it: %v", err)
			}
		})
	}
}

func TestForeignOwnerIsRefused(t *testing.T) {
	s, k, v := storeWith(t)
	s.uid++ // as if everything belonged to the user before
	if _, err := s.readKey(s.keyPath(k.ID), k.ID); err == nil || !strings.Contains(err.Error(), "owned by user") {
		t.Errorf("a key record of another user: %v", err)
	}
	if _, err := s.readVolume(s.volumePath(v.UUID), v.UUID); err == nil || !strings.Contains(err.Error(), "owned by user") {
		t.Errorf("a volume record of another user: %v", err)
	}
	var se *StoreError
	if err := s.create(); !errors.As(err, &se) || se.Path != s.dir {
		t.Errorf("a state directory of another user: %v", err)
	}
	if _, err := s.Load(); !errors.As(err, &se) {
		t.Errorf("Load of it: %v", err)
	}
}

func TestOddNamesAreProblemsAndTempsAreNot(t *testing.T) {
	s, k, _ := storeWith(t)
	data, err := os.ReadFile(s.keyPath(k.ID))
	if err != nil {
		t.Fatal(err)
	}
	odd := []string{"notes.txt", k.ID, k.ID + ".json~", strings.ToUpper(k.ID) + ".json", "{" + k.ID + "}.json", k.ID + ".json.bak"}
	for _, name := range append(odd, tmpPrefix+"abc") {
		if err := os.WriteFile(filepath.Join(s.dir, keysDir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := load(t, s)
	if len(r.Problems) != len(odd) || len(r.Keys) != 1 {
		t.Errorf("%d problems, %d keys: %v", len(r.Problems), len(r.Keys), r.Problems)
	}
	for _, p := range r.Problems {
		if p.ID != "" {
			t.Errorf("%s counts as record %s", p.Path, p.ID)
		}
	}
}
