// Package volumes tells which block devices a node has, what they are on EC2,
// what depends on them and what is on them. It reports facts and judges nothing:
// whether a device may be formatted is decided by package agent.
//
// Three questions, three entry points:
//
//   - [Scanner.Scan] reads sysfs, mountinfo and swaps and names every use of a disk
//     with its evidence. What cannot be read is an error, never "unused".
//   - [Probe] proves that a device is blank, or says why it is not.
//   - [Device.Hold] locks a device and proves that it still is the one that was
//     scanned, so that what was decided about one disk is not done to another.
//
// [MakeFilesystem] is the only function that writes to a device.
//
// # Limits
//
// Mounts of other mount namespaces do not show in /proc/self/mountinfo, and some
// users of a raw disk (a database, a virtual machine) leave no trace in sysfs. The
// programs that write, cryptsetup and mkfs, open exclusively and so are refused by
// the kernel for a disk that is mounted elsewhere; a raw user is seen only by what
// it wrote. A scan is a picture of one moment: hold the device and scan again
// before acting on it.
package volumes
