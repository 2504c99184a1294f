package main

// inStories are the protections that only a kernel, or the loss of what was not flushed, can show.
func inStories() []protection {
	const store, protect = "keycache/store.go", "keycache/protect_linux.go"
	return []protection{
		{"a record is on the disk before it has its name",
			[]edit{{store, "return f.Sync()", "return nil"}}, "./test/vm TestPowerCutAtEveryStep"},
		{"the name of a record is on the disk before anything rests on it",
			[]edit{{store, "if err := f.Sync(); err != nil {\n\t\treturn storeError(\"sync\"", "if err := error(nil); err != nil {\n\t\treturn storeError(\"sync\""}}, "./test/vm TestPowerCutAtEveryStep"},
		{"all memory is locked",
			[]edit{{protect, "unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)", "error(nil)"}}, "./test/vm TestSecretsAreWiped"},
		{"other processes cannot read the agent's memory",
			[]edit{{protect, "unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)", "error(nil)"}}, "./test/vm TestSecretsAreWiped"},
		{"memory is searched for copies of keys",
			[]edit{{"keycache/copies_linux.go", "err := wipeCopies(keys)", "err := error(nil)"}}, "./test/vm TestSecretsAreWiped"},
		{"the volume key is wiped",
			[]edit{{"luks/open.go", "func wipe(v *luksgo.Volume) { clear(volumeKey(v)) }", "func wipe(*luksgo.Volume) {}"}}, "./test/vm TestSecretsAreWiped"},
	}
}
