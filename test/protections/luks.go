package main

import "slices"

func inLuks() []protection {
	return slices.Concat(inHeaderCopies(), inStrictCheck(), inKeyslotCheck(), inTokenAndMAC(), inOpening(), inHeaderWrites(), inRecovery())
}

// inHeaderCopies: how the two copies of a header are read, and what is made of what is there.
func inHeaderCopies() []protection {
	const (
		header  = "luks/header.go"
		inspect = "luks/inspect.go"
		check   = "luks/check.go"
		kinds   = "./luks TestKinds/"
		copies  = "./luks TestTwoCopies/"
		invalid = "./luks TestInvalidCopies/"
	)
	return []protection{
		one("a header that the device is too short for is not parsed",
			header, `if len(head) < binarySize {`, `if false {`, kinds+"the magic alone"),
		one("a header of another version is not read as LUKS2",
			header, `; v != 2 {`, `; v > 1<<15 {`, invalid+"version 3"),
		one("a header has one of the sizes of LUKS2",
			header, "return 0, false\n}\n\nfunc trimNUL", "return int64(n), true\n}\n\nfunc trimNUL", invalid+"size 0"),
		one("a secondary copy stands where its size says",
			header, `case offset != 0 && size != offset:`, `case false:`, copies+"secondary of another size"),
		one("a header copy names its own place",
			header, `case binary.BigEndian.Uint64(head[offOffset:]) != uint64(offset):`, `case false:`, invalid+"another place"),
		one("both header copies fit on the device",
			header, `case deviceSize < 2*size:`, `case false:`, "./luks TestInspectIsBounded"),
		one("a header has the one checksum that cryptsetup writes",
			header, `case string(trimNUL(head[offAlgorithm:offAlgorithm+lenAlgorithm])) != algorithm:`, `case false:`, invalid+"another checksum"),
		one("a header copy whose checksum is wrong is damaged",
			header, `head[offChecksum:offChecksum+len(sum)]) != 1 {`, `head[offChecksum:offChecksum+len(sum)]) > 1 {`, kinds+"both copies flipped"),
		one("the JSON of a header ends in its area",
			header, `c.malformed = "the JSON area has no end"`, `c.json = area`, "./luks TestHostileBinary/JSON without an end"),
		one("nothing stands behind the JSON of a header",
			header, `case len(bytes.Trim(area[end:], "\x00")) != 0:`, `case false:`, "./luks TestHostileBinary/bytes after the end"),

		one("header copies that differ are refused",
			inspect, `case !primary.same(secondary):`, `case false:`, copies+"UUIDs differ"),
		one("header copies that differ in their JSON are refused",
			header, `&& bytes.Equal(c.json, o.json)`, ``, copies+"JSONs differ"),
		{"a secondary header copy that is newer is refused (it also differs from the primary)", []edit{
			{inspect, `case secondary.seqID > primary.seqID:`, `case false:`},
			{header, `c.seqID == o.seqID && `, ``},
		}, copies + "secondary newer"},
		one("several secondary header copies are refused",
			inspect, `if len(copies) > 1 {`, `if false {`, copies+"primary flipped, several secondaries"),
		one("a primary header copy that something else was written over is refused",
			inspect, `if overwritten {`, `if false && overwritten {`, copies+"primary swapped to"),
		one("a primary header copy is only called damaged, and so mended, if the secondary passes",
			inspect, `if len(reasons) == 0 && i.Kind == KindLUKS2 {`, `if true {`, copies+"primary flipped, secondary refused"),
		one("a header with a reason against it does not pass",
			inspect, `len(i.Reasons) == 0 && i.checked != nil`, `i.checked != nil`, copies+"labels differ"),

		one("a damaged header is not nothing, whose place could be formatted",
			inspect, `if magic || text {`, `if text {`, kinds+"both copies flipped"),
		one("what is left of a secondary header copy is not nothing",
			inspect, `magic = magic || found`, `_ = found`, kinds+"primary wiped, secondary flipped"),
		one("a LUKS1 header is not a torn one of ours",
			inspect, `} else if h != nil {`, `} else if false && h != nil {`, kinds+"LUKS1"),
		one("text is only taken for that of our header where that stands",
			inspect, `if within < binarySize || within`, `if within`, kinds+"the text in the second header"),
		one("text is only taken for that of our header if it begins like it",
			inspect, ` || within == binarySize && head[at] != 0 && !bytes.HasPrefix([]byte(textStart), b[:min(len(b), len(textStart))])`, ``, kinds+"another text"),
		one("text is only taken for that of our header if cryptsetup would write it",
			inspect, `if c <= ' ' || c > '~' {`, `if c == 0 {`, kinds+"a text with spaces"),
		one("a header is only empty if both copies are",
			inspect, `if empty(copies) {`, `if empty(copies[:1]) {`, kinds+"no keyslots in the newer copy only"),
		one("a header of more copies than cryptsetup leaves is not empty",
			check, `if len(copies) > 2 {`, `if false {`, kinds+"no keyslots, primary damaged, three secondaries"),
		one("a header is only empty if it says so",
			check, `m.Keyslots == nil || `, ``, kinds+"keyslots missing"),
		one("a header that cannot be understood is not empty",
			check, `wellFormed(c.json) != nil || `, ``, kinds+"no keyslots, and a null"),
		one("a header of our subsystem without our token is refused",
			inspect, `if i.Ours && !hasType(header.Tokens, tokenType) {`, `if false {`, "./luks TestStrangersHeaders"),

		one("a header that cannot be read is an error, not damage",
			header, `return nil, false, "", err`, `return nil, false, "", nil`, "./luks TestReadErrors"),
		one("the JSON of a header that cannot be read is an error, not damage",
			header, `return nil, true, "", err`, `return nil, true, "", nil`, "./luks TestReadErrors"),
		one("a keyslot that cannot be read is an error",
			inspect, `err := readFull(disk, piece, at)`, "var err error\n\t\t_ = readFull(disk, piece, at)", "./luks TestReadErrors"),
		one("a place of header text that cannot be read is an error, not nothing",
			inspect, "head := make([]byte, KeyslotsOffset)\n\tif err := readFull(r, head, 0); err != nil {", "head := make([]byte, KeyslotsOffset)\n\tif err := readFull(r, head, 0); false {", "./luks TestReadErrors"),
		one("a device that ends early is an error",
			header, `if n == len(b) {`, `if n == len(b) || errors.Is(err, io.EOF) {`, "./luks TestReadErrors"),
		one("what is neither a block device nor a file is not inspected",
			inspect, `return nil, "", 0, errors.New("it is neither a block device nor a regular file")`, ``, "./luks TestInspectRefusesOtherThings"),
		{"JSON of a header that costs too much is not decoded", []edit{
			{check, `if len(c.json) > maxText {`, `if false {`},
			{check, `len(c.json) > maxText || `, ``},
		}, "./luks TestInspectIsBounded"},
	}
}

