package main

// Two checks that back each other up are taken away together.
func inKeycache() []protection {
	const (
		record  = "keycache/record.go"
		store   = "keycache/store.go"
		kms     = "keycache/kms.go"
		retry   = "keycache/retry.go"
		imds    = "keycache/imds.go"
		failed  = "keycache/errors.go"
		key     = "keycache/key.go"
		copies  = "keycache/copies_linux.go"
		protect = "keycache/protect_linux.go"

		corrupt   = "./keycache TestCorruptRecordsAreProblems"
		untrusted = "./keycache TestDecryptTrustsNoAnswer"
		options   = "./keycache TestNewJudgesOptions"
		printed   = "./keycache TestKeyNeverPrints"
		everyCopy = "./keycache TestWipeAllWipesEveryCopy"
		durable   = "./keycache TestEveryStepIsDurableBeforeTheNext"
	)
	return []protection{
		// What is trusted as a record.
		{"a record of another version is not read (decode and validate)", []edit{
			{record, "if *v.Version < RecordVersion || *v.Version > newest(into) {", "if false {"},
			{record, "case r.Version != RecordVersion:\n\t\treturn versionError(r.Version, r)\n\tcase !isUUID(r.ID):", "case !isUUID(r.ID):"},
		}, corrupt},
		{"a record is not read where something follows it (the version's decoder and the record's)", []edit{
			{record, "if _, err := dec.Token(); !errors.Is(err, io.EOF) {", "if false {"},
			{record, "return json.Unmarshal(data, into)", "return json.NewDecoder(bytes.NewReader(data)).Decode(into)"},
		}, corrupt},
		{"a record with an unknown field, or one in other capitals, is not read", []edit{
			{record, "if allowed != nil && !allowed[name] {", "if false {"},
		}, corrupt},
		{"a record with a field twice is not read", []edit{{record, "if seen[name] {", "if false {"}}, corrupt},
		{"a key record's id is a UUID: it names a file", []edit{
			{record, "case !isUUID(r.ID):", "case false:"},
		}, "./keycache TestInvalidRecordsAreNotWritten"},
		{"a volume record's uuid is a UUID: it names a file", []edit{
			{record, "case !isUUID(r.UUID):", "case false:"},
		}, "./keycache TestInvalidRecordsAreNotWritten"},
		{"only one spelling of a UUID names a record", []edit{
			{record, "u, err := uuid.Parse(s)\n\treturn err == nil && u.String() == s", "_, err := uuid.Parse(s)\n\treturn err == nil"},
		}, "./keycache TestOddNamesAreProblemsAndTempsAreNot"},
		{"a key record names its KMS key by ARN, never by alias", []edit{{record, `case region == "":`, `case region == "" && false:`}}, corrupt},
		{"a key record without a wrapped key is not read", []edit{{record, "case len(r.WrappedKey) == 0:", "case false:"}}, corrupt},
		{"a key record with a wrapped key that KMS would not take is not read", []edit{
			{record, "case len(r.WrappedKey) > maxWrapped:", "case false:"},
		}, corrupt},
		{"a key record says which instance it is of", []edit{
			{record, "case r.InstanceID == \"\":\n\t\treturn errors.New(\"instance_id is empty\")\n\tcase r.Region", "case r.Region"},
		}, corrupt},
		{"a key record says which region it is of", []edit{{record, `case r.Region == "":`, "case false:"}}, corrupt},
		{"a volume record names its key by a UUID", []edit{{record, "case !isUUID(r.KeyID):", "case false:"}}, corrupt},
		{"a volume record has a class", []edit{{record, `case r.Class == "":`, "case false:"}}, corrupt},
		{"a volume record has an identity", []edit{{record, `case r.Identity == "":`, "case false:"}}, corrupt},
		{"a volume record has a size", []edit{{record, "case r.Size <= 0:", "case false:"}}, corrupt},
		{"a volume record's state is one of two", []edit{
			{record, "case r.State != StateFormatting && r.State != StateReady && r.State != StateWiping:", "case false:"},
		}, corrupt},
		{"a volume record's mount point is a clean absolute path", []edit{
			{record, `case r.MountPoint != "" &&`, "case false &&"},
		}, corrupt},
		{"a volume record's mapping is a name and no path", []edit{
			{record, `case strings.ContainsAny(r.Mapping, "/\x00") ||`, "case false &&"},
		}, corrupt},
		{"a volume record says which instance it is of", []edit{
			{record, "case r.InstanceID == \"\":\n\t\treturn errors.New(\"instance_id is empty\")\n\t}\n\tif r.Rotation", "}\n\tif r.Rotation"},
		}, corrupt},
		{"a record has its times", []edit{{record, "if t.IsZero() {", "if false {"}}, corrupt},
		{"a record's times are in UTC", []edit{{record, "offset != 0 {", "offset != 0 && false {"}}, corrupt},
		{"a key record's name is its id", []edit{{store, "if err == nil && r.ID != id {", "if false {"}}, corrupt},
		{"a volume record's name is its uuid", []edit{{store, "if err == nil && r.UUID != id {", "if false {"}}, corrupt},
		{"a record that is too large is not read", []edit{
			{store, "io.LimitReader(f, maxRecord+1)", "f"},
			{store, "if len(data) > maxRecord {", "if false {"},
		}, corrupt},
		{"an unreadable record is told, and not taken for none", []edit{
			{store, `r.Problems = append(r.Problems, RecordError{Path: path, ID: id, Kind: "key", Err: err})`, ""},
			{store, `r.Problems = append(r.Problems, RecordError{Path: path, ID: id, Kind: "volume", Err: err})`, ""},
		}, corrupt},
		{"an unreadable folder of records is not taken for an empty one", []edit{
			{store, "if err != nil {\n\t\treturn storeError(\"read\", dir, err)", "if err != nil && false {\n\t\treturn storeError(\"read\", dir, err)"},
		}, "./keycache TestUnreadableFolderIsNotEmpty"},
		{"what a cut left of a record is not taken for one", []edit{
			{store, "tmpPrefix) {\n\t\t\tcontinue", "tmpPrefix) && false {\n\t\t\tcontinue"},
		}, "./keycache TestOddNamesAreProblemsAndTempsAreNot"},
		{"a record that is a symbolic link is not read", []edit{
			{store, "os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK", "os.O_RDONLY|unix.O_NONBLOCK"},
		}, "./keycache TestStrangeFilesAreProblems"},
		{"a FIFO in a record's place does not hang the boot", []edit{
			{store, "os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK", "os.O_RDONLY|unix.O_NOFOLLOW"},
		}, "./keycache TestStrangeFilesAreProblems"},
		{"what is no regular file is no record", []edit{{store, "if !info.Mode().IsRegular() {", "if false {"}}, "./keycache TestStrangeFilesAreProblems"},
		{"a record that others may read or write is not read", []edit{
			{store, "if err := s.checkOwner(info); err != nil {\n\t\treturn nil, err", "if err := s.checkOwner(info); err != nil && false {\n\t\treturn nil, err"},
		}, "./keycache TestStrangeFilesAreProblems"},
		{"a record or directory of another user is not used", []edit{
			{store, "if int64(st.Uid) != int64(s.uid) {", "if false {"},
		}, "./keycache TestForeignOwnerIsRefused"},
		{"a state directory that others may enter is refused", []edit{
			{store, "if err := s.checkOwner(info); err != nil {\n\t\treturn storeError", "if err := s.checkOwner(info); err != nil && false {\n\t\treturn storeError"},
		}, "./keycache TestUnsafeDirectoriesAreRefused"},
		{"a state directory that is a symbolic link is refused", []edit{
			{store, "info, err := os.Lstat(dir)", "info, err := os.Stat(dir)"},
		}, "./keycache TestUnsafeDirectoriesAreRefused"},

		// What is written.
		{"the state directory is made for its owner alone, and looked at", []edit{
			{store, "err := os.Mkdir(dir, 0o700)", "err := os.Mkdir(dir, 0o755)"},
			{store, "\t\terr = os.Mkdir(dir, 0o700)", "\t\terr = os.Mkdir(dir, 0o755)"},
			{store, "if err := s.checkOwner(info); err != nil {\n\t\treturn storeError", "if err := s.checkOwner(info); err != nil && false {\n\t\treturn storeError"},
		}, "./keycache TestOpenStoreMakesAPrivateDirectory"},
		{"records are written for their owner alone, and looked at", []edit{
			{store, "unix.O_NOFOLLOW, 0o600)\n\tif err != nil {\n\t\treturn \"\"", "unix.O_NOFOLLOW, 0o644)\n\tif err != nil {\n\t\treturn \"\""},
			{store, "f.Chmod(0o600)", "f.Chmod(0o644)"},
			{store, "if err := s.checkOwner(info); err != nil {\n\t\treturn nil, err", "if err := s.checkOwner(info); err != nil && false {\n\t\treturn nil, err"},
		}, "./keycache TestOpenStoreMakesAPrivateDirectory"},
		{"the umask does not decide a record's mode", []edit{
			{store, "if err := f.Chmod(0o600); err != nil {\n\t\treturn err\n\t}\n", ""},
		}, "./keycache TestOpenStoreMakesAPrivateDirectory"},
		{"a record is removed only once it is saved", []edit{{"keycache/remove.go", "if saveTo != \"\" {", "if false {"}}, "./keycache TestRemoveSavesFirst"},
		{"a file that lacks a record is not taken for one that has it saved", []edit{
			{"keycache/remove.go", "if !bytes.Equal(saved[file], contents[file]) {", "if len(saved[file]) > maxRecord {"},
		}, "./keycache TestRemoveOverwritesNoFile"},
		{"a key that a volume needs is not removed", []edit{
			{"keycache/remove.go", "errors.Join(s.checkUnused(r.Keys, r.Volumes), s.checkReadable())", "s.checkReadable()"},
		}, "./keycache TestRemove"},
		{"nor one that an unreadable volume record may need", []edit{
			{"keycache/remove.go", "errors.Join(s.checkUnused(r.Keys, r.Volumes), s.checkReadable())", "s.checkUnused(r.Keys, r.Volumes)"},
		}, "./keycache TestRemove"},
		{"a full or read-only disk is found before anything depends on it", []edit{
			{store, "return s.probe()", "return nil"},
		}, "./keycache TestFullDisk"},
		{"a view of the store writes nothing", []edit{{store, "if s.viewOnly {", "if false {"}}, "./keycache TestViewStoreWritesNothing"},
		{"a key record is never overwritten", []edit{
			{store, "s.put(path, data, linkNew); err != nil", "s.put(path, data, os.Rename); err != nil"},
		}, "./keycache TestPutKeyNeverOverwrites"},
		{"ready is a one-way door", []edit{
			{store, "case old.State == StateReady && r.State == StateFormatting:", "case old.State == StateReady && false:"},
		}, "./keycache TestReadyIsAOneWayDoor"},
		{"ready is a one-way door for two writers at once", []edit{
			{store, "s.mu.Lock()\n\tdefer s.mu.Unlock()\n\tif err := s.writable(); err != nil {\n\t\treturn err\n\t}\n\told, err", "old, err"},
		}, "./keycache TestReadyIsNotLostBetweenTwoWriters"},
		{"an unreadable volume record is not replaced", []edit{
			{store, "case err != nil:\n\t\treturn storeError(\"replace\"", "case false:\n\t\treturn storeError(\"replace\""},
		}, "./keycache TestReadyIsAOneWayDoor"},
		{"no volume record is stored before its key record", []edit{
			{store, "if _, err := s.readKey(s.keyPath(id), id); err != nil {\n\t\t\treturn storeError(\"write\", path, fmt.Errorf(\"its key", "if _, err := s.readKey(s.keyPath(id), id); err != nil && false {\n\t\t\treturn storeError(\"write\", path, fmt.Errorf(\"its key"},
		}, "./keycache TestNoVolumeRecordWithoutItsKey"},
		{"a record that could not be written whole gets no name", []edit{
			{store, "if err := s.fill(f, data); err != nil {", "if err := s.fill(f, data); err != nil && false {"},
		}, "./keycache TestFullDisk"},
		{"a record is on the disk before it gets its name", []edit{
			{store, "if err := s.step(\"sync\"); err != nil {\n\t\treturn err\n\t}\n\treturn f.Sync()", "return nil"},
		}, durable},
		{"a record's name is on the disk before the write is done", []edit{
			{store, "if err := s.syncDir(dir); err != nil {\n\t\treturn err\n\t}\n\tgot, err", "got, err"},
		}, durable},
		{"a directory of the store is on the disk before what it gets", []edit{
			{store, "if err := s.syncDir(filepath.Dir(dir)); err != nil {\n\t\t\treturn err\n\t\t}\n", ""},
		}, durable},
		{"what was written is read back and compared", []edit{
			{store, "if err == nil && !bytes.Equal(got, data) {", "if err == nil && !bytes.Equal(got, data) && false {"},
		}, "./keycache TestReadBack"},

		// What is moved.
		{"a record that is moved is on the disk in its new place before its old name goes", []edit{
			{store, "return s.syncDir(filepath.Dir(to))", "return nil"},
		}, durable},
		{"a record that cannot be archived stays", []edit{
			{store, `if err := s.linkTo(path, base+".json"); err != nil {`, `if err := s.linkTo(path, base+".json"); err != nil && false {`},
		}, "./keycache TestWhatCannotMoveStays"},
		{"a volume record that cannot be quarantined stays", []edit{
			{store, `filepath.Join(to, volumesDir, id+".json")); err != nil {`, `filepath.Join(to, volumesDir, id+".json")); err != nil && false {`},
		}, "./keycache TestWhatCannotMoveStays"},
		{"a key record that cannot be quarantined stays", []edit{
			{store, `filepath.Join(to, keysDir, id+".json")); err != nil {`, `filepath.Join(to, keysDir, id+".json")); err != nil && false {`},
		}, "./keycache TestWhatCannotMoveStays"},
		{"nothing in the archive is overwritten (the note and the record)", []edit{
			{store, "return s.put(path, data, linkNew)", "return s.put(path, data, os.Rename)"},
			{store, "err = os.Link(from, to)\n", "_ = os.Remove(to)\n\t\terr = os.Link(from, to)\n"},
		}, "./keycache TestArchiveKeepsBytes"},
		{"a key record leaves last, after the volume records that need it", []edit{
			{store, "for _, id := range volumes {\n\t\tif err := s.linkTo(", "for _, id := range keys {\n\t\tif err := s.unlink(s.keyPath(id)); err != nil {\n\t\t\treturn err\n\t\t}\n\t}\n\tfor _, id := range volumes {\n\t\tif err := s.linkTo("},
			{store, "for _, id := range keys {\n\t\tif err := s.unlink(s.keyPath(id)); err != nil {\n\t\t\treturn err\n\t\t}\n\t}\n\treturn nil", "return nil"},
		}, "./keycache TestPowerCuts/quarantine"},
		{"a key record that a volume needs is not quarantined without it", []edit{
			{store, "if err := s.checkUnused(keys, volumes); err != nil {", "if err := s.checkUnused(keys, volumes); err != nil && false {"},
		}, "./keycache TestQuarantineKeepsBytes"},
		{"a quarantine for which a key record is missing moves nothing", []edit{
			{store, "if err := s.movable(s.keyPath(id), id); err != nil {", "if err := s.movable(s.keyPath(id), id); err != nil && false {"},
		}, "./keycache TestQuarantineKeepsBytes"},
		{"a quarantine for which a volume record is missing moves nothing", []edit{
			{store, "if err := s.movable(s.volumePath(id), id); err != nil {", "if err := s.movable(s.volumePath(id), id); err != nil && false {"},
		}, "./keycache TestQuarantineKeepsBytes"},
		{"only what a UUID names is moved", []edit{{store, "if !isUUID(id) {", "if false {"}}, "./keycache TestInvalidRecordsAreNotWritten"},
		{"one agent works with the store", []edit{{store, "unix.LOCK_EX|", "unix.LOCK_SH|"}}, "./keycache TestLockBetweenProcesses"},
		{"the lock says who holds it", []edit{
			{store, "if err := f.Truncate(0); err == nil {", "if err := f.Truncate(0); err == nil && false {"},
		}, "./keycache TestLockBetweenProcesses"},
		{"the lock file is not written through a symbolic link", []edit{
			{store, "os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|", "os.O_RDWR|os.O_CREATE|"},
		}, "./keycache TestLockFollowsNoSymlink"},
		{"only temporary files are swept", []edit{
			{store, "tmpPrefix) {\n\t\t\t\t_ = os.Remove", "tmpPrefix) || !e.IsDir() {\n\t\t\t\t_ = os.Remove"},
		}, "./keycache TestSweepTakesOnlyTemporaryFiles"},

		// What KMS is asked, and what is believed.
		{"GenerateDataKey carries no encryption context", []edit{
			{kms, "KeySpec: types.DataKeySpecAes256,", "KeySpec: types.DataKeySpecAes256, EncryptionContext: map[string]string{\"a\": \"b\"},"},
		}, "./keycache TestGenerateAndDecrypt"},
		{"Decrypt carries the encryption context of the record", []edit{
			{kms, "\t\t\tEncryptionContext: r.EncryptionContext,\n", ""},
		}, "./keycache TestContextOfARecordIsUsed"},
		{"Decrypt names the record's key, not the configured one", []edit{
			{kms, "KeyId:             aws.String(r.KeyARN)", "KeyId:             aws.String(c.options.KeyID)"},
		}, "./keycache TestDecryptNamesTheRecordsKey"},
		{"Decrypt is asked for keys by ARN only, and for what KMS can have wrapped", []edit{
			{kms, "if !keyARN.MatchString(r.KeyARN) || len(r.WrappedKey) == 0 || len(r.WrappedKey) > maxWrapped {", "if false {"},
		}, "./keycache TestDecryptNeedsOnlyArnAndWrappedKey"},
		{"what Decrypt gave under another key is not used", []edit{
			{kms, "got := aws.ToString(out.KeyId); got != r.KeyARN {", "got := aws.ToString(out.KeyId); got != r.KeyARN && false {"},
		}, untrusted},
		{"what GenerateDataKey gave under another key is not used", []edit{
			{kms, "if err := c.isConfigured(r.KeyARN); err != nil {", "if err := c.isConfigured(r.KeyARN); err != nil && false {"},
		}, untrusted},
		{"what GenerateDataKey gave makes a record, or is not used", []edit{
			{kms, "if err := r.validate(); err != nil {", "if err := r.validate(); err != nil && false {"},
		}, untrusted},
		{"a data key has 32 bytes", []edit{
			{key, "if len(b) != keyLen {", "if len(b) < keyLen {\n\t\treturn nil, errKeyLength\n\t}\n\tif false {"},
		}, untrusted},
		{"a data key that is refused is wiped from GenerateDataKey's answer", []edit{
			{kms, "defer clear(out.Plaintext)\n\t\tr = KeyRecord{", "r = KeyRecord{"},
		}, "./keycache TestPlaintextOfAnAnswerIsWiped"},
		{"a data key that is refused is wiped from Decrypt's answer", []edit{
			{kms, "defer clear(out.Plaintext)\n\t\tif aws", "if aws"},
		}, "./keycache TestPlaintextOfAnAnswerIsWiped"},
		{"an alias of AWS's own keys is refused", []edit{{kms, `if strings.HasPrefix(m[2], "alias/aws/") {`, "if false {"}}, options},
		{"what names no key is refused", []edit{{kms, "} else if !bareKey.MatchString(o.KeyID) {", "} else if false {"}}, options},
		{"what is no region makes no host name", []edit{
			{kms, `if o.Region != "" && !regionName.MatchString(o.Region) {`, "if false {"},
		}, options},
		{"a key of another region than the configured one is refused", []edit{
			{kms, `if o.Region != "" && keyRegion != "" && keyRegion != o.Region {`, "if false {"},
		}, options},
		{"a key of another region than the node's is refused", []edit{
			{kms, `if keyRegion != "" && keyRegion != region {`, "if false {"},
		}, "./keycache TestWrongRegionOfTheNode"},
		{"a key that AWS manages is refused", []edit{
			{kms, "case m.KeyManager != types.KeyManagerTypeCustomer:", "case false:"},
		}, "./keycache TestCheckKey"},
		{"a key that is not for symmetric encryption is refused", []edit{
			{kms, "case m.KeySpec != types.KeySpecSymmetricDefault || m.KeyUsage != types.KeyUsageTypeEncryptDecrypt:", "case false:"},
		}, "./keycache TestCheckKey"},
		{"a key that is not enabled is refused", []edit{
			{kms, "case m.KeyState != types.KeyStateEnabled:", "case false:"},
		}, "./keycache TestCheckKey"},
		{"an endpoint is judged before it is called", []edit{
			{kms, "if err := CheckEndpoint(endpoint); err != nil {", "if err := CheckEndpoint(endpoint); err != nil && false {"},
		}, "./keycache TestEndpointsMustNotShowTheDataKey"},
		{"plain http goes to loopback and link-local addresses only", []edit{
			{kms, "if err == nil && (addr.IsLoopback() || addr.IsLinkLocalUnicast()) {", "if err != nil || addr.IsValid() {"},
		}, "./keycache TestEndpointsMustNotShowTheDataKey"},
		{"the certificate of KMS's endpoint is checked", []edit{
			{kms, "import (\n", "import (\n\t\"crypto/tls\"\n"},
			{kms, "ForceAttemptHTTP2:   true,", "ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},"},
		}, "./keycache TestNotReached"},
		{"no redirect is followed", []edit{
			{kms, "CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },\n", ""},
		}, "./keycache TestOnlyOptionsDecide"},
		{"no proxy of the environment is asked", []edit{
			{kms, "ForceAttemptHTTP2:   true,", "ForceAttemptHTTP2: true, Proxy: http.ProxyFromEnvironment,"},
		}, "./keycache TestProxiesOfTheEnvironmentAreNotAsked"},
		{"the environment does not turn the metadata service off", []edit{
			{imds, "ClientEnableState: imds.ClientEnabled,\n", ""},
		}, "./keycache TestOnlyOptionsDecide"},
		{"the environment does not say where the metadata service is", []edit{
			{kms, "return imdsEndpoint\n", "return \"\"\n"},
		}, "./keycache TestOnlyOptionsDecide"},
		{"the metadata service is not read without a session token", []edit{
			{imds, "EnableFallback:    aws.FalseTernary,\n", ""},
		}, "./keycache TestIMDSTroubles"},
		{"an identity that EC2 does not give is not believed", []edit{
			{imds, "if !instanceName.MatchString(id.InstanceID) || !regionName.MatchString(id.Region) {", "if false {"},
		}, "./keycache TestIdentityAndEphemeral"},
		{"expired credentials are not used on", []edit{
			{imds, "role    *ec2rolecreds.Provider", "*ec2rolecreds.Provider"},
			{imds, "role: ec2rolecreds.New(", "Provider: ec2rolecreds.New("},
			{imds, "r.role.Retrieve(ctx)", "r.Provider.Retrieve(ctx)"},
		}, "./keycache TestExpiredCredentialsAreNotUsedOn"},
		{"credentials without keys are not used", []edit{
			{imds, "if !creds.HasKeys() {", "if false {"},
		}, "./keycache TestEmptyCredentialsAreNotUsed"},
		{"credentials that KMS refused are not used again", []edit{
			{kms, "c.creds.Invalidate()", ""},
		}, "./keycache TestExpiredCredentials"},

		// How long, how often, and what is told.
		{"each attempt has a deadline", []edit{
			{retry, "context.WithTimeout(ctx, c.timeout)", "context.WithCancel(ctx)"},
		}, "./keycache TestDeadlineOfEveryCall"},
		{"what will not pass is not tried again", []edit{{retry, "if !e.Retryable() {", "if false {"}}, "./keycache TestKMSRefusals"},
		{"a call that its caller ended is not tried again", []edit{
			{retry, "if ctx.Err() != nil {\n\t\t\t// What", "if false {\n\t\t\t// What"},
		}, "./keycache TestCallerEndsACall"},
		{"waits are spread at random", []edit{
			{retry, "time.Duration(c.random(int64(ceiling) + 1))", "ceiling"},
		}, "./keycache TestBackoffIsFullJitter"},
		{"waits have a longest (the number of doublings and their sum)", []edit{
			{retry, "if attempt < 8 {", "if attempt < 30 {"},
			{retry, "min(backoffBase<<(attempt-1), backoffCap)", "backoffBase << (attempt - 1)"},
		}, "./keycache TestBackoffIsFullJitter"},
		{"attempts end at the limit (the check and the last wait)", []edit{
			{retry, "elapsed >= c.limit {", "elapsed >= 100*c.limit {"},
			{retry, "\t\twait = min(wait, c.limit-elapsed)\n", ""},
		}, "./keycache TestRetryLimit"},
		{"a fleet that is throttled does not storm", []edit{{retry, "if e.throttled() {", "if false {"}}, "./keycache TestRefusalsAreCountedApart"},
		{"the SDK does not try KMS again", []edit{{kms, "Retryer:     aws.NopRetryer{},", ""}}, "./keycache TestSDKDoesNotRetry"},
		{"the SDK does not try the metadata service again", []edit{
			{imds, "Retryer:           aws.NopRetryer{},", ""},
		}, "./keycache TestSDKDoesNotRetry"},
		{"a clock that is off is no refusal", []edit{{failed, "case clockIsOff(err):", "case false:"}}, "./keycache TestClockSkew"},
		{"an error shows no piece of an answer that may hold a key", []edit{
			{failed, "case errors.As(err, &broken):", "case errors.As(err, &broken) && false:"},
		}, "./keycache TestErrorsShowNoPieceOfAnAnswer"},
		{"KMS's request id is kept with a refusal", []edit{
			{failed, "e.RequestID = requestID(err)", ""},
		}, "./keycache TestKMSRefusals"},
		{"KMS's request id is kept with a key", []edit{
			{kms, "r.RequestID, _ = awsmiddleware.GetRequestIDMetadata(out.ResultMetadata)", ""},
		}, "./keycache TestGenerateAndDecrypt"},

		// Keys in memory.
		{"NewKey wipes what it was given", []edit{{key, "defer clear(b)", ""}}, "./keycache TestKeyHoldsBytesAndPassphrase"},
		{"a borrowed part of a key does not reach into the next", []edit{
			{key, "[:k.m.keyLen:k.m.keyLen], (*page)[k.m.keyLen:k.m.end:k.m.end]", "[:k.m.keyLen], (*page)[k.m.keyLen:k.m.end]"},
		}, "./keycache TestKeyHoldsBytesAndPassphrase"},
		{"a key's page is locked", []edit{
			{key, "err := unix.Mlock(page)", "err := error(nil)"},
		}, "./keycache TestKeyIsLockedAndLeftOutOfDumps"},
		{"a key's page is left out of core dumps", []edit{
			{key, "err := unix.Madvise(page, unix.MADV_DONTDUMP)", "err := error(nil)"},
		}, "./keycache TestKeyIsLockedAndLeftOutOfDumps"},
		{"a wiped key equals nothing", []edit{{key, "return a != nil && b != nil && ", "return "}}, "./keycache TestKeyEqual"},
		{"a key is zeroed before its page is given back", []edit{
			{key, "clear(*page)", ""},
		}, "./keycache TestWipeZeroesBeforeItUnmaps"},
		{"fmt does not print a key", []edit{
			{key, "func (Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }", "func (k Key) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, string(k.Bytes())) }"},
		}, printed},
		{"String does not show a key", []edit{
			{key, "func (Key) String() string { return redacted }", "func (k Key) String() string { return string(k.Passphrase()) }"},
		}, printed},
		{"GoString does not show a key", []edit{
			{key, "func (Key) GoString() string { return redacted }", "func (k Key) GoString() string { return string(k.Passphrase()) }"},
		}, printed},
		{"JSON does not show a key", []edit{
			{key, "func (Key) MarshalJSON() ([]byte, error) { return []byte(`\"` + redacted + `\"`), nil }", "func (k Key) MarshalJSON() ([]byte, error) { return []byte(`\"` + string(k.Passphrase()) + `\"`), nil }"},
		}, printed},
		{"text does not show a key", []edit{
			{key, "func (Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }", "func (k Key) MarshalText() ([]byte, error) { return k.Passphrase(), nil }"},
		}, printed},
		{"YAML does not show a key", []edit{
			{key, "func (Key) MarshalYAML() (any, error) { return redacted, nil }", "func (k Key) MarshalYAML() (any, error) { return string(k.Passphrase()), nil }"},
		}, printed},
		{"slog does not show a key", []edit{
			{key, "func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }", "func (k Key) LogValue() slog.Value { return slog.StringValue(string(k.Passphrase())) }"},
		}, printed},
		{"WipeAll wipes the keys", []edit{
			{copies, "for _, k := range keys {\n\t\tk.Wipe()\n\t}\n", ""},
		}, everyCopy},
		{"copies of a key's bytes are wiped", []edit{{copies, "room = c.lookFor(k.Bytes(), 0, room)\n", ""}}, everyCopy},
		{"copies of a passphrase are wiped", []edit{{copies, "[]byte{0, innerPad, outerPad}", "[]byte{innerPad, outerPad}"}}, everyCopy},
		{"copies of a passphrase under HMAC's inner pad are wiped", []edit{
			{copies, "[]byte{0, innerPad, outerPad}", "[]byte{0, outerPad}"},
		}, everyCopy},
		{"copies of a passphrase under HMAC's outer pad are wiped", []edit{
			{copies, "[]byte{0, innerPad, outerPad}", "[]byte{0, innerPad}"},
		}, everyCopy},
		{"a copy whose beginning was overwritten is wiped", []edit{
			{copies, "slices.Chunk(form, pieceLen)", "slices.Chunk(form[:pieceLen], pieceLen)"},
		}, everyCopy},
		{"a copy that lies where two blocks meet is wiped", []edit{{copies, "at += blockLen - pieceLen", "at += blockLen"}}, everyCopy},
		{"what is looked for is not overwritten before all of it is found", []edit{
			{copies, " || c.isSpared(from)", ""},
		}, everyCopy},
		{"memory that is no copy is not overwritten", []edit{{copies, "if distinct < minDistinct ||", "if false ||"}}, everyCopy},
		{"what a call and the hashes leave of a key in memory is wiped", []edit{
			{copies, "return c.searchAll()", "return nil"},
		}, "./keycache TestWipeAllLeavesNothingOfACall"},
		{"a typo in a recovery key is found", []edit{
			{"keycache/recovery.go", "&& check(g, group[:last]) == group[last]", ""},
		}, "./keycache TestRecoveryKeyTypos"},
		{"groups of a recovery key that changed places are found", []edit{
			{"keycache/recovery.go", "c := byte(g)\n", "c := byte(0)\n"},
		}, "./keycache TestRecoveryKeyTypos"},
		{"the text of a recovery key is wiped where it was read", []edit{
			{"keycache/recovery.go", "\tdefer clear(text)\n", ""},
		}, "./keycache TestParsedTextIsWiped"},
		{"ProtectMemory makes the process undumpable", []edit{{protect, "unix.PR_SET_DUMPABLE, 0,", "unix.PR_SET_DUMPABLE, 1,"}}, "./keycache TestProtectMemory"},
		{"ProtectMemory turns core dumps off", []edit{
			{protect, "err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})", "err := error(nil)"},
		}, "./keycache TestProtectMemory"},
		{"ProtectMemory locks all memory", []edit{
			{protect, "err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)", "err := error(nil)"},
		}, "./keycache TestProtectMemory"},
		{"a preflight refuses the state directories that a run refuses", []edit{
			{"keycache/store.go", "for _, d := range append([]string{\"\"}, s.folders()...) {", "for range 0 {\n\t\tvar d string"},
		}, "./keycache TestCheckDirRefusesWhatOpenStoreRefuses"},
	}
}
