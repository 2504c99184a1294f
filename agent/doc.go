// Package agent joins the rooms: it reads the configuration, observes the node
// (block devices, LUKS headers, records on the boot volume, identity), decides
// what is to be done with every volume, does it, and writes down how it went.
//
// The decision is [Decide]: a pure function from [Facts] to a [Plan]. Every
// command that touches a volume goes through it, so `plan` shows exactly what
// `run` would do. Nothing here knows the LUKS format, the KMS protocol, sysfs or
// D-Bus; those are in packages luks, keycache, volumes and systemd.
//
// Four rules hold on every path:
//
//   - Before a byte is written to a disk, the wrapped key and a volume record in
//     state "formatting" are durable on the boot volume and KMS Decrypt has given
//     back the very key that is about to lock the disk.
//   - A volume whose record is "ready" is never formatted and never gets a new
//     filesystem.
//   - An error is never "blank": what cannot be read is refused.
//   - One volume's failure never stops the others.
package agent
