package keycache

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"reflect"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"
)

// RecordVersion is the version of the records that this package writes and reads,
// but for a volume record with a Rotation: that has rotationVersion.
const RecordVersion = 1

const rotationVersion = 2

// maxWrapped is the longest ciphertext that KMS Decrypt takes, in bytes
// (API reference of Decrypt, CiphertextBlob).
const maxWrapped = 6144

// keyARN matches the ARN of a KMS key, never of an alias: partition, region,
// account and key id (a UUID, or mrk- for a multi-Region key).
var keyARN = regexp.MustCompile(`^arn:aws[a-z-]*:kms:([a-z0-9-]+):\d{12}:key/(` + keyID + `)$`)

const keyID = `[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|mrk-[0-9a-f]{32}`

// KeyRecord is a wrapped data key: keys/<ID>.json.
type KeyRecord struct {
	Version int    `json:"version"` // RecordVersion
	ID      string `json:"id"`      // UUID, ours; names the file
	KeyARN  string `json:"key_arn"` // as GenerateDataKey returned it, never an alias
	// WrappedKey is KMS's ciphertext, 1 to 6144 bytes; base64 in the file.
	WrappedKey []byte `json:"wrapped_key"`
	// EncryptionContext is what Decrypt must be given. LUKS keys have none.
	EncryptionContext map[string]string `json:"encryption_context,omitempty"`
	InstanceID        string            `json:"instance_id"`          // of the node that stored it
	Region            string            `json:"region"`               // of that node
	Created           time.Time         `json:"created"`              // UTC
	RequestID         string            `json:"request_id,omitempty"` // of GenerateDataKey, for CloudTrail
}

// VolumeState says how far a volume is.
type VolumeState string

const (
	// StateFormatting is the intent: nothing of value can be on the volume.
	StateFormatting VolumeState = "formatting"
	// StateReady is a one-way door: the volume may hold data.
	StateReady VolumeState = "ready"
	// StateWiping is what a person's wipe makes of it: the key slots may be gone.
	StateWiping VolumeState = "wiping"
)

// VolumeRecord is what is known of one volume: volumes/<UUID>.json.
type VolumeRecord struct {
	Version    int         `json:"version"` // RecordVersion
	UUID       string      `json:"uuid"`    // of the LUKS header; names the file
	KeyID      string      `json:"key_id"`  // KeyRecord.ID
	Class      string      `json:"class"`
	Identity   string      `json:"identity"` // EBS volume id, serial or configured name
	Size       int64       `json:"size"`     // bytes
	State      VolumeState `json:"state"`
	Filesystem string      `json:"filesystem,omitempty"`
	MountPoint string      `json:"mount_point,omitempty"` // absolute, or [SwapPoint]
	Mapping    string      `json:"mapping,omitempty"`     // name under /dev/mapper
	InstanceID string      `json:"instance_id"`
	Created    time.Time   `json:"created"` // UTC
	Changed    time.Time   `json:"changed"` // UTC
	// Rotation is there while the data key is being replaced.
	Rotation *Rotation `json:"rotation,omitempty"`
}

// Rotation is the intent to replace the data key of a volume. While it stands, the
// volume is opened by KeyID of its record, by that of the rotation, or by both.
type Rotation struct {
	KeyID      string `json:"key_id"`       // KeyRecord.ID of the data key to come
	KeySlot    int    `json:"key_slot"`     // of LUKS, that it is given
	OldKeySlot int    `json:"old_key_slot"` // that is removed once the volume has the new one
}

// UnmarshalJSON reads a rotation as strictly as the record that it is in.
func (r *Rotation) UnmarshalJSON(data []byte) error {
	type plain Rotation
	if err := checkNames(json.NewDecoder(bytes.NewReader(data)), fieldNames(r)); err != nil {
		return fmt.Errorf("rotation: %w", err)
	}
	return json.Unmarshal(data, (*plain)(r))
}

// keySlots is how many LUKS2 key slots there can be (LUKS2_KEYSLOTS_MAX in cryptsetup's lib/luks2/luks2.h).
const keySlots = 32

