package main

import "slices"

func inVolumes() []protection {
	return slices.Concat(inProbe(), inFilesystems(), inHold(), inScan(), inUses(), inStripe())
}

// inStripe: which arrays are ours, and which disks may be cleared.
func inStripe() []protection {
	const file, none = "volumes/stripe.go", "./volumes TestArrayThatIsNoStripeOfOurs/"
	return []protection{
		one("an array with another disk in it is not ours",
			file, `len(members) != len(n.slaves) ||`, ``, none+"an EBS volume in it"),
		one("an array that lacks a disk is not ours",
			file, `len(members) != members[0].Member.Disks ||`, ``, none+"not all of its disks"),
		one("an array of disks of two stripes is not ours",
			file, `slices.ContainsFunc(members, func(d Device) bool { return d.Member != members[0].Member }) {`, `false {`, none+"a disk of another stripe in it"),
		one("an array of another level is not ours",
			file, `level != "raid0" ||`, `level == "" ||`, none+"another level"),
		one("an array that does not run is not ours",
			file, `n.size == 0 ||`, ``, none+"it does not run"),
		one("somebody else's array is not ours",
			file, `plain != stripeName ||`, `plain == "" ||`, "./volumes TestParseMember"),
		one("only a disk of the stripe that was cut is cleared",
			file, `now.Stripe != id {`, `now.Stripe == "" {`, "./volumes TestClearMember"),
	}
}

// inProbe: the proof that a disk is blank.
func inProbe() []protection {
	const (
		file  = "volumes/probe.go"
		probe = "./volumes TestProbe/"
		fails = "./volumes TestProbeErrors"
		codes = "./volumes TestBlkidExitCodes"
	)
	return []protection{
		one("what blkid finds is not blank",
			file, `if !content.Blank {`, `if false {`, probe+"ext4"),
		one("what blkid has no name for is not blank if it is not zero",
			file, `if deep == provenZero && offset >= 0 {`, `if false {`, "./volumes TestProbeRemains"),
		one("a disk is only blank if its end is zero",
			file, `offset = size - proofLength`, `break`, probe+"last byte"),
		one("a disk is only blank if its start is zero",
			file, `for offset := int64(0); offset < size; {`, `for offset := max(0, size-proofLength); offset < size; {`, probe+"last byte of the first 16 MiB"),
		one("a disk is only blank if 16 MiB at each end are zero",
			file, `const proofLength = 16 << 20`, `const proofLength = 15 << 20`, probe+"first byte of the last 16 MiB"),
		one("a disk whose ends cannot be read is not blank",
			file, "\t\tif err != nil {\n\t\t\treturn 0, 0, err\n\t\t}\n\t\tif first < 0", "\t\tif first < 0", "./volumes TestUnreadableIsNotBlank"),
		one("that blkid finds nothing on a mapping only counts if both ends can be read",
			file, `if deep >= readable {`, `if deep >= provenZero {`, "./volumes TestUnreadableIsNotBlank"),
		one("what has no size is not blank",
			file, `case actual <= 0:`, `case false:`, fails),
		one("a disk of another size is not the one that was asked about",
			file, `case size != 0 && size != actual:`, `case false:`, fails),
		one("xfs that blkid does not find is an error",
			file, `case string(head[:4]) == "XFSB":`, `case false:`, codes),
		one("ext4 that blkid does not find is an error",
			file, `case le.Uint16(head[1024+56:]) == 0xef53 && le`, `case false && le`, codes),
		one("signatures of several formats are not blank",
			file, `return Content{Detail: "signatures of more than one format"}, nil`, `return Content{Blank: true}, nil`, codes),
		one("a blkid that fails is an error",
			file, `case exit.ExitCode() == 2 && stderr`, `case stderr`, codes),
		one("a blkid that finds nothing and complains is an error",
			file, ` && stderr.Len() == 0`, ``, codes),
		one("a blkid that finds nothing and says something is an error",
			file, ` && stdout.Len() == 0`, ``, codes),
		one("blkid and mkfs get nothing of our environment",
			file, `cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}`, ``, codes),
	}
}

