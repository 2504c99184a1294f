package harness

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/test/vm/channel"
)

// rootUUID is the partition that image.sh makes.
const rootUUID = "4c554b53-4b4d-5301-8000-000000000001"

// machine is one run of QEMU, from power on to power off.
type machine struct {
	leash  io.Closer // closing it kills QEMU
	ended  chan struct{}
	conn   net.Conn
	writes sync.Mutex

	mu      sync.Mutex
	lastID  int
	waiting map[int]chan channel.Response
	broken  error // why the channel is gone
}

// createOverlay makes a disk on top of another one, in that one's format.
func createOverlay(format, base, overlay string) error {
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", base, overlay).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img: %w: %s", err, out)
	}
	return nil
}

// manifestSize is that of the disk with the manifest, in bytes; disks come in sectors.
const manifestSize = 1 << 20

func encodeManifest(m channel.Manifest) ([]byte, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if len(b) > manifestSize {
		return nil, fmt.Errorf("the manifest has %d bytes, more than its disk", len(b))
	}
	return append(b, make([]byte, manifestSize-len(b))...), nil
}

// hardware is what one run of QEMU is given.
type hardware struct {
	socket, console, said string            // the channel, the serial console, QEMU's own messages
	imds, kms, kmsTLS     string            // the servers on the host, as host:port
	others                map[string]string // more of them, by their address in the guest
	boot                  string            // the boot disk, qcow2
	drives                []drive

	processors int // 0 for those of the assets

	initrd   string // "" for none
	init     string // what runs as the first process; "" for systemd
	snapshot bool   // the machine of a snapshot: its boot disk is on virtio, and the guest knows
	monitor  string // socket of a QMP monitor; "" for none
	incoming string // file with the state of the machine to resume; "" to power on
}

// drive is one virtio disk.
type drive struct {
	serial string
	image  string // raw; "" for DiskSize of zeros that keeps nothing
	log    string // file for the log of what the guest writes; "" for none
}

// start starts QEMU and connects to the guest's channel.
func (a *Assets) start(h hardware) (*machine, error) {
	args, err := a.qemuArguments(h)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(a.Guest, append([]string{"leash", "qemu-system-x86_64"}, args...)...)
	leash, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	said, err := os.OpenFile(h.said, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = said, said
	err = cmd.Start()
	_ = said.Close()
	if err != nil {
		return nil, err
	}
	m := &machine{leash: leash, ended: make(chan struct{}), waiting: map[int]chan channel.Response{}}
	go func() {
		_ = cmd.Wait()
		close(m.ended)
	}()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if m.conn, err = net.Dial("unix", h.socket); err == nil {
			go m.receive()
			return m, nil
		}
		select {
		case <-m.ended:
			b, _ := os.ReadFile(said.Name())
			return nil, fmt.Errorf("it ended at once: %s", lastLines(b, 10))
		default:
		}
	}
	m.kill()
	return nil, err
}

func (a *Assets) qemuArguments(h hardware) ([]string, error) {
	accel, cpu := "tcg,thread=multi", "max"
	if os.Getenv("VM_ACCEL") == "kvm" {
		accel, cpu = "kvm", "host"
	}
	relay := func(guest, host string) string {
		return fmt.Sprintf(",guestfwd=tcp:%s-cmd:%s relay %s", guest, a.Guest, host)
	}
	servers := relay(IMDSAddress, h.imds) + relay(KMSAddress, h.kms) + relay(KMSTLSAddress, h.kmsTLS)
	for guest, host := range h.others {
		servers += relay(guest, host)
	}
	kernel := "root=PARTUUID=" + rootUUID + " rw rootwait console=ttyS0 net.ifnames=0 quiet loglevel=4 " +
		"systemd.show_status=false mitigations=off audit=0 nokaslr no_timer_check random.trust_cpu=on"
	boot := "nvme,serial=vol0b007b007b007b007,drive=boot"
	if h.init != "" {
		kernel += " init=" + h.init
	}
	if h.snapshot {
		kernel += snapshotArguments
		boot = "virtio-blk-pci,drive=boot,serial=" + channel.BootSerial
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", accel, "-cpu", cpu, "-smp", strconv.Itoa(cmp.Or(h.processors, a.Processors, 2)), "-m", "1024",
		"-kernel", a.Kernel, "-append", kernel,
		"-chardev", "file,id=console,append=on,path=" + h.console, "-serial", "chardev:console",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=channel,server=on,wait=off,path=" + h.socket,
		"-device", "virtserialport,chardev=channel,name=" + channel.Port,
		// The network of a link-local address holds the servers; restrict keeps everything else out of reach.
		"-netdev", "user,id=net,restrict=on,net=169.254.169.0/24,host=169.254.169.2,dns=169.254.169.3,dhcpstart=169.254.169.100" +
			servers,
		"-device", "virtio-net-pci,netdev=net,romfile=",
		// qcow2 keeps metadata in QEMU's memory until a flush, and QEMU's NVMe disk takes a write that is to go through the cache (FUA,
		// as the last block of ext4's journal) for any other: so each write is one that is flushed, as far as the host's page cache.
		"-drive", "if=none,id=boot,format=qcow2,cache.writeback=off,cache.no-flush=on,file=" + h.boot,
		"-device", boot,
	}
	for _, d := range h.drives {
		backend, err := d.backend()
		if err != nil {
			return nil, err
		}
		device := "virtio-blk-pci,drive=" + d.serial + ",serial=" + d.serial
		if h.snapshot || d.log != "" {
			// QEMU before 9.0 spoils its log where zeros are written beside something else.
			device += ",discard=off,write-zeroes=off"
		}
		args = append(args, backend...)
		args = append(args, "-device", device)
	}
	if h.initrd != "" {
		args = append(args, "-initrd", h.initrd)
	}
	if h.monitor != "" {
		args = append(args, "-qmp", "unix:"+h.monitor+",server=on,wait=off")
	}
	if h.incoming != "" {
		args = append(args, "-incoming", "exec:cat "+h.incoming)
	}
	return args, nil
}

