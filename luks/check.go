package luks

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What Format writes, and the only thing that is accepted.
const (
	cipher       = "aes-xts-plain64"
	keyBytes     = 64 // AES-256-XTS: two keys of 32 bytes
	stripes      = 4000
	areaBytes    = keyBytes * stripes // of a keyslot's area in use
	digestBytes  = 32                 // sha256
	offsetAlign  = 4096
	maxSaltBytes = 64 // cryptsetup writes 32
	minSaltBytes = 16 // SP 800-132, section 5.1
)

// Caps, so that no header can make a machine spend more than seconds.
const (
	minIterations = 1000 // cryptsetup's floor, and that of SP 800-132
	// Of digests and of slots that are not ours. cryptsetup's default of two seconds per slot stays below on today's machines.
	maxIterations = 1 << 25
	// Of the slots of our tokens and their digest, which are computed at each unlock. Format writes 1000.
	maxOwnIterations = 1_000_000

	// cryptsetup's own limits of argon2, lib/crypto_backend/pbkdf_check.c.
	maxArgonMemory = 4 << 20 // KiB
	maxArgonTime   = 1000
	maxArgonCPUs   = 4
	minArgonMemory = 32 // KiB

	// LUKS2_KEYSLOTS_MAX, LUKS2_TOKENS_MAX, LUKS2_SEGMENT_MAX, LUKS2_DIGEST_MAX of cryptsetup's lib/luks2/luks2.h.
	maxKeyslots = 32
	maxTokens   = 32
	maxSegments = 32
	maxDigests  = 8
	// LUKS2_MAX_KEYSLOTS_SIZE of the same file.
	maxKeyslotsSize = 128 << 20

	// Of a header's JSON, bytes. What Format makes has room for 12 KiB. Of the 4 MiB that LUKS2 allows, decoding could make
	// hundreds of MiB, and take seconds.
	maxText = 64 << 10
	// Of nested JSON, the outermost object being 0: json-c, and so cryptsetup, reads 32 levels (JSON_TOKENER_DEFAULT_DEPTH).
	maxDepth   = 31
	maxReasons = 100 // a header can be wrong in more ways than anybody wants to read
	maxQuoted  = 100 // of a text from the disk in a reason, bytes
	maxReason  = 500 // of a reason, bytes
)

// knownFlags are the persistent flags that luks.go can hand to dm-crypt and that take nothing from the secrecy of the data.
var knownFlags = []string{flagDiscards, flagSameCPU, flagSubmitCPUs, flagNoRead, flagNoWrite}

// slotHashes are the hashes of a slot's pbkdf2 and of its splitter, for which cryptsetup takes the same: sha512 is what
// systemd-cryptenroll asks for, and `cryptsetup luksAddKey --hash`. The token's own slot has to have sha256.
var slotHashes = []string{"sha256", "sha512"}

// Names of persistent flags, from persistent_flags[] in cryptsetup's lib/luks2/luks2_json_metadata.c.
const (
	flagDiscards   = "allow-discards"
	flagSameCPU    = "same-cpu-crypt"
	flagSubmitCPUs = "submit-from-crypt-cpus"
	flagNoRead     = "no-read-workqueue"
	flagNoWrite    = "no-write-workqueue"
)

const reasonNoToken = "there is no luks-kms-agent token"

