package main

// The unit files are no Go: what protects there is kept by TestServiceKeepsTheDesign, which cannot be tried here.
func inSystemd() []protection {
	const (
		direct = "systemd/direct.go"
		mount  = "systemd/mount.go"
		notify = "systemd/notify.go"

		makes     = "./systemd TestStartMountMakesATransientUnit"
		occupied  = "./systemd TestStartMountWhereSomethingIs"
		malformed = "./systemd TestMountIsChecked"
		without   = "./systemd TestMountWithoutAJob"
		known     = "./systemd TestSystemdMountsWhatItKnows/"
	)
	return []protection{
		one("what systemd has a unit for is not mounted past it",
			direct, `err != nil || known[name] {`, `err != nil || known[name] && false {`, known+"a unit in memory"),
		one("what a unit file masks or defines is not mounted past it",
			direct, `range d.units {`, `range d.units[:0] {`, known+"a mask"),
		one("nothing is mounted through a symbolic link",
			direct, `err != nil || real != mnt.Where {`, `err != nil || real == "" {`, known+"a symbolic link"),
		one("nothing is mounted over a mount",
			direct, `d.mounted(mnt.Where); err != nil || mounted {`, `d.mounted(mnt.Where); err != nil || mounted && false {`, known+"something mounted"),
		one("a systemd that would not read the drop-in mounts by itself",
			direct, `version < leastVersion {`, `version < 1 {`, known+"old systemd"),
		one("a mount of our own stands before consumers start, and until they have stopped",
			direct, `target, umountTarget, umountTarget)`, `umountTarget, umountTarget, umountTarget)`, without),
		one("the umask does not close mount points",
			direct, `return os.Chmod(path, os.FileMode(directoryMode))`, `return nil`, without),
		one("what a disk calls itself adds no line to a unit",
			mount, `if r < ' ' || r == 0x7f || r == '\\' {`, `if false {`, without),
		one("what systemd does not know of yet is unmounted too",
			direct, `err = d.unmount(where)`, ``, without),
		{"a new mount pushes no other job out", []edit{
			{mount, `m.conn.StartTransientUnitContext(ctx, name, "fail",`, `m.conn.StartTransientUnitContext(ctx, name, "replace",`},
		}, makes},
		{"a mount that is taken up pushes no other job out", []edit{
			{mount, `m.conn.StartUnitContext(ctx, name, "fail",`, `m.conn.StartUnitContext(ctx, name, "replace",`},
		}, occupied},
		{"a mount is not ordered before local-fs.target", []edit{{mount, "property(\"DefaultDependencies\", false),\n", ""}}, makes},
		{"a mount stands before consumers start, and until they have stopped", []edit{
			{mount, "sdbus.PropBefore(target, umountTarget)", "sdbus.PropBefore(umountTarget)"},
		}, makes},
		{"a mount is unmounted at shutdown", []edit{{mount, "sdbus.PropConflicts(umountTarget),\n", ""}}, makes},
		{"a mount does not wait for the agent that waits for it", []edit{
			{mount, "sdbus.PropConflicts(umountTarget),", `sdbus.PropConflicts(umountTarget), sdbus.PropAfter("luks-kms-agent.service"),`},
		}, "./systemd TestPropertiesNeverWaitForTheAgent"},
		{"only root may write to a mount point that is made", []edit{
			{mount, "directoryMode uint32 = 0o755", "directoryMode uint32 = 0o777"},
		}, makes},
		{"mount options are not lost", []edit{{mount, "if len(mnt.Options) > 0 {", "if false {"}}, makes},
		{"another device's filesystem is not taken for the volume's", []edit{
			{mount, "if !sameDevice(u.what, mnt.What) || u.fstype != mnt.Type {", "if u.fstype != mnt.Type {"},
		}, occupied},
		{"another filesystem is not taken for the volume's", []edit{
			{mount, "if !sameDevice(u.what, mnt.What) || u.fstype != mnt.Type {", "if !sameDevice(u.what, mnt.What) {"},
		}, occupied},
		{"two names are one device only where the numbers are the same", []edit{
			{mount, "x, okX := deviceNumber(a)", "_, okX := deviceNumber(a)"},
			{mount, "y, okY := deviceNumber(b)", "_, okY := deviceNumber(b)"},
			{mount, "return okX && okY && x == y", "return okX && okY"},
		}, "./systemd TestSameDevice"},
		{"what is no device is not the same as another", []edit{
			{mount, "if err != nil || info.Mode()&os.ModeDevice == 0 {", "if err != nil {"},
		}, "./systemd TestSameDevice"},
		{"a mount unit of somebody else's, or a mask, is not mounted over (the mask and the unit)", []edit{
			{mount, `case u.load == "masked":`, "case false:"},
			{mount, `case u.load != "not-found" && !u.transient:`, "case false:"},
		}, occupied},
		{"an earlier mount of another device is not taken up", []edit{
			{mount, "if u.what != mnt.What || u.fstype != mnt.Type {", "if false {"},
		}, occupied},
		{"an answer without a state is not taken for nothing mounted", []edit{
			{mount, `if s.load == "" || s.active == "" {`, "if false {"},
		}, occupied},
		{"a mount job that did not succeed is no mount", []edit{
			{mount, `if result == "done" {`, `if result != "" {`},
		}, "./systemd TestStartMountReportsTheJob"},
		{"an unmount that did not succeed is told", []edit{
			{mount, `if result == "done" {`, `if result != "" {`},
		}, "./systemd TestStopMount"},
		{"waiting for a job ends with the context", []edit{
			{mount, "case <-ctx.Done():", "case <-context.Background().Done():"},
		}, "./systemd TestStartMountEndsWithItsContext"},
		{"nothing is mounted on the root filesystem", []edit{{mount, `case p == "/":`, "case false:"}}, malformed},
		{"the root filesystem is not unmounted", []edit{
			{mount, "if err := checkPath(where); err != nil {", "if err := checkPath(where); err != nil && false {"},
		}, "./systemd TestStopMount"},
		{"paths are absolute and clean", []edit{{mount, "case !path.IsAbs(p) || path.Clean(p) != p:", "case !path.IsAbs(p) && path.IsAbs(p):"}}, malformed},
		{"a path is no second line of a unit", []edit{
			{mount, "case strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }):", "case false:"},
		}, malformed},
		{"a mount option is one option, and no second line of a unit", []edit{
			{mount, "if o == \"\" || strings.ContainsFunc(o, func(r rune) bool { return r == ',' || r <= ' ' || r == 0x7f }) {", "if false {"},
		}, malformed},
		{"systemd does not guess the filesystem", []edit{{mount, `if mnt.Type == "" {`, "if false {"}}, malformed},
		{"the text of a status is no message of its own to systemd", []edit{
			{notify, "return r == '\\n' || r == '\\r'", "return false"},
		}, "./systemd TestNotifySendsWhatSystemdReads"},
		{"the time to start is never shortened", []edit{
			{notify, "if d < time.Microsecond {", "if false {"},
		}, "./systemd TestNotifySendsWhatSystemdReads"},
	}
}
