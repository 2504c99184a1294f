// Package channel is what the harness on the host and the program in the guest say to each other: one JSON value per
// request and per response over a virtio-serial port, and the manifest that the guest reads from a disk at every boot.
package channel

import "time"

const (
	// Port is the name of the virtio-serial port.
	Port = "org.luks-kms-agent.story"
	// ManifestSerial is the serial of the virtio disk that begins with the JSON of a Manifest.
	ManifestSerial = "manifest"
	// BootSerial is the serial of the boot disk where that is on virtio.
	BootSerial = "boot"
)

// Op is what a Request asks for.
type Op string

// The operations of the guest program.
const (
	Exec Op = "exec" // run Command with bash; Stdin is its standard input
	Put  Op = "put"  // write Data to Path with Mode, through a rename
	Get  Op = "get"  // read Path
)

// Request asks the guest for one thing. Requests run at the same time as one another.
type Request struct {
	ID      int
	Op      Op
	Command string        `json:",omitempty"`
	Stdin   []byte        `json:",omitempty"`
	Timeout time.Duration `json:",omitempty"` // of Exec; everything that the command started is killed then
	Path    string        `json:",omitempty"`
	Mode    uint32        `json:",omitempty"`
	Data    []byte        `json:",omitempty"`
}

// Response answers the Request of the same ID.
type Response struct {
	ID     int
	Code   int    // exit code of Exec; -1 where a signal or the timeout ended it
	Stdout []byte `json:",omitempty"`
	Stderr []byte `json:",omitempty"`
	Data   []byte `json:",omitempty"` // of Get
	Error  string `json:",omitempty"` // why the request could not be carried out; empty where it was
}

// Manifest is what a guest makes of itself before the agent starts, the same at every boot but for Tree.
type Manifest struct {
	Tree  []byte `json:",omitempty"` // tar.gz, below /, before Files; in the first boot of a new boot disk
	Files []File
	Disks []Disk // connected in this order, which is what decides their kernel names
}

// File is written below / before the agent starts.
type File struct {
	Path string
	Mode uint32
	Data []byte
}

// Disk is one disk that the guest shows to the agent, on top of a virtio disk that is its storage.
type Disk struct {
	Virtio string // serial of the virtio disk
	Model  string // NVMe: the model that identify-controller reports
	Serial string // NVMe: the serial; at most 20 bytes
	Loop   string // "/dev/loop0": a plain loop device instead of an NVMe disk

	// Table is device-mapper's, put between the storage and what the agent sees; [Storage] in it stands for the virtio disk.
	// Empty puts nothing between.
	Table      string
	SectorSize int  // logical, bytes; 0 leaves it as the virtio disk has it, 512
	Away       bool // it appears only when the guest program is told to attach it
}

// Storage stands in a device-mapper table for the disk below.
const Storage = "STORAGE"

// Cost is what a command that `guest meter` ran has cost the machine.
type Cost struct {
	Seconds        float64 // from its start to its end
	MountedSeconds float64 // from its start to the last time that something was mounted; 0 where nothing was
	CPUSeconds     float64 // of all processors, whoever worked
	Processes      int     // that ended meanwhile, the command's own included
	LargestKiB     int64   // peak resident memory of the largest of them
	SumKiB         int64   // the same of those that lived at the same time
}