// The JSON of LUKS2, section 3 of the specification. 64-bit numbers are strings there. Fields that only reencryption, integrity
// and authenticated encryption use are kept raw: to be there is enough to be refused.
type (
	metadata struct {
		Keyslots map[string]jsonKeyslot     `json:"keyslots"`
		Tokens   map[string]json.RawMessage `json:"tokens"`
		Segments map[string]jsonSegment     `json:"segments"`
		Digests  map[string]jsonDigest      `json:"digests"`
		Config   jsonConfig                 `json:"config"`
	}
	jsonKeyslot struct {
		Type     string   `json:"type"`
		KeySize  int64    `json:"key_size"`
		Priority *int64   `json:"priority,omitempty"`
		AF       jsonAF   `json:"af"`
		Area     jsonArea `json:"area"`
		KDF      jsonKDF  `json:"kdf"`
	}
	jsonAF struct {
		Type    string `json:"type"`
		Stripes int64  `json:"stripes"`
		Hash    string `json:"hash"`
	}
	jsonArea struct {
		Type       string `json:"type"`
		Offset     string `json:"offset"`
		Size       string `json:"size"`
		Encryption string `json:"encryption"`
		KeySize    int64  `json:"key_size"`
	}
	jsonKDF struct {
		Type       string `json:"type"`
		Salt       string `json:"salt"`
		Hash       string `json:"hash,omitempty"`
		Iterations int64  `json:"iterations,omitempty"`
		Time       int64  `json:"time,omitempty"`
		Memory     int64  `json:"memory,omitempty"`
		CPUs       int64  `json:"cpus,omitempty"`
	}
	// The order of fields is that of the MAC's document.
	jsonSegment struct {
		Encryption string          `json:"encryption"`
		Flags      json.RawMessage `json:"flags,omitempty"`
		Integrity  json.RawMessage `json:"integrity,omitempty"`
		IVTweak    string          `json:"iv_tweak"`
		Offset     string          `json:"offset"`
		SectorSize int64           `json:"sector_size"`
		Size       string          `json:"size"`
		Type       string          `json:"type"`
	}
	// The order of fields is that of the MAC's document.
	jsonDigest struct {
		Digest     string   `json:"digest"`
		Hash       string   `json:"hash"`
		Iterations int64    `json:"iterations"`
		Keyslots   []string `json:"keyslots,omitempty"`
		Salt       string   `json:"salt"`
		Segments   []string `json:"segments"`
		Type       string   `json:"type"`
	}
	jsonConfig struct {
		JSONSize     string   `json:"json_size"`
		KeyslotsSize string   `json:"keyslots_size"`
		Flags        []string `json:"flags,omitempty"`
		Requirements *struct {
			Mandatory []string `json:"mandatory"`
		} `json:"requirements,omitempty"`
	}
)

// checked is what the strict check accepted, in the form that unsealing and the MAC need. Nothing in it is raw.
type checked struct {
	uuid       string
	flags      []string
	segment    jsonSegment
	offset     int64 // of the data, bytes
	length     int64 // of the data, bytes
	digestID   string
	digest     jsonDigest // of segment 0
	token      *Token
	slot       jsonKeyslot // of the token; zero without one
	areaOffset int64       // of that slot
	copySize   int64       // of one header copy, bytes
	end        int64       // of the room for key slots, bytes
	recovery   []place     // of the recovery tokens that have no problem
	tokenIDs   []string    // of all tokens
}

// A place is a keyslot that may be opened: it is one of those that Format or we would write.
type place struct {
	id         int
	slot       jsonKeyslot
	areaOffset int64
	mac        []byte // of the token that names it
}

// own is the place of the slot that our token names.
func (c *checked) own() place { return place{c.token.Keyslot, c.slot, c.areaOffset, c.token.MAC} }

// A span is a part of the device, bytes.
type span struct {
	name       string
	start, end int64
}

// judgement collects what one header is refused for.
type judgement struct {
	header  *Header
	meta    metadata
	reasons []string

	digestID   string // of the digest of segment 0, "" if there is not exactly one
	spans      map[string]span
	offset     int64
	length     int64
	deviceSize int64
	slotsStart int64
	slotsEnd   int64
}

// refuse adds a reason. What it quotes comes from the disk: it is cut, and a terminal or a log sees nothing but text.
func (j *judgement) refuse(format string, args ...any) {
	if len(j.reasons) >= maxReasons {
		return
	}
	for i, a := range args {
		if s, ok := a.(string); ok {
			args[i] = cut(s, maxQuoted)
		}
	}
	j.reasons = append(j.reasons, printable([]byte(cut(fmt.Sprintf(format, args...), maxReason))))
}

func cut(s string, n int) string {
	if len(s) > n {
		return s[:n] + "…"
	}
	return s
}

