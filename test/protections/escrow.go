package main

// What keeps copies of headers and records off the node, and takes none that somebody changed.
func inEscrow() []protection {
	const objects, client, archive, escrow, apply = "archive/objects.go", "archive/client_side.go", "archive/archive.go", "agent/escrow.go", "agent/apply.go"
	return []protection{
		one("an object is never overwritten", objects, `IfNoneMatch: aws.String("*"), `, ``, "./archive TestPutNeverOverwrites"),
		one("what is there already is compared", objects, "case existed != nil && o.SHA256 != digest:", "case false:", "./archive TestPutNeverOverwrites"),
		one("a PUT's answer has to say the encryption", objects, "if err == nil && c.options.Mode == SSE {", "if false {", "./archive TestPutHasToSay"),
		one("a HEAD has to say the encryption", objects, "		return c.check(o.Encryption)\n	})\n	return o, err", "		return nil\n	})\n	return o, err", "./archive TestServerThatDoesNotEncrypt/it_lies"),
		one("an object in the clear is not read", objects, "if err := c.check(o.Encryption); err != nil {\n			return err\n		}\n		data, err", "data, err", "./archive TestServerThatDoesNotEncrypt"),
		one("encryption under another key is none", objects, "case e.KeyARN != c.options.KeyARN:", "case false:", "./archive TestServerThatDoesNotEncrypt/it_takes_another_key"),
		one("the content is what was put", objects, `o.SHA256 != "" && o.SHA256 != hex`, `false && o.SHA256 != hex`, "./archive TestTampered/another_SHA-256"),
		one("a bucket of another account gets nothing", objects, "ExpectedBucketOwner: c.owner(), Body", "Body", "./archive TestFaults/another_account"),
		one("nothing is opened without its own context", client, "req.KeyringAlg != wrapping || len(description) != 1 || ", "req.KeyringAlg != wrapping || ", "./archive TestTampered/more_in_the_context"),
		one("a data key under another key's name is not used", client, " || description[contextKey] != m.keyARN {", " {", "./archive TestTampered/another_key's_ARN"),
		one("nothing is looked for beside an object", client, "if _, ok := clientKey(metadata); !ok {", "if false {", "./archive TestNoInstructionFile"),
		one("a cipher that protects nothing is refused", client, " || metadata[metaContent] != contentGCM {", " {", "./archive TestTampered/a_cipher_without_a_tag"),
		one("the data key of an object is wiped", client, "func (m *manager) wipe() { clear(m.key) }", "func (m *manager) wipe() {}", "./archive TestDataKeyIsWiped"),
		one("no proxy of the environment gets what is sent", archive, "		Transport: &http.Transport{\n", "		Transport: &http.Transport{\n			Proxy: http.ProxyFromEnvironment,\n", "./archive TestNoProxy"),
		one("an AWS managed key is refused", archive, `case strings.Contains(o.KeyARN, "alias/aws/"):`, "case false:", "./archive TestCheck"),

		one("what is sent opens", escrow, "	if err := header.Verify(key); err != nil {\n		return err\n	}\n	if err := w.store.PutEscrow(note); err != nil {", "	_ = key\n	if err := w.store.PutEscrow(note); err != nil {", "./agent TestEscrowOfAForgedHeader"),
		one("what is to be sent is noted before", escrow, "	if err := w.store.PutEscrow(note); err != nil {\n		return err\n	}\n	w.reached", "	w.reached", "./agent TestEscrowIsCut"),
		one("only what S3 confirmed is noted as safe", escrow, "		if p.Err == nil {\n			p.Err = n.confirm(store, p.note)\n		}", "		p.Err = errors.Join(p.Err, n.confirm(store, p.note))", "./agent TestEscrowIsCut"),
		one("a copy in the clear is passed over", escrow, "			if d.Header != nil && d.Header.Header != nil {\n				return o.Err == nil && o.UUID", "			if d.Header != nil && d.Header.Header != nil {\n				return o.UUID", "./agent TestNewestCopyThatCounts"),
		one("what changed is escrowed at once", "agent/audit.go", "n.changed.Store(true)", "", "./agent TestEscrowIsSentAfterAChange"),
		one("a volume waits for its escrow", apply, "if err := a.holdBack(ctx, act, open); err != nil {", "if err := a.holdBack(ctx, act, open); err != nil && false {", "./agent TestEscrowRequired"),
		one("a volume that waits is closed", apply, "return errors.Join(err, a.maps.Close(context.WithoutCancel(ctx), mapping))\n	}\n	return a.mount(ctx, act, mapping)", "return err\n	}\n	return a.mount(ctx, act, mapping)", "./agent TestEscrowRequired"),
		one("a piece of a log that S3 did not take waits", "agent/logs.go", "if p.err != nil {\n				failed", "if p.err != nil && false {\n				failed", "./agent TestLogsWait"),
		one("pieces of logs do not fill the memory", "agent/logs.go", "|| len(next) > 0 && size > pieceMemory {", "{", "./agent TestPiecesAreSentTogether"),
		one("a piece of a log that S3 has is not sent again", "agent/logs.go", "if err := spool.Done(p.Piece); err != nil {", "if err := error(nil); err != nil {", "./agent TestLogsAreCutInTheMiddle"),
		one("lines are kept although the bucket cannot be used", "agent/logs.go", "		errs = append(errs, err) // what is new is collected all the same, as far as there is room\n", "		return done, err\n", "./agent TestLogsOfBadInput/AWS's_key"),
		one("the encryption of a log is confirmed by who may look, or it waits", objects, `return c.classify("Head", c.URL(name), err) //`, `return nil //`, "./agent TestLogsNeedWhatIsDocumented/logs_archive_without_GetObject"),
		one("what a kill left of a piece does not count", "archive/logs/logs.go", "if err := os.Remove(s.path(e.Name())); err != nil {", "if err := error(nil); err != nil {", "./archive/logs TestBadSpool"),
		one("what a power cut took of a log is not read again", "archive/logs/collect.go", "case copied == nil && len(written) > 0 && bytes.HasPrefix(p.Head, written):", "case false && len(written) > 0:", "./archive/logs TestPowerCut"),
		one("a piece is known together with the position behind it", "archive/logs/collect.go", "	s.state.Positions[i] = behind\n", "", "./archive/logs TestFollow"),
		one("pieces of a spool that begins anew have names of their own", "archive/logs/collect.go", `"%s/%s-%06d-%020d.gz", sourceName("files", p.Path), s.state.Spool`, `"%s/%.0s%06d-%020d.gz", sourceName("files", p.Path), s.state.Spool`, "./agent TestLogsStatus"),
		one("an image gets no spool", "agent/seal.go", "	for _, path := range pieces {\n", "	for _, path := range pieces[:0] {\n", "./agent TestLogsStatus"),
		one("no image is sealed while logs are archived", "agent/seal.go", "			s.Refused = append(s.Refused, err)\n		} else {\n			defer release()", "		} else {\n			defer release()", "./agent TestLogsStatus"),
		one("a spool that is cleared by half is none", "archive/logs/logs.go", "[]string{dir, filepath.Join(dir, spoolDir)}", "[]string{filepath.Join(dir, spoolDir), dir}", "./archive/logs TestFiles"),
		one("a spool that is closed is free at once", "archive/logs/logs.go", "_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)\n", "", "./archive/logs TestClosedIsUnlocked"),
		one("a line that is longer than a piece is not lost", "archive/logs/collect.go", "return append(line, part[:room]...), false, nil", "return line, false, nil", "./archive/logs TestPiecesAndLongLines"),
		one("a copy is no file that overwrites another", escrow, "	there, rerr := keycache.ReadBackup(path)\n	if rerr != nil || there.Manifest != b.Manifest {\n		return err\n	}\n", "", "./agent TestFetchOverwritesNothing"),
	}
}
