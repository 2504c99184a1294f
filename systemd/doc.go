// Package systemd is the agent's side of the service manager: it tells systemd how the run goes (sd_notify), writes to its journal, and mounts and
// unmounts so that systemd orders it. The unit files luks-kms-agent.service and
// luks-kms-agent.target lie beside it.
//
// A mount is mount(2), and a drop-in for the unit that systemd makes of it. Where systemd knows something of the mount point already, or
// the agent is in a mount namespace of its own, as the service is, it is a transient mount unit over D-Bus. In both cases the mount is in the host's
// namespace, has a unit that consumers can name in RequiresMountsFor=, and is taken down in order at shutdown.
//
// # Order of a mount unit
//
// The boot and the shutdown of one mount:
//
//	start:  luks-kms-agent.service runs, and while it runs: the mount  ->  luks-kms-agent.target  ->  consumers
//	stop:   consumers  ->  luks-kms-agent.target  ->  the mount  ->  umount.target
//
// The unit therefore is Before=luks-kms-agent.target: the target stops before the unmount, and consumers, which are
// After= the target, stop before the target. It must not be After=luks-kms-agent.service: a oneshot service is
// "starting" until its process ends, so the mount's job would wait for the agent and the agent for the mount's job.
// Nothing is lost by that: the service has no ExecStop=, so stopping it does nothing that the mount could need.
//
// DefaultDependencies=no, because the defaults order a mount before local-fs.target, which the service is after: the
// opposite of what happens, and one more order (a drop-in with After=luks-kms-agent.service) closes a cycle, which systemd
// breaks by dropping a job. The one default that matters, to be unmounted by umount.target, is set by hand.
//
// The package imports no sibling, and knows nothing of LUKS or KMS.
package systemd
