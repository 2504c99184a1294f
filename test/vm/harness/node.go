package harness

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
	"github.com/luks-kms-agent/luks-kms-agent/test/vm/proxy"
)

// Where the guest finds its servers. KMS is plain HTTP: TLS is the SDK's business.
const (
	IMDSAddress = "169.254.169.254:80"
	KMSAddress  = "169.254.169.250:8080"
	KMSEndpoint = "http://" + KMSAddress
)

// ConfigFile is where the agent's configuration is.
const ConfigFile = "/etc/luks-kms-agent/config.yaml"

// TB is what a node needs of a test; the demo has its own.
type TB interface {
	Helper()
	Name() string
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(func())
}

// Node is one machine with its disks and its own IMDS and KMS. Its methods end the story when they fail.
type Node struct {
	KMS  *proxy.KMS
	IMDS *proxy.IMDS
	Key  string // ARN of the KMS key that Config names
	// Processors is how many it has from the next boot on; 0 is those of the assets. A copy of the snapshot has always these.
	Processors int

	tb      TB
	assets  *Assets
	servers *servers
	dir     string // images and sockets, removed at the end
	logs    string // console and journal, kept where the story fails
	disks   []Disk
	faults  map[string][]Fault // by disk
	files   []channel.File
	tree    []byte // what the next boot disk has of the last one
	vm      *machine
	boots   int
	others  map[string]string // servers on the host, by their address in the guest

	losing *rand.Rand // decides what a power cut takes of writes that were not flushed; nil where it takes none
	cut    Cut        // what the last one took
}

// NewNode makes a node that is switched off, with an empty KMS but for one key, and with an agent that is configured to
// use it: config is added to the one line that names the key and the one that names the endpoint.
func NewNode(tb TB, a *Assets, config string, disks ...Disk) *Node {
	tb.Helper()
	n := newNode(tb, a, disks)
	var err error
	if n.servers, err = startServers(a, n.dir); err != nil {
		tb.Fatalf("%v", err)
	}
	n.KMS, n.IMDS = n.servers.kms, n.servers.imds
	n.Key = n.CreateKey(map[string]string{"Description": "data volumes"})
	if err := n.createDisks(); err != nil {
		tb.Fatalf("cannot create the disks: %v", err)
	}
	if err := createOverlay("raw", a.Root, n.overlay()); err != nil {
		tb.Fatalf("cannot create the boot disk: %v", err)
	}
	n.Provide(ConfigFile, 0o600, n.Config(config))
	return n
}

// Config returns a configuration that uses the node's key and KMS; more is added to it.
func (n *Node) Config(more string) string { return n.ConfigFor(n.Key, more) }

// ConfigFor returns a configuration with another key.
func (n *Node) ConfigFor(key, more string) string {
	// The kernel's NVMe target says of every namespace that it may be shared.
	return "kms_key: " + key + "\nkms_endpoint: " + KMSEndpoint + "\n" + more + "multi_attach: allow\n"
}

// Provide puts a file onto the node before the agent starts, at this boot and every later one.
func (n *Node) Provide(path string, mode uint32, text string) {
	n.files = slices.DeleteFunc(n.files, func(f channel.File) bool { return f.Path == path })
	n.files = append(n.files, channel.File{Path: path, Mode: mode, Data: []byte(text)})
}

// Serve lets the node reach one more server of the host, at an address of the network of IMDS. Before it is switched on.
func (n *Node) Serve(guest, host string) {
	if n.others == nil {
		n.others = map[string]string{}
	}
	n.others[guest] = host
}

// Shuffle turns the order round in which the disks appear, and with it their kernel names.
func (n *Node) Shuffle() { slices.Reverse(n.disks) }

// CreateKey makes a KMS key as an administrator and returns its ARN; input is that of CreateKey.
func (n *Node) CreateKey(input map[string]string) string {
	n.tb.Helper()
	var out struct {
		KeyMetadata struct{ Arn string }
	}
	if err := n.servers.administer("CreateKey", input, &out); err != nil {
		n.tb.Fatalf("%v", err)
	}
	return out.KeyMetadata.Arn
}