func (r *Rotation) validate(of *VolumeRecord) error {
	switch {
	case !isUUID(r.KeyID) || r.KeyID == of.KeyID:
		return fmt.Errorf("rotation: key_id %q is not the UUID of another data key", r.KeyID)
	case r.KeySlot < 0 || r.KeySlot >= keySlots || r.OldKeySlot < 0 || r.OldKeySlot >= keySlots || r.KeySlot == r.OldKeySlot:
		return fmt.Errorf("rotation: key slots %d and %d are not two of 0 to %d", r.KeySlot, r.OldKeySlot, keySlots-1)
	case of.State != StateReady:
		return fmt.Errorf("rotation: the state is %q", of.State)
	}
	return nil
}

// SwapPoint is the mount point of a volume that is swap, as lsblk shows it.
const SwapPoint = "[SWAP]"

// needs says whether the record needs a data key.
func (r *VolumeRecord) needs(keyID string) bool {
	return r.KeyID == keyID || r.Rotation != nil && r.Rotation.KeyID == keyID
}

// version is the one that the record's fields ask for.
func (r *VolumeRecord) version() int {
	if r.Rotation != nil {
		return rotationVersion
	}
	return RecordVersion
}

// RecordError is a file in keys/ or volumes/, or stripe.json, that cannot be trusted. The
// file is left as it is.
type RecordError struct {
	Path string // of the file
	ID   string // the UUID that the file's name gives, "" if it gives none
	Kind string // "key", "volume" or "stripe"
	Err  error
}

// Error says which record and why.
func (e *RecordError) Error() string {
	return fmt.Sprintf("cannot read %s record %s: %v", e.Kind, e.Path, e.Err)
}

// Unwrap returns the cause.
func (e *RecordError) Unwrap() error { return e.Err }

// Records are all records of a store. A volume may name a key that is not in
// Keys: its record was unreadable (then it is in Problems) or is gone.
type Records struct {
	Keys     map[string]KeyRecord    // by ID
	Volumes  map[string]VolumeRecord // by UUID
	Stripe   *StripeRecord           // of a stripe that is not whole; nil: of none
	Problems []RecordError           // in order of path; empty if every file was understood
}

// validate refuses a key record that could not have been written by PutKey.
func (r *KeyRecord) validate() error {
	region := ""
	if m := keyARN.FindStringSubmatch(r.KeyARN); m != nil {
		region = m[1]
	}
	switch {
	case r.Version != RecordVersion:
		return versionError(r.Version, r)
	case !isUUID(r.ID):
		return fmt.Errorf("id %q is not a UUID", r.ID)
	case region == "":
		return fmt.Errorf("key_arn %q is not the ARN of a KMS key", r.KeyARN)
	case len(r.WrappedKey) == 0:
		return errors.New("wrapped_key is empty")
	case len(r.WrappedKey) > maxWrapped:
		return fmt.Errorf("wrapped_key has %d bytes, KMS takes at most %d", len(r.WrappedKey), maxWrapped)
	case r.InstanceID == "":
		return errors.New("instance_id is empty")
	case r.Region == "":
		return errors.New("region is empty")
	}
	return checkTime("created", r.Created)
}

