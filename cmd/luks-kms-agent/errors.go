package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os/exec"
	"strings"
	"syscall"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
	"github.com/luks-kms-agent/luks-kms-agent/archive"
	"github.com/luks-kms-agent/luks-kms-agent/archive/logs"
	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/luks"
	"github.com/luks-kms-agent/luks-kms-agent/systemd"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// Exit codes. They are part of the interface and never get another meaning; exitCodes says which.
const (
	exitOK          = 0
	exitInternal    = 1
	exitUsage       = 2
	exitRefused     = 3
	exitKMSDenied   = 4
	exitUnavailable = 5 // the unit is restarted on this one
	exitDevice      = 6
	exitHeader      = 7
	exitMissing     = 8
)

// exitCodes are what help, the man pages and README.md say of the exit codes.
var exitCodes = []struct {
	code    int
	meaning string
}{
	{exitOK, "all as planned"},
	{exitInternal, "internal error"},
	{exitUsage, "usage or configuration"},
	{exitRefused, "a volume was refused"},
	{exitKMSDenied, "KMS or S3 said no: permissions, key state, key kind, encryption"},
	{exitUnavailable, "KMS, S3, IMDS or the records are away for now; the service tries again"},
	{exitDevice, "device or filesystem error"},
	{exitHeader, "tampered or damaged LUKS header"},
	{exitMissing, "a needed program or kernel feature is missing"},
}

// failedError is a command of which parts failed, each with its own cause.
type failedError struct{ errs []error }

func (e *failedError) Error() string { return errors.Join(e.errs...).Error() }

// failures is nil where nothing failed.
func failures(errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	return &failedError{errs: errs}
}

// byUrgency orders exit codes where several things failed: first what passes by
// itself, so that it is tried again, then what needs a person most.
var byUrgency = []int{exitUnavailable, exitKMSDenied, exitHeader, exitMissing, exitDevice, exitRefused, exitUsage, exitInternal}

// exitCode is the one place that turns an error into an exit code.
func exitCode(err error) int {
	var (
		failed   *failedError
		usage    *usageError
		config   *agent.ConfigError
		unknown  *agent.UnknownVolumeError
		emr      *agent.EMRError
		nothing  *agent.EMRNothingError
		refused  *agent.RefusedError
		kms      *keycache.Error
		store    *keycache.StoreError
		record   *keycache.RecordError
		header   *luks.HeaderError
		mount    *systemd.MountError
		swap     *systemd.SwapError
		program  *exec.ExitError
		errno    syscall.Errno
		timeline *agent.TimelineError
		unready  *unreadyError
		backup   *keycache.BackupError
		place    *agent.BackupPlaceError
		typo     *keycache.RecoveryKeyError
		there    *agent.RecoveryKeyThereError
		s3       *archive.Error
	)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &unready):
		return unready.code
	case errors.As(err, &failed):
		codes := map[int]bool{}
		for _, e := range failed.errs {
			codes[exitCode(e)] = true
		}
		for _, code := range byUrgency {
			if codes[code] {
				return code
			}
		}
		return exitInternal
	case errors.As(err, &usage), errors.As(err, &timeline), errors.As(err, &config), errors.As(err, &unknown), errors.As(err, &emr), errors.As(err, &place), errors.As(err, &typo):
		return exitUsage
	case errors.As(err, &nothing), errors.As(err, &there), errors.Is(err, luks.ErrNoRecoveryKey), errors.Is(err, luks.ErrWrongRecoveryKey):
		return exitRefused
	case errors.Is(err, agent.ErrInImage):
		return exitUsage
	case errors.Is(err, agent.ErrUnsaved):
		return exitRefused
	case errors.As(err, &refused):
		switch refused.Refusal {
		case agent.RefusedHeader:
			return exitHeader
		case agent.RefusedDevice, agent.RefusedStripe:
			return exitDevice
		}
		return exitRefused
	case errors.As(err, &s3):
		return escrowCode(s3)
	case errors.Is(err, agent.ErrNoEscrow), errors.Is(err, agent.ErrNoLogs):
		return exitUsage
	case errors.Is(err, logs.ErrLocked):
		return exitUnavailable
	case errors.As(err, &kms):
		if kms.Retryable() {
			return exitUnavailable
		}
		if kms.Reason == keycache.ReasonInvalid {
			return exitUsage
		}
		return exitKMSDenied
	case errors.Is(err, keycache.ErrOtherKey):
		return exitKMSDenied
	case errors.Is(err, keycache.ErrLocked):
		return exitUnavailable
	case errors.As(err, &header), errors.Is(err, luks.ErrWrongKey):
		return exitHeader
	case errors.Is(err, luks.ErrNoCryptsetup), errors.Is(err, luks.ErrNoDMCrypt),
		errors.Is(err, volumes.ErrNoProgram), errors.Is(err, systemd.ErrNoSystemd):
		return exitMissing
	case errors.Is(err, luks.ErrNoCipher), errors.Is(err, agent.ErrOldSystemd), errors.Is(err, agent.ErrNoUnit):
		return exitMissing
	case errors.As(err, &backup) && !errors.As(err, &errno) && !errors.Is(err, fs.ErrExist):
		return exitRefused // the file can be read, and is not accepted
	case errors.As(err, &record), errors.Is(err, volumes.ErrNotEmpty), errors.Is(err, agent.ErrRotating):
		return exitRefused
	case errors.As(err, &backup), errors.As(err, &store), errors.As(err, &mount), errors.As(err, &swap), errors.Is(err, volumes.ErrChanged), errors.Is(err, luks.ErrBusy), errors.Is(err, luks.ErrNoKeySlot), errors.Is(err, agent.ErrNoFilesystem),
		errors.Is(err, fs.ErrNotExist), errors.Is(err, agent.ErrNothingRan), errors.As(err, &program), errors.As(err, &errno):
		return exitDevice
	}
	return exitInternal
}

