package luks

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
)

const (
	tokenType    = "luks-kms-agent"
	tokenVersion = 1
	macInfo      = "luks-kms-agent token mac v1"
	macBytes     = sha256.Size

	maxARN        = 2048 // KMS: KeyId is at most 2048 characters
	maxWrappedKey = 6144 // KMS: CiphertextBlob is at most 6144 bytes
)

// jsonToken is our token as it stands in the header. The package comment specifies it.
type jsonToken struct {
	Type       string   `json:"type"`
	Keyslots   []string `json:"keyslots"`
	Version    int      `json:"version"`
	KeyARN     string   `json:"key_arn"`
	WrappedKey string   `json:"wrapped_key"`
	MAC        string   `json:"mac"`
}

// parseToken parses and judges our token.
func parseToken(id int, raw json.RawMessage) (*Token, error) {
	var t jsonToken
	// Keys again, because tokens are spared that check: encoding/json folds case.
	if err := walkOwn(raw); err != nil {
		return nil, err
	}
	if err := decodeStrict(raw, &t); err != nil {
		return nil, fmt.Errorf("it does not have the shape of a luks-kms-agent token: %w", err)
	}
	if t.Version != tokenVersion {
		return nil, fmt.Errorf("its version is %d, known is %d", t.Version, tokenVersion)
	}
	if len(t.Keyslots) != 1 {
		return nil, fmt.Errorf("it lists %d keyslots instead of one", len(t.Keyslots))
	}
	slot, ok := number(t.Keyslots[0])
	if !ok || slot >= maxKeyslots {
		return nil, fmt.Errorf("its keyslot %q is not an id", t.Keyslots[0])
	}
	if err := checkARN(t.KeyARN); err != nil {
		return nil, err
	}
	wrapped, ok := base64Bytes(t.WrappedKey)
	if !ok {
		return nil, errors.New("its wrapped key is not base64")
	}
	if err := checkWrapped(wrapped); err != nil {
		return nil, err
	}
	mac, ok := base64Bytes(t.MAC)
	if !ok || len(mac) != macBytes {
		return nil, fmt.Errorf("its MAC is not %d bytes long", macBytes)
	}
	return &Token{ID: id, KeyARN: t.KeyARN, WrappedKey: wrapped, Keyslot: int(slot), MAC: mac, Version: t.Version}, nil
}

// walkOwn refuses null and keys that only differ in case from ours.
func walkOwn(raw json.RawMessage) error {
	if err := wellFormed(raw); err != nil {
		return fmt.Errorf("its JSON is not acceptable: %w", err)
	}
	return nil
}

// encode makes the JSON that parseToken reads.
func (t *Token) encode() ([]byte, error) {
	return json.Marshal(jsonToken{
		Type:       tokenType,
		Keyslots:   []string{fmt.Sprint(t.Keyslot)},
		Version:    t.Version,
		KeyARN:     t.KeyARN,
		WrappedKey: base64.StdEncoding.EncodeToString(t.WrappedKey),
		MAC:        base64.StdEncoding.EncodeToString(t.MAC),
	})
}

// checkARN bounds the text only. Which ARNs may be used is the caller's question.
func checkARN(arn string) error {
	if len(arn) == 0 || len(arn) > maxARN {
		return fmt.Errorf("its key ARN is not 1 to %d bytes long", maxARN)
	}
	for _, c := range []byte(arn) {
		if c <= ' ' || c > '~' {
			return errors.New("its key ARN is not printable ASCII")
		}
	}
	return nil
}

func checkWrapped(b []byte) error {
	if len(b) == 0 || len(b) > maxWrappedKey {
		return fmt.Errorf("its wrapped key is not 1 to %d bytes long", maxWrappedKey)
	}
	return nil
}

// macDocument is the canonical JSON under the MAC. The order of fields here and in the types of check.go makes the keys of
// every object ascend; encoding/json sorts the keys of maps.
type macDocument struct {
	Digests  map[string]jsonDigest  `json:"digests"`
	Segments map[string]jsonSegment `json:"segments"`
	UUID     string                 `json:"uuid"`
	Version  int                    `json:"version"`
}

// document returns the bytes that the MAC covers.
func (c *checked) document(version int) ([]byte, error) {
	d := c.digest
	d.Keyslots = nil // see the package comment: operators may add slots
	return json.Marshal(macDocument{
		Digests:  map[string]jsonDigest{c.digestID: d},
		Segments: map[string]jsonSegment{"0": c.segment},
		UUID:     c.uuid,
		Version:  version,
	})
}

// mac computes the MAC of what was checked under the data key k.
func (c *checked) mac(k Key, version int) ([]byte, error) { return c.macFor(macInfo, k, version) }

// macFor is mac under a key that is derived for a use of its own.
func (c *checked) macFor(info string, k Key, version int) ([]byte, error) {
	doc, err := c.document(version)
	if err != nil {
		return nil, err
	}
	key, err := hkdf.Key(sha256.New, k.Bytes(), nil, info, macBytes)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	h := hmac.New(sha256.New, key)
	h.Write(doc)
	return h.Sum(nil), nil
}

// checkKey refuses a key that is not what its interface promises, before it could be used in a wrong form.
func checkKey(k Key) error {
	if len(k.Bytes()) != 32 || len(k.Passphrase()) != base64.StdEncoding.EncodedLen(32) {
		return errors.New("the data key is not 32 bytes with a passphrase of 44")
	}
	return nil
}