// Administer calls KMS as an administrator would: it is not recorded, and never made to fail.
func (n *Node) Administer(op string, in, out any) {
	n.tb.Helper()
	if err := n.servers.administer(op, in, out); err != nil {
		n.tb.Fatalf("%v", err)
	}
}

// UpstreamKMS is the URL at which other servers of the host reach the node's KMS: what they ask is not recorded.
func (n *Node) UpstreamKMS() string { return strings.TrimSuffix(n.servers.upstream, "/") }

func (n *Node) overlay() string { return filepath.Join(n.dir, "boot.qcow2") }

// Boot switches the node on and waits until it answers and logins are possible. It does not wait for the agent: the
// point of several stories is that a boot does not.
func (n *Node) Boot() {
	n.tb.Helper()
	n.On()
	n.AwaitActive("logins.service", 3*time.Minute)
}

// On switches the node on and waits only until it answers, early in the boot.
func (n *Node) On() {
	n.tb.Helper()
	n.launch(hardware{})
}

// launch switches the node on and waits until it answers; h says what is special about the machine.
func (n *Node) launch(h hardware) {
	n.tb.Helper()
	if n.vm != nil {
		n.tb.Fatalf("the node is already on")
	}
	n.boots++
	if err := n.writeManifest(); err != nil {
		n.tb.Fatalf("cannot write the manifest: %v", err)
	}
	n.tree = nil
	h.others = n.others
	if !h.snapshot {
		h.processors = n.Processors
	}
	h.socket, h.console, h.said = filepath.Join(n.dir, fmt.Sprintf("channel-%d", n.boots)), n.console(), filepath.Join(n.logs, "qemu.log")
	h.imds, h.kms, h.kmsTLS, h.boot = n.servers.imdsAddr, n.servers.kmsAddr, n.servers.tlsAddr, n.overlay()
	drives := []drive{{serial: channel.ManifestSerial, image: n.Image(channel.ManifestSerial)}}
	for _, d := range n.disks {
		data := drive{serial: d.Name, image: n.Image(d.Name)}
		if n.losing != nil {
			if err := n.keepLog(d.Name); err != nil {
				n.tb.Fatalf("cannot log the writes to %s: %v", d.Name, err)
			}
			data.log = n.writeLog(d.Name)
		}
		drives = append(drives, data)
	}
	h.drives = append(drives, h.drives...)
	for hung := false; ; hung = true {
		vm, err := n.assets.start(h)
		if err != nil {
			n.tb.Fatalf("cannot start QEMU: %v", err)
		}
		if _, err = vm.ask(channel.Request{Op: channel.Exec, Command: "true", Timeout: time.Minute}, 3*time.Minute); err == nil {
			n.vm = vm
			return
		}
		// What answers starts before anything of ours. One emulated boot of a hundred or so stands still before that, without a word on its console.
		n.tb.Logf("the node does not come up: %v (its console: %s)", err, n.console())
		vm.kill()
		if hung {
			n.tb.Fatalf("the node does not come up, twice")
		}
	}
}

// Reboot shuts the node down in order and boots it again.
func (n *Node) Reboot() {
	n.tb.Helper()
	n.PowerOff()
	n.Boot()
}

// PowerOff shuts the node down in order.
func (n *Node) PowerOff() {
	n.tb.Helper()
	vm := n.running()
	// The answer may be lost with the machine.
	_, _ = vm.ask(channel.Request{Op: channel.Exec, Command: "systemctl --no-block poweroff", Timeout: time.Minute}, time.Minute)
	if !vm.awaitEnd(3 * time.Minute) {
		n.tb.Fatalf("the node does not shut down (its console: %s)", n.console())
	}
	n.vm = nil
}

