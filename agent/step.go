package agent

// step is a point between two writes: a power cut there leaves just what stands
// before it. The next run has to make a whole node of each of them, with the
// same key and without formatting a volume that was ready.
type step string

// The steps, in the order in which a first boot, and then what else there is, reaches them.
const (
	stepQuarantined step = "records of another instance are moved aside"
	stepKeyMade     step = "the data key is made"
	stepKeyRecorded step = "the key record is durable"
	stepKeyProven   step = "the data key is proven"
	stepArchived    step = "the record of a lost volume is archived"
	stepIntent      step = "the record says formatting"
	stepFormatted   step = "the LUKS header and token are written"
	stepOpened      step = "the volume is open"
	stepCleared     step = "both ends of the volume are zero"
	stepFilesystem  step = "the filesystem is made"
	stepReady       step = "the record says ready"
	stepAdoptedKey  step = "the key record of an adopted volume is durable"
	stepAdopted     step = "the record of an adopted volume is durable"
	stepRestored    step = "the primary header is restored"
	stepRewrapped   step = "the key record is rewrapped"
	stepReplaced    step = "the token is replaced"
	stepRotating    step = "the record says which key slot will be the data key's"
	stepSlotAdded   step = "the new key slot is added"
	stepTokenMoved  step = "the token names the new key slot"
	stepSlotRemoved step = "the old key slot is removed"
	stepRotated     step = "the record names the new data key"
	stepKeyArchived step = "the old key record is archived"
	stepWiped       step = "the keys are wiped"

	stepBackedUp        step = "the header backup is durable"
	stepBackupNoted     step = "the header backup is noted"
	stepEscrowNoted     step = "what goes to the escrow is noted"
	stepEscrowConfirmed step = "the escrow is confirmed"

	stepHeaderSaved   step = "what the header replaces is saved"
	stepBackupKey     step = "the key record of a backup is durable"
	stepBackupRecord  step = "the volume record of a backup is durable"
	stepTorn          step = "both header copies are torn"
	stepSlotsBack     step = "the key slots are restored"
	stepSecondaryBack step = "the secondary header is restored from a backup"
	stepHeaderBack    step = "the header is restored from a backup"

	stepRecoverySlot      step = "the slots of the recovery key are proven"
	stepRecoveryShown     step = "the recovery key is shown"
	stepRecoveryToken     step = "the recovery token is written"
	stepRecoverySlotGone  step = "the slot of a recovery key is removed"
	stepRecoveryTokenGone step = "the token of a recovery key is removed"

	stepWipeIntent   step = "the record says wiping"
	stepSlotsWiped   step = "the key slots are wiped"
	stepHeaderWiped  step = "both header copies are wiped"
	stepBlank        step = "the wiped disk is blank"
	stepWipeArchived step = "the record of a wiped volume is archived"

	stepStripeIntent  step = "the intent to make a stripe is durable"
	stepStripeMade    step = "the stripe is made"
	stepMemberCleared step = "a disk of a stripe that was cut is blank"

	stepSealRemoved     step = "the records without an attached volume are removed"
	stepSealQuarantined step = "the records of attached volumes are moved aside"
	stepSealCleared     step = "a trace of this node is removed"
)

// reached tells whoever listens that a step is done; only tests do.
func (n *Node) reached(s step) {
	if n.atStep != nil {
		n.atStep(s)
	}
}