// judge is the strict check of one valid copy. It returns the header's facts, always; what was checked, only where nothing was
// refused; and the reasons.
func judge(c *headerCopy, deviceSize int64) (*Header, *checked, []string) {
	j := &judgement{
		header:     &Header{Version: 2, SeqID: c.seqID, Label: printable(c.label), Subsystem: printable(c.subsystem)},
		deviceSize: deviceSize,
		spans:      map[string]span{},
	}
	if j.header.Label != string(c.label) || j.header.Subsystem != string(c.subsystem) {
		j.refuse("the label or the subsystem is not printable text")
	}
	if canonicalUUID(string(c.uuid)) {
		j.header.UUID = string(c.uuid)
	} else {
		j.refuse("the UUID %q is not a UUID in lower case", printable(c.uuid))
	}
	if c.malformed != "" {
		j.refuse("%s", c.malformed)
		return j.header, nil, j.reasons
	}
	if len(c.json) > maxText {
		j.refuse("the JSON has %d bytes, more than %d", len(c.json), maxText)
		return j.header, nil, j.reasons
	}
	if err := wellFormed(c.json); err != nil {
		j.refuse("the JSON is not acceptable: %v", err)
	}
	if err := decodeStrict(c.json, &j.meta); err != nil {
		j.refuse("the JSON does not have the shape of LUKS2: %v", err)
	}

	j.config(c)
	j.segments()
	j.digests()
	j.keyslots()
	j.tokens()
	if len(j.reasons) > 0 {
		return j.header, nil, j.reasons
	}

	ck := &checked{
		uuid:     j.header.UUID,
		flags:    j.meta.Config.Flags,
		segment:  j.meta.Segments["0"],
		offset:   j.offset,
		length:   j.length,
		digestID: j.digestID,
		digest:   j.meta.Digests[j.digestID],
		token:    j.header.Token,
		copySize: c.size,
		end:      j.slotsEnd,
		tokenIDs: ordered(j.meta.Tokens),
	}
	if ck.token != nil {
		id := strconv.Itoa(ck.token.Keyslot)
		ck.slot = j.meta.Keyslots[id]
		ck.areaOffset = j.spans[id].start
	}
	for _, r := range j.header.Recovery {
		if id := strconv.Itoa(r.Keyslot); r.Problem == "" {
			ck.recovery = append(ck.recovery, place{r.Keyslot, j.meta.Keyslots[id], j.spans[id].start, r.MAC})
		}
	}
	return j.header, ck, nil
}

func (j *judgement) config(c *headerCopy) {
	g := j.meta.Config
	if n, ok := number(g.JSONSize); !ok || n != c.size-binarySize {
		j.refuse("config: json_size %q does not match the header", g.JSONSize)
	}
	size, ok := number(g.KeyslotsSize)
	if !ok || size%offsetAlign != 0 || size > maxKeyslotsSize {
		j.refuse("config: keyslots_size %q is out of bounds", g.KeyslotsSize)
		size = 0
	}
	j.slotsStart, j.slotsEnd = 2*c.size, 2*c.size+size
	for _, f := range g.Flags {
		if !slices.Contains(knownFlags, f) {
			j.refuse("config: unknown flag %q", f)
		}
	}
	if g.Requirements != nil && len(g.Requirements.Mandatory) > 0 {
		j.refuse("config: mandatory requirements %q", g.Requirements.Mandatory)
	}
}