// inStrictCheck: what a header may say, but for keyslots and tokens.
func inStrictCheck() []protection {
	const (
		check = "luks/check.go"
		bad   = "./luks TestHostileHeaders/"
		text  = "./luks TestHostileText/"
		raw   = "./luks TestHostileBinary/"
	)
	return []protection{
		one("a label is printable text",
			check, `j.header.Label != string(c.label) || `, ``, raw+"label with escapes"),
		one("a subsystem is printable text",
			check, ` || j.header.Subsystem != string(c.subsystem)`, ``, raw+"subsystem with escapes"),
		one("a UUID is a UUID in its canonical form",
			check, `if canonicalUUID(string(c.uuid)) {`, `if true {`, raw+"UUID as path"),
		one("what a reason quotes from the disk is cut",
			check, `args[i] = cut(s, maxQuoted)`, `args[i] = s`, bad+"area with a long cipher"),
		one("what a reason quotes from the disk is printable",
			check, `printable([]byte(cut(fmt.Sprintf(format, args...), maxReason)))`, `cut(fmt.Sprintf(format, args...), maxReason)`, bad+"digest whose id has escapes"),
		one("the number of reasons is bounded",
			check, `if len(j.reasons) >= maxReasons {`, `if false {`, "./luks TestManyReasonsAreCut"),

		one("JSON that two parsers could read in two ways is refused",
			check, `if err := wellFormed(c.json); err != nil {`, `if err := wellFormed(c.json); false {`, text+"duplicate field"),
		one("JSON is UTF-8",
			check, `if !utf8.Valid(text) {`, `if false {`, text+"not UTF-8"),
		one("JSON begins with its object",
			check, `if len(text) == 0 || text[0] != '{' {`, `if len(text) == 0 {`, text+"leading space"),
		one("JSON is one object and nothing behind it",
			check, `if !json.Valid(text) {`, `if false {`, text+"two objects"),
		one("JSON is not nested deeper than cryptsetup reads",
			check, `maxDepth   = 31`, `maxDepth   = 32`, "./luks TestWhatPassesCryptsetupAccepts"),
		one("JSON has no null",
			check, `return errors.New("it has a null")`, `return nil`, bad+"null"),
		one("JSON has no key twice",
			check, `if seen[key] {`, `if false {`, text+"duplicate by escape"),
		one("JSON has no keys that only differ in case",
			check, `if !token && !plainKey(key) {`, `if false {`, text+"kelvin sign"),
		one("a header has no field that is not known",
			check, `d.DisallowUnknownFields()`, ``, bad+"unknown field"),
		one("a field of a header has its type",
			check, `if err := decodeStrict(c.json, &j.meta); err != nil {`, `if err := decodeStrict(c.json, &j.meta); false {`, bad+"number as a power"),
		one("a number has its one canonical form",
			check, `strconv.FormatInt(n, 10) != s {`, `false {`, bad+"data with a leading zero"),
		one("base64 has its one canonical form",
			check, `base64.StdEncoding.EncodeToString(b) != s {`, `false {`, bad+"digest with a line end"),
		one("ids are canonical numbers below LUKS2's limits",
			check, `!ok || n >= limit {`, `!ok || n < 0 {`, bad+"slot 32"),

		one("json_size is that of the header",
			check, `n != c.size-binarySize {`, `n < 0 {`, bad+"json_size"),
		one("keyslots_size is aligned",
			check, `size%offsetAlign != 0 || size > maxKeyslotsSize`, `size > maxKeyslotsSize`, bad+"keyslots_size odd"),
		one("keyslots_size is bounded",
			check, `size%offsetAlign != 0 || size > maxKeyslotsSize`, `size%offsetAlign != 0`, bad+"keyslots_size huge"),
		one("a header has no flag that is not known",
			check, `if !slices.Contains(knownFlags, f) {`, `if false {`, bad+"unknown flag"),
		one("a header with requirements, as of a reencryption, is refused",
			check, `if g.Requirements != nil && len(g.Requirements.Mandatory) > 0 {`, `if false {`, bad+"requirements"),

		one("there is exactly one segment",
			check, `if len(j.meta.Segments) != 1 || !ok {`, `if !ok {`, bad+"two segments"),
		one("the segment is encrypted",
			check, `if s.Type != "crypt" {`, `if false {`, bad+"linear segment"),
		one("the cipher of the data is AES-XTS",
			check, `if s.Encryption != cipher {`, `if false {`, bad+"null cipher"),
		one("iv_tweak is 0",
			check, `if s.IVTweak != "0" {`, `if false {`, bad+"iv_tweak"),
		one("a segment with integrity is refused",
			check, `if s.Integrity != nil {`, `if false {`, bad+"integrity"),
		one("a segment with flags, as of a reencryption, is refused",
			check, `if s.Flags != nil {`, `if false {`, bad+"segment of a reencryption"),
		one("the sector size is 512 or 4096",
			check, `if sector != 512 && sector != 4096 {`, `if sector < 0 {`, bad+"sector size 1024"),
		one("the data is aligned",
			check, `case !ok || offset%offsetAlign != 0:`, `case !ok:`, bad+"data not aligned"),
		one("the data lies behind header and keyslots",
			check, `case offset < j.slotsEnd:`, `case false:`, bad+"data inside the keyslots"),
		one("the data lies on the device",
			check, `case offset >= j.deviceSize:`, `case false:`, bad+"data behind the device"),
		one("the data is not empty",
			check, `!ok || n == 0 || n > length {`, `!ok || n > length {`, bad+"fixed size 0"),
		one("the data ends on the device",
			check, `!ok || n == 0 || n > length {`, `!ok || n == 0 {`, bad+"fixed size too large"),
		one("the data is whole sectors",
			check, `if length%sector != 0 {`, `if false {`, bad+"fixed size not of sectors"),

		one("a digest is of pbkdf2",
			check, `d.Type != "pbkdf2" || `, ``, bad+"digest of another type"),
		one("a digest is of sha256",
			check, `if d.Type != "pbkdf2" || d.Hash != "sha256" {`, `if d.Type != "pbkdf2" {`, bad+"digest of sha1"),
		one("a digest has no fewer iterations than cryptsetup makes",
			check, `d.Iterations < minIterations || `, ``, bad+"few iterations of the digest"),
		one("the iterations of a digest are bounded",
			check, ` || d.Iterations > maxIterations`, ``, bad+"iterations of the digest 2^32-1"),
		one("a digest must be 32 bytes long, for an empty one opens with any passphrase",
			check, `!ok || len(b) != digestBytes {`, `!ok || len(b) > digestBytes {`, bad+"empty digest"),
		one("the salt of a digest is long enough, and bounded",
			check, `j.salt("digest "+id, d.Salt)`, ``, bad+"salt of the digest empty"),
		one("a digest lists no keyslot that does not exist",
			check, "if _, ok := j.meta.Keyslots[k]; !ok {\n\t\t\t\tj.refuse(\"digest", "if false {\n\t\t\t\tj.refuse(\"digest", bad+"digest of a missing keyslot"),
		one("a keyslot has one digest",
			check, `if other, ok := bound[k]; ok {`, `if other, ok := bound[k]; ok && false {`, bad+"two digests of the keyslot"),
		one("a digest is of no other segment",
			check, `if s != "0" {`, `if false {`, bad+"digest of another segment"),
		one("a digest lists its segment once",
			check, `case len(d.Segments) > 1:`, `case false:`, bad+"digest of a segment twice"),
		one("the segment has one digest",
			check, `if len(ofSegment) != 1 {`, `if len(ofSegment) == 0 {`, bad+"two digests of the segment"),
	}
}