// PowerCut takes the power away: nothing is shut down, nothing is flushed. What the guest wrote to its data disks stays, flushed
// or not, unless LoseUnflushed was called.
func (n *Node) PowerCut() {
	n.tb.Helper()
	n.running().kill()
	n.vm = nil
	if n.losing == nil {
		return
	}
	n.cut = Cut{}
	for _, d := range n.disks {
		if err := n.loseUnflushed(d.Name); err != nil {
			n.tb.Fatalf("cannot take unflushed writes from %s: %v", d.Name, err)
		}
	}
	n.tb.Logf("the power cut took %d of %d unflushed writes", n.cut.Lost, n.cut.Unflushed)
}

func (n *Node) running() *machine {
	n.tb.Helper()
	if n.vm == nil {
		n.tb.Fatalf("the node is switched off")
	}
	return n.vm
}

// Result is how a command in the guest ended.
type Result struct {
	Command        string
	Code           int
	Stdout, Stderr string
}

func (r Result) String() string {
	return fmt.Sprintf("%s: exit code %d\n%s%s", r.Command, r.Code, r.Stdout, r.Stderr)
}

// Try runs a command in the guest's bash.
func (n *Node) Try(command string) Result { n.tb.Helper(); return n.TryWith(nil, command) }

// TryWith is Try with a standard input.
func (n *Node) TryWith(stdin []byte, command string) Result {
	n.tb.Helper()
	return n.exec(stdin, command, 3*time.Minute)
}

func (n *Node) exec(stdin []byte, command string, limit time.Duration) Result {
	n.tb.Helper()
	response, err := n.running().ask(channel.Request{Op: channel.Exec, Command: command, Stdin: stdin, Timeout: limit}, limit+time.Minute)
	if err != nil {
		n.tb.Fatalf("cannot run %q in the guest: %v\n%s%s", command, err, response.Stdout, response.Stderr)
	}
	return Result{Command: command, Code: response.Code, Stdout: string(response.Stdout), Stderr: string(response.Stderr)}
}

// ShLong is Sh for what takes more than a minute or two.
func (n *Node) ShLong(command string, limit time.Duration) string {
	n.tb.Helper()
	r := n.exec(nil, command, limit)
	if r.Code != 0 {
		n.tb.Fatalf("%s", r)
	}
	return r.Stdout
}

// Meter is ShLong for what is to be measured: it returns what the command cost the machine.
func (n *Node) Meter(command string, limit time.Duration) (cost channel.Cost) {
	n.tb.Helper()
	const result, script = "/run/story-cost", "/run/story-measured"
	n.Write(script, 0o700, command)
	n.ShLong("/usr/local/lib/story/guest meter "+result+" bash "+script, limit)
	if err := json.Unmarshal(n.Read(result), &cost); err != nil {
		n.tb.Fatalf("cannot read what it cost: %v", err)
	}
	return cost
}

// Sh runs a command in the guest that must succeed, and returns what it printed.
func (n *Node) Sh(command string) string {
	n.tb.Helper()
	return n.ShWith(nil, command)
}

// ShWith is Sh with a standard input.
func (n *Node) ShWith(stdin []byte, command string) string {
	n.tb.Helper()
	r := n.TryWith(stdin, command)
	if r.Code != 0 {
		n.tb.Fatalf("%s", r)
	}
	return r.Stdout
}

// Agent runs the agent from the command line.
func (n *Node) Agent(arguments string) Result {
	n.tb.Helper()
	return n.Try("luks-kms-agent " + arguments)
}

// Write puts a file onto the running node.
func (n *Node) Write(path string, mode uint32, text string) {
	n.tb.Helper()
	if _, err := n.running().ask(channel.Request{Op: channel.Put, Path: path, Mode: mode, Data: []byte(text)}, time.Minute); err != nil {
		n.tb.Fatalf("cannot write %s in the guest: %v", path, err)
	}
}

