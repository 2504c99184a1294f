//go:build vm

package vm_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/harness"
)

// The disks of TestRecovery that appear later: one for a copy, one with somebody's data.
var (
	copied = harness.Disk{Name: "copied", Model: harness.ModelEBS, Serial: "vol0ccccccccccccccc3", Away: true}
	theirs = harness.Disk{Name: "theirs", Model: harness.ModelEBS, Serial: "vol0ddddddddddddddd4", Away: true}
)

// byID is the link to a disk, whatever the kernel calls it in this boot.
func byID(d harness.Disk) string {
	return "/dev/disk/by-id/nvme-" + strings.ReplaceAll(d.Model, " ", "_") + "_" + d.Serial
}

// TestRecovery runs every command of docs/recovery.md, and README's, as it stands there, each where it is needed.
func TestRecovery(t *testing.T) {
	parallel(t)
	doc := harness.ReadDocument(t, assets, "docs/recovery.md", "README.md")
	n := harness.NewNode(t, assets, "device_wait: 1s\n", ebs1, ebs2, copied, theirs)
	noHotAttach(n)
	n.MakeExt4("theirs", "theirs")
	n.Resume()
	n.AwaitVolumes()
	n.AdministerFromNode()
	r := recovery{t: t, n: n, doc: doc, device: "DEVICE=" + byID(ebs1)}
	r.files = strings.Fields(writeFiles(n, "/mnt", "/mnt1"))

	doc.Run(n, r.device, "node:backup-header", "node:from-record", "node:add-passphrase")
	doc.Run(n, "DEVICE="+byID(ebs2), "node:backup-header", "node:backup-records")
	// The header with one more key slot is still one that the agent opens.
	n.Sh("luks-kms-agent lock")
	r.run("with a passphrase of its owner's")

	r.kms()
	r.withoutAgent()
	r.records()
	r.headers()
	r.twins()
	r.foreign()

	// The next machine has nothing but the data disks, and another KMS key.
	n.PowerOff()
	n.NewBootDisk()
	key := n.CreateKey(map[string]string{"Description": "of the new node"})
	n.Provide(harness.ConfigFile, 0o600, n.ConfigFor(key, "device_wait: 1s\n"))
	n.Boot()
	r.refused("on a new boot disk with another KMS key", "3", "which the configuration does not allow")
	n.AdministerFromNode()
	n.Sh("ls /var/lib/luks-kms-agent/volumes | wc -l | grep -qx 0")
	doc.Run(n, "KEY="+n.Key, "node:allow-key")
	r.run("on a new boot disk")
	r.action("adopt")

	// A clone of it: the records are the other instance's.
	n.PowerOff()
	const clone = "i-0fedcba9876543210"
	n.BecomeInstance(clone)
	n.Provide(harness.ConfigFile, 0o600, n.ConfigFor(key, "device_wait: 1s\nallowed_keys: ["+n.Key+"]\n"))
	n.Boot()
	n.AwaitVolumes()
	r.same("in the clone")
	r.action("adopt")
	if got := n.Sh("ls /var/lib/luks-kms-agent/quarantine/*/volumes | wc -l"); got != "2\n" {
		t.Errorf("%s records of volumes are in quarantine, want 2", strings.TrimSpace(got))
	}
	doc.Run(n, "INSTANCE="+clone, "node:bring-quarantine-back")
	r.run("under the records from quarantine")
	r.action("unlock")
	doc.Run(n, r.device, "node:discard")
	doc.Run(n, r.device, "node:make-blank")
	doc.Run(n, "", "node:run")
	if v := volumes(t, n)[r.point(ebs1)]; v.Action != "format" || v.State != "mounted" {
		t.Errorf("the discarded volume: %+v", v)
	}
	doc.WantAllRun()
}

// recovery is the node of TestRecovery and what has to be true of it after each section of the document.
type recovery struct {
	t      *testing.T
	n      *harness.Node
	doc    *harness.Document
	device string   // "DEVICE=…", of ebs1
	files  []string // digest, path, digest, path of the files on the volumes
}

// run is where most sections end.
func (r *recovery) run(after string) {
	r.t.Helper()
	r.doc.Run(r.n, "", "node:run")
	r.same(after)
}