// validate refuses a volume record that could not have been written by
// PutVolume.
func (r *VolumeRecord) validate() error {
	switch {
	case r.Version != r.version():
		return fmt.Errorf("version %d does not go with its fields: %d does", r.Version, r.version())
	case !isUUID(r.UUID):
		return fmt.Errorf("uuid %q is not a UUID", r.UUID)
	case !isUUID(r.KeyID):
		return fmt.Errorf("key_id %q is not a UUID", r.KeyID)
	case r.Class == "":
		return errors.New("class is empty")
	case r.Identity == "":
		return errors.New("identity is empty")
	case r.Size <= 0:
		return fmt.Errorf("size %d is not positive", r.Size)
	case r.State != StateFormatting && r.State != StateReady && r.State != StateWiping:
		return fmt.Errorf("state %q is none of %q, %q and %q", r.State, StateFormatting, StateReady, StateWiping)
	case (r.MountPoint == SwapPoint) != (r.Filesystem == "swap"):
		return fmt.Errorf("mount_point %q does not go with filesystem %q", r.MountPoint, r.Filesystem)
	case r.MountPoint != "" && r.MountPoint != SwapPoint && (!path.IsAbs(r.MountPoint) || path.Clean(r.MountPoint) != r.MountPoint || strings.Contains(r.MountPoint, "\x00")):
		return fmt.Errorf("mount_point %q is not a clean absolute path", r.MountPoint)
	case strings.ContainsAny(r.Mapping, "/\x00") || r.Mapping == "." || r.Mapping == "..":
		return fmt.Errorf("mapping %q is not a name", r.Mapping)
	case r.InstanceID == "":
		return errors.New("instance_id is empty")
	}
	if r.Rotation != nil {
		if err := r.Rotation.validate(r); err != nil {
			return err
		}
	}
	return errors.Join(checkTime("created", r.Created), checkTime("changed", r.Changed))
}

// checkTime wants UTC, as it is written: encoding/json reads zones that it cannot
// write.
func checkTime(field string, t time.Time) error {
	if t.IsZero() {
		return fmt.Errorf("%s is missing", field)
	}
	if _, offset := t.Zone(); offset != 0 {
		return fmt.Errorf("%s is not in UTC", field)
	}
	return nil
}

// newest is the highest version of a record that is understood.
func newest(record any) int {
	if _, ok := record.(*VolumeRecord); ok {
		return rotationVersion
	}
	return RecordVersion
}

func versionError(v int, record any) error {
	return fmt.Errorf("version %d is not supported, only up to %d is", v, newest(record))
}

// isUUID accepts only the canonical lower-case form: it becomes a file name,
// and two spellings of one UUID must not be two records.
func isUUID(s string) bool {
	u, err := uuid.Parse(s)
	return err == nil && u.String() == s
}

// encode is the one form in which records are written.
func encode(record any) ([]byte, error) {
	data, err := json.MarshalIndent(record, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(data, '\n'), nil
}

// decode reads exactly one JSON object whose fields are those of into, spelt
// as they are written and none twice, and nothing after it. encoding/json alone
// would take "KEY_ARN" for key_arn and the last of two equal names.
func decode(data []byte, into any) error {
	// The version first: a later version has fields that would otherwise be
	// the complaint.
	var v struct {
		Version *int `json:"version"`
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&v); err != nil {
		return jsonError(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something after the record")
	}
	if v.Version == nil {
		return errors.New("version is missing")
	}
	if *v.Version < RecordVersion || *v.Version > newest(into) {
		return versionError(*v.Version, into)
	}
	if err := checkNames(json.NewDecoder(bytes.NewReader(data)), fieldNames(into)); err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

func jsonError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it is truncated")
	}
	return err
}

// fieldNames are the JSON names of the fields of the struct that into points to.
func fieldNames(into any) map[string]bool {
	t := reflect.TypeOf(into).Elem()
	names := make(map[string]bool, t.NumField())
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		names[name] = true
	}
	return names
}

// checkNames reads one value. No object in it may have a name twice; if allowed
// is not nil the value itself may have only those names.
func checkNames(dec *json.Decoder, allowed map[string]bool) error {
	tok, err := dec.Token()
	if err != nil {
		return jsonError(err)
	}
	delim, _ := tok.(json.Delim)
	if allowed != nil && delim != '{' {
		return errors.New("it is not a JSON object")
	}
	if delim == 0 {
		return nil
	}
	seen := map[string]bool{}
	for dec.More() {
		if delim == '{' {
			tok, err := dec.Token()
			if err != nil {
				return jsonError(err)
			}
			name, _ := tok.(string)
			if allowed != nil && !allowed[name] {
				return fmt.Errorf("unknown field %q", name)
			}
			if seen[name] {
				return fmt.Errorf("field %q is there twice", name)
			}
			seen[name] = true
		}
		if err := checkNames(dec, nil); err != nil {
			return err
		}
	}
	_, err = dec.Token() // the closing delimiter
	return jsonError(err)
}