// hint says what to do about an error, "" where there is nothing to add.
func hint(err error) string {
	var (
		usage    *usageError
		config   *agent.ConfigError
		unknown  *agent.UnknownVolumeError
		emr      *agent.EMRError
		nothing  *agent.EMRNothingError
		refused  *agent.RefusedError
		kms      *keycache.Error
		store    *keycache.StoreError
		mount    *systemd.MountError
		swap     *systemd.SwapError
		header   *luks.HeaderError
		timeline *agent.TimelineError
		backup   *keycache.BackupError
		place    *agent.BackupPlaceError
		typo     *keycache.RecoveryKeyError
		there    *agent.RecoveryKeyThereError
		s3       *archive.Error
	)
	switch {
	case preflightHint(err) != "":
		return preflightHint(err)
	case errors.As(err, &timeline):
		return "Give it a timeline.json that an agent of this version wrote, or none for that of the last run."
	case errors.Is(err, agent.ErrNothingRan):
		return "See `systemctl status luks-kms-agent`: a run that is under way writes it when it ends."
	case errors.As(err, &typo):
		return "It is eight groups of five characters; compare the group with what was written down. Capitals, dashes and spaces do not matter."
	case errors.As(err, &there):
		return "Use --replace to put a new one in its place, or `luks-kms-agent recovery-key test` to see whether yours is the one."
	case errors.Is(err, luks.ErrNoRecoveryKey):
		return "Run `luks-kms-agent recovery-key list` to see which volumes have one. Only while KMS gives the data key can one be added."
	case errors.Is(err, luks.ErrWrongRecoveryKey):
		return "It is well written, but another volume's, or was replaced. `luks-kms-agent recovery-key test` tries all volumes; `list` tells since when each has its key."
	case errors.As(err, &usage):
		return "Run `luks-kms-agent --help`, or `luks-kms-agent COMMAND --help`, to see what is allowed."
	case errors.As(err, &config) && errors.Is(err, fs.ErrNotExist):
		return fmt.Sprintf("Write %s; the smallest one is a line: `kms_key: arn:aws:kms:REGION:ACCOUNT:key/ID`.", config.Path)
	case errors.As(err, &config) && errors.Is(err, fs.ErrPermission):
		return "Run the agent as root."
	case errors.As(err, &config):
		return fmt.Sprintf("Correct %s; `luks-kms-agent plan` then shows what it means, and touches nothing.", config.Path)
	case errors.Is(err, agent.ErrNoFilesystem):
		return "The data was overwritten, or the volume wiped. The volume is closed; what the header replaced is saved beside the backup."
	case errors.Is(err, agent.ErrUnsaved):
		return "Give --save-records FILE, on another disk, to keep them, or --discard-records if their volumes may be lost. Or attach the volumes: then the records go to quarantine."
	case errors.Is(err, agent.ErrInImage):
		return "Name a file on another disk, or below /run and copy it away at once."
	case errors.As(err, &place):
		return "Name a directory that is there when the volume is not, best on another machine's disk."
	case errors.As(err, &backup) && errors.Is(err, fs.ErrExist):
		return "Name another file; a backup is never overwritten."
	case errors.As(err, &backup) && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EROFS)):
		return "Name a file or directory that is there, can be used by root, and has room for 3 MiB per volume. No volume was touched."
	case errors.As(err, &backup):
		return "Use another backup of this volume, or take this one apart by hand (docs/records.md). No volume was touched."
	case errors.As(err, &unknown):
		return "Run `luks-kms-agent status` to see the volumes and their names."
	case errors.As(err, &emr) && emr.Cluster:
		return "Give --cluster the JSON that EMR has: `aws emr describe-cluster --cluster-id ID`."
	case errors.As(err, &emr):
		return "Give the JSON that EMR has: `aws emr describe-security-configuration --name NAME --query SecurityConfiguration --output text`."
	case errors.As(err, &nothing):
		return "No configuration was written. To encrypt all the same, write one by hand: `kms_key: arn:aws:kms:REGION:ACCOUNT:key/ID`."
	case errors.As(err, &refused):
		return refusedHint(refused)
	case errors.As(err, &s3):
		return escrowHint(s3)
	case errors.Is(err, agent.ErrNoLogs):
		return "Write a section logs into the configuration: `logs: {bucket: NAME, cluster: NAME, files: [/var/log/*.log*]}`. See docs/logs.md."
	case errors.Is(err, logs.ErrLocked):
		return "Wait for the other one: `systemctl status luks-kms-agent-logs`."
	case errors.Is(err, agent.ErrNoEscrow):
		return "Write a section escrow into the configuration; the smallest one is a line: `escrow: {bucket: NAME}`. docs/escrow.md has the policies."
	case errors.As(err, &kms):
		return kmsHint(kms)
	case errors.Is(err, keycache.ErrOtherKey):
		return notKMS
	case errors.Is(err, keycache.ErrLocked):
		return "Another luks-kms-agent is at work; wait for it (`systemctl status luks-kms-agent`) and try again; if it only waits for KMS, `systemctl stop luks-kms-agent` lets a recovery key in."
	case errors.Is(err, luks.ErrNoCryptsetup):
		return "Install cryptsetup (package cryptsetup-bin or cryptsetup). No volume was touched."
	case errors.Is(err, luks.ErrNoDMCrypt):
		return "Load the kernel module dm_crypt (`modprobe dm_crypt`) or use a kernel that has it. No volume was touched."
	case errors.Is(err, volumes.ErrNoProgram):
		return "Install the package that has the program (util-linux, xfsprogs, e2fsprogs or, for stripes, mdadm), or choose the other filesystem. No volume was touched."
	case errors.Is(err, systemd.ErrNoSystemd):
		return "Mounts are made by systemd: run the agent on a machine that systemd has booted."
	case errors.As(err, &header):
		return "Do not use the volume. Restore its LUKS header from a backup, or find out who could write to the disk; see docs/troubleshooting.md."
	case errors.Is(err, luks.ErrWrongKey):
		return "The data key of the record does not open this header: the record or the header is not the volume's own."
	case errors.As(err, &store) && errors.Is(err, syscall.ENOSPC):
		return "Free space on the filesystem of the state directory and run the agent again. No record was lost."
	case errors.As(err, &store) && errors.Is(err, syscall.EROFS):
		return "Make the state directory writable (is the boot volume mounted read-only after an error?) and run the agent again. No record was lost."
	case errors.As(err, &store) && errors.Is(err, fs.ErrPermission):
		return "Run the agent as root."
	case errors.As(err, &store):
		return "The state directory must be a directory of root's with mode 0700. Nothing in it was changed."
	case errors.As(err, &swap) && swap.Off:
		return "What is swapped out needs free memory: stop what uses it, and lock again. The volume is as it was."
	case errors.As(err, &swap):
		return "The volume is open. See `systemctl status` of the swap unit, then run `luks-kms-agent unlock` again."
	case errors.As(err, &mount):
		return "The volume is open. See `systemctl status` of the mount unit, then run `luks-kms-agent unlock` again."
	case errors.Is(err, agent.ErrRotating):
		return "Run `luks-kms-agent rotate` to end that, and then this again."
	case errors.Is(err, luks.ErrNoKeySlot):
		return "Remove a key slot that nobody needs: `cryptsetup luksDump` lists them, `cryptsetup luksKillSlot` removes one; never the token's."
	case errors.Is(err, luks.ErrBusy):
		return "Stop what uses the volume (`fuser -vm MOUNT_POINT`) and try again."
	case errors.Is(err, fs.ErrPermission):
		return "Run the agent as root."
	}
	return ""
}

