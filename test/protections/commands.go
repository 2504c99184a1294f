package main

// The exit code decides whether systemd tries again, and whether consumers start.
func inCommands() []protection {
	const (
		errs      = "cmd/luks-kms-agent/errors.go"
		root      = "cmd/luks-kms-agent/root.go"
		flags     = "cmd/luks-kms-agent/flags.go"
		run       = "cmd/luks-kms-agent/run.go"
		inspect   = "cmd/luks-kms-agent/inspect.go"
		importEMR = "cmd/luks-kms-agent/importemr.go"
		emr       = "agent/emr.go"

		codes = "./cmd/luks-kms-agent TestExitCodesAndRemedies"
		wiped = "./cmd/luks-kms-agent TestOnlyForeignContentMayBeWiped"
	)
	return []protection{
		{"a recovery key is not written to what is no terminal", []edit{
			{"cmd/luks-kms-agent/recoverykey_add.go", "if !add.forceStdout && !screenOf", "if false && !screenOf"},
		}, "./cmd/luks-kms-agent TestScripts/recovery-key"},
		{"a recovery key is typed unseen", []edit{
			{"cmd/luks-kms-agent/recoverykey.go", "term.IsTerminal(int(f.Fd())) {\n\t\tfmt", "false {\n\t\tfmt"},
		}, "./cmd/luks-kms-agent TestRecoveryKeyIsTypedUnseen"},
		{"a terminal echoes again after an interrupt", []edit{
			{"cmd/luks-kms-agent/recoverykey.go", "errors.Join(context.Cause(ctx), term.Restore(fd, before))", "errors.Join(context.Cause(ctx), func(int, *term.State) error { return nil }(fd, before))"},
		}, "./cmd/luks-kms-agent TestInterruptedTypingRestoresTheTerminal"},
		{"memory is protected before a key is read", []edit{
			{root, "err := keycache.ProtectMemory()", "err := (&keycache.Error{}).Err"},
		}, "./cmd/luks-kms-agent TestMemoryIsProtectedBeforeAKeyIsRead"},
		{"a command of which a part failed has failed", []edit{{errs, "if len(errs) == 0 {", "if true {"}}, codes},
		{"what is unavailable is tried again (5)", []edit{{errs, "if kms.Retryable() {", "if false {"}}, codes},
		{"a store in use is tried again (5)", []edit{
			{errs, "case errors.Is(err, keycache.ErrLocked):\n\t\treturn exitUnavailable\n", ""},
		}, codes},
		{"KMS's refusal is not tried again (4)", []edit{
			{errs, "return exitKMSDenied\n\tcase errors.Is(err, keycache.ErrOtherKey)", "return exitUnavailable\n\tcase errors.Is(err, keycache.ErrOtherKey)"},
		}, codes},
		{"a malformed key is a wrong configuration (2)", []edit{{errs, "if kms.Reason == keycache.ReasonInvalid {", "if false {"}}, codes},
		{"a key that KMS does not give back is no internal error (4)", []edit{
			{errs, "case errors.Is(err, keycache.ErrOtherKey):\n\t\treturn exitKMSDenied\n", ""},
		}, codes},
		{"a wrong command line, configuration or name is not tried again (2)", []edit{
			{errs, "errors.As(err, &place), errors.As(err, &typo):\n\t\treturn exitUsage", "errors.As(err, &place), errors.As(err, &typo):\n\t\treturn exitUnavailable"},
		}, codes},
		{"a refused volume is told (3)", []edit{{errs, "\t\t}\n\t\treturn exitRefused\n", "\t\t}\n\t\treturn exitOK\n"}}, codes},
		{"an unreadable record is told (3)", []edit{
			{errs, "case errors.As(err, &record), errors.Is(err, volumes.ErrNotEmpty), errors.Is(err, agent.ErrRotating):\n\t\treturn exitRefused", "case errors.As(err, &record), errors.Is(err, volumes.ErrNotEmpty), errors.Is(err, agent.ErrRotating):\n\t\treturn exitOK"},
		}, codes},
		{"a missing disk is told (6)", []edit{
			{errs, "case agent.RefusedDevice, agent.RefusedStripe:\n\t\t\treturn exitDevice\n", ""},
		}, codes},
		{"a failure of a device, a mount or the store is told (6)", []edit{
			{errs, "return exitDevice\n\t}\n\treturn exitInternal", "return exitOK\n\t}\n\treturn exitInternal"},
		}, codes},
		{"a header that the plan refused is told (7)", []edit{
			{errs, "case agent.RefusedHeader:\n\t\t\treturn exitHeader\n", ""},
		}, codes},
		{"a header that is tampered with, or that the key does not open, is told (7)", []edit{
			{errs, "errors.Is(err, luks.ErrWrongKey):\n\t\treturn exitHeader", "errors.Is(err, luks.ErrWrongKey):\n\t\treturn exitUnavailable"},
		}, codes},
		{"a missing program or kernel feature is told (8)", []edit{
			{errs, "case errors.Is(err, luks.ErrNoCryptsetup), errors.Is(err, luks.ErrNoDMCrypt),\n\t\terrors.Is(err, volumes.ErrNoProgram), errors.Is(err, systemd.ErrNoSystemd):", "case false:"},
		}, codes},
		{"of several failures the one that passes decides, so that it is tried again", []edit{
			{errs, "exitUnavailable, exitKMSDenied, exitHeader,", "exitKMSDenied, exitHeader, exitUnavailable,"},
		}, "./cmd/luks-kms-agent TestMostUrgentCodeWins"},
		{"a tampered header is not hidden by a lesser failure", []edit{
			{errs, "exitHeader, exitMissing, exitDevice, exitRefused,", "exitMissing, exitDevice, exitRefused, exitHeader,"},
		}, "./cmd/luks-kms-agent TestMostUrgentCodeWins"},
		{"nobody is sent to start the service again where KMS is unavailable", []edit{
			{errs, `return unavailableHint(e) + " " + triesAgain`, "return unavailableHint(e)"},
		}, "./cmd/luks-kms-agent TestRemediesOfWhatMayPass"},
		{"nobody is told to wipe a volume whose header is refused", []edit{
			{errs, "case agent.RefusedHeader:\n\t\treturn \"Do not", "case \"\":\n\t\treturn \"Do not"},
		}, wiped},
		{"nobody is told to wipe a volume whose record cannot be read", []edit{
			{errs, "case agent.RefusedRecord:", "case \"\":"},
		}, wiped},
		{"nobody is told to wipe a disk that others may use", []edit{
			{errs, "case agent.RefusedShared:", "case \"\":"},
		}, wiped},
		{"nobody is told to wipe a disk that is missing or too small", []edit{
			{errs, "case agent.RefusedDevice:\n\t\treturn \"Attach", "case \"\":\n\t\treturn \"Attach"},
		}, wiped},
		{"the remedy for a tampered header is not to use the volume", []edit{
			{errs, "case errors.As(err, &header):\n\t\treturn \"Do not use the volume. ", "case errors.As(err, &header):\n\t\treturn \""},
		}, wiped},
		{"a command line that cannot be understood is no success, and not tried again (2)", []edit{
			{flags, "return &usageError{err}\n}\n\n// suggestionDistance", "return err\n}\n\n// suggestionDistance"},
		}, "./cmd/luks-kms-agent TestScripts/usage"},
		{"an unknown log format or level is a usage error", []edit{
			{flags, "if !slices.Contains(c.allowed, value) {", "if !slices.Contains(c.allowed, value) && false {"},
		}, "./cmd/luks-kms-agent TestScripts/usage"},
		{"import-emr never overwrites a file", []edit{
			{importEMR, "os.O_WRONLY|os.O_CREATE|os.O_EXCL", "os.O_WRONLY|os.O_CREATE|os.O_TRUNC"},
		}, "./cmd/luks-kms-agent TestScripts/import-emr"},
		{"import-emr passes over no field that it does not know", []edit{
			{emr, "		if !ok {\n			return e.fail(f.offset, \"unknown", "		if !ok && false {\n			return e.fail(f.offset, \"unknown"},
			{emr, "if err := read(join(path, f.name), f.value); err != nil {", "if !ok {\n\t\t\tcontinue\n\t\t}\n\t\tif err := read(join(path, f.name), f.value); err != nil {"},
		}, "./agent TestMalformedEMR"},
		{"import-emr takes no field that stands twice", []edit{
			{emr, "if seen[f.name] {", "if false {"},
		}, "./agent TestMalformedEMR"},
		{"import-emr takes no key of a configuration that encrypts nothing", []edit{
			{emr, "case !atRest:\n\t\te.leave(path, \"EnableAtRestEncryption is not true: EMR itself encrypts nothing under this configuration\")\n\t\te.nothing", "case false:\n\t\te.nothing"},
		}, "./agent TestEMRKeysThatCannotBeUsed"},
		{"import-emr takes no key of a cluster that the logs would not be under", []edit{
			{"agent/emr_cluster.go", "e.leave(\"Cluster\", \"logs: %v\", err)\n\t\treturn", "l.KMSKey = \"\""},
		}, "./agent TestImportEMRCluster"},
		{"run does not ignore an argument that was to narrow it", []edit{
			{run, "Args: args(cobra.NoArgs),\n", ""},
		}, "./cmd/luks-kms-agent TestNothingIsIgnored"},
		{"inspect passes no header that fails the strict check", []edit{{inspect, "if i.Pass() {", "if true {"}}, "./cmd/luks-kms-agent TestScripts/inspect"},
		{"inspect calls only blank what is proven blank", []edit{
			{inspect, "case content.Blank:", `case content.Type == "":`},
		}, "./cmd/luks-kms-agent TestScripts/inspect"},
		{"inspect has an exit code for what it refuses", []edit{
			{inspect, "return found.failure(names[0])", "return nil"},
		}, "./cmd/luks-kms-agent TestScripts/inspect"},
	}
}