// inKeyslotCheck: what keyslots may say.
func inKeyslotCheck() []protection {
	const (
		check = "luks/check.go"
		bad   = "./luks TestHostileHeaders/"
	)
	return []protection{
		one("a header without keyslots is refused",
			check, `if len(slots) == 0 {`, `if false {`, "./luks TestNoKeyslotsInTheNewerCopy"),
		one("a keyslot is no leftover of a reencryption",
			check, `if k.Type != "luks2" {`, `if false {`, bad+"slot of a reencryption"),
		one("the key in a keyslot is one of AES-256-XTS",
			check, `if k.KeySize != keyBytes {`, `if false {`, bad+"key size of AES-128"),
		one("a keyslot has a priority that cryptsetup knows",
			check, `if k.Priority != nil && (*k.Priority < 0 || *k.Priority > 2) {`, `if false {`, bad+"priority"),
		one("the splitter of a keyslot is LUKS1's",
			check, `k.AF.Type != "luks1" || `, ``, bad+"splitter of another type"),
		one("the splitter of a keyslot has 4000 stripes",
			check, `k.AF.Stripes != stripes || `, ``, bad+"splitter of one stripe"),
		one("the splitter of a keyslot has a sound hash",
			check, ` || !slices.Contains(slotHashes, k.AF.Hash)`, ``, bad+"splitter of another hash"),
		one("areas of keyslots do not overlap",
			check, `if spans[i].start < spans[i-1].end {`, `if false {`, bad+"areas overlap"),
		one("the area of a keyslot is raw",
			check, `a.Type != "raw" || `, ``, bad+"area of another type"),
		one("the area of a keyslot is encrypted",
			check, `a.Encryption != cipher || `, ``, bad+"null cipher of the area"),
		one("the area of a keyslot is encrypted with a whole key",
			check, ` || a.KeySize != keyBytes`, ``, bad+"key size of the area"),
		one("the area of a keyslot is aligned",
			check, `offset%offsetAlign != 0 || size%offsetAlign != 0:`, `size%offsetAlign != 0:`, bad+"area not aligned"),
		one("the area of a keyslot has a size that is aligned",
			check, `offset%offsetAlign != 0 || size%offsetAlign != 0:`, `offset%offsetAlign != 0:`, bad+"area of an odd size"),
		one("the area of a keyslot has room for the key",
			check, `case size < areaBytes:`, `case false:`, bad+"area too small"),
		one("the area of a keyslot does not lie in the header",
			check, `case offset < j.slotsStart || offset`, `case offset`, bad+"area in the header"),
		one("the area of a keyslot does not reach into the data",
			check, ` || size > j.slotsEnd-offset:`, `:`, bad+"area over the end"),

		one("the salt of a keyslot is long enough, and bounded",
			check, `j.salt("keyslot "+id, k.Salt)`, ``, bad+"salt of the slot short"),
		one("the pbkdf2 of a keyslot has a sound hash",
			check, `if !slices.Contains(slotHashes, k.Hash) {`, `if false {`, bad+"pbkdf2 of sha1"),
		one("a keyslot has no fewer iterations than cryptsetup makes",
			check, `k.Iterations < minIterations || `, ``, bad+"few iterations"),
		one("the iterations of a keyslot are bounded",
			check, ` || k.Iterations > maxIterations`, ``, bad+"iterations 2^32-1"),
		one("argon2 has a time",
			check, `k.Time < 1 || `, ``, bad+"argon2 time 0"),
		one("the time of argon2 is bounded",
			check, `k.Time > maxArgonTime || `, ``, bad+"argon2 time huge"),
		one("argon2 has no less memory than cryptsetup takes",
			check, `k.Memory < minArgonMemory || `, ``, bad+"argon2 memory below cryptsetup's"),
		one("the memory of argon2 is bounded",
			check, `k.Memory > maxArgonMemory || `, ``, bad+"argon2 memory above cryptsetup's"),
		one("argon2 has a CPU",
			check, `k.CPUs < 1 || `, ``, bad+"argon2 cpus 0"),
		one("the CPUs of argon2 are bounded",
			check, ` || k.CPUs > maxArgonCPUs`, ``, bad+"argon2 cpus 256"),
		one("a keyslot has a KDF that is known",
			check, `j.refuse("keyslot %s: kdf %q", id, k.Type)`, ``, bad+"unknown kdf of another slot"),

		one("the KDF of our keyslot is pbkdf2",
			check, `if k.KDF.Type != "pbkdf2" || k.KDF.Hash`, `if k.KDF.Hash`, bad+"our slot with argon2 and a hash"),
		one("our keyslot has sha256",
			check, `k.KDF.Hash != "sha256" || `, ``, bad+"our slot with sha512"),
		one("the splitter of our keyslot has sha256",
			check, `k.AF.Hash != "sha256" || `, ``, bad+"our slot's splitter with sha512"),
		one("the iterations of our keyslot, which each unlock computes, are few",
			check, ` || k.KDF.Iterations > maxOwnIterations`, ``, bad+"iterations of our slot"),
		one("the iterations of our digest, which each unlock computes, are few",
			check, `if d.Iterations > maxOwnIterations {`, `if false {`, bad+"iterations of our digest"),
		one("the digest of the segment is that of our keyslot",
			check, `if !slices.Contains(d.Keyslots, id) {`, `if false {`, bad+"our slot in another digest"),
	}
}