// same checks that both files are there, wherever their volumes are mounted.
func (r *recovery) same(after string) {
	r.t.Helper()
	got := strings.Fields(r.n.Sh("sha256sum /mnt*/plaintext-file"))
	want := []string{r.files[0], r.files[2]}
	if len(got) != 4 || !slices.Contains(want, got[0]) || !slices.Contains(want, got[2]) || got[0] == got[2] {
		r.t.Fatalf("%s the files are %v, want %v\n%s", after, got, r.files, r.n.Journal())
	}
}

// refused checks that the service does not do without what the document is for.
func (r *recovery) refused(when, code, says string) {
	r.t.Helper()
	r.n.Try("systemctl restart luks-kms-agent.service")
	if got := r.n.AwaitAgent(); got != code {
		r.t.Fatalf("%s the service ended with exit code %s, want %s\n%s", when, got, code, r.n.Journal())
	}
	if journal := r.n.Journal(); !strings.Contains(journal, says) {
		r.t.Errorf("%s the journal does not say %q:\n%s", when, says, journal)
	}
}

// action checks how the volumes were opened by the last run.
func (r *recovery) action(want string) {
	r.t.Helper()
	for point, v := range volumes(r.t, r.n) {
		if v.Action != want {
			r.t.Errorf("%s was opened by %q, want %q", point, v.Action, want)
		}
	}
}

// point is where a disk is mounted.
func (r *recovery) point(d harness.Disk) string {
	r.t.Helper()
	identity := strings.Replace(d.Serial, "vol", "vol-", 1)
	for point, v := range volumes(r.t, r.n) {
		if v.Identity == identity {
			return point
		}
	}
	return ""
}

// rescued checks the file on the volume that the document mounts at a place.
func (r *recovery) rescued(place string) {
	r.t.Helper()
	if got := strings.Fields(r.n.Sh("sha256sum " + place + "/plaintext-file"))[0]; got != r.files[0] {
		r.t.Errorf("without the agent the file is %s, want %s", got, r.files[0])
	}
}

func (r *recovery) kms() {
	key := map[string]any{"KeyId": r.n.Key}
	for _, state := range []struct{ when, op, mend string }{
		{"the KMS key is disabled", "DisableKey", "admin:enable-key"},
		{"the KMS key is to be deleted", "ScheduleKeyDeletion", "admin:cancel-deletion"},
	} {
		r.n.Sh("luks-kms-agent lock")
		r.n.Administer(state.op, key, nil)
		r.refused(state.when, "4", "Enable the key, or cancel its deletion")
		if state.op == "DisableKey" {
			r.doc.Run(r.n, r.device, "node:open-by-passphrase")
			r.rescued("/rescue")
			r.doc.Run(r.n, "", "node:close")
		}
		if out := r.doc.Run(r.n, "KEY="+r.n.Key, state.mend); !strings.HasSuffix(out, "Enabled\n") {
			r.t.Errorf("%s, and then its state is %q", state.when, out)
		}
		r.run(state.when)
	}
}

func (r *recovery) withoutAgent() {
	r.n.Sh("luks-kms-agent lock; chmod -x /usr/bin/luks-kms-agent; systemctl stop luks-kms-agent.service")
	for _, blocks := range [][]string{
		{"node:from-record", "node:open", "node:mount"}, {"node:from-token", "node:open", "node:mount"}, {"node:break-glass", "node:mount"},
	} {
		r.doc.Run(r.n, r.device, blocks...)
		r.rescued("/rescue")
		r.doc.Run(r.n, "", "node:close")
	}
	r.n.Sh("chmod +x /usr/bin/luks-kms-agent")
	r.run("after it was opened without the agent")
}

