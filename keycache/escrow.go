package keycache

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// EscrowNote is what is remembered of the last copy of a volume's header and records that was sent off the node: escrow/<UUID>.json.
// It is written before the object is put, so that what a cut leaves is put again under the same name, and once more when the object
// is confirmed.
type EscrowNote struct {
	Version   int       `json:"version"` // RecordVersion
	UUID      string    `json:"uuid"`    // names the file
	Time      time.Time `json:"time"`    // UTC; the object's name has it
	Bucket    string    `json:"bucket"`
	Object    string    `json:"object"` // its name in the bucket
	Mode      string    `json:"mode"`
	KeyARN    string    `json:"key_arn"`            // that encrypts the object
	Digest    string    `json:"digest"`             // SHA-256 of what is in the object, but for the time
	SeqID     uint64    `json:"seq_id"`             // of the header
	Confirmed time.Time `json:"confirmed,omitzero"` // UTC; zero: not yet
}

func (n *EscrowNote) validate() error {
	switch sum, err := hex.DecodeString(n.Digest); {
	case n.Version != RecordVersion:
		return versionError(n.Version, n)
	case !isUUID(n.UUID):
		return fmt.Errorf("uuid %q is not a UUID", n.UUID)
	case n.Bucket == "" || n.Object == "" || n.Mode == "" || n.KeyARN == "":
		return errors.New("bucket, object, mode or key_arn is empty")
	case err != nil || len(sum) != sha256.Size:
		return errors.New("digest is not a SHA-256")
	}
	if !n.Confirmed.IsZero() {
		if err := checkTime("confirmed", n.Confirmed); err != nil {
			return err
		}
	}
	return checkTime("time", n.Time)
}

// Same reports whether two notes are of the same content in the same place, encrypted the same way.
func (n EscrowNote) Same(other EscrowNote) bool {
	return n.UUID == other.UUID && n.Bucket == other.Bucket && n.Mode == other.Mode && n.KeyARN == other.KeyARN && n.Digest == other.Digest
}

// PutEscrow remembers an escrow, in place of an earlier one.
func (s *Store) PutEscrow(n EscrowNote) error {
	n.Version, n.Time, n.Confirmed = RecordVersion, n.Time.UTC(), n.Confirmed.UTC()
	return s.putNote(s.escrowPath(n.UUID), &n)
}

// Escrow returns what is remembered of the last escrow of a volume: fs.ErrNotExist if there is nothing. A note that cannot be trusted is a
// *RecordError, and no reason not to use the volume.
func (s *Store) Escrow(uuid string) (EscrowNote, error) {
	return loadNote(s, s.escrowPath(uuid), "escrow", uuid, func(n EscrowNote) string { return n.UUID })
}

func (s *Store) escrowPath(uuid string) string {
	return filepath.Join(s.dir, escrowDir, uuid+".json")
}