func (j *judgement) segments() {
	j.ids("segment", slices.Collect(maps.Keys(j.meta.Segments)), maxSegments)
	s, ok := j.meta.Segments["0"]
	if len(j.meta.Segments) != 1 || !ok {
		j.refuse("there has to be exactly one segment, \"0\" (found %d)", len(j.meta.Segments))
	}
	if !ok {
		return
	}
	j.header.Cipher = printable([]byte(s.Encryption))
	j.header.SectorSize = int(s.SectorSize)
	if s.Type != "crypt" {
		j.refuse("segment 0: type %q", s.Type)
	}
	if s.Encryption != cipher {
		j.refuse("segment 0: cipher %q", s.Encryption)
	}
	if s.IVTweak != "0" {
		j.refuse("segment 0: iv_tweak %q", s.IVTweak)
	}
	if s.Integrity != nil {
		j.refuse("segment 0: integrity")
	}
	if s.Flags != nil {
		j.refuse("segment 0: flags")
	}
	sector := s.SectorSize
	if sector != 512 && sector != 4096 {
		j.refuse("segment 0: sector size %d", sector)
		sector = 512
	}
	offset, ok := number(s.Offset)
	j.header.Offset = offset
	switch {
	case !ok || offset%offsetAlign != 0:
		j.refuse("segment 0: offset %q is not a multiple of %d", s.Offset, offsetAlign)
		return
	case offset < j.slotsEnd:
		j.refuse("segment 0: offset %d lies inside the header and keyslots area, which ends at %d", offset, j.slotsEnd)
		return
	case offset >= j.deviceSize:
		j.refuse("segment 0: offset %d is not on the device of %d bytes", offset, j.deviceSize)
		return
	}
	length := j.deviceSize - offset
	if s.Size != "dynamic" {
		n, ok := number(s.Size)
		if !ok || n == 0 || n > length {
			j.refuse("segment 0: size %q does not fit on the device of %d bytes", s.Size, j.deviceSize)
			return
		}
		length = n
	}
	if length%sector != 0 {
		j.refuse("segment 0: %d bytes are not a multiple of the sector size %d", length, sector)
	}
	j.offset, j.length = offset, length
}

func (j *judgement) digests() {
	j.ids("digest", slices.Collect(maps.Keys(j.meta.Digests)), maxDigests)
	bound := map[string]string{} // keyslot → digest
	var ofSegment []string
	for _, id := range ordered(j.meta.Digests) {
		d := j.meta.Digests[id]
		if d.Type != "pbkdf2" || d.Hash != "sha256" {
			j.refuse("digest %s: type %q with hash %q", id, d.Type, d.Hash)
		}
		if d.Iterations < minIterations || d.Iterations > maxIterations {
			j.refuse("digest %s: %d iterations", id, d.Iterations)
		}
		if b, ok := base64Bytes(d.Digest); !ok || len(b) != digestBytes {
			j.refuse("digest %s: it is not %d bytes long", id, digestBytes)
		}
		j.salt("digest "+id, d.Salt)
		for _, k := range d.Keyslots {
			if _, ok := j.meta.Keyslots[k]; !ok {
				j.refuse("digest %s: keyslot %q does not exist", id, k)
			}
			if other, ok := bound[k]; ok {
				j.refuse("digest %s: keyslot %q also is in digest %s", id, k, other)
			}
			bound[k] = id
		}
		for _, s := range d.Segments {
			if s != "0" {
				j.refuse("digest %s: segment %q does not exist", id, s)
			}
		}
		switch {
		case len(d.Segments) > 1:
			j.refuse("digest %s: it lists %d segments", id, len(d.Segments))
		case len(d.Segments) == 1:
			ofSegment = append(ofSegment, id)
		}
	}
	if len(ofSegment) != 1 {
		j.refuse("segment 0 has %d digests instead of one", len(ofSegment))
		return
	}
	j.digestID = ofSegment[0]
}