// inTokenAndMAC: what our token may say, and what its MAC binds.
func inTokenAndMAC() []protection {
	const (
		check = "luks/check.go"
		token = "luks/token.go"
		bad   = "./luks TestHostileHeaders/"
		binds = "./luks TestMACBindsTheHeader/"
	)
	return []protection{
		one("a token has a type",
			check, ` || kind == "" {`, ` {`, bad+"token with an empty type"),
		one("a token has a list of keyslots, or cryptsetup refuses the header",
			check, `if json.Unmarshal(fields["keyslots"], &bound) != nil || bound == nil {`, `if json.Unmarshal(fields["keyslots"], &bound) != nil && false {`, "./luks TestWhatPassesCryptsetupAccepts"),
		{"a token lists no keyslot that does not exist (which is judged twice for ours)", []edit{
			{check, "if _, ok := j.meta.Keyslots[k]; !ok {\n\t\t\t\tj.refuse(\"token", "if false {\n\t\t\t\tj.refuse(\"token"},
			{check, "if !ok {\n\t\treturn []error{fmt.Errorf(\"keyslot %s does not exist\", id)}", "if !ok && false {\n\t\treturn []error{fmt.Errorf(\"keyslot %s does not exist\", id)}"},
		}, bad + "token of a missing slot"},
		one("a header has one token of ours",
			check, `if ours > 1 {`, `if false {`, bad+"two tokens of ours"),
		one("our token has no key that only differs in case",
			token, `if err := walkOwn(raw); err != nil {`, `if err := walkOwn(raw); false {`, bad+"token with folded keys"),
		one("our token has a version that is known",
			token, `if t.Version != tokenVersion {`, `if false {`, bad+"token of a future"),
		one("our token is bound to one keyslot",
			token, `if len(t.Keyslots) != 1 {`, `if false {`, bad+"token of two slots"),
		one("our token is bound to a keyslot that can exist",
			token, `if !ok || slot >= maxKeyslots {`, `if false {`, bad+"token of slot -1"),
		one("the key ARN of our token is not empty, and bounded",
			token, `if len(arn) == 0 || len(arn) > maxARN {`, `if false {`, bad+"empty ARN"),
		one("the key ARN of our token is printable",
			token, `if c <= ' ' || c > '~' {`, `if c == 0 {`, bad+"ARN with a line end"),
		one("the wrapped key of our token is not empty",
			token, `if len(b) == 0 || len(b) > maxWrappedKey {`, `if len(b) > maxWrappedKey {`, bad+"empty wrapped key"),
		one("the wrapped key of our token is none that KMS would refuse",
			token, `if len(b) == 0 || len(b) > maxWrappedKey {`, `if len(b) == 0 {`, bad+"huge wrapped key"),
		one("the MAC of our token is whole",
			token, `if !ok || len(mac) != macBytes {`, `if !ok {`, bad+"short MAC"),

		one("the MAC is verified",
			"luks/open.go", `if !macHolds {`, `if false {`, "./luks TestEachCheckAlone"),
		one("the MAC covers the UUID",
			token, `UUID:     c.uuid,`, ``, binds+"UUID"),
		one("the MAC covers the segment",
			token, `Segments: map[string]jsonSegment{"0": c.segment},`, ``, binds+"offset"),
		one("the MAC covers the digest, and so the volume key",
			token, `Digests:  map[string]jsonDigest{c.digestID: d},`, ``, binds+"the volume key of another volume of the same key"),
		one("the MAC covers the version of the token",
			token, `Version:  version,`, ``, "./luks TestMACIsAsSpecified"),
		one("the key of the MAC comes from the data key",
			token, `k.Bytes(), nil, info`, `make([]byte, 32), nil, info`, "./luks TestMACIsAsSpecified"),
		one("the key of the MAC is of no other use",
			token, `c.macFor(macInfo, k, version)`, `c.macFor("", k, version)`, "./luks TestMACIsAsSpecified"),
	}
}