func (r *recovery) records() {
	const state = "/var/lib/luks-kms-agent/"
	r.n.Sh("luks-kms-agent lock; rm " + state + "keys/*.json")
	r.refused("without the key record", "3", "is missing")
	r.doc.Run(r.n, "", "node:restore-records")
	r.run("after the records were restored")
	r.action("unlock")

	r.n.Sh("luks-kms-agent lock; rm " + state + "keys/*.json")
	for _, d := range []harness.Disk{ebs1, ebs2} {
		r.doc.Run(r.n, "DEVICE="+byID(d), "node:set-record-aside")
	}
	r.run("without records")
	r.action("adopt")

	r.n.Sh("luks-kms-agent lock")
	r.doc.Run(r.n, r.device, "node:set-record-aside", "node:bring-record-back")
	r.run("after a record was set aside and brought back")
	r.action("unlock")

	// An older boot volume: it knows of the volume only that it is being formatted.
	r.n.Sh("luks-kms-agent lock; sed -i 's/\"ready\"/\"formatting\"/' " + state + "volumes/" + volumes(r.t, r.n)[r.point(ebs1)].UUID + ".json")
	r.refused("with a record from before the volume was ready", "3", "the record is older than the volume")
	r.doc.Run(r.n, r.device, "node:set-record-aside")
	r.run("without the older record")
	// Or one volume is gone, and then there is one without a record.
	gone := volumes(r.t, r.n)[r.point(ebs2)].UUID
	r.n.Sh("luks-kms-agent lock")
	r.n.Detach("ebs2")
	r.refused("without a recorded disk", "6", "no disk shows it")
	r.doc.Run(r.n, "UUID="+gone, "node:set-lost-record-aside")
	r.doc.Run(r.n, "", "node:run")
	r.n.Attach("ebs2")
	r.run("with a volume that has no record")
}

func (r *recovery) headers() {
	// A byte of the JSON of each copy. The second copy is behind the first, 16 KiB.
	damage := func(copies ...string) {
		r.n.Sh("luks-kms-agent lock")
		for _, at := range copies {
			r.n.Sh("printf '\\377' | dd of=" + byID(ebs1) + " bs=1 conv=nocreat,notrunc,fsync status=none seek=" + at)
		}
	}
	damage("4200")
	if out := r.doc.Run(r.n, r.device, "node:inspect"); !strings.Contains(out, "the primary header is damaged") {
		r.t.Errorf("inspect says %s", out)
	}
	r.run("after damage of the primary header")
	if out := r.doc.Run(r.n, r.device, "node:inspect"); strings.Contains(out, "damaged") {
		r.t.Errorf("the primary header was not mended: %s", out)
	}

	damage("4200", "20584")
	uuid := "" // cryptsetup cannot say it any more
	for _, v := range volumes(r.t, r.n) {
		if v.Identity == "vol-0aaaaaaaaaaaaaaa1" {
			uuid = v.UUID
		}
	}
	r.refused("with both headers damaged", "7", "Do not use the volume")
	// cryptsetup writes the 16 MiB directly from memory. Where that is in huge pages, the guest's NVMe target, which gets it over
	// its own loopback, trips over the kernel's check of copies (6.1: BUG in usercopy_abort, called by nvmet_tcp).
	r.n.Sh("echo never >/sys/kernel/mm/transparent_hugepage/enabled")
	r.doc.Run(r.n, r.device+"\nBACKUP=/root/"+uuid+".luks-header", "node:restore-header")
	r.run("after the header was restored")
}

func (r *recovery) twins() {
	r.n.Sh("luks-kms-agent lock; sync")
	r.n.Clone("ebs1", "copied")
	r.n.Attach("copied")
	r.refused("with a copy beside the original", "3", "show the same LUKS UUID")
	r.doc.Run(r.n, "COPY=vol-0ccccccccccccccc3", "node:exclude-copy")
	r.run("without the copy")
	r.doc.Run(r.n, "DEVICE="+byID(copied), "node:from-token", "node:open", "node:mount-copy")
	r.rescued("/copy")
	r.doc.Run(r.n, "", "node:unmount-copy")
	r.n.Detach("copied")
}

func (r *recovery) foreign() {
	r.n.Attach("theirs")
	r.refused("with somebody's data", "3", "not blank")
	device := "DEVICE=" + byID(theirs)
	r.doc.Run(r.n, device, "node:make-blank")
	if out := r.n.Agent("inspect " + byID(theirs)); !strings.Contains(out.Stdout, "content: blank") {
		r.t.Errorf("after make-blank: %s", out)
	}
	r.doc.Run(r.n, device, "node:zero-all")
	if got := r.n.Sh("cmp " + byID(theirs) + " /dev/zero 2>&1 || true"); !strings.Contains(got, "EOF on") {
		r.t.Errorf("the disk is not all zero: %s", got)
	}
	r.doc.Run(r.n, "", "node:run")
	if v := volumes(r.t, r.n)[r.point(theirs)]; v.Action != "format" || v.State != "mounted" {
		r.t.Errorf("the disk that was made blank: %+v", v)
	}
	// It stays behind, so that the next boots are about the two volumes.
	r.n.Sh("luks-kms-agent lock")
	r.n.Detach("theirs")
}