func (j *judgement) keyslots() {
	slots := j.meta.Keyslots
	j.ids("keyslot", slices.Collect(maps.Keys(slots)), maxKeyslots)
	if len(slots) == 0 {
		j.refuse("there are no keyslots")
	}
	var spans []span
	for _, id := range ordered(slots) {
		k := slots[id]
		n, _ := strconv.Atoi(id)
		fact := Keyslot{ID: n, KeySize: bits(k.KeySize), Cipher: printable([]byte(k.Area.Encryption)),
			KDF: printable([]byte(k.KDF.Type)), Hash: printable([]byte(k.KDF.Hash)), Iterations: int(k.KDF.Iterations)}
		if k.KDF.Type != "pbkdf2" {
			fact.Iterations = int(k.KDF.Time)
		}
		j.header.Keyslots = append(j.header.Keyslots, fact)
		if j.digestID != "" && slices.Contains(j.meta.Digests[j.digestID].Keyslots, id) && j.header.KeySize == 0 {
			j.header.KeySize = fact.KeySize
		}

		if k.Type != "luks2" {
			j.refuse("keyslot %s: type %q", id, k.Type)
		}
		if k.KeySize != keyBytes {
			j.refuse("keyslot %s: key size %d", id, k.KeySize)
		}
		if k.Priority != nil && (*k.Priority < 0 || *k.Priority > 2) {
			j.refuse("keyslot %s: priority %d", id, *k.Priority)
		}
		if k.AF.Type != "luks1" || k.AF.Stripes != stripes || !slices.Contains(slotHashes, k.AF.Hash) {
			j.refuse("keyslot %s: anti-forensic splitter %q with %d stripes and hash %q", id, k.AF.Type, k.AF.Stripes, k.AF.Hash)
		}
		j.kdf(id, k.KDF)
		if a, ok := j.area(id, k.Area); ok {
			spans = append(spans, a)
			j.spans[id] = a
		}
	}
	slices.SortFunc(spans, func(a, b span) int { return int((a.start - b.start) / offsetAlign) })
	for i := 1; i < len(spans); i++ {
		if spans[i].start < spans[i-1].end {
			j.refuse("keyslots %s and %s: their areas overlap", spans[i-1].name, spans[i].name)
		}
	}
}

func (j *judgement) area(id string, a jsonArea) (span, bool) {
	if a.Type != "raw" || a.Encryption != cipher || a.KeySize != keyBytes {
		j.refuse("keyslot %s: area of type %q, cipher %q, key size %d", id, a.Type, a.Encryption, a.KeySize)
	}
	offset, okOffset := number(a.Offset)
	size, okSize := number(a.Size)
	switch {
	case !okOffset || !okSize || offset%offsetAlign != 0 || size%offsetAlign != 0:
		j.refuse("keyslot %s: area at %q of %q bytes is not aligned to %d", id, a.Offset, a.Size, offsetAlign)
		return span{}, false
	case size < areaBytes:
		j.refuse("keyslot %s: area of %d bytes is too small", id, size)
		return span{}, false
	case offset < j.slotsStart || offset > j.slotsEnd || size > j.slotsEnd-offset:
		j.refuse("keyslot %s: area at %d of %d bytes is not in the keyslots area", id, offset, size)
		return span{}, false
	}
	return span{id, offset, offset + size}, true
}

func (j *judgement) kdf(id string, k jsonKDF) {
	j.salt("keyslot "+id, k.Salt)
	switch k.Type {
	case "pbkdf2":
		if !slices.Contains(slotHashes, k.Hash) {
			j.refuse("keyslot %s: pbkdf2 with hash %q", id, k.Hash)
		}
		if k.Iterations < minIterations || k.Iterations > maxIterations {
			j.refuse("keyslot %s: %d iterations", id, k.Iterations)
		}
	case "argon2i", "argon2id":
		if k.Time < 1 || k.Time > maxArgonTime || k.Memory < minArgonMemory || k.Memory > maxArgonMemory || k.CPUs < 1 || k.CPUs > maxArgonCPUs {
			j.refuse("keyslot %s: %s with time %d, memory %d KiB, cpus %d", id, k.Type, k.Time, k.Memory, k.CPUs)
		}
	default:
		j.refuse("keyslot %s: kdf %q", id, k.Type)
	}
}

func (j *judgement) salt(what, text string) {
	if b, ok := base64Bytes(text); !ok || len(b) < minSaltBytes || len(b) > maxSaltBytes {
		j.refuse("%s: the salt is not %d to %d bytes long", what, minSaltBytes, maxSaltBytes)
	}
}

