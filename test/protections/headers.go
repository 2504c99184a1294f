package main

// inHeaders are the protections of header backup and restore, verify and wipe, in all rooms.
func inHeaders() []protection {
	const (
		plan    = "agent/plan.go"
		backup  = "agent/backup.go"
		restore = "agent/restore.go"
		verify  = "agent/verify.go"
		wipe    = "agent/wipe.go"
		header  = "luks/backup.go"
		file    = "keycache/backup.go"
		refuses = "./agent TestRestoreRefuses/"
	)
	return []protection{
		// Backups.
		one("a header is backed up only once the data key has opened it",
			backup, "if err := header.Verify(key); err != nil {", "if false {\n\t\tvar err error", "./agent TestBackupProvesItself"),
		one("a header with a damaged copy is not backed up",
			header, "case i.PrimaryDamaged, i.SecondaryDamaged:\n\t\treturn nil, nil,", "case false:\n\t\treturn nil, nil,", "./agent TestBackupProvesItself/a damaged copy"),
		one("a backup is not put on a volume that it would open",
			backup, "if err := w.checkPlace(path); err != nil {", "if false {\n\t\tvar err error", "./agent TestBackupIsNotPutOnAVolume"),
		one("a backup is never overwritten",
			file, "if err := linkNew(tmp, path); err != nil {", "if err := os.Rename(tmp, path); err != nil {", "./keycache TestBackupFile"),
		one("a backup with a changed byte is not accepted",
			file, "if string(members[memberSums]) != sums.String() {", "if false {", "./keycache TestDamagedBackupIsRefused"),
		one("the parts of a backup belong together",
			file, "case m.UUID != b.Volume.UUID || m.Class", "case m.Class", "./keycache TestBackupOfSeveralVolumesIsRefused"),

		// Restore.
		{"a header is restored only once the data key has opened it", []edit{
			{restore, "if err := header.Verify(key); err != nil {", "if false {\n\t\tvar err error"},
			{header, "if err := want.verify(k); err != nil {", "if false {\n\t\tvar err error"},
		}, refuses + "a header that was tampered with"},
		one("what writes a header wants it to open, too",
			header, "if err := want.verify(k); err != nil {", "if false {\n\t\tvar err error", "./luks TestRestoreHeaderProvesBeforeItWrites"),
		one("both copies are torn before the key slots are written",
			header, "w.write(torn(magicPrimary), 0)", "w.write(header[:binarySize], 0)", "./luks TestRestoreHeader"),
		one("a header of another volume is not restored",
			restore, "if header.Header.UUID != b.Volume.UUID {", "if false {", refuses+"a header of another volume under the same key"),
		one("a header is not restored onto a disk in use",
			backup, "case len(d.Uses) > 0:", "case false:", refuses+"it is in use"),
		one("a header is not restored onto another disk of that name",
			restore, "case !same && shows:", "case false && shows:", refuses+"the volume shows on another disk"),
		one("a header is not restored onto a disk of another size",
			restore, "if d.Size != v.Size {", "if false {", refuses+"another size"),
		one("a header is not restored over a filesystem",
			backup, "if !content.Blank && !content.Noise && content.Type != \"crypto_LUKS\" {", "if false {", refuses+"a filesystem"),
		one("a header is not restored over a filesystem before an old secondary",
			backup, "case header.PrimaryForeign:", "case false:", refuses+"a filesystem in front of a secondary header"),
		one("a header is not restored over another LUKS volume",
			backup, "case header.Header != nil && header.Header.UUID != uuid:", "case false:", refuses+"another LUKS volume"),
		one("a header is not restored where another volume is recorded",
			restore, "id != b.Volume.UUID && rec.State != keycache.StateFormatting && sameDisk", "false && sameDisk", refuses+"another volume is recorded on the disk"),
		one("a wipe that was begun is not undone",
			restore, "case rec.State != keycache.StateReady:", "case false:", refuses+"its wipe was begun"),
		one("KMS is asked about the key of a backup only where the configuration allows it",
			restore, "case !d.keyAllowed(b.Key.KeyARN):", "case false:", refuses+"a KMS key that is not allowed"),
		one("what a header replaces is saved",
			restore, "if len(bytes.Trim(present, \"\\x00\")) > 0 {", "if false {", "./agent TestHeaderBackupAndRestore"),

		// Verify.
		one("verify sees a damaged copy",
			verify, "v.check(\"copies\", copiesProblem(header))", "v.check(\"copies\", nil)", "./agent TestVerifyFinds/a damaged secondary copy"),
		one("verify has the data key open the header",
			verify, "v.check(\"mac\", header.Verify(key))", "_ = key", "./agent TestVerifyFinds/a damaged key slot"),
		one("verify sees a token that the record does not know",
			verify, "token.KeyARN != keyRecord.KeyARN || !bytes.Equal(token.WrappedKey, keyRecord.WrappedKey)", "len(token.WrappedKey) == 0 || bytes.Equal(nil, token.WrappedKey)", "./agent TestVerifyFinds/a token that was not rewrapped"),

		// Wipe.
		one("the record says wiping before a byte is wiped",
			wipe, "\t\tif err := w.store.PutVolume(rec); err != nil {\n\t\t\treturn out, err\n\t\t}\n", "", "./agent TestWipeIsCutAtEveryStep"),
		one("a volume whose wipe was begun is left alone by a run",
			plan, "case recorded && rec.State == keycache.StateWiping:", "case false:", "./agent TestWipeIsCutAtEveryStep"),
		one("a record cannot leave wiping",
			"keycache/store.go", "case old.State == StateWiping && r.State != StateWiping:", "case false:", "./keycache TestWipingIsAOneWayDoor"),
		one("nothing is wiped without a yes",
			wipe, "if err := confirm(out); err != nil {", "if err := confirm(out); false {", "./agent TestWipe"),
		one("a volume in use is not wiped",
			wipe, "if err := d.free(); err != nil {", "if false {\n\t\tvar err error", "./agent TestWipeRefuses/in use"),
		one("a disk is held while it is wiped",
			wipe, "hold, err := n.disks.Hold(ctx, d.Device)\n\tif err != nil {\n\t\treturn out, err\n\t}\n\tdefer hold.Close()\n", "", "./agent TestWipeRefuses/held"),
		one("a disk that holds something else is not wiped",
			wipe, "if err := holds(ctx, d.Device, rec.UUID); err != nil {", "if false {\n\t\tvar err error", "./agent TestWipeRefuses/a filesystem"),
		one("a volume is not wiped on another disk than the recorded one",
			wipe, "case shows && !same:", "case shows && false:", "./agent TestWipeRefuses/the volume is on another disk"),
		one("the key slots are wiped, not only the header",
			header, "w.zero(KeyslotsOffset, end)", "w.zero(KeyslotsOffset, KeyslotsOffset)", "./luks TestWipe"),
	}
}