// inOpening: what stands between a header and a mapping.
func inOpening() []protection {
	const (
		open    = "luks/open.go"
		compare = "./luks TestCompare"
	)
	return []protection{
		one("a header that does not pass is not opened",
			"luks/inspect.go", `case !i.Pass():`, `case i.checked == nil:`, "./luks TestTwoCopies"),
		one("a key of another form is not used to open",
			open, `if err := checkKey(k); err != nil {`, `if err := checkKey(k); false {`, "./luks TestOddKeysAreRefused"),
		one("unsealing uses what was judged, not what is on the disk by then",
			open, `i.unsealSlot(c.own(), i.area, k, mac, started)`, `i.unsealSlot(c.own(), func() *os.File { f, _ := os.Open(i.Path); area, _ := copyArea(f, c.areaOffset); return area }(), k, mac, started)`, "./luks TestOpenMapsWhatWasChecked"),
		one("a damaged keyslot is not called a wrong key",
			open, `case wrongKey && macHolds:`, `case false:`, "./luks TestDamagedKeyslot"),
		one("the unsealed volume is held against what was judged",
			open, `if err := i.checked.compare(v); err != nil {`, `if err := i.checked.compare(v); false {`, compare),
		one("the unsealed volume has the cipher that was judged",
			open, `v.StorageEncryption != cipher, `, ``, compare),
		one("the unsealed volume has the UUID that was judged",
			open, `, v.UUID != c.uuid,`, `,`, compare),
		one("the unsealed volume has the offset that was judged",
			open, `v.StorageOffset != uint64(c.offset), `, ``, compare),
		one("the unsealed volume has the size that was judged",
			open, `, v.StorageSize != uint64(c.length),`, `,`, compare),
		one("the unsealed volume has the sector size that was judged",
			open, `v.StorageSectorSize != uint64(c.segment.SectorSize),`, ``, compare),
		one("the unsealed volume has the iv_tweak that was judged",
			open, `, v.StorageIvTweak != 0,`, `,`, compare),
		one("a volume key of zeros is refused",
			open, `, bytes.Equal(key, make([]byte, keyBytes)):`, `:`, compare),
		one("a volume key that cannot be found is refused",
			open, `len(key) != keyBytes, `, ``, compare),
		one("a panic while unsealing costs one volume, not the process",
			open, `if p := recover(); p != nil {`, `if p := any(nil); p != nil {`, "./luks TestPanicsStayInside"),

		one("a header that changed since it was judged is not opened",
			open, `if err := i.unchanged(); err != nil {`, `if err := i.unchanged(); false {`, "./luks TestOpenRefusesWhatChanged"),
		one("a header that now says something else is not opened",
			open, `, !equalHeaders(i, now):`, `:`, "./luks TestOpenRefusesWhatChanged"),
		one("a header of which any byte changed is judged again",
			open, `err != nil || !bytes.Equal(now, e.data) {`, `err != nil {`, "./luks TestOpenRefusesWhatChanged"),
		one("a device that only shows the same bytes is not opened",
			open, `if device != i.device || size != i.Size || `, `if device == "" || size < 0 || `, "./luks TestOpenRefusesWhatChanged"),
		one("a keyslot that changed since it was read is not opened",
			"luks/restore.go", `return err == nil && same`, `return err == nil || same || true`, "./luks TestOpenRefusesWhatChanged"),
		one("a keyslot of which any byte changed is judged again",
			open, `return sameArea(f, i.area, i.checked.areaOffset)`, `return true, nil`, "./luks TestOpenRefusesWhatChanged"),
		one("the volume key is not kept while other volumes are waited for",
			open, "\twipe(v)\n\tif err != nil {\n\t\treturn dm.explain(err)", "\tif err != nil {\n\t\treturn dm.explain(err)", "./luks TestLoadedIsBeforeUse"),
		one("a mapping whose table cannot be used does not stay",
			open, "err = dm.explain(err)\n\t} else {", "return dm.explain(err)\n\t} else {", "./luks TestNothingStaysWhereTheTableIsNotUsed"),
		one("a mapping with a table in use is not closed as unfinished",
			"luks/close.go", `info.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0 || `, ``, "./luks TestCloseUnfinished"),
		one("a mapping of somebody else's is not closed as unfinished",
			"luks/close.go", "if err != nil || info.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0 || !strings.HasPrefix(info.UUID, uuidPrefix) {", "if err != nil || info.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0 {", "./luks TestCloseUnfinished"),
		one("another device of the same name is not opened",
			open, `case now.device != i.device, `, `case `, "./luks TestOpenRefusesWhatChanged"),
		one("a device that has another size by now is not opened",
			open, `, now.Size != i.Size:`, `:`, "./luks TestOpenRefusesWhatChanged"),
		{"the volume key is wiped once the mapping is loaded", []edit{{open, "	wipe(v)\n	if err != nil {\n		return dm.explain(err)", "	if err != nil {\n		return dm.explain(err)"}}, "./luks TestOpenMapsWhatWasChecked"},
		one("the volume key is wiped where it is not used",
			open, `defer wipe(v)`, ``, "./luks TestVolumeKeyOfAFailureIsWiped"),
		one("a name that is mapped already is refused",
			open, `if _, err := dm.info(o.Name); err == nil {`, `if _, err := dm.info(o.Name); false && err == nil {`, "./luks TestOpenErrors"),
		one("a mapping whose node does not come is taken back",
			open, `if undo := dm.undo(o.Name); undo != nil {`, `if undo := error(nil); undo != nil {`, "./luks TestOpenMakesTheNode"),
		one("the node of an earlier mapping is not taken for that of this one",
			open, `ok && number == info.DevNo {`, `ok && number != info.DevNo+1 {`, "./luks TestOpenMakesTheNode"),
		one("a mapping has a name that is no path and needs no quoting",
			open, "default:\n\t\t\treturn fmt.Errorf(", "default:\n\t\t\t_ = fmt.Errorf(", "./luks TestNames"),
		one("a mapping has a name that the kernel does not cut",
			open, ` || len(name) > maxName`, ``, "./luks TestNames"),
		one("only mappings of LUKS2 are removed",
			"luks/close.go", `if !strings.HasPrefix(info.UUID, uuidPrefix) {`, `if false && !strings.HasPrefix(info.UUID, uuidPrefix) {`, "./luks TestClose"),
		one("the kernel is told to wipe its copy of the table",
			"luks/table.go", `ioctl.Flags = unix.DM_SECURE_DATA_FLAG`, ``, "./luks TestTableRequest"),
		one("the header for luks.go is never cut",
			"luks/header.go", `if int64(len(text)) >= size-binarySize || len(uuid) >= lenUUID {`, `if false {`, "./luks TestBuildPrimaryRefusesWhatDoesNotFit"),
	}
}