func refusedHint(e *agent.RefusedError) string {
	switch e.Refusal {
	case agent.RefusedHeader:
		return "Do not use the volume. Restore its LUKS header from a backup, or find out who could write to the disk; see docs/troubleshooting.md."
	case agent.RefusedRecord:
		return "Look at the record; put back a good copy, or move it to the archive directory beside it: a volume with our token is then adopted."
	case agent.RefusedInUse:
		return "Run `luks-kms-agent lock` for the volume, or unmount and close what uses the disk, and try again. Nothing was written to it."
	case agent.RefusedBackup:
		return "Use the backup of that volume. Nothing was written to it. For a copy of the volume or a grown disk: docs/recovery.md, \"A header is damaged\"."
	case agent.RefusedWiping:
		return "Run `luks-kms-agent wipe` for the volume again: it goes on where it was cut. Until then nothing touches the disk."
	case agent.RefusedShared:
		return "Add it to `exclude:`; or, if no other instance ever has it attached, set `multi_attach: allow`. Nothing was written to it."
	case agent.RefusedStripe:
		return "Run `luks-kms-agent stripe`, which makes and assembles stripes; at boot luks-kms-agent-stripe.service does, and its journal says why it did not. See docs/stripe.md."
	case agent.RefusedDevice:
		return "Attach the disk (a larger or writable one, if that is what it says), or take it out of the configuration; `luks-kms-agent plan` shows what is there."
	}
	return "Nothing was written to it. If it is not meant for the agent, add it to `exclude:`; if its content may go, `wipefs -a` and zero it by hand."
}