// tokens notes the type of each token and parses only ours: what else is in the others is between their owner and cryptsetup.
func (j *judgement) tokens() {
	j.ids("token", slices.Collect(maps.Keys(j.meta.Tokens)), maxTokens)
	ours := 0
	named := map[string]int{} // by how many tokens, keyslot by keyslot
	for _, id := range ordered(j.meta.Tokens) {
		raw := j.meta.Tokens[id]
		// Not a struct: encoding/json would take "Type" for "type", and json-c does not.
		var fields map[string]json.RawMessage
		var kind string
		if json.Unmarshal(raw, &fields) != nil || json.Unmarshal(fields["type"], &kind) != nil || kind == "" {
			j.refuse("token %s: it has no type", id)
			continue
		}
		j.header.Tokens = append(j.header.Tokens, printable([]byte(kind)))
		// cryptsetup refuses the whole header over this.
		var bound []string
		if json.Unmarshal(fields["keyslots"], &bound) != nil || bound == nil {
			j.refuse("token %s: it has no list of keyslots", id)
		}
		for _, k := range bound {
			if _, ok := j.meta.Keyslots[k]; !ok {
				j.refuse("token %s: keyslot %q does not exist", id, k)
			}
			named[k]++
		}
		n, _ := strconv.Atoi(id)
		if kind == RecoveryTokenType {
			j.header.Recovery = append(j.header.Recovery, parseRecoveryToken(n, raw))
		}
		for i := range j.header.Keyslots {
			if slot := &j.header.Keyslots[i]; slices.Contains(bound, strconv.Itoa(slot.ID)) {
				slot.Tokens = append(slot.Tokens, printable([]byte(kind)))
			}
		}
		if kind != tokenType {
			continue
		}
		ours++
		token, err := parseToken(n, raw)
		if err != nil {
			j.refuse("token %s: %v", id, err)
			continue
		}
		j.header.Token = token
		j.ownSlot(id, strconv.Itoa(token.Keyslot))
	}
	if ours > 1 {
		j.header.Token = nil
		j.refuse("there are %d luks-kms-agent tokens", ours)
	}
	for _, id := range ordered(j.meta.Keyslots) {
		if n, _ := strconv.Atoi(id); named[id] == 0 {
			j.header.Unnamed = append(j.header.Unnamed, n)
		}
	}
	for i := range j.header.Recovery {
		j.recoverySlot(&j.header.Recovery[i], named)
	}
}

// ownSlot judges the slot that our token names.
func (j *judgement) ownSlot(token, id string) {
	for _, err := range j.computed(id) {
		j.refuse("token %s: %v", token, err)
	}
}

// recoverySlot notes why the slot that a recovery token names cannot be opened, or removed, by us. The header is not refused for it:
// the data key's slot is not less sound, and a token without its slot is what a cut or plain cryptsetup leaves.
func (j *judgement) recoverySlot(r *RecoveryToken, named map[string]int) {
	id := strconv.Itoa(r.Keyslot)
	switch errs := j.computed(id); {
	case r.Problem != "":
	case r.Keyslot < 0:
		r.Problem = "it names no keyslot: a removal was cut, or somebody removed the slot"
	case named[id] > 1:
		r.Problem = fmt.Sprintf("keyslot %s is another token's too", id)
	case len(errs) > 0:
		r.Problem = printable([]byte(cut(errs[0].Error(), maxReason)))
	}
}

// computed judges a slot, and the digest, more strictly than a person's: these two are computed.
func (j *judgement) computed(id string) (wrong []error) {
	k, ok := j.meta.Keyslots[id]
	if !ok {
		return []error{fmt.Errorf("keyslot %s does not exist", id)}
	}
	if k.KDF.Type != "pbkdf2" || k.KDF.Hash != "sha256" || k.AF.Hash != "sha256" || k.KDF.Iterations > maxOwnIterations {
		wrong = append(wrong, fmt.Errorf("keyslot %s has kdf %q with hashes %q and %q and %d iterations", id,
			cut(k.KDF.Type, maxQuoted), cut(k.KDF.Hash, maxQuoted), cut(k.AF.Hash, maxQuoted), k.KDF.Iterations))
	}
	if j.digestID == "" {
		return wrong // already refused
	}
	d := j.meta.Digests[j.digestID]
	if !slices.Contains(d.Keyslots, id) {
		wrong = append(wrong, fmt.Errorf("the digest of segment 0 does not list keyslot %s", id))
	}
	if d.Iterations > maxOwnIterations {
		wrong = append(wrong, fmt.Errorf("the digest of segment 0 has %d iterations", d.Iterations))
	}
	return wrong
}