// inFilesystems: making one, and telling whether one was in use.
func inFilesystems() []protection {
	const (
		mkfs    = "volumes/mkfs.go"
		used    = "volumes/used.go"
		refuses = "./volumes TestMakeFilesystemRefuses"
		mounted = "./volumes TestEverMounted"
	)
	return []protection{
		one("no filesystem is made over something",
			mkfs, `if !found.Blank {`, `if false {`, refuses),
		one("mkfs is not forced",
			mkfs, `args = []string{"-q", "-K"}`, `args = []string{"-q", "-K", "-f"}`, refuses),
		one("mkfs is not believed: the filesystem has to be there",
			mkfs, `if found.Type != fstype {`, `if false {`, refuses),
		one("a label that mkfs would cut is refused",
			mkfs, `if len(label) > maxLabel[fstype] {`, `if false {`, refuses),
		one("a disk that is too small for mkfs.xfs is told before anything is written",
			mkfs, `return 300 << 20`, `return 100 << 20`, "./volumes TestLeastSize"),

		one("a filesystem of a kind that is not known counts as used",
			used, `return true, nil`, `return false, nil`, mounted+"/of a kind that is not known"),
		one("ext4 with a time of a mount was used",
			used, `le.Uint32(super[44:]) != 0 || `, ``, mounted+"/ext4 with a time of a mount"),
		one("ext4 with a number of mounts was used",
			used, ` || le.Uint16(super[52:]) != 0`, ``, mounted+"/ext4 with a number of mounts"),
		one("xfs with a record behind that of mkfs was used",
			used, ` && !bytes.Contains(log[512:record], be.AppendUint32(nil, magic))`, ``, mounted+"/xfs with a record behind the first"),
		one("xfs with something far behind the record of mkfs was used",
			used, ` || len(bytes.Trim(log[record:], "\x00")) != 0`, ``, mounted+"/xfs with something far behind the first"),
		one("xfs whose log went round was used",
			used, ` && be.Uint32(log[4:]) == firstCycle`, ` && firstCycle == 1`, mounted+"/xfs whose log went round"),
		one("xfs whose log does not begin with the record of mkfs was used",
			used, `made := be.Uint32(log) == magic && `, `made := `, mounted+"/xfs with another log"),
		one("a superblock that mkfs.xfs does not make is an error",
			used, `if logStart == 0 || groupLog >= 32 || blockSize == 0 || blockSize > 64<<10 {`, `if false && errors.Is(nil, nil) {`, mounted),
		one("an ext4 superblock that cannot be read is an error",
			used, `if _, err := r.ReadAt(super, 1024); err != nil {`, `if _, err := r.ReadAt(super, 1024); false {`, mounted),
		one("a log of xfs that cannot be read is an error",
			used, `if _, err := r.ReadAt(log, int64(at)); err != nil {`, `if _, err := r.ReadAt(log, int64(at)); false {`, mounted),
	}
}

// inHold: that what was decided about one disk is not done to another.
func inHold() []protection {
	const (
		hold     = "volumes/hold.go"
		identity = "./volumes TestHoldVerifiesIdentity"
	)
	return []protection{
		one("a held disk is locked",
			hold, `if err := h.lock(ctx); err != nil {`, `if err := error(nil); err != nil {`, "./volumes TestHoldExcludes"),
		one("the lock of a held disk excludes others",
			hold, `unix.LOCK_EX|unix.LOCK_NB`, `unix.LOCK_SH|unix.LOCK_NB`, "./volumes TestHoldExcludes"),
		one("a held disk is the one that was scanned",
			hold, `if err := h.Recheck(); err != nil { // under`, `if err := h.Recheck(); false { // under`, identity),
		one("a checked disk is the one that was scanned",
			hold, `return h.Recheck()`, `return nil`, identity),
		one("a disk has the number that was scanned",
			hold, `case now.major != d.Major || now.minor != d.Minor:`, `case false:`, identity),
		one("a disk has the sequence number that was scanned",
			hold, `case now.diskSeq != d.DiskSeq:`, `case false:`, identity),
		one("a disk has the size that was scanned",
			hold, `case now.size != d.Size:`, `case false:`, identity),
		one("a disk has the serial that was scanned",
			hold, `case now.serial != d.Serial:`, `case false:`, identity),
		one("a disk that cannot be identified is not held",
			hold, `return fmt.Errorf("cannot identify %s: %w", d.Path, err)`, `return nil`, "./volumes TestHoldFailsClosed"),
		one("what is no block device any more is not held",
			hold, `if st.Mode&unix.S_IFMT != unix.S_IFBLK {`, `if false {`, "./volumes TestHoldNoDevice"),
	}
}

