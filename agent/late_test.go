package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/luks-kms-agent/luks-kms-agent/keycache"
	"github.com/luks-kms-agent/luks-kms-agent/volumes"
)

// take removes the last disk and returns a function that puts it back.
func (m *machine) take() (back func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	last := m.devices[len(m.devices)-1]
	m.devices = m.devices[:len(m.devices)-1]
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.devices, m.missing = append(m.devices, last), nil
	}
}

// whenMounted calls back once a volume is mounted.
func (m *machine) whenMounted(where string, back func()) {
	go func() {
		for m.t.Context().Err() == nil {
			m.mu.Lock()
			mounted := m.mounts[where] != ""
			m.mu.Unlock()
			if mounted {
				back()
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
}

// A recorded volume that comes late is opened when it comes, under the key that
// was decrypted once; the others do not wait for it.
func TestLateVolumeIsOpenedWhenItComes(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS1")
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	before := m.sums()
	decrypted := m.kms.Count("Decrypt")
	m.cfg.DeviceWait = time.Minute
	m.whenMounted("/mnt", m.take())
	r := m.runOK()
	if len(r.Outcomes) != 2 || r.Outcomes[0].Action.Verb != Unlock || r.Outcomes[1].Action.Verb != Unlock || m.mounts["/mnt1"] == "" {
		t.Errorf("outcomes %+v, mounts %v", r.Outcomes, m.mounts)
	}
	if got := m.kms.Count("Decrypt") - decrypted; got != 1 {
		t.Errorf("Decrypt was called %d times, want once", got)
	}
	m.untouched(before)
}

// A volume that is named in the configuration is waited for also where it was
// never seen; it then shares the node's data key.
func TestLateNamedVolumeIsFormattedWhenItComes(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS1")
	d := m.disk(volumes.ClassEBS, "vol-1")
	back := m.take()
	d.Named = "vol-1"
	m.cfg.Volumes = []VolumeConfig{{Name: "vol-1", MountPoint: "/data"}}
	m.missing = []volumes.Missing{{Name: "vol-1", Reason: "is not here"}}
	m.cfg.DeviceWait = time.Minute
	m.whenMounted("/mnt", func() {
		back()
		m.mu.Lock()
		defer m.mu.Unlock()
		m.devices[len(m.devices)-1] = d
	})
	m.runOK()
	if m.mounts["/data"] == "" || m.kms.Count("GenerateDataKey") != 1 || len(m.records().Volumes) != 2 {
		t.Errorf("mounts %v, %d data keys, records %+v", m.mounts, m.kms.Count("GenerateDataKey"), m.records())
	}
}

// A volume that never comes fails the run after the wait, once, by its name.
func TestVolumeThatNeverComes(t *testing.T) {
	m := newMachine(t)
	m.disk(volumes.ClassInstanceStore, "AWS1")
	m.disk(volumes.ClassEBS, "vol-1")
	m.runOK()
	m.reboot()
	m.take()
	m.cfg.DeviceWait = 50 * time.Millisecond
	start := time.Now()
	r := m.run()
	var refused *RefusedError
	if f := r.Failures(); len(f) != 1 || !errors.As(f[0], &refused) || refused.Refusal != RefusedDevice {
		t.Errorf("failures %v, want the missing volume", f)
	}
	if m.mounts["/mnt"] == "" || time.Since(start) < m.cfg.DeviceWait {
		t.Errorf("mounts %v after %v", m.mounts, time.Since(start))
	}
}

// What one pass refused or failed at is not tried again because another disk comes.
func TestLateVolumeDoesNotRepeatFailures(t *testing.T) {
	m := newMachine(t)
	foreign := m.disk(volumes.ClassInstanceStore, "AWS1")
	m.write(foreign, 1080, []byte{0x53, 0xef}) // ext4's magic number
	m.disk(volumes.ClassInstanceStore, "AWS2")
	m.disk(volumes.ClassEBS, "vol-1")
	m.run()
	m.reboot()
	before := m.sums()
	m.cfg.DeviceWait = time.Minute
	m.whenMounted("/mnt", m.take())
	r := m.run()
	if len(r.Failures()) != 1 || len(r.Outcomes) != 3 || m.mounts["/mnt1"] == "" {
		t.Errorf("outcomes %+v, mounts %v", r.Outcomes, m.mounts)
	}
	m.untouched(before)
}

// A record that cannot be read is reported once, however many passes a run has.
func TestLateVolumeBesideAnUnreadableRecord(t *testing.T) {
	o := Action{Verb: Refuse, Refusal: RefusedRecord, Reason: "cannot read record 1"}
	other := Action{Verb: Refuse, Refusal: RefusedRecord, Reason: "cannot read record 2"}
	disk := Action{Device: DeviceFacts{Device: volumes.Device{Path: "/dev/nvme1n1", DiskSeq: 1}}, Volume: keycache.VolumeRecord{UUID: "u"}}
	attachedAnew := disk
	attachedAnew.Device.DiskSeq = 2
	if !o.sameSubject(o) || o.sameSubject(other) || o.sameSubject(disk) || !disk.sameSubject(disk) || disk.sameSubject(attachedAnew) {
		t.Error("subjects are mixed up")
	}
}

// A disk that udev is not done with may be one that the configuration excludes by a link: the first run of a boot waits for udev, and never
// formats it before.
func TestDiskThatMayBeExcludedWaitsForUdev(t *testing.T) {
	const link = "/dev/disk/by-id/theirs"
	for name, exclude := range map[string]string{"it is excluded": link, "no link comes": "/dev/disk/by-id/other"} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.disk(volumes.ClassEBS, "vol-1")
			m.disk(volumes.ClassEBS, "vol-2")
			m.unannounced = map[string]bool{"vol-2": true}
			m.cfg.Exclude, m.cfg.DeviceWait = []string{exclude}, time.Minute
			before := m.sums()
			m.whenMounted("/mnt", func() {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.devices[1].Links, m.unannounced = []string{link}, nil
			})
			r := m.runOK()
			excluded := exclude == link
			if got := m.sums()["vol-2"]; (got == before["vol-2"]) != excluded || (m.mounts["/mnt1"] == "") != excluded {
				t.Errorf("outcomes %+v, mounts %v", r.Outcomes, m.mounts)
			}
		})
	}

	m := newMachine(t)
	m.disk(volumes.ClassEBS, "vol-1")
	m.unannounced = map[string]bool{"vol-1": true}
	m.cfg.Exclude = []string{link}
	before := m.sums()
	errs := m.run().Failures()
	if len(errs) != 1 || !strings.Contains(errs[0].Error(), "udev is not done with ") || !strings.Contains(errs[0].Error(), link) {
		t.Errorf("udev never is: %v", errs)
	}
	m.untouched(before)
	// Whatever the configuration names otherwise is there without udev.
	m.cfg.Exclude = []string{"vol-9"}
	m.runOK()
	if m.mounts["/mnt"] == "" {
		t.Errorf("mounts %v", m.mounts)
	}
}