func kmsHint(e *keycache.Error) string {
	switch e.Reason {
	case keycache.ReasonDenied:
		return deniedHint(e) + " No volume was touched."
	case keycache.ReasonNotFound:
		return "Check kms_key and region: that key does not exist there. No volume was touched."
	case keycache.ReasonAWSManaged:
		return "Use a customer managed key: AWS managed keys (alias/aws/…) cannot be used by your own nodes. No volume was touched."
	case keycache.ReasonAsymmetric:
		return "Use a symmetric key (SYMMETRIC_DEFAULT, ENCRYPT_DECRYPT): only those make data keys. No volume was touched."
	case keycache.ReasonKeyState:
		return "Enable the key, or cancel its deletion, in KMS; then run the agent again. No volume was touched."
	case keycache.ReasonWrongRegion:
		return "kms_key and region must name the same region. No volume was touched."
	case keycache.ReasonCiphertext:
		return "KMS does not take the wrapped key: the record was damaged, or made under another key. Restore the record from a backup."
	case keycache.ReasonInvalid:
		return "Correct kms_key: a key ARN, a key id, alias/NAME or an alias ARN."
	case keycache.ReasonAnswer:
		return notKMS
	case keycache.ReasonIMDS:
		return "IMDSv2 must be on for the instance, with a hop limit that reaches this host (1; 2 from containers). " + triesAgain
	case keycache.ReasonNoCredentials:
		if e.RequestID != "" {
			return "KMS does not accept the role's credentials: was the role deleted, or made just now? " + triesAgain
		}
		return "Attach an instance profile whose role may use the key. " + triesAgain
	case keycache.ReasonClock:
		return "Set the node's clock (chrony or systemd-timesyncd; EC2's time service is 169.254.169.123). " + triesAgain
	case keycache.ReasonUnavailable:
		return unavailableHint(e) + " " + triesAgain
	}
	return ""
}

