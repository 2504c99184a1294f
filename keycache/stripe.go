package keycache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const stripeFile = "stripe.json"

// StripeRecord is the intent to make a stripe: stripe.json. It stands from before the first disk is written until the stripe is whole.
// While it does, nothing has been made on the stripe, and only its own disks may be cleared of what a cut left on them.
type StripeRecord struct {
	Version int       `json:"version"` // RecordVersion
	UUID    string    `json:"uuid"`    // of the stripe
	Members []string  `json:"members"` // identities of its disks, in order
	Created time.Time `json:"created"` // UTC
}

func (r *StripeRecord) validate() error {
	switch {
	case r.Version != RecordVersion:
		return versionError(r.Version, r)
	case !isUUID(r.UUID):
		return fmt.Errorf("uuid %q is not a UUID", r.UUID)
	case len(r.Members) < 2 || slices.Contains(r.Members, ""):
		return fmt.Errorf("members %q are not two disks or more", r.Members)
	}
	return checkTime("created", r.Created)
}

// PutStripe stores the intent to make a stripe, and reads it back. One that is there already, readable or not, is a *StoreError with fs.ErrExist.
func (s *Store) PutStripe(r StripeRecord) error {
	path := filepath.Join(s.dir, stripeFile)
	r.Version, r.Created = RecordVersion, r.Created.UTC()
	data, err := fileOf(path, &r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	return s.put(path, data, linkNew)
}

// RemoveStripe takes the intent away: the stripe is whole, or none of its disks shows anything of it. None there is no error.
func (s *Store) RemoveStripe() error {
	path := filepath.Join(s.dir, stripeFile)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.writable(); err != nil {
		return err
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return s.unlink(path)
}

// loadStripe reads the intent, where there is one.
func (s *Store) loadStripe(r *Records) {
	path := filepath.Join(s.dir, stripeFile)
	var stripe StripeRecord
	switch err := s.read(path, &stripe); {
	case err == nil:
		r.Stripe = &stripe
	case !errors.Is(err, fs.ErrNotExist):
		r.Problems = append(r.Problems, RecordError{Path: path, Kind: "stripe", Err: err})
	}
}