// inHeaderWrites: formatting, restoring, and how cryptsetup is run.
func inHeaderWrites() []protection {
	const (
		format  = "luks/format.go"
		restore = "luks/restore.go"
		program = "luks/cryptsetup.go"
		written = "./luks TestFormatChecksWhatWasWritten/"
	)
	return []protection{
		one("what the header would be refused for is refused before it is written",
			format, `if err := o.check(); err != nil {`, `if err := o.check(); false {`, "./luks TestFormatRefusesOptions"),
		one("a key of another form is not formatted with",
			format, `if err := checkKey(k); err != nil {`, `if err := checkKey(k); false {`, "./luks TestOddKeysAreRefused"),
		one("a disk of a size that is no multiple of 4096 gets sectors of 512",
			format, `if before.Size%int64(sectorSize) != 0 {`, `if false && before.Size != 0 {`, "./luks TestFormatUnalignedSize"),
		one("a disk that loses a new header is an error of the disk",
			format, `if bare.Kind != KindLUKS2 {`, `if false {`, "./luks TestFormatOnADiskThatLies"),
		one("a new header is unsealed before it counts as written",
			format, `if err := done.verify(k); err != nil {`, `if err := done.verify(k); false {`, written+"wrong pass"),
		one("a new header has both copies",
			format, `case done.SecondaryDamaged || done.PrimaryDamaged,`, `case false,`, written+"one copy"),
		one("a new header has the UUID that was asked for",
			format, `h.UUID != o.UUID, `, ``, written+"another UUID"),
		one("a new header has the label that was asked for",
			format, `h.Label != o.Label, `, ``, written+"another label"),
		{"a new header has our subsystem (which is seen before and after the token)", []edit{
			{format, `|| !slices.Equal(bare.Reasons, []string{reasonNoToken})`, `|| slices.Contains(bare.Reasons, "")`},
			{format, `, h.Subsystem != Subsystem,`, `,`},
		}, written + "another subsystem"},
		one("a new header has the sector size that was asked for",
			format, `h.SectorSize != sectorSize, `, ``, written+"another sector size"),
		one("a new header has the data where it was asked for",
			format, `h.Offset != DataOffset, `, ``, written+"another offset"),
		one("a new header has one keyslot",
			format, `, len(h.Keyslots) != 1,`, `,`, written+"a keyslot more"),
		one("a new header names the KMS key that was asked for",
			format, `h.Token.KeyARN != o.KeyARN, `, ``, written+"another token"),
		one("a new header has the wrapped key that was asked for",
			format, `, !bytes.Equal(h.Token.WrappedKey, o.WrappedKey):`, `, false && bytes.Equal(nil, nil):`, written+"another wrapped key"),

		one("a primary header copy is not restored from what does not pass",
			restore, `if err := before.refusal(); err != nil {`, `if err := before.refusal(); false {`, "./luks TestRestorePrimaryRefuses"),
		one("a sound primary header copy is not touched",
			restore, `if !before.PrimaryDamaged {`, `if false {`, "./luks TestRestorePrimaryOfASoundVolume"),
		one("a restored header is whole",
			restore, `if after.PrimaryDamaged || after.SecondaryDamaged {`, `if false {`, "./luks TestRestorePrimaryChecksTheResult"),
		one("a restored header is the one from before",
			restore, `if !equalHeaders(before, after) {`, `if false {`, "./luks TestRestorePrimaryChecksTheResult"),

		one("the key is not in cryptsetup's environment",
			program, `cmd.Env = []string{"LC_ALL=C",`, `cmd.Env = []string{"KEY=" + string(stdin), "LC_ALL=C",`, "./luks TestKeyStaysOnStandardInput"),
		one("cryptsetup gets nothing of our environment",
			program, `cmd.Env = []string{"LC_ALL=C", "PATH=" + searchPath()}`, `cmd.Env = append(os.Environ(), "LC_ALL=C")`, "./luks TestKeyStaysOnStandardInput"),
		one("cryptsetup's output is bounded",
			program, `p[:min(len(p), 2048-len(l.b))]...`, `p...`, "./luks TestCryptsetupOutputIsBounded"),
		one("cryptsetup's output is made printable",
			program, `return printable([]byte(strings.Join(strings.Fields(string(l.b)), " ")))`, `return strings.Join(strings.Fields(string(l.b)), " ")`, "./luks TestCryptsetupExitCodes"),
		one("a program is not looked for in a relative directory",
			program, `if !filepath.IsAbs(dir) {`, `if false {`, "./luks TestFindProgram"),

		one("a key slot is not added to a volume that the key does not open",
			"luks/slots.go", "before, err := inspectToWrite(path, k)\n\tif err != nil {\n\t\treturn err\n\t}\n\tif err := checkKey(next)", "before, err := inspectPath(path)\n\tif err != nil {\n\t\treturn err\n\t}\n\tif err := checkKey(next)", "./luks TestKeySlotsRefuse/add: damaged copy"),
		one("the token's own key slot is not removed",
			"luks/slots.go", "case slot == i.Header.Token.Keyslot:", "case false:", "./luks TestKeySlotsRefuse/remove: the token's"),
		one("a key slot is proven before the token names it",
			"luks/replace.go", "err := testPassphrase(ctx, path, slot, next.Passphrase())\n\tif err == nil {", "var err error\n\tif err == nil {", "./luks TestKeySlotsRefuse/move: not opened"),
		one("a key slot that was to be added is looked for",
			"luks/slots.go", "if !after.HasKeySlot(slot) || !sameBut(slot, after, before) {", "if false && sameBut(slot, after, before) {", "./luks TestKeySlotsCheckTheResult/no slot is added"),
		one("a token that was replaced is compared with what was asked for",
			"luks/replace.go", "if !equalHeaders(&want, after) {", "if false {", "./luks TestReplaceTokenChecksTheResult/nothing"),
	}
}