// deniedHint names the permission that is missing.
func deniedHint(e *keycache.Error) string {
	action, key := "kms:"+e.Op, e.Object()
	switch {
	case e.Op == "ReEncrypt":
		return "Allow kms:ReEncryptFrom on the old key, kms:ReEncryptTo on the new one and kms:Decrypt on both to the node's role, in its IAM policy and in both key policies."
	case key == "":
		key = "the key"
	case strings.Contains(key, "alias/"):
		key = "the key behind " + key
	}
	return fmt.Sprintf("Allow %s on %s to the node's role, in its IAM policy and in the key policy (README, \"Policies\").", action, key)
}

// notKMS is the hint for answers that KMS does not give.
const notKMS = "What answers is not KMS, or not for the key that was asked for: check kms_endpoint, DNS and what lies between. No volume was touched."

// triesAgain ends the hint of what may pass.
const triesAgain = "The service tries again by itself."

func unavailableHint(e *keycache.Error) string {
	var (
		certificate *tls.CertificateVerificationError
		dns         *net.DNSError
	)
	switch {
	case errors.As(e, &certificate):
		return "The certificate of KMS's endpoint is not one that this node trusts: install ca-certificates, set the clock, " +
			"or find out who answers in KMS's place."
	case errors.As(e, &dns):
		return "The name of KMS's endpoint cannot be resolved: check DNS (/etc/resolv.conf), or the VPC endpoint's private DNS."
	case strings.Contains(e.Code, "Throttl"), strings.Contains(e.Code, "LimitExceeded"), e.Code == "TooManyRequestsException":
		return "The account's request quota for KMS is used up: see Service Quotas, and what else calls KMS."
	case e.Code != "":
		return "KMS answers, but cannot serve the call now: see AWS Health and, for a key in a custom key store, the state of the store."
	}
	return "Check the route, DNS and security groups to KMS (or its VPC endpoint)."
}

// escrowCode is the exit code of what S3, or KMS behind it, answered.
func escrowCode(err *archive.Error) int {
	switch {
	case err.Retryable():
		return exitUnavailable
	case err.Reason == archive.ReasonTampered:
		return exitHeader
	case err.Reason == archive.ReasonExists, err.Reason == archive.ReasonNotFound:
		return exitRefused
	case err.Reason == archive.ReasonInvalid, err.Reason == archive.ReasonNoBucket, err.Reason == archive.ReasonWrongRegion, err.Reason == archive.ReasonAWSManaged:
		return exitUsage
	}
	return exitKMSDenied
}

// escrowHint says what to do about what S3, or KMS behind it, answered.
func escrowHint(err *archive.Error) string {
	switch err.Reason {
	case archive.ReasonDenied:
		return "Allow the role s3:PutObject and s3:GetObject on the bucket's objects and s3:ListBucket on the bucket, and see that bucket_owner is the account that has it (docs/escrow.md, docs/logs.md)."
	case archive.ReasonKMSDenied:
		return "Allow the role kms:GenerateDataKey, and kms:Decrypt to read it back, on the key of the bucket's objects (docs/escrow.md, docs/logs.md)."
	case archive.ReasonKey:
		return "See that the key of the bucket's objects is there, enabled, and in the bucket's region. What was not sent is sent once it is."
	case archive.ReasonAWSManaged:
		return "Make a customer managed key, and name its ARN."
	case archive.ReasonNoBucket:
		return "See that the bucket's name is right; the agent makes no buckets."
	case archive.ReasonWrongRegion:
		return "Set the region to the bucket's, and take a key of that region."
	case archive.ReasonEncryption:
		return "Trust nothing that lies there. If it was sent just now it may be in the clear: find out who answers as S3, remove the object, and see the bucket's policy (docs/escrow.md)."
	case archive.ReasonTampered:
		return "Somebody changed the object, or put another one in its place. An older copy may be whole: `luks-kms-agent escrow list`."
	case archive.ReasonExists:
		return "Something else lies under that name; nothing is overwritten. Remove it, or choose another prefix."
	case archive.ReasonClock:
		return "Set the node's clock (chrony, systemd-timesyncd)."
	case archive.ReasonUnavailable, archive.ReasonNoCredentials:
		return "It is tried again by the timer, luks-kms-agent-escrow.timer or luks-kms-agent-logs.timer. From a subnet without a way out S3 needs a gateway endpoint."
	}
	return "See docs/escrow.md."
}