// Read returns a file of the running node.
func (n *Node) Read(path string) []byte {
	n.tb.Helper()
	response, err := n.running().ask(channel.Request{Op: channel.Get, Path: path}, time.Minute)
	if err != nil {
		n.tb.Fatalf("cannot read %s in the guest: %v", path, err)
	}
	return response.Data
}

// Unit returns properties of a unit: ActiveState, SubState, Result, ExecMainStatus, StatusText, NRestarts.
func (n *Node) Unit(unit string) map[string]string {
	n.tb.Helper()
	properties := map[string]string{}
	for line := range strings.Lines(n.Sh("systemctl show -p ActiveState,SubState,Result,ExecMainStatus,StatusText,NRestarts " + unit)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		properties[name] = value
	}
	return properties
}

// Await asks until is says yes, and ends the story when limit has passed.
func (n *Node) Await(what string, limit time.Duration, is func() bool) {
	n.tb.Helper()
	for deadline := time.Now().Add(limit); ; {
		asked := time.Now()
		if is() {
			return
		}
		if time.Now().After(deadline) {
			n.tb.Fatalf("%s: not within %v", what, limit)
		}
		// An emulated guest that is always asked does little else.
		time.Sleep(max(200*time.Millisecond, 2*time.Since(asked)))
	}
}

// has says whether a file of the running node holds anything. It costs the guest no process.
func (n *Node) has(path string) bool {
	n.tb.Helper()
	response, err := n.running().ask(channel.Request{Op: channel.Get, Path: path}, time.Minute)
	return err == nil && len(response.Data) > 0
}

// AwaitActive waits until a unit is active.
func (n *Node) AwaitActive(unit string, limit time.Duration) {
	n.tb.Helper()
	n.Await(unit+" is active", limit, func() bool { return n.Unit(unit)["ActiveState"] == "active" })
}

// AwaitAgent waits until the agent's service has ended its work of this boot, and returns the exit code of it.
func (n *Node) AwaitAgent() string {
	n.tb.Helper()
	var unit map[string]string
	n.Await("luks-kms-agent.service is done", 8*time.Minute, func() bool {
		if n.runs() {
			return false
		}
		unit = n.Unit("luks-kms-agent.service")
		return unit["ActiveState"] == "active" || unit["ActiveState"] == "failed"
	})
	return unit["ExecMainStatus"]
}

// runs says whether the agent's service has a process.
func (n *Node) runs() bool {
	n.tb.Helper()
	return n.has("/sys/fs/cgroup/system.slice/luks-kms-agent.service/cgroup.procs")
}

// AwaitVolumes waits for the agent and ends the story if anything did not go as planned.
func (n *Node) AwaitVolumes() {
	n.tb.Helper()
	if code := n.AwaitAgent(); code != "0" {
		n.tb.Fatalf("luks-kms-agent.service ended with exit code %s\n%s", code, n.Journal())
	}
}

// Journal returns what the agent's service logged in this boot.
func (n *Node) Journal() string {
	n.tb.Helper()
	return n.Try("journalctl -b --no-pager -o cat -u luks-kms-agent.service").Stdout
}

// Status returns the agent's status as JSON decodes it.
func (n *Node) Status() map[string]any {
	n.tb.Helper()
	var status map[string]any
	if err := json.Unmarshal([]byte(n.Sh("luks-kms-agent status --json")), &status); err != nil {
		n.tb.Fatalf("luks-kms-agent status --json: %v", err)
	}
	return status
}

// KeyRecord is what the stories read of a key record on the boot volume.
type KeyRecord struct {
	ID         string
	KeyARN     string
	WrappedKey []byte
}

// KeyRecords returns the key records on the boot volume.
func (n *Node) KeyRecords() []KeyRecord {
	n.tb.Helper()
	var records []KeyRecord
	for _, file := range strings.Fields(n.Sh("ls /var/lib/luks-kms-agent/keys/*.json")) {
		var fields map[string]json.RawMessage
		b := n.Read(file)
		if err := json.Unmarshal(b, &fields); err != nil {
			n.tb.Fatalf("%s: %v", file, err)
		}
		r := KeyRecord{ID: strings.TrimSuffix(filepath.Base(file), ".json")}
		for name, target := range map[string]any{"key_arn": &r.KeyARN, "wrapped_key": &r.WrappedKey} {
			if err := json.Unmarshal(fields[name], target); err != nil {
				n.tb.Fatalf("%s: field %s: %v", file, name, err)
			}
		}
		records = append(records, r)
	}
	return records
}