// backend returns the arguments that give a drive its storage.
func (d drive) backend() ([]string, error) {
	if d.image == "" {
		return []string{"-drive", fmt.Sprintf("if=none,driver=null-co,read-zeroes=on,size=%d,id=%s", DiskSize, d.serial)}, nil
	}
	if d.log == "" {
		// What the guest wrote to a raw image is in the host's page cache, which a killed QEMU does not take along.
		return []string{"-drive", "if=none,format=raw,cache=unsafe,id=" + d.serial + ",file=" + d.image}, nil
	}
	// The guest's flushes have to reach the log, but not the host's disk.
	file := func(name string) map[string]any {
		return map[string]any{"driver": "file", "filename": name, "cache": map[string]any{"no-flush": true}}
	}
	b, err := json.Marshal(map[string]any{
		"node-name": d.serial, "driver": "blklogwrites", "log-sector-size": logSector, "file": file(d.image), "log": file(d.log),
	})
	return []string{"-blockdev", string(b)}, err
}

// ask sends a request and waits for the answer.
func (m *machine) ask(request channel.Request, limit time.Duration) (channel.Response, error) {
	answer := make(chan channel.Response, 1)
	m.mu.Lock()
	if m.broken != nil {
		m.mu.Unlock()
		return channel.Response{}, m.broken
	}
	m.lastID++
	request.ID = m.lastID
	m.waiting[request.ID] = answer
	m.mu.Unlock()

	b, err := json.Marshal(request)
	if err != nil {
		return channel.Response{}, err
	}
	m.writes.Lock()
	_, err = m.conn.Write(append(b, '\n'))
	m.writes.Unlock()
	if err != nil {
		return channel.Response{}, err
	}
	select {
	case response, ok := <-answer:
		if !ok {
			return channel.Response{}, errors.New("the guest went away")
		}
		if response.Error != "" {
			return response, errors.New(response.Error)
		}
		return response, nil
	case <-time.After(limit):
		return channel.Response{}, fmt.Errorf("no answer from the guest within %v", limit)
	}
}

// receive hands answers out until QEMU is gone.
func (m *machine) receive() {
	decoder := json.NewDecoder(m.conn)
	for {
		var response channel.Response
		err := decoder.Decode(&response)
		m.mu.Lock()
		if err != nil {
			m.broken = fmt.Errorf("the guest went away: %w", err)
			for _, answer := range m.waiting {
				close(answer)
			}
			m.waiting = nil
			m.mu.Unlock()
			return
		}
		answer := m.waiting[response.ID]
		delete(m.waiting, response.ID)
		m.mu.Unlock()
		if answer != nil {
			answer <- response
		}
	}
}

// awaitEnd waits for QEMU to end by itself.
func (m *machine) awaitEnd(limit time.Duration) bool {
	select {
	case <-m.ended:
		_ = m.conn.Close()
		return true
	case <-time.After(limit):
		return false
	}
}

// kill ends QEMU with SIGKILL and waits for its end.
func (m *machine) kill() {
	_ = m.leash.Close()
	<-m.ended
	if m.conn != nil {
		_ = m.conn.Close()
	}
}