// inRecovery: recovery keys, which open a volume without the data key.
func inRecovery() []protection {
	const (
		recovery = "luks/recovery.go"
		check    = "luks/check.go"
		attacks  = "./luks TestRecoveryAttacks/"
		result   = "./luks TestRecoveryChecksTheResult/"
		refuses  = "./luks TestRemoveRecoveryRefuses/"
	)
	return []protection{
		one("a header that does not pass is not opened by a recovery key",
			recovery, `if err := i.refusal(); err != nil {`, `if err := i.refusal(); i.checked == nil {`, attacks+"copies that differ"),
		one("a recovery key opens only what the MAC of its token holds for",
			recovery, `return i.unsealSlot(p, area, r, mac, nil)`, `return i.unsealSlot(p, area, r, p.mac, nil)`, attacks+"data moved"),
		one("the slot of a recovery key is bounded as the data key's is",
			check, `case len(errs) > 0:`, `case false:`, attacks+"endless slot of its own"),
		one("the slot of another token is not a recovery key's",
			check, `case named[id] > 1:`, `case false:`, refuses+"the data key's slot"),
		one("the MAC of a recovery token is not the data key's",
			recovery, `c.macFor(recoveryInfo, r, recoveryVersion)`, `c.macFor(macInfo, r, recoveryVersion)`, "./luks TestRecoveryKey"),
		one("a new slot is proven before it counts",
			recovery, `if err := testPassphrase(ctx, path, slot, r.Passphrase()); err != nil {`, `if err := testPassphrase(ctx, path, slot, r.Passphrase()); false {`, result+"no slot"),
		one("a new slot is the only thing that is new",
			recovery, `if !slices.EqualFunc(want, before.Header.Keyslots, sameButTokens) ||`, `if len(want) > 99 ||`, result+"two slots"),
		one("a new recovery token is the one that was asked for",
			recovery, `if !reflect.DeepEqual(after.Header.Recovery, want) ||`, `if`, result+"no token"),
		one("a slot that is still there is not called removed",
			"luks/slots.go", `if after.HasKeySlot(slot) || !same(`, `if false && !same(`, result+"slot not gone"),
		one("nothing is written to a header of which the primary copy is damaged",
			"luks/slots.go", `if i.PrimaryDamaged {`, `if false {`, "./luks TestRecoveryIsCut"),
		one("what was written is in both header copies",
			"luks/slots.go", `if err == nil && i.SecondaryDamaged {`, `if false {`, result+"one header copy"),
		one("a key slot is removed only where the data key opens the volume",
			"luks/slots.go", `if err := i.verify(k); err != nil {`, `if err := i.verify(k); i.checked == nil {`, refuses+"tampered"),
		one("a recovery token is not removed before its slot",
			recovery, `case token.Keyslot >= 0:`, `case false:`, "./luks TestRecoveryKey"),
		one("a recovery token that cannot be read is not removed, nor is a slot for it",
			recovery, `(malformed || t.Keyslot >= 0)`, `(malformed && false || t.Keyslot >= 0)`, refuses+"malformed"),
		one("only a slot that no token names is removed without a token",
			recovery, "if !slices.Contains(i.Header.Unnamed, slot) {\n\t\t\treturn 0", "if false {\n\t\t\treturn 0", "./luks TestRecoverySlotWithoutToken"),
	}
}