// inScan: which disks there are, and whose they are.
func inScan() []protection {
	const (
		scan     = "volumes/scan.go"
		sysfs    = "volumes/sysfs.go"
		identity = "volumes/identity.go"
		listed   = "./volumes TestDevicesListed"
		unread   = "./volumes TestUnreadableIsAnError/"
	)
	return []protection{
		one("a disk that was not seen is not taken for one that has gone",
			sysfs, "return errors.Is(err, fs.ErrNotExist)\n}\n\nfunc (t *table) addAbove", "return true\n}\n\nfunc (t *table) addAbove", "./volumes TestDiskTakenAwayFromUnderAMapping"),
		one("an NVMe path node is no disk of its own",
			sysfs, `hidden == "1" {`, `hidden == "2" {`, listed),
		one("a partition is no disk",
			sysfs, `case n.parent != "":`+"\n\t\t"+`return "is a partition`, `case false:`+"\n\t\t"+`return "is a partition`, "./volumes TestNamed"),
		one("a mapping is no disk",
			sysfs, `case n.dm:`, `case false:`, listed),
		one("an md array is no disk",
			sysfs, `case n.isArray():`, `case false:`, listed),
		one("memory is no disk",
			sysfs, `case n.hasPrefix("zram", "ram"):`, `case false:`, listed),
		one("a CD or floppy drive is no disk",
			sysfs, `case n.hasPrefix("sr", "fd"):`, `case false:`, listed),
		one("what has no size is no disk",
			sysfs, `case n.size == 0:`, `case false:`, listed),
		one("a loop device is only a data volume by name",
			scan, `return d.Named == "" && onlyNamed(d.Name)`, `return false`, listed),
		one("a disk of another maker is no EBS volume",
			identity, `d.Model == modelEBS:`, `d.Model != modelInstanceStore:`, "./volumes TestClassAndIdentity"),
		one("a disk of another maker is no instance store",
			identity, `d.Model == modelInstanceStore:`, `d.Model != modelEBS:`, "./volumes TestClassAndIdentity"),
		one("a Xen disk that IMDS does not name is no instance store",
			identity, `if name := strings.TrimPrefix(e, "/dev/"); name != "" && unitOf(name) == unitOf(d.Name) {`, `if name := strings.TrimPrefix(e, "/dev/"); name != "" {`, "./volumes TestClassAndIdentity"),
		one("a namespace that others may be attached to is told",
			identity, `identify[nmicOffset]&nmicShared != 0`, `false`, "./volumes TestParseShared"),
		one("a name that the controller tells is a name",
			identity, ` || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {`, ` {`, "./volumes TestParseMappingName"),
		one("a name that means two disks means none",
			scan, `return 0, fmt.Sprintf("means both %s and %s", devices[found[0]].Name, devices[found[1]].Name), nil`, `return found[0], "", nil`, "./volumes TestNamed"),
		one("a disk with two names is a mistake",
			scan, `case reason == "" && devices[i].Named != "":`, `case reason == "" && false:`, "./volumes TestNamed"),
		one("the empty name is no disk's",
			scan, "if name == \"\" {\n\t\treturn false", "if name == \"\" && false {\n\t\treturn false", "./volumes TestIs"),

		one("a disk that cannot be read ends the scan",
			sysfs, `return fmt.Errorf("cannot read device %s: %w", e.Name(), err)`, `continue`, unread+"device number unreadable"),
		one("holders that cannot be read end the scan",
			sysfs, `return fmt.Errorf("cannot read what is built on %s: %w", n.name, err)`, `continue`, unread+"partition's holders unreadable"),
		one("slaves that cannot be read end the scan",
			sysfs, `if n.slaves, err = readNames(dir + "/slaves"); err != nil {`, `if n.slaves, err = readNames(dir + "/slaves"); false {`, unread+"slaves unreadable"),
		one("something built on a disk that is not there ends the scan",
			sysfs, `return fmt.Errorf("cannot find %s, which %s is built on: %w", under, n.name, errUnsettled)`, `continue`, unread+"slave that was not seen"),
		one("a partition of a disk that is not there ends the scan",
			sysfs, `return fmt.Errorf("cannot find the disk %s of partition %s: %w", n.parent, n.name, errUnsettled)`, `continue`, unread+"partition of a disk that does not exist"),
		one("a loop device whose file cannot be told ends the scan",
			sysfs, `return fmt.Errorf("cannot read what %s is backed by: %w", n.name, err)`, `continue`, unread+"loop's file unreadable"),
		one("members of btrfs that cannot be read end the scan",
			sysfs, "continue // \"features\", or unmounted since\n\t\t}\n\t\tif err != nil {", "continue // \"features\", or unmounted since\n\t\t}\n\t\tif false {", unread+"btrfs members unreadable"),
		one("a member of btrfs that does not show ends the scan",
			sysfs, `return fmt.Errorf("cannot find %s, a member of btrfs %s: %w", name, id, errUnsettled)`, `continue`, unread+"btrfs member that does not exist"),
		one("links that cannot be read end the scan, for a disk may be excluded by one",
			sysfs, "continue // udev took the last link out\n\t\t}\n\t\tif err != nil {", "continue // udev took the last link out\n\t\t}\n\t\tif false {", unread+"links unreadable"),
		one("write protection that cannot be read ends the scan",
			sysfs, `return fail("the write protection", err)`, ``, unread+"write protection unreadable"),
		one("a file of sysfs that cannot be read is not one that is absent",
			sysfs, `if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {`+"\n\t\treturn \"\", nil", `if err != nil {`+"\n\t\treturn \"\", nil", unread+"loop's file unreadable"),
	}
}