// Unwrap does what `aws kms decrypt --query Plaintext --output text` does: it returns the base64 that KMS answers.
func (n *Node) Unwrap(r KeyRecord) string {
	n.tb.Helper()
	var out struct{ Plaintext string }
	n.Administer("Decrypt", map[string]any{"KeyId": r.KeyARN, "CiphertextBlob": r.WrappedKey}, &out)
	return out.Plaintext
}

// State returns the name and digest of every file in the agent's state directory.
func (n *Node) State() string {
	n.tb.Helper()
	return n.Sh("cd /var/lib/luks-kms-agent 2>/dev/null || exit 0; find . -type f ! -name lock -print0 | sort -z | xargs -0r sha256sum")
}

// Console returns where the guest's serial console is kept.
func (n *Node) console() string { return filepath.Join(n.logs, "console.log") }

// close ends everything, keeps the logs of a story that failed, and fails one whose node used KMS or IMDS in a way that a
// node must not.
func (n *Node) close() {
	n.tb.Helper()
	if n.servers != nil {
		n.checkManners()
	}
	if n.vm != nil {
		if n.tb.Failed() {
			n.saveJournal()
		}
		n.vm.kill()
	}
	if n.servers != nil {
		n.saveCalls()
		n.servers.stop()
	}
	if err := os.RemoveAll(n.dir); err != nil {
		n.tb.Errorf("%v", err)
	}
	if n.tb.Failed() {
		n.tb.Logf("console, journal and calls: %s", n.logs)
	} else if err := os.RemoveAll(n.logs); err != nil {
		n.tb.Errorf("%v", err)
	}
}

func (n *Node) checkManners() {
	n.tb.Helper()
	for _, call := range n.KMS.Offences() {
		n.tb.Errorf("KMS was called with an encryption context: %s", call)
	}
	if insecure := n.IMDS.Insecure(); len(insecure) > 0 {
		n.tb.Errorf("instance metadata was asked without a token: %s", strings.Join(insecure, ", "))
	}
}

func (n *Node) saveJournal() {
	const commands = "journalctl --no-pager -o short-monotonic; systemctl --no-pager --failed; lsblk; findmnt; dmsetup table --showkeys | sed 's/ [0-9a-f]\\{64,\\} / [key] /'; cat /run/luks-kms-agent/status.json"
	response, err := n.vm.ask(channel.Request{Op: channel.Exec, Command: commands, Timeout: 20 * time.Second}, 30*time.Second)
	if err != nil {
		n.tb.Logf("cannot read the journal: %v", err)
	}
	if err := os.WriteFile(filepath.Join(n.logs, "journal.log"), append(response.Stdout, response.Stderr...), 0o600); err != nil {
		n.tb.Logf("%v", err)
	}
}

func (n *Node) saveCalls() {
	var b strings.Builder
	for _, call := range n.KMS.Calls() {
		fmt.Fprintf(&b, "%s %s\n", call.Time.Format(time.TimeOnly), call)
	}
	for _, request := range n.IMDS.Requests() {
		fmt.Fprintf(&b, "%s\n", request)
	}
	if err := os.WriteFile(filepath.Join(n.logs, "calls.log"), []byte(b.String()), 0o600); err != nil {
		n.tb.Logf("%v", err)
	}
}

// ChangedDisks returns the names of the disks whose digests differ.
func ChangedDisks(before, after map[string]string) []string {
	var changed []string
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if before[name] != after[name] {
			changed = append(changed, name)
		}
	}
	return changed
}