// ids judges the names of the members of one of the header's maps: canonical numbers below limit.
func (j *judgement) ids(what string, ids []string, limit int64) {
	slices.Sort(ids)
	for _, id := range ids {
		if n, ok := number(id); !ok || n >= limit {
			j.refuse("%s %q: not an id", what, printable([]byte(id)))
		}
	}
}

// ordered returns the keys of m by number.
func ordered[V any](m map[string]V) []string {
	return slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		if len(a) != len(b) {
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
}

// empty reports whether every one of the copies plainly has a JSON object "keyslots" without members. More than two were not left
// by cryptsetup.
func empty(copies []*headerCopy) bool {
	if len(copies) > 2 {
		return false
	}
	for _, c := range copies {
		var m struct {
			Keyslots map[string]json.RawMessage `json:"keyslots"`
		}
		if c.malformed != "" || len(c.json) > maxText || wellFormed(c.json) != nil || json.Unmarshal(c.json, &m) != nil || m.Keyslots == nil || len(m.Keyslots) > 0 {
			return false
		}
	}
	return true
}

// decodeStrict decodes into v and refuses fields that v has not. It fills what it can also where it returns an error.
func decodeStrict(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(v)
}

// wellFormed refuses JSON that two parsers could read in two ways: duplicate keys, keys that differ only in case (encoding/json
// folds case, json-c does not), null, bytes that are not UTF-8, nesting without end, and text after the object.
//
// Tokens of others may have keys of any case and null; only duplicates are refused in them.
func wellFormed(text []byte) error {
	if !utf8.Valid(text) {
		return errors.New("it is not UTF-8")
	}
	if len(text) == 0 || text[0] != '{' {
		return errors.New("it is not an object")
	}
	if !json.Valid(text) {
		return errors.New("it is malformed")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := walk(d, 0, false); err != nil {
		return err
	}
	return nil
}

// walk reads one value from d.
func walk(d *json.Decoder, depth int, token bool) error {
	if depth > maxDepth {
		return errors.New("it is nested too deeply")
	}
	t, err := d.Token()
	if err != nil {
		return err
	}
	switch t := t.(type) {
	case nil:
		if !token {
			return errors.New("it has a null")
		}
	case json.Delim:
		var seen map[string]bool
		if t == '{' {
			seen = map[string]bool{}
		}
		for d.More() {
			inToken := token
			if seen != nil {
				k, err := d.Token()
				if err != nil {
					return err
				}
				key := k.(string) // a JSON that is valid has nothing else here
				if seen[key] {
					return fmt.Errorf("the key %q is there twice", printable([]byte(key)))
				}
				seen[key] = true
				if !token && !plainKey(key) {
					return fmt.Errorf("the key %q is none of LUKS2", printable([]byte(key)))
				}
				inToken = token || depth == 0 && key == "tokens"
			}
			if err := walk(d, depth+1, inToken); err != nil {
				return err
			}
		}
		if _, err := d.Token(); err != nil { // the closing delimiter
			return err
		}
	}
	return nil
}

// plainKey: all keys of LUKS2 are of these characters.
func plainKey(k string) bool {
	for _, c := range []byte(k) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
			return false
		}
	}
	return k != ""
}

// number parses a canonical decimal of at most 63 bits: no sign, no leading zero.
func number(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || strconv.FormatInt(n, 10) != s {
		return 0, false
	}
	return n, true
}

// base64Bytes decodes standard base64 in its one canonical form. (The decoder alone skips line ends.)
func base64Bytes(s string) ([]byte, bool) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || base64.StdEncoding.EncodeToString(b) != s {
		return nil, false
	}
	return b, true
}

func bits(bytes int64) int {
	if bytes < 0 || bytes > 1<<20 {
		return 0
	}
	return int(bytes * 8)
}

// canonicalUUID: file names, mapping names and device-mapper UUIDs are made from it, so nothing else will do.
func canonicalUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		switch i {
		case 8, 13, 18, 23:
			if c != '-' {
				return false
			}
		default:
			if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
				return false
			}
		}
	}
	return true
}

// printable replaces what a terminal or a log could take for more than text.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, string(b))
}