// inUses: what is in use is known to be.
func inUses() []protection {
	const (
		uses   = "volumes/uses.go"
		sysfs  = "volumes/sysfs.go"
		mounts = "volumes/mounts.go"
		seen   = "./volumes TestUses/"
		unread = "./volumes TestUnreadableIsAnError/"
	)
	return []protection{
		one("the disk of / is the system's",
			uses, `paths := []string{"/", `, `paths := []string{`, seen+"root on an unpartitioned disk"),
		one("the disk of /boot/efi is the system's",
			uses, `"/boot/efi", `, ``, seen+"NVMe boot disk with partitions, the only disk"),
		one("the disk of /usr is the system's",
			uses, `"/usr", `, ``, seen+"loop chain: /usr in a file on a disk"),
		one("the disk of /var is the system's",
			uses, `, "/var"}`, `}`, seen+"/var on its own dm"),
		one("the disk of the state directory is the system's",
			uses, `if stateDir != "" {`, `if false {`, seen+"state directory on its own disk"),
		one("a system path is followed over links",
			uses, `if resolved[i], err = t.resolve(path); err != nil {`, `if resolved[i] = path; err != nil {`, seen+"/var/lib is a link to another disk"),
		one("a system path whose disk is not known ends the scan",
			uses, `if err := t.markMount(m, UseSystem, path); err != nil {`, `if err := t.markMount(m, UseSystem, path); false {`, unread+"/var on an unknown device"),
		one("a system path without a mount ends the scan",
			uses, `return fmt.Errorf("cannot tell which disk holds %s: no mount for it in mountinfo", path)`, `continue`, unread+"empty mountinfo"),
		one("a disk that something is mounted from is in use",
			uses, `_ = t.mark(o.node, use)`, `_ = use`, seen+"xfs with its log on another disk"),
		one("a disk with partitions is in use",
			uses, `t.addUse(disk, Use{UsePartitioned, n.name, n.name + " is a partition of " + disk})`, ``, seen+"partitions without mounts"),
		one("a disk that something is built on is in use",
			uses, `t.addUse(disk, Use{UseHeld, above, words + " is built on " + n.name + suffix})`, `_, _ = words, suffix`, "./volumes TestOpenMapping"),
		one("what is built on a disk is known by its slaves alone",
			sysfs, `t.addAbove(under, n.name)`, ``, seen+"slaves or holders alone suffice"),
		one("what is built on a disk is known by its holders alone",
			sysfs, `for _, above := range holders {`, `for _, above := range holders[:0] {`, seen+"slaves or holders alone suffice"),
		one("what is built on a disk counts where it is not seen itself",
			sysfs, `t.addAbove(n.name, above)`, `_ = above`, seen+"slaves or holders alone suffice"),
		one("a use of a partition is one of its disk",
			uses, `down(t.nodes[n.parent], `, `_ = (`, seen+"NVMe boot disk with partitions, the only disk"),
		one("a use of a mapping or array is one of the disks below",
			uses, `down(t.nodes[s], `, `_ = (`, seen+"root on md"),
		one("a use of a loop device is one of the disk that its file is on",
			uses, `if n.file != "" {`, `if false {`, seen+"loop chain: /usr in a file on a disk"),
		one("a loop device that lies on a disk holds it",
			sysfs, `n.slaves = append(n.slaves, under.name)`, ``, seen+"loop over a disk, mounted and not"),
		one("compressed swap holds the disk that it writes back to",
			sysfs, `case strings.HasPrefix(n.name, "zram"):`, `case false:`, seen+"compressed swap that writes back to a disk"),
		one("what cannot be traced to a disk ends the scan",
			uses, `failed = err`+"\n\t\t\t}\n\t\t\tfor", `_ = err`+"\n\t\t\t}\n\t\t\tfor", unread+"/usr on a loop over an untraceable file"),
		one("what lies on itself ends the scan",
			uses, `return fmt.Errorf("%s lies on itself", n.name)`, `return nil`, unread+"/usr on a loop over a file inside of it"),

		one("a disk of swap is in use",
			uses, `if err := t.mark(n, Use{UseSwap, s.path, "swap is on " + n.describe()}); err != nil {`, `if err := error(nil); err != nil {`, seen+"swap on dm, by another name"),
		one("a disk of a swap file is in use",
			uses, `if err := t.markMount(m, UseSwap, s.path); err != nil {`, `if err := error(nil); m.id < 0 {`, seen+"swap partition and swap file"),
		one("swap on an unknown device ends the scan",
			uses, `return fail(errUnsettled)`, `continue`, unread+"swap on an unknown device"),
		one("swaps that cannot be read end the scan",
			mounts, "return nil, nil // a kernel without swap\n\t}\n\tif err != nil {\n\t\treturn nil, err", "return nil, nil // a kernel without swap\n\t}\n\tif err != nil {\n\t\treturn nil, nil", unread+"swaps unreadable"),
		one("swaps that cannot be understood end the scan",
			mounts, `return nil, fmt.Errorf("cannot understand %s: line %q", path, line)`, `continue`, unread+"swaps garbled"),
		one("a mapping is known by its name where its link is missing",
			sysfs, `if n.dm && n.dmName == name {`, `if n.dm && n.dmName == name && false {`, seen+"swap on dm, whose link udev did not make"),
		one("a mount that cannot be understood ends the scan",
			mounts, `return nil, fmt.Errorf("cannot understand %s: %w", path, err)`, `continue`, unread+"mountinfo garbled"),
		one("what the kernel escapes in mounts is read",
			mounts, `point: unescape(f[4])`, `point: f[4]`, seen+"loop chain: /usr in a file on a disk"),
		one("of mounts on one point all count",
			uses, `len(found) > 0 && len(m.point) > len(found[0].point)`, `len(found) > 0 && len(m.point) >= len(found[0].point)`, seen+"of two mounts on one point both count"),
		one("a mount point is no other's by the start of its name",
			uses, `strings.HasPrefix(path, m.point+"/")`, `strings.HasPrefix(path, m.point)`, seen+"state directory on its own disk"),

		one("a disk of the log of xfs is in use",
			uses, `append(m.option("logdev"), m.option("rtdev")...)`, `m.option("rtdev")`, seen+"xfs with its log on another disk"),
		one("all members of bcachefs are in use",
			uses, `strings.Split(m.source, ":")`, `strings.Split(m.source, ":")[:1]`, seen+"bcachefs over two disks"),
		one("all members of btrfs are in use (those of any that is mounted are, too)", uses,
			`for _, n := range members {`+"\n\t\t\t\torigins", `for _, n := range members[:1] {`+"\n\t\t\t\torigins", seen+"btrfs root over two disks, of which mountinfo names one"),
		one("any mounted btrfs can be a root that does not say where it is",
			uses, `if named == nil || slices.Contains(members, named) {`, `if slices.Contains(members, named) {`, seen+"btrfs root that calls itself /dev/root"),
		one("btrfs that is mounted where nobody sees it is in use",
			uses, `t.mark(n, Use{UseMounted, "btrfs " + id,`, `_ = (Use{UseMounted, "btrfs " + id,`, seen+"btrfs that is mounted where we do not see it"),
		one("btrfs of unknown disks ends the scan",
			uses, `if m.fstype == "btrfs" || m.fstype == "bcachefs" {`, `if false {`, unread+"data on btrfs of an unknown device"),
		one("a filesystem that is on no known disk is not one without a disk",
			uses, `if !strings.HasPrefix(source, "/dev/") {`+"\n\t\t\treturn nil, unknown", `if !strings.HasPrefix(source, "/dev/") {`+"\n\t\t\treturn nil, nil", unread+"/var on zfs"),
		one("the disks of an overlay are in use",
			uses, `case m.fstype == "overlay":`+"\n\t\t"+`return t.underOverlay(m, append(over, m.id))`, `case m.fstype == "overlay":`+"\n\t\treturn nil, nil", seen+"overlay root"),
		one("the disks of the upper layer of an overlay are in use",
			uses, `append(m.option("upperdir"), m.option("workdir")...)`, `append([]string(nil), m.option("workdir")...)[:0]`, seen+"overlay root"),
		one("an overlay whose layers do not show ends the scan",
			uses, `if len(layers) == 0 {`, `if false {`, unread+"/var an overlay without layers"),
		one("an overlay over a layer that cannot be seen ends the scan",
			uses, ` || !t.exists(layer) {`, ` {`, unread+"/var an overlay over a layer that is not visible"),
		one("an overlay over a relative layer ends the scan",
			uses, `if !filepath.IsAbs(layer) || `, `if `, unread+"/var an overlay over a relative layer"),
		one("an overlay over nothing but itself ends the scan",
			uses, `if len(mounts) == 0 {`+"\n\t\t\treturn nil, hidden", `if len(mounts) == 0 {`+"\n\t\t\tcontinue", unread+"/var an overlay over itself"),
		{"a mounted filesystem whose log device is gone keeps its disk in use",
			[]edit{{"volumes/uses.go", "return origins, fmt.Errorf(", "return nil, fmt.Errorf("}}, "./volumes TestUses"},
	}
}
